"""Models wide enough to round, and a cluster of oxygen and hydrogen, for the tests of precision."""

from __future__ import annotations

import torch

from steradian.build import build_potential
from steradian.config import MACEConfig, ModelConfig, NequIPConfig, O3MPNNConfig, ViSNetConfig
from steradian.data.statistics import DatasetStatistics
from steradian.graph import Graph
from steradian.potential import Potential

HOSTS = {
    "mace": MACEConfig(num_channels=16, cutoff_A=4.0, radial_mlp=[16], message_scale="mean"),
    "nequip": NequIPConfig(num_channels=16, num_layers=2, cutoff_A=4.0, radial_mlp=[16]),
    "o3mpnn": O3MPNNConfig(num_channels=16, cutoff_A=4.0, zero_init=False),
    "visnet": ViSNetConfig(num_channels=16, num_heads=4, num_layers=3, cutoff_A=4.0),
}
STATISTICS = DatasetStatistics((1, 8), {1: -13.6, 8: -2000.0}, avg_num_neighbors=5.0, force_rms=1.3)


def graph(num_atoms: int = 8, dtype: torch.dtype = torch.float64, offset: float = 0.0) -> Graph:
    generator = torch.Generator().manual_seed(3)
    grid = torch.tensor([[i, j, k] for i in range(2) for j in range(2) for k in range(2)], dtype=torch.float64)
    positions = 1.4 * grid[:num_atoms] + 0.2 * torch.randn(num_atoms, 3, generator=generator, dtype=torch.float64)
    receivers, senders = (~torch.eye(num_atoms, dtype=torch.bool)).nonzero(as_tuple=True)
    return Graph(
        positions=(positions + offset).to(dtype),
        numbers=torch.tensor([8, 1] * (num_atoms // 2)),
        senders=senders,
        receivers=receivers,
        shifts=torch.zeros(len(senders), 3, dtype=dtype),
        system=torch.zeros(num_atoms, dtype=torch.int64),
        cell=torch.zeros(1, 3, 3, dtype=dtype),
        pbc=torch.zeros(1, 3, dtype=torch.bool),
        num_systems=1,
    )


def potential(host: str = "mace", precision="float32", host_changes=None, **operators) -> Potential:
    section = HOSTS[host].model_copy(update=host_changes or {})
    config = ModelConfig(host=section, precision=precision, **operators)
    return build_potential(config, STATISTICS, seed=0).eval()
