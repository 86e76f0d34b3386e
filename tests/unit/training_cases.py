"""A toy data set and small run configurations for the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from steradian.config import RunConfig, parse_config

FRAMES = 26
TRAIN, VALIDATION = 20, 6


def morse(positions: np.ndarray) -> tuple[float, np.ndarray]:
    """Energy [eV] and forces [eV/Å] of a Morse potential between all pairs."""
    vectors = positions[:, None] - positions[None]
    lengths = np.linalg.norm(vectors, axis=-1) + np.eye(len(positions))
    decay = np.exp(-1.5 * (lengths - 1.2))
    pair = (1 - decay) ** 2
    np.fill_diagonal(pair, 0.0)
    slope = 2 * (1 - decay) * 1.5 * decay
    np.fill_diagonal(slope, 0.0)
    forces = -(slope / lengths)[..., None] * vectors
    return float(pair.sum() / 2), forces.sum(axis=1)


def toy_frames(count: int = FRAMES, seed: int = 0) -> list[Atoms]:
    """Frames of H3O with Morse labels on top of large energies of the atoms."""
    generator = np.random.default_rng(seed)
    start = np.array([[0.0, 0, 0], [1.0, 0, 0], [-0.3, 1.0, 0], [0.2, -0.4, 1.1]])
    frames = []
    for _ in range(count):
        positions = start + 0.15 * generator.standard_normal(start.shape)
        energy, forces = morse(positions)
        atoms = Atoms("OH3", positions)
        atoms.calc = SinglePointCalculator(atoms, energy=energy - 2000.0, forces=forces)
        frames.append(atoms)
    return frames


def toy_file(folder: Path, count: int = FRAMES) -> Path:
    path = folder / "toy.xyz"
    write(path, toy_frames(count), format="extxyz")
    return path


def toy_sections(folder: Path, name: str = "run") -> dict[str, Any]:
    """Sections of a run that exercises everything a resume must bring back: dropout, accumulation, plateau, average."""
    return {
        "name": name,
        "output": str(folder / "runs"),
        "model": {
            "host": {
                "num_channels": 4,
                "hidden_l": 1,
                "l_max": 1,
                "correlation": 2,
                "cutoff_A": 4.0,
                "radial_mlp": [8],
                "radial": {"num": 4},
            },
            "edge_gate": {
                "kind": "mara",
                "hidden_dim": 4,
                "grid": {"kind": "equiangular", "num_lat": 2, "num_lon": 4},
                "dropout": 0.2,
            },
        },
        "data": {
            "train": str(folder / "toy.xyz"),
            "split": {"train": TRAIN, "validation": VALIDATION},
            "batch": {"graphs": 3},
        },
        "training": {
            "max_epochs": 4,
            "threads": 1,
            "optimizer": {"learning_rate": 0.02, "accumulate": 2},
            "schedule": {"kind": "plateau", "patience": 1, "warmup_steps": 3},
            "monitor": "validation/forces_q95",
            "checkpoint_every_s": 1e-6,
        },
    }


def toy_config(folder: Path, name: str = "run", *overrides: str) -> RunConfig:
    return parse_config(toy_sections(folder, name), overrides)
