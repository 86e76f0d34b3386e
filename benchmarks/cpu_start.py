"""What the first call of a process costs: code made (cold cache), code loaded (warm cache), and calls after that.

    python benchmarks/cpu_start.py [--repeats 3]

The case is MACE with 128 channels, L = 1, l_max = 3, correlation 3 (that of ``cpu_mace.py``) on one molecule of nine
atoms, so that making code is all that counts; with and without MARA; energy + forces and a training step. Every figure
is of a fresh process; importing the package is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

TASKS = ("energy + forces", "training step")


def first_calls(task: str, gated: bool) -> list[float]:
    """Seconds of the first three calls, in this process."""
    import torch
    from ase.build import molecule

    from steradian.build import build_potential
    from steradian.config import MACEConfig, MARAConfig, ModelConfig, NoGate
    from steradian.data.statistics import DatasetStatistics
    from steradian.graph.neighbors import make_graph
    from steradian.interfaces.ase import _structure

    torch.set_num_threads(1)
    numbers = DatasetStatistics(
        elements=(1, 6, 8),
        atom_references=dict.fromkeys((1, 6, 8), 0.0),
        avg_num_neighbors=8.0,
        energy_shift=0.0,
        force_rms=1.0,
        energy_std=1.0,
        num_frames=1,
        reference_report="zero",
    )
    host = MACEConfig(num_channels=128, hidden_l=1, l_max=3, correlation=3, cutoff_A=5.0)
    config = ModelConfig(host=host, edge_gate=MARAConfig(form="published", frame="lab") if gated else NoGate())
    model = build_potential(config, numbers, seed=0)
    model.requires_grad_(task == "training step")
    graph = make_graph(_structure(molecule("CH3CH2OH")), 5.0)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        prediction = model(graph)
        if task == "training step":
            (prediction.interaction_energy.sum() + prediction.forces.square().sum()).backward()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(task: str, gated: bool, repeats: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"STERADIAN_CACHE": folder, "OMP_NUM_THREADS": "1"}
        call = [sys.executable, __file__, "--child", json.dumps([task, gated])]
        runs = [
            json.loads(subprocess.run(call, env=environment, check=True, capture_output=True, text=True).stdout)
            for _ in range(1 + repeats)
        ]
    return {
        "cold_s": round(runs[0][0], 3),
        "warm_s": round(statistics.median(run[0] for run in runs[1:]), 3),
        "later_s": round(statistics.median(run[2] for run in runs[1:]), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(first_calls(*arguments.child)))
        return
    from settings import machine, write

    results: dict[str, Any] = {}
    for gated in (False, True):
        for task in TASKS:
            name = f"{'MACE-MARA' if gated else 'MACE'}, {task}"
            results[name] = measure(task, gated, arguments.repeats)
            print(f"{name:30} " + "   ".join(f"{key} {value}" for key, value in results[name].items()), flush=True)
    print(write("cpu_start", {"settings": machine() | {"repeats": arguments.repeats}, "results": results}))


if __name__ == "__main__":
    main()
