"""How far every kernel of the main case is from what this core can do: bytes and FLOPs counted, against its roofline.

    python benchmarks/cpu_roofline.py [--data ../shared/data/3bpa/train_300K.xyz] [--repeats 9]

The case is that of ``cpu_mace.py``: five frames of 3BPA, 128 channels, L = 1, l_max = 3, correlation 3, float32, one
thread, with MARA on a 4 x 8 grid in both layers. The roof is measured first: FLOP/s of PyTorch's product of 2048 x 2048
matrices, bytes/s of copying an array far larger than the caches. FLOPs of a program are two per term, row and channel
(what its straight-line code executes); of MARA's kernels the operations written in ``operators/mara/cpu_code.py`` per
exponential, with 14 for the exponential itself. Bytes are every input read once and every output written once, so reads
that must be repeated count against the kernel. The limit is the larger of FLOPs / peak and bytes / bandwidth.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from settings import ROOT, machine, write

from steradian.build import build_potential
from steradian.config import KeysConfig, MACEConfig, MARAConfig, ModelConfig, UnitsConfig
from steradian.data.files import read_structures
from steradian.data.statistics import DatasetStatistics
from steradian.graph import batch_graphs
from steradian.graph.neighbors import make_graph
from steradian.operators.mara import cpu as mara_cpu
from steradian.polynomials import cpu as apply

#: Floating-point operations per exponential of the gate's kernels (operators/mara/cpu_code.py).
SPHERE_FLOPS = {"value": 26, "slopes": 42, "tables": 42, "tangent": 78}


def roof(repeats: int) -> dict[str, float]:
    """Best FLOP/s and bytes/s of one core."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    source, target = torch.ones(2**26), torch.empty(2**26)
    flops, rates = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        middle = time.perf_counter()
        target.copy_(source)
        flops.append(2 * 2048**3 / (middle - start))
        rates.append(2 * source.nbytes / (time.perf_counter() - middle))
    return {"flops_per_s": max(flops), "bytes_per_s": max(rates)}


class Recorder:
    """Times, FLOPs and bytes of kernel calls by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.work: dict[str, tuple[float, float]] = {}
        self.run_pass, self.run_gate = apply._run_pass, mara_cpu._run

    def program(self, one: Any, *given: Any) -> None:
        start = time.perf_counter()
        self.run_pass(one, *given)
        taken = time.perf_counter() - start
        _, _, _, num_rows, inputs, outputs, channels = given
        # an input that the pass does not use is not read
        used = {
            source[0]
            for node in range(len(one.program.graph.source))
            if (source := one.program.graph.source[node]) is not None
        }
        read = sum(value.nbytes for place, value in enumerate(inputs) if place in used)
        written = sum(value.nbytes for value in outputs)
        names = " x ".join(slot.operand.name for slot in one.program.inputs)
        outs = ", ".join(slot.operand.name for slot in one.program.outputs)
        name = f"{names} -> {outs} [{num_rows} rows, {one.weight} terms]"
        self.seconds[name].append(taken)
        self.work[name] = (2.0 * one.weight * num_rows * channels, read + written)

    def gate(self, kind: str, constants: Any, vectors: Any, nodes: Any, tables: Any, *more: Any) -> Any:
        start = time.perf_counter()
        results = self.run_gate(kind, constants, vectors, nodes, tables, *more)
        taken = time.perf_counter() - start
        exponentials = vectors.shape[0] * nodes.shape[1] * (nodes.shape[2] - 1) ** 2
        bytes_ = sum(value.nbytes for value in (vectors, nodes, tables, *results))
        name = f"MARA gate, {kind}"
        self.seconds[name].append(taken)
        self.work[name] = (SPHERE_FLOPS[kind] * exponentials, bytes_)
        return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data/3bpa/train_300K.xyz")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    frames = read_structures(arguments.data, KeysConfig(), UnitsConfig(), ignore_cell=True)[:5]
    graph = batch_graphs([make_graph(frame, 5.0) for frame in frames])
    elements = tuple(sorted({int(number) for number in graph.numbers}))
    numbers = DatasetStatistics(
        elements=elements,
        atom_references=dict.fromkeys(elements, 0.0),
        avg_num_neighbors=graph.num_edges / graph.num_atoms,
        energy_shift=0.0,
        force_rms=1.0,
        energy_std=1.0,
        num_frames=5,
        reference_report="zero",
    )
    host = MACEConfig(num_channels=128, hidden_l=1, l_max=3, correlation=3, cutoff_A=5.0)
    model = build_potential(
        ModelConfig(host=host, edge_gate=MARAConfig(form="published", frame="lab")), numbers, seed=0
    )

    def training_step() -> None:
        prediction = model.train()(graph)
        (prediction.interaction_energy.sum() + prediction.forces.square().sum()).backward()
        model.zero_grad()

    limits = roof(arguments.repeats)
    results = {}
    for label, run in (("energy + forces", lambda: model.eval()(graph)), ("training step", training_step)):
        model.requires_grad_(label == "training step")
        run()
        recorder = Recorder()
        apply._run_pass, mara_cpu._run = recorder.program, recorder.gate
        try:
            for _ in range(arguments.repeats):
                run()
        finally:
            apply._run_pass, mara_cpu._run = recorder.run_pass, recorder.run_gate
        results[label] = report(label, recorder, limits, arguments.repeats)
    write("cpu_roofline", {"settings": machine() | {"repeats": arguments.repeats}, "roof": limits, "results": results})


def report(label: str, recorder: Recorder, limits: dict[str, float], repeats: int) -> list[dict[str, Any]]:
    """Rows of the table, slowest first."""
    rows = []
    for name, seconds in recorder.seconds.items():
        flops, bytes_ = recorder.work[name]
        limit = max(flops / limits["flops_per_s"], bytes_ / limits["bytes_per_s"])
        median = statistics.median(seconds)
        rows.append(
            {
                "kernel": name,
                "calls_per_step": len(seconds) / repeats,
                "median_ms": round(1e3 * median, 3),
                "MFLOP": round(flops / 1e6, 2),
                "MiB": round(bytes_ / 2**20, 2),
                "bound": "compute" if flops / limits["flops_per_s"] > bytes_ / limits["bytes_per_s"] else "memory",
                "time_over_roofline": round(median / limit, 2),
            }
        )
    rows.sort(key=lambda row: -row["median_ms"] * row["calls_per_step"])
    print(f"\n{label}: peak {limits['flops_per_s'] / 1e9:.0f} GFLOP/s, {limits['bytes_per_s'] / 1e9:.1f} GB/s")
    for row in rows:
        print(
            f"{row['median_ms']:8.3f} ms x {row['calls_per_step']:<4g} {row['MFLOP']:8.1f} MFLOP {row['MiB']:7.1f} MiB"
            f"  {row['bound']:7} {row['time_over_roofline']:6.2f} x roofline  {row['kernel']}"
        )
    return rows


if __name__ == "__main__":
    main()
