"""MACE, NequIP and ViSNet with and without MARA on revised MD17 aspirin, trained for the same small number of epochs.

    python benchmarks/hosts_rmd17.py train --runs runs/hosts [--data ../shared/data/rmd17] [--epochs 25]
    python benchmarks/hosts_rmd17.py compare --runs runs/hosts

``train`` trains the six models one after the other on one thread, with the configurations ``configs/rmd17_aspirin_*``:
950 + 50 frames of the training file, the same split, batches, loss and learning-rate schedule (each host has the
learning rate of its configuration). The budget is the number of epochs; processor times are written down. A run that
is interrupted goes on where it was. The test file (1000 frames) is touched by ``compare`` only, which evaluates the
best model of every run and writes ``benchmarks/results/hosts_rmd17.json``, ``.txt`` and ``.png``.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from settings import RESULTS, ROOT, machine, write

HOSTS = {"MACE": "mace", "NequIP": "nequip", "ViSNet": "visnet"}
MARA = {"model.edge_gate": "{kind: mara, form: published, frame: lab, hidden_dim: 32}"}
MODELS = {
    f"{host}{'-MARA' if gated else ''}": (kind, f"{kind}{'_mara' if gated else ''}", MARA if gated else {})
    for host, kind in HOSTS.items()
    for gated in (False, True)
}


def command(label: str, arguments: argparse.Namespace) -> list[str]:
    """What trains a model, or goes on training it."""
    host, name, overrides = MODELS[label]
    run = arguments.runs.resolve() / name
    program = [sys.executable, "-m", "steradian", "train"]
    if (run / "last.ckpt").exists():
        return [*program, "--resume", str(run)]
    settings: dict[str, Any] = overrides | {
        "name": name,
        "output": arguments.runs.resolve(),
        "data.train": arguments.data.resolve() / "rmd17_aspirin_train_01.npz",
        "training.threads": 1,
        "training.max_epochs": arguments.epochs,
    }
    chosen = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return [*program, str(ROOT / "configs" / f"rmd17_aspirin_{host}.yaml"), "--overwrite", *chosen]


def train(arguments: argparse.Namespace) -> None:
    arguments.runs.mkdir(parents=True, exist_ok=True)
    for label, (_, name, _) in MODELS.items():
        times = arguments.runs / f"{name}.times.json"
        sessions = json.loads(times.read_text()) if times.exists() else []
        if sessions and sessions[-1]["finished"]:
            continue
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with open(arguments.runs / f"{name}.out", "a") as log:
            code = subprocess.run(command(label, arguments), stdout=log, stderr=log, cwd=ROOT, check=False).returncode
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        sessions.append({"processor_s": round(seconds, 1), "finished": code == 0})
        times.write_text(json.dumps(sessions) + "\n")
        if code:
            sys.exit(f"{label}: training ended with {code}; see {arguments.runs / name}.out")


def evaluated(label: str, arguments: argparse.Namespace, structures: list) -> tuple[Any, dict[str, Any]]:
    """Report on the test frames, and the entry of a model in the JSON file."""
    from steradian.build import load_potential
    from steradian.config import load_config
    from steradian.evaluation.errors import evaluate
    from steradian.evaluation.rotations import rotation_audit

    run = arguments.runs / MODELS[label][1]
    potential = load_potential(run)
    report = evaluate(potential, structures, name=label, progress=False)
    with open(run / "metrics.csv") as stream:
        rows = list(csv.DictReader(stream))
    sessions = json.loads((arguments.runs / f"{MODELS[label][1]}.times.json").read_text())
    entry = {
        "parameters": potential.num_parameters,
        "epochs": len(rows),
        "processor_minutes": round(sum(session["processor_s"] for session in sessions) / 60, 1),
        "config": load_config(run / "config.yaml").model_dump(mode="json", exclude={"data", "output"}),
        "test_errors": report.to_dict(),
        "rotation_audit": rotation_audit(potential, structures).to_dict(),
        "validation_forces_mae": [round(float(row["validation/forces_mae"]), 6) for row in rows],
    }
    return report, entry


def compare(arguments: argparse.Namespace) -> None:
    from steradian.config import KeysConfig, UnitsConfig
    from steradian.data.files import read_structures
    from steradian.evaluation.plots import cumulative_errors, save
    from steradian.evaluation.report import compare as compare_reports

    path = arguments.data / "rmd17_aspirin_test_01.npz"
    structures = read_structures(path, KeysConfig(), UnitsConfig(energy="kcal/mol"), ignore_cell=True)
    reports, entries = {}, {}
    for label in MODELS:
        if (arguments.runs / f"{MODELS[label][1]}.times.json").exists():
            reports[label], entries[label] = evaluated(label, arguments, structures)
    pairs = {
        host: compare_reports(reports[host], reports[f"{host}-MARA"]) for host in HOSTS if f"{host}-MARA" in reports
    }
    text = [summary(reports, entries, len(structures)), ""]
    for comparison in pairs.values():
        text += [comparison.table().text(), ""]
    content = {"models": entries, "pairs": {host: comparison.to_dict() for host, comparison in pairs.items()}}
    print("\n".join(text), write("hosts_rmd17", {"settings": machine(), **content}), sep="\n")
    (RESULTS / "hosts_rmd17.txt").write_text("\n".join(text) + "\n", encoding="utf-8")
    save(cumulative_errors(list(reports.values())), RESULTS / "hosts_rmd17.png")


def summary(reports: dict[str, Any], entries: dict[str, dict[str, Any]], count: int) -> str:
    """All models in one table, in meV and meV/Å."""
    from steradian.evaluation.report import FIGURES
    from steradian.evaluation.tables import Table, format_number

    rows = []
    for label, report in reports.items():
        figures = [format_number(1e3 * report.total[name]) for name in FIGURES]
        entry = entries[label]
        rows.append([label, f"{entry['parameters']:,}", f"{entry['processor_minutes']:g}", *figures])
    epochs = " or ".join(str(number) for number in sorted({entry["epochs"] for entry in entries.values()}))
    return Table(
        f"rMD17 aspirin, {count} test frames, after {epochs} epochs of 950 frames",
        ["", "parameters", "processor min", *(head for _, _, head in FIGURES.values())],
        rows,
        note="meV and meV/Å. E MAE per structure, F MAE of components; Q95, Q99 and MAX of the norm of the error "
        "vector of an atom. Budgets are equal in epochs, not in processor time. One seed each.",
    ).text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["train", "compare"])
    parser.add_argument("--runs", type=Path, default=Path("runs/hosts"))
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data/rmd17")
    parser.add_argument("--epochs", type=int, default=25)
    arguments = parser.parse_args()
    {"train": train, "compare": compare}[arguments.action](arguments)


if __name__ == "__main__":
    main()
