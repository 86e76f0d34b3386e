"""Reading frozen models whose weights are made up again from names and shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from steradian.graph import Graph
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure
from tests.parity import frozen

DATA = Path(__file__).parent / "data"
RELATIVE = 1e-9
LABELS = {"energy", "atom_energies", "forces", "virial", "num_edges"}


def read(package: str, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray], dict, dict]:
    """Hyper-parameters, state dict, structures, and the frozen results of each structure."""
    with np.load(DATA / f"{package}_{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    hyper = json.loads(str(arrays.pop("hyperparameters")))
    entries = json.loads(str(arrays.pop("entries")))
    state = {key: frozen.weight(name, key, tuple(shape), scale) for key, (shape, scale) in entries.items()}
    state |= {key.removeprefix("weights/"): arrays.pop(key) for key in list(arrays) if key.startswith("weights/")}
    structures: dict[str, dict] = {}
    results: dict[str, dict] = {}
    for key, value in arrays.items():
        frame, label = key.split("/")
        (results if label in LABELS else structures).setdefault(frame, {})[label] = value
    return hyper, state, structures, results


def graph_of(frame: dict[str, np.ndarray], cutoff: float) -> Graph:
    return make_graph(Structure(frame["numbers"], frame["positions"], cell=frame["cell"], pbc=frame["pbc"]), cutoff)


def relative(ours: Any, theirs: np.ndarray) -> float:
    """Largest difference over the largest entry, which must be large enough to mean something."""
    largest = np.abs(theirs).max()
    assert largest > 1e-2, "nothing to compare"
    return float(np.abs(np.asarray(ours) - theirs).max() / largest)
