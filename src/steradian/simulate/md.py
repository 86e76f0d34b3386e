"""Molecular dynamics with a trained potential, through ASE; a run that stops goes on as if it never had."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import ase.io
import numpy as np
from ase import Atoms, units
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary, ZeroRotation
from ase.md.verlet import VelocityVerlet

from steradian.checkpoint import write_atomically
from steradian.interfaces.ase import SteradianCalculator
from steradian.potential import Potential
from steradian.simulate.analysis import energy_drift

__all__ = ["MDResult", "MDSettings", "SimulationError", "run_md"]

LOG_COLUMNS = ("step", "time_fs", "potential_eV", "kinetic_eV", "total_eV", "temperature_K")
TOO_HOT = 20.0  # times the target temperature, plus OFFSET
OFFSET = 5000.0  # [K]


class SimulationError(ValueError):
    """A simulation that cannot start or go on; one line that says why and what to do."""


@dataclass(frozen=True)
class MDSettings:
    """What defines a run; stored with it, and compared when it is resumed.

    Attributes:
        ensemble: ``nve`` (velocity Verlet) or ``langevin``.
        temperature: of the start, and of the thermostat [K].
        timestep: [fs].
        friction: of the thermostat [1/ps].
        seed: of the velocities and of the thermostat.
        save_every: steps between frames of the trajectory and lines of the log.
        restart_every: steps between restart points.
        skin: of the neighbour list [Å].
    """

    ensemble: Literal["nve", "langevin"] = "langevin"
    temperature: float = 300.0
    timestep: float = 0.5
    friction: float = 10.0
    seed: int = 0
    save_every: int = 10
    restart_every: int = 100
    skin: float = 0.5

    def __post_init__(self) -> None:
        if self.ensemble not in ("nve", "langevin"):
            raise SimulationError(f"ensemble must be nve or langevin, not '{self.ensemble}'")
        for name in ("timestep", "save_every", "restart_every"):
            if getattr(self, name) <= 0:
                raise SimulationError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("temperature", "friction", "skin"):
            if getattr(self, name) < 0:
                raise SimulationError(f"{name} must not be negative, not {getattr(self, name)}")


@dataclass(frozen=True)
class MDResult:
    """What a run left: folder, steps done, drift per atom [eV/ps] and mean temperature [K]."""

    folder: Path
    steps: int
    drift: float
    temperature: float


def run_md(
    potential: Potential | Path | str,
    atoms: Atoms,
    folder: Path | str,
    *,
    steps: int,
    settings: MDSettings | None = None,
    resume: bool = False,
    overwrite: bool = False,
    report: Callable[[int, float, float], None] | None = None,
) -> MDResult:
    """Simulate, and write ``trajectory.extxyz``, ``md.csv``, ``restart.json`` and ``settings.json`` into a folder.

    A run that was interrupted goes on from its last restart point; frames and lines after that point are made again, so
    the whole is the same, bit for bit, as a run that was not interrupted.

    Args:
        potential: a potential, a model file or the folder of a training run.
        atoms: start; its velocities are used where it has any, else drawn at the temperature.
        folder: of the run.
        steps: length of the whole run, steps of earlier sessions included.
        settings: see :class:`MDSettings`.
        resume: go on with the run in the folder.
        overwrite: replace it.
        report: called after every saved frame with step, temperature [K] and total energy [eV].

    Raises:
        SimulationError: the folder is in use, settings differ from those of the run to resume, or the atoms fly apart.
        KeyboardInterrupt: passed on; what is written stays valid.
    """
    settings = settings or MDSettings()
    files = _Files(Path(folder))
    atoms = atoms.copy() if atoms.calc is None else _without_calculator(atoms)
    atoms.calc = SteradianCalculator(potential, skin=settings.skin)
    random = np.random.RandomState(settings.seed)
    if resume:
        start = files.restore(atoms, random, settings)
    else:
        files.begin(settings, overwrite)
        start = 0
        if not np.any(atoms.get_velocities()) and settings.temperature > 0:
            MaxwellBoltzmannDistribution(atoms, temperature_K=settings.temperature, rng=random)
            Stationary(atoms)
            if not atoms.pbc.any() and len(atoms) > 2:
                ZeroRotation(atoms)
        files.save_frame(atoms, 0, settings)
        files.save_restart(atoms, random, 0)
    for step in range(start, steps):
        # one step per integrator call: its own counters hold no state that a restart would lose
        _integrator(atoms, random, settings).run(1)
        done = step + 1
        if done % settings.save_every == 0 or done == steps:
            temperature = _check(atoms, done, settings)
            if done % settings.save_every == 0:
                files.save_frame(atoms, done, settings)
            if report is not None:
                report(done, temperature, atoms.get_total_energy())
        if done % settings.restart_every == 0 or done == steps:
            atoms.calc._listed = None  # a resumed run makes its list here too, so edges keep their order
            files.save_restart(atoms, random, done)
    log = files.read_log()
    drift = energy_drift(log["time_fs"], log["total_eV"], len(atoms))
    return MDResult(files.folder, max(start, steps), drift, float(log["temperature_K"].mean()))


def _without_calculator(atoms: Atoms) -> Atoms:
    copy = atoms.copy()
    copy.calc = None
    return copy


def _integrator(atoms: Atoms, random: np.random.RandomState, settings: MDSettings) -> Any:
    timestep = settings.timestep * units.fs
    if settings.ensemble == "nve":
        return VelocityVerlet(atoms, timestep)
    friction = settings.friction / (1000 * units.fs)
    return Langevin(atoms, timestep, temperature_K=settings.temperature, friction=friction, rng=random, fixcm=False)


def _check(atoms: Atoms, step: int, settings: MDSettings) -> float:
    temperature = atoms.get_temperature()
    energy = atoms.get_potential_energy()
    limit = TOO_HOT * settings.temperature + OFFSET
    if not math.isfinite(energy) or not np.isfinite(atoms.positions).all() or not temperature < limit:
        raise SimulationError(
            f"the simulation broke down at step {step} ({temperature:.0f} K, {energy:.3g} eV): use a "
            "shorter time step, relax the structure first, or train on structures like these"
        )
    return float(temperature)


class _Files:
    """The folder of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trajectory = folder / "trajectory.extxyz"
        self.log = folder / "md.csv"
        self.restart = folder / "restart.json"
        self.settings = folder / "settings.json"

    def begin(self, settings: MDSettings, overwrite: bool) -> None:
        if self.settings.exists() and not overwrite:
            raise SimulationError(f"{self.folder} holds a run already: add --resume to go on with it, or --overwrite")
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in (self.trajectory, self.log, self.restart):
            file.unlink(missing_ok=True)
        write_atomically(self.settings, json.dumps(asdict(settings), indent=1).encode())
        self.log.write_text(",".join(LOG_COLUMNS) + "\n")

    def save_frame(self, atoms: Atoms, step: int, settings: MDSettings) -> None:
        kinetic, potential = atoms.get_kinetic_energy(), atoms.get_potential_energy()
        frame = atoms.copy()
        frame.calc = None
        frame.info = {"step": step, "time_fs": step * settings.timestep, "energy": potential}
        frame.arrays["forces"] = atoms.get_forces()
        text = io.StringIO()
        ase.io.write(text, frame, format="extxyz")
        row = (step, step * settings.timestep, potential, kinetic, potential + kinetic, atoms.get_temperature())
        for path, content in (
            (self.trajectory, text.getvalue()),
            (self.log, ",".join(map(repr, map(float, row))) + "\n"),
        ):
            with open(path, "a", encoding="utf-8") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())

    def save_restart(self, atoms: Atoms, random: np.random.RandomState, step: int) -> None:
        _, keys, position, has_gauss, gauss = random.get_state(legacy=True)
        state = {
            "step": step,
            "numbers": atoms.numbers.tolist(),
            "positions": atoms.positions.tolist(),
            "momenta": atoms.get_momenta().tolist(),
            "cell": np.asarray(atoms.cell).tolist(),
            "pbc": atoms.pbc.tolist(),
            "random": [np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
            "trajectory_bytes": self.trajectory.stat().st_size,
            "log_bytes": self.log.stat().st_size,
        }
        write_atomically(self.restart, json.dumps(state).encode())

    def restore(self, atoms: Atoms, random: np.random.RandomState, settings: MDSettings) -> int:
        """Put the atoms back to the restart point, cut what was written after it; returns its step."""
        if not self.restart.exists() or not self.settings.exists():
            raise SimulationError(f"{self.folder}: no run to resume there (it has no restart.json)")
        stored = json.loads(self.settings.read_text())
        changed = [name for name, value in asdict(settings).items() if stored.get(name) != value]
        if changed:
            raise SimulationError(
                f"{self.folder} was run with another {', '.join(changed)}; resume with the same settings"
            )
        state = json.loads(self.restart.read_text())
        if state["numbers"] != atoms.numbers.tolist():
            raise SimulationError(f"{self.folder} was run with other atoms; give the structure it started from")
        atoms.set_cell(state["cell"])
        atoms.set_pbc(state["pbc"])
        atoms.set_positions(state["positions"])
        atoms.set_momenta(state["momenta"])
        keys, position, has_gauss, gauss = state["random"]
        random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
        for path, size in ((self.trajectory, state["trajectory_bytes"]), (self.log, state["log_bytes"])):
            os.truncate(path, size)
        return int(state["step"])

    def read_log(self) -> dict[str, np.ndarray]:
        with open(self.log, encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        return {name: np.array([float(row[name]) for row in rows]) for name in LOG_COLUMNS}
