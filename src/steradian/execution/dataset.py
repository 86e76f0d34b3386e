"""A data set as flat tensors on a device, and padded batches gathered from it without a loop over frames.

A batch is named by the indices of its frames alone. Everything else (which atoms, which edges, the ghosts that fill up
the bucket) is worked out on the device from them, in operations of fixed shape, so that gathering is part of a recorded
step and a training step copies a few indices to the device and nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steradian.execution.padding import Sizes
from steradian.graph import Graph
from steradian.graph.ghosts import ghost_edges, ghost_places
from steradian.graph.topology import Pairs, Topology

__all__ = ["DeviceData", "room_for"]

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
        number, cutoff: of the ghosts, as for :func:`~steradian.execution.padding.pad_graph`.
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
