"""Hosts x operators under contract, and the structures they are tried on. A new one is one line in a table."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from steradian.build import build_potential
from steradian.config import (
    EFAConfig,
    HostConfig,
    MACEConfig,
    MARAConfig,
    ModelConfig,
    NequIPConfig,
    O3MPNNConfig,
    ViSNetConfig,
)
from steradian.config.operators import TensorIntegrationConfig
from steradian.data.statistics import DatasetStatistics
from steradian.graph import Graph, batch_graphs
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure
from steradian.operators.base import EdgeGate, SlotSpec
from steradian.operators.mara import ChannelGate
from steradian.potential import Potential
from tests.systems import made_up

CUTOFF = 3.5

HOSTS: dict[str, HostConfig] = {
    "mace": MACEConfig(num_channels=4, hidden_l=1, l_max=2, correlation=3, cutoff_A=CUTOFF, radial_mlp=[8]),
    "mace-agnostic": MACEConfig(
        num_channels=4,
        hidden_l=2,
        l_max=3,
        correlation=2,
        cutoff_A=CUTOFF,
        radial_mlp=[8],
        first_interaction="agnostic",
        interaction="agnostic",
    ),
    "mace-foundation": MACEConfig(
        num_channels=4,
        hidden_l=1,
        l_max=2,
        correlation=2,
        cutoff_A=CUTOFF,
        radial_mlp=[8],
        first_interaction="density",
        interaction="density_residual",
        distance_transform="agnesi",
        pair_repulsion="zbl",
    ),
    "o3mpnn": O3MPNNConfig(num_layers=2, num_channels=4, l_max=2, num_radial=8, cutoff_A=CUTOFF, zero_init=False),
    "o3mpnn-deep": O3MPNNConfig(
        num_layers=3,
        num_channels=4,
        l_max=1,
        num_radial=8,
        cutoff_A=CUTOFF,
        num_post_residual_mlps=1,
        self_interaction=True,
        use_switch=False,
        zero_init=False,
    ),
    "nequip": NequIPConfig(
        num_layers=4, num_channels=4, l_max=1, cutoff_A=CUTOFF, radial_mlp=[8], avg_num_neighbors=1.0
    ),
    "nequip-natural": NequIPConfig(
        num_layers=3,
        num_channels=4,
        l_max=2,
        parity=False,
        cutoff_A=CUTOFF,
        radial_mlp=[8],
        embedding_dim=6,
        avg_num_neighbors=1.0,
    ),
    "visnet": ViSNetConfig(
        num_layers=3, num_channels=16, num_heads=2, l_max=2, cutoff_A=CUTOFF, radial={"num": 8}, vertex=True
    ),
    "visnet-vectors": ViSNetConfig(
        num_layers=3, num_channels=16, num_heads=4, l_max=1, cutoff_A=CUTOFF, radial={"num": 8}
    ),
}

#: factor on the energies of a host whose random weights give small ones, so that symmetries are tested on a signal; or
#: whose larger features give the rules on the sphere larger errors than a tolerance that is absolute
LOUDNESS = {"mace-agnostic": 3.0, "mace-foundation": 0.3, "o3mpnn": 10.0}

SMALL: dict[str, Any] = {"form": "published", "frame": "lab", "hidden_dim": 8, "num_heads": 2, "gate": "published"}
MARA = MARAConfig(**SMALL)
INTRINSIC = MARAConfig(
    form="published", grid={"kind": "lebedev", "num_points": 86}, hidden_dim=8, num_heads=2, gate="published"
)
POLYNOMIAL = MARAConfig(
    form="published",
    kernel="polynomial",
    grid={"kind": "lebedev", "num_points": 110},
    hidden_dim=8,
    num_heads=2,
    gate="published",
)
CHANNELS = MARAConfig(hidden_dim=8)
CHANNELS_ALL = MARAConfig(
    hidden_dim=8,
    heads=2,
    inputs=["scalars", "radial", "projections", "density", "sphere"],
    activation="exp",
    kernel="polynomial",
    grid={"kind": "lebedev", "num_points": 26},
    where="node",
)
# so many points that the rotation error of the rule is below that of rounding
EFA = EFAConfig(
    num_points=110,
    max_length_A=8.0,
    num_features_qk=4,
    periodic=True,
    shell_width_per_A=2.0,
    divide_by=2.0,
    zero_init=False,
)
EFA_TENSORS = EFA.model_copy(update={"tensor_integration": TensorIntegrationConfig(max_degree_sph=1), "layers": [0]})
#: what fills the slots, as sections of the model's configuration
OPERATORS: dict[str, dict[str, Any]] = {
    "none": {},
    "mara-channel": {"edge_gate": CHANNELS},
    "mara-channel-all": {"edge_gate": CHANNELS_ALL},
    "mara": {"edge_gate": MARA},
    "mara-node": {"edge_gate": MARAConfig(where="node", **SMALL)},
    "mara-intrinsic": {"edge_gate": INTRINSIC},
    "mara-polynomial": {"edge_gate": POLYNOMIAL},
    "efa": {"global_mixer": EFA},
    "efa-tensors": {"global_mixer": EFA_TENSORS},
    "both": {"edge_gate": INTRINSIC, "global_mixer": EFA},
}
GATED = [name for name, sections in OPERATORS.items() if "edge_gate" in sections]
GLOBAL = [name for name, sections in OPERATORS.items() if "global_mixer" in sections]
# The published frame is tied to the laboratory axes (specification, section 4): measured, not bounded.
INVARIANT = [name for name in OPERATORS if name not in ("mara", "mara-node")]

STATISTICS = made_up(
    {1: -13.6, 6: -1029.5, 8: -2042.0}, avg_num_neighbors=6.0, energy_shift=0.1, force_rms=1.3, num_frames=1
)


def statistics(host: str) -> DatasetStatistics:
    """Statistics with the host's energy scale."""
    return dataclasses.replace(STATISTICS, force_rms=1.3 * LOUDNESS.get(host, 1.0))


def potential(
    host: str = "mace",
    operator: str = "none",
    dtype: torch.dtype = torch.float64,
    make_gate: Callable[[SlotSpec], EdgeGate | None] | None = None,
) -> Potential:
    """A small potential with random weights; operators have random weights too, so that they do something."""
    config = ModelConfig(
        host=HOSTS[host], precision="float64" if dtype == torch.float64 else "float32", **OPERATORS[operator]
    )
    built = build_potential(config, statistics(host), make_gate=make_gate, seed=3).eval()
    generator = torch.Generator().manual_seed(13)
    for module in built.modules():
        if isinstance(module, ChannelGate):  # which starts neutral; larger ones make models too rough for differences
            module.W_gate.data.normal_(std=0.3, generator=generator)
    return built


def ethanol(seed: int = 0, spread: float = 0.08) -> Structure:
    """Ethanol, distorted so that nothing is symmetric."""
    positions = np.array(
        [
            [1.17, -0.38, 0.00],
            [0.00, 0.56, 0.00],
            [-1.20, -0.22, 0.00],
            [2.11, 0.18, 0.00],
            [1.14, -1.02, 0.89],
            [1.14, -1.02, -0.89],
            [0.05, 1.20, 0.88],
            [0.05, 1.20, -0.88],
            [-1.97, 0.36, 0.00],
        ]
    )
    noise = np.random.default_rng(seed).normal(scale=spread, size=positions.shape)
    numbers = np.array([6, 6, 8, 1, 1, 1, 1, 1, 1])
    return Structure(numbers=numbers, positions=positions + noise)


def crystal(seed: int = 1) -> Structure:
    """A triclinic cell of six atoms, periodic in all directions."""
    generator = np.random.default_rng(seed)
    cell = np.array([[4.1, 0.0, 0.0], [0.7, 3.9, 0.0], [-0.4, 0.6, 4.4]])
    positions = generator.uniform(size=(6, 3)) @ cell
    return Structure(
        numbers=np.array([6, 8, 1, 1, 6, 1]), positions=positions, cell=cell, pbc=np.array([True, True, True])
    )


def graph(structure: Structure) -> Graph:
    return make_graph(structure, CUTOFF)


def without_pairs(graph):
    """The graph whose opposite edges are not known."""
    topology = copy.copy(graph.prepared())
    topology._pairs, topology._looked_for_pairs, topology._prepared = None, True, {}
    return dataclasses.replace(graph, topology=topology)


def batch(*structures: Structure) -> Graph:
    return batch_graphs([graph(structure) for structure in structures])


def moved(structure: Structure, matrix: np.ndarray | None = None, shift: np.ndarray | None = None) -> Structure:
    """The structure turned by an orthogonal matrix and translated."""
    matrix = np.eye(3) if matrix is None else matrix
    shift = np.zeros(3) if shift is None else shift
    return dataclasses.replace(
        structure, positions=structure.positions @ matrix.T + shift, cell=structure.cell @ matrix.T
    )


def random_orthogonal(seed: int, improper: bool) -> np.ndarray:
    """A Haar-random rotation, or a rotation times an inversion."""
    generator = np.random.default_rng(seed)
    q, r = np.linalg.qr(generator.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q if (np.linalg.det(q) > 0) != improper else -q
