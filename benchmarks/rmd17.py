"""MACE against MACE-MARA on revised MD17, trained side by side with the same small configuration.

    python benchmarks/rmd17.py train --runs runs/rmd17 [--data ../shared/data/rmd17] [--molecules ethanol aspirin]
    python benchmarks/rmd17.py compare --runs runs/rmd17

``train`` starts one process per model (one thread each) and goes on with what it finds in the folder, so it can be
interrupted and started again. 950 + 50 frames of the training file are used; the test file (1000 frames) is touched by
``compare`` only, which evaluates the best model so far of every run and writes ``benchmarks/results/rmd17_small.json``
and the table ``rmd17_small.md``.
"""

from __future__ import annotations

import argparse
import csv
import json
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
    results: dict[str, dict] = {}
    lines = ["| molecule | model | epochs | hours | E MAE | F MAE | Q95 | Q99 | MAX |", "| --- " * 9 + "|"]
    for molecule in arguments.molecules:
        for label, kind in MODELS.items():
            run = arguments.runs / f"{molecule}_{kind}"
            out = run / "test_errors.json"
            call = [sys.executable, "-m", "steradian", "evaluate", str(run / "model.safetensors")]
            call += [str(arguments.data / f"rmd17_{molecule}_test_01.npz"), "--energy-unit", "kcal/mol"]
            call += ["--rotations", "--json", str(out)]
            subprocess.run(call, check=True, cwd=ROOT)
            with open(run / "metrics.csv") as stream:
                last = list(csv.DictReader(stream))[-1]
            results.setdefault(molecule, {})[label] = {
                "epochs": int(float(last["epoch"])) + 1,
                "hours_wall": round(float(last["time_s"]) / 3600, 3),
                "errors": json.loads(out.read_text()),
            }
    path = write("rmd17_small", {"settings": machine(), "results": results})
    (RESULTS / "rmd17_small.md").write_text("\n".join(lines) + "\n")
    print(path)


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
