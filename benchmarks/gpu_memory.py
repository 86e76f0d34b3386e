"""Largest number of atoms that fit on a GPU, and memory per atom, for every model.

    python benchmarks/gpu_memory.py [--models MACE "MACE L=2" ViSNet NequIP] [--tasks forces training] [--limit 2000000]
    python benchmarks/gpu_memory.py --device cpu --smoke

Periodic boxes of water at 0.1 atoms per Å^3, cutoff 5 Å, float32, energy + forces with frozen weights, and a training
step (energy + forces + gradients of all weights). Two sizes say how memory grows; from the size that they predict
steps of 5 to 7 % lead to the largest that fits. Every size runs in a process of its own, so that one that fails leaves
nothing behind. Memory per atom is the difference of the peaks of the largest and the smallest size over that in atoms.
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


def one(kind: str, size: int, task: str, gate: bool, arguments: argparse.Namespace) -> dict[str, Any]:
    """One call in this process, its time and its peak of memory; on a CPU the peak is not known."""
    from steradian.execution.backend_benchmark import prepare_backend

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
    """Two sizes say how memory grows; the size they predict is tried, then smaller ones, or larger ones till one fails.

    Raises:
        RuntimeError: not even the first size fits.
    """
    fits: list[dict[str, Any]] = []
    for size in (9, 17) if arguments.smoke else (3000, 6000):
        found = attempt(kind, size, task, gate, arguments)
        if isinstance(found, str):
            raise RuntimeError(found)
        fits.append(found)
    slope = (fits[1]["peak_bytes"] - fits[0]["peak_bytes"]) / (fits[1]["atoms"] - fits[0]["atoms"])
    why = "the limit given"
    if slope > 0:
        room = torch.cuda.get_device_properties(torch.device(arguments.device)).total_memory
        size = min(int(0.95 * room / slope), arguments.limit)
        while size > 6000:
            found = attempt(kind, size, task, gate, arguments)
            if isinstance(found, str):
                why = f"{size} atoms: {found}"
                if fits[-1]["atoms"] > 6000:
                    break
                size = int(0.93 * size)
                continue
            fits.append(found)
            if size == arguments.limit:
                break
            size = min(int(1.05 * size), arguments.limit)
    best, small = fits[-1], fits[0]
    return {
        "largest_atoms": best["atoms"],
        "s": best["s"],
        "peak_GiB": round(best["peak_bytes"] / 2**30, 3),
        "bytes_per_atom": round((best["peak_bytes"] - small["peak_bytes"]) / (best["atoms"] - small["atoms"]), 1),
        "bytes_per_edge": round(best["peak_bytes"] / best["edges"], 1),
        "ended_by": why,
        "tried": fits,
    }


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
