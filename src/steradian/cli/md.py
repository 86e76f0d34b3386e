"""``steradian md``: molecular dynamics with a trained model."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from steradian.cli.evaluate import Precision, load

__all__ = ["md"]


class Ensemble(enum.StrEnum):
    nve = "nve"
    langevin = "langevin"
    bussi = "bussi"


class Engine(enum.StrEnum):
    auto = "auto"
    ase = "ase"
    device = "device"


def md(
    model: Annotated[Path, typer.Argument(help="Model file or folder of a run.", show_default=False)],
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
    precision: Precision = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
) -> None:
    """Run molecular dynamics: trajectory, log, picture.

    steradian md runs/my molecule.xyz --ensemble langevin --temperature 300 --steps 10000 --out md
    """
    import ase.io

    from steradian.evaluation.plots import save
    from steradian.simulate.md import MDSettings, choose_device, run_md
    from steradian.simulate.pictures import simulation_picture

    if not structure.is_file():
        raise ValueError(f"{structure}: no such file")
    try:
        atoms: Any = ase.io.read(structure, index=0)
    except Exception as error:
        raise ValueError(f"{structure}: ASE cannot read it ({error})") from None
    settings = MDSettings(
        ensemble=ensemble.value,
        temperature=temperature,
        timestep=timestep,
        friction=friction,
        seed=seed,
        save_every=save_every,
    )
    place = choose_device(device)
    with Progress(steps) as progress:
        try:
            result = run_md(
                model if precision is None else load(model, str(place), precision),
                atoms,
                out,
                steps=steps,
                settings=settings,
                resume=resume,
                overwrite=overwrite,
                report=progress.show,
                engine=engine.value,
                device=place,
            )
        except KeyboardInterrupt:
            typer.echo(f"interrupted; the same command with --resume goes on in {out}", err=True)
            raise
    target = None if ensemble is Ensemble.nve else temperature
    save(simulation_picture(out / "md.csv", len(atoms), target), out / "md.png")
    typer.echo(
        f"{result.steps} steps, mean temperature {result.temperature:.0f} K, drift of the total energy "
        f"{1000 * result.drift:.3g} meV per atom and ps"
    )
    typer.echo(f"wrote trajectory.extxyz, md.csv and md.png to {out}")


class Progress:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self, steps: int) -> None:
        import sys
        import time

        self.steps, self.started, self.next_line = steps, time.monotonic(), 0.0
        self.bar: Any = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self.bar = Progress(
                BarColumn(),
                TextColumn("{task.completed}/{task.total} steps"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self.task = self.bar.add_task("md", total=steps, note="")

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, step: int, temperature: float, energy: float) -> None:
        import time

        note = f"{temperature:.0f} K  {energy:.4f} eV"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, note=note)
            return
        elapsed = time.monotonic() - self.started
        if elapsed >= self.next_line or step == self.steps:
            self.next_line = elapsed + 10.0
            typer.echo(f"step {step}/{self.steps}  {elapsed:.0f} s  {note}")
