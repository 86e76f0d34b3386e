"""Time and memory of the EFA block and of its network, beside the published timing of the JAX reference.

    python benchmarks/efa_speed.py block      [--sizes 128 512 2048 8192]
    python benchmarks/efa_speed.py network    [--data ../shared/data/efa]
    python benchmarks/efa_speed.py growth     [--sizes 1000 10000 100000 1000000]
    python benchmarks/efa_speed.py basis      [--sizes 128 512 2048]

* block: degree 1, 32 features for input, queries, keys and values, 50 or 86 points, float32; forward, and forward +
  gradient by positions; one system, and 16 systems of 32 atoms. Atoms fill a ball at the density of water; "far apart"
  at a density so low that all waves of the rule are needed (fewer functions span the waves over a small system).
* network: energy and forces of 32 clusters of 32 atoms, two layers, 128 features, with and without EFA (random
  weights).
* growth: the block on ever more atoms, forward + gradient, far apart; peak memory of a process each. By sums at every
  size (below some thousand atoms all pairs are less work, and are taken elsewhere).
* basis: how many functions take the place of the waves in float32, and what that changes: the block in float64 with
  the float32 basis against all waves, and in float32 against that.

One core; the smallest processor time of several runs (other processes may share the machine). The JAX numbers were
taken by its authors' code on another processor with more arithmetic (128 GFLOP/s in products of matrices; see
``cpu_roofline.py`` for this one); they are the better of two software stacks.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from settings import machine, write

from steradian.build import build_potential
from steradian.config import EFAConfig, ModelConfig, O3MPNNConfig
from steradian.data.statistics import DatasetStatistics
from steradian.equivariant.irreps import natural_degrees
from steradian.graph import batch_graphs
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure
from steradian.operators.efa import cpu as efa_cpu
from steradian.operators.efa.operator import EuclideanFastAttention, Systems
from steradian.operators.efa.rules import RuleWaves

#: milliseconds of the JAX reference: (atoms, systems, points) -> forward, forward + gradient; better of two stacks
JAX_BLOCK = {
    (128, 1, 50): (10.3, 34.9),
    (128, 1, 86): (17.5, 64.5),
    (512, 1, 50): (42.0, 156.0),
    (512, 1, 86): (92.7, 274.6),
    (2048, 1, 50): (294.5, 970.0),
    (2048, 1, 86): (509.9, 1746.0),
    (8192, 1, 50): (1786.5, 5357.6),
    (8192, 1, 86): (3177.8, 10323.0),
    (128, 4, 50): (888.8, 1220.6),
    (512, 16, 50): (3784.3, 7677.9),
}
JAX_NETWORK = {"with EFA": 1664.0, "without": 1104.0}


def best_ms(run: Callable[[], object], least_s: float = 1.0) -> float:
    """Smallest processor time of a call."""
    run()
    best, start = math.inf, time.perf_counter()
    count = 0
    while count < 3 or time.perf_counter() - start < least_s:
        before = time.thread_time()
        run()
        best, count = min(best, time.thread_time() - before), count + 1
    return 1e3 * best


#: atoms per Å^3: water, and so few that phases are all over the circle
DENSITIES = {False: 0.1, True: 1e-6}


def block_runs(
    num_atoms: int, num_systems: int, num_points: int, far_apart: bool = False
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The block without and with the gradient by positions."""
    block, features, positions, systems, cotangent = block_problem(num_atoms, num_systems, num_points, far_apart)

    def forward() -> object:
        with torch.no_grad():
            return block(features, positions, systems)

    def gradient() -> object:
        x = positions.clone().requires_grad_(True)
        y = block(features, x, systems)
        return torch.autograd.grad(y, x, cotangent)

    return forward, gradient


def block_problem(num_atoms: int, num_systems: int, num_points: int, far_apart: bool = False) -> tuple:
    """The block, features, positions, systems, and a cotangent."""
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="a system is about")  # large ones are beyond what the rule resolves
    frequency = math.pi if num_points == 50 else 2 * math.pi
    config = EFAConfig(num_points=num_points, max_frequency=frequency, max_length_A=30.0)
    block = EuclideanFastAttention(config, natural_degrees(1), 32).requires_grad_(False)
    features, cotangent = torch.randn(num_atoms, 4, 32), torch.randn(num_atoms, 4, 32)
    radius = (3 * num_atoms / num_systems / (4 * math.pi * DENSITIES[far_apart])) ** (1 / 3)
    directions = torch.nn.functional.normalize(torch.randn(num_atoms, 3), dim=1)
    positions = radius * torch.rand(num_atoms, 1) ** (1 / 3) * directions
    systems = Systems((num_atoms // num_systems,) * num_systems)
    return block, features, positions, systems, cotangent


def measure_block(sizes: list[int]) -> list[dict]:
    rows = []
    cases = [(size, 1, points, apart) for size in sizes for points in (50, 86) for apart in (False, True)]
    cases += [(128, 4, 50, False), (512, 16, 50, False)]
    titles = f"{'forward':>10} {'JAX':>9} {'x':>6} {'gradient':>10} {'JAX':>9} {'x':>6}"
    print(f"{'atoms':>6} {'systems':>7} {'points':>6} {'far':>4} {titles}  [ms]")
    for case in cases:
        forward, gradient = (best_ms(run) for run in block_runs(*case))
        jax = JAX_BLOCK.get(case[:3], (math.nan, math.nan))
        ratios = [theirs / ours for theirs, ours in zip(jax, (forward, gradient))]
        shown = f"{case[0]:6} {case[1]:7} {case[2]:6} {'yes' if case[3] else 'no':>4}"
        print(f"{shown} {forward:10.2f} {jax[0]:9.1f} {ratios[0]:6.1f} {gradient:10.2f} {jax[1]:9.1f} {ratios[1]:6.1f}")
        rows.append(dict(zip(("atoms", "systems", "points", "far_apart"), case)) | {
            "forward_ms": round(forward, 3), "gradient_ms": round(gradient, 3),
            "jax_over_ours": [round(ratio, 2) for ratio in ratios],
        })  # fmt: skip
    return rows


def batch_over_one(rows: list[dict]) -> list[float]:
    """Time of 16 systems of 32 atoms over that of one of 512, forward and gradient."""
    found = {(row["atoms"], row["systems"]): row for row in rows if row["points"] == 50 and not row["far_apart"]}
    batch, one = found[512, 16], found[512, 1]
    return [round(batch[key] / one[key], 3) for key in ("forward_ms", "gradient_ms")]


def measure_network(data: Path) -> dict[str, dict[str, float]]:
    with np.load(data / "3D_cluster_32_atoms_radius_5.npz") as file:
        positions = file["positions"][:32].astype(np.float64)
    graph = batch_graphs([make_graph(Structure(np.ones(32, dtype=int), x), 5.0) for x in positions])
    statistics = DatasetStatistics(
        elements=(1,), atom_references={1: 0.0}, avg_num_neighbors=1.0, energy_shift=0.0, force_rms=1.0,
        energy_std=1.0, num_frames=1, reference_report="zero",
    )  # fmt: skip
    host = O3MPNNConfig(num_channels=128, num_layers=2, l_max=1, cutoff_A=5.0, zero_init=False)
    mixer = EFAConfig(max_degree=0, num_features_qk=16, num_features_v=32, zero_init=False)
    results = {}
    for name, config in (
        ("with EFA", ModelConfig(host=host, global_mixer=mixer)),
        ("without", ModelConfig(host=host)),
    ):
        potential = build_potential(config, statistics, seed=0)
        potential.eval()
        evaluation = best_ms(lambda p=potential: p(graph))

        def step(p=potential) -> None:
            prediction = p(graph)
            (prediction.energy.square().mean() + prediction.forces.square().mean()).backward()
            p.zero_grad()

        potential.train()
        training = best_ms(step)
        jax = JAX_NETWORK[name]
        ratio = jax / evaluation
        print(
            f"{name:9} energy + forces {evaluation:.1f} ms (JAX {jax:.0f}, x {ratio:.1f}), training {training:.1f} ms"
        )
        results[name] = {
            "atoms": graph.num_atoms, "edges": graph.num_edges, "energy_forces_ms": round(evaluation, 2),
            "jax_over_ours": round(ratio, 2), "training_step_ms": round(training, 2),
        }  # fmt: skip
    return results


def measure_growth(sizes: list[int]) -> dict:
    rows = []
    for size in sizes:
        command = [sys.executable, __file__, "one", "--sizes", str(size)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(rows[-1], flush=True)
    times, atoms = (np.log([row[key] for row in rows]) for key in ("gradient_s", "atoms"))
    exponent = float(np.polyfit(atoms, times, 1)[0])
    print(f"time grows as atoms to the power {exponent:.3f}")
    return {"rows": rows, "exponent": round(exponent, 3)}


def measure_basis(sizes: list[int]) -> list[dict]:
    rows = []
    for size in sizes:
        for points in (50, 86):
            row: dict = {"atoms": size, "points": points, "waves": 16 * points}
            block, features, positions, systems, cotangent = block_problem(size, 1, points)
            found = {}
            for name, dtype, tolerance in (
                ("exact", torch.float64, None), ("basis", torch.float64, 2.0**-21), ("float32", torch.float32, None)
            ):  # fmt: skip
                block.to(dtype)
                rule, x = block.bands[0].rule, positions.to(dtype).requires_grad_(True)
                made = RuleWaves(rule.directions, rule.weights, tolerance)
                vars(rule)["waves"] = made
                y = block(features.to(dtype), x, systems)
                found[name] = y.detach(), torch.autograd.grad(y, x, cotangent.to(dtype))[0]
            centred = positions - positions.mean(0)
            row["functions"] = made.rows(efa_cpu._steps(centred, block.frequencies)).starts[-1]
            for name in ("basis", "float32"):
                errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(found[name], found["exact"])]
                row[f"error_of_{name}"] = [float(f"{float(error):.1e}") for error in errors]
            rows.append(row)
            print(row, flush=True)
    return rows


def one_size(num_atoms: int) -> None:
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    efa_cpu.pairs_are_cheaper = lambda *shape: False  # type: ignore[assignment]
    _, gradient = block_runs(num_atoms, 1, 50, far_apart=True)
    if num_atoms < 50_000:
        seconds = best_ms(gradient) / 1e3
    else:
        before = time.thread_time()
        gradient()
        seconds = time.thread_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = {"atoms": num_atoms, "gradient_s": round(seconds, 4), "peak_GiB": round(peak / 2**20, 3)}
    print(json.dumps(row | {"before_GiB": round(base / 2**20, 3)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["block", "network", "growth", "basis", "one"])
    parser.add_argument("--sizes", type=int, nargs="*")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/efa"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "one":
        one_size(arguments.sizes[0])
        return
    content: dict = {"settings": machine()}
    if arguments.what == "block":
        content["rows"] = rows = measure_block(arguments.sizes or [128, 512, 2048, 8192])
        if arguments.sizes is None or 512 in arguments.sizes:
            content["batch_of_16_over_one_of_512"] = batch_over_one(rows)
            print("16 systems of 32 atoms over one of 512:", content["batch_of_16_over_one_of_512"])
    elif arguments.what == "basis":
        content["rows"] = measure_basis(arguments.sizes or [128, 512, 2048])
    elif arguments.what == "network":
        content["results"] = measure_network(arguments.data)
    else:
        content |= measure_growth(arguments.sizes or [1000, 10_000, 100_000, 1_000_000])
    print(write(f"efa_speed_{arguments.what}", content))


if __name__ == "__main__":
    main()
