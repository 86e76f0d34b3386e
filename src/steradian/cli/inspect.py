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
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show host, operators, elements, parameters and the statistics of the training set.

    steradian inspect runs/demo_mace_mara --rotations bundled:malonaldehyde
    """
    from steradian.build import load_potential

    potential = load_potential(model)
    rows = describe(model, potential)
    if json:
        typer.echo(dumps(dict(rows), indent=1, ensure_ascii=False))
    else:
        show([Table(plain(str(model)), ("", ""), rows, num_labels=2)])
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


def audit(potential: Any, data: str) -> None:
    from steradian.evaluation.rotations import rotation_audit

    structures = read(data, KeysConfig(), UnitsConfig(), ())
    show([rotation_audit(potential, structures, num_rotations=8, max_structures=5).table()])
