"""What lies beyond the cutoff: a local network cannot learn it, with attention it can."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steradian.build import build_potential
from steradian.config import EFAConfig, MACEConfig, ModelConfig, O3MPNNConfig
from steradian.graph import batch_graphs
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure
from tests.systems import made_up

CUTOFF = 3.0
STATISTICS = made_up({1: 0.0, 2: 0.0}, avg_num_neighbors=1.0)
HOSTS = {
    "o3mpnn": O3MPNNConfig(num_channels=16, l_max=0, num_radial=8, cutoff_A=CUTOFF),
    "mace": MACEConfig(num_channels=16, hidden_l=1, l_max=1, correlation=2, cutoff_A=CUTOFF, radial_mlp=[16]),
}
ATTENTION = EFAConfig(max_length_A=10.0, num_features_qk=16, num_features_v=8)


def pairs(count, seed):
    """Two charges at random distances beyond the cutoff, in random directions: energy -1 / r."""
    generator = np.random.default_rng(seed)
    distances = generator.uniform(1.05 * CUTOFF, 9.0, size=count)
    directions = generator.normal(size=(count, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    numbers = np.array([1, 2])
    graphs = [
        make_graph(Structure(numbers, np.stack([np.zeros(3), r * u])), CUTOFF, dtype=torch.float32)
        for r, u in zip(distances, directions)
    ]
    forces = np.stack([directions, -directions], axis=1) / distances[:, None, None] ** 2
    return batch_graphs(graphs), torch.tensor(-1 / distances), torch.tensor(forces.reshape(-1, 3), dtype=torch.float32)


def trained_error(config, steps, rate=0.01):
    """Relative root mean square error of forces on new pairs after training on others."""
    potential = build_potential(config, STATISTICS, seed=0).train()
    graph, energies, forces = pairs(32, seed=0)
    optimizer = torch.optim.Adam(potential.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / steps))
    for _ in range(steps):
        found = potential(graph)
        loss = (found.energy - energies).square().mean() + 30 * (found.forces - forces).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    graph, _, forces = pairs(64, seed=1)
    found = potential.eval()(graph).forces
    return ((found - forces).square().mean() / forces.square().mean()).sqrt().item()


@pytest.mark.parametrize(("host", "rate", "bound"), [("o3mpnn", 0.01, 0.1), ("mace", 0.03, 0.4)])
def test_the_force_between_two_atoms_beyond_the_cutoff(host, rate, bound):
    local = trained_error(ModelConfig(host=HOSTS[host]), steps=20)
    assert local == 1.0, "atoms that are no neighbours feel no force in a local model"
    assert trained_error(ModelConfig(host=HOSTS[host], global_mixer=ATTENTION), 300, rate) < bound
