"""Graphs filled up to a few fixed sizes, so that a step can be recorded or compiled once and used for many batches.

What is added are *ghosts*: atoms of one system of their own, behind the real ones. They stand at two places, farther
apart than the cutoff, and all added edges run from one place to the other. So the envelope of an added edge is exactly
zero, and with it its message and all its derivatives; real atoms have no edge to a ghost. Receivers stay in ascending
order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steradian.graph import Graph, Prediction
from steradian.graph.pairs import Pairs

__all__ = ["Buckets", "Sizes", "ghost_edges", "ghost_partner", "pad_graph", "real_part"]

GHOSTS = 2
"""The smallest number of ghosts: an edge needs two ends."""
APART = 1.5
"""Distance of the two places of ghosts, in cutoffs."""


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


def ghost_partner(index: Tensor, count: Tensor | int) -> Tensor:
    """For ghosts numbered from zero the one at the other place: 0 and 1 face each other, 2 and 3, ...

    An odd last one faces the one before it.
    """
    partner = index + 1 - 2 * (index % 2)
    return torch.where(partner < count, partner, index - 1)


def ghost_edges(
    num_atoms: int, sizes: Sizes, *, num_edges: int = 0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Senders and receivers of the edges that fill up a list of neighbours.

    Args:
        num_atoms: real atoms; all others are ghosts.
        sizes: of the padded graph.
        num_edges: real edges. The default 0 gives a template of full length, for lists whose length changes on the
            device: ``torch.where(place < length, listed, template)``.

    Returns:
        Two tensors ``[sizes.edges - num_edges]``, int64; receivers ascend.
    """
    ghosts, missing = sizes.atoms - num_atoms, sizes.edges - num_edges
    own = torch.arange(missing, device=device) * ghosts // max(1, missing)
    return num_atoms + ghost_partner(own, ghosts), num_atoms + own


def pad_graph(graph: Graph, sizes: Sizes, *, number: int, cutoff: float) -> Graph:
    """The graph filled up with ghosts.

    Labels of ghosts are zero, and ``real`` tells the systems apart; losses leave ghosts out.

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
    if graph.real is not None or graph.share is not None:
        raise ValueError("a graph that is padded or spread over processes cannot be padded")
    ghosts, missing, systems = sizes.atoms - have.atoms, sizes.edges - have.edges, sizes.systems - have.systems
    positions = graph.positions.new_zeros((ghosts, 3))
    positions[1::2, 0] = APART * cutoff
    senders, receivers = ghost_edges(have.atoms, sizes, num_edges=have.edges, device=graph.senders.device)

    def longer(value: Any, count: int, fill: float = 0) -> Any:
        if value is None:
            return None
        return torch.cat([value, value.new_full((count, *value.shape[1:]), fill)])

    known = torch.ones(have.systems, dtype=torch.bool, device=graph.system.device)
    return replace(
        graph,
        positions=torch.cat([graph.positions, positions]),
        numbers=longer(graph.numbers, ghosts, number),
        system=longer(graph.system, ghosts, have.systems),
        senders=torch.cat([graph.senders, senders]),
        receivers=torch.cat([graph.receivers, receivers]),
        shifts=longer(graph.shifts, missing),
        cell=longer(graph.cell, systems),
        pbc=longer(graph.pbc, systems),
        num_systems=sizes.systems,
        energy=longer(graph.energy, systems),
        forces=longer(graph.forces, ghosts),
        stress=longer(graph.stress, systems),
        weight=longer(graph.weight, systems),
        dipoles=longer(graph.dipoles, ghosts),
        pairs=_padded_pairs(graph, missing),
        real=longer(known, systems),
        composition=_with_ghosts(graph.composition, number, ghosts),
        layout=None if graph.layout is None else (*graph.layout, ghosts, *(0,) * (systems - 1)),
        config_type=graph.config_type + ("",) * systems if graph.config_type else (),
    )


def _padded_pairs(graph: Graph, missing: int) -> Pairs | None:
    """Added edges have one length, so any two of them may share what depends on it."""
    if graph.pairs is None or missing % 2 or 2 * len(graph.pairs.first) != graph.num_edges:
        return None
    added = torch.arange(missing, device=graph.senders.device)
    first = torch.cat([graph.pairs.first, graph.num_edges + added[::2]])
    return Pairs(first, torch.cat([graph.pairs.of_edge, graph.num_edges // 2 + added // 2]))


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
