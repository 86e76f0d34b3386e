"""What is particular to one host; what all share is in tests/contract."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from steradian.build import build_potential, save_potential
from steradian.cli.inspect import describe
from steradian.config import MACEConfig, MARAConfig, ModelConfig, NequIPConfig, ViSNetConfig
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure
from steradian.hosts.nequip import layer_degrees
from steradian.operators.base import EdgeGate
from tests.systems import NO_REFERENCES as STATISTICS
from tests.systems import seven_atoms as graph

SMALL = {
    "mace": MACEConfig(num_channels=4, l_max=2, radial_mlp=[8]),
    "nequip": NequIPConfig(num_channels=4, l_max=1, radial_mlp=[8]),
    "visnet": ViSNetConfig(num_layers=3, num_channels=8, num_heads=2, radial={"num": 8}),
}


class Constant(EdgeGate):
    """The same alpha for every edge."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, features, edges):
        return torch.full_like(edges.lengths, self.value)


def made(host, make_gate=None, **changes):
    config = ModelConfig(host=SMALL[host].model_copy(update=changes), precision="float64")
    return build_potential(config, STATISTICS, seed=2, make_gate=make_gate).eval()


def layer_inputs(potential):
    """What the second layer is given."""
    seen = []
    handle = potential.host.layers[1].register_forward_pre_hook(lambda module, given: seen.append(given))
    potential(graph(), forces=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("host", ["mace", "nequip"])
def test_a_gate_acts_on_every_message_exactly_once(host):
    """A gate of 0.3 is the same as radial weights times 0.3."""
    gated = made(host, make_gate=lambda spec: Constant(0.3))
    bare = made(host)
    bare.load_state_dict(gated.state_dict())
    assert not torch.allclose(bare(graph()).energy, gated(graph()).energy, atol=1e-6)
    with torch.no_grad():
        for layer in bare.host.layers:
            layer.radial_network.weights[-1].mul_(0.3)
    torch.testing.assert_close(bare(graph()).forces, gated(graph()).forces, rtol=1e-10, atol=1e-12)


def test_nequip_gated_by_node_scales_the_features_before_the_convolution():
    """Algorithm 2 of the MARA paper: the gate of a sender multiplies its features once they are mixed."""
    gate = MARAConfig(form="published", frame="lab", where="node", gate="published", hidden_dim=8)
    config = ModelConfig(host=SMALL["nequip"], edge_gate=gate)
    potential = build_potential(config.model_copy(update={"precision": "float64"}), STATISTICS, seed=2).eval()
    features, species, embedding, positions, edges = layer_inputs(potential)
    layer = potential.host.layers[1]
    expected, alpha = layer(features, species, embedding, positions, edges)
    of_sender = torch.zeros(len(features), dtype=alpha.dtype).index_put((edges.senders,), alpha)
    assert torch.allclose(of_sender[edges.senders], alpha), "one number per sender"
    assert alpha.std() > 1e-4
    mixed = layer.linear_up.forward
    layer.gate, layer.linear_up.forward = None, lambda value: mixed(value) * of_sender[:, None, None]
    scaled, none = layer(features, species, embedding, positions, edges)
    assert none is None
    assert torch.allclose(scaled, expected, rtol=0, atol=1e-12)


def test_visnet_gate_weighs_the_attention_and_not_what_an_atom_tells_itself():
    potential = made("visnet")
    features, filters, positions, edges, rows, shared = layer_inputs(potential)
    layer = potential.host.layers[1]
    bare = layer(features, filters, positions, edges, rows, shared)[0]
    layer.gate = Constant(0.3)
    gated = layer(features, filters, positions, edges, rows, shared)[0]
    assert (gated - bare).abs().max() > 1e-3
    layer.gate = None
    weighed = torch.cat([0.3 * rows.envelope[: rows.num_edges], rows.envelope[rows.num_edges :]])
    same = layer(features, filters, positions, edges, dataclasses.replace(rows, envelope=weighed), shared)[0]
    assert torch.equal(gated, same)


def test_visnet_rows_are_the_edges_and_every_atom_itself():
    potential = made("visnet")
    _, _, _, edges, rows, _ = layer_inputs(potential)
    num_edges, num_atoms = len(edges.senders), 7
    senders, receivers = rows.links.senders.index, rows.links.receivers.index
    assert len(senders) == num_edges + num_atoms
    assert torch.equal(senders[num_edges:], receivers[num_edges:])
    lengths = rows.directions.square()
    assert torch.allclose(lengths[:num_edges, :3].sum(1), torch.ones(num_edges, dtype=lengths.dtype))
    assert torch.allclose(lengths[:num_edges, 3:].sum(1), torch.ones(num_edges, dtype=lengths.dtype))
    assert lengths[num_edges:].abs().max() == 0


@pytest.mark.parametrize("max_min", [None, "max_min"])
def test_visnet_is_smooth_at_the_cutoff_unless_told_otherwise(max_min):
    assert ViSNetConfig().smooth
    potential = made("visnet", vector_norm=max_min)
    with torch.no_grad():
        for layer in potential.host.layers:
            layer.vector_weights.bias.normal_()
    jumps = []
    for smooth in (True, False):
        potential.host.smooth = smooth
        energies = []
        for distance in (5.0 - 1e-9, 5.0 + 1e-9):
            pair = Structure(np.array([6, 8]), np.array([[0.0, 0.0, 0.0], [distance, 0.0, 0.0]]))
            energies.append(float(potential(make_graph(pair, 5.0), forces=False).energy))
        jumps.append(abs(energies[1] - energies[0]))
    assert jumps[0] < 1e-12
    assert jumps[1] > 1e-6


def test_nequip_keeps_the_irreps_that_a_path_reaches():
    config = NequIPConfig(num_layers=4, l_max=1)
    outs = [set(degrees_out) for _, degrees_out in layer_degrees(config)]
    assert outs == [{(0, 1), (1, -1)}, {(0, 1), (1, 1), (1, -1)}, {(0, 1), (0, -1), (1, 1), (1, -1)}, {(0, 1)}]
    natural = NequIPConfig(num_layers=3, l_max=2, parity=False)
    assert layer_degrees(natural)[1] == (((0, 1), (1, -1), (2, 1)), ((0, 1), (1, -1), (2, 1)))


def test_the_first_layer_of_nequip_leaves_an_isolated_atom_without_energy():
    potential = made("nequip")
    alone = potential(make_graph(Structure(np.array([8]), np.zeros((1, 3))), 5.0))
    assert float(alone.energy) == 0.0


@pytest.mark.parametrize("host", list(SMALL))
def test_inspect_describes_every_host(host, tmp_path):
    potential = made(host)
    path = tmp_path / "model.safetensors"
    save_potential(path, potential)
    rows = dict(describe(path, potential))
    assert rows["host"].startswith(host)
    assert "0e + " in rows["hidden irreps"]
    assert rows["radial basis"].startswith("8 ")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"num_channels": 12, "num_heads": 8}, "multiple of num_heads"),
        ({"num_channels": 7, "num_heads": 7}, "must be even"),
    ],
)
def test_widths_of_visnet_that_do_not_fit_are_named(section, message):
    with pytest.raises(ValueError, match=message):
        ViSNetConfig(**section)


@pytest.mark.parametrize("gate", ["none", "constant"])
@pytest.mark.parametrize("host", SMALL)
def test_a_system_without_atoms_has_no_energy(host, gate):
    """As the empty part of a system that several processes share; nothing may divide by a number of atoms or edges."""
    model = made(host, None if gate == "none" else lambda *_: Constant(0.5))
    whole = graph()
    rows = torch.zeros(0, dtype=torch.int64)
    empty = dataclasses.replace(
        whole,
        positions=whole.positions[:0],
        numbers=whole.numbers[:0],
        system=rows,
        senders=rows,
        receivers=rows,
        shifts=whole.shifts[:0],
        topology=None,
    )
    found = model(empty)
    assert found.energy.tolist() == [0.0] * whole.num_systems
    assert found.forces.shape == (0, 3)
