"""Atoms of a batch arranged system by system, so that sums over systems are batched products of matrices."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from steradian.compiler.capture import capturing

__all__ = ["SystemBlock", "blocks_of_systems", "join_blocks", "keep_layout"]

WORTH_PADDING = 1.2
"""Systems share a block while the padded block has at most this many times the atoms."""


@dataclass(frozen=True)
class SystemBlock:
    """Some systems of similar size.

    Attributes:
        systems: which systems, in order.
        num_atoms: atoms of the largest one.
        atoms: ``[B * num_atoms]`` atom of every place, N (beyond the last atom) for padding; None where the block is
            the whole batch in order.
        padded: whether there is padding.
        counts: ``[B]`` atoms of each system; None where nothing is padded.
    """

    systems: tuple[int, ...]
    num_atoms: int
    atoms: Tensor | None
    padded: bool
    counts: Tensor | None = None

    def centred(self, positions: Tensor) -> Tensor:
        """``[B, num_atoms, 3]`` positions about the mean of their system, zero for padding.

        Only differences matter to the attention, and small phases have more digits. Sums have a fixed order.
        """
        with torch.no_grad():
            counts = self.num_atoms if self.counts is None else self.counts.to(positions)[:, None, None]
            mean = positions.sum(1, keepdim=True) / counts
        moved = positions - mean
        if self.counts is None:
            return moved
        places = torch.arange(self.num_atoms, device=positions.device)
        return torch.where((places < self.counts[:, None]).unsqueeze(2), moved, 0.0)

    def take(self, values: Tensor) -> Tensor:
        """``[N, ...]`` to ``[B, num_atoms, ...]``, zeros for padding."""
        if self.atoms is not None:
            if self.padded:
                values = torch.cat([values, values.new_zeros((1, *values.shape[1:]))])
            values = values.index_select(0, self.atoms)
        return values.unflatten(0, (len(self.systems), self.num_atoms))


_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def blocks_of_systems(system: Tensor, num_systems: int) -> tuple[list[SystemBlock], Tensor | None]:
    """Blocks that hold every system with atoms once, and for :func:`join_blocks` the place of every atom.

    Args:
        system: ``[N]`` index of each atom's system, ascending. The result is kept as long as this tensor lives.
        num_systems: S.
    """
    known = _KNOWN.get(system)
    if known is None:
        counts = torch.bincount(system, minlength=num_systems).tolist()
        known = _KNOWN[system] = _arrange(counts, system.device)
    return known


def keep_layout(system: Tensor, counts: tuple[int, ...]) -> None:
    """Say how many atoms each system has, so that a GPU need not be asked; kept as long as ``system [N]`` lives."""
    _KNOWN[system] = _arranged(counts, system.device)


@cache
def _arranged(counts: tuple[int, ...], device: torch.device) -> tuple[list[SystemBlock], Tensor | None]:
    return _arrange(counts, device)


def _arrange(counts: Sequence[int], device: torch.device) -> tuple[list[SystemBlock], Tensor | None]:
    present = [number for number, count in enumerate(counts) if count]
    sizes = {counts[number] for number in present}
    if len(sizes) <= 1:
        size = sizes.pop() if sizes else 0
        return ([SystemBlock(tuple(present), size, None, False)] if present else []), None
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    groups: list[list[int]] = []
    for number in sorted(present, key=lambda number: counts[number]):
        if groups and len(groups[-1] + [number]) * counts[number] <= WORTH_PADDING * (
            sum(counts[member] for member in groups[-1]) + counts[number]
        ):
            groups[-1].append(number)
        else:
            groups.append([number])
    blocks, place, offset = [], torch.empty(starts[-1], dtype=torch.int64), 0
    for group in groups:
        size = max(counts[number] for number in group)
        atoms = torch.full((len(group), size), starts[-1], dtype=torch.int64)
        for row, number in enumerate(group):
            count = counts[number]
            own = torch.arange(starts[number], starts[number] + count)
            atoms[row, :count] = own
            place[own] = offset + row * size + torch.arange(count)
        offset += atoms.numel()
        padded = any(counts[number] < size for number in group)
        of_systems = torch.tensor([counts[number] for number in group]).to(device) if padded else None
        blocks.append(SystemBlock(tuple(group), size, atoms.flatten().to(device), padded, of_systems))
    return blocks, place.to(device)


def join_blocks(parts: Sequence[Tensor], place: Tensor | None) -> Tensor:
    """Values of every block ``[B, num_atoms, ...]`` back to ``[N, ...]``."""
    flat = [part.flatten(0, 1) for part in parts]
    if place is None:
        return flat[0]
    return torch.cat(flat).index_select(0, place)


@dataclass(frozen=True)
class RunOfSystems:
    """Neighbouring systems that are treated together: one crystal, or molecules.

    Attributes:
        periodic: whether it is a crystal.
        first, count: its systems.
        atoms: their atoms.
        system: ``[n]`` index of each atom's system among them.
    """

    periodic: bool
    first: int
    count: int
    atoms: slice
    system: Tensor


_RUNS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def runs_of_systems(system: Tensor, pbc: Tensor) -> list[RunOfSystems] | None:
    """Crystals one by one, molecules between them together; those with atoms. None where no system is periodic.

    Args:
        system: ``[N]`` ascending index of each atom's system.
        pbc: ``[S, 3]`` periodicity. The result is kept as long as this tensor lives unchanged: a GPU is asked once.

    Raises:
        RuntimeError: a step is being recorded, which must not wait for a GPU.
        ValueError: a system is periodic in some directions only.
    """
    if pbc.is_cuda and (capturing() or torch.cuda.is_current_stream_capturing()):
        raise RuntimeError(
            "attention in crystals has as many wave vectors as the cell wants: such a step cannot be recorded; "
            "where no system is periodic, say so by periodic=False in the graph"
        )
    version = None if pbc.is_inference() else pbc._version
    known = _RUNS.get(pbc)
    if known is None or known[0]() is not system or known[1] != version or version is None:
        known = _RUNS[pbc] = weakref.ref(system), version, _runs(system, pbc)
    runs: list[RunOfSystems] | None = known[2]
    return runs


def _runs(system: Tensor, pbc: Tensor) -> list[RunOfSystems] | None:
    directions = pbc.tolist()
    periodic = [any(row) for row in directions]
    if not any(periodic):
        return None
    if any(any(row) != all(row) for row in directions):
        raise ValueError("the attention needs systems that are periodic in all three directions or in none")
    counts = torch.bincount(system, minlength=len(periodic)).tolist()
    runs, number, start = [], 0, 0
    while number < len(periodic):
        stop, last = start + counts[number], number + 1
        while not periodic[number] and last < len(periodic) and not periodic[last]:
            stop, last = stop + counts[last], last + 1
        atoms = slice(start, stop)
        if stop > start:
            runs.append(RunOfSystems(periodic[number], number, last - number, atoms, system[atoms] - number))
        number, start = last, stop
    return runs
