"""steradian: machine-learned force fields with geometric attention.

The names below are imported on first use, so that ``import steradian`` (and the command line) is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steradian.build import build_potential, load_potential, save_potential
    from steradian.config import RunConfig, load_config, parse_config
    from steradian.data.files import read_structures
    from steradian.evaluation.errors import evaluate
    from steradian.execution.steps import Runner
    from steradian.graph import Edges, Graph, Prediction, batch_graphs
    from steradian.graph.neighbors import make_graph
    from steradian.graph.structures import Structure
    from steradian.interfaces.ase import SteradianCalculator
    from steradian.operators.mara.gate import MARA, SEAttention
    from steradian.potential import Potential
    from steradian.training.run import fit

_HOME = {
    "build_potential": "steradian.build",
    "load_potential": "steradian.build",
    "save_potential": "steradian.build",
    "RunConfig": "steradian.config",
    "load_config": "steradian.config",
    "parse_config": "steradian.config",
    "read_structures": "steradian.data.files",
    "Structure": "steradian.graph.structures",
    "evaluate": "steradian.evaluation.errors",
    "Runner": "steradian.execution.steps",
    "Edges": "steradian.graph",
    "Graph": "steradian.graph",
    "Prediction": "steradian.graph",
    "batch_graphs": "steradian.graph",
    "SteradianCalculator": "steradian.interfaces.ase",
    "make_graph": "steradian.graph.neighbors",
    "MARA": "steradian.operators.mara.gate",
    "SEAttention": "steradian.operators.mara.gate",
    "Potential": "steradian.potential",
    "fit": "steradian.training.run",
}

__all__ = [
    "Edges",
    "Graph",
    "MARA",
    "Potential",
    "Prediction",
    "RunConfig",
    "Runner",
    "SEAttention",
    "SteradianCalculator",
    "Structure",
    "batch_graphs",
    "build_potential",
    "evaluate",
    "fit",
    "load_config",
    "load_potential",
    "make_graph",
    "parse_config",
    "read_structures",
    "save_potential",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'steradian' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
