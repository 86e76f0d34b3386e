"""``steradian inspect``: what a model file holds."""

from __future__ import annotations

import hashlib
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from steradian.cli.common import Model, read, show
from steradian.config import KeysConfig, UnitsConfig
from steradian.evaluation.tables import Table, plain

__all__ = ["inspect"]


def inspect(
    model: Model,
    rotations: Annotated[
        str | None,
        typer.Option(
            "--rotations", metavar="DATA", help="Audit rotations on these structures (or bundled:malonaldehyde)."
        ),
    ] = None,
    activations: Annotated[
        bool,
        typer.Option("--activations", help="Sizes of messages, features and energies, at the start and as trained."),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="Structures for --activations (or bundled:malonaldehyde).",
            show_default="random ones with the training set's number of neighbours",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show host, operators, elements, parameters and the statistics of the training set.

    steradian inspect runs/demo_mace_mara --rotations bundled:malonaldehyde
    """
    from steradian.build import load_potential

    if data is not None and not activations:
        raise ValueError("--data: belongs to --activations; add that")
    potential = load_potential(model)
    rows = describe(model, potential)
    sizes = activations_of(potential, data) if activations else None
    if json:
        content: dict[str, Any] = dict(rows)
        if sizes is not None:
            content["activations"] = sizes[1]
        typer.echo(dumps(content, indent=1, ensure_ascii=False))
    else:
        show([Table(plain(str(model)), ("", ""), rows, num_labels=2), *([sizes[0]] if sizes else [])])
    if rotations is not None:
        audit(potential, rotations)


def describe(path: Path, potential: Any) -> list[tuple[str, str]]:
    """Lines of the table: name and value."""
    from ase.data import chemical_symbols

    file = path / "model.safetensors" if path.is_dir() else path
    host, statistics = potential.config.host, potential.statistics
    rows = [
        ("host", f"{host.kind}, {host.num_layers} layers, {host.num_channels} channels"),
        *host.summary().items(),
        ("cutoff", f"{host.cutoff_A} Å"),
        ("precision", potential.policy.name),
    ]
    for index, layer in enumerate(potential.host.layers):
        gate = layer.gate
        if gate is None:
            rows.append((f"edge gate, layer {index}", "none"))
        else:
            rows.append((f"edge gate, layer {index}", gate.summary()))
        if layer.mixer is not None:
            rows.append((f"global mixer, layer {index}", layer.mixer.summary()))
    references = (f"{chemical_symbols[z]} {statistics.atom_references[z]:.4f}" for z in potential.elements)
    rows += [
        ("parameters", f"{potential.num_parameters:,}"),
        ("parameters by part", ", ".join(f"{name} {count:,}" for name, count in parts(potential).items())),
        ("elements, E0 in eV", ", ".join(references)),
        ("E0 from", statistics.reference_report),
        ("training set", f"{statistics.num_frames} frames; force RMS {statistics.force_rms:.4g} eV/Å"),
        ("neighbours per atom", f"{statistics.avg_num_neighbors:.2f}"),
        ("units", "eV, Å, eV/Å, eV/Å^3 (stress positive under tension)"),
        ("sha256", hashlib.sha256(file.read_bytes()).hexdigest()[:16]),
    ]
    return rows


def parts(potential: Any) -> dict[str, int]:
    """Parameters of each kind of module, over all layers."""
    counts: dict[str, int] = {}
    for name, parameter in potential.host.named_parameters():
        pieces = name.split(".")
        part = pieces[2] if pieces[0] == "layers" else pieces[0]
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def activations_of(potential: Any, data: str | None) -> tuple[Table, dict[str, list[dict[str, Any]]]]:
    """Sizes at the start and as trained, as a table and as plain data.

    Raises:
        ValueError: structures that cannot be read, or with an element that the model does not know.
    """
    from dataclasses import asdict

    from steradian.evaluation.activations import activation_table, activations, random_structures, with_random_weights

    if data is None:
        structures, what = random_structures(potential), "random structures"
    else:
        structures, what = read(data, KeysConfig(), UnitsConfig(), ())[:20], data
    start, trained = (activations(model, structures) for model in (with_random_weights(potential), potential))
    title = f"Activations on {len(structures)} structures ({what})"
    content = {"start": [asdict(entry) for entry in start], "trained": [asdict(entry) for entry in trained]}
    return activation_table(start, trained, title), content


def audit(potential: Any, data: str) -> None:
    from steradian.evaluation.rotations import rotation_audit

    structures = read(data, KeysConfig(), UnitsConfig(), ())
    show([rotation_audit(potential, structures, num_rotations=8, max_structures=5).table()])
