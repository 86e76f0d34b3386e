"""Atoms, edges and batches: what every host, operator and reader exchanges.

Legend of dimension letters, used in every docstring of the package:

====  =======================================================================
N     atoms of all systems of a batch
E     directed edges (neighbour pairs), both directions listed
S     systems (molecules or cells) of a batch
D     components of an irreps list in order: ``0e + 1o`` has D = 4
C     channels, the same number for every irrep; last and contiguous
K     points of a grid on the unit sphere
R     radial basis functions
P     coupling paths of a tensor product, or weights per path
====  =======================================================================

Units inside the package are eV, Å, amu and fs. An edge points from the receiver i (the atom whose environment is
described) to the sender j (the neighbour that sends the message): ``vectors = x[j] + shift - x[i]``. Edges are sorted
by receiver.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from steradian.graph.share import Share
from steradian.graph.topology import OnTopology, Pairs, Topology

__all__ = ["Edges", "Graph", "Prediction", "batch_graphs"]


@dataclass(frozen=True)
class Graph:
    """One or several systems with their neighbour lists and, where known, their labels.

    Attributes:
        positions: ``[N, 3]`` positions [Å].
        numbers: ``[N]`` atomic numbers, int64.
        system: ``[N]`` index of the system an atom belongs to, ascending.
        senders: ``[E]`` index j of the neighbour.
        receivers: ``[E]`` index i of the centre, ascending.
        shifts: ``[E, 3]`` whole cell vectors to add to the neighbour's position, in units of the cell vectors.
        cell: ``[S, 3, 3]`` lattice vectors as rows [Å]; zeros where a system is not periodic.
        pbc: ``[S, 3]`` periodicity along each lattice vector.
        num_systems: S, stored so that a system without atoms or a batch on a GPU needs no synchronisation.
        energy: ``[S]`` total energies [eV], float64, or None.
        forces: ``[N, 3]`` forces [eV/Å] or None.
        stress: ``[S, 3, 3]`` Cauchy stress [eV/Å^3], positive under tension (ASE's sign), or None.
        weight: ``[S]`` weight of a system in the loss, or None for ones.
        dipoles: ``[N, 3]`` atomic dipoles, for models that embed them, or None.
        share: where the graph is one process's part of a system, the atoms it answers for; positions are centred.
        config_type: one label per system, for tables of errors per configuration type.
        topology: what was prepared for these tensors; see :meth:`prepared`.
    """

    positions: Tensor
    numbers: Tensor
    system: Tensor
    senders: Tensor
    receivers: Tensor
    shifts: Tensor
    cell: Tensor
    pbc: Tensor
    num_systems: int
    energy: Tensor | None = None
    forces: Tensor | None = None
    stress: Tensor | None = None
    weight: Tensor | None = None
    dipoles: Tensor | None = None
    share: Share | None = None
    config_type: tuple[str, ...] = ()
    topology: Topology | None = field(default=None, repr=False, compare=False)

    def prepared(self) -> Topology:
        """The topology of the tensors as they are now: the one at hand if nothing has changed, else a new one."""
        if self.topology is None or not self.topology.holds_for(self._listed()):
            # a static one says that its owner changed the tensors and did not refresh it: what it knows may be wrong
            known = Topology(
                self.senders,
                self.receivers,
                self.num_atoms,
                numbers=self.numbers,
                system=self.system,
                num_systems=self.num_systems,
                shifts=self.shifts,
                pbc=self.pbc,
            )
            object.__setattr__(self, "topology", known)  # a note of what follows from the fields, not a field
        assert self.topology is not None
        return self.topology

    @property
    def is_periodic(self) -> bool:
        """Whether any system is periodic."""
        return self.prepared().is_periodic

    @property
    def real(self) -> Tensor | None:
        """``[S]`` bool, False for systems that only fill up a bucket; None where there are none."""
        return None if self.topology is None else self.topology.real

    @property
    def num_atoms(self) -> int:
        return self.positions.shape[0]

    @property
    def num_edges(self) -> int:
        return self.senders.shape[0]

    @property
    def atoms_per_system(self) -> Tensor:
        """``[S]`` number of atoms of each system, int64."""
        # not bincount, which waits for a GPU
        return self.system.new_zeros(self.num_systems).index_add(0, self.system, torch.ones_like(self.system))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Graph:
        """Move to a device and cast the floating-point inputs; energies stay float64 (totals need the digits)."""
        moved = self.mapped(lambda tensor: tensor.to(device=device))
        if dtype is None:
            return moved
        changes: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(moved, each.name)
            if isinstance(value, Tensor) and value.is_floating_point() and each.name != "energy":
                changes[each.name] = value.to(dtype)
        return replace(moved, **changes)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Graph:
        """The same graph with every tensor changed to one of the same numbers (a copy, on another device, pinned); what
        was prepared comes along."""
        own: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        own = {name: change(value) for name, value in own.items() if isinstance(value, Tensor)}
        changed = replace(self, **own)
        known = self.topology
        if known is None or changed.senders is self.senders or not known.holds_for(self._listed()):
            return changed
        pairs = None if known.pairs is None else Pairs(change(known.pairs.first), change(known.pairs.of_edge))
        real = None if known.real is None else change(known.real)
        return replace(changed, topology=known.of_copies(*changed._listed(), pairs=pairs, real=real))

    def _listed(self) -> tuple[Tensor, ...]:
        """What a topology is made of."""
        return self.numbers, self.system, self.senders, self.receivers, self.shifts, self.pbc


@dataclass(frozen=True)
class Edges(OnTopology):
    """The geometry of a graph's edges as a host and its operators see it; differentiable.

    Attributes:
        topology: which atoms they connect, and what is prepared for them.
        vectors: ``[E, 3]`` from receiver to sender [Å].
        lengths: ``[E]`` their norms [Å].
        radial: ``[E, R]`` radial basis times envelope.
        envelope: ``[E]`` smooth cutoff, 1 at zero distance and 0 (with zero slope) at the cutoff.
        harmonics: ``[E, (l_max + 1)^2]`` real spherical harmonics of the direction, "component" normalisation
            (squares of a degree sum to 2 l + 1), degrees in order.
        cell: ``[S, 3, 3]`` lattice vectors as rows [Å], strained and differentiable, or None where nothing is periodic.
        share: as in :class:`Graph`.
        radial_of_pairs: ``[Q, R]`` the radial basis of pairs, where it was computed for them first.
    """

    topology: Topology
    vectors: Tensor
    lengths: Tensor
    radial: Tensor
    envelope: Tensor
    harmonics: Tensor
    cell: Tensor | None = None
    share: Share | None = None
    radial_of_pairs: Tensor | None = None

    @property
    def pbc(self) -> Tensor | None:
        """``[S, 3]`` periodicity, or None where nothing is periodic."""
        return self.topology.pbc if self.topology.is_periodic else None

    @property
    def pairs(self) -> Pairs | None:
        """Opposite edges, or None where they are not known."""
        return self.topology.pairs

    @cached_property
    def pair_radial(self) -> Tensor:
        """``[Q, R]`` the radial basis of one edge of each pair; ``[E, R]`` where pairs are not known."""
        if self.pairs is None:
            return self.radial
        return self.radial.index_select(0, self.pairs.first) if self.radial_of_pairs is None else self.radial_of_pairs

    @cached_property
    def pair_lengths(self) -> Tensor:
        """``[Q]`` lengths of pairs [Å], or ``[E]`` as for :attr:`pair_radial`."""
        return self.lengths if self.pairs is None else self.lengths.index_select(0, self.pairs.first)

    def sum_at_receivers(self, values: Tensor) -> Tensor:
        """Sum per-edge values ``[E, ...]`` at their receivers: ``[N, ...]``."""
        out = values.new_zeros((self.num_atoms, *values.shape[1:]))
        return out.index_add(0, self.receivers, values)


@dataclass(frozen=True)
class Prediction:
    """What a potential returns. Units eV, eV/Å, eV/Å^3; sign of the stress as in ASE (positive under tension).

    Attributes:
        energy: ``[S]`` total energies, float64, reference energies of the atoms included.
        atom_energies: ``[N]`` their per-atom parts, float64.
        interaction_energy: ``[S]`` total minus the reference energies of the atoms, float64.
        forces: ``[N, 3]`` or None.
        stress: ``[S, 3, 3]`` or None; zero for systems without a cell.
        virial: ``[S, 3, 3]`` [eV] or None, minus the derivative by the strain: -V times the stress, without a cell too.
        virials: ``[N, 3, 3]`` [eV] or None, ``r_a f_b`` of the edges of every atom, half of each for both its ends;
            their sum is the virial.
        centroid_virials: the same, all of an edge for its sender, as a heat current needs it.
        gates: one tensor of edge weights alpha per gated layer, ``[E]``, ``[E, H]`` or
            ``[E, P, H]`` (empty where no gate is in use).
    """

    energy: Tensor
    atom_energies: Tensor
    interaction_energy: Tensor
    forces: Tensor | None = None
    stress: Tensor | None = None
    virial: Tensor | None = None
    virials: Tensor | None = None
    centroid_virials: Tensor | None = None
    gates: tuple[Tensor, ...] = ()


def batch_graphs(graphs: Sequence[Graph]) -> Graph:
    """Put several graphs into one; atoms, edges and systems keep their order. Nothing that a graph holds is lost.

    Raises:
        ValueError: for an empty list, where a label is present in some graphs and missing in others, or for parts of
            systems that are spread over processes.
    """
    if not graphs:
        raise ValueError("cannot make a batch of no graphs")
    if len(graphs) == 1:
        return graphs[0]
    if any(graph.share is not None for graph in graphs):
        raise ValueError("a part of a system that is spread over processes cannot be put into a batch")
    atom_offsets = [0]
    system_offsets = [0]
    for graph in graphs:
        atom_offsets.append(atom_offsets[-1] + graph.num_atoms)
        system_offsets.append(system_offsets[-1] + graph.num_systems)

    def joined(name: str, offsets: list[int] | None = None) -> Tensor:
        values = [getattr(graph, name) for graph in graphs]
        if offsets is not None:
            values = [value + offset for value, offset in zip(values, offsets)]
        return torch.cat(values)

    def joined_label(name: str) -> Tensor | None:
        present = [getattr(graph, name) is not None for graph in graphs]
        if not any(present):
            return None
        if not all(present):
            raise ValueError(
                f"{name} is known for {sum(present)} of {len(graphs)} systems of a batch: label all or none"
            )
        return joined(name)

    def weights() -> Tensor | None:
        given = [graph.weight for graph in graphs]
        if all(weight is None for weight in given):
            return None
        ones = [graph.positions.new_ones(graph.num_systems) for graph in graphs]
        return torch.cat([one if weight is None else weight for weight, one in zip(given, ones)])

    labels = [graph.config_type or ("",) * graph.num_systems for graph in graphs]
    return Graph(
        positions=joined("positions"),
        numbers=joined("numbers"),
        system=joined("system", system_offsets),
        senders=joined("senders", atom_offsets),
        receivers=joined("receivers", atom_offsets),
        shifts=joined("shifts"),
        cell=joined("cell"),
        pbc=joined("pbc"),
        num_systems=system_offsets[-1],
        energy=joined_label("energy"),
        forces=joined_label("forces"),
        stress=joined_label("stress"),
        weight=weights(),
        dipoles=joined_label("dipoles"),
        config_type=tuple(kind for each in labels for kind in each) if any(map(any, labels)) else (),
    )
