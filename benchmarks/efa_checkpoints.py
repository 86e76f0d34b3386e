"""Errors of the released checkpoints of the EFA paper on whole data files, against those of the JAX reference.

    python benchmarks/efa_checkpoints.py [--fixtures ../shared/fixtures/efa] [--data ../shared/data/efa]

Prediction = model + shift of the labels (mean of the training split for the clusters, sum of atomic shifts for SN2).
The 16-atom cluster models have a constant energy offset; "centred" is the error without the mean error. SN2 has no
force labels.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from settings import machine, write

from steradian.graph import batch_graphs
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure
from steradian.interfaces.efa_jax import potential_from_reference

#: energy MAE, centred energy MAE and force MAE of the reference (float32), whole files
REFERENCE = {
    "cluster16_efa_T2": (0.021423, 0.001388, 0.00131),
    "cluster16_mp_T2": (0.021223, 0.001450, 0.00140),
    "cluster16_mp_T3": (0.022884, 0.000917, 0.00122),
    "cluster32_mp_T2": (0.678845, 0.680497, 0.12043),
    "cluster32_mp_T3": (0.181833, 0.181501, 0.05799),
    "cluster32_mp_T4": (0.090549, 0.090393, 0.03292),
    "cumulene_efa_T3": (0.015176, 0.016823, 0.01490),
    "sn2_efa_rcut5": (0.000565, 0.000439, None),
    "sn2_mp_rcut10": (0.037158, 0.037253, None),
}


def evaluate(path: Path, data: Path, dtype: torch.dtype) -> dict[str, float | None]:
    """Errors of one checkpoint."""
    with np.load(path) as file:
        hyper, meta = (json.loads(str(file[name])) for name in ("hp", "meta"))
        parameters = {name.removeprefix("params/"): file[name] for name in file.files if name.startswith("params/")}
        shift = float(file["label/energy_shift"][0])
    with np.load(data / f"{meta['dataset']}.npz") as file:
        numbers, positions = file["atomic_numbers"].astype(int), file["positions"].astype(np.float64)
        energies, forces = file["energy"].astype(np.float64).reshape(-1), file["forces"].astype(np.float64)
    elements = sorted(set(numbers.flatten().tolist()))
    potential = potential_from_reference(hyper, parameters, dict.fromkeys(elements, 0.0), dtype).for_inference()
    graphs = [make_graph(Structure(z, x), potential.cutoff) for z, x in zip(numbers, positions)]
    size, found_energies, found_forces = max(1, 1024 // numbers.shape[1]), [], []
    start = time.perf_counter()
    for first in range(0, len(graphs), size):
        prediction = potential(batch_graphs(graphs[first : first + size]))
        found_energies.append(prediction.energy.numpy())
        found_forces.append(prediction.forces.double().numpy())
    seconds = time.perf_counter() - start
    error = np.concatenate(found_energies) + shift - energies
    difference = np.concatenate(found_forces) - forces.reshape(-1, 3)
    has_forces = bool(forces.any())
    return {
        "structures": len(graphs),
        "energy_mae": float(np.abs(error).mean()),
        "energy_mae_centred": float(np.abs(error - error.mean()).mean()),
        "energy_mean_error": float(error.mean()),
        "forces_mae": float(np.abs(difference).mean()) if has_forces else None,
        "forces_rmse": float(np.sqrt((difference**2).mean())) if has_forces else None,
        "seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixtures", type=Path, default=Path("../shared/fixtures/efa"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data/efa"))
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(REFERENCE))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    results = {}
    print(f"{'checkpoint':18} {'E MAE':>10} {'(JAX)':>10} {'centred':>10} {'(JAX)':>10} {'F MAE':>9} {'(JAX)':>9}")
    for name in arguments.only:
        row = evaluate(arguments.fixtures / f"pretrained_{name}.npz", arguments.data, getattr(torch, arguments.dtype))
        energy, centred, forces = REFERENCE[name]
        results[name] = row | {"reference": {"energy_mae": energy, "energy_mae_centred": centred, "forces_mae": forces}}
        shown = ("", "") if forces is None else (f"{row['forces_mae']:9.5f}", f"{forces:9.5f}")
        print(
            f"{name:18} {row['energy_mae']:10.6f} {energy:10.6f} {row['energy_mae_centred']:10.6f} {centred:10.6f} "
            f"{shown[0]:>9} {shown[1]:>9}   {row['seconds']} s",
            flush=True,
        )
    print(write(f"efa_checkpoints_{arguments.dtype}", {"settings": machine(), "results": results}))


if __name__ == "__main__":
    main()
