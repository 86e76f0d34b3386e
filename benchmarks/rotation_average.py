"""How much less the energy of a model tied to the laboratory axes turns with the molecule, averaged over rotations.

A small MACE with MARA's published form, random weights, an open gate, float64; a rattled ethanol molecule under random
rotations. Random weights say how the change falls with the number of rotations, not how large it is in a trained model.

    OMP_NUM_THREADS=1 python benchmarks/rotation_average.py
"""

from __future__ import annotations

import time

import numpy as np
import torch
from ase.build import molecule
from settings import machine, write

from steradian.build import build_potential
from steradian.config import parse_config
from steradian.data.statistics import DatasetStatistics
from steradian.evaluation.rotations import random_orthogonal, rotated
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure

COUNTS = (None, 4, 12, 24, 60)
TURNS = 24


def main() -> None:
    gate = {"kind": "mara", "form": "published", "frame": "lab"}
    host = {"kind": "mace", "num_channels": 16, "l_max": 2, "message_scale": "mean"}
    config = parse_config({"model": {"host": host, "precision": "float64", "edge_gate": gate}}).model
    statistics = DatasetStatistics(
        elements=(1, 6, 8), atom_references={1: -13.6, 6: -1030.0, 8: -2040.0}, avg_num_neighbors=8.0, energy_shift=0.0,
        force_rms=1.0, energy_std=1.0, num_frames=1, reference_report="made up",
    )  # fmt: skip
    potential = build_potential(config, statistics, seed=0).for_inference(False)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in potential.named_parameters():
        if name.endswith("W_gate"):
            parameter.data.normal_(generator=generator)
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.1, seed=1)
    graph = make_graph(Structure.from_ase(atoms), config.host.cutoff_A)
    rows = []
    for count in COUNTS:
        potential.average_rotations(count)
        energies, forces, seconds = [], [], []
        for turn in random_orthogonal(TURNS, seed=2):
            start = time.process_time()
            found = potential(rotated(graph, turn))
            seconds.append(time.process_time() - start)
            assert found.forces is not None
            energies.append(float(found.interaction_energy))
            forces.append((found.forces @ turn).numpy())
        changes = np.stack(forces) - np.mean(forces, axis=0)
        rows.append(
            {
                "rotations": count or 1,
                "energy_spread_eV_per_atom": float(np.std(energies) / len(atoms)),
                "force_change_rms_eV_per_A": float(np.sqrt(np.mean(np.square(changes).sum(-1)))),
                "processor_ms": round(1e3 * float(np.median(seconds)), 1),
            }
        )
        print(rows[-1], flush=True)
    write("rotation_average", {"machine": machine(), "turns": TURNS, "molecule": "ethanol, rattled", "rows": rows})


if __name__ == "__main__":
    main()
