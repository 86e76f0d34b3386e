"""Labelled frames from any supported file or folder, and into the formats that are written."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ase.io.extxyz import write_xyz

from steradian.checkpoint import open_atomically
from steradian.config import KeysConfig, UnitsConfig
from steradian.data.extxyz import read_extxyz
from steradian.data.formats import (
    READABLE,
    deepmd_systems,
    read_ase,
    read_ase_db,
    read_deepmd,
    read_npz,
    read_pymatgen_json,
)
from steradian.data.labels import RawFrame, keep_uniform_labels, nearest, to_structures
from steradian.graph.structures import LABELS, DataError, Structure

__all__ = [
    "WRITABLE",
    "read_raw",
    "read_structures",
    "write_structures",
]

# Formats that users bring and that are not read, by suffix.
FOREIGN = {
    ".h5": "HDF5", ".hdf5": "HDF5", ".hdf": "HDF5", ".lmdb": "LMDB", ".mdb": "LMDB", ".aselmdb": "LMDB",
    ".pt": "a PyTorch file", ".pth": "a PyTorch file", ".pkl": "a pickle", ".pickle": "a pickle", ".npy": "one array",
    ".csv": "a table", ".parquet": "a table", ".tfrecord": "TFRecord", ".zip": "an archive", ".tar": "an archive",
    ".tgz": "an archive", ".safetensors": "a model", ".yaml": "a configuration", ".yml": "a configuration",
}  # fmt: skip


def read_structures(
    path: Path | str,
    keys: KeysConfig | None = None,
    units: UnitsConfig | None = None,
    *,
    require: Sequence[str] = ("energy", "forces"),
    ignore_cell: bool = False,
    notes: list[str] | None = None,
) -> list[Structure]:
    """Read, convert to eV and Å, and check all frames of a file or folder.

    Formats, by suffix: ``.xyz`` and ``.extxyz`` (extended XYZ); ``.npz`` (rMD17, MD17, MD22 and other arrays over
    frames); a folder (DeePMD npy, one system or several); ``.db`` (ASE database); ``.json`` (lists of pymatgen
    structures, else ASE); anything else goes to ASE.

    A label comes from ``keys``, or from the usual names (``labels.USUAL_KEYS``). A key of the stress with "virial" in
    its name is read as minus stress times volume, in units of energy; a stress may have 6 (Voigt: xx, yy, zz, yz, xz,
    xy), 9 or 3 x 3 numbers and is positive under tension.

    Args:
        require: labels that every frame must have. Others are kept where every frame has them.
        ignore_cell: treat every frame as not periodic.
        notes: gets a line for everything that was left out or decided.

    Raises:
        DataError: one line with file, frame and way out: a missing or damaged file, a label that is not there, wrong
            shapes, numbers that are not finite, unknown elements or units.
    """
    keys, units = keys or KeysConfig(), units or UnitsConfig()
    unknown = [label for label in require if label not in LABELS]
    if unknown:
        raise ValueError(f"unknown label '{unknown[0]}'; labels are energy, forces and stress")
    frames = read_raw(path, keys)
    structures = to_structures(frames, keys, units, require=require, ignore_cell=ignore_cell, notes=notes)
    return keep_uniform_labels(structures, require)


def read_raw(path: Path | str, keys: KeysConfig | None = None) -> list[RawFrame]:
    """All frames of a file or folder under the names and in the units of the file; see :func:`read_structures`."""
    path = Path(path)
    _check_exists(path)
    try:
        frames = list(_frames(path, keys or KeysConfig()))
    except DataError as error:
        raise DataError(error if str(path) in str(error) else f"{path}: {error}") from None
    except PermissionError:
        raise DataError(f"{path}: no permission to read it") from None
    if not frames:
        raise DataError(f"{path}: no frames; the file is empty")
    return frames


def _check_exists(path: Path) -> None:
    if path.exists():
        if not (path.is_file() or path.is_dir()):
            raise DataError(f"{path}: a pipe or a device; data are read from files and folders")
        if path.is_file() and path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty")
        return
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest([path.name], siblings)
    if near:
        hint = f"; did you mean '{path.parent / near}'?"
    elif not path.parent.is_dir():
        hint = f"; there is no folder '{path.parent}'"
    else:
        hint = ""
    raise DataError(f"{path}: no such file or folder{hint}")


def _frames(path: Path, keys: KeysConfig) -> Iterator[RawFrame]:
    suffix = path.suffix.lower()
    if path.is_dir():
        if not deepmd_systems(path):
            raise DataError(f"{path}: a folder without DeePMD data (no type.raw below it); give a file instead")
        return read_deepmd(path)
    packed = suffix in (".gz", ".bz2", ".xz") and len(path.suffixes) > 1
    if (path.suffixes[-2].lower() if packed else suffix) in (".xyz", ".extxyz"):
        return read_extxyz(path)
    if suffix == ".npz":
        return read_npz(path, keys)
    if suffix == ".db":
        return read_ase_db(path)
    with path.open("rb") as file:
        start = file.read(512)
    foreign = "HDF5" if start.startswith(b"\x89HDF\r\n\x1a\n") else FOREIGN.get(suffix)
    if suffix == ".json" and start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
        return read_pymatgen_json(path)
    if foreign:
        raise DataError(f"{path}: {foreign} is not read; convert it to extxyz or npz. What can be read: {READABLE}")
    return read_ase(path)


# ------------------------------------------------------------------------------------------------------------- writers


WRITABLE = (".extxyz", ".xyz", ".npz")


def write_structures(path: Path | str, structures: Sequence[Structure], *, single_precision: bool = False) -> None:
    """Write frames as extended XYZ (``.xyz``, ``.extxyz``; eight decimals) or ``.npz``.

    The npz holds ``positions [frames, N, 3]``, ``atomic_numbers`` (``[N]`` where all frames agree, else ``[frames, N]``
    padded with 0), ``energy``, ``forces`` and, where they occur, ``stress``, ``cell``, ``pbc``, ``config_type``, in eV
    and Å. :func:`steradian.data.files.read_structures` reads both back.

    Args:
        single_precision: npz only: positions and forces as float32 (rounded by less than 1e-6 Å within 16 Å of the
            origin, and by 6e-8 of a force); energies stay float64.

    Raises:
        DataError: no frames, an unknown suffix, or labels that only some frames have (npz).
    """
    path = Path(path)
    if not structures:
        raise DataError(f"{path}: no frames to write")
    if path.suffix.lower() not in WRITABLE:
        raise DataError(f"{path}: cannot write this format; end the name with one of {', '.join(WRITABLE)}")
    if not path.parent.is_dir():
        raise DataError(f"{path}: there is no folder '{path.parent}'")
    with open_atomically(path) as stream:
        if path.suffix.lower() == ".npz":
            np.savez_compressed(stream, **_arrays(structures, single_precision))  # type: ignore[arg-type]
        else:
            text = io.TextIOWrapper(stream, encoding="utf-8")
            write_xyz(text, [structure.to_ase() for structure in structures])
            text.detach()  # what it holds goes to the stream, which stays open


def _arrays(structures: Sequence[Structure], single_precision: bool) -> dict[str, np.ndarray]:
    real = np.float32 if single_precision else np.float64
    size = max(len(structure) for structure in structures)
    numbers = np.zeros((len(structures), size), dtype=np.uint8)
    positions = np.zeros((len(structures), size, 3), dtype=real)
    for row, structure in enumerate(structures):
        numbers[row, : len(structure)] = structure.numbers
        positions[row, : len(structure)] = structure.positions
    same = bool((numbers == numbers[0]).all())
    arrays = {"atomic_numbers": numbers[0] if same else numbers, "positions": positions}
    if _all_have(structures, "energy"):
        arrays["energy"] = np.array([structure.energy for structure in structures])
    if _all_have(structures, "forces"):
        forces = np.zeros((len(structures), size, 3), dtype=real)
        for row, structure in enumerate(structures):
            forces[row, : len(structure)] = structure.forces
        arrays["forces"] = forces
    if _all_have(structures, "stress"):
        arrays["stress"] = np.array([structure.stress for structure in structures])
    if any(structure.periodic for structure in structures):
        arrays["cell"] = np.array([structure.cell for structure in structures])
        arrays["pbc"] = np.array([structure.pbc for structure in structures])
    if any(structure.config_type for structure in structures):
        arrays["config_type"] = np.array([structure.config_type for structure in structures])
    if any(structure.weight != 1.0 for structure in structures):
        arrays["weight"] = np.array([structure.weight for structure in structures])
    return arrays


def _all_have(structures: Sequence[Structure], label: str) -> bool:
    count = sum(getattr(structure, label) is not None for structure in structures)
    if count not in (0, len(structures)):
        raise DataError(
            f"{label} is known for {count} of {len(structures)} frames; an npz needs all or none: use .extxyz"
        )
    return count > 0
