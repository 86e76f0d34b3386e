"""Frames from ASE databases and from every other format that ASE reads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ase import Atoms

from steradian.data.extxyz import read_extxyz
from steradian.data.labels import RawFrame, units_named
from steradian.graph.structures import DataError

__all__ = ["READABLE", "read_ase", "read_ase_db"]

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
