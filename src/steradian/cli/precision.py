"""``steradian precision``: error, time and memory of every role and preset of precision."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from steradian.cli.evaluate import DATA_HELP, Device, Units, parsed_units, read, show, write_json

__all__ = ["precision"]


def precision(
    model: Annotated[Path, typer.Argument(help="Model file or folder of a run.", show_default=False)],
    data: Annotated[str, typer.Argument(help=DATA_HELP, show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder for precision.json, .txt and .png.")] = None,
    force_tolerance: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Allowed mean force difference to float64 [meV/Å].", show_default="0.1 + 5 % of the own error"
        ),
    ] = None,
    structures: Annotated[int, typer.Option(min=1, help="How many are used, evenly spaced.")] = 20,
    roles: Annotated[bool, typer.Option(help="Measure single roles too.")] = True,
    preset: Annotated[list[str] | None, typer.Option(help="Only these presets.", show_default="all")] = None,
    md_steps: Annotated[int, typer.Option(min=0, help="NVE steps of 0.5 fs for the drift; 0: none.")] = 400,
    role_md_steps: Annotated[int, typer.Option(min=0, help="The same for every role.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Structures predicted at once.")] = 5,
    units: Units = "eV,Angstrom",
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Of rotations and velocities.")] = 0,
) -> None:
    """Measure every role and preset of precision against float64; name the cheapest preset that is good enough.

    steradian precision runs/my test.xyz --force-tolerance 0.5 --out precision
    """
    import numpy as np
    import torch

    from steradian.cli.evaluate import check_writable, load
    from steradian.config import KeysConfig
    from steradian.config.precision import PRESETS
    from steradian.studies.precision import StudySettings, precision_study

    potential = load(model, device, None)
    frames = read(data, KeysConfig(), parsed_units(units), ())
    potential.check_elements(torch.from_numpy(np.concatenate([frame.numbers for frame in frames])))  # all known?
    check_writable(out, None)  # before the work, after what bad input can stop: no empty folder is left
    settings = StudySettings(
        max_structures=structures,
        batch=batch,
        roles=roles,
        presets=tuple(preset) if preset else PRESETS,
        md_steps=md_steps,
        role_md_steps=role_md_steps,
        force_tolerance=None if force_tolerance is None else force_tolerance / 1000,
        seed=seed,
    )
    with Progress() as progress:
        study = precision_study(potential, frames, settings, progress.show)
    show([study.table()])
    typer.echo(study.summary())
    if out is not None:
        from steradian.checkpoint import write_atomically
        from steradian.evaluation.plots import save

        write_json(out / "precision.json", {"model": str(model), "data": data, **study.to_dict()})
        write_atomically(out / "precision.txt", f"{study.table().text()}\n{study.summary()}\n".encode())
        save(study.picture(), out / "precision.png")
        typer.echo(f"wrote precision.json, precision.txt and precision.png to {out}")


class Progress:
    """A bar on a terminal, nothing elsewhere."""

    def __init__(self) -> None:
        self.bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            columns = (
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                *times,
                TextColumn("{task.description}"),
            )
            self.bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task("", total=None)

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, done: int, count: int, what: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=count, description=what)
