"""Molecular dynamics that stays on the device: no step waits for the host.

The run is cut into blocks of at most :data:`CHECK_EVERY` steps. A block is launched as a whole: its steps move
positions on the device, make the neighbour list anew every few steps without asking whether that is due, and keep on
the device how far atoms moved while a list was in use and how many places it would have needed. At its end these
numbers, the energies and, where they are to be saved, the positions travel to the host by themselves, while the next
block runs already. When they have arrived, they are looked at: if the list was too old or too short at any step of the
block, the state at its start is put back, lists are made more often or get more places, and the block is done again.
Nothing is handed out before it was looked at. So results are always those of complete lists, and since the edges that
a model sees depend on the positions alone, they do not depend on how often lists were made.

With positions in the host's memory (a CPU) nothing has to wait, and the list is checked at every step instead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from steradian.execution.backend_benchmark import prepare_backend
from steradian.execution.frame_notice import tell_of_frame
from steradian.execution.recording import record
from steradian.graph import Graph, Prediction
from steradian.graph.skin import Capacity, DeviceList, HostList, Needs
from steradian.operators.base import declares
from steradian.potential import Potential
from steradian.simulate.files import MDSettings, SimulationError, check_start
from steradian.simulate.integrators import Integrator, State

__all__ = ["CHECK_EVERY", "DeviceMD", "ForceField", "Snapshot"]

#: steps after which a block ends at the latest; a multiple of steps_at_once of the integrator never lies inside one
CHECK_EVERY = 16
#: longest time between two lists, in steps
LONGEST_USE = 256
#: lists to be made after one was too old before any is used longer again
PATIENCE = 64


class ForceField(Protocol):
    """What gives forces: a :class:`~steradian.potential.Potential`, or anything that can be called like one."""

    @property
    def cutoff(self) -> float: ...

    def __call__(self, graph: Graph, *, forces: bool = True) -> Prediction: ...


@dataclass(frozen=True)
class Snapshot:
    """The systems after a step, on the host; float64.

    Attributes:
        step: number of it.
        energy, kinetic: ``[S]`` [eV].
        positions, velocities, forces: ``[N, 3]``, in ASE's units.
    """

    step: int
    energy: np.ndarray
    kinetic: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray
    forces: np.ndarray


@dataclass
class _Block:
    start: int
    end: int
    before: tuple[Tensor, ...]
    packet: Tensor
    arrived: Any
    wanted: bool


class DeviceMD:
    """Moves one or several systems (replicas, or different ones) at once; cells stay fixed.

    Args:
        field: gives energies and forces.
        systems: positions, velocities, cells.
        settings: as of :func:`~steradian.simulate.md.run_md`; system s has the seed ``settings.seed + s``.
        device: where everything stays.
        dtype: of positions and velocities. Energies are float64 in any case.
        fixed_shapes: use lists of fixed shape; default: on a GPU.
        record: record the step (CUDA graph); default: on a GPU.
        search: of neighbours, see :func:`~steradian.graph.neighbors_device.make_search`.
        capacity: of lists of fixed shape, as a run that is resumed had it.
        list_every: steps between lists of fixed shape; None: as seldom as the motion allows.

    Raises:
        SimulationError: no systems, or one that cannot start.
        ValueError: an element the model was not trained on.
    """

    def __init__(
        self,
        field: ForceField,
        systems: Sequence[Atoms],
        settings: MDSettings,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
        fixed_shapes: bool | None = None,
        record: bool | None = None,
        search: str = "auto",
        capacity: Capacity | None = None,
        list_every: int | None = None,
    ) -> None:
        if not systems:
            raise SimulationError("no systems to simulate")
        tell_of_frame(field)
        for atoms in systems:
            check_start(atoms)
        self.field, self.systems, self.settings = field, [atoms.copy() for atoms in systems], settings
        self.device, self.dtype = torch.device(device), dtype
        on_gpu = self.device.type == "cuda"
        self.fixed_shapes = on_gpu if fixed_shapes is None else fixed_shapes
        self.record = on_gpu if record is None else record
        self._search = search
        positions = np.concatenate([atoms.get_positions() for atoms in systems])
        velocities = np.concatenate([atoms.get_velocities() for atoms in systems])
        self.state = State(positions, velocities, len(systems), self.device, dtype)
        masses = np.concatenate([atoms.get_masses() for atoms in systems])
        self.integrator = Integrator(settings, masses, [len(atoms) for atoms in systems], self.state)
        self.num_repeats = 0
        self.blocks_ahead = 2 if on_gpu else 1
        self._adapts = list_every is None
        self._ready = False
        self._every, self._since = list_every or 8, LONGEST_USE  # steps between lists, and since the last one
        self._worst, self._tried = 0.0, 0
        self.list: DeviceList | HostList
        self._recorded: tuple[Callable[[], Any], Callable[[], Any]] | None = None
        self._make_list(capacity)

    @property
    def capacity(self) -> Capacity | None:
        """Shapes of the list, where they are fixed."""
        return self.list.capacity if isinstance(self.list, DeviceList) else None

    def resume(self, step: int, velocities: np.ndarray, forces: np.ndarray, energy: Sequence[float]) -> None:
        """Go on after a step whose velocities, forces and energies are known; positions are those of the systems."""
        self.state.step.fill_(step)
        self.state.velocities.copy_(torch.as_tensor(velocities))
        self.state.forces.copy_(torch.as_tensor(forces))
        self.state.energy.copy_(torch.as_tensor(energy))
        self._ready = True

    def start(self) -> Snapshot:
        """Forces at the first positions; waits for the device."""
        while True:
            with torch.no_grad():
                self._renew()
                self._forces()
                self._since += 1
                packet = self._packet(wanted=True).cpu()
            needs = self._needs(packet)
            if needs is None or self._good(needs, 0):
                break
        self._ready = True
        return self._snapshot(0, packet)

    def run(self, first: int, last: int, wanted: Callable[[int], bool]) -> Iterator[Snapshot]:
        """Do the steps after ``first`` up to ``last``; gives a snapshot after every wanted step, in order.

        On a GPU one block runs ahead of what has been given.

        Raises:
            SimulationError: an atom was lost (a position is not a number).
        """
        if not self._ready:
            self.start()
        ends = self._ends(first, last, wanted)
        flying: deque[_Block] = deque()
        launched = 0
        while flying or launched < len(ends):
            while len(flying) < self.blocks_ahead and launched < len(ends):
                start = ends[launched - 1] if launched else first
                flying.append(self._launch(start, ends[launched], wanted(ends[launched])))
                launched += 1
            block = flying.popleft()
            if block.arrived is not None:
                block.arrived.synchronize()
            needs = self._needs(block.packet)
            if needs is None or self._good(needs, block.start):
                if block.wanted:
                    yield self._snapshot(block.end, block.packet)
                continue
            launched -= len(flying) + 1
            flying.clear()
            self._back(block)

    def _ends(self, first: int, last: int, wanted: Callable[[int], bool]) -> list[int]:
        """Last steps of the blocks; they follow from step numbers alone, so a resumed run has the same blocks."""
        random = self.integrator.steps_at_once if self.integrator.is_random else CHECK_EVERY
        return [
            step
            for step in range(first + 1, last + 1)
            if step == last or wanted(step) or step % CHECK_EVERY == 0 or step % random == 0
        ]

    def _launch(self, start: int, end: int, wanted: bool) -> _Block:
        """Hand a block to the device."""
        before = self.state.copy()
        if self.record and self._recorded is None:
            self._recorded = self._record()
        if isinstance(self.list, DeviceList):
            self.list.flags.zero_()
        first_half, second_half = self._recorded or (self.integrator.first_half, self._forces_and_kick)
        with torch.no_grad():
            for step in range(start, end):
                self.integrator.prepare(step)
                first_half()
                if self._since >= self._every:
                    self._renew()
                second_half()
                self._since += 1
            packet = self._packet(wanted)
        if self.device.type != "cuda":
            return _Block(start, end, before, packet, None, wanted)
        here = torch.empty(packet.shape, dtype=packet.dtype, pin_memory=True)
        here.copy_(packet, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return _Block(start, end, before, here, arrived, wanted)

    def _packet(self, wanted: bool) -> Tensor:
        """Flags, energies and, where wanted, the state, in one float64 tensor: one transfer."""
        state = self.state
        parts = [state.energy, self.integrator.kinetic()]
        if isinstance(self.list, DeviceList):
            parts.insert(0, self.list.flags)
        if wanted:
            parts += [state.positions, state.velocities, state.forces]
        return torch.cat([part.double().flatten() for part in parts])

    def _needs(self, packet: Tensor) -> Needs | None:
        return self.list.needs(packet[:4].tolist()) if isinstance(self.list, DeviceList) else None

    def _snapshot(self, step: int, packet: Tensor) -> Snapshot:
        values = packet.numpy()
        values = values[4:] if isinstance(self.list, DeviceList) else values
        count, atoms = len(self.systems), len(self.state.positions)
        energy, kinetic = values[:count].copy(), values[count : 2 * count].copy()
        positions, velocities, forces = values[2 * count :].reshape(3, atoms, 3).copy()
        return Snapshot(step, energy, kinetic, positions, velocities, forces)

    def _good(self, needs: Needs, step: int) -> bool:
        """Whether a stretch of steps had complete lists; where not, what is to change has been changed."""
        assert isinstance(self.list, DeviceList)
        if not needs.fit(self.list.capacity):
            self._make_list(needs.grown(self.list.capacity))
            return False
        if self.list.still_valid(needs):
            self._adapt(needs.moved)
            return True
        if self._every == 1:
            raise SimulationError(
                f"the simulation broke down within {CHECK_EVERY} steps of step {step} (an atom was lost): use a "
                "shorter time step, relax the structure first, or train on structures like these"
            )
        self._every = max(1, self._every // 2)
        self._worst, self._tried = 0.0, self.list.num_lists + PATIENCE
        return False

    def _adapt(self, moved: float) -> None:
        """Make lists as seldom as the way of the fastest atom allows, looked at over three of them."""
        assert isinstance(self.list, DeviceList)
        self._worst = max(self._worst, moved)
        if not self._adapts or self.list.num_lists < self._tried + 3:
            return
        allowed = 0.75 * 0.5 * self.list.skin / max(self._worst, 1e-6)
        self._every = int(min(max(1, self._every * min(allowed, 2.0)), LONGEST_USE))
        self._worst, self._tried = 0.0, self.list.num_lists

    def _back(self, block: _Block) -> None:
        """Put the state back to the start of a block."""
        self.state.restore(block.before)
        self._since = LONGEST_USE
        self.num_repeats += 1

    def _make_list(self, capacity: Capacity | None) -> None:
        systems, cutoff, skin = self.systems, self.field.cutoff, self.settings.skin
        if self.fixed_shapes:
            self.list = DeviceList(
                systems, cutoff, skin, device=self.device, dtype=self.dtype, search=self._search, capacity=capacity
            )
            with torch.no_grad():  # edges as they are in use, for kernels that are chosen by measuring
                self.list.build(self.state.positions)
                self._predict = self._prediction_of(self.list.refresh(self.state.positions))
        else:
            self.list = HostList(systems, cutoff, skin)
        self._since, self._tried = LONGEST_USE, 0
        self._recorded = None

    def _prediction_of(self, graph: Graph) -> Callable[[], Prediction]:
        """A call of the model on the graph whose tensors change in place."""
        field = self.field
        if isinstance(field, Potential):
            field.check_elements(torch.as_tensor(np.concatenate([atoms.numbers for atoms in self.systems])))
            prepare_backend(field, graph)
            if declares(field, "asks_for_the_lattice") and graph.is_periodic:
                self.record = False
        return lambda: field(graph, forces=True)

    def _renew(self) -> None:
        if isinstance(self.list, DeviceList):
            self.list.build(self.state.positions)
        self._since = 0

    def _record(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Both halves of a step, recorded; the list has to be there for that."""
        with torch.no_grad():
            self._renew()
            first, second = (
                record(half, device=self.device, what="a step of molecular dynamics", state=self.state.tensors)
                for half in (self.integrator.first_half, self._forces_and_kick)
            )
        self._since = LONGEST_USE
        return first, second

    def _forces(self) -> None:
        """Forces and energies at the present positions, into the state."""
        state = self.state
        if isinstance(self.list, DeviceList):
            self.list.refresh(state.positions)
            prediction = self._predict()
        else:
            prediction = self.field(self.list.refresh(state.positions), forces=True)
        assert prediction.forces is not None
        state.forces.copy_(prediction.forces[: len(state.forces)])
        state.energy.copy_(prediction.energy[: len(state.energy)])

    def _forces_and_kick(self) -> None:
        self._forces()
        self.integrator.second_half()
