"""Frames from npz files (rMD17, MD17, MD22 and kin), DeePMD folders, JSON of pymatgen, and all that ASE reads."""

from __future__ import annotations

import math
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers

from steradian.checkpoint import check_entries
from steradian.config import KeysConfig
from steradian.config.text import parse_json, read_text
from steradian.data.extxyz import read_extxyz
from steradian.data.labels import USUAL_KEYS, RawFrame, missing_label, units_named
from steradian.graph.structures import DataError, real_numbers

__all__ = [
    "READABLE",
    "deepmd_systems",
    "load_npz",
    "read_ase",
    "read_ase_db",
    "read_deepmd",
    "read_npz",
    "read_pymatgen_json",
]

BROKEN = (
    *(ValueError, EOFError, OSError, KeyError, MemoryError, RuntimeError, NotImplementedError),
    *(zlib.error, zipfile.BadZipFile),
)


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an npz file.

    Raises:
        DataError: not an npz file, damaged, or holding anything but plain arrays.
    """
    arrays = {}
    try:
        with path.open("rb") as content:
            if content.read(6) == b"\x93NUMPY":
                raise DataError(f"{path}: one array (npy) under the name of an npz file; write it with numpy.savez")
            check_entries(content)
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if not entry.filename.endswith(".npy"):
                    raise DataError(f"{path}: a zip file with '{entry.filename}' in it, not an npz file of arrays")
                # Deflate packs at most 1032 to 1: an entry that claims more is damaged, or made to fill the memory.
                if entry.file_size > 1100 * (entry.compress_size + 100):
                    raise ValueError("impossible size")
                with archive.open(entry) as file:
                    arrays[entry.filename[:-4]] = _load_array(file, entry.file_size, str(path))  # type: ignore[arg-type]
    except DataError:
        raise
    except BROKEN as error:
        where = f"'{entry.filename[:-4]}' in it cannot be read" if "entry" in locals() else str(error)
        raise DataError(f"{path}: not a complete npz file (damaged or truncated? {where})") from None
    return arrays


def _load_array(file: BinaryIO, size: int, where: str) -> np.ndarray:
    """An array of an npy stream of ``size`` bytes; the header is believed only where it agrees with the size.

    Raises:
        DataError: Python objects. ValueError: damaged.
    """
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
    except Exception as error:  # a damaged header fails in the tokenizer, the parser or numpy
        raise ValueError(f"the header is damaged: {error}") from None
    if dtype.byteorder == ">":  # nobody writes it; a flipped bit makes it of '<', and nonsense of the numbers
        raise DataError(f"{where}: stored with the high byte first; damaged, or to be written anew on this machine")
    if dtype.hasobject:
        raise DataError(f"{where}: holds Python objects (pickle), which are not read; save plain arrays")
    count = math.prod(shape)
    if count * dtype.itemsize > size:
        raise ValueError(f"the header promises {shape}")
    array = np.frombuffer(file.read(), dtype=dtype)
    if len(array) != count:
        raise ValueError(f"the header promises {shape}")
    return array.reshape(shape, order="F" if fortran else "C").copy()


# ---------------------------------------------------------------------------------------------------------------- npz


def read_npz(path: Path, keys: KeysConfig) -> Iterator[RawFrame]:
    """Frames of an npz file: arrays over frames, atomic numbers for all frames ``[N]`` or per frame ``[frames, N]``.

    Frames of different sizes are padded with atomic number 0 (and ``node_mask`` where there is one).

    Raises:
        DataError: not an npz file, truncated, positions or numbers missing, shapes that do not fit.
    """
    arrays = load_npz(path)
    units = units_named(arrays)
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
    numbers = np.broadcast_to(real_numbers(numbers, "atomic numbers"), (count, size))
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
            units=units,
            labels={
                # By name: with three atoms a stress or a cell has the shape of forces.
                name: values[index][atoms] if name in per_atom and values.shape[1:2] == (size,) else values[index]
                for name, values in labels.items()
            },
        )


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
    cell = real_numbers(arrays[key], key)
    if (cell.shape == (3, 3) and count == 3 and not ((cell == 0).any() and np.linalg.det(cell))) or (
        cell.shape == (3,) and count == 3 and len(set(cell.tolist())) > 1
    ):
        raise DataError(
            f"{path}: '{key}' of shape {cell.shape} for 3 frames: one cell, or lengths of three boxes? "
            "write it as [3, 3, 3], the lattice vectors of every frame"
        )
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

    Mixed type (``set.*/real_atom_types.npy``) is read too. DeePMD's virial is minus the stress times the volume; a
    file ``nopbc`` or a missing box.npy means not periodic.

    Raises:
        DataError: missing or damaged files, shapes that do not fit.
    """
    for system in deepmd_systems(path):
        for folder in sorted(folder for folder in system.glob("set.*") if folder.is_dir()) or [system]:
            yield from _deepmd_set(folder, system)


def _deepmd_symbols(system: Path) -> np.ndarray:
    """Atomic numbers of the types of a system."""
    type_map = system / "type_map.raw"
    if not type_map.exists():
        raise DataError(f"{system}: no type_map.raw; write the element symbols in it, in the order of the types")
    symbols = _text(type_map).split()
    unknown = [symbol for symbol in symbols if atomic_numbers.get(symbol, 0) == 0]
    if unknown:
        raise DataError(f"{type_map}: unknown element '{unknown[0]}'")
    return np.array([atomic_numbers[symbol] for symbol in symbols], dtype=np.int64)


def _text(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path}: not a file")
    try:
        return read_text(path)
    except ValueError as error:
        raise DataError(error) from None


def _deepmd_types(file: Path, symbols: np.ndarray) -> np.ndarray:
    words = _text(file).split()
    known = {str(kind) for kind in range(len(symbols))}
    if not words or not known.issuperset(words):
        raise DataError(f"{file}: expected whole numbers from 0 to {len(symbols) - 1}")
    return symbols[np.array(words, dtype=np.int64)]


def _deepmd_set(folder: Path, system: Path) -> Iterator[RawFrame]:
    symbols = _deepmd_symbols(system)
    numbers = _deepmd_types(system / "type.raw", symbols)
    arrays = {}
    for name in ("coord", "energy", "force", "box", "virial", "real_atom_types"):
        file = folder / f"{name}.npy"
        if file.is_file():
            try:
                with file.open("rb") as content:
                    arrays[name] = _load_array(content, file.stat().st_size, str(file))
            except DataError:
                raise
            except BROKEN:
                raise DataError(f"{file}: not a complete npy file (damaged or truncated?)") from None
    if "coord" not in arrays:
        raise DataError(f"{folder}: no coord.npy")
    count, size = len(np.atleast_1d(arrays["coord"])), len(numbers)
    widths = {"coord": 3 * size, "force": 3 * size, "box": 9, "virial": 9, "energy": 1, "real_atom_types": size}
    for name, array in arrays.items():
        if len(np.atleast_1d(array)) != count or array.size != count * widths[name]:
            raise DataError(f"{folder / name}.npy: shape {array.shape} for {count} frames of {size} atoms")
    rows = np.broadcast_to(numbers, (count, size))
    if "real_atom_types" in arrays:
        rows = _mixed_numbers(arrays["real_atom_types"].reshape(count, size), symbols, folder)
    periodic = "box" in arrays and not (system / "nopbc").exists()
    for index in range(count):
        atoms = rows[index] > 0
        labels: dict[str, Any] = {name: arrays[name][index] for name in ("energy", "virial") if name in arrays}
        if "force" in arrays:
            labels["force"] = arrays["force"][index].reshape(size, 3)[atoms]
        yield RawFrame(
            where=f"{folder}, frame {index}",
            numbers=rows[index][atoms],
            positions=arrays["coord"][index].reshape(size, 3)[atoms],
            cell=arrays["box"][index].reshape(3, 3) if periodic else np.zeros((3, 3)),
            pbc=np.full(3, periodic),
            labels=labels,
        )


def _mixed_numbers(types: np.ndarray, symbols: np.ndarray, folder: Path) -> np.ndarray:
    """Mixed type (deepmd/npy/mixed): types of every frame, -1 where a frame has fewer atoms; 0 stands for those."""
    if types.dtype.kind not in "iu" or types.min() < -1 or types.max() >= len(symbols):
        raise DataError(f"{folder / 'real_atom_types.npy'}: expected whole numbers from -1 to {len(symbols) - 1}")
    return np.append(symbols, 0)[types]


# ----------------------------------------------------------------------------------------------------------- pymatgen


def read_pymatgen_json(path: Path) -> Iterator[RawFrame]:
    """Frames of the JSON lists of Zuo et al. 2020: pymatgen structures with ``outputs`` of energy and forces.

    Their ``virial_stress`` is left out: its unit and the order of its components are not stated.
    """
    try:
        content = parse_json(read_text(path))
    except ValueError as error:
        message = str(error)
        raise DataError(message if message.startswith(str(path)) else f"{path}: {message}") from None
    if not isinstance(content, list) or not all(isinstance(entry, dict) and "structure" in entry for entry in content):
        raise DataError(f"{path}: expected a list of entries with 'structure' and 'outputs'")
    for index, entry in enumerate(content):
        where = f"{path}, frame {index}"
        try:
            yield _pymatgen_frame(entry, where)
        except DataError:
            raise
        except KeyError as error:
            raise DataError(f"{where}: {error} is missing or an unknown element") from None
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise DataError(f"{where}: not a pymatgen structure ({error})") from None


def _pymatgen_frame(entry: dict[str, Any], where: str) -> RawFrame:
    sites = entry["structure"]["sites"]
    mixed = [index for index, site in enumerate(sites) if len(site["species"]) != 1]
    if mixed:
        raise DataError(f"{where}: site {mixed[0]} is shared by several elements; only ordered structures are read")
    outputs = entry.get("outputs", {})
    labels = {name: outputs[name] for name in ("energy", "forces") if name in outputs}
    labels["config_type"] = entry.get("group", "")
    return RawFrame(
        where=where,
        numbers=np.array([atomic_numbers[site["species"][0]["element"]] for site in sites]),
        positions=[site["xyz"] for site in sites],
        cell=entry["structure"]["lattice"]["matrix"],
        pbc=np.ones(3, dtype=bool),
        labels=labels,
    )


# ------------------------------------------------------------------------------------------------------ what ASE reads


READABLE = (
    "extended XYZ (.xyz, .extxyz), npz, DeePMD folders, ASE databases (.db), JSON lists of pymatgen structures, and "
    "what ASE reads (traj, vasprun.xml, OUTCAR, cif ...)"
)


def _raw_frame(atoms: Atoms, where: str, more: Mapping[str, Any], units: Mapping[str, str]) -> RawFrame:
    """Everything an Atoms object says: info, per-atom arrays and the stored results of its calculator."""
    labels = {**more, **{name: value for name, value in atoms.arrays.items() if name not in ("numbers", "positions")}}
    results = getattr(atoms.calc, "results", {}) if atoms.calc is not None else {}
    labels |= {**atoms.info, **{name: value for name, value in results.items() if value is not None}}
    if "energy" in labels:  # in ASE 'energies' are per atom; those of one atom would look like the frame's
        labels.pop("energies", None)
    return RawFrame(where, atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, labels, units)


def read_ase_db(path: Path) -> Iterator[RawFrame]:
    """Rows of an ASE database; key-value pairs and the ``data`` of a row (SchNetPack's way) count as labels.

    Units are those that the database's metadata names (SchNetPack's ``_property_unit_dict``, ``_distance_unit``).
    """
    import ase.db

    try:
        with ase.db.connect(str(path)) as database:
            metadata = database.metadata
            named = {**units_named(metadata), **_schnetpack_units(metadata)}
            for index, row in enumerate(database.select()):
                more = {**row.key_value_pairs, **dict(row.data)}
                yield _raw_frame(row.toatoms(), f"{path}, frame {index} (row {row.id})", more, named)
    except DataError:
        raise
    except Exception as error:  # sqlite, JSON and ASE errors alike
        raise DataError(f"{path}: not a readable ASE database: {one_line(error)}") from None


def _schnetpack_units(metadata: Mapping[str, Any]) -> dict[str, str]:
    properties = metadata.get("_property_unit_dict") or {}
    found = {name: properties.get(name) for name in ("energy", "forces", "stress")}
    found["length"] = metadata.get("_distance_unit")
    return {name: str(unit) for name, unit in found.items() if unit}


def read_ase(path: Path) -> Iterator[RawFrame]:
    """Frames of any other file that ASE can read (vasprun.xml, OUTCAR, traj, cif, ...)."""
    import ase.io
    from ase.io.formats import filetype

    try:
        kind = filetype(str(path))
    except Exception:  # unknown, or damaged beyond a guess: told below
        kind = ""
    if kind in ("xyz", "extxyz"):  # under another name, or compressed
        yield from read_extxyz(path)
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on formats; what matters is checked on the frames
            images = ase.io.read(path, index=":")
    except Exception as error:  # every format raises its own kinds
        raise DataError(f"{path}: ASE cannot read it ({one_line(error)}); what can be read: {READABLE}") from None
    for index, atoms in enumerate(images):
        yield _raw_frame(atoms, f"{path}, frame {index}", {}, {})


def one_line(error: BaseException) -> str:
    """The message of a foreign exception on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
