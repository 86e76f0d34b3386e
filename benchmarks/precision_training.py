"""Training in `mixed`, with every product in bfloat16, and with weights of bfloat16, against `float32`.

    python benchmarks/precision_training.py train --runs runs/precision [--data ../shared/data] [--sets ethanol 3bpa]
    python benchmarks/precision_training.py report --runs runs/precision

``train`` trains one model after the other and goes on with what it finds in the folder, so it can be interrupted and
started again. Small MACE models (32 channels, L = 1), a cosine schedule of fixed length: ethanol of rMD17 (950 + 50
frames) and 3BPA at 300 K (475 + 25), the same seed and the same batches. ``bfloat16_weights`` computes in float32 but
has no master weights: they are rounded to bfloat16 after every step, as they are where the weights themselves have half
precision. ``report`` evaluates the best model of every run on the test frames, in the
precision it was trained in and in float32, and writes ``benchmarks/results/precision_training.json`` and ``.png``.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import torch
from settings import RESULTS, ROOT, machine, write
from torch.optim.optimizer import register_optimizer_step_post_hook

WIDE = ("radial", "messages", "paths", "contraction", "node", "readout")
PRECISIONS: dict[str, Any] = {
    "float32": "float32",
    "mixed": "mixed",
    "all_bfloat16": {"preset": "float32", "roles": dict.fromkeys(WIDE, "bfloat16")},
    "bfloat16_weights": "float32",
}
EPOCHS = {"ethanol": 60, "3bpa": 40}
TEST_FRAMES = 500


def files(name: str, data: Path) -> tuple[Path, Path, dict[str, Any]]:
    """Training file, test file, units."""
    if name == "3bpa":
        return data / "3bpa/train_300K.xyz", data / "3bpa/test_300K.npz", {}
    folder = data / "rmd17"
    return folder / "rmd17_ethanol_train_01.npz", folder / "rmd17_ethanol_test_01.npz", {"energy": "kcal/mol"}


def configuration(name: str, precision: str, data: Path, runs: Path, seed: int) -> dict[str, Any]:
    train, _, units = files(name, data)
    host = {"kind": "mace", "num_channels": 32, "hidden_l": 1, "l_max": 2, "correlation": 3, "radial_mlp": [64, 64],
            "message_scale": "mean"}  # fmt: skip
    return {
        "name": f"{name}_{precision}_{seed}",
        "output": str(runs),
        "model": {"host": host, "precision": PRECISIONS[precision]},
        "data": {
            "train": str(train),
            "units": units,
            "split": {"validation": 50 if name == "ethanol" else 25, "seed": 1},
            "ignore_cell": True,
        },
        "training": {
            "max_epochs": EPOCHS[name],
            "schedule": {"kind": "cosine"},
            "optimizer": {"learning_rate": 0.01},
            "seed": seed,
            "threads": 1,
        },
    }


def round_weights(optimizer: Any, *_: object) -> None:
    """After a step of the optimiser: the weights have the digits of bfloat16."""
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.copy_(parameter.bfloat16())


def train(arguments: argparse.Namespace) -> None:
    from steradian.config import load_config, parse_config
    from steradian.training.run import fit

    for name in arguments.sets:
        for precision in arguments.precisions:
            content = configuration(name, precision, arguments.data.resolve(), arguments.runs.resolve(), arguments.seed)
            folder = Path(content["output"]) / content["name"]
            started = (folder / "last.ckpt").exists()
            config = load_config(folder / "config.yaml") if started else parse_config(content)
            hook = None
            if precision == "bfloat16_weights":
                hook = register_optimizer_step_post_hook(round_weights)
            result = fit(config, resume=folder if started else None, overwrite=folder.exists() and not started)
            if hook is not None:
                hook.remove()
            print(content["name"], result.reason, result.epochs, "epochs", flush=True)
            if result.reason == "interrupted":
                sys.exit(130)


def errors(run: Path, name: str, data: Path, precision: Any) -> dict[str, float]:
    from steradian.build import load_potential
    from steradian.config import KeysConfig, PrecisionConfig, UnitsConfig
    from steradian.data.files import read_structures
    from steradian.evaluation.errors import evaluate

    _, test, units = files(name, data)
    structures = read_structures(test, KeysConfig(), UnitsConfig(**units), ignore_cell=True)[:TEST_FRAMES]
    given = PrecisionConfig(**precision) if isinstance(precision, dict) else precision
    report = evaluate(load_potential(run, precision=given), structures, progress=False)
    return {key: report.total[key] for key in ("energy_mae", "forces_mae", "forces_rmse", "forces_q95", "forces_max")}


def report(arguments: argparse.Namespace) -> None:
    results: dict[str, Any] = {}
    for name in arguments.sets:
        for precision in arguments.precisions:
            run = arguments.runs / f"{name}_{precision}_{arguments.seed}"
            if not (run / "model.safetensors").exists():
                continue
            with open(run / "metrics.csv", encoding="utf-8") as stream:
                rows = list(csv.DictReader(stream))
            results.setdefault(name, {})[precision] = {
                "epochs": len(rows),
                "of": EPOCHS[name],
                "seconds_wall_on_a_shared_machine": round(float(rows[-1]["time_s"])),
                "test_as_trained": errors(run, name, arguments.data, PRECISIONS[precision]),
                "test_in_float32": errors(run, name, arguments.data, "float32"),
                "train_loss": [float(row["train/loss"]) for row in rows],
                "validation_forces_mae": [float(row["validation/forces_mae"]) for row in rows],
            }
            print(name, precision, json.dumps(results[name][precision]["test_as_trained"]), flush=True)
    path = write("precision_training", {"settings": machine(), "seed": arguments.seed, "results": results})
    picture(results)
    print(path)


def picture(results: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(4.5 * len(results), 3.2), squeeze=False)
    for axis, (name, runs) in zip(axes[0], results.items()):
        for precision, run in runs.items():
            values = [1000 * value for value in run["validation_forces_mae"]]
            axis.semilogy(range(1, len(values) + 1), values, label=precision.replace("_", " "), linewidth=1)
        axis.set(title=name, xlabel="epoch", ylabel="force MAE, validation [meV/Å]")
        axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(RESULTS / "precision_training.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["train", "report"])
    parser.add_argument("--runs", type=Path, default=Path("runs/precision"))
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data")
    parser.add_argument("--sets", nargs="+", choices=EPOCHS, default=list(EPOCHS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    {"train": train, "report": report}[arguments.action](arguments)


if __name__ == "__main__":
    main()
