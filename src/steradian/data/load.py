"""The data section of a configuration: read the files, split them, check the splits, record where all came from."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from steradian.config import DataConfig, KeysConfig, SplitConfig, UnitsConfig
from steradian.config.text import parse_json, read_text
from steradian.data.files import read_structures
from steradian.data.formats import load_npz
from steradian.data.labels import is_isolated_atom, keep_uniform_labels
from steradian.graph.structures import DataError, Structure

__all__ = ["Dataset", "bundled_file", "frame_key", "load_dataset", "split_indices"]

BUNDLED = ("malonaldehyde",)


@dataclass(frozen=True)
class Dataset:
    """Frames of the three splits and where they come from.

    Attributes:
        train, validation, test: frames; validation and test may be empty.
        provenance: JSON-able: files (role, path, sha256, frames), counts, indices of every split into the
            concatenated training files, and ``warnings``, one line each.
    """

    train: list[Structure]
    validation: list[Structure]
    test: list[Structure]
    provenance: dict[str, Any] = field(default_factory=dict)


def load_dataset(config: DataConfig, *, require: Sequence[str] = ("energy", "forces")) -> Dataset:
    """Read and split the data of a configuration.

    Validation and test frames come from their own files where given, else they are split off the training files.
    Isolated atoms always count as training frames: they serve the reference energies.

    Args:
        require: labels every training and validation frame must have. Test frames must have energies; another label
            that they lack is noted in the warnings.

    Raises:
        DataError: what :func:`~steradian.data.files.read_structures` raises; splits that are too large, overlap or use
            one file twice; an element that occurs in validation or test only.
    """
    reader = _Reader(config)
    frames = reader.read("train", config.train, require)
    validation = reader.read("validation", config.validation, require)
    test = reader.read("test", config.test, [label for label in require if label == "energy"])
    for label in require:
        if test and any(getattr(frame, label) is None for frame in test):
            reader.warnings.append(f"test: no {label}; the errors of {label} are left out")
    fixed = [index for index, frame in enumerate(frames) if is_isolated_atom(frame)]
    if len(fixed) == len(frames):
        raise DataError(f"data.train: {len(frames)} isolated atoms and no other frame: add frames with neighbours")
    if len(frames) == len(fixed) + 1 and not (validation and (test or not config.split.test)):
        raise DataError(
            "data.train: one frame cannot be split into training and validation frames: give more frames, or a file "
            "of other frames as data.validation"
        )
    indices = split_indices(
        len(frames), config.split, fixed=fixed, has_validation=bool(validation), has_test=bool(test)
    )
    splits = {
        "train": [frames[index] for index in indices["train"]],
        "validation": validation or [frames[index] for index in indices["validation"]],
        "test": test or [frames[index] for index in indices["test"]],
    }
    if not splits["train"]:
        raise DataError("the split leaves no training frames; give data.validation (a file) or more frames")
    _check_elements(splits, config.reference_energies.kind in ("auto", "isolated_atoms"))
    _note_duplicates(splits, reader.warnings)
    provenance = {
        "files": reader.files,
        "counts": {name: len(split) for name, split in splits.items()},
        "split": config.split.model_dump(mode="json"),
        "indices": indices,
        "keys": config.keys.model_dump(mode="json"),
        "units": config.units.model_dump(mode="json"),
        "warnings": reader.warnings,
    }
    return Dataset(**{name: keep_uniform_labels(split, ()) for name, split in splits.items()}, provenance=provenance)


# ------------------------------------------------------------------------------------------------------------- files


class _Reader:
    """Reads the files of one configuration and remembers what it read."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.files: list[dict[str, Any]] = []
        self.warnings: list[str] = []

    def read(self, role: str, source: object, require: Sequence[str]) -> list[Structure]:
        if source is None:
            return []
        names = [str(name) for name in (source if isinstance(source, list) else [source])]
        if not names:
            raise DataError(f"data.{role}: an empty list of files")
        frames: list[Structure] = []
        for name in [file for given in names for file in files_of(given)]:
            bundled = name.startswith("bundled:")
            path = bundled_file(name, role) if bundled else Path(name)
            keys = KeysConfig() if bundled else self.config.keys
            units = UnitsConfig() if bundled else self.config.units
            notes: list[str] = []
            read = read_structures(path, keys, units, require=require, ignore_cell=self.config.ignore_cell, notes=notes)
            self.warnings += [f"{role}: {note}" for note in notes]
            digest = sha256(path)
            for other in self.files:
                if other["sha256"] == digest:
                    raise DataError(
                        f"{path} is given twice, as data.{other['role']} and as data.{role}: "
                        "the splits must not share frames"
                    )
            self.files.append({"role": role, "path": name, "sha256": digest, "frames": len(read)})
            frames += read
        return frames


def files_of(name: str) -> list[str]:
    """The files that a name means: itself, what a pattern (``*.xyz``) matches, or the XYZ and npz files of a folder.

    Raises:
        DataError: a pattern that matches nothing.
    """
    path = Path(name)
    if path.is_dir() and not any(path.rglob("type.raw")):
        suffixes = (".xyz", ".extxyz", ".npz", ".db", ".traj")
        return sorted(str(file) for file in path.iterdir() if file.suffix.lower() in suffixes) or [name]
    if not path.exists() and any(letter in name for letter in "*?["):
        found = sorted(glob.glob(name, recursive=True))
        if not found:
            raise DataError(f"{name}: no file matches")
        return found
    return [name]


def bundled_file(name: str, role: str = "train") -> Path:
    """Path of a data set that comes with the package: ``bundled:malonaldehyde``, its training or its test frames.

    Raises:
        DataError: no such set.
    """
    molecule = name.removeprefix("bundled:")
    if molecule not in BUNDLED:
        raise DataError(
            f"{name}: no such data set; the package brings {', '.join('bundled:' + known for known in BUNDLED)}"
        )
    part = "test" if role == "test" else "train"
    return Path(str(resources.files("steradian.data") / "bundled" / f"{molecule}_{part}.npz"))


def sha256(path: Path) -> str:
    """Hash of a file, or of all files below a folder with their names."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode())
        if file.is_file():
            with file.open("rb") as content:
                while block := content.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------- splits


def split_indices(
    count: int,
    config: SplitConfig,
    *,
    fixed: Sequence[int] = (),
    has_validation: bool = False,
    has_test: bool = False,
) -> dict[str, list[int]]:
    """Indices of the training, validation and test frames among ``count`` frames; disjoint, each list ascending.

    Args:
        fixed: frames that stay in training and count for nothing (isolated atoms).
        has_validation, has_test: these frames come from their own files, so none are split off.

    Raises:
        DataError: the parts ask for more frames than there are, or an index file is wrong.
    """
    if config.index_file is not None:
        return _from_index_file(config.index_file, count, fixed, has_validation, has_test)
    free = np.setdiff1d(np.arange(count), np.asarray(fixed, dtype=np.int64))
    if config.shuffle:
        free = np.random.default_rng(config.seed).permutation(free)
    validation = 0 if has_validation else _amount("validation", config.validation, len(free))
    test = 0 if has_test else _amount("test", config.test, len(free))
    train = len(free) - validation - test if config.train is None else _amount("train", config.train, len(free))
    if train < 0 or train + validation + test > len(free):
        wanted = f"{train} training, " if config.train is not None else ""
        raise DataError(f"data.split asks for {wanted}{validation} validation and {test} test frames of {len(free)}")
    # Training from the front, the others from the back: with one seed, runs on fewer or more training frames share
    # their validation and test frames, and the smaller training set lies within the larger.
    back = len(free) - test
    parts = {
        "train": [*free[:train].tolist(), *fixed],
        "validation": free[back - validation : back].tolist(),
        "test": free[back:].tolist(),
    }
    return {name: sorted(int(index) for index in part) for name, part in parts.items()}


def _amount(name: str, wanted: int | float, count: int) -> int:
    """Frames that a count or a fraction means; a fraction above zero gives at least one frame."""
    if wanted < 0 or (isinstance(wanted, float) and wanted >= 1):
        raise DataError(f"data.split.{name}: {wanted} is neither a whole number of frames nor a fraction below 1")
    if isinstance(wanted, float):
        return max(1, round(wanted * count)) if wanted > 0 else 0
    return wanted


def _from_index_file(
    path: Path, count: int, fixed: Sequence[int], has_validation: bool, has_test: bool
) -> dict[str, list[int]]:
    content = _index_arrays(path)
    used = ["train", *([] if has_validation else ["validation"]), *([] if has_test else ["test"])]
    parts: dict[str, list[int]] = {}
    taken: dict[int, str] = {}
    for name in ("train", "validation", "test"):
        values = np.asarray(content.get(name, []) if name in used else [])
        if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
            raise DataError(f"{path}: '{name}' must be a list of whole numbers")
        parts[name] = values.tolist()
        for index in parts[name]:
            if not 0 <= index < count:
                raise DataError(f"{path}: index {index} of '{name}' is outside 0 to {count - 1}")
            if index in taken:
                where = f"twice in '{name}'" if taken[index] == name else f"in '{taken[index]}' and in '{name}'"
                raise DataError(f"{path}: frame {index} stands {where}; the splits must not share frames")
            taken[index] = name
    parts["train"] += [int(index) for index in fixed if index not in taken]
    return {name: sorted(part) for name, part in parts.items()}


def _index_arrays(path: Path) -> dict[str, Any]:
    where = "data.split.index_file"
    if path.exists() and not path.is_file():
        raise DataError(f"{where}: {path} is not a file")
    try:
        content: Any = load_npz(path) if path.suffix == ".npz" else parse_json(read_text(path))
    except OSError as error:
        raise DataError(f"{where}: {path} cannot be read ({error.strerror or 'damaged'})") from None
    except ValueError as error:
        raise DataError(f"{where}: {path} is neither npz nor JSON ({error})") from None
    if not isinstance(content, dict) or "train" not in content:
        found = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise DataError(f"data.split.index_file: {path} has no 'train' (found: {found})")
    return content


# ------------------------------------------------------------------------------------------------------------- checks


def frame_key(structure: Structure) -> bytes:
    """Hash that two frames share when atoms, positions and cell are the same to 1e-6 Å."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(structure.numbers.tobytes())
    digest.update((np.round(structure.positions, 6) + 0.0).tobytes())
    digest.update((np.round(structure.cell, 6) + 0.0).tobytes())
    return digest.digest()


def _note_duplicates(splits: dict[str, list[Structure]], warnings: list[str]) -> None:
    keys = {name: [frame_key(frame) for frame in split if len(frame) > 1] for name, split in splits.items()}
    repeated = len(keys["train"]) - len(set(keys["train"]))
    if repeated:
        warnings.append(f"train: {repeated} of {len(keys['train'])} frames are exact copies of others")
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        known = set(keys[first])
        shared = sum(key in known for key in keys[second])
        if shared:
            warnings.append(f"{second}: {shared} of {len(keys[second])} frames are exact copies of frames of {first}")


def _check_elements(splits: dict[str, list[Structure]], without_atoms: bool) -> None:
    """Every element must be learnt from a training frame, which isolated atoms that serve E0 are not."""
    elements = {
        name: {
            int(z)
            for frame in split
            if not (without_atoms and name == "train" and is_isolated_atom(frame))
            for z in np.unique(frame.numbers)
        }
        for name, split in splits.items()
    }
    for name in ("validation", "test"):
        new = sorted(elements[name] - elements["train"])
        if new:
            symbols = ", ".join(chemical_symbols[z] for z in new)
            raise DataError(f"{symbols} occurs in the {name} frames but not in training: the model cannot learn it")
