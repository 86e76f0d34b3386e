"""``steradian convert``: models of mace-torch, nequip and torch_geometric become model files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steradian.cli.common import say, write_text

__all__ = ["convert"]

SCRIPT = "foreign_export.py"


def convert(
    foreign: Annotated[
        Path | None, typer.Argument(help="A .npz of the exporter, or a pickled model.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Argument(help="Model file to write (.safetensors).", show_default=False)] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Read a pickled model. This runs code that stands in the file.")
    ] = False,
    head: Annotated[str | None, typer.Option("--head", help="Which of several heads of a mace-torch model.")] = None,
    elements: Annotated[
        str | None, typer.Option("--elements", metavar="H,C,...", help="Elements to keep of a ViSNet's embedding.")
    ] = None,
    exporter: Annotated[
        bool, typer.Option("--exporter", help=f"Write {SCRIPT}, which makes the .npz where the package is installed.")
    ] = False,
) -> None:
    """Convert a model of mace-torch, nequip or torch_geometric (ViSNet) and test that energies and forces stay.

    steradian convert --exporter; python foreign_export.py mace.model mace.npz   (in the package's own environment)

    steradian convert mace.npz mace.safetensors
    """
    if exporter:
        write_exporter()
        return
    if foreign is None or out is None:
        raise ValueError("give the foreign model and the file to write: steradian convert mace.npz mace.safetensors")
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: give a file that ends in .safetensors")
    from steradian.build import save_potential
    from steradian.interfaces.convert import convert_file

    if trust and foreign.suffix != ".npz":
        say(f"trusting {foreign}: code that stands in it runs now, with your rights")
    potential = convert_file(foreign, trust=trust, head=head, elements=_numbers(elements))
    assert potential.self_test is not None
    worst = potential.self_test.check(potential)
    save_potential(out, potential)
    host = potential.config.host
    parts = f"{host.kind}, {host.num_layers} layers, {potential.num_parameters:,} parameters"
    say(f"{out}: {parts}, {len(potential.elements)} elements, {potential.config.precision}")
    say(f"self-test against {potential.self_test.source}: largest relative difference {worst:.1e}, every backend")


def write_exporter() -> None:
    from steradian.interfaces.convert import exporter_source

    write_text(Path(SCRIPT), exporter_source())
    say(f"{SCRIPT}: run it where the model's package is installed: python {SCRIPT} MODEL OUT.npz")


def _numbers(elements: str | None) -> list[int] | None:
    if elements is None:
        return None
    from ase.data import atomic_numbers

    symbols = [symbol.strip() for symbol in elements.split(",")]
    unknown = [symbol for symbol in symbols if symbol not in atomic_numbers]
    if unknown:
        raise ValueError(f"--elements: {', '.join(unknown)} is no element symbol; write for example H,C,N,O")
    return [atomic_numbers[symbol] for symbol in symbols]
