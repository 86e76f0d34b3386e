"""``steradian train``: parse, call, print."""

from __future__ import annotations

import glob
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from steradian.config import ConfigError, RunConfig, load_config, parse_config

__all__ = ["train"]

EXIT_INTERRUPTED = 130
READABLE = (".xyz", ".extxyz", ".npz", ".db", ".traj")


def train(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file; without one, the defaults.", show_default=False)
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            help="Train on this file, folder of files or 'pattern*.xyz'; may be given several times"
            " (validation frames are split off).",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override, such as training.max_epochs=50.")
    ] = None,
    resume: Annotated[Path | None, typer.Option("--resume", metavar="RUN_DIR", help="Go on with a run.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Build, take two steps, write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run of the same name.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but mistakes.")] = False,
) -> None:
    """Train a force field.

    steradian train configs/own_data.yaml

    steradian train --data my.xyz --set training.max_epochs=50

    steradian train --resume runs/own_data
    """
    run = resolve(config, data, name, settings or [], resume)
    from steradian.training.machine import end_processes
    from steradian.training.report import spell_seconds
    from steradian.training.run import fit

    result = fit(
        run,
        resume=resume,
        overwrite=overwrite,
        progress=not quiet,
        dry_run=dry_run,
        show_plan=None if quiet else print_plan,
    )
    end_processes()
    if not quiet and is_first():
        print_result(result, dry_run, run.training.monitor, spell_seconds(result.elapsed_s))
    if result.reason == "interrupted":
        raise typer.Exit(EXIT_INTERRUPTED)


def resolve(
    config: Path | None, data: list[Path] | None, name: str | None, settings: list[str], resume: Path | None
) -> RunConfig:
    """The configuration from a file, data files or a run to go on with, and the overrides.

    Raises:
        ConfigError: with the way out.
    """
    if resume is not None:
        if config is not None or data or name is not None:
            raise ConfigError("--resume takes its configuration from the run; leave out CONFIG, --data and --name")
        stored = resume / "config.yaml"
        if not stored.is_file():
            raise ConfigError(f"{resume}: no run to resume there (it has no config.yaml)")
        return load_config(stored, settings)
    if config is None and not data:
        raise ConfigError("give a configuration file, or --data FILE to train on your own frames with the defaults")
    overrides: list[str] = []
    if data:
        files = [file for path in data for file in data_files(path)]
        several = ", ".join(quoted(file) for file in files)
        overrides.append(f"data.train={several if len(files) == 1 else f'[{several}]'}")
        if name is None and config is None and not any(entry.startswith("name=") for entry in settings):
            name = (data[0] if data[0].exists() else files[0]).stem
    if name is not None:
        overrides.append(f"name={quoted(name)}")
    overrides += settings
    return parse_config({}, overrides, source="command line") if config is None else load_config(config, overrides)


def data_files(path: Path) -> list[Path]:
    """The files that a path, a folder or a pattern means, in the order of their names.

    Raises:
        ConfigError: none.
    """
    if path.is_dir():
        if next(path.rglob("type.raw"), None) is not None:
            return [path]  # one DeePMD data set
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in READABLE)
        if not found:
            raise ConfigError(f"{path}: no data files in this folder ({', '.join(READABLE)} or DeePMD's type.raw)")
        return found
    if not path.exists():
        found = [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
        if not found:
            raise ConfigError(f"{path}: no such file")
        return found
    return [path]


def quoted(value: object) -> str:
    """A YAML string, whatever stands in it."""
    return "'" + str(value).replace("'", "''") + "'"


def is_first() -> bool:
    """Whether this process is the one of a run that prints."""
    import os

    return os.environ.get("RANK", "0") == "0"


def print_plan(rows: list[tuple[str, str]]) -> None:
    """The plan as a table on a terminal, as plain lines elsewhere."""
    widest = max(len(name) for name, _ in rows)
    if not sys.stdout.isatty():
        for name, value in rows:
            typer.echo(f"{name:<{widest}}  {value}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 1))
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(value))
    Console(highlight=False).print(table)


def print_result(result: Any, dry_run: bool, monitor: str, took: str) -> None:
    from steradian.training.run import closing_line

    if dry_run:
        typer.echo(f"dry run: {result.steps} steps and one validation batch took {took}; nothing was written")
        return
    typer.echo(closing_line(result, monitor))
    if result.model_path is not None:
        typer.echo(f"model: {result.model_path}")
