"""What MARA adds to its host: energy + forces and a training step of MACE, with and without, interleaved.

    python benchmarks/mara_overhead.py [--data ../shared/data/3bpa/train_300K.xyz] [--threads 1] [--repeats 15]

The case is the first five frames of 3BPA (135 atoms), MACE with 128 channels, L = 1, l_max = 3, correlation 3, two
layers, cutoff 5 Å, float32; MARA on a 4 x 8 equiangular grid, d = 32, in both layers.
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path

import torch
from settings import interleaved, machine, median_ms, median_ratio, write

from steradian.build import build_potential
from steradian.config import KeysConfig, MACEConfig, MARAConfig, ModelConfig, UnitsConfig
from steradian.data.read import read_structures
from steradian.data.statistics import DatasetStatistics
from steradian.graph import batch_graphs
from steradian.neighbors import make_graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/3bpa/train_300K.xyz"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    frames = read_structures(arguments.data, KeysConfig(), UnitsConfig(), ignore_cell=True)[:5]
    graph = batch_graphs([make_graph(frame, 5.0) for frame in frames])
    graph = dataclasses.replace(graph, energy=None, forces=None)
    elements = tuple(sorted({int(number) for number in graph.numbers}))
    statistics = DatasetStatistics(
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
    models = {
        "MACE": build_potential(ModelConfig(host=host), statistics, seed=0),
        "MACE-MARA": build_potential(ModelConfig(host=host, edge_gate=MARAConfig()), statistics, seed=0),
        "MACE-MARA, node": build_potential(
            ModelConfig(host=host, edge_gate=MARAConfig(where="node")), statistics, seed=0
        ),
    }

    def energy_and_forces(name: str) -> None:
        models[name].eval()(graph)

    def training_step(name: str) -> None:
        prediction = models[name].train()(graph)
        (prediction.interaction_energy.sum() + prediction.forces.square().sum()).backward()
        models[name].zero_grad()

    results = {}
    for label, run in (("energy + forces", energy_and_forces), ("training step", training_step)):
        times = interleaved({name: partial(run, name) for name in models}, arguments.repeats)
        results[label] = {
            name: {"median_ms": median_ms(values), "over_host": median_ratio(values, times["MACE"])}
            for name, values in times.items()
        }
        for name, row in results[label].items():
            print(f"{label:16} {name:16} {row['median_ms']:9.1f} ms  {100 * (row['over_host'] - 1):+6.1f} %")
    path = write(
        "mara_overhead",
        {
            "settings": machine() | {"atoms": graph.num_atoms, "edges": graph.num_edges, "repeats": arguments.repeats},
            "host": host.model_dump(),
            "mara": MARAConfig().model_dump(),
            "results": results,
        },
    )
    print(path)


if __name__ == "__main__":
    main()
