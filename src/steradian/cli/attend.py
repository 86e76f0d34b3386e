"""``steradian attend``: pictures of what a model attends to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steradian.cli.common import BUNDLED, read_atoms, results, say

if TYPE_CHECKING:
    from steradian.graph.structures import Structure

__all__ = ["attend"]


def attend(
    model: Annotated[
        Path, typer.Argument(help="Model file or folder of a run, trained with MARA.", show_default=False)
    ],
    structure: Annotated[
        str, typer.Argument(help="File that ASE reads, or bundled:malonaldehyde.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder for the pictures and numbers.")] = Path("attention"),
    atom: Annotated[
        int | None, typer.Option(help="Atom whose surroundings are shown.", show_default="the one with most bonds")
    ] = None,
) -> None:
    """Show how MARA weighs messages on one structure.

    steradian attend runs/mace-mara molecule.xyz --out attention
    """
    from steradian.build import load_potential
    from steradian.evaluation.attention import attention_of, central_atom
    from steradian.evaluation.attention_pictures import distance_picture, molecule_picture, sphere_picture
    from steradian.evaluation.plots import save

    with results(out):
        potential = load_potential(model)
        chosen = read_one(structure)
        result = attention_of(potential, chosen)
        figures = {"messages.png": molecule_picture(result), "distance.png": distance_picture(result)}
        if result.has_sphere:
            figures["sphere.png"] = sphere_picture(result, central_atom(chosen) if atom is None else atom)
        elif atom is not None:
            raise ValueError("--atom: the gates of this model attend on no sphere, so leave it out")
        result.save(out / "attention.npz")
        for name, figure in figures.items():
            save(figure, out / name)
    show(result)
    if not result.has_sphere:
        say("the gates attend on no sphere (list 'sphere' in model.edge_gate.inputs for that): there is no sphere.png")
    say(f"wrote {', '.join(figures)} and attention.npz to {out}")


def read_one(source: str) -> Structure:
    """The first structure of a file or of a bundled test set.

    Raises:
        ValueError: it cannot be read.
    """
    from steradian.data.files import read_structures
    from steradian.data.load import bundled_file
    from steradian.graph.structures import Structure

    if source.startswith(BUNDLED):
        return read_structures(bundled_file(source, "test"), require=())[0]
    return Structure.from_ase(read_atoms(source))


def show(result: Any) -> None:
    """The strongest and the weakest messages of each layer."""
    from ase.data import chemical_symbols
    from rich.console import Console
    from rich.table import Table

    numbers = result.structure.numbers
    mean = ", mean over channels" if result.per_channel else ""
    table = Table(title=f"messages (sender → receiver, α{mean}, distance)")
    spread = ["spread over channels"] if result.per_channel else []
    for heading in ("layer", "mean α", *spread, "strongest", "weakest"):
        table.add_column(heading)

    def spelled(alpha: Any, edges: Any) -> str:
        return "\n".join(
            f"{chemical_symbols[numbers[result.senders[e]]]}{result.senders[e]} → "
            f"{chemical_symbols[numbers[result.receivers[e]]]}{result.receivers[e]}  {alpha[e]:.3f}  "
            f"{result.lengths[e]:.2f} Å"
            for e in edges
        )

    for entry in result.layers:
        order = entry.alpha.argsort()
        table.add_row(
            str(entry.layer + 1),
            f"{entry.alpha.mean():.3f}",
            *([f"{entry.spread.mean():.3f}"] if result.per_channel else []),
            spelled(entry.alpha, order[::-1][:3]),
            spelled(entry.alpha, order[:3]),
        )
    Console().print(table)
