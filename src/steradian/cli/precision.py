"""``steradian precision``: error, time and memory of every role and preset of precision."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steradian.cli import common
from steradian.cli.common import Progress, load, parsed_units, read, results, say, show, write_text
from steradian.config import KeysConfig
from steradian.config.precision import PRESETS

__all__ = ["precision"]


def precision(
    model: common.Model,
    data: Annotated[str, typer.Argument(help=common.DATA_HELP, show_default=False)],
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
    units: common.Units = "",
    device: common.Device = "cpu",
    seed: common.Seed = 0,
) -> None:
    """Measure every role and preset of precision against float64; name the cheapest preset that is good enough.

    steradian precision runs/my test.xyz --force-tolerance 0.5 --out precision
    """
    import numpy as np
    import torch

    from steradian.evaluation.plots import save
    from steradian.studies.precision import StudySettings, precision_study

    with results(out):
        potential = load(model, device, None)
        frames = read(data, KeysConfig(), parsed_units(units), ())
        potential.check_elements(torch.from_numpy(np.concatenate([frame.numbers for frame in frames])))
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
        with Progress({"": None}, "", err=True) as progress:
            study = precision_study(
                potential, frames, settings, lambda done, count, what: progress.update("", done, what, count)
            )
        if out is not None:
            write_text(out / "precision.json", {"model": str(model), "data": data, **study.to_dict()})
            write_text(out / "precision.txt", f"{study.table().text()}\n{study.summary()}\n")
            save(study.picture(), out / "precision.png")
    show([study.table()])
    say(study.summary())
    if out is not None:
        say(f"wrote precision.json, precision.txt and precision.png to {out}")
