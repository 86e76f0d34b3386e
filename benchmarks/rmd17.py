"""MACE against MACE-MARA on revised MD17, trained side by side with the same small configuration.

    python benchmarks/rmd17.py train --runs runs/rmd17 [--data ../shared/data/rmd17] [--molecules ethanol aspirin]
    python benchmarks/rmd17.py compare --runs runs/rmd17

``train`` starts one process per model (one thread each) and goes on with what it finds in the folder, so it can be
interrupted and started again. 950 + 50 frames of the training file are used; the test file (1000 frames) is touched by
``compare`` only, which evaluates the best model so far of every run and writes ``benchmarks/results/rmd17_small.json``
and the tables ``rmd17_small.txt``.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path

from settings import RESULTS, ROOT, machine, write

MODELS = {"MACE": "mace", "MACE-MARA": "mace_mara"}


def command(molecule: str, kind: str, data: Path, runs: Path, extra: list[str]) -> list[str]:
    name = f"{molecule}_{kind}"
    if (runs / name / "last.ckpt").exists():
        return [sys.executable, "-m", "steradian", "train", "--resume", str(runs / name), *extra]
    if (runs / name).exists():
        extra = ["--overwrite", *extra]
    config = ROOT / "configs" / f"rmd17_{molecule}_{kind}.yaml"
    overrides = {
        "name": name,
        "output": runs,
        "data.train": data / f"rmd17_{molecule}_train_01.npz",
        "training.threads": 1,
    }
    settings = [part for key, value in overrides.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "steradian", "train", str(config), *settings, *extra]


def train(arguments: argparse.Namespace) -> None:
    arguments.runs.mkdir(parents=True, exist_ok=True)
    running = []
    for molecule in arguments.molecules:
        for kind in MODELS.values():
            log = open(arguments.runs / f"{molecule}_{kind}.out", "a")  # noqa: SIM115 (the process writes to it)
            extra = [part for override in arguments.set for part in ("--set", override)]
            call = command(molecule, kind, arguments.data.resolve(), arguments.runs.resolve(), extra)
            running.append(subprocess.Popen(call, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT))
    sys.exit(max(abs(process.wait()) for process in running))


def compare(arguments: argparse.Namespace) -> None:
    from steradian.build import load_potential
    from steradian.config import KeysConfig, UnitsConfig, load_config
    from steradian.data.files import read_structures
    from steradian.evaluation.errors import evaluate
    from steradian.evaluation.report import compare as compare_reports
    from steradian.evaluation.rotations import rotation_audit

    results: dict[str, dict] = {}
    text = []
    for molecule in arguments.molecules:
        path = arguments.data / f"rmd17_{molecule}_test_01.npz"
        structures = read_structures(path, KeysConfig(), UnitsConfig(energy="kcal/mol"), ignore_cell=True)
        reports, entry = [], {}
        for label, kind in MODELS.items():
            run = arguments.runs / f"{molecule}_{kind}"
            potential = load_potential(run)
            report = evaluate(potential, structures, name=label, progress=False)
            audit = rotation_audit(potential, structures)
            with open(run / "metrics.csv") as stream:
                rows = list(csv.DictReader(stream))
            entry[label] = {
                "epochs": len(rows),
                "hours_wall": round(float(rows[-1]["time_s"]) / 3600, 3),
                "config": load_config(run / "config.yaml").model_dump(mode="json", exclude={"data", "output"}),
                "test_errors": report.to_dict(),
                "rotation_audit": audit.to_dict(),
                "validation_forces_mae": [round(float(row["validation/forces_mae"]), 6) for row in rows],
            }
            reports.append(report)
            hours = entry[label]["hours_wall"]
            text.append(f"{molecule}, {label}: {len(rows)} epochs, {hours} h wall; {audit.summary()}")
        comparison = compare_reports(*reports)
        results[molecule] = {"models": entry, "comparison": comparison.to_dict()}
        text += ["", comparison.table().text(), ""]
    path = write("rmd17_small", {"settings": machine(), "results": results})
    (RESULTS / "rmd17_small.txt").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text), path, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["train", "compare"])
    parser.add_argument("--runs", type=Path, default=Path("runs/rmd17"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data/rmd17"))
    parser.add_argument("--molecules", nargs="+", default=["ethanol", "aspirin"])
    parser.add_argument("--set", action="append", default=[], help="override of the configuration, KEY=VALUE")
    arguments = parser.parse_args()
    {"train": train, "compare": compare}[arguments.action](arguments)


if __name__ == "__main__":
    main()
