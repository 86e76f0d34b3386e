"""What a host is: species and geometry in, energies per atom out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from steradian.graph import Graph

__all__ = ["Host", "HostOutput"]


@dataclass(frozen=True)
class HostOutput:
    """Interaction energy of every atom ``[N]`` [eV], and alpha ``[E]`` of every gated layer."""

    atom_energies: Tensor
    gates: tuple[Tensor, ...] = ()


class Host(nn.Module, ABC):
    """An equivariant network that gives every atom an energy. It never differentiates and never sees labels."""

    cutoff: float

    @abstractmethod
    def forward(self, graph: Graph, species: Tensor, positions: Tensor, vectors: Tensor) -> HostOutput:
        """Energies per atom.

        Args:
            graph: topology (senders, receivers, system), periodicity and the strained, differentiable cell; its
                positions are not used.
            species: ``[N]`` index of each atom's element in the table of elements.
            positions: ``[N, 3]`` centred positions [Å], differentiable.
            vectors: ``[E, 3]`` from receiver to sender [Å], differentiable.
        """

    def tabulate_radial(self, num_intervals: int) -> float | None:
        """Replace the radial networks by tables until :meth:`train`; the largest relative error, None if there is none.

        Hosts whose radial weights depend on the distance alone override this.
        """
        return None
