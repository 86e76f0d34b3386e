"""Frames from arrays: npz files (rMD17, MD17, MD22 and kin), DeePMD folders, JSON of pymatgen structures."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers

from steradian.config import KeysConfig
from steradian.data.labels import USUAL_KEYS, RawFrame, missing_label
from steradian.graph.structures import DataError

__all__ = ["deepmd_systems", "read_deepmd", "read_npz", "read_pymatgen_json"]

BROKEN = (ValueError, EOFError, OSError, KeyError, zlib.error, zipfile.BadZipFile)


# ---------------------------------------------------------------------------------------------------------------- npz


def read_npz(path: Path, keys: KeysConfig) -> Iterator[RawFrame]:
    """Frames of an npz file: arrays over frames, atomic numbers for all frames ``[N]`` or per frame ``[frames, N]``.

    Frames of different sizes are padded with atomic number 0 (and ``node_mask`` where there is one).

    Raises:
        DataError: not an npz file, truncated, positions or numbers missing, shapes that do not fit.
    """
    arrays = _load_npz(path)
    shown = [f"{name} {list(array.shape)}" for name, array in arrays.items()]
    positions = arrays[_key("positions", keys.positions, arrays, path)]
    numbers = arrays[_key("numbers", keys.numbers, arrays, path)]
    if positions.ndim == 2:
        positions = positions[None]
    if positions.ndim != 3 or positions.shape[2] != 3:
        raise DataError(f"{path}: positions of shape {positions.shape}; expected [frames, N, 3] ({', '.join(shown)})")
    count, size = positions.shape[:2]
    if count == 0:
        raise DataError(f"{path}: no frames")
    if numbers.shape not in ((size,), (count, size)):
        raise DataError(f"{path}: atomic numbers of shape {numbers.shape} for positions of shape {positions.shape}")
    numbers = np.broadcast_to(numbers, (count, size))
    mask = numbers != 0 if (numbers == 0).any() else np.ones((count, size), dtype=bool)
    if "node_mask" in arrays and arrays["node_mask"].shape == (count, size):
        mask = mask & arrays["node_mask"].astype(bool)
    cell_key = keys.cell or next((name for name in USUAL_KEYS["cell"] if name in arrays), None)
    cells = _cells(arrays, cell_key, count, path)
    pbc = arrays.get("pbc", np.array([cells is not None] * 3))
    pbc = (
        np.broadcast_to(pbc, (count, 3)) if pbc.shape in ((), (1,), (3,), (count, 3)) else _bad_shape("pbc", pbc, path)
    )
    labels = _per_frame(arrays, keys, count, size, path)
    per_atom = {keys.forces, *USUAL_KEYS["forces"]}
    for index in range(count):
        atoms = mask[index]
        yield RawFrame(
            where=f"{path}, frame {index}",
            numbers=numbers[index][atoms],
            positions=positions[index][atoms],
            cell=np.zeros((3, 3)) if cells is None else cells[index],
            pbc=pbc[index] if cells is not None else np.zeros(3, dtype=bool),
            labels={
                # By name: with three atoms a stress or a cell has the shape of forces.
                name: values[index][atoms] if name in per_atom and values.shape[1:2] == (size,) else values[index]
                for name, values in labels.items()
            },
        )


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as content, np.load(content, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except BROKEN as error:
        if "allow_pickle" in str(error):
            raise DataError(f"{path}: holds Python objects (pickle), which are not read; save plain arrays") from None
        raise DataError(f"{path}: not a complete npz file (damaged or truncated?)") from None


def _key(label: str, key: str | None, arrays: Mapping[str, np.ndarray], path: Path) -> str:
    name = key or next((name for name in USUAL_KEYS[label] if name in arrays), label)
    if name not in arrays:
        raise missing_label(label, key, arrays, str(path))
    return name


def _bad_shape(name: str, array: np.ndarray, path: Path) -> np.ndarray:
    raise DataError(f"{path}: '{name}' of shape {array.shape} does not fit the frames")


def _cells(arrays: Mapping[str, np.ndarray], key: str | None, count: int, path: Path) -> np.ndarray | None:
    if key is None:
        return None
    if key not in arrays:
        raise missing_label("cell", key, arrays, str(path))
    cell = arrays[key]
    if cell.shape in ((3,), (count, 3)) and cell.shape != (3, 3):  # lengths of an orthorhombic cell
        cell = cell[..., None] * np.eye(3)
    if cell.shape in ((9,), (count, 9)):
        cell = cell.reshape(*cell.shape[:-1], 3, 3)
    if cell.shape not in ((3, 3), (count, 3, 3)):
        _bad_shape(key, cell, path)
    return np.broadcast_to(cell, (count, 3, 3))


def _per_frame(
    arrays: Mapping[str, np.ndarray], keys: KeysConfig, count: int, size: int, path: Path
) -> dict[str, np.ndarray]:
    """Arrays that have one entry per frame; a label's array of another length is a mistake, not something to skip."""
    used = {keys.energy, keys.forces, keys.stress}
    usual = {name for label in ("energy", "forces", "stress") for name in USUAL_KEYS[label]}
    labels = {}
    for name, array in arrays.items():
        if array.ndim and len(array) == count:
            labels[name] = array
        elif name in used | usual and count == 1 and (array.ndim == 0 or array.shape == (size, 3)):
            labels[name] = array[None]
        elif name in used | usual:
            raise DataError(f"{path}: '{name}' of shape {array.shape} for {count} frames of {size} atoms")
    return labels


# ------------------------------------------------------------------------------------------------------------- DeePMD


def deepmd_systems(path: Path) -> list[Path]:
    """Folders at or below ``path`` that hold a DeePMD system (a ``type.raw``), in order of their names."""
    return sorted(file.parent for file in path.rglob("type.raw"))


def read_deepmd(path: Path) -> Iterator[RawFrame]:
    """Frames of DeePMD npy folders: type.raw, type_map.raw and set.*/coord.npy (or coord.npy beside type.raw).

    DeePMD's virial is minus the stress times the volume; a file ``nopbc`` or a missing box.npy means not periodic.

    Raises:
        DataError: missing or damaged files, shapes that do not fit.
    """
    for system in deepmd_systems(path):
        numbers = _deepmd_numbers(system)
        sets = sorted(folder for folder in system.glob("set.*") if folder.is_dir()) or [system]
        for folder in sets:
            yield from _deepmd_set(folder, numbers, (system / "nopbc").exists())


def _deepmd_numbers(system: Path) -> np.ndarray:
    type_map = system / "type_map.raw"
    if not type_map.exists():
        raise DataError(f"{system}: no type_map.raw; write the element symbols in it, in the order of the types")
    symbols = type_map.read_text(encoding="utf-8").split()
    unknown = [symbol for symbol in symbols if atomic_numbers.get(symbol, 0) == 0]
    if unknown:
        raise DataError(f"{type_map}: unknown element '{unknown[0]}'")
    try:
        types = [int(word) for word in (system / "type.raw").read_text(encoding="utf-8").split()]
        return np.array([atomic_numbers[symbols[kind]] for kind in types])
    except (ValueError, IndexError):
        raise DataError(f"{system / 'type.raw'}: expected whole numbers from 0 to {len(symbols) - 1}") from None


def _deepmd_set(folder: Path, numbers: np.ndarray, isolated: bool) -> Iterator[RawFrame]:
    arrays = {}
    for name in ("coord", "energy", "force", "box", "virial"):
        file = folder / f"{name}.npy"
        if file.exists():
            try:
                arrays[name] = np.load(file, allow_pickle=False)
            except BROKEN:
                raise DataError(f"{file}: not a complete npy file (damaged or truncated?)") from None
    if "coord" not in arrays:
        raise DataError(f"{folder}: no coord.npy")
    count, size = len(arrays["coord"]), len(numbers)
    for name, width in (("coord", 3 * size), ("force", 3 * size), ("box", 9), ("virial", 9), ("energy", 1)):
        if name in arrays and arrays[name].size != count * width:
            raise DataError(f"{folder / name}.npy: shape {arrays[name].shape} for {count} frames of {size} atoms")
    periodic = "box" in arrays and not isolated
    for index in range(count):
        labels: dict[str, Any] = {name: arrays[name][index] for name in ("energy", "virial") if name in arrays}
        if "force" in arrays:
            labels["force"] = arrays["force"][index].reshape(size, 3)
        yield RawFrame(
            where=f"{folder}, frame {index}",
            numbers=numbers,
            positions=arrays["coord"][index].reshape(size, 3),
            cell=arrays["box"][index].reshape(3, 3) if periodic else np.zeros((3, 3)),
            pbc=np.full(3, periodic),
            labels=labels,
        )


# ----------------------------------------------------------------------------------------------------------- pymatgen


def read_pymatgen_json(path: Path) -> Iterator[RawFrame]:
    """Frames of the JSON lists of Zuo et al. 2020: pymatgen structures with ``outputs`` of energy and forces.

    Their ``virial_stress`` is left out: its unit and the order of its components are not stated.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError):
        raise DataError(f"{path}: not valid JSON (damaged or truncated?)") from None
    if not isinstance(content, list) or not all(isinstance(entry, dict) and "structure" in entry for entry in content):
        raise DataError(f"{path}: expected a list of entries with 'structure' and 'outputs'")
    for index, entry in enumerate(content):
        where = f"{path}, frame {index}"
        try:
            yield _pymatgen_frame(entry, where)
        except (KeyError, IndexError, TypeError) as error:
            raise DataError(f"{where}: {error} is missing or has the wrong form") from None


def _pymatgen_frame(entry: dict[str, Any], where: str) -> RawFrame:
    sites = entry["structure"]["sites"]
    outputs = entry.get("outputs", {})
    labels = {name: outputs[name] for name in ("energy", "forces") if name in outputs}
    labels["config_type"] = entry.get("group", "")
    return RawFrame(
        where=where,
        numbers=np.array([atomic_numbers[site["species"][0]["element"]] for site in sites]),
        positions=np.array([site["xyz"] for site in sites]),
        cell=np.array(entry["structure"]["lattice"]["matrix"]),
        pbc=np.ones(3, dtype=bool),
        labels=labels,
    )
