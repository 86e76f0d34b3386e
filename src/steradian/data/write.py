"""Write frames; a file appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from steradian.graph.structures import DataError, Structure

__all__ = ["WRITABLE", "write_structures"]

WRITABLE = (".extxyz", ".xyz", ".npz")


def write_structures(path: Path | str, structures: Sequence[Structure], *, single_precision: bool = False) -> None:
    """Write frames as extended XYZ (``.xyz``, ``.extxyz``; eight decimals) or ``.npz``.

    The npz holds ``positions [frames, N, 3]``, ``atomic_numbers`` (``[N]`` where all frames agree, else ``[frames, N]``
    padded with 0), ``energy``, ``forces`` and, where they occur, ``stress``, ``cell``, ``pbc``, ``config_type``, in eV
    and Å. :func:`steradian.data.read.read_structures` reads both back.

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
    temporary = path.with_name(path.name + ".tmp")
    try:
        if path.suffix.lower() == ".npz":
            with temporary.open("wb") as file:
                np.savez_compressed(file, **_arrays(structures, single_precision))  # type: ignore[arg-type]
                os.fsync(file.fileno())
        else:
            from ase.io.extxyz import write_xyz

            with temporary.open("w", encoding="utf-8") as text:
                write_xyz(text, [structure.to_ase() for structure in structures])
                text.flush()
                os.fsync(text.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
