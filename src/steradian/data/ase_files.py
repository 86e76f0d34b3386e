"""Frames from extended XYZ, from ASE databases and from every other format that ASE reads."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.io.extxyz import read_xyz

from steradian.data.labels import RawFrame
from steradian.graph.structures import DataError

__all__ = ["read_ase", "read_ase_db", "read_extxyz"]


def raw_frame(atoms: Atoms, where: str) -> RawFrame:
    """Everything an Atoms object says: info, per-atom arrays and the stored results of its calculator.

    ASE from 3.23 on moves ``energy``, ``forces`` and ``stress`` of a file from info and arrays into the results.
    """
    labels: dict[str, Any] = {
        name: values for name, values in atoms.arrays.items() if name not in ("numbers", "positions")
    }
    labels.update(atoms.info)
    results = getattr(atoms.calc, "results", {}) if atoms.calc is not None else {}
    labels.update({name: value for name, value in results.items() if value is not None})
    return RawFrame(where, atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, labels)


def read_extxyz(path: Path) -> Iterator[RawFrame]:
    """Frames of an (extended) XYZ file, read one by one so that a mistake is told with its frame and line.

    Raises:
        DataError: a truncated frame, an unknown element, anything that is not extended XYZ.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for frame, (line, text) in enumerate(_xyz_chunks(file, path)):
                where = f"{path}, frame {frame}"
                try:
                    atoms = next(read_xyz(io.StringIO(text), 0))
                except KeyError as error:
                    raise DataError(f"{where} (line {line}): unknown element {error}") from None
                except Exception as error:  # ASE raises many kinds for a malformed frame
                    raise DataError(f"{where} (line {line}): not valid extended XYZ: {one_line(error)}") from None
                yield raw_frame(atoms, where)
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file, so not extended XYZ") from None


def _xyz_chunks(file: Any, path: Path) -> Iterator[tuple[int, str]]:
    """First line number and text of every frame."""
    number = 0
    frame = 0
    while line := file.readline():
        number += 1
        if not line.strip():
            continue
        start = number
        try:
            count = int(line.split()[0])
        except ValueError:
            raise DataError(
                f"{path}, frame {frame} (line {number}): expected the number of atoms, found '{line.strip()[:40]}'"
            ) from None
        lines = [line]
        for row in range(count + 1):
            text = file.readline()
            number += 1
            if not text or (row > 0 and not text.strip()):
                raise DataError(
                    f"{path}, frame {frame} (line {start}): the file is truncated: {count} atoms announced, "
                    f"{max(row - 1, 0)} found"
                )
            lines.append(text)
        yield start, "".join(lines)
        frame += 1


def read_ase_db(path: Path) -> Iterator[RawFrame]:
    """Rows of an ASE database; key-value pairs and the ``data`` of a row (SchNetPack's way) count as labels."""
    import ase.db

    try:
        with ase.db.connect(str(path)) as database:
            for index, row in enumerate(database.select()):
                atoms = row.toatoms()
                labels = {**row.key_value_pairs, **dict(row.data)}
                frame = raw_frame(atoms, f"{path}, frame {index} (row {row.id})")
                yield RawFrame(
                    frame.where, frame.numbers, frame.positions, frame.cell, frame.pbc, {**labels, **frame.labels}
                )
    except DataError:
        raise
    except Exception as error:  # sqlite, JSON and ASE errors alike
        raise DataError(f"{path}: not a readable ASE database: {one_line(error)}") from None


def read_ase(path: Path) -> Iterator[RawFrame]:
    """Frames of any other file that ASE can read (vasprun.xml, OUTCAR, traj, cif, ...)."""
    import ase.io

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on formats; what matters is checked on the frames
            images = ase.io.read(path, index=":")
    except Exception as error:  # every format raises its own kinds
        raise DataError(f"{path}: ASE cannot read it: {one_line(error)}") from None
    for index, atoms in enumerate(images):
        yield raw_frame(atoms, f"{path}, frame {index}")


def one_line(error: BaseException) -> str:
    """The message of a foreign exception on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
