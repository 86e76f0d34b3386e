"""Lists of neighbours for a simulation, kept over several steps.

Both kinds find neighbours within cutoff + skin now and then, and give at every step the edges that are within the
cutoff then, sorted by receiver, sender and shift. What a model sees therefore depends on the positions alone, neither
on the skin nor on when the list was made.

* :class:`HostList` asks at every step how far atoms have moved, which costs nothing where positions are in the host's
  memory, and gives exactly the edges there are.
* :class:`DeviceList` never asks. Its tensors have fixed shapes: edges that are missing to the full number run between
  ghost atoms, in a system of their own behind the real ones, further apart than the cutoff. The farthest that an atom
  has moved since the list was made, and the places that were needed, are kept on the device as running maxima
  (``flags``). Its owner makes the list anew whenever it likes, reads the flags later, and repeats the steps since it
  last read them where they say that a list was too old or too short (:mod:`steradian.simulate.device_md`). So no step
  waits for the host, and no step that counts was made with a wrong list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from steradian.graph.ghosts import ghost_edges, ghost_places
from steradian.graph.graph import Graph
from steradian.graph.neighbors import neighbor_pairs
from steradian.graph.neighbors_device import Boxes, guess_width, make_search, rounded_up
from steradian.graph.topology import Topology

__all__ = ["Capacity", "DeviceList", "HostList", "Needs", "boxes_of"]

#: of half the skin: what rounding may take
SAFETY = 0.998
#: ghost atoms per real one
GHOSTS = 0.04


@dataclass(frozen=True)
class Capacity:
    """Fixed shapes of a device list: places per row of neighbours, places per cell of its search, and edges."""

    width: int
    crowd: int
    edges: int


@dataclass(frozen=True)
class Needs:
    """What a stretch of steps would have needed, read from the flags of a device list.

    Attributes:
        moved: farthest way of an atom from where it was when the list in use was made [Å]; NaN where it was lost.
        width, crowd, edges: as in :class:`Capacity`.
    """

    moved: float
    width: int
    crowd: int
    edges: int

    def fit(self, capacity: Capacity) -> bool:
        """Whether nothing was cut."""
        return all(getattr(self, field.name) <= getattr(capacity, field.name) for field in fields(capacity))

    def grown(self, capacity: Capacity) -> Capacity:
        """Shapes that hold this, with room to spare; what was enough stays as it is."""
        multiples = {"width": 8, "crowd": 8, "edges": 64}
        larger = {
            name: rounded_up(1.15 * getattr(self, name), multiple)
            for name, multiple in multiples.items()
            if getattr(self, name) > getattr(capacity, name)
        }
        return replace(capacity, **larger)


def boxes_of(systems: Sequence[Atoms]) -> Boxes:
    """Cells and sizes of some systems."""
    return Boxes(
        cells=np.stack([np.asarray(atoms.cell) if atoms.pbc.any() else np.zeros((3, 3)) for atoms in systems]),
        pbc=np.stack([atoms.pbc for atoms in systems]),
        sizes=tuple(len(atoms) for atoms in systems),
    )


class HostList:
    """Neighbours of systems whose positions are in the host's memory.

    Args:
        systems: numbers, cells and periodicity; ``positions`` are given to :meth:`refresh`.
        cutoff, skin: [Å].
    """

    def __init__(self, systems: Sequence[Atoms], cutoff: float, skin: float) -> None:
        self.boxes, self.cutoff, self.skin = boxes_of(systems), cutoff, skin
        self.num_lists = 0
        self._positions: Tensor | None = None
        self._offsets: Tensor
        self._near: Tensor | None = None
        cells = torch.as_tensor(self.boxes.cells)
        none = torch.zeros(0, dtype=torch.int64)
        self._listed = self._kept = Graph(
            positions=torch.zeros(self.boxes.num_atoms, 3, dtype=torch.float64),
            numbers=torch.as_tensor(np.concatenate([atoms.numbers for atoms in systems]).astype(np.int64)),
            system=torch.arange(len(systems)).repeat_interleave(torch.tensor(self.boxes.sizes)),
            senders=none,
            receivers=none,
            shifts=none.new_zeros((0, 3)),
            cell=cells,
            pbc=torch.as_tensor(self.boxes.pbc),
            num_systems=len(systems),
        )

    def refresh(self, positions: Tensor) -> Graph:
        """The graph at these positions ``[N, 3]``, with the edges within the cutoff.

        Raises:
            DataError: positions that are not finite, or two atoms at the same place.
        """
        if self._positions is None or self._too_far(positions):
            self._make(positions)
        graph = self._listed
        vectors = positions.index_select(0, graph.senders) - positions.index_select(0, graph.receivers)
        near = (vectors + self._offsets).square().sum(1) < self.cutoff**2
        if self._near is None or not torch.equal(self._near, near):
            self._near = near
            self._kept = replace(
                graph, senders=graph.senders[near], receivers=graph.receivers[near], shifts=graph.shifts[near]
            )
            self._kept.prepared()  # once for all steps with these edges
        return replace(self._kept, positions=positions)

    def _too_far(self, positions: Tensor) -> bool:
        assert self._positions is not None
        moved = (positions - self._positions).square().sum(1).max() if len(positions) else positions.new_zeros(())
        return not float(moved) < (0.5 * SAFETY * self.skin) ** 2

    def _make(self, positions: Tensor) -> None:
        here = positions.detach().double().numpy()
        found, start = [], 0
        for index, size in enumerate(self.boxes.sizes):
            receivers, senders, shifts = neighbor_pairs(
                here[start : start + size], self.boxes.cells[index], self.boxes.pbc[index], self.cutoff + self.skin
            )
            found.append((receivers + start, senders + start, shifts))
            start += size
        joined = [torch.as_tensor(np.concatenate(part)) for part in zip(*found)]
        self._listed = replace(self._listed, receivers=joined[0], senders=joined[1], shifts=joined[2])
        cells = self._listed.cell.index_select(0, self._listed.system.index_select(0, joined[0]))
        self._offsets = torch.einsum("ei,eij->ej", joined[2].double(), cells).to(positions.dtype)
        self._positions = positions.clone()
        self._near = None
        self.num_lists += 1


class DeviceList:
    """Neighbours in tensors of fixed shape; see the text at the head of this module.

    Args:
        systems: numbers, cells and periodicity, and the first positions, which decide the shapes.
        cutoff, skin: [Å].
        device, dtype: of the positions.
        search: as for :func:`~steradian.graph.neighbors_device.make_search`.
        capacity: shapes, or None: those that the first positions need and 15 % more.

    Attributes:
        graph: the padded graph. Its tensors are changed in place by :meth:`refresh` and never replaced, so a step that
            uses them can be recorded.
        flags: ``[4]`` float64 on the device, running maxima in the order of :class:`Needs`.
    """

    def __init__(
        self,
        systems: Sequence[Atoms],
        cutoff: float,
        skin: float,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float64,
        search: str = "auto",
        capacity: Capacity | None = None,
    ) -> None:
        self.boxes, self.cutoff, self.skin = boxes_of(systems), cutoff, skin
        first = np.concatenate([atoms.positions for atoms in systems])
        if capacity is None:
            width, _ = guess_width(self.boxes, first, cutoff + skin)
            edges = guess_width(self.boxes, first, cutoff)[1]
            capacity = Capacity(width=width, crowd=64, edges=rounded_up(1.15 * edges + 16, 64))
        self.capacity, self.num_lists = capacity, 0
        x = torch.tensor(first, device=device, dtype=dtype)
        self.search, self.kind = make_search(
            search, self.boxes, cutoff + skin, x, width=capacity.width, crowd=capacity.crowd
        )
        count, width = self.boxes.num_atoms, capacity.width
        self.graph = _padded_graph(systems, self.boxes, capacity.edges, cutoff, x)
        self.num_ghosts = self.graph.num_atoms - count
        self.flags = torch.zeros(4, device=device, dtype=torch.float64)
        self.reference = x.clone()
        self._rows_senders = torch.zeros((count, width), device=device, dtype=torch.int64)
        self._rows_shifts = torch.zeros((count, width, 3), device=device, dtype=torch.int64)
        self._offsets = torch.zeros((count, width, 3), device=device, dtype=dtype)
        self._listed = torch.zeros((count, width), device=device, dtype=torch.bool)
        self._slots = torch.arange(capacity.edges, device=device)
        self._cells = self.graph.cell.index_select(0, self.graph.system[:count])

    @property
    def waits(self) -> bool:
        """Whether :meth:`build` waits for the device (a search on the host)."""
        return self.search.waits

    def build(self, positions: Tensor) -> None:
        """Make the list anew for positions ``[N, 3]``."""
        rows = self.search(positions)
        places = torch.arange(self.capacity.width, device=positions.device)
        self._rows_senders.copy_(rows.senders)
        self._rows_shifts.copy_(rows.shifts)
        self._offsets.copy_(torch.einsum("nki,nij->nkj", rows.shifts.double(), self._cells))
        self._listed.copy_(places < rows.counts.unsqueeze(1))
        self.reference.copy_(positions)
        needed = torch.stack([rows.counts.amax() if rows.counts.numel() else rows.crowding, rows.crowding]).double()
        self.flags[1:3] = torch.maximum(self.flags[1:3], needed)
        self.num_lists += 1

    def refresh(self, positions: Tensor) -> Graph:
        """Put positions and the edges within the cutoff into :attr:`graph`; device operations of fixed shape only."""
        graph, count, width = self.graph, self.boxes.num_atoms, self.capacity.width
        moved = (positions - self.reference).double().square().sum(1).amax().sqrt()
        vectors = positions[self._rows_senders] - positions.unsqueeze(1) + self._offsets
        near = (vectors.square().sum(-1) < self.cutoff**2) & self._listed
        # the running number of near places grows by one at each: the e-th edge is where it first reaches e + 1
        running = near.flatten().cumsum(0)
        total = running[-1]
        place = torch.searchsorted(running, self._slots + 1).clamp_(max=count * width - 1)
        real = self._slots < total
        ghost, other = ghost_edges(self._slots - total, self._slots.numel() - total, self.num_ghosts)
        senders = self._rows_senders.flatten().index_select(0, place)
        shifts = self._rows_shifts.view(-1, 3).index_select(0, place)
        graph.senders.copy_(torch.where(real, senders, count + other))
        graph.receivers.copy_(torch.where(real, place // width, count + ghost))
        graph.shifts.copy_(shifts * real.unsqueeze(1))
        graph.positions[:count].copy_(positions)
        assert graph.topology is not None
        graph.topology.refresh()
        self.flags[0] = torch.maximum(self.flags[0], moved)
        self.flags[3] = torch.maximum(self.flags[3], total.double())
        return graph

    def needs(self, flags: Sequence[float]) -> Needs:
        """Flags as numbers, on the host."""
        return Needs(float(flags[0]), *(int(value) for value in flags[1:]))

    def still_valid(self, needs: Needs) -> bool:
        """Whether no atom has moved so far that a neighbour may be missing."""
        return needs.moved <= 0.5 * SAFETY * self.skin


def _padded_graph(systems: Sequence[Atoms], boxes: Boxes, num_edges: int, cutoff: float, positions: Tensor) -> Graph:
    """Real atoms, then ghosts, an even number of them."""
    device, count, num = positions.device, boxes.num_atoms, len(systems)
    ghosts = max(2, 2 * round(0.5 * GHOSTS * count))
    numbers = np.concatenate([*(atoms.numbers for atoms in systems), np.repeat(systems[0].numbers[:1], ghosts)])
    system = np.concatenate([np.repeat(np.arange(num), boxes.sizes), np.full(ghosts, num)])
    cell = np.concatenate([boxes.cells, boxes.cells[:1]])
    pbc = np.concatenate([boxes.pbc, boxes.pbc[:1]])
    found, times = np.unique(numbers, return_counts=True)
    own = torch.arange(ghosts, device=device)
    tensors: dict[str, Any] = {
        "numbers": torch.tensor(numbers.astype(np.int64), device=device),
        "system": torch.tensor(system, device=device),
        "senders": torch.full((num_edges,), count, device=device),
        "receivers": torch.full((num_edges,), count + 1, device=device),
        "shifts": torch.zeros((num_edges, 3), device=device, dtype=torch.int64),
        "pbc": torch.tensor(pbc, device=device),
    }
    topology = Topology(
        num_atoms=count + ghosts,
        num_systems=num + 1,
        is_static=True,
        sizes=(*boxes.sizes, ghosts),
        periodic=bool(pbc.any()),
        composition=tuple(zip(found.tolist(), times.tolist())),
        real=torch.tensor([True] * num + [False], device=device),
        **tensors,
    )
    return Graph(
        positions=torch.cat([positions, ghost_places(own, cutoff).to(positions.dtype)]),
        cell=torch.tensor(cell, device=device),
        num_systems=num + 1,
        topology=topology,
        **tensors,
    )
