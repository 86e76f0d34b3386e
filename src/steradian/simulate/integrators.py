"""Equations of motion on tensors: one step is two calls around the forces, in place, without questions to the device.

Units are ASE's: eV, Å, amu, and the time that follows from them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from ase import units
from torch import Tensor

from steradian.simulate.files import MDSettings

__all__ = ["Integrator", "State", "kinetic_energy"]

#: random numbers kept ready: steps, and numbers in all
STEPS_AT_ONCE, NUMBERS_AT_ONCE = 64, 1 << 24


class State:
    """Positions [Å], velocities, forces [eV/Å] ``[N, 3]`` and energies ``[S]`` [eV, float64] of some systems.

    The tensors live as long as the state and are changed in place. ``step`` counts steps, on the device.
    """

    def __init__(
        self, positions: np.ndarray, velocities: np.ndarray, num_systems: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.positions = torch.tensor(positions, device=device, dtype=dtype)
        self.velocities = torch.tensor(velocities, device=device, dtype=dtype)
        self.forces = torch.zeros_like(self.positions)
        self.energy = torch.zeros(num_systems, device=device, dtype=torch.float64)
        self.step = torch.zeros((), device=device, dtype=torch.int64)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.positions, self.velocities, self.forces, self.energy, self.step

    def copy(self) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in self.tensors)

    def restore(self, copy: Sequence[Tensor]) -> None:
        for tensor, value in zip(self.tensors, copy):
            tensor.copy_(value)


def kinetic_energy(velocities: Tensor, masses: Tensor, system: Tensor, num_systems: int) -> Tensor:
    """``[S]`` kinetic energies [eV], float64."""
    of_atoms = 0.5 * masses.double().squeeze(1) * velocities.double().square().sum(1)
    return of_atoms.new_zeros(num_systems).index_add(0, system, of_atoms)


class Integrator:
    """Velocity Verlet, alone (``nve``) or with a thermostat.

    * ``langevin``: the splitting B A O A B of Leimkuhler and Matthews (2013), with one set of forces per step; averages
      over positions are right to fourth order in the time step for a harmonic well.
    * ``bussi``: velocities of a system are scaled at the end of a step by a random factor, so that its kinetic energy
      is distributed canonically (Bussi, Donadio, Parrinello 2007, equation A7); the relaxation time is 1 / friction.

    Random numbers of step n of system s follow from ``settings.seed + s`` and n alone: a run can go on from any step,
    and a system of a batch moves as it would alone with that seed.

    Args:
        settings: ensemble, temperature, timestep, friction and seed.
        masses: ``[N]`` [amu].
        sizes: number of atoms of every system.
        state: what is moved.
    """

    def __init__(self, settings: MDSettings, masses: np.ndarray, sizes: Sequence[int], state: State) -> None:
        self.state, self.ensemble, self.seed, self.sizes = state, settings.ensemble, settings.seed, tuple(sizes)
        device, dtype = state.positions.device, state.positions.dtype
        self.timestep = settings.timestep * units.fs
        self.masses = torch.tensor(masses, device=device, dtype=dtype).unsqueeze(1)
        self.half_kick = 0.5 * self.timestep / self.masses
        self.system = torch.repeat_interleave(
            torch.arange(len(self.sizes), device=device), torch.tensor(self.sizes, device=device)
        )
        starts = np.cumsum([0, *self.sizes])[:-1]
        self.first = torch.tensor(starts, device=device)  # atom of every system
        self.thermal_energy = units.kB * settings.temperature
        self.decay = math.exp(-settings.friction / (1000 * units.fs) * self.timestep)
        self.spread = (self.thermal_energy * (1.0 - self.decay**2) / self.masses).sqrt()
        self.steps_at_once = STEPS_AT_ONCE
        while self.steps_at_once > 1 and self.steps_at_once * self.masses.numel() * 3 > NUMBERS_AT_ONCE:
            self.steps_at_once //= 2
        self.random = self.masses.new_zeros((self.steps_at_once, self.masses.numel(), 3)) if self.is_random else None
        self._filled = -1

    @property
    def is_random(self) -> bool:
        return self.ensemble != "nve"

    def prepare(self, step: int) -> None:
        """Have the random numbers ready for this step and those after it up to the next multiple of steps_at_once."""
        piece = step // self.steps_at_once
        if self.random is None or piece == self._filled:
            return
        start = 0
        for index, size in enumerate(self.sizes):
            generator = torch.Generator(self.random.device)
            seed = np.random.SeedSequence([self.seed + index, piece]).generate_state(1, np.uint64)[0]
            generator.manual_seed(int(seed) >> 1)
            shape = (self.steps_at_once, size, 3)
            numbers = torch.randn(shape, generator=generator, device=self.random.device, dtype=self.random.dtype)
            self.random[:, start : start + size] = numbers
            start += size
        self._filled = piece

    def first_half(self) -> None:
        """From one set of forces to the positions where the next are needed."""
        state = self.state
        state.velocities.addcmul_(state.forces, self.half_kick)
        if self.ensemble == "langevin":
            state.positions.add_(state.velocities, alpha=0.5 * self.timestep)
            state.velocities.mul_(self.decay).addcmul_(self._numbers(), self.spread)
            state.positions.add_(state.velocities, alpha=0.5 * self.timestep)
        else:
            state.positions.add_(state.velocities, alpha=self.timestep)

    def second_half(self) -> None:
        """The rest of the step, with the new forces."""
        state = self.state
        state.velocities.addcmul_(state.forces, self.half_kick)
        if self.ensemble == "bussi":
            state.velocities.mul_(self._bussi_factor().to(state.velocities.dtype)[self.system].unsqueeze(1))
        state.step.add_(1)

    def kinetic(self) -> Tensor:
        """``[S]`` kinetic energies [eV]."""
        return kinetic_energy(self.state.velocities, self.masses, self.system, len(self.sizes))

    def _numbers(self) -> Tensor:
        """``[N, 3]`` normal random numbers of the present step."""
        assert self.random is not None
        return self.random.index_select(0, (self.state.step % self.steps_at_once).view(1)).squeeze(0)

    def _bussi_factor(self) -> Tensor:
        numbers = self._numbers().double()
        squares = numbers.new_zeros(len(self.sizes)).index_add(0, self.system, numbers.square().sum(1))
        one = numbers.index_select(0, self.first)[:, 0]  # one of the numbers multiplies the old velocity
        ratio = 0.5 * self.thermal_energy / self.kinetic().clamp(min=1e-300)
        fresh = (1.0 - self.decay) * ratio
        scale = self.decay + fresh * squares + 2.0 * one * (self.decay * fresh).sqrt()
        return scale.clamp(min=0.0).sqrt()
