"""How far the energy turns with the molecule: MARA's published form and the intrinsic one against the number of points.

A small MACE with random weights and an open gate, a rattled ethanol molecule, float64; random rotations and reflections
of the molecule. Random weights say how well a rule converges, not how large the error of a trained model is:
``steradian evaluate`` measures that.

    OMP_NUM_THREADS=1 python benchmarks/mara_rotation.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.build import molecule
from scipy.stats import ortho_group

from steradian.build import build_potential
from steradian.config import ModelConfig, parse_config
from steradian.data.statistics import DatasetStatistics
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure

GATES: dict[str, dict[str, Any]] = {
    "no gate": {"kind": "none"},
    "published, 4 x 8": {"kind": "mara", "form": "published", "frame": "lab"},
    **{
        f"intrinsic exp, {points} points": {
            "kind": "mara",
            "form": "published",
            "grid": {"kind": "lebedev", "num_points": points},
        }
        for points in (14, 26, 38, 50, 86)
    },
    "intrinsic polynomial, 26 points": {
        "kind": "mara",
        "form": "published",
        "kernel": "polynomial",
        "grid": {"kind": "lebedev", "num_points": 26},
    },
}


def rotation_error(gate: dict[str, Any], num_turns: int) -> dict[str, float]:
    """Largest change of the energy [eV per atom] and of the forces, turned back [eV/Å]."""
    host = {"kind": "mace", "num_channels": 16, "l_max": 2, "message_scale": "mean"}
    content = {"model": {"host": host, "precision": "float64", "edge_gate": gate}}
    config: ModelConfig = parse_config(content).model
    references = {1: -13.6, 6: -1030.0, 8: -2040.0}
    statistics = DatasetStatistics(
        elements=tuple(references), atom_references=references, avg_num_neighbors=8.0, energy_shift=0.0, force_rms=1.0,
        energy_std=1.0, num_frames=1, reference_report="made up",
    )  # fmt: skip
    potential = build_potential(config, statistics, seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in potential.named_parameters():
            if name.endswith("W_gate"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.1, seed=1)

    def predict(turn: np.ndarray) -> tuple[float, np.ndarray]:
        turned = atoms.copy()
        turned.set_positions(atoms.get_positions() @ turn.T)
        prediction = potential(make_graph(Structure.from_ase(turned), config.host.cutoff_A))
        return float(prediction.interaction_energy.detach()), prediction.forces.detach().numpy() @ turn

    energy, forces = predict(np.eye(3))
    results = [predict(turn) for turn in ortho_group.rvs(3, size=num_turns, random_state=2)]
    return {
        "energy_eV_per_atom": max(abs(other - energy) for other, _ in results) / len(atoms),
        "forces_eV_per_A": max(float(np.abs(other - forces).max()) for _, other in results),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mara_rotation.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "settings": {"turns": arguments.turns, "molecule": "ethanol, rattled", "weights": "random"}
    }
    result |= {name: rotation_error(gate, arguments.turns) for name, gate in GATES.items()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
