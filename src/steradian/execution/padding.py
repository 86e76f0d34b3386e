"""Graphs filled up to a few fixed sizes with ghosts, so that a step can be recorded once and used for many batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steradian.graph import Graph, Prediction
from steradian.graph.ghosts import ghost_edges, ghost_places
from steradian.graph.topology import Pairs, Topology

__all__ = ["Buckets", "Sizes", "pad_graph", "real_part"]

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
