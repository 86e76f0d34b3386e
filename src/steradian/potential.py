"""From energies per atom to energies, forces and stress: the only place that differentiates."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steradian.config import ModelConfig, PrecisionConfig
from steradian.derivatives import Geometry, Gradients, edge_vectors, stress_of
from steradian.equivariant.rotations import rotation_group
from steradian.graph import Graph, Prediction, batch_graphs
from steradian.graph.copies import copies_of
from steradian.graph.topology import Rows, Topology
from steradian.hosts.base import Host, HostOutput
from steradian.operators.base import Rotation, declares, rotation_of
from steradian.precision import PrecisionPolicy, assign, policy_of

if TYPE_CHECKING:
    from steradian.data.statistics import DatasetStatistics

__all__ = ["Potential"]

SYMBOLS_UP_TO = 118
HESSIAN_EDGES = 20_000
"""Edges of all copies of a system that rows of its Hessian are worked out with at a time."""
NO_VIRIALS = (
    "there are no virials of atoms with attention between all atoms, whose energy is not a sum over neighbours; "
    "the virial of the whole system is right"
)
PLAIN = {torch.float32: "float32", torch.float64: "float64"}
#: Edges of rotated copies that are evaluated together; more take memory and no less time.
EDGES_AT_ONCE = 100_000


class Potential(nn.Module):
    """A force field: total energies, forces -dE/dx and Cauchy stress (1/V) dE/d(strain).

    Args:
        host: gives every atom an interaction energy.
        config: the model section this potential was built from; stored with it.
        statistics: elements, reference energies of the atoms and averages of the training set; stored with it.

    Energies are in eV, forces in eV/Å, stress in eV/Å^3 (positive under tension, ASE's sign).
    """

    def __init__(self, host: Host, config: ModelConfig, statistics: DatasetStatistics) -> None:
        super().__init__()
        self.host = host
        self.config = config
        self.statistics = statistics
        self.elements: tuple[int, ...] = tuple(sorted(statistics.elements))
        species = torch.full((SYMBOLS_UP_TO + 1,), -1, dtype=torch.int64)
        species[list(self.elements)] = torch.arange(len(self.elements))
        self.species_of_number: Tensor
        self.atom_references: Tensor
        self.register_buffer("species_of_number", species, persistent=False)
        self.register_buffer("atom_references", self._reference_tensor(), persistent=False)
        self.rotations: Tensor | None
        self.register_buffer("rotations", None, persistent=False)
        self.radial_table_error: float | None = None
        self._frozen: list[nn.Parameter] = []  # by for_inference, to be trained again
        self.self_test: Any = None  # a SelfTest of a converted model, until it is trained
        self.policy: PrecisionPolicy
        self.set_precision(config.precision)

    def set_precision(self, precision: str | PrecisionConfig) -> Potential:
        """Compute in another precision from now on; weights are cast where their format is another one.

        Args:
            precision: preset (:data:`steradian.precision.POLICIES`) or section of the configuration; stored with the
                model.

        Raises:
            ValueError: an unknown preset, or a layer that the host does not have.
        """
        policy = policy_of(precision)
        assign(self.host, policy)
        self.config = self.config.model_copy(update={"precision": precision})
        self.policy = policy
        return self.to(policy.weights)

    def _reference_tensor(self) -> Tensor:
        energies = [float(self.statistics.atom_references[number]) for number in self.elements]
        return torch.tensor(energies, dtype=torch.float64)

    def _apply(self, fn: Any, recurse: bool = True) -> Potential:
        # Reference energies keep their digits whatever dtype the network is cast to.
        super()._apply(fn, recurse)
        self.atom_references = self._reference_tensor().to(self.atom_references.device)
        if self.rotations is not None:
            self.rotations = rotation_group(len(self.rotations)).to(self.atom_references.device)
        if self.dtype != self.policy.weights and self.dtype in PLAIN:  # all roles go with the weights
            self.set_precision(PLAIN[self.dtype])
        return self

    @property
    def cutoff(self) -> float:
        """Distance beyond which two atoms are not neighbours [Å]."""
        return self.host.cutoff

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights; roles may have others (:attr:`policy`)."""
        return next(self.host.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return self.atom_references.device

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def rotation(self) -> Rotation:
        """How exactly energies keep when everything turns: what the worst of the operators declares."""
        return rotation_of(self.host)

    @property
    def rotation_average(self) -> int | None:
        """Number of rotations that predictions are averaged over, or None."""
        return None if self.rotations is None else len(self.rotations)

    def average_rotations(self, count: int | None) -> Potential:
        """Predict the mean over the rotations of a group from now on, at so many times the cost; for inference.

        Energies are averaged, and forces and stress are exact derivatives of the average. It does not change under
        rotations of the group; under others it changes less the larger the group is.

        Args:
            count: 4, 12, 24 or 60, see :func:`steradian.equivariant.rotations.rotation_group`; None for no average.

        Raises:
            ValueError: another number, or a model that is exact under rotations as it is.
        """
        if count is None:
            self.rotations = None
            return self
        rotations = rotation_group(count)
        if self.rotation == "exact":
            raise ValueError(
                f"rotation_average: energies of this model do not turn with the atoms; an average over {count} "
                f"rotations would cost {count} times as much and change nothing, so leave it out"
            )
        self.rotations = rotations.to(self.device)
        return self

    def species(self, topology: Topology) -> Rows:
        """``[N]`` index into the table of elements.

        Raises:
            ValueError: an element the potential was not trained on. Not looked for in a static topology: whoever made
                it has (:meth:`check_elements`).
        """
        species = topology.species(self.elements, self.species_of_number)
        if not topology.is_static:
            try:
                species.look()  # on a GPU kernels that are asynchronous do
            except IndexError:
                assert topology.numbers is not None
                self.check_elements(topology.numbers)
                raise
        return species

    def check_elements(self, numbers: Tensor) -> None:
        """Refuse atomic numbers ``[N]`` that the potential was not trained on.

        Raises:
            ValueError: names them.
        """
        unknown = sorted(set(numbers.tolist()) - set(self.elements))
        if unknown:
            raise ValueError(
                f"the model does not know {_symbols(unknown)}; it was trained on {_symbols(self.elements)}"
            )

    def forward(self, graph: Graph, *, forces: bool = True, stress: bool = False, virials: bool = False) -> Prediction:
        """Predict a batch. In training mode the derivatives can be differentiated once more.

        Args:
            graph: systems with neighbours up to at least :attr:`cutoff`.
            forces: give forces.
            stress: give the virial and the stress (zero for systems without a cell).
            virials: give the virials of atoms too.

        Raises:
            ValueError: virials of atoms of a model with attention between all atoms, whose energy is not a sum over
                pairs of neighbours.
        """
        if virials and declares(self.host, "is_global"):
            raise ValueError(NO_VIRIALS)
        with _undisturbed(self.device.type):
            return self._predict(_outside_inference_mode(graph), forces, stress, virials)

    def _predict(self, graph: Graph, forces: bool, stress: bool, virials: bool) -> Prediction:
        # what two opposite edges share would pull at one of them alone
        topology = graph.prepared().without_pairs() if virials else graph.prepared()
        species = self.species(topology)
        policy = self.policy
        differentiated = forces or stress or virials
        with torch.set_grad_enabled(torch.is_grad_enabled() or differentiated), policy.matrix_units():
            geometry = self._geometry(graph, topology)
            if differentiated:
                for leaf in geometry:
                    leaf.requires_grad_(True)
            output, gradients = self._differentiated(graph, topology, geometry, differentiated)
        references = self.atom_references.index_select(0, species.index)
        if graph.share is not None:
            references = torch.where(graph.share.owned, references, 0.0)
        atom_energies = output.atom_energies.to(policy.energy)
        per_system = atom_energies.new_zeros((2, graph.num_systems))
        both = torch.stack([atom_energies, references.to(policy.energy)])
        interaction, reference = per_system.index_add(1, graph.system, both).to(torch.float64)
        virial = gradients.virial(topology, geometry) if gradients is not None and stress else None
        per_atom = gradients.virials(topology, geometry) if gradients is not None and virials else None
        prediction = Prediction(
            energy=interaction + reference,
            atom_energies=atom_energies + references,
            interaction_energy=interaction,
            forces=gradients.forces(topology).to(policy.forces) if gradients is not None and forces else None,
            stress=None if virial is None else stress_of(virial, geometry.cell.detach()).to(policy.forces),
            virial=virial,
            virials=None if per_atom is None else per_atom[0],
            centroid_virials=None if per_atom is None else per_atom[1],
            gates=output.gates,
        )
        return prediction if self.training else _detached(prediction)

    def _differentiated(
        self, graph: Graph, topology: Topology, geometry: Geometry, wanted: bool
    ) -> tuple[HostOutput, Gradients | None]:
        """What the host gives and, where wanted, its derivatives; of the mean over rotations where there is one."""
        parts = []
        for turns in self._turns(graph):
            output = self._output(graph, topology, geometry, turns)
            found = Gradients.of(output.atom_energies, geometry, create_graph=self.training) if wanted else None
            parts.append((output, found))
        return parts[0] if len(parts) == 1 else _sum(parts)

    def _geometry(self, graph: Graph, topology: Topology) -> Geometry:
        """Edge vectors, positions and cells in float64, tensors of their own."""
        positions = self._centred(graph)
        cell = graph.cell.detach().to(device=self.device, dtype=torch.float64, copy=True)
        return Geometry(edge_vectors(topology, positions, cell), positions, cell)

    def _turns(self, graph: Graph) -> list[Tensor | None]:
        """Rotations ``[T, 3, 3]`` in parts that are evaluated together; [None] where there is no average."""
        if self.rotations is None:
            return [None]
        return list(self.rotations.split(max(1, EDGES_AT_ONCE // max(1, graph.num_edges))))

    def _output(self, graph: Graph, topology: Topology, geometry: Geometry, turns: Tensor | None = None) -> HostOutput:
        """Interaction energies of the atoms that count; with ``turns`` ``[T, 3, 3]``, these rotations' part of the mean
        over all of them."""
        policy = self.policy
        vectors, positions, cell = geometry
        graph = replace(graph, cell=cell, topology=topology)
        if turns is not None:
            graph = copies_of(graph, len(turns))
            vectors, positions, cell = (_turned(rows, turns) for rows in geometry)
            if graph.dipoles is not None:
                copies = graph.dipoles.view(len(turns), -1, 3).to(turns)
                graph = replace(graph, dipoles=(copies @ turns.transpose(1, 2)).flatten(0, 1))
        vectors = vectors.to(policy.geometry if self.host.takes_exact_vectors else policy.weights)
        inside = replace(graph, cell=cell.to(policy.weights))
        output = self.host(inside, self.species(inside.prepared()), positions.to(policy.weights), vectors)
        if graph.share is not None:  # copies of other processes' atoms do not count
            energies = torch.where(graph.share.owned, output.atom_energies, 0.0)
            output = replace(output, atom_energies=graph.share.anchored(energies))
        if turns is None:
            return output
        assert self.rotations is not None
        share = 1.0 / len(self.rotations)
        energies, *gates = (
            share * values.unflatten(0, (len(turns), -1)).sum(0) for values in (output.atom_energies, *output.gates)
        )
        return HostOutput(energies, tuple(gates))

    def hessian(self, graph: Graph, *, chunk: int | None = None) -> Tensor:
        """Second derivatives of the energy by positions: ``[3 N, 3 N]`` [eV/Å^2], symmetric to rounding.

        Rows come from differentiating the forces once more; ``chunk`` copies of the system are evaluated side by side,
        and each gives one row at a time. Tables of radial networks are not used.

        Args:
            graph: one system.
            chunk: rows at a time, which bounds the memory; None for as many as have :data:`HESSIAN_EDGES` edges.

        Raises:
            ValueError: several systems, or no row at a time.
        """
        if graph.num_systems != 1:
            raise ValueError(f"a Hessian is that of one system, not of {graph.num_systems}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1, not {chunk}")
        size = 3 * graph.num_atoms
        chunk = max(1, min(size, chunk or HESSIAN_EDGES // max(1, graph.num_edges)))
        exact = copy.deepcopy(self).train().eval()  # train() takes tables of radial networks away
        found = self.atom_references.new_zeros((size, size))
        with _undisturbed(self.device.type), torch.enable_grad():
            copies = batch_graphs([_outside_inference_mode(graph).to(self.device)] * chunk) if size else graph
            positions, forces = exact._differentiable_forces(copies)
            for first in range(0, size, chunk):
                rows = min(chunk, size - first)
                asked = torch.zeros((chunk, size), dtype=forces.dtype, device=forces.device)
                asked[torch.arange(rows), torch.arange(first, first + rows)] = -1.0
                if forces.requires_grad:
                    (part,) = torch.autograd.grad(forces, positions, asked.view(-1, 3), retain_graph=True)
                    found[first : first + rows] = part.view(chunk, size)[:rows]
        return found

    def _differentiable_forces(self, graph: Graph) -> tuple[Tensor, Tensor]:
        """Positions ``[N, 3]`` and forces ``[N, 3]`` that can be differentiated by them."""
        topology = graph.prepared()
        with self.policy.matrix_units():
            positions, cell = self._centred(graph).requires_grad_(True), graph.cell.to(self.device, torch.float64)
            # nodes of their own: the partial derivatives are those by edge vectors and by what is seen directly
            geometry = Geometry(edge_vectors(topology, positions, cell), positions.view_as(positions), cell)
            output = self._output(graph, topology, geometry)
            gradients = Gradients.of(output.atom_energies, geometry, create_graph=True)
        return positions, gradients.forces(topology)

    def for_inference(
        self, radial_table: bool = True, num_intervals: int = 512, *, rotation_average: int | None = None
    ) -> Potential:
        """Freeze the weights and prepare what is the same in every call; :meth:`train` undoes it.

        Args:
            radial_table: interpolate the radial networks from a table. ``radial_table_error`` then holds the largest
                error of a radial weight, relative to the largest one.
            num_intervals: of the table.
            rotation_average: number of rotations to average over, see :meth:`average_rotations`; None leaves what is.

        Raises:
            ValueError: rotations that cannot be averaged over.
        """
        if rotation_average is not None:
            self.average_rotations(rotation_average)
        self._frozen += [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.eval().requires_grad_(False)
        if radial_table:
            self.radial_table_error = self.host.tabulate_radial(num_intervals)
        return self

    def train(self, mode: bool = True) -> Potential:
        """As :meth:`torch.nn.Module.train`; what :meth:`for_inference` froze can be trained again."""
        if mode:
            self.self_test = self.rotations = None
        if mode and self._frozen:
            for parameter in self._frozen:
                parameter.requires_grad_(True)
            self._frozen = []
            self.radial_table_error = None
        return super().train(mode)

    def _centred(self, graph: Graph) -> Tensor:
        """Positions in float64, a copy of its own to differentiate by.

        About the mean of each system where the network computes in fewer digits, so that those who see positions lose
        nothing far from the origin. Edges are differenced in float64 in any case: atoms that dynamics has carried many
        cells away are as near to their neighbours' images as ever.
        """
        positions = graph.positions.detach().to(device=self.device, dtype=torch.float64, copy=True)
        if self.policy.weights != torch.float64 and graph.num_atoms and graph.share is None:
            counts = graph.atoms_per_system.to(positions.dtype).clamp(min=1).unsqueeze(-1)
            sums = positions.new_zeros((graph.num_systems, 3)).index_add(0, graph.system, positions)
            positions = positions - (sums / counts).index_select(0, graph.system)
        return positions


def _turned(rows: Tensor, turns: Tensor) -> Tensor:
    """``[T * M, ..., 3]`` rows ``[M, ..., 3]`` turned by every rotation ``[T, 3, 3]``."""
    return torch.einsum("tij,m...j->tm...i", turns, rows).flatten(0, 1)


def _sum(parts: list[tuple[HostOutput, Gradients | None]]) -> tuple[HostOutput, Gradients | None]:
    """Parts of a mean, and of its derivatives, together."""
    outputs = [output for output, _ in parts]
    energies = sum(output.atom_energies for output in outputs)
    gates = tuple(sum(several) for several in zip(*(output.gates for output in outputs)))
    gradients = reduce(operator.add, (found for _, found in parts)) if parts[0][1] is not None else None
    return HostOutput(energies, gates), gradients  # type: ignore[arg-type]


@contextmanager
def _undisturbed(device_type: str) -> Iterator[None]:
    """Neither the caller's inference mode, in which nothing can be differentiated, nor autocast, which would round."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.is_autocast_enabled(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def _outside_inference_mode(graph: Graph) -> Graph:
    """The graph with tensors that autograd may keep."""
    if not graph.positions.is_inference() and not graph.senders.is_inference():
        return graph
    own: dict[str, Any] = {each.name: getattr(graph, each.name) for each in fields(graph)}
    own = {name: value.clone() for name, value in own.items() if isinstance(value, Tensor) and value.is_inference()}
    return replace(graph, topology=None, **own)


def _detached(prediction: Prediction) -> Prediction:
    def free(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach()

    return replace(
        prediction,
        energy=prediction.energy.detach(),
        atom_energies=prediction.atom_energies.detach(),
        interaction_energy=prediction.interaction_energy.detach(),
        forces=free(prediction.forces),
        stress=free(prediction.stress),
        virial=free(prediction.virial),
        virials=free(prediction.virials),
        centroid_virials=free(prediction.centroid_virials),
        gates=tuple(alpha.detach() for alpha in prediction.gates),
    )


def _symbols(numbers: tuple[int, ...] | list[int]) -> str:
    from ase.data import chemical_symbols

    known = [chemical_symbols[n] if 0 < n < len(chemical_symbols) else f"atomic number {n}" for n in numbers]
    return ", ".join(known)
