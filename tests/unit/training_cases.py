"""A toy data set and small run configurations for the tests of training."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from steradian.build import load_potential
from steradian.config import RunConfig, dump_config, parse_config
from steradian.training.record import RunDirectory, read_state

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
                "message_scale": "mean",
            },
            "edge_gate": {
                "kind": "mara",
                "form": "published",
                "frame": "lab",
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


# ---------------------------------------------------------------------------------------------- runs and their records


def rows_without_time(directory: RunDirectory) -> list[dict[str, str]]:
    with open(directory.metrics, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["time_s"]
    return rows


def assert_same(first: object, second: object, where: str = "state") -> None:
    """Equal to the last bit, whatever is nested in it."""
    if isinstance(first, torch.Tensor):
        assert isinstance(second, torch.Tensor), where
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert isinstance(second, dict), where
        assert first.keys() == second.keys(), where
        for key in first:
            if key != "elapsed_s":
                assert_same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list | tuple):
        assert isinstance(second, list | tuple), where
        assert len(first) == len(second), where
        for index, (left, right) in enumerate(zip(first, second)):
            assert_same(left, right, f"{where}[{index}]")
    else:
        assert first == second, where


def assert_same_run(whole: RunDirectory, other: RunDirectory) -> None:
    assert_same(read_state(whole.state), read_state(other.state))
    assert rows_without_time(whole) == rows_without_time(other)
    left, right = load_potential(whole.model).state_dict(), load_potential(other.model).state_dict()
    assert_same(left, right)


def start(folder: Path, name: str) -> tuple[subprocess.Popen[str], RunDirectory]:
    """A run in a process of its own."""
    config = toy_config(folder, name)
    file = folder / f"{name}.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "steradian", "train", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return process, RunDirectory(config.output / config.name)


def wait_for_step(process: subprocess.Popen[str], directory: RunDirectory, step: int) -> None:
    """Wait until a state in the middle of an epoch, at this step or later, is on the disk."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if directory.state.exists():
            position = read_state(directory.state)["position"]
            if position["step"] >= step and position["batch"] > 0:
                return
        time.sleep(0.002)
    raise AssertionError("the run did not get there in time")
