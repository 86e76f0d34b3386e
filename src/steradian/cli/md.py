"""``steradian md``: molecular dynamics with a trained model."""

from __future__ import annotations

import enum
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steradian.cli.common import Model, Precision, Progress, RotationAverage, load, read_atoms, say

if TYPE_CHECKING:
    from steradian.simulate.md import MDResult

__all__ = ["md"]


class Ensemble(enum.StrEnum):
    nve = "nve"
    langevin = "langevin"
    bussi = "bussi"


class Engine(enum.StrEnum):
    auto = "auto"
    ase = "ase"
    device = "device"


Reason = Annotated[str, typer.Option(help="Why a time step above 10 fs is meant.", show_default=False)]


def md(
    model: Model,
    structure: Annotated[Path, typer.Argument(help="Start; any file that ASE reads.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the simulation.")] = Path("md"),
    ensemble: Annotated[Ensemble, typer.Option(help="Velocity Verlet or a thermostat.")] = Ensemble.langevin,
    temperature: Annotated[float, typer.Option(help="[K]")] = 300.0,
    steps: Annotated[int, typer.Option(min=1, help="Length of the whole run.")] = 10000,
    timestep: Annotated[float, typer.Option(help="[fs]")] = 0.5,
    friction: Annotated[float, typer.Option(help="[1/ps]; for bussi the inverse of its relaxation time.")] = 10.0,
    save_every: Annotated[int, typer.Option(help="Steps between saved frames.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the velocities and the thermostat.")] = 0,
    engine: Annotated[
        Engine, typer.Option(help="ASE's integrators, or positions that stay on the device; auto: device on a GPU.")
    ] = Engine.auto,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    timestep_reason: Reason = "",
    precision: Precision = None,
    rotation_average: RotationAverage = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
) -> None:
    """Run molecular dynamics: trajectory, log, picture.

    steradian md runs/my molecule.xyz --ensemble langevin --temperature 300 --steps 10000 --out md
    """
    from steradian.simulate.files import RunFiles
    from steradian.simulate.md import MDSettings, choose_device, run_md

    atoms = read_atoms(structure)
    settings = MDSettings(
        ensemble=ensemble.value,
        temperature=temperature,
        timestep=timestep,
        friction=friction,
        seed=seed,
        save_every=save_every,
        timestep_reason=timestep_reason,
        rotation_average=rotation_average,
    )
    place = choose_device(device)
    try:
        with Progress({"md": steps}, "steps") as progress:
            result = run_md(
                model if precision is None else load(model, str(place), precision),
                atoms,
                out,
                steps=steps,
                settings=settings,
                resume=resume,
                overwrite=overwrite,
                report=Report(progress, steps).line,
                engine=engine.value,
                device=place,
            )
    except KeyboardInterrupt:
        step = RunFiles(out).restart_step()
        if step is not None:
            say(f"stopped; {out} has a restart point at step {step}: the same command with --resume goes on", err=True)
        raise
    finish(out, result, len(atoms), None if ensemble is Ensemble.nve else temperature)


def finish(out: Path, result: MDResult, num_atoms: int, target: float | None) -> None:
    """Picture and last lines of a run; the total energy drifts only where no thermostat (``target`` [K]) changes it."""
    from steradian.evaluation.plots import save
    from steradian.simulate.analysis import simulation_picture

    save(simulation_picture(out / "md.csv", num_atoms, target), out / "md.png")
    drift = f", drift of the total energy {1000 * result.drift:.3g} meV per atom and ps" if target is None else ""
    say(f"{result.steps} steps, mean temperature {result.temperature:.0f} K{drift}")
    say(f"wrote trajectory.extxyz, md.csv and md.png to {out}")


class Report:
    """Moves a bar on a terminal, prints a line now and then elsewhere."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self.progress, self.steps, self.next_line = progress, steps, 0.0

    def line(self, step: int, temperature: float, energy: float) -> None:
        """Step, temperature [K] and total energy [eV]."""
        note = f"{temperature:.0f} K  {energy:.4f} eV"
        self.progress.update("md", step, note)
        elapsed = time.monotonic() - self.progress.started
        if self.progress.bars is None and (elapsed >= self.next_line or step == self.steps):
            self.next_line = elapsed + 10.0
            say(f"step {step}/{self.steps}  {elapsed:.0f} s  {note}")
