"""Energy profiles and parity plots of the released checkpoints of the EFA paper, with and without EFA.

    python benchmarks/efa_pictures.py [--fixtures ../shared/fixtures/efa] [--data ../shared/data/efa] [--out FOLDER]

* ``efa_cumulene.png``: energy as the ends of nonatetraene turn against each other (11 Å apart, cutoff 4 Å);
* ``efa_sn2.png``: the reaction F- + CH3I, with EFA and a cutoff of 5 Å, without and with 10 Å;
* ``efa_clusters.png``: forces of clusters of 16 and 32 atoms against the labels, and their errors.

Checkpoints that are not in the folder of fixtures are left out, and named.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot as plt
from settings import RESULTS

from steradian.graph import batch_graphs
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure
from steradian.interfaces.efa_jax import potential_from_reference

LABEL, WITH, WITHOUT, THIRD, FOURTH = "black", "tab:red", "tab:blue", "tab:cyan", "tab:green"


def predict(
    path: Path, data: Path, every: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Energies and forces of every n-th structure: predicted and labels; and the reaction coordinate or positions."""
    with np.load(path) as file:
        hyper, meta = (json.loads(str(file[name])) for name in ("hp", "meta"))
        parameters = {name.removeprefix("params/"): file[name] for name in file.files if name.startswith("params/")}
        shift = float(file["label/energy_shift"][0])
    with np.load(data / f"{meta['dataset']}.npz") as file:
        arrays = {name: file[name][::every] for name in file.files}
    numbers, positions = arrays["atomic_numbers"].astype(int), arrays["positions"].astype(np.float64)
    elements = sorted(set(numbers.flatten().tolist()))
    potential = potential_from_reference(hyper, parameters, dict.fromkeys(elements, 0.0)).for_inference()
    graphs = [make_graph(Structure(z, x), potential.cutoff) for z, x in zip(numbers, positions)]
    size = max(1, 1024 // numbers.shape[1])
    found = [potential(batch_graphs(graphs[first : first + size])) for first in range(0, len(graphs), size)]
    energies = np.concatenate([prediction.energy.numpy() for prediction in found]) + shift
    forces = np.concatenate([prediction.forces.numpy() for prediction in found]).reshape(positions.shape)
    coordinate = arrays.get("reaction_coordinate", positions)
    return energies, forces, arrays["energy"].reshape(-1).astype(float), arrays["forces"], coordinate


def present(path: Path) -> bool:
    """Whether a checkpoint is at hand; says so if it is not."""
    if not path.exists():
        print(f"no {path.name}: left out of the picture")
    return path.exists()


def cumulene(fixtures: Path, data: Path, out: Path) -> None:
    figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for name, label, colour in (("efa_T3", "with EFA", WITH), ("mp_T3", "without", WITHOUT)):
        path = fixtures / f"pretrained_cumulene_{name}.npz"
        if present(path):
            energies, _, labels, _, positions = predict(path, data)
            ends = [positions[:, 2] - positions[:, 1], positions[:, 11] - positions[:, 10]]
            cosine = np.abs((ends[0] * ends[1]).sum(1) / np.prod([np.linalg.norm(end, axis=1) for end in ends], axis=0))
            angle = np.degrees(np.arccos(cosine.clip(0, 1)))
            order = np.argsort(angle)
            axes.plot(angle[order], energies[order] - labels.min(), color=colour, label=label)
            barrier, true, error = np.ptp(energies), np.ptp(labels), np.abs(energies - labels).mean()
            print(f"cumulene {label}: barrier {barrier:.3f} eV (label {true:.3f}), MAE {error:.4f}")
    axes.plot(angle[order], labels[order] - labels.min(), color=LABEL, linestyle="--", label="label")
    axes.set(xlabel="angle between the terminal CH$_2$ groups [°]", ylabel="energy [eV]", title="Cumulene, cutoff 4 Å")
    axes.legend()
    figure.savefig(out / "efa_cumulene.png", dpi=150)


def sn2(fixtures: Path, data: Path, out: Path) -> None:
    figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
    models = (
        ("efa_rcut5", "with EFA, 5 Å", WITH),
        ("mp_rcut5", "without, 5 Å", THIRD),
        ("mp_rcut10", "without, 10 Å", WITHOUT),
    )
    for name, label, colour in models:
        path = fixtures / f"pretrained_sn2_{name}.npz"
        if present(path):
            energies, _, labels, _, coordinate = predict(path, data)
            axes.plot(coordinate, energies, color=colour, label=label)
            print(f"SN2 {label}: MAE {np.abs(energies - labels).mean():.4f} eV")
    axes.plot(coordinate, labels, color=LABEL, linestyle="--", label="label")
    axes.set(xlabel="reaction coordinate [Å]", ylabel="energy [eV]", title="F$^-$ + CH$_3$I")
    axes.legend()
    figure.savefig(out / "efa_sn2.png", dpi=150)


def clusters(fixtures: Path, data: Path, out: Path) -> None:
    figure, panels = plt.subplots(2, 2, figsize=(8, 6), layout="constrained", sharex="col", height_ratios=(2, 1))
    for axes, errors, size in zip(*panels, (16, 32)):
        for name, label, colour in (
            ("mp_T2", "without, 2 layers", WITHOUT),
            ("mp_T3", "without, 3 layers", FOURTH),
            ("mp_T4", "without, 4 layers", THIRD),
            ("efa_T2", "with EFA, 2 layers", WITH),
        ):
            path = fixtures / f"pretrained_cluster{size}_{name}.npz"
            if present(path):
                _, forces, _, labels, _ = predict(path, data, every=10)
                error = np.sqrt(((forces - labels) ** 2).mean())
                style = {"linestyle": "", "marker": ".", "markersize": 1.5, "color": colour}
                axes.plot(labels.ravel(), forces.ravel(), label=f"{label}: RMSE {error:.4f}", **style)
                errors.plot(labels.ravel(), (forces - labels).ravel(), **style)
                print(f"{size}-atom clusters {label}: force RMSE {error:.4f} on every 10th structure")
        low, high = axes.get_xlim()
        axes.plot([low, high], [low, high], color=LABEL, linewidth=0.5)
        errors.axhline(0.0, color=LABEL, linewidth=0.5)
        axes.set(ylabel="force component, predicted", title=f"Clusters of {size} atoms")
        errors.set(xlabel="force component, label (the data's units)", ylabel="predicted - label")
        axes.legend(markerscale=6, fontsize="small", loc="upper left")
    figure.savefig(out / "efa_clusters.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixtures", type=Path, default=Path("../shared/fixtures/efa"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data/efa"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for draw in (cumulene, sn2, clusters):
        draw(arguments.fixtures, arguments.data, arguments.out)


if __name__ == "__main__":
    main()
