"""``steradian evaluate`` and ``steradian compare``: errors of models on labelled structures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steradian.config import KeysConfig, UnitsConfig
from steradian.config.precision import PRESETS

if TYPE_CHECKING:
    from steradian.evaluation.report import Evaluated
    from steradian.evaluation.tables import Table
    from steradian.graph.structures import Structure
    from steradian.potential import Potential

__all__ = ["compare", "evaluate"]

BUNDLED = "bundled:"
SUSPICIOUS = 0.5  # [eV/atom]
MAX_MODELS = 7  # as many colours as readers can tell apart

DATA_HELP = "Labelled structures: extxyz, npz and others, or bundled:malonaldehyde (its test frames)."
EnergyKey = Annotated[str | None, typer.Option(help="Name of the energies in the file.", show_default="usual names")]
ForcesKey = Annotated[str | None, typer.Option(help="Name of the forces in the file.", show_default="usual names")]
StressKey = Annotated[str | None, typer.Option(help="Name of the stress in the file.", show_default="usual names")]
TypeKey = Annotated[str, typer.Option(help="Name of the configuration types in the file.")]
Units = Annotated[
    str,
    typer.Option(
        metavar="ENERGY,LENGTH",
        help="Units of the file, such as kcal/mol,Angstrom.",
        show_default="what the file says, else eV,Angstrom",
    ),
]
EnergyOnly = Annotated[bool, typer.Option("--energy-only", help="The structures carry no forces.")]
Batch = Annotated[int, typer.Option(min=1, help="Structures predicted at once.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Precision = Annotated[
    str | None,
    typer.Option("--precision", "--dtype", help="float64, float32, mixed, half or tf32.", show_default="as trained"),
]
Worst = Annotated[int, typer.Option(min=1, help="How many of the worst structures are listed.")]
Seed = Annotated[int, typer.Option(help="Of the rotations and of the bootstrap.")]


def evaluate(
    model: Annotated[Path, typer.Argument(help="Model file or folder of a run.", show_default=False)],
    data: Annotated[str, typer.Argument(help=DATA_HELP, show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder for report.html, pictures, JSON and npz.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this JSON file.")] = None,
    rotations: Annotated[bool, typer.Option("--rotations", help="Audit rotations and reflections.")] = False,
    worst: Worst = 10,
    name: Annotated[str | None, typer.Option(help="Name of the model in tables.", show_default="its file")] = None,
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
    stress_key: StressKey = None,
    config_type_key: TypeKey = "config_type",
    units: Units = "",
    energy_only: EnergyOnly = False,
    batch: Batch = 32,
    device: Device = "cpu",
    precision: Precision = None,
    seed: Seed = 0,
) -> None:
    """Errors of a model: MAE, RMSE, Q95, Q99 and MAX, in all, per element and per configuration type."""
    keys = KeysConfig(energy=energy_key, forces=forces_key, stress=stress_key, config_type=config_type_key)
    require = ("energy",) if energy_only else ("energy", "forces")
    check_writable(out, json)
    potential = load(model, device, precision)
    structures = read(data, keys, parsed_units(units), require)
    found = evaluated(potential, model, name or model_name(model), structures, require, batch, worst, rotations, seed)
    show(found.report.tables() + ([found.audit.table()] if found.audit else []))
    if found.audit is not None:
        typer.echo(found.audit.summary())
    warn_of_offset(found)
    if json is not None:
        found.report.write_json(json, **extra_entries(found, data))
    if out is not None:
        write_folder(out, [found], data)
        found.report.write_json(out / "errors.json", **extra_entries(found, data))
        typer.echo(f"wrote {out / 'report.html'}")


def compare(
    models: Annotated[
        list[Path],
        typer.Argument(help="Two or more: model files, folders of runs, or errors-*.npz of earlier evaluations."),
    ],
    data: Annotated[str | None, typer.Option(help=DATA_HELP, show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report.html, pictures, JSON and npz.")] = None,
    rotations: Annotated[bool, typer.Option(help="Audit rotations and reflections of every model.")] = True,
    worst: Worst = 10,
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
    stress_key: StressKey = None,
    config_type_key: TypeKey = "config_type",
    units: Units = "",
    energy_only: EnergyOnly = False,
    batch: Batch = 32,
    device: Device = "cpu",
    precision: Precision = None,
    seed: Seed = 0,
) -> None:
    """Several models on the same structures: differences to the first, and which of them chance could have made."""
    if not 2 <= len(models) <= MAX_MODELS:
        raise ValueError(f"give 2 to {MAX_MODELS} models to compare, not {len(models)}")
    keys = KeysConfig(energy=energy_key, forces=forces_key, stress=stress_key, config_type=config_type_key)
    require = ("energy",) if energy_only else ("energy", "forces")
    check_writable(out, None)
    stored = [path.suffix == ".npz" for path in models]
    if data is None and not all(stored):
        raise ValueError("give --data FILE: models are compared on the structures of one file")
    potentials = [None if old else load(path, device, precision) for path, old in zip(models, stored)]
    structures = read(data, keys, parsed_units(units), require) if data is not None and not all(stored) else []

    from steradian.evaluation.compare import compare as compare_reports
    from steradian.evaluation.errors import ErrorReport
    from steradian.evaluation.report import Evaluated

    found = []
    for path, potential, name in zip(models, potentials, distinct([model_name(path) for path in models])):
        if potential is None:
            found.append(Evaluated(ErrorReport.load(path)))
        else:
            found.append(evaluated(potential, path, name, structures, require, batch, worst, rotations, seed))
    comparison = compare_reports(*[each.report for each in found], seed=seed)
    show([comparison.table()])
    for each in found:
        warn_of_offset(each)
        if each.audit is not None:
            typer.echo(f"{each.report.name}: {each.audit.summary()}")
    if out is not None:
        write_folder(out, found, data or "")
        write_json(out / "comparison.json", {"data": data, **comparison.to_dict()})
        typer.echo(f"wrote {out / 'report.html'}")


# ------------------------------------------------------------------------------------------------------------- inputs


def load(path: Path, device: str, precision: str | None) -> Potential:
    import torch

    from steradian.build import load_potential

    if precision is not None and precision not in PRESETS:
        raise ValueError(f"--precision {precision}: choose {', '.join(PRESETS)}")
    try:
        place = torch.device(device)
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {device}: not available here; try --device cpu") from None
    return load_potential(path, device=place, precision=precision).for_inference(radial_table=False)


def read(data: str, keys: KeysConfig, units: UnitsConfig, require: tuple[str, ...]) -> list[Structure]:
    """Structures of a file, or the test frames of a bundled set."""
    from steradian.data.read import read_structures

    if data.startswith(BUNDLED):
        from steradian.data.load import bundled_file

        return read_structures(bundled_file(data, "test"), require=require)
    return read_structures(Path(data), keys, units, require=require)


def parsed_units(text: str) -> UnitsConfig:
    """Units from "ENERGY,LENGTH" or "ENERGY"."""
    energy, comma, length = (part.strip() for part in text.partition(","))
    return UnitsConfig(energy=energy or None, length=length if comma and length else None)


def model_name(path: Path) -> str:
    """The name of the run where the file is called model.safetensors, else that of the file."""
    path = path.resolve()
    return path.parent.name if path.name == "model.safetensors" else path.stem if path.suffix else path.name


def distinct(names: list[str]) -> list[str]:
    """The names, numbered where one comes more than once."""
    return [
        name if names.count(name) == 1 else f"{name} ({names[: index + 1].count(name)})"
        for index, name in enumerate(names)
    ]


def check_writable(out: Path | None, json: Path | None) -> None:
    """Make the folders of the outputs now, so that an evaluation is not lost for want of one.

    Raises:
        ValueError: a folder cannot be made, or a name is taken by something else.
    """
    if json is not None and json.is_dir():
        raise ValueError(f"--json {json}: is a folder; give the name of a file")
    for folder in (out, json.parent if json is not None else None):
        if folder is None:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{folder}: cannot be used for the results ({error.strerror})") from None


# ------------------------------------------------------------------------------------------------------------ results


def evaluated(
    potential: Potential,
    path: Path,
    name: str,
    structures: list[Structure],
    require: tuple[str, ...],
    batch: int,
    worst: int,
    rotations: bool,
    seed: int,
) -> Evaluated:
    """Errors, audit, training log and settings of one model."""
    from dataclasses import replace

    from steradian.config import dump_config
    from steradian.evaluation import plots
    from steradian.evaluation.errors import evaluate as evaluate_potential
    from steradian.evaluation.report import Evaluated
    from steradian.evaluation.rotations import rotation_audit

    report = evaluate_potential(
        potential, structures, batch=batch, require=require, name=name, num_worst=worst, progress=True
    )
    audit = rotation_audit(potential, structures, seed=seed, batch=batch) if rotations else None
    folder = path if path.is_dir() else path.parent
    log, resolved = folder / "metrics.csv", folder / "config.yaml"
    in_run = path.is_dir() or path.name == "model.safetensors"
    return Evaluated(
        replace(report, bootstrap_seed=seed),
        audit,
        plots.read_metrics(log) if in_run and log.is_file() else {},
        settings_of(potential),
        resolved.read_text(encoding="utf-8") if in_run and resolved.is_file() else dump_config(potential.config),
    )


def settings_of(potential: Potential) -> dict[str, str]:
    """What a reader of a report wants to know of a model."""
    from ase.data import chemical_symbols

    config, statistics = potential.config, potential.statistics
    return {
        "host": config.host.kind,
        "edge gate": config.edge_gate.kind,
        "global mixer": config.global_mixer.kind,
        "parameters": f"{potential.num_parameters:,}",
        "cutoff": f"{potential.cutoff:g} Å",
        "elements": ", ".join(chemical_symbols[number] for number in potential.elements),
        "trained on": f"{statistics.num_frames} structures",
        "precision": potential.policy.name,
    }


def show(tables: list[Table]) -> None:
    """Print tables: with rules and weights in a terminal, as plain text into a file or pipe."""
    if sys.stdout.isatty():
        import rich

        for table in tables:
            rich.print(table.rich())
    else:
        typer.echo("\n".join(table.text() for table in tables))


def warn_of_offset(found: Evaluated) -> None:
    """Say so where energies are further off than any model can be: the units or the level of theory are others."""
    offset = found.report.total.get("energy_per_atom_mae", 0.0)
    if offset > SUSPICIOUS:
        typer.echo(
            f"warning: the energies of {found.report.name} are off by {offset:.3g} eV per atom; are --units those of "
            "the file, and its energies of the level of theory the model was trained on?",
            err=True,
        )


def extra_entries(found: Evaluated, data: str) -> dict[str, Any]:
    entries: dict[str, Any] = {"data": data, "settings": dict(found.settings)}
    if found.audit is not None:
        entries["rotations"] = found.audit.to_dict()
    return entries


def write_json(path: Path, content: dict[str, Any]) -> None:
    import json

    from steradian.checkpoint import write_atomically

    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_folder(out: Path, found: list[Evaluated], data: str) -> None:
    """report.html, report.txt, the pictures as PNG, and the errors of every model as npz."""
    from steradian.checkpoint import write_atomically
    from steradian.evaluation import plots
    from steradian.evaluation.report import write_report

    reports = [each.report for each in found]
    write_report(out / "report.html", found, data=data if data.startswith(BUNDLED) else Path(data).name)
    parts = [text for each in found for text in (each.report.text(), each.audit.table().text() if each.audit else "")]
    write_atomically(out / "report.txt", "\n".join(filter(None, parts)).encode())
    plots.save(plots.parity(reports), out / "parity.png")
    if all(report.arrays.has_forces.any() for report in reports):
        plots.save(plots.violins(reports), out / "force_errors.png")
        plots.save(plots.cumulative_errors(reports), out / "cumulative_errors.png")
        plots.save(plots.element_bars(reports), out / "elements.png")
    for report in reports:
        stem = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in report.name)
        report.save(out / f"errors-{stem}.npz")
