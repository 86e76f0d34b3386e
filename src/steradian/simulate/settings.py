"""Settings of a simulation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from ase import Atoms

from steradian.graph.structures import DataError, Structure

__all__ = ["ENSEMBLES", "MDSettings", "SimulationError", "check_start"]

ENSEMBLES = ("nve", "langevin", "bussi")
#: [fs] above it no bond of a molecule is followed any more, so a longer time step is nearly always a mistake of units
LONGEST_TIMESTEP = 10.0


class SimulationError(ValueError):
    """A simulation that cannot start or go on; one line that says why and what to do."""


@dataclass(frozen=True)
class MDSettings:
    """What defines a run; stored with it, and compared when it is resumed.

    Attributes:
        ensemble: ``nve`` (velocity Verlet), ``langevin`` or ``bussi`` (velocities scaled at random, canonical).
        temperature: of the start, and of the thermostat [K].
        timestep: [fs].
        friction: of the thermostat [1/ps]; for ``bussi`` the inverse of its relaxation time.
        seed: of the velocities and of the thermostat.
        save_every: steps between frames of the trajectory and lines of the log.
        restart_every: steps between restart points.
        skin: of the neighbour list [Å].
        timestep_reason: why the time step is longer than :data:`LONGEST_TIMESTEP`; not compared.

    Raises:
        SimulationError: a value that cannot be.
    """

    ensemble: Literal["nve", "langevin", "bussi"] = "langevin"
    temperature: float = 300.0
    timestep: float = 0.5
    friction: float = 10.0
    seed: int = 0
    save_every: int = 10
    restart_every: int = 100
    skin: float = 0.5
    timestep_reason: str = ""

    def __post_init__(self) -> None:
        if self.ensemble not in ENSEMBLES:
            raise SimulationError(f"ensemble must be nve, langevin or bussi, not '{self.ensemble}'")
        for name in ("timestep", "temperature", "friction", "skin"):
            if not math.isfinite(getattr(self, name)):
                raise SimulationError(f"{name} must be a finite number, not {getattr(self, name)}")
        for name in ("timestep", "save_every", "restart_every"):
            if getattr(self, name) <= 0:
                raise SimulationError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("temperature", "friction", "skin"):
            if getattr(self, name) < 0:
                raise SimulationError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.ensemble == "bussi" and not self.friction:
            raise SimulationError("bussi needs a positive friction, the inverse of its relaxation time")
        if self.timestep > LONGEST_TIMESTEP and not self.timestep_reason:
            raise SimulationError(
                f"a time step of {self.timestep:g} fs is longer than the vibrations of atoms (usual: 0.5 to 2 fs); if "
                "it is meant, say why with --timestep-reason TEXT"
            )


def check_start(atoms: Atoms) -> None:
    """Refuse a start that no simulation can begin with.

    Raises:
        SimulationError: there are no atoms, a position, velocity or lattice vector is not finite, or the cell has no
            height along a periodic direction.
    """
    if not len(atoms):
        raise SimulationError("no atoms to simulate")
    for name, values in (("position", atoms.get_positions()), ("velocity", atoms.get_velocities())):
        if not np.isfinite(values).all():
            atom = int(np.argmax(~np.isfinite(values).all(axis=1)))
            raise SimulationError(f"the {name} of atom {atom} is not finite (NaN or infinity): mend the structure")
    if not np.isfinite(atoms.cell[:]).all():
        raise SimulationError("the cell is not finite (NaN or infinity): mend the structure")
    try:
        Structure(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc)
    except DataError as error:
        raise SimulationError(f"the start cannot be simulated: {error}") from None
