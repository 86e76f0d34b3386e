"""``steradian modes``: vibrations of a structure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from steradian.cli.common import Device, Model, load, read_atoms, say

__all__ = ["modes"]

#: [eV/Å] above which a structure is no minimum
RELAXED = 0.05


def modes(
    model: Model,
    structure: Annotated[Path, typer.Argument(help="Any file that ASE reads; relaxed.", show_default=False)],
    precision: Annotated[
        str, typer.Option("--precision", "--dtype", help="float64, float32, mixed, half or tf32.")
    ] = "float64",
    device: Device = "cpu",
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Rows of the Hessian at a time; bounds the memory.", show_default="auto")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the frequencies of normal modes, from exact second derivatives.

    steradian modes runs/my molecule.xyz
    """
    atoms = read_atoms(structure)
    from steradian.simulate.modes import normal_modes

    found = normal_modes(load(model, device, precision), atoms, chunk=chunk)
    if as_json:
        content = {
            "wavenumbers_per_cm": found.wavenumbers.tolist(),
            "energies_eV": found.energies.tolist(),
            "zero_point_energy_eV": found.zero_point_energy,
            "largest_force_eV_per_A": found.largest_force,
        }
        typer.echo(json.dumps(content, indent=2))
        return
    say("   #      meV     1/cm")
    for number, (energy, wavenumber) in enumerate(zip(found.energies, found.wavenumbers)):
        mark = "i" if energy < 0 else " "
        say(f"{number:4d} {1000 * abs(energy):8.2f}{mark} {abs(wavenumber):7.1f}{mark}")
    say(f"zero-point energy {found.zero_point_energy:.4f} eV")
    if found.largest_force > RELAXED:
        say(f"the largest force is {found.largest_force:.2g} eV/Å: relax the structure first", err=True)
