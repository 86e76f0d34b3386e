"""Statistics of training sets that do not exist, and small systems, which several files of tests share."""

from __future__ import annotations

import numpy as np

from steradian.data.statistics import DatasetStatistics
from steradian.graph import Graph
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure


def made_up(references: dict[int, float], **changes: object) -> DatasetStatistics:
    """Statistics of a training set of these elements, with reference energies [eV]."""
    usual = {"avg_num_neighbors": 5.0, "force_rms": 1.0, "reference_report": "made up"}
    return DatasetStatistics(tuple(references), references, **{**usual, **changes})


#: For models of H, C and O with random weights.
STATISTICS = made_up({1: -13.0, 6: -1000.0, 8: -2000.0}, num_frames=1)
#: The same three elements without reference energies: what is left is the network's own.
NO_REFERENCES = made_up({1: 0.0, 6: 0.0, 8: 0.0}, avg_num_neighbors=4.0)


def seven_atoms(cutoff: float = 5.0) -> Graph:
    """Seven atoms of H, C and O at random places."""
    positions = np.random.default_rng(3).normal(scale=1.4, size=(7, 3))
    return make_graph(Structure(np.array([6, 1, 8, 1, 6, 1, 1]), positions), cutoff)
