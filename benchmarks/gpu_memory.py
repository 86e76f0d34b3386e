"""Largest number of atoms that fit on a GPU, and memory per atom, for every model.

    python benchmarks/gpu_memory.py [--models MACE "MACE L=2" ViSNet NequIP] [--tasks forces training] [--limit 2000000]
    python benchmarks/gpu_memory.py --device cpu --smoke

Periodic boxes of water at 0.1 atoms per Å^3, cutoff 5 Å, float32, energy + forces with frozen weights, and a training
step (energy + forces + gradients of all weights). The number of atoms doubles until the GPU is full; then the interval
is halved until it is within 5 %. Every size runs in a process of its own, so that one that fails leaves nothing behind.
Memory per atom is the difference of the peaks of the two largest sizes that fit over their difference in atoms.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch
from gpu_settings import Results, build, graph_of, model_config, parser, synchronise, system

TASKS = ("forces", "training")
CLOSE = 1.05


def one(kind: str, size: int, task: str, gate: bool, arguments: argparse.Namespace) -> dict[str, Any]:
    """One call in this process, its time and its peak of memory; on a CPU the peak is not known."""
    from steradian.kernels import prepare_backend

    device = arguments.device
    small = build(model_config(kind, arguments.smoke, gate), device)
    training = task == "training"
    small.train(training)
    if not training:
        small.for_inference()
    # the choice of kernels is made on a small system, whose memory is given back
    prepare_backend(small, graph_of(system(1200 if not arguments.smoke else 17, periodic=True)), training)
    graph = graph_of(system(size, periodic=True)).to(device)
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    prediction = small(graph, forces=True)
    if training:
        (prediction.interaction_energy.sum() + prediction.forces.square().sum()).backward()
    synchronise(device)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    return {"atoms": size, "edges": graph.num_edges, "peak_bytes": peak, "s": round(time.perf_counter() - start, 3)}


def attempt(kind: str, size: int, task: str, gate: bool, arguments: argparse.Namespace) -> dict[str, Any] | str:
    """The same in a process of its own; a line of its last words where it failed."""
    command = [sys.executable, __file__, "--device", arguments.device, "--one", kind, str(size), task, str(int(gate))]
    command += ["--smoke"] if arguments.smoke else []
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode == 0:
        found: dict[str, Any] = json.loads(answer.stdout.strip().splitlines()[-1])
        return found
    lines = answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"]
    return lines[-1][:300]


def largest(kind: str, task: str, gate: bool, arguments: argparse.Namespace) -> dict[str, Any]:
    """Doubling, then halving."""
    fits: dict[int, dict[str, Any]] = {}
    size, limit = (17, 40) if arguments.smoke else (3000, arguments.limit)
    too_large, why = None, ""
    while True:
        found = attempt(kind, size, task, gate, arguments)
        if isinstance(found, str):
            too_large, why = size, found
        else:
            fits[size] = found
        best = max(fits, default=0)
        if not best and size < 100:
            raise RuntimeError(why)
        if too_large is None and 2 * size > limit or too_large is not None and too_large <= CLOSE * best:
            break
        size = 2 * size if too_large is None else (best + too_large) // 2 if best else size // 4
    row: dict[str, Any] = {"largest_atoms": best, "s": fits[best]["s"], "peak_GiB": fits[best]["peak_bytes"] / 2**30}
    row |= {"ended_by": why or "the limit given", "memory_was_full": "out of memory" in why.lower()}
    if len(fits) > 1:
        a, b = sorted(fits)[-2:]
        row["bytes_per_atom"] = round((fits[b]["peak_bytes"] - fits[a]["peak_bytes"]) / (b - a), 1)
    row["bytes_per_edge"] = round(fits[best]["peak_bytes"] / fits[best]["edges"], 1)
    return row | {"tried": list(fits.values())}


def main() -> None:
    options = parser(__doc__, "gpu_memory")
    options.add_argument("--models", nargs="*", default=["MACE", "MACE-MARA", "MACE L=2", "ViSNet", "NequIP"])
    options.add_argument("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    options.add_argument("--limit", type=int, default=2_000_000)
    options.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.one:
        kind, size, task, gate = arguments.one
        print(json.dumps(one(kind, int(size), task, gate == "1", arguments)))
        return
    models = arguments.models[:1] if arguments.smoke else arguments.models
    results = Results(arguments)
    for task in arguments.tasks:
        for model in models:
            kind, gate = model.removesuffix("-MARA"), model.endswith("-MARA")
            results.measure(f"{model}, {task}", lambda k=kind, t=task, g=gate: largest(k, t, g, arguments))
    print(results.path)


if __name__ == "__main__":
    main()
