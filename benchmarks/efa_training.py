"""The O(3) network with EFA trained from scratch on the 16-atom clusters of the EFA paper.

    python benchmarks/efa_training.py train --run runs/efa_clusters [--data ../shared/data/efa/...npz] [--epochs 330]
    python benchmarks/efa_training.py report --run runs/efa_clusters

``train`` uses ``configs/efa_clusters.yaml`` (1500 + 500 + 500 frames) with batches of 8 and an average of the weights,
on one thread, and goes on with a run that was interrupted. ``report`` evaluates the best model (smallest force error in
validation) on the 500 test frames and writes ``benchmarks/results/efa_training.json`` and the curve ``.png``, beside
the errors of the published checkpoint on its own 500 test frames. As for the checkpoints, energy errors are also given
without their mean: data and checkpoints differ by a constant.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from settings import RESULTS, ROOT, machine, write

from steradian import load_potential
from steradian.config import RunConfig
from steradian.data.load import load_dataset
from steradian.graph import batch_graphs
from steradian.graph.neighbors import make_graph

#: Of the released checkpoint ``cluster16_efa_T2`` on its test frames, as ``efa_checkpoints.py`` has them [eV, eV/Å].
PUBLISHED = {"energy_mae_centred": 0.001462, "forces_mae": 0.00134, "forces_rmse": 0.00204}


def train(arguments: argparse.Namespace) -> None:
    run = arguments.run.resolve()
    program = [sys.executable, "-m", "steradian", "train"]
    if (run / "last.ckpt").exists():
        raise SystemExit(subprocess.call([*program, "--resume", str(run)]))
    settings: dict[str, Any] = {
        "name": run.name,
        "output": run.parent,
        "data.train": arguments.data.resolve(),
        "data.batch.graphs": 8,
        "training.threads": 1,
        "training.max_epochs": arguments.epochs,
        "training.ema_decay": 0.999,
    }
    chosen = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    raise SystemExit(subprocess.call([*program, str(ROOT / "configs" / "efa_clusters.yaml"), *chosen]))


def errors(run: Path) -> dict[str, float]:
    """Of the best model on the test frames [eV, eV/Å]."""
    config = RunConfig.model_validate(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
    frames = load_dataset(config.data).test
    potential = load_potential(run / "model.safetensors")
    energies, forces = [], []
    for start in range(0, len(frames), 50):
        graph = batch_graphs([make_graph(frame, potential.cutoff) for frame in frames[start : start + 50]])
        prediction = potential(graph)
        energies.append((prediction.energy - graph.energy).numpy())
        forces.append((prediction.forces - graph.forces).numpy())
    energy, force = np.concatenate(energies), np.concatenate(forces)
    return {
        "frames": len(frames),
        "energy_mae": float(np.abs(energy).mean()),
        "energy_mae_centred": float(np.abs(energy - energy.mean()).mean()),
        "forces_mae": float(np.abs(force).mean()),
        "forces_rmse": float(np.sqrt(np.square(force).mean())),
    }


def report(arguments: argparse.Namespace) -> None:
    import matplotlib.pyplot as plt

    torch.set_num_threads(1)
    with (arguments.run / "metrics.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    curve = {
        name: [float(row[key]) for row in rows]
        for name, key in (
            ("minutes", "time_s"),
            ("forces_mae", "validation/forces_mae"),
            ("energy_mae", "validation/energy_mae"),
        )
    }
    curve["minutes"] = [round(seconds / 60, 2) for seconds in curve["minutes"]]
    found = errors(arguments.run)
    ratios = {key: round(found[key] / value, 3) for key, value in PUBLISHED.items()}
    content = {"settings": machine(), "epochs": len(rows), "test": found, "published": PUBLISHED, "ratio": ratios}
    write("efa_training", content | {"validation": curve})
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.semilogy(curve["minutes"], 1e3 * np.array(curve["forces_mae"]), label="validation")
    axes.axhline(1e3 * PUBLISHED["forces_mae"], color="0.4", linestyle="--", label="published checkpoint, test")
    axes.axhline(1.5e3 * PUBLISHED["forces_mae"], color="0.7", linestyle=":", label="1.5 times that")
    ticks = [1, 2, 5, 10, 20, 50]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("wall time [min]")
    axes.set_ylabel("force error, MAE [meV/Å]")
    axes.set_title("Clusters of 16 atoms, O(3) network with EFA")
    axes.legend(frameon=False)
    figure.savefig(RESULTS / "efa_training.png", dpi=150)
    for key, value in PUBLISHED.items():
        print(f"{key:20} {1e3 * found[key]:8.3f} meV(/Å), published {1e3 * value:.3f}: {ratios[key]:.2f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("train", "report"))
    parser.add_argument("--run", type=Path, required=True)
    data = ROOT / "../shared/data/efa/3D_cluster_16_atoms_radius_2point5.npz"
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--epochs", type=int, default=330)
    arguments = parser.parse_args()
    {"train": train, "report": report}[arguments.task](arguments)


if __name__ == "__main__":
    main()
