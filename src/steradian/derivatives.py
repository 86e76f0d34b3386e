"""Derivatives of an energy by edge vectors, once, and all that follows from them: forces, virials, stress."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from steradian.graph.topology import Topology

__all__ = ["Geometry", "Gradients", "edge_vectors", "stress_of"]


class Geometry(NamedTuple):
    """What a host sees of positions and cells, taken as independent of each other.

    Attributes:
        vectors: ``[E, 3]`` from receiver to sender [Å].
        positions: ``[N, 3]`` [Å].
        cell: ``[S, 3, 3]`` [Å].
    """

    vectors: Tensor
    positions: Tensor
    cell: Tensor


class Gradients(NamedTuple):
    """Derivatives of the energy by a :class:`Geometry`; None where the host does not look.

    Most hosts see edge vectors alone. Then everything follows from the pull ``-dE/dr_ij`` of every edge: a force on its
    sender, the opposite one on its receiver, and a virial ``r_ij (-dE/dr_ij)``.
    """

    vectors: Tensor
    positions: Tensor | None
    cell: Tensor | None

    @classmethod
    def of(cls, energies: Tensor, geometry: Geometry, *, create_graph: bool) -> Gradients:
        """Of the sum of energies ``[N]``."""
        given = [tensor for tensor in geometry if tensor.requires_grad]
        found: list[Tensor | None] = [None] * len(given)
        if energies.requires_grad:
            found = list(torch.autograd.grad(energies.sum(), given, create_graph=create_graph, allow_unused=True))
        vectors, positions, cell = (*found, None)[:3]
        return cls(torch.zeros_like(geometry.vectors) if vectors is None else vectors, positions, cell)

    def __add__(self, other: Gradients) -> Gradients:  # type: ignore[override]
        """Of a sum of energies."""
        both = (one if two is None else two if one is None else one + two for one, two in zip(self, other))
        return Gradients(*both)  # type: ignore[arg-type]

    def forces(self, topology: Topology) -> Tensor:
        """``[N, 3]`` [eV/Å]."""
        none = self.vectors.new_zeros((topology.num_atoms, 3))
        pulled = none.index_add(0, topology.receivers, self.vectors)
        forces = pulled - none.index_add(0, topology.senders, self.vectors)
        return forces if self.positions is None else forces - self.positions

    def virial(self, topology: Topology, geometry: Geometry) -> Tensor:
        """``[S, 3, 3]`` [eV], minus the derivative by a symmetric strain of positions and cell."""
        size = topology.num_systems
        found = geometry.cell.new_zeros((size, 3, 3))
        rows = ((geometry.vectors, self.vectors, topology.receivers), (geometry.positions, self.positions, None))
        for places, gradient, atom in rows:
            if gradient is None:
                continue
            if size == 1:
                found = found - (places.detach().T @ gradient).unsqueeze(0)
                continue
            system = topology.system if atom is None else topology.system.index_select(0, atom)
            found = found.index_add(0, system, -_outer(places, gradient))
        if self.cell is not None:
            found = found - geometry.cell.detach().transpose(1, 2) @ self.cell
        return 0.5 * (found + found.transpose(1, 2))

    def virials(self, topology: Topology, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """``[N, 3, 3]`` [eV] twice: half of every edge's virial for both its ends, and all of it for its sender."""
        of_edges = -_outer(geometry.vectors, self.vectors)
        none = of_edges.new_zeros((topology.num_atoms, 3, 3))
        at_senders = none.index_add(0, topology.senders, of_edges)
        return 0.5 * (none.index_add(0, topology.receivers, of_edges) + at_senders), at_senders


def _outer(places: Tensor, gradients: Tensor) -> Tensor:
    return places.detach().unsqueeze(2) * gradients.unsqueeze(1)


def edge_vectors(topology: Topology, positions: Tensor, cell: Tensor) -> Tensor:
    """``[E, 3]`` from receivers to senders [Å]."""
    vectors = positions.index_select(0, topology.senders) - positions.index_select(0, topology.receivers)
    if topology.is_periodic:
        assert topology.shifts is not None
        system = topology.system.index_select(0, topology.receivers)
        vectors = vectors + _by_system(topology.shifts.to(vectors.dtype), cell, system)
    return vectors


def _by_system(rows: Tensor, matrices: Tensor, system: Tensor) -> Tensor:
    """Rows ``[M, 3]`` times the matrix ``[S, 3, 3]`` of the system ``[M]`` that each belongs to."""
    if len(matrices) == 1:  # without a matrix per row, which is most of this work and of its derivative
        return rows @ matrices[0]
    return torch.einsum("mi,mij->mj", rows, matrices.index_select(0, system))


def stress_of(virial: Tensor, cell: Tensor) -> Tensor:
    """-virial / V ``[S, 3, 3]``; zero where there is no cell."""
    volume = (cell[:, 0] * torch.linalg.cross(cell[:, 1], cell[:, 2])).sum(1).abs()
    periodic = volume > 0
    safe = torch.where(periodic, volume, torch.ones_like(volume))
    return torch.where(periodic[:, None, None], -virial / safe[:, None, None], 0.0)
