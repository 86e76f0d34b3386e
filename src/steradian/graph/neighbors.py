"""Neighbour lists: from a frame to a graph, with vesin."""

from __future__ import annotations

import numpy as np
import torch
from ase.geometry import complete_cell
from vesin import NeighborList

from steradian.graph.graph import Graph
from steradian.graph.structures import DataError, Structure

__all__ = ["make_graph", "neighbor_pairs"]

SMALL_SYSTEM = 2000  # atoms; below it starting threads costs more than it saves


def neighbor_pairs(
    positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All directed pairs within the cutoff, periodic images included, in one fixed order.

    Args:
        positions: ``[N, 3]`` [Å]; atoms may lie outside the cell.
        cell: ``[3, 3]`` lattice vectors as rows [Å]; rows along directions that are not periodic may be zero.
        pbc: ``[3]`` periodicity. A cell smaller than the cutoff is right too: every image is a pair of its own.
        cutoff: [Å].

    Returns:
        receivers ``[E]``, senders ``[E]`` and shifts ``[E, 3]`` (whole lattice vectors to add to the sender's
        position), int64, sorted by receiver, then sender, then shift.

    Raises:
        DataError: positions that are not finite, or two atoms at the same place.
    """
    positions = np.ascontiguousarray(positions, dtype=np.float64)
    if not np.isfinite(positions).all():
        atom = int(np.argmax(~np.isfinite(positions).all(axis=1)))
        raise DataError(f"position of atom {atom} is not finite (NaN or infinity)")
    if cutoff <= 0:
        raise DataError(f"a cutoff of {cutoff} Å; it must be positive")
    if len(positions) == 0 or (len(positions) == 1 and not np.any(pbc)):
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 3), np.int64)
    # A direction that is not periodic needs some lattice vector for vesin's bookkeeping; its value changes nothing.
    box = np.array(complete_cell(cell), dtype=np.float64)
    search = NeighborList(cutoff=cutoff, full_list=True, n_threads=1 if len(positions) < SMALL_SYSTEM else 0)
    pairs, shifts, lengths = search.compute(positions, box, np.asarray(pbc, dtype=bool), "PSd")
    pairs, shifts = pairs.astype(np.int64), shifts.astype(np.int64)
    if len(lengths) and lengths.min() < 1e-6:
        i, j = pairs[int(np.argmin(lengths))]
        raise DataError(f"atoms {i} and {j} are at the same place")
    order = _order(pairs, shifts, len(positions))
    return pairs[order, 0], pairs[order, 1], shifts[order]


def _order(pairs: np.ndarray, shifts: np.ndarray, num_atoms: int) -> np.ndarray:
    """Permutation that sorts by receiver, sender and shift; one combined integer key sorts faster than five."""
    key = pairs[:, 0] * num_atoms + pairs[:, 1]
    if len(shifts):
        low = shifts.min(axis=0)
        spans = shifts.max(axis=0) - low + 1
        for axis in range(3):
            key = key * spans[axis] + (shifts[:, axis] - low[axis])
    return np.argsort(key, kind="stable")


def make_graph(structure: Structure, cutoff: float, *, skin: float = 0.0, dtype: torch.dtype = torch.float64) -> Graph:
    """The graph of one frame, labels included.

    ``vectors = x[sender] + shift @ cell - x[receiver]``; edges are sorted by receiver, then sender, then shift.

    Args:
        cutoff: [Å].
        skin: [Å] added to the cutoff, for lists that are kept over several steps of dynamics.
        dtype: of positions, cell, forces, stress and weight. The energy stays float64, shifts are int64.

    Raises:
        DataError: positions that are not finite, or two atoms at the same place.
    """
    try:
        receivers, senders, shifts = neighbor_pairs(structure.positions, structure.cell, structure.pbc, cutoff + skin)
    except DataError as error:
        raise DataError(f"{structure.where}: {error}" if structure.where else str(error)) from None

    def tensor(values: object) -> torch.Tensor:
        return torch.tensor(np.asarray(values, dtype=np.float64), dtype=dtype)

    return Graph(
        positions=tensor(structure.positions),
        numbers=torch.tensor(structure.numbers),
        system=torch.zeros(len(structure), dtype=torch.int64),
        senders=torch.as_tensor(senders),
        receivers=torch.as_tensor(receivers),
        shifts=torch.as_tensor(shifts),
        cell=tensor(structure.cell)[None],
        pbc=torch.tensor(structure.pbc)[None],
        num_systems=1,
        energy=None if structure.energy is None else torch.tensor([structure.energy], dtype=torch.float64),
        forces=None if structure.forces is None else tensor(structure.forces),
        stress=None if structure.stress is None else tensor(structure.stress)[None],
        weight=tensor([structure.weight]),
        config_type=(structure.config_type,),
    )
