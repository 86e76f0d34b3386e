"""Opposite edges share what depends on the distance alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from steradian.build import build_potential
from steradian.config import MACEConfig, MARAConfig, ModelConfig, NequIPConfig, ViSNetConfig
from steradian.graph import batch_graphs
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure
from steradian.graph.topology import Topology
from tests.systems import made_up

CUTOFF = 3.5
HOSTS = {
    "mace": MACEConfig(num_channels=4, hidden_l=1, l_max=2, correlation=2, cutoff_A=CUTOFF, radial_mlp=[8]),
    "nequip": NequIPConfig(num_layers=3, num_channels=4, l_max=1, cutoff_A=CUTOFF, radial_mlp=[8]),
    "visnet": ViSNetConfig(num_layers=4, num_channels=16, num_heads=2, cutoff_A=CUTOFF, radial={"num": 8}, vertex=True),
}
STATISTICS = made_up({1: 0.0, 6: 0.0, 8: 0.0}, avg_num_neighbors=6.0)


def molecule(seed=0):
    random = np.random.default_rng(seed)
    positions = 1.3 * np.array(list(np.ndindex(2, 2, 2)), dtype=float) + random.uniform(-0.2, 0.2, (8, 3))
    return make_graph(Structure(random.choice([1, 6, 8], 8), positions), CUTOFF)


def crystal():
    """Two atoms in a small cell: neighbours of an atom are several images of it and of the other one."""
    cell = np.array([[2.6, 0.0, 0.0], [0.4, 2.4, 0.0], [-0.3, 0.5, 2.8]])
    positions = np.array([[0.1, 0.2, 0.3], [1.4, 1.1, 1.5]])
    return make_graph(Structure(np.array([6, 8]), positions, cell=cell, pbc=np.ones(3, dtype=bool)), CUTOFF)


@pytest.mark.parametrize("graph", [molecule(), crystal(), batch_graphs([molecule(1), crystal(), molecule(2)])])
def test_every_pair_is_an_edge_and_its_opposite(graph):
    pairs = graph.prepared().pairs
    assert len(pairs.first) * 2 == graph.num_edges
    assert torch.equal(torch.bincount(pairs.of_edge), torch.full((len(pairs.first),), 2))
    assert torch.equal(pairs.of_edge[pairs.first], torch.arange(len(pairs.first)))
    order = torch.argsort(pairs.of_edge, stable=True).view(-1, 2)
    one, other = order.unbind(1)
    assert torch.equal(graph.senders[one], graph.receivers[other])
    assert torch.equal(graph.receivers[one], graph.senders[other])
    assert torch.equal(graph.shifts[one], -graph.shifts[other])


def test_a_one_sided_list_has_no_pairs_and_a_mixed_one_pairs_of_one_edge():
    graph = molecule()

    def kept(mask):
        names = ("senders", "receivers", "shifts")
        return replace(graph, **{name: getattr(graph, name)[mask] for name in names})

    assert kept(graph.senders < graph.receivers).prepared().pairs is None
    mixed = kept((graph.senders < graph.receivers) | (torch.arange(graph.num_edges) % 5 > 0))
    pairs = mixed.prepared().pairs
    assert sorted(set(torch.bincount(pairs.of_edge).tolist())) == [1, 2]


def test_another_list_with_the_same_senders_is_not_mistaken():
    graph = molecule()
    first = graph.prepared().pairs
    assert graph.prepared().pairs is first
    other = replace(graph, shifts=torch.ones_like(graph.shifts))
    assert other.prepared().pairs is None  # no edge has an opposite any more


@pytest.mark.parametrize("gate", ["none", "mara", "channels"])
@pytest.mark.parametrize("name", list(HOSTS))
@pytest.mark.parametrize("training", [False, True])
def test_hosts_give_the_same_numbers_without_pairs(name, gate, training, monkeypatch):
    gates = {
        "mara": MARAConfig(form="published", frame="lab", hidden_dim=8, gate="published"),
        "channels": MARAConfig(hidden_dim=8, inputs=["scalars", "radial", "projections", "density"]),
    }
    sections = {"edge_gate": gates[gate]} if gate in gates else {}
    potential = build_potential(
        ModelConfig(host=HOSTS[name], precision="float64", **sections), STATISTICS, seed=1
    ).train(training)
    for key, parameter in potential.named_parameters():
        if key.endswith("W_gate"):  # a channel gate starts neutral
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(4))

    def numbers():
        graph = batch_graphs([molecule(3), crystal()])
        found = potential(graph, stress=True)
        if not training:
            return [found.energy, found.forces, found.stress]
        loss = found.energy.sum() + found.forces.square().sum()
        return list(torch.autograd.grad(loss, list(potential.parameters()), allow_unused=True))

    together = numbers()
    monkeypatch.setattr(Topology, "pairs", None)
    for one, other in zip(together, numbers()):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-12 * max(1.0, float(other.abs().max())))
