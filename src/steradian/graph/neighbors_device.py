"""Neighbour lists on any device, in tensors of fixed shape, without waiting for the host.

A search fills rows of K places: row i holds the neighbours of atom i. What does not fit is never dropped in silence:
every search says how many places it would have needed, on the device, and whoever uses the rows reads that number
before trusting them (:class:`~steradian.graph.skin.DeviceList` does).

Searches, by name:

* ``brute``: all pairs of atoms of a system and the images of them that can be near; plain PyTorch.
* ``cells``: atoms sorted into cells at least a cutoff wide, pairs of neighbouring cells; plain PyTorch.
* ``nvalchemi``: the kernels of nvalchemi-toolkit-ops, where that package is installed.
* ``vesin``: vesin on the host, as everywhere else in steradian. Positions are fetched, so it waits for the device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from ase.geometry import complete_cell
from torch import Tensor

from steradian.graph.neighbors import neighbor_pairs
from steradian.graph.structures import DataError

__all__ = ["SEARCHES", "Boxes", "Rows", "Search", "has_nvalchemi", "make_search"]

SEARCHES = ("auto", "brute", "cells", "nvalchemi", "vesin")
#: atoms of a system up to which all pairs are looked at
BRUTE_UP_TO = 3000
#: pairs looked at in one go; bounds the memory of a search
PAIRS_AT_ONCE = 1 << 23
#: largest component of a shift and number of atoms for which one integer sorts a row
SHIFT_BITS, SENDER_BITS = 14, 21


@dataclass(frozen=True)
class Boxes:
    """Cells and sizes of the systems of a batch, which stay the same during a simulation.

    Attributes:
        cells: ``[S, 3, 3]`` lattice vectors as rows [Å], float64; any for directions that are not periodic.
        pbc: ``[S, 3]`` periodicity.
        sizes: number of atoms of every system; atoms of a system stand together.
    """

    cells: np.ndarray
    pbc: np.ndarray
    sizes: tuple[int, ...]

    @property
    def num_atoms(self) -> int:
        return sum(self.sizes)

    @property
    def complete(self) -> np.ndarray:
        """``[S, 3, 3]`` cells of full rank: missing vectors are filled in."""
        return np.stack([np.array(complete_cell(cell), dtype=np.float64) for cell in self.cells])

    @property
    def heights(self) -> np.ndarray:
        """``[S, 3]`` distances between opposite faces [Å]."""
        inverse = np.linalg.inv(self.complete)
        heights: np.ndarray = 1.0 / np.linalg.norm(inverse, axis=1)
        return heights


@dataclass(frozen=True)
class Rows:
    """Neighbours of every atom.

    Attributes:
        senders: ``[N, K]`` int64; places beyond the number of neighbours hold any atom.
        shifts: ``[N, K, 3]`` whole cell vectors to add to the sender's position, int64.
        counts: ``[N]`` number of neighbours, also where it is above K; then the row is cut.
        crowding: scalar, atoms in the fullest cell of a cell list, or 0.
    """

    senders: Tensor
    shifts: Tensor
    counts: Tensor
    crowding: Tensor


class Search(ABC):
    """Finds all neighbours within a distance, periodic images included; rows are sorted by sender, then shift.

    Args:
        boxes: cells and sizes.
        cutoff: [Å].
        width: K, places per row.
        device: of the positions.
    """

    #: Whether a call waits for the device.
    waits = False

    def __init__(self, boxes: Boxes, cutoff: float, width: int, device: torch.device) -> None:
        if cutoff <= 0:
            raise DataError(f"a cutoff of {cutoff} Å; it must be positive")
        if boxes.num_atoms >= 1 << SENDER_BITS:
            raise DataError(f"{boxes.num_atoms} atoms; neighbour lists on a device take up to {1 << SENDER_BITS}")
        self.boxes, self.cutoff, self.width, self.device = boxes, cutoff, width, device
        sizes = np.array(boxes.sizes, dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        system = np.repeat(np.arange(len(sizes)), sizes)
        self.system = self.tensor(system)
        self.start, self.size = self.tensor(starts[system]), self.tensor(sizes[system])
        self.cells = self.tensor(boxes.complete)
        self.inverse = self.tensor(np.linalg.inv(boxes.complete))
        self.pbc = self.tensor(np.asarray(boxes.pbc, dtype=bool))
        self.atoms = torch.arange(boxes.num_atoms, device=device)
        self.places = torch.arange(1, width + 1, device=device, dtype=torch.int32)

    def tensor(self, values: np.ndarray) -> Tensor:
        return torch.as_tensor(values, device=self.device)

    @abstractmethod
    def __call__(self, positions: Tensor) -> Rows:
        """Neighbours at the positions ``[N, 3]``, float32 or float64."""

    def fractional(self, positions: Tensor) -> Tensor:
        """``[N, 3]`` positions in units of the cell vectors."""
        return torch.einsum("ni,nij->nj", positions.double(), self.inverse.index_select(0, self.system))

    def pick(self, near: Tensor) -> tuple[Tensor, Tensor]:
        """Places of the first K true entries of each row of a mask ``[n, W]``, and how many there are.

        The running count of true entries grows by one at each of them, so the k-th is where it first reaches k.
        """
        running = near.cumsum(1, dtype=torch.int32)
        wanted = self.places.expand(near.shape[0], -1).contiguous()
        return torch.searchsorted(running, wanted).clamp_(max=near.shape[1] - 1), running[:, -1]

    def sorted(self, senders: Tensor, shifts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Rows in the one order of all searches."""
        half = 1 << (SHIFT_BITS - 1)
        key = senders
        for axis in range(3):
            key = (key << SHIFT_BITS) + (shifts[..., axis] + half)
        beyond = self.places.unsqueeze(0) > counts.unsqueeze(1)
        order = key.masked_fill(beyond, torch.iinfo(torch.int64).max).argsort(1)
        return senders.gather(1, order), shifts.gather(1, order.unsqueeze(2).expand(-1, -1, 3))


class BruteForce(Search):
    """All pairs of atoms of a system.

    Fractional differences are brought to within half a cell first; an image s further can then be near only where
    |s| is at most cutoff / height + 1/2, so that a cell twice as high as the cutoff needs none.
    """

    def __init__(self, boxes: Boxes, cutoff: float, width: int, device: torch.device) -> None:
        super().__init__(boxes, cutoff, width, device)
        reach = np.floor(cutoff / boxes.heights + 0.5 + 1e-9).astype(int) * np.asarray(boxes.pbc, dtype=int)
        most = reach.max(axis=0)
        grid = np.stack(np.meshgrid(*(np.arange(-m, m + 1) for m in most), indexing="ij"), -1).reshape(-1, 3)
        self.images = self.tensor(grid)  # [M, 3], in order
        self.others = torch.arange(max(boxes.sizes, default=0), device=device)
        self.rows_at_once = max(1, PAIRS_AT_ONCE // max(1, len(self.others) * len(grid)))

    def __call__(self, positions: Tensor) -> Rows:
        fractional = self.fractional(positions)
        parts = [self._rows(fractional, atoms) for atoms in self.atoms.split(self.rows_at_once)]
        senders, shifts, counts = (torch.cat(part) for part in zip(*parts))
        return Rows(senders, shifts, counts, counts.new_zeros(()))

    def _rows(self, fractional: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        system = self.system.index_select(0, atoms)
        periodic = self.pbc.index_select(0, system)  # [n, 3]
        senders = self.start.index_select(0, atoms).unsqueeze(1) + self.others  # [n, J]
        real = self.others < self.size.index_select(0, atoms).unsqueeze(1)
        senders = senders.clamp_(max=self.boxes.num_atoms - 1)
        difference = fractional[senders] - fractional.index_select(0, atoms).unsqueeze(1)
        turns = difference.round() * periodic.unsqueeze(1)  # [n, J, 3]
        cells = self.cells.index_select(0, system)
        vectors = torch.einsum("njk,nkl->njl", difference - turns, cells)
        offsets = torch.einsum("mk,nkl->nml", self.images.double(), cells)
        squares = (vectors.unsqueeze(2) + offsets.unsqueeze(1)).square().sum(-1)  # [n, J, M]
        allowed = ((self.images == 0) | periodic.unsqueeze(1)).all(-1)  # [n, M]
        itself = (senders == atoms.unsqueeze(1)).unsqueeze(2) & (self.images == 0).all(-1)
        near = (squares <= self.cutoff**2) & real.unsqueeze(2) & allowed.unsqueeze(1) & ~itself
        found, counts = self.pick(near.flatten(1))
        other, image = found // len(self.images), found % len(self.images)
        shifts = self.images[image] - turns.gather(1, other.unsqueeze(2).expand(-1, -1, 3)).long()
        return senders.gather(1, other), shifts, counts


class CellList(Search):
    """Atoms in cells at least a cutoff wide; only atoms of neighbouring cells are compared.

    Where a direction is not periodic the grid covers the first positions, and atoms that leave it later count to the
    cells at its border: that costs time and places, never a neighbour.

    Args:
        positions: ``[N, 3]`` first positions, on the host.
        crowd: places per cell.
    """

    def __init__(
        self, boxes: Boxes, cutoff: float, width: int, device: torch.device, positions: np.ndarray, crowd: int
    ) -> None:
        super().__init__(boxes, cutoff, width, device)
        self.crowd = crowd
        inverse, starts = np.linalg.inv(boxes.complete), np.concatenate([[0], np.cumsum(boxes.sizes)])
        low, span = np.zeros((len(boxes.sizes), 3)), np.ones((len(boxes.sizes), 3))
        for index, pbc in enumerate(boxes.pbc):
            inside = positions[starts[index] : starts[index + 1]] @ inverse[index]
            if len(inside):
                low[index] = np.where(pbc, 0.0, inside.min(axis=0))
                span[index] = np.where(pbc, 1.0, np.maximum(np.ptp(inside, axis=0), 1e-6))
        heights = boxes.heights * span
        count = np.maximum(np.floor(heights / cutoff), 1).astype(np.int64)  # [S, 3]
        for index, size in enumerate(boxes.sizes):  # a nearly empty box needs no more cells than atoms
            while count[index].prod() > max(2 * size, 64):
                count[index, count[index].argmax()] = (count[index].max() + 1) // 2
        reach = np.ceil(cutoff / (heights / count) - 1e-12).astype(int)
        reach = np.where(~np.asarray(boxes.pbc) & (count == 1), 0, reach)
        grid = [np.arange(-m, m + 1) for m in reach.max(axis=0)]
        self.low, self.span, self.count = self.tensor(low), self.tensor(span), self.tensor(count)
        self.first_cell = self.tensor(np.concatenate([[0], np.cumsum(count.prod(axis=1))])[:-1])
        self.num_cells = int(count.prod(axis=1).sum())
        self.steps = self.tensor(np.stack(np.meshgrid(*grid, indexing="ij"), -1).reshape(-1, 3))
        self.rows_at_once = max(1, PAIRS_AT_ONCE // (len(self.steps) * crowd))

    def __call__(self, positions: Tensor) -> Rows:
        fractional = self.fractional(positions)
        periodic = self.pbc.index_select(0, self.system)
        turns = fractional.floor() * periodic
        wrapped = fractional - turns
        counts = self.count.index_select(0, self.system)
        scaled = (wrapped - self.low.index_select(0, self.system)) / self.span.index_select(0, self.system)
        place = (scaled * counts).floor().clamp(min=0).minimum(counts - 1).long()  # [N, 3]
        table, fullest = self._table(self._index(place, self.system))
        cartesian = torch.einsum("nk,nkl->nl", wrapped, self.cells.index_select(0, self.system))
        geometry = (cartesian, turns.long(), place, table)
        parts = [self._rows(geometry, atoms) for atoms in self.atoms.split(self.rows_at_once)]
        senders, shifts, found = (torch.cat(part) for part in zip(*parts))
        return Rows(*self.sorted(senders, shifts, found), found, fullest)

    def _index(self, place: Tensor, system: Tensor) -> Tensor:
        """Number of a cell from its place ``[..., 3]`` in the grid of a system."""
        count = self.count.index_select(0, system)
        while count.ndim < place.ndim:
            count, system = count.unsqueeze(1), system.unsqueeze(1)
        inside = (place[..., 0] * count[..., 1] + place[..., 1]) * count[..., 2] + place[..., 2]
        return self.first_cell[system] + inside

    def _table(self, cell: Tensor) -> tuple[Tensor, Tensor]:
        """Atoms of every cell ``[cells, crowd]``, -1 in empty places, and the number in the fullest one."""
        ordered, order = cell.sort(stable=True)
        edges = torch.searchsorted(ordered, torch.arange(self.num_cells + 1, device=self.device))
        rank = self.atoms - edges[ordered]
        table = torch.full((self.num_cells * self.crowd + 1,), -1, dtype=torch.int64, device=self.device)
        slot = torch.where(rank < self.crowd, ordered * self.crowd + rank, self.num_cells * self.crowd)
        table.scatter_(0, slot, order)
        return table[:-1].view(self.num_cells, self.crowd), edges.diff().amax()

    def _rows(self, geometry: tuple[Tensor, ...], atoms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cartesian, turns, place, table = geometry
        system = self.system.index_select(0, atoms)
        count, periodic = (values.index_select(0, system).unsqueeze(1) for values in (self.count, self.pbc))
        target = place.index_select(0, atoms).unsqueeze(1) + self.steps  # [n, O, 3]
        image = torch.div(target, count, rounding_mode="floor")
        inside = ((image == 0) | periodic).all(-1)
        image = torch.where(periodic, image, 0)
        target = torch.where(inside.unsqueeze(2), target - image * count, 0)
        others = table[self._index(target, system)]  # [n, O, crowd]
        offset = torch.einsum("nok,nkl->nol", image.double(), self.cells.index_select(0, system))
        senders = others.clamp(min=0)
        vectors = cartesian[senders] + (offset - cartesian.index_select(0, atoms).unsqueeze(1)).unsqueeze(2)
        itself = (senders == atoms.view(-1, 1, 1)) & (image == 0).all(-1).unsqueeze(2)
        near = (vectors.square().sum(-1) <= self.cutoff**2) & (others >= 0) & inside.unsqueeze(2) & ~itself
        found, counts = self.pick(near.flatten(1))
        sender = senders.flatten(1).gather(1, found)
        shifts = image.gather(1, (found // self.crowd).unsqueeze(2).expand(-1, -1, 3))
        return sender, shifts - turns[sender] + turns.index_select(0, atoms).unsqueeze(1), counts


class Nvalchemi(Search):
    """nvalchemi-toolkit-ops (0.5 or newer) with a prepared state: fixed buffers, no estimates between calls."""

    def __init__(
        self, boxes: Boxes, cutoff: float, width: int, device: torch.device, positions: Tensor, large: bool
    ) -> None:
        super().__init__(boxes, cutoff, width, device)
        from nvalchemiops.torch import neighbors

        pointers = np.concatenate([[0], np.cumsum(boxes.sizes)]).astype(np.int32)
        periodic = bool(np.any(boxes.pbc))
        self._find = neighbors.neighbor_list
        self.state = neighbors.prepare_neighbor_list(
            positions.contiguous(),
            cutoff,
            cell=self.cells.to(positions.dtype) if periodic else None,
            pbc=self.pbc if periodic else None,
            batch_idx=self.system.int(),
            batch_ptr=self.tensor(pointers),
            max_neighbors=width,
            method="batch_cell_list" if large and periodic else "batch_naive",
            fixed_cell=periodic,
        )

    def __call__(self, positions: Tensor) -> Rows:
        found = self._find(positions.contiguous(), state=self.state)
        senders = found[0].long().clamp_(0, self.boxes.num_atoms - 1)
        counts = found[1].clone()
        shifts = found[2].long() if len(found) > 2 else senders.new_zeros((*senders.shape, 3))
        beyond = (self.places.unsqueeze(0) > counts.unsqueeze(1)).unsqueeze(2)
        shifts = shifts.masked_fill(beyond, 0)
        return Rows(*self.sorted(senders, shifts, counts), counts, counts.new_zeros(()))


class Vesin(Search):
    """vesin on the host."""

    waits = True

    def __call__(self, positions: Tensor) -> Rows:
        here = positions.detach().double().cpu().numpy()
        senders = np.zeros((len(here), self.width), dtype=np.int64)
        shifts = np.zeros((len(here), self.width, 3), dtype=np.int64)
        counts, start = np.zeros(len(here), dtype=np.int32), 0
        for index, size in enumerate(self.boxes.sizes):
            of_system = here[start : start + size]
            receivers, others, images = neighbor_pairs(
                of_system, self.boxes.cells[index], self.boxes.pbc[index], self.cutoff
            )
            number = np.bincount(receivers, minlength=size)
            rank = np.arange(len(receivers)) - np.repeat(np.cumsum(number) - number, number)
            fits = rank < self.width
            senders[start + receivers[fits], rank[fits]] = start + others[fits]
            shifts[start + receivers[fits], rank[fits]] = images[fits]
            counts[start : start + size] = number
            start += size
        found = self.tensor(counts)
        return Rows(self.tensor(senders), self.tensor(shifts), found, found.new_zeros(()))


@cache
def has_nvalchemi() -> bool:
    """Whether nvalchemi-toolkit-ops is installed with what its PyTorch interface needs."""
    try:
        from nvalchemiops.torch.neighbors import prepare_neighbor_list  # noqa: F401
    except Exception:
        return False
    return True


def make_search(
    kind: str, boxes: Boxes, cutoff: float, positions: Tensor, *, width: int, crowd: int = 32
) -> tuple[Search, str]:
    """A search for systems of fixed cells.

    Args:
        kind: one of :data:`SEARCHES`; ``auto`` takes nvalchemi-toolkit-ops on a GPU where it is installed, else all
            pairs for systems up to :data:`BRUTE_UP_TO` atoms and the cell list above.
        boxes: cells and sizes.
        cutoff: [Å].
        positions: ``[N, 3]`` first positions; their device and dtype are those of all later ones.
        width: places for neighbours of an atom.
        crowd: places per cell of the cell list.

    Returns:
        The search and the name of its kind.

    Raises:
        DataError: an unknown kind, a package that is missing, or a cutoff that is not positive.
    """
    large = max(boxes.sizes, default=0) > BRUTE_UP_TO
    device = positions.device
    if kind == "auto":
        kind = "cells" if large else "brute"
        # without periodicity its cell list needs bounds that atoms never leave
        if device.type == "cuda" and has_nvalchemi() and not (large and not np.all(boxes.pbc)):
            kind = "nvalchemi"
    if kind == "brute":
        return BruteForce(boxes, cutoff, width, device), kind
    if kind == "cells":
        here = positions.detach().double().cpu().numpy()
        return CellList(boxes, cutoff, width, device, here, crowd), kind
    if kind == "vesin":
        return Vesin(boxes, cutoff, width, device), kind
    if kind == "nvalchemi":
        if not has_nvalchemi():
            raise DataError("neighbour lists by nvalchemi need that package: pip install nvalchemi-toolkit-ops")
        return Nvalchemi(boxes, cutoff, width, device, positions, large), kind
    raise DataError(f"neighbour search '{kind}' is not known; choose {', '.join(SEARCHES)}")


def guess_width(boxes: Boxes, positions: np.ndarray, cutoff: float) -> tuple[int, int]:
    """Places per row for these positions, with room to spare, and edges in all; counted with vesin on the host."""
    widest, total, start = 0, 0, 0
    for index, size in enumerate(boxes.sizes):
        receivers, _, _ = neighbor_pairs(positions[start : start + size], boxes.cells[index], boxes.pbc[index], cutoff)
        widest = max(widest, int(np.bincount(receivers, minlength=1).max(initial=0)))
        total, start = total + len(receivers), start + size
    return rounded_up(1.15 * widest + 2, 8), total


def rounded_up(value: float, multiple: int) -> int:
    """The next multiple."""
    return multiple * max(1, math.ceil(value / multiple))
