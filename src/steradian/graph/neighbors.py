"""Neighbour lists: from a frame to a graph, with vesin."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from ase.geometry import complete_cell
from scipy.spatial import cKDTree
from vesin import NeighborList

from steradian.graph.graph import Graph
from steradian.graph.structures import DataError, Structure

__all__ = ["make_graph", "neighbor_pairs"]

SMALL_SYSTEM = 2000  # atoms; below it starting threads costs more than it saves
# vesin divides space into at most so many cells, keeping their proportions; where one side then gets less than one
# cell it divides by zero. Its whole lattice vectors are 32-bit.
MAX_CELLS, MAX_SHIFT = 1e5, 1e8
MAX_LENGTH = 1e12  # [Å]; beyond it double precision cannot tell neighbours apart


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
        DataError: positions that are not finite or absurdly far, or two atoms at the same place.
    """
    positions = np.ascontiguousarray(positions, dtype=np.float64)
    if not np.isfinite(positions).all():
        atom = int(np.argmax(~np.isfinite(positions).all(axis=1)))
        raise DataError(f"position of atom {atom} is not finite (NaN or infinity)")
    if len(positions) and max(np.abs(positions).max(), np.abs(cell).max()) > MAX_LENGTH:
        raise DataError(f"positions or lattice vectors beyond {MAX_LENGTH:g} Å: wrong units, or dynamics that blew up?")
    if cutoff <= 0:
        raise DataError(f"a cutoff of {cutoff} Å; it must be positive")
    if len(positions) == 0 or (len(positions) == 1 and not np.any(pbc)):
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 3), np.int64)
    # A direction that is not periodic needs some lattice vector for vesin's bookkeeping; its value changes nothing.
    box = np.array(complete_cell(cell), dtype=np.float64)
    pbc = np.asarray(pbc, dtype=bool)
    if _is_too_wide(positions, box, pbc, cutoff):
        pairs, shifts, lengths = _tree_pairs(positions, box, pbc, cutoff)
    else:
        search = NeighborList(cutoff=cutoff, full_list=True, n_threads=1 if len(positions) < SMALL_SYSTEM else 0)
        pairs, shifts, lengths = search.compute(positions, box, pbc, "PSd")
        pairs, shifts = pairs.astype(np.int64), shifts.astype(np.int64)
    if len(lengths) and lengths.min() < 1e-6:
        i, j = pairs[int(np.argmin(lengths))]
        raise DataError(f"atoms {i} and {j} are at the same place")
    order = _order(pairs, shifts, len(positions))
    return pairs[order, 0], pairs[order, 1], shifts[order]


def _is_too_wide(positions: np.ndarray, box: np.ndarray, pbc: np.ndarray, cutoff: float) -> bool:
    """Whether atoms or cell reach so far in some direction that vesin's division of space may fail."""
    extents = np.ptp(positions, axis=0)
    if max(extents.max(), np.abs(box).max()) < 40 * cutoff:  # at most 40^3 cells
        return False
    inverse = np.linalg.inv(box)
    spacings = 1 / np.linalg.norm(inverse, axis=0)  # between opposite faces
    fractions = positions @ inverse
    # How it measures open directions is not documented: the shortest and the longest that it may take.
    skewed = np.ptp(fractions, axis=0) * spacings
    low = np.where(pbc, spacings, np.minimum(skewed, extents.min()))
    high = np.where(pbc, spacings, np.maximum(skewed, np.linalg.norm(extents)))
    total = float(np.maximum(high / cutoff, 1.0).prod())
    shrunk = max(low.min() / cutoff, 1.0) * min(1.0, MAX_CELLS / total) ** (1 / 3)
    # Nearly empty cells cost vesin seconds, too.
    sparse = total > MAX_CELLS / 8 and (shrunk < 2 or len(positions) < MAX_CELLS / 8)
    return sparse or float(np.abs(fractions).max()) > MAX_SHIFT


def _tree_pairs(
    positions: np.ndarray, box: np.ndarray, pbc: np.ndarray, cutoff: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All directed pairs with a search tree, which does not mind how far apart atoms are: pairs, shifts, lengths."""
    inverse = np.linalg.inv(box)
    fractions = positions @ inverse
    home = np.where(pbc, np.floor(fractions), 0.0)
    inside, fractions = positions - home @ box, fractions - home
    # Along a periodic direction an image matters where it lies within the cutoff of the cell.
    margins = cutoff * np.linalg.norm(inverse, axis=0) + 1e-9
    reach = np.where(pbc, np.ceil(margins), 0).astype(int)
    atoms, images = [], []
    for image in itertools.product(*(range(-count, count + 1) for count in reach)):
        moved = fractions + image
        near = np.flatnonzero((~pbc | ((moved > -margins) & (moved < 1 + margins))).all(axis=1))
        atoms.append(near)
        images.append(np.broadcast_to(np.array(image, dtype=np.float64), (len(near), 3)))
    others, offsets = np.concatenate(atoms), np.concatenate(images)
    found = cKDTree(inside[others] + offsets @ box).query_ball_point(inside, cutoff * (1 + 1e-9))
    receivers = np.repeat(np.arange(len(positions)), [len(near) for near in found])
    places = np.concatenate([np.asarray(near, dtype=np.int64) for near in found])
    senders = others[places]
    shifts = offsets[places] + home[receivers] - home[senders]
    lengths = np.linalg.norm(inside[senders] + offsets[places] @ box - inside[receivers], axis=1)
    kept = (lengths < cutoff) & ((receivers != senders) | shifts.any(axis=1))
    return np.stack([receivers, senders], axis=1)[kept], shifts[kept].astype(np.int64), lengths[kept]


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
