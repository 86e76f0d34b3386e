"""What a host is: species and geometry in, energies per atom out."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steradian.equivariant.harmonics import spherical_harmonics, unit_vectors
from steradian.graph import Edges, Graph
from steradian.graph.topology import Rows
from steradian.radial import RadialBasis, polynomial_envelope, safe_norm

__all__ = ["ConvolutionHost", "Host", "HostOutput", "TrainingFacts", "message_divisor"]


@dataclass(frozen=True)
class TrainingFacts:
    """What a host is told of the training set.

    Attributes:
        elements: atomic numbers, ascending: the order of the species.
        avg_num_neighbors: edges per atom.
        scale: [eV] factor on the interaction energies (root mean square force).
        shift: [eV] added to every atom's interaction energy. Energies of isolated atoms are not in it: the potential
            adds them.
    """

    elements: tuple[int, ...]
    avg_num_neighbors: float
    scale: float = 1.0
    shift: float = 0.0

    @property
    def num_elements(self) -> int:
        """Z, the size of the table of elements."""
        return len(self.elements)


@dataclass(frozen=True)
class HostOutput:
    """Interaction energy of every atom ``[N]`` [eV], and alpha ``[E]`` or ``[E, H]`` of every gated layer."""

    atom_energies: Tensor
    gates: tuple[Tensor, ...] = ()


def message_divisor(scale: str | float, avg_num_neighbors: float) -> float:
    """What a ``message_scale`` divides the sum over neighbours by (``learned`` starts from the root).

    Messages of N neighbours that are independent add up to N times the variance of one, so it is the root that keeps
    the variance; the mean, as published for MACE, leaves 1 / N of it.
    """
    if isinstance(scale, float | int):
        return float(scale)
    return avg_num_neighbors if scale == "mean" else avg_num_neighbors**0.5


class Host(nn.Module, ABC):
    """An equivariant network that gives every atom an energy. It never differentiates and never sees labels.

    The layers stand in ``layers``, each with its slots ``gate`` and ``mixer`` (None where empty).
    """

    cutoff: float
    scale: Tensor
    shift: Tensor
    #: Whether vectors may come in a wider format than that of the features.
    takes_exact_vectors = False

    @property
    def reach(self) -> float:
        """Distance [Å] beyond which an atom tells another one nothing through neighbours: a cutoff per layer, and more
        where a gate looks beyond the two atoms of a message."""
        layers = self.get_submodule("layers").children()
        return self.cutoff * sum(1 + getattr(layer.gate, "further_reach", 0) for layer in layers)

    @abstractmethod
    def forward(self, graph: Graph, species: Rows, positions: Tensor, vectors: Tensor) -> HostOutput:
        """Energies per atom.

        Args:
            graph: its topology (senders, receivers, systems, periodicity) and the strained, differentiable cell; its
                positions are not used.
            species: ``[N]`` index of each atom's element in the table of elements, prepared.
            positions: ``[N, 3]`` centred positions [Å], differentiable.
            vectors: ``[E, 3]`` from receiver to sender [Å], differentiable.
        """

    def place_scale(self, facts: TrainingFacts) -> None:
        """Buffers ``scale`` and ``shift``, with all digits whatever the format of the weights."""
        self.register_buffer("scale", torch.tensor(float(facts.scale), dtype=torch.float64))
        self.register_buffer("shift", torch.tensor(float(facts.shift), dtype=torch.float64))

    def tabulate_radial(self, num_intervals: int) -> float | None:
        """Replace the radial networks by tables until :meth:`torch.nn.Module.train`; the largest relative error, None
        if there is none.

        Hosts whose radial weights depend on the distance alone override this.
        """
        return None


class ConvolutionHost(Host):
    """A host whose messages are products of features, harmonics and the weights of a ``radial_network`` per layer.

    Attributes:
        radial_basis, envelope_p: basis functions of the distance, and the order of the polynomial that cuts them off.
        radial_scale: constant factor on the basis.
        l_max: highest degree of the harmonics.
    """

    radial_basis: RadialBasis
    envelope_p: int
    l_max: int
    radial_scale: float = 1.0
    takes_exact_vectors = True
    #: Format of the harmonics (role ``harmonics`` of :mod:`steradian.precision`); None: that of the features.
    harmonics_dtype: torch.dtype | None = None

    def radial(self, lengths: Tensor) -> Tensor:
        """Radial basis times envelope ``[E, R]``."""
        return self._radial(lengths, polynomial_envelope(lengths, self.cutoff, self.envelope_p))

    def _radial(self, lengths: Tensor, envelope: Tensor) -> Tensor:
        if self.radial_scale != 1.0:
            envelope = self.radial_scale * envelope
        return self.radial_basis(lengths) * envelope.unsqueeze(-1)

    def tabulate_radial(self, num_intervals: int) -> float | None:
        exact = copy.deepcopy(self).double()
        return max(
            layer.radial_network.tabulate(exact.radial, self.cutoff, num_intervals)  # type: ignore[operator, union-attr]
            for layer in self.get_submodule("layers").children()
        )

    def edges(self, graph: Graph, vectors: Tensor, transform: Callable[[Tensor], Tensor] | None = None) -> Edges:
        """Lengths, radial basis (of transformed lengths), envelope and harmonics of the edges, in the weights' format.

        Lengths and radial basis are worked out in the format of the vectors, harmonics in that of their role.
        """
        dtype = next(self.parameters()).dtype
        lengths = safe_norm(vectors)
        envelope = polynomial_envelope(lengths, self.cutoff, self.envelope_p)
        topology = graph.prepared()
        pairs, of_pairs = topology.pairs, None
        if pairs is None or transform is not None:
            radial = self._radial(lengths if transform is None else transform(lengths), envelope)
        else:
            of_pairs = self._radial(lengths.index_select(0, pairs.first), envelope.index_select(0, pairs.first))
            radial = of_pairs.index_select(0, pairs.of_edge)
        return Edges(
            topology=topology,
            vectors=vectors.to(dtype),
            lengths=lengths.to(dtype),
            radial=radial.to(dtype),
            envelope=envelope.to(dtype),
            harmonics=spherical_harmonics(
                unit_vectors(vectors, lengths).to(self.harmonics_dtype or dtype), self.l_max
            ).to(dtype),
            cell=graph.cell,
            share=graph.share,
            radial_of_pairs=None if of_pairs is None else of_pairs.to(dtype),
        )
