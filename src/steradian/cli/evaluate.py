"""``steradian evaluate`` and ``steradian compare``: errors of models on labelled structures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steradian.cli import common
from steradian.cli.common import BUNDLED, check_json, load, parsed_units, read, results, say, show, write_text
from steradian.config import KeysConfig, dump_config

if TYPE_CHECKING:
    from steradian.evaluation.report import Evaluated
    from steradian.graph.structures import Structure
    from steradian.potential import Potential

__all__ = ["compare", "evaluate"]

SUSPICIOUS = 0.5  # [eV/atom]
MAX_MODELS = 7  # as many colours as readers can tell apart


@dataclass(frozen=True)
class Wanted:
    """What is evaluated and how: structures, labels they must have, and the options of both commands."""

    structures: list[Structure]
    require: tuple[str, ...]
    batch: int
    worst: int
    rotations: bool
    seed: int


def evaluate(
    model: common.Model,
    data: Annotated[str, typer.Argument(help=common.DATA_HELP, show_default=False)],
    out: common.Results = None,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this JSON file.")] = None,
    rotations: Annotated[bool, typer.Option("--rotations", help="Audit rotations and reflections.")] = False,
    worst: common.Worst = 10,
    name: Annotated[str | None, typer.Option(help="Name of the model in tables.", show_default="its file")] = None,
    energy_key: common.EnergyKey = None,
    forces_key: common.ForcesKey = None,
    stress_key: common.StressKey = None,
    config_type_key: common.TypeKey = "config_type",
    units: common.Units = "",
    energy_only: common.EnergyOnly = False,
    batch: common.Batch = 32,
    device: common.Device = "cpu",
    precision: common.Precision = None,
    rotation_average: common.RotationAverage = None,
    seed: common.Seed = 0,
) -> None:
    """Errors of a model: MAE, RMSE, Q95, Q99 and MAX, in all, per element and per configuration type."""
    keys = KeysConfig(energy=energy_key, forces=forces_key, stress=stress_key, config_type=config_type_key)
    require = ("energy",) if energy_only else ("energy", "forces")
    with results(out, check_json(json)):
        potential = load(model, device, precision, rotation_average)
        structures = read(data, keys, parsed_units(units), require)
        wanted = Wanted(structures, require, batch, worst, rotations, seed)
        found = evaluated(potential, model, name or model_name(model), wanted)
        if json is not None:
            found.report.write_json(json, **extra_entries(found, data))
        if out is not None:
            write_folder(out, [found], data)
            found.report.write_json(out / "errors.json", **extra_entries(found, data))
    show(found.report.tables() + ([found.audit.table()] if found.audit else []))
    if found.audit is not None:
        say(found.audit.summary())
    warn_of_offset(found)
    if out is not None:
        say(f"wrote {out / 'report.html'}")


def compare(
    models: Annotated[
        list[Path],
        typer.Argument(help="Two or more: model files, folders of runs, or errors-*.npz of earlier evaluations."),
    ],
    data: Annotated[str | None, typer.Option(help=common.DATA_HELP, show_default=False)] = None,
    out: common.Results = None,
    rotations: Annotated[bool, typer.Option(help="Audit rotations and reflections of every model.")] = True,
    worst: common.Worst = 10,
    energy_key: common.EnergyKey = None,
    forces_key: common.ForcesKey = None,
    stress_key: common.StressKey = None,
    config_type_key: common.TypeKey = "config_type",
    units: common.Units = "",
    energy_only: common.EnergyOnly = False,
    batch: common.Batch = 32,
    device: common.Device = "cpu",
    precision: common.Precision = None,
    seed: common.Seed = 0,
) -> None:
    """Several models on the same structures: differences to the first, and which of them chance could have made."""
    if not 2 <= len(models) <= MAX_MODELS:
        raise ValueError(f"give 2 to {MAX_MODELS} models to compare, not {len(models)}")
    keys = KeysConfig(energy=energy_key, forces=forces_key, stress=stress_key, config_type=config_type_key)
    require = ("energy",) if energy_only else ("energy", "forces")
    stored = [path.suffix == ".npz" for path in models]
    if data is None and not all(stored):
        raise ValueError("give --data FILE: models are compared on the structures of one file")
    with results(out):
        potentials = [None if old else load(path, device, precision) for path, old in zip(models, stored)]
        structures = read(data, keys, parsed_units(units), require) if data is not None and not all(stored) else []
        wanted = Wanted(structures, require, batch, worst, rotations, seed)

        from steradian.evaluation.errors import ErrorReport
        from steradian.evaluation.report import Evaluated
        from steradian.evaluation.report import compare as compare_reports

        found = [
            Evaluated(ErrorReport.load(path)) if potential is None else evaluated(potential, path, name, wanted)
            for path, potential, name in zip(models, potentials, distinct([model_name(path) for path in models]))
        ]
        comparison = compare_reports(*[each.report for each in found], seed=seed)
        if out is not None:
            write_folder(out, found, data or "")
            write_text(out / "comparison.json", {"data": data, **comparison.to_dict()})
    show([comparison.table()])
    for each in found:
        warn_of_offset(each)
        if each.audit is not None:
            say(f"{each.report.name}: {each.audit.summary()}")
    if out is not None:
        say(f"wrote {out / 'report.html'}")


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


def evaluated(potential: Potential, path: Path, name: str, wanted: Wanted) -> Evaluated:
    """Errors, audit, training log and settings of one model."""
    from steradian.evaluation import plots
    from steradian.evaluation.errors import evaluate as evaluate_potential
    from steradian.evaluation.report import Evaluated
    from steradian.evaluation.rotations import rotation_audit

    structures, batch, seed = wanted.structures, wanted.batch, wanted.seed
    report = evaluate_potential(
        potential, structures, batch=batch, require=wanted.require, name=name, num_worst=wanted.worst, progress=True
    )
    audit = rotation_audit(potential, structures, seed=seed, batch=batch) if wanted.rotations else None
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
        **({"mean over rotations": str(potential.rotation_average)} if potential.rotation_average else {}),
    }


def warn_of_offset(found: Evaluated) -> None:
    """Say so where energies are further off than any model can be: the units or the level of theory are others."""
    offset = found.report.total.get("energy_per_atom_mae", 0.0)
    if offset > SUSPICIOUS:
        say(
            f"warning: the energies of {found.report.name} are off by {offset:.3g} eV per atom; are --units those of "
            "the file, and its energies of the level of theory the model was trained on?",
            err=True,
        )


def extra_entries(found: Evaluated, data: str) -> dict[str, Any]:
    entries: dict[str, Any] = {"data": data, "settings": dict(found.settings)}
    if found.audit is not None:
        entries["rotations"] = found.audit.to_dict()
    return entries


def write_folder(out: Path, found: list[Evaluated], data: str) -> None:
    """report.html, report.txt, the pictures as PNG, and the errors of every model as npz."""
    from steradian.evaluation import plots
    from steradian.evaluation.report import write_report

    reports = [each.report for each in found]
    write_report(out / "report.html", found, data=data if data.startswith(BUNDLED) else Path(data).name)
    parts = [text for each in found for text in (each.report.text(), each.audit.table().text() if each.audit else "")]
    write_text(out / "report.txt", "\n".join(filter(None, parts)))
    plots.save(plots.parity(reports), out / "parity.png")
    if all(report.arrays.has_forces.any() for report in reports):
        plots.save(plots.violins(reports), out / "force_errors.png")
        plots.save(plots.cumulative_errors(reports), out / "cumulative_errors.png")
        plots.save(plots.element_bars(reports), out / "elements.png")
    for report in reports:
        stem = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in report.name)
        report.save(out / f"errors-{stem}.npz")
