"""``steradian dataset``: make, look at and convert labelled structures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from steradian.config import KeysConfig, UnitsConfig
from steradian.config.text import printable

if TYPE_CHECKING:
    from rich.console import Console

    from steradian.data.summary import Summary
    from steradian.graph.structures import Structure

__all__ = ["app", "convert", "info", "make"]

app = typer.Typer(no_args_is_help=True, help="Labelled structures: make them with xTB, look at them, convert them.")

NAMED = "what the file says, else "
Input = Annotated[str, typer.Argument(help="File or folder, or bundled:malonaldehyde.", show_default=False)]
EnergyKey = Annotated[str | None, typer.Option(help="Name of the energies in the file.", show_default="usual names")]
ForcesKey = Annotated[str | None, typer.Option(help="Name of the forces in the file.", show_default="usual names")]
StressKey = Annotated[
    str | None, typer.Option(help="Name of the stress; with 'virial' in it, a virial.", show_default="usual names")
]
EnergyUnit = Annotated[
    str | None, typer.Option(help="Unit of the energies in the file, such as kcal/mol.", show_default=NAMED + "eV")
]
LengthUnit = Annotated[
    str | None, typer.Option(help="Unit of the positions in the file.", show_default=NAMED + "Angstrom")
]
ForcesUnit = Annotated[str | None, typer.Option(help="Unit of the forces.", show_default="ENERGY/LENGTH")]
StressUnit = Annotated[
    str | None,
    typer.Option(help="Unit of the stress in the file, such as GPa.", show_default=NAMED + "eV/Angstrom^3"),
]
IgnoreCell = Annotated[bool, typer.Option("--ignore-cell", help="Treat every frame as not periodic.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output where it exists.")]


@app.command()
def make(
    out: Annotated[Path, typer.Option(help="File to write: .npz, .extxyz or .xyz.", show_default=False)],
    molecule: Annotated[
        str, typer.Option(help="malonaldehyde, a name ase.build.molecule knows (CH3CH2OH ...), or a file.")
    ] = "malonaldehyde",
    method: Annotated[str, typer.Option(help="GFN2-xTB, GFN1-xTB or IPEA1-xTB.")] = "GFN2-xTB",
    temperature: Annotated[float, typer.Option(help="Of the thermostat [K].")] = 500.0,
    frames: Annotated[int, typer.Option(help="Frames to keep.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of velocities and random forces.")] = 0,
    stride: Annotated[float, typer.Option(help="Time between kept frames [fs].")] = 40.0,
    timestep: Annotated[float, typer.Option(help="[fs]")] = 0.5,
    friction: Annotated[float, typer.Option(help="Of the thermostat [1/fs].")] = 0.02,
    equilibration: Annotated[float, typer.Option(help="Time dropped at the start [fs].")] = 2000.0,
    charge: Annotated[int, typer.Option(help="Total charge [e].")] = 0,
    multiplicity: Annotated[int | None, typer.Option(help="Spin multiplicity.", show_default="lowest")] = None,
    overwrite: Overwrite = False,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Sample a molecule by Langevin dynamics and label it with xTB (needs tblite).

    The same command continues a run that was stopped or killed. Beside OUT it leaves OUT.recipe.json: the settings,
    the versions, and a report with the autocorrelation time of the energy.
    """
    from steradian.data.xtb import Recipe, make_dataset

    try:
        recipe = Recipe(
            molecule=molecule,
            method=method,
            temperature=temperature,
            frames=frames,
            seed=seed,
            timestep=timestep,
            friction=friction,
            stride=stride,
            equilibration=equilibration,
            charge=charge,
            multiplicity=multiplicity,
        )
        report = make_dataset(recipe, out, progress=progress, overwrite=overwrite)
    except ValueError as error:
        fail(error)
    except KeyboardInterrupt:
        typer.echo("stopped; the same command continues where it was", err=True)
        raise typer.Exit(130) from None
    console = plain_console()
    resumed = f", {report['frames_resumed']} of them from an earlier run" if report["frames_resumed"] else ""
    console.print(f"wrote {out}: {report['frames']} frames of {report['atoms']} atoms{resumed}", soft_wrap=True)
    console.print(
        f"temperature {report['temperature_K']:.0f} K, energy {report['energy_mean_eV']:.4f} ± "
        f"{report['energy_std_eV']:.4f} eV, autocorrelation of the energy {report['energy_autocorrelation_fs']} fs at "
        f"a stride of {report['stride_fs']} fs: worth {report['independent_frames']} independent frames",
        soft_wrap=True,
    )
    if report["independent_frames"] < 0.5 * report["frames"]:
        console.print("the frames are correlated: a longer --stride gives more for the same number of frames")


@app.command()
def info(
    path: Input,
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
    stress_key: StressKey = None,
    energy_unit: EnergyUnit = None,
    length_unit: LengthUnit = None,
    forces_unit: ForcesUnit = None,
    stress_unit: StressUnit = None,
    ignore_cell: IgnoreCell = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show frames, elements, label coverage, ranges, duplicates and what looks suspicious."""
    from steradian.data.summary import summarize

    keys = KeysConfig(energy=energy_key, forces=forces_key, stress=stress_key)
    units = UnitsConfig(energy=energy_unit, length=length_unit, forces=forces_unit, stress=stress_unit)
    try:
        notes: list[str] = []
        summary = summarize(read_any(path, keys, units, ignore_cell, notes), declared=energy_unit is not None)
    except ValueError as error:
        fail(error)
    summary.notes[:0] = notes
    if as_json:
        typer.echo(json.dumps(summary.to_dict(), indent=2, ensure_ascii=False))
    else:
        print_summary(path, summary)


@app.command()
def convert(
    path: Input,
    out: Annotated[Path, typer.Argument(help="File to write: .npz, .extxyz or .xyz.", show_default=False)],
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
    stress_key: StressKey = None,
    energy_unit: EnergyUnit = None,
    length_unit: LengthUnit = None,
    forces_unit: ForcesUnit = None,
    stress_unit: StressUnit = None,
    ignore_cell: IgnoreCell = False,
    single_precision: Annotated[
        bool, typer.Option("--single-precision", help="npz: positions and forces as float32.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write the frames in another format, in eV and Å, under the usual names."""
    from steradian.data.files import write_structures
    from steradian.graph.structures import DataError

    keys = KeysConfig(energy=energy_key, forces=forces_key, stress=stress_key)
    units = UnitsConfig(energy=energy_unit, length=length_unit, forces=forces_unit, stress=stress_unit)
    try:
        if out.exists() and not overwrite:
            raise DataError(f"{out} exists; choose another name, or pass --overwrite to replace it")
        notes: list[str] = []
        structures = read_any(path, keys, units, ignore_cell, notes)
        named = [("energy", energy_key), ("forces", forces_key), ("stress", stress_key)]
        asked = [label for label, key in named if key]
        if asked and any(getattr(frame, label) is None for frame in structures for label in asked):
            from steradian.data.files import read_structures

            read_structures(path, keys, units, require=asked, ignore_cell=ignore_cell)  # raises, with what was found
        write_structures(out, structures, single_precision=single_precision)
    except ValueError as error:
        fail(error)
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    labels = [label for label in ("energy", "forces", "stress") if getattr(structures[0], label) is not None]
    typer.echo(f"wrote {out}: {len(structures)} frames with {', '.join(labels) or 'no labels'}")


def read_any(path: str, keys: KeysConfig, units: UnitsConfig, ignore_cell: bool, notes: list[str]) -> list[Structure]:
    """All frames with whatever labels each has; ``notes`` get what was left out."""
    from steradian.data.files import read_raw
    from steradian.data.labels import to_structures
    from steradian.data.load import bundled_file, files_of

    files = [bundled_file(path)] if path.startswith("bundled:") else [Path(file) for file in files_of(path)]
    return [
        frame
        for file in files
        for frame in to_structures(read_raw(file, keys), keys, units, ignore_cell=ignore_cell, notes=notes)
    ]


def plain_console() -> Console:
    """A console that shows brackets in paths and labels as they are."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)


def print_summary(path: str, summary: Summary) -> None:
    from rich.table import Table

    def counted(counts: dict[str, int]) -> str:
        shown = ", ".join(f"{name} ({count})" for name, count in list(counts.items())[:8])
        return shown + (f", ... {len(counts) - 8} more" if len(counts) > 8 else "")

    table = Table(title=printable(path), show_header=False, title_justify="left")
    sizes = f"{summary.atoms_min}" + (f" to {summary.atoms_max}" if summary.atoms_max != summary.atoms_min else "")
    rows = [
        (
            "frames",
            f"{summary.frames}, {sizes} atoms each" + (f", {summary.periodic} periodic" if summary.periodic else ""),
        ),
        ("elements (atoms)", counted(summary.elements)),
        ("formulas (frames)", counted(summary.formulas)),
    ]
    if summary.config_types:
        rows.append(("kinds (frames)", counted(summary.config_types)))
    for label, count in summary.coverage.items():
        share = "all frames" if count == summary.frames else f"{count} of {summary.frames} frames" if count else "none"
        rows.append((label, share))
    rows += list(summary.plausibility["rows"].items())
    if summary.energy_per_atom is not None:
        low, high = summary.energy_per_atom
        rows.append(("energy per atom", f"{low:.4f} to {high:.4f} eV after least-squares reference energies"))
    if summary.force_norm is not None:
        median, largest = summary.force_norm
        rows.append(("forces", f"RMS {summary.force_rms:.4f}, median norm {median:.4f}, largest {largest:.4f} eV/Å"))
    rows.append(("exact duplicates", f"{summary.duplicates} frames"))
    for name, value in rows:
        table.add_row(name, value)
    console = plain_console()
    console.print(table)
    for note in summary.notes:
        console.print(f"suspicious: {note}", soft_wrap=True)
    if not summary.notes:
        console.print("nothing suspicious")


def fail(error: Exception) -> NoReturn:
    typer.echo(f"error: {printable(error)}", err=True)
    raise typer.Exit(2)
