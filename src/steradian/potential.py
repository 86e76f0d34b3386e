"""From energies per atom to energies, forces and stress: the only place that differentiates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steradian.config import ModelConfig, PrecisionConfig
from steradian.equivariant.rotations import rotation_group
from steradian.graph import Graph, Prediction
from steradian.graph.copies import copies_of
from steradian.graph.topology import Rows, Topology
from steradian.hosts.base import Host, HostOutput
from steradian.operators.base import Rotation, rotation_of
from steradian.precision import PrecisionPolicy, assign, policy_of

if TYPE_CHECKING:
    from steradian.data.statistics import DatasetStatistics

__all__ = ["Potential"]

SYMBOLS_UP_TO = 118
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

    def forward(self, graph: Graph, *, forces: bool = True, stress: bool = False) -> Prediction:
        """Predict a batch. In training mode the derivatives can be differentiated once more.

        Args:
            graph: systems with neighbours up to at least :attr:`cutoff`.
            forces: give forces.
            stress: give the stress (zero for systems without a cell).
        """
        with _undisturbed(self.device.type):
            return self._predict(_outside_inference_mode(graph), forces, stress)

    def _predict(self, graph: Graph, forces: bool, stress: bool) -> Prediction:
        topology = graph.prepared()
        species = self.species(topology)
        policy = self.policy
        with torch.set_grad_enabled(torch.is_grad_enabled() or forces or stress), policy.matrix_units():
            positions = self._centred(graph).requires_grad_(forces)
            cell = graph.cell.to(device=self.device, dtype=torch.float64)
            strain = torch.zeros_like(cell).requires_grad_(stress)
            wanted = [tensor for tensor, asked in ((positions, forces), (strain, stress)) if asked]
            inside = replace(graph, cell=cell, topology=topology)
            parts = []
            for turns in self._turns(graph):
                output = self._output(inside, positions, strain if stress else None, turns)
                parts.append((output, self._gradients(output.atom_energies, wanted)))
            output, gradients = parts[0] if len(parts) == 1 else _sum(parts)
        references = self.atom_references.index_select(0, species.index)
        if graph.share is not None:
            references = torch.where(graph.share.owned, references, 0.0)
        atom_energies = output.atom_energies.to(policy.energy)
        per_system = atom_energies.new_zeros((2, graph.num_systems))
        both = torch.stack([atom_energies, references.to(policy.energy)])
        interaction, reference = per_system.index_add(1, graph.system, both).to(torch.float64)
        prediction = Prediction(
            energy=interaction + reference,
            atom_energies=atom_energies + references,
            interaction_energy=interaction,
            forces=-gradients.pop(0).to(policy.forces) if forces else None,
            stress=_stress(gradients.pop(0), cell).to(policy.forces) if stress else None,
            gates=output.gates,
        )
        return prediction if self.training else _detached(prediction)

    def _turns(self, graph: Graph) -> list[Tensor | None]:
        """Rotations ``[T, 3, 3]`` in parts that are evaluated together; [None] where there is no average."""
        if self.rotations is None:
            return [None]
        return list(self.rotations.split(max(1, EDGES_AT_ONCE // max(1, graph.num_edges))))

    def _output(self, graph: Graph, positions: Tensor, strain: Tensor | None, turns: Tensor | None) -> HostOutput:
        """What the host gives; with ``turns`` ``[T, 3, 3]``, these rotations' part of the mean over all of them."""
        policy, topology = self.policy, graph.prepared()
        strained, cell, vectors = _geometry(topology, positions, graph.cell, strain)
        if turns is not None:
            graph = copies_of(graph, len(turns))
            strained, vectors, cell = _turned(strained, turns), _turned(vectors, turns), _turned(cell, turns)
            if graph.dipoles is not None:
                copies = graph.dipoles.view(len(turns), -1, 3).to(turns)
                graph = replace(graph, dipoles=(copies @ turns.transpose(1, 2)).flatten(0, 1))
        vectors = vectors.to(policy.geometry if self.host.takes_exact_vectors else policy.weights)
        inside = replace(graph, cell=cell.to(policy.weights))
        output = self.host(inside, self.species(inside.prepared()), strained.to(policy.weights), vectors)
        if graph.share is not None:  # copies of other processes' atoms do not count
            energies = torch.where(graph.share.owned, output.atom_energies, 0.0)
            output = replace(output, atom_energies=energies)
        if turns is None:
            return output
        assert self.rotations is not None
        share = 1.0 / len(self.rotations)
        energies, *gates = (
            share * values.unflatten(0, (len(turns), -1)).sum(0) for values in (output.atom_energies, *output.gates)
        )
        return HostOutput(energies, tuple(gates))

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

    def _gradients(self, atom_energies: Tensor, wanted: list[Tensor]) -> list[Tensor]:
        if not wanted:
            return []
        if not atom_energies.requires_grad:
            return [torch.zeros_like(tensor) for tensor in wanted]
        found = torch.autograd.grad(
            atom_energies.sum(), wanted, create_graph=self.training, allow_unused=True, materialize_grads=True
        )
        return list(found)


def _geometry(
    topology: Topology, positions: Tensor, cell: Tensor, strain: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Strained positions, cell and edge vectors; the strain acts on positions and cell alike."""
    if strain is not None:
        symmetric = 0.5 * (strain + strain.transpose(1, 2))
        positions = positions + _by_system(positions, symmetric, topology.system)
        cell = cell + cell @ symmetric
    vectors = positions.index_select(0, topology.senders) - positions.index_select(0, topology.receivers)
    if topology.is_periodic:
        assert topology.shifts is not None
        system = topology.system.index_select(0, topology.receivers)
        vectors = vectors + _by_system(topology.shifts.to(vectors.dtype), cell, system)
    return positions, cell, vectors


def _turned(rows: Tensor, turns: Tensor) -> Tensor:
    """``[T * M, ..., 3]`` rows ``[M, ..., 3]`` turned by every rotation ``[T, 3, 3]``."""
    return torch.einsum("tij,m...j->tm...i", turns, rows).flatten(0, 1)


def _sum(parts: list[tuple[HostOutput, list[Tensor]]]) -> tuple[HostOutput, list[Tensor]]:
    """Parts of a mean, and of its derivatives, together."""
    outputs = [output for output, _ in parts]
    energies = sum(output.atom_energies for output in outputs)
    gates = tuple(sum(several) for several in zip(*(output.gates for output in outputs)))
    gradients = [sum(several) for several in zip(*(gradients for _, gradients in parts))]
    return HostOutput(energies, gates), gradients  # type: ignore[arg-type]


def _by_system(rows: Tensor, matrices: Tensor, system: Tensor) -> Tensor:
    """Rows ``[M, 3]`` times the matrix ``[S, 3, 3]`` of the system ``[M]`` that each belongs to."""
    if len(matrices) == 1:  # without a matrix per row, which is most of this work and of its derivative
        return rows @ matrices[0]
    return torch.einsum("mi,mij->mj", rows, matrices.index_select(0, system))


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


def _stress(strain_gradient: Tensor, cell: Tensor) -> Tensor:
    """(1/V) dE/d(strain) ``[S, 3, 3]``; zero where there is no cell."""
    volume = (cell[:, 0] * torch.linalg.cross(cell[:, 1], cell[:, 2])).sum(1).abs()
    periodic = volume > 0
    safe = torch.where(periodic, volume, torch.ones_like(volume))
    return torch.where(periodic[:, None, None], strain_gradient / safe[:, None, None], 0.0)


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
        gates=tuple(alpha.detach() for alpha in prediction.gates),
    )


def _symbols(numbers: tuple[int, ...] | list[int]) -> str:
    from ase.data import chemical_symbols

    known = [chemical_symbols[n] if 0 < n < len(chemical_symbols) else f"atomic number {n}" for n in numbers]
    return ", ".join(known)
