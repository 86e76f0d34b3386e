"""Molecular dynamics with a trained potential; a run that stops goes on as if it never had."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from ase.md.bussi import Bussi
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary, ZeroRotation
from ase.md.verlet import VelocityVerlet

from steradian.build import load_potential
from steradian.graph.skin import Capacity
from steradian.graph.structures import DataError
from steradian.interfaces.ase import SteradianCalculator
from steradian.potential import Potential
from steradian.simulate.analysis import energy_drift
from steradian.simulate.device_md import DeviceMD, Snapshot
from steradian.simulate.files import MDSettings, RunFiles, SimulationError, check_start

__all__ = ["ENGINES", "MDResult", "MDSettings", "SimulationError", "choose_device", "run_md"]

ENGINES = ("auto", "ase", "device")
TOO_HOT = 20.0  # times the target temperature, plus OFFSET
OFFSET = 5000.0  # [K]

Report = Callable[[int, float, float], None]


@dataclass(frozen=True)
class MDResult:
    """What a run left: folder, steps done, drift per atom [eV/ps] and mean temperature [K]."""

    folder: Path
    steps: int
    drift: float
    temperature: float


@dataclass
class _Run:
    """A run while it lasts."""

    potential: Potential
    atoms: Atoms
    files: RunFiles
    steps: int
    settings: MDSettings
    report: Report | None

    def saves(self, step: int) -> bool:
        return step % self.settings.save_every == 0

    def restarts(self, step: int) -> bool:
        return step % self.settings.restart_every == 0 or step == self.steps

    def wanted(self, step: int) -> bool:
        return self.saves(step) or self.restarts(step)

    def check(self, step: int, temperature: float, energy: float, forces: np.ndarray) -> None:
        """Refuse a step that nothing may be written of.

        Raises:
            SimulationError: energy, forces or positions are not finite, or the atoms are far too hot.
        """
        limit = TOO_HOT * self.settings.temperature + OFFSET
        finite = math.isfinite(energy) and np.isfinite(self.atoms.positions).all() and np.isfinite(forces).all()
        if not finite and step == 0:
            raise SimulationError(
                "the model gives no finite energy and forces for the start: are two atoms at one place, or is the "
                "structure unlike those it was trained on?"
            )
        if step and not (finite and temperature < limit):
            raise SimulationError(
                f"the simulation broke down at step {step} ({temperature:.0f} K, {energy:.3g} eV): use a "
                "shorter time step, relax the structure first, or train on structures like these"
            )


def run_md(
    potential: Potential | Path | str,
    atoms: Atoms,
    folder: Path | str,
    *,
    steps: int,
    settings: MDSettings | None = None,
    resume: bool = False,
    overwrite: bool = False,
    report: Report | None = None,
    engine: str = "auto",
    device: torch.device | str = "auto",
) -> MDResult:
    """Simulate, and write ``trajectory.extxyz``, ``md.csv``, ``restart.json`` and ``settings.json`` into a folder.

    A run that was interrupted goes on from its last restart point; frames and lines after that point are made again, so
    the whole is the same, bit for bit, as a run that was not interrupted (on a GPU: where its sums are deterministic).

    Args:
        potential: a potential, a model file or the folder of a training run.
        atoms: start; its velocities are used where it has any, else drawn at the temperature.
        folder: of the run.
        steps: length of the whole run, steps of earlier sessions included.
        settings: see :class:`MDSettings`.
        resume: go on with the run in the folder.
        overwrite: replace it.
        report: called after every saved frame with step, temperature [K] and total energy [eV].
        engine: ``ase`` (ASE's integrators), ``device`` (:class:`~steradian.simulate.device_md.DeviceMD`, positions stay
            on the device) or ``auto``: that of the run to resume, else ``device`` on a GPU and ``ase`` on a CPU.
        device: ``cpu``, ``cuda`` or ``auto``: where the potential is, or a GPU if there is one and a file is read.

    Raises:
        SimulationError: the start is not finite or has no atoms, the folder is in use, settings differ from those of
            the run to resume, files of that run are damaged, the atoms fly apart, or there is no such device or engine.
        OSError: the folder cannot be written to; names it and the way out.
        KeyboardInterrupt: passed on; what is written stays valid.
    """
    settings = settings or MDSettings()
    files = RunFiles(Path(folder))
    check_start(atoms)
    place = choose_device(device, potential)
    with files.held():
        chosen = _engine(engine, place, files if resume else None)
        if not resume:
            files.check_free(overwrite)
        model = _model(potential, place, settings)
        settings = replace(settings, rotation_average=model.rotation_average)
        copy = atoms.copy()
        copy.calc = None
        run = _Run(model, copy, files, steps, settings, report)
        try:
            start = {"ase": _run_ase, "device": _run_on_device}[chosen](run, resume)
        except DataError as error:  # positions that no list of neighbours can be made of
            raise SimulationError(f"the simulation broke down: {error}") from None
        log = files.read_log()
    drift = energy_drift(log["time_fs"], log["total_eV"], len(atoms))
    return MDResult(files.folder, max(start, steps), drift, float(log["temperature_K"].mean()))


def _model(potential: Potential | Path | str, place: torch.device, settings: MDSettings) -> Potential:
    if not isinstance(potential, Potential):
        potential = load_potential(potential, device=place)
    if settings.rotation_average is not None:
        potential.average_rotations(settings.rotation_average)
    return potential.to(place)


def choose_device(device: torch.device | str, potential: Potential | Path | str = "") -> torch.device:
    """The device meant by ``auto`` (where the potential is, else a GPU if there is one), ``cpu`` or ``cuda``.

    Raises:
        SimulationError: there is no such device.
    """
    if str(device) == "auto":
        if isinstance(potential, Potential):
            return potential.device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise SimulationError(f"device '{device}' is not known; choose auto, cpu or cuda") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise SimulationError("no GPU that PyTorch can use: choose --device cpu, or install a CUDA build of it")
    return place


def _engine(engine: str, device: torch.device, resumed: RunFiles | None) -> str:
    if engine not in ENGINES:
        raise SimulationError(f"engine must be auto, ase or device, not '{engine}'")
    if engine != "auto":
        return engine
    stored = resumed.stored_engine() if resumed else None
    return stored or ("device" if device.type == "cuda" else "ase")


def _draw_velocities(atoms: Atoms, settings: MDSettings, random: np.random.RandomState) -> None:
    if np.any(atoms.get_velocities()) or not settings.temperature > 0:
        return
    MaxwellBoltzmannDistribution(atoms, temperature_K=settings.temperature, rng=random)
    if len(atoms) > 1:  # all that a single atom does is to move as a whole
        Stationary(atoms)
    if not atoms.pbc.any() and len(atoms) > 2:
        ZeroRotation(atoms)


def _run_ase(run: _Run, resume: bool) -> int:
    """The run with ASE's integrators; returns the step at which it started."""
    atoms, settings, files = run.atoms, run.settings, run.files
    random = np.random.RandomState(settings.seed)
    atoms.calc = SteradianCalculator(run.potential, device=run.potential.device, skin=settings.skin)
    if resume:
        state = files.restore(atoms, settings, "ase")
        keys, position, has_gauss, gauss = state["random"]
        random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
        start = int(state["step"])
    else:
        start = 0
        _draw_velocities(atoms, settings, random)
        run.check(0, 0.0, atoms.get_potential_energy(), atoms.get_forces())
        files.begin(settings, "ase")
        _save_ase_frame(run, 0)
        files.save_restart(atoms, 0, _random_state(random))
    for step in range(start, run.steps):
        # one step per integrator call: its own counters hold no state that a restart would lose
        _integrator(atoms, random, settings).run(1)
        done = step + 1
        if run.wanted(done):
            temperature = float(atoms.get_temperature())
            run.check(done, temperature, atoms.get_potential_energy(), atoms.get_forces())
            if run.saves(done):
                _save_ase_frame(run, done)
            if run.report is not None and (run.saves(done) or done == run.steps):
                run.report(done, temperature, atoms.get_total_energy())
        if run.restarts(done):
            atoms.calc.forget_list()  # a resumed run makes its list here too, so edges keep their order
            files.save_restart(atoms, done, _random_state(random))
    return start


def _save_ase_frame(run: _Run, step: int) -> None:
    atoms = run.atoms
    energy, kinetic = atoms.get_potential_energy(), atoms.get_kinetic_energy()
    run.files.save_frame(atoms, step, run.settings, energy=energy, kinetic=kinetic, forces=atoms.get_forces())


def _random_state(random: np.random.RandomState) -> dict[str, Any]:
    _, keys, position, has_gauss, gauss = random.get_state(legacy=True)
    return {"random": [np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)]}


def _integrator(atoms: Atoms, random: np.random.RandomState, settings: MDSettings) -> Any:
    timestep = settings.timestep * units.fs
    if settings.ensemble == "nve":
        return VelocityVerlet(atoms, timestep)
    friction = settings.friction / (1000 * units.fs)
    if settings.ensemble == "bussi":
        return Bussi(atoms, timestep, temperature_K=settings.temperature, taut=1.0 / friction, rng=random)
    return Langevin(atoms, timestep, temperature_K=settings.temperature, friction=friction, rng=random, fixcm=False)


def _run_on_device(run: _Run, resume: bool) -> int:
    """The run with positions that stay on the device; returns the step at which it started."""
    atoms, settings, files = run.atoms, run.settings, run.files
    model, start = run.potential.for_inference(), 0
    if resume:
        state = files.restore(atoms, settings, "device")
        atoms.set_velocities(state["velocities"])
        capacity = Capacity(**state["capacity"]) if state["capacity"] else None
        engine = DeviceMD(model, [atoms], settings, device=model.device, capacity=capacity)
        start = int(state["step"])
        engine.resume(start, np.array(state["velocities"]), np.array(state["forces"]), state["energy"])
    else:
        _draw_velocities(atoms, settings, np.random.RandomState(settings.seed))
        engine = DeviceMD(model, [atoms], settings, device=model.device)
        first = engine.start()
        run.check(0, 0.0, float(first.energy[0]), first.forces)
        files.begin(settings, "device")
        _take(run, first, engine)
    for snapshot in engine.run(start, run.steps, run.wanted):
        _take(run, snapshot, engine)
    return start


def _take(run: _Run, snapshot: Snapshot, engine: DeviceMD) -> None:
    """Check and write what came from the device."""
    atoms, step = run.atoms, snapshot.step
    atoms.set_positions(snapshot.positions)
    atoms.set_velocities(snapshot.velocities)
    energy, kinetic = float(snapshot.energy[0]), float(snapshot.kinetic[0])
    temperature = float(atoms.get_temperature())
    run.check(step, temperature, energy, snapshot.forces)
    if run.saves(step):
        run.files.save_frame(atoms, step, run.settings, energy=energy, kinetic=kinetic, forces=snapshot.forces)
    if run.report is not None and step and (run.saves(step) or step == run.steps):
        run.report(step, temperature, energy + kinetic)
    if run.restarts(step):
        capacity = engine.capacity
        state = {
            "velocities": snapshot.velocities.tolist(),
            "forces": snapshot.forces.tolist(),
            "energy": snapshot.energy.tolist(),
            "capacity": asdict(capacity) if capacity else None,
        }
        run.files.save_restart(atoms, step, state)
