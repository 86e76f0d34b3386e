"""Padded batches: graphs filled up to a few fixed sizes with ghosts, and the data set on a device they are made from.

So a step can be recorded once and used for many batches. A batch of a data set on the device is named by the indices of
its frames alone; which atoms, which edges and which ghosts is worked out there, in operations of fixed shape.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steradian.graph import Graph, Prediction
from steradian.graph.ghosts import ghost_edges, ghost_places
from steradian.graph.topology import Pairs, Topology

__all__ = [
    "Buckets",
    "DeviceData",
    "Sizes",
    "pad_graph",
    "real_part",
    "room_for",
]

GHOSTS = 2
"""The smallest number of ghosts: an edge needs two ends."""


@dataclass(frozen=True, order=True)
class Sizes:
    """Atoms, edges and systems of a padded graph, ghosts included."""

    atoms: int
    edges: int
    systems: int

    @classmethod
    def of(cls, graph: Graph) -> Sizes:
        """The sizes of a graph as it is."""
        return cls(graph.num_atoms, graph.num_edges, graph.num_systems)

    def with_ghosts(self) -> Sizes:
        """The smallest sizes of a padded graph with so many real atoms, edges and systems."""
        return Sizes(self.atoms + GHOSTS, self.edges + self.edges % 2, self.systems + 1)

    def fits(self, other: Sizes) -> bool:
        """Whether a graph of the other sizes (with its ghosts) can be filled up to these."""
        return other.atoms <= self.atoms and other.edges <= self.edges and other.systems <= self.systems


@dataclass(frozen=True)
class Buckets:
    """The sizes that graphs are filled up to.

    Attributes:
        exact: sizes to use where a graph fits (the smallest that does); ghosts included.
        ratio: between neighbouring sizes elsewhere.
        smallest: below this no size is told from another.
        largest: where set, sizes are this one divided by powers of the ratio, so that the largest batch has no padding.
    """

    exact: tuple[Sizes, ...] = ()
    ratio: float = 1.25
    smallest: Sizes = Sizes(16, 128, 2)
    largest: Sizes | None = None

    def __post_init__(self) -> None:
        if not self.ratio > 1.0:
            raise ValueError(f"sizes of buckets must grow: ratio is {self.ratio}, give one above 1")

    def choose(self, needed: Sizes) -> Sizes:
        """The sizes for a graph of these (real) sizes."""
        needed = needed.with_ghosts()
        for sizes in sorted(self.exact):
            if sizes.fits(needed):
                return sizes
        return Sizes(*(self._step(name, getattr(needed, name)) for name in ("atoms", "edges", "systems")))

    def _step(self, name: str, count: int) -> int:
        """The smallest step that is enough, a multiple of some number (the largest one excepted)."""
        smallest, multiple = getattr(self.smallest, name), {"atoms": 2, "edges": 32, "systems": 1}[name]
        start = smallest if self.largest is None else getattr(self.largest, name)
        power = math.ceil(math.log(max(count, smallest) / start, self.ratio) - 1e-9)
        for step in (power, power + 1):  # the logarithm may be off by rounding
            size = start * self.ratio**step
            rounded = start if step == 0 else math.ceil(size / multiple - 1e-9) * multiple
            if rounded >= count:
                return rounded
        raise AssertionError("sizes grow")

    @classmethod
    def for_batches(cls, batches: Iterable[Sizes], ratio: float = 1.25) -> Buckets:
        """Buckets for batches of known (real) sizes: the largest one fits exactly."""
        found = [sizes.with_ghosts() for sizes in batches]
        if not found:
            return cls(ratio=ratio)
        top = Sizes(*(max(getattr(sizes, name) for sizes in found) for name in ("atoms", "edges", "systems")))
        return cls(ratio=ratio, largest=replace(top, edges=max(2, top.edges)))


def pad_graph(graph: Graph, sizes: Sizes, *, number: int, cutoff: float) -> Graph:
    """The graph filled up with ghosts.

    Labels of ghosts are zero, and ``topology.real`` tells the systems apart; losses leave ghosts out.

    Args:
        graph: on any device; nothing is asked of it.
        sizes: at least ``Sizes.of(graph).with_ghosts()``.
        number: atomic number of the ghosts, an element that the model knows.
        cutoff: [Å] of the model.

    Raises:
        ValueError: the graph is too large, is padded already, or is one process's part of a system.
    """
    have = Sizes.of(graph)
    if not sizes.fits(have.with_ghosts()):
        raise ValueError(f"{have} with two ghosts do not fit into {sizes}: take larger sizes")
    known = graph.prepared()
    if known.real is not None or graph.share is not None:
        raise ValueError("a graph that is padded or spread over processes cannot be padded")
    ghosts, missing, systems = sizes.atoms - have.atoms, sizes.edges - have.edges, sizes.systems - have.systems
    device = graph.senders.device
    own = torch.arange(ghosts, device=device)
    receivers, senders = ghost_edges(torch.arange(missing, device=device), missing, ghosts)

    tensors: dict[str, Any] = {
        "numbers": _longer(graph.numbers, ghosts, number),
        "system": _longer(graph.system, ghosts, have.systems),
        "senders": torch.cat([graph.senders, have.atoms + senders]),
        "receivers": torch.cat([graph.receivers, have.atoms + receivers]),
        "shifts": _longer(graph.shifts, missing),
        "pbc": _longer(graph.pbc, systems),
    }
    topology = Topology(
        num_atoms=sizes.atoms,
        num_systems=sizes.systems,
        is_static=True,
        sizes=(*known.sizes, ghosts, *(0,) * (systems - 1)) if known.knows_sizes else None,
        periodic=known.is_periodic,
        composition=_with_ghosts(known.composition, number, ghosts),
        pairs=_padded_pairs(known, missing),
        real=_longer(torch.ones(have.systems, dtype=torch.bool, device=device), systems),
        **tensors,
    )
    return replace(
        graph,
        positions=torch.cat([graph.positions, ghost_places(own, cutoff).to(graph.positions.dtype)]),
        cell=_longer(graph.cell, systems),
        num_systems=sizes.systems,
        energy=_longer(graph.energy, systems),
        forces=_longer(graph.forces, ghosts),
        stress=_longer(graph.stress, systems),
        weight=_longer(graph.weight, systems),
        dipoles=_longer(graph.dipoles, ghosts),
        config_type=graph.config_type + ("",) * systems if graph.config_type else (),
        topology=topology,
        **tensors,
    )


def _longer(value: Any, count: int, fill: float = 0) -> Any:
    """The tensor with so many more rows; None stays None."""
    return None if value is None else torch.cat([value, value.new_full((count, *value.shape[1:]), fill)])


def _padded_pairs(known: Topology, missing: int) -> Pairs | None:
    """Added edges have one length, so any two of them may share what depends on it."""
    pairs = known.pairs
    if pairs is None or missing % 2 or 2 * pairs.count != known.num_edges:
        return None
    added = torch.arange(missing, device=known.senders.device)
    first = torch.cat([pairs.first, known.num_edges + added[::2]])
    return Pairs(first, torch.cat([pairs.of_edge, known.num_edges // 2 + added // 2]))


def _with_ghosts(
    composition: Sequence[tuple[int, int]] | None, number: int, ghosts: int
) -> tuple[tuple[int, int], ...] | None:
    if composition is None:
        return None
    atoms_of = dict(composition)
    atoms_of[number] = atoms_of.get(number, 0) + ghosts
    return tuple(sorted(atoms_of.items()))


def real_part(prediction: Prediction, real: Sizes) -> Prediction:
    """What was predicted for the real atoms, edges and systems of a padded graph; new tensors."""

    def cut(value: Tensor | None, count: int) -> Tensor | None:
        return None if value is None else value[:count].clone()

    return replace(
        prediction,
        energy=prediction.energy[: real.systems].clone(),
        atom_energies=prediction.atom_energies[: real.atoms].clone(),
        interaction_energy=prediction.interaction_energy[: real.systems].clone(),
        forces=cut(prediction.forces, real.atoms),
        stress=cut(prediction.stress, real.systems),
        gates=tuple(alpha[: real.edges].clone() for alpha in prediction.gates),
    )


# ---------------------------------------------------------------------------------------------- a data set on a device


PER_ATOM, PER_EDGE, PER_SYSTEM = ("positions", "numbers", "forces", "dipoles"), ("senders", "receivers", "shifts"), (
    "cell",
    "pbc",
    "energy",
    "stress",
    "weight",
)  # fmt: skip
SHARE_OF_MEMORY = 0.25
"""The part of a GPU's free memory that a data set may take."""


class DeviceData:
    """Frames on a device.

    Args:
        graphs: one system each, on the CPU, all with the same labels.
        device: where to keep them.
        number, cutoff: of the ghosts, as for :func:`~steradian.execution.batches.pad_graph`.
        pairs: keep pairs of opposite edges too, where every frame has them.

    Attributes:
        num_frames: F.
        atoms, edges: ``[F]`` of every frame, on the host.
        periodic: whether any frame is.

    Raises:
        ValueError: no frames, or a label that only some frames have.
    """

    def __init__(
        self,
        graphs: Sequence[Graph],
        device: torch.device | str,
        *,
        number: int,
        cutoff: float,
        pairs: bool = True,
    ) -> None:
        listed = [graphs[index] for index in range(len(graphs))]
        if not listed:
            raise ValueError("a data set without frames")
        self.device, self.number, self.cutoff = torch.device(device), number, cutoff
        self.num_frames = len(listed)
        self.atoms = np.array([graph.num_atoms for graph in listed], dtype=np.int64)
        self.edges = np.array([graph.num_edges for graph in listed], dtype=np.int64)
        self.periodic = any(graph.is_periodic for graph in listed)
        self._tensors: dict[str, Tensor] = {}
        for name in (*PER_ATOM, *PER_EDGE, *PER_SYSTEM):
            self._keep(name, [getattr(graph, name) for graph in listed])
        both = [_complete_pairs(graph) for graph in listed] if pairs else []
        found = [each for each in both if each is not None]
        self.has_pairs = len(found) == len(listed)
        if self.has_pairs:
            self._keep("first", [each.first for each in found])
            self._keep("of_edge", [each.of_edge for each in found])
        # one more frame, without atoms, stands for a ghost system
        for name, counts in (("atoms", self.atoms), ("edges", self.edges)):
            starts = np.concatenate([[0], np.cumsum(counts)])
            self._tensors[f"first of {name}"] = torch.as_tensor(starts).to(self.device)
            self._tensors[f"number of {name}"] = torch.as_tensor(np.append(counts, 0)).to(self.device)

    def _keep(self, name: str, values: Sequence[Tensor | None]) -> None:
        present = [value for value in values if value is not None]
        if not present:
            return
        if len(present) < len(values):
            raise ValueError(f"{name} is known for {len(present)} of {len(values)} frames: label all or none")
        flat = torch.cat(present)
        if name in PER_SYSTEM:
            flat = torch.cat([flat, flat.new_zeros((1, *flat.shape[1:]))])
        elif flat.dtype == torch.int64 and name != "numbers":
            flat = flat.to(torch.int32)  # indices within a frame
        self._tensors[name] = flat.to(self.device)

    def to(self, device: torch.device | str) -> DeviceData:
        """The same data on another device."""
        moved = copy.copy(self)
        moved.device = torch.device(device)
        moved._tensors = {name: value.to(moved.device) for name, value in self._tensors.items()}
        return moved

    @property
    def num_bytes(self) -> int:
        """Memory that the data take."""
        return sum(value.numel() * value.element_size() for value in self._tensors.values())

    def sizes(self, frames: Sequence[int]) -> Sizes:
        """Real atoms, edges and systems of a batch."""
        chosen = np.asarray(frames)
        return Sizes(int(self.atoms[chosen].sum()), int(self.edges[chosen].sum()), len(chosen))

    def layout(self, frames: Sequence[int], sizes: Sizes) -> tuple[int, ...]:
        """Atoms of every system of a padded batch."""
        own = tuple(int(count) for count in self.atoms[np.asarray(frames)])
        return (*own, sizes.atoms - sum(own), *(0,) * (sizes.systems - len(own) - 1))

    def indices(self, frames: Sequence[int], sizes: Sizes) -> Tensor:
        """``[S]`` what :meth:`batch` takes, on the host (where it is copied from without waiting)."""
        filled = [*frames, *(self.num_frames,) * (sizes.systems - len(frames))]
        return torch.tensor(filled, dtype=torch.int64, pin_memory=self.device.type == "cuda")

    def batch(self, frames: Tensor, sizes: Sizes, layout: tuple[int, ...] | None = None) -> Graph:
        """The padded graph of some frames; asks the device for nothing.

        Args:
            frames: ``[S]`` on the device: indices of frames and then, at least once, F.
            sizes: that the frames fit into, ghosts included. Not checked.
            layout: atoms per system, where they are needed.
        """
        flat = self._tensors
        count = (frames < self.num_frames).sum()  # of real systems; the first ghost system has this index
        atom = _Gathered(flat, "atoms", frames, count, sizes.atoms)
        edge = _Gathered(flat, "edges", frames, count, sizes.edges)
        apart = ghost_places(atom.own, self.cutoff).to(flat["positions"].dtype)
        receiver, sender = ghost_edges(edge.own, sizes.edges - edge.total, sizes.atoms - atom.total)
        begin = atom.starts.index_select(0, edge.system)
        per_system: dict[str, Any] = {name: flat[name].index_select(0, frames) for name in PER_SYSTEM if name in flat}
        tensors: dict[str, Any] = {
            "numbers": atom.take("numbers", self.number),
            "system": atom.system,
            "senders": edge.take("senders", sender, begin),
            "receivers": edge.take("receivers", receiver, begin),
            "shifts": edge.take("shifts", 0),
            "pbc": per_system.pop("pbc"),
        }
        topology = Topology(
            num_atoms=sizes.atoms,
            num_systems=sizes.systems,
            is_static=True,
            sizes=layout,
            periodic=self.periodic,
            pairs=self._pairs(edge, frames, count, sizes) if self.has_pairs and sizes.edges % 2 == 0 else None,
            real=frames < self.num_frames,
            **tensors,
        )
        return Graph(
            positions=atom.take("positions", apart),
            num_systems=sizes.systems,
            forces=atom.take("forces", 0.0) if "forces" in flat else None,
            dipoles=atom.take("dipoles", 0.0) if "dipoles" in flat else None,
            topology=topology,
            **tensors,
            **per_system,
        )

    def _pairs(self, edge: _Gathered, frames: Tensor, count: Tensor, sizes: Sizes) -> Pairs:
        """A frame with E edges has E / 2 pairs, so they are found as its edges are."""
        flat = self._tensors
        of_edge = edge.take("of_edge", torch.div(edge.own, 2, rounding_mode="floor"), edge.begin // 2)
        pair = _Gathered(flat, "edges", frames, count, sizes.edges // 2, half=True)
        first = pair.take("first", 2 * pair.own, 2 * pair.begin)
        return Pairs(first, of_edge)


def _complete_pairs(graph: Graph) -> Pairs | None:
    """Its pairs where every edge has its opposite."""
    if not graph.num_edges:
        return Pairs(graph.senders[:0], graph.senders[:0])
    pairs = graph.prepared().pairs
    return pairs if pairs is not None and 2 * pairs.count == graph.num_edges else None


class _Gathered:
    """Where the rows of a padded batch (atoms, edges or pairs) come from.

    Attributes:
        system: ``[M]`` the system of a row; that of ghosts is the first that is not real.
        own: ``[M]`` its number within the system.
        starts: ``[S]`` first row of every system; begin: ``[M]`` that of a row's system; total: number of real rows.
    """

    def __init__(
        self, flat: dict[str, Tensor], kind: str, frames: Tensor, count: Tensor, rows: int, half: bool = False
    ) -> None:
        divide = 2 if half else 1
        counts = flat[f"number of {kind}"].index_select(0, frames) // divide
        ends = counts.cumsum(0)
        place = torch.arange(rows, device=frames.device)
        self.starts, self.total = ends - counts, ends[-1]
        self.system = torch.minimum(torch.searchsorted(ends, place, right=True), count)
        self.begin = self.starts.index_select(0, self.system)
        self.own = place - self.begin
        first = flat[f"first of {kind}"].index_select(0, frames).index_select(0, self.system) // divide
        self._ghost = self.system == count
        self._source = torch.where(self._ghost, 0, first + self.own)
        self._flat = flat

    def take(self, name: str, of_ghosts: Tensor | float, plus: Tensor | None = None) -> Tensor:
        """The rows of a tensor; with ``plus``, indices within a system become indices within the batch."""
        value = self._flat[name]
        rows = value.index_select(0, self._source) if len(value) else value.new_zeros((len(self.own), *value.shape[1:]))
        if not rows.is_floating_point():
            rows = rows.to(torch.int64)
        if plus is not None:
            rows, of_ghosts = rows + plus, of_ghosts + plus
        return torch.where(self._ghost.reshape(-1, *[1] * (rows.ndim - 1)), of_ghosts, rows)


def room_for(num_bytes: int, device: torch.device) -> bool:
    """Whether so much data may be kept on a device."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return num_bytes <= SHARE_OF_MEMORY * free
