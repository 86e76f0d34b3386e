"""What sums over neighbours are divided by, and where a gate per channel multiplies, in every host."""

from __future__ import annotations

import pytest
import torch

from steradian.build import build_potential
from steradian.config import MACEConfig, ModelConfig, NequIPConfig, O3MPNNConfig, ViSNetConfig
from steradian.hosts.base import message_divisor
from steradian.operators.base import EdgeGate, SlotSpec
from tests.systems import NO_REFERENCES as STATISTICS
from tests.systems import seven_atoms as graph

HOSTS = {
    "mace": MACEConfig(num_channels=4, l_max=2, radial_mlp=[8], correlation=2),
    "nequip": NequIPConfig(num_layers=2, num_channels=4, l_max=1, radial_mlp=[8]),
    "visnet": ViSNetConfig(num_layers=3, num_channels=8, num_heads=2, radial={"num": 8}),
    "o3mpnn": O3MPNNConfig(num_channels=4, l_max=1, num_radial=8, zero_init=False),
}
PUBLISHED = {"mace": "mean", "nequip": "root", "visnet": 1.0, "o3mpnn": 1.0}
NEIGHBORS = 9.0
#: rows that a layer sums over: in ViSNet an atom is its own neighbour too
ROWS = {"mace": 9.0, "nequip": 9.0, "visnet": 10.0, "o3mpnn": 9.0}


def made(host, make_gate=None, **changes):
    section = HOSTS[host].model_copy(update={"avg_num_neighbors": NEIGHBORS} | changes)
    config = ModelConfig(host=section, precision="float64")
    return build_potential(config, STATISTICS, seed=2, make_gate=make_gate).eval()


def test_rules():
    assert message_divisor("mean", 16.0) == 16.0
    assert message_divisor("root", 16.0) == message_divisor("learned", 16.0) == 4.0
    assert message_divisor(2.5, 16.0) == 2.5


@pytest.mark.parametrize("host", HOSTS)
def test_names_are_the_numbers_that_they_stand_for(host):
    expected = {"mean": ROWS[host], "root": ROWS[host] ** 0.5, "learned": ROWS[host] ** 0.5}
    energies = {}
    for scale, number in expected.items():
        named, numbered = made(host, message_scale=scale), made(host, message_scale=number)
        if host == "visnet":  # the sum of the embedding has no row of the atom itself
            numbered.host.rescale.factor = 1 / message_divisor(scale, NEIGHBORS)
        gains = {name: value for name, value in named.state_dict().items() if name not in numbered.state_dict()}
        assert all(name.endswith("gain") and value == 1.0 for name, value in gains.items())
        assert bool(gains) == (scale == "learned")
        energies[scale] = named(graph()).energy
        assert torch.allclose(energies[scale], numbered(graph()).energy, rtol=0, atol=1e-12)
    assert abs(energies["mean"] - energies["root"]) > 1e-4


@pytest.mark.parametrize("host", HOSTS)
def test_plain_sums_are_those_of_one_neighbour(host):
    """The published scales of ViSNet and of the O(3) network are 1: nothing is multiplied."""
    plain = made(host, message_scale=1.0)
    for scale in ("mean", "root"):
        single = made(host, message_scale=scale, avg_num_neighbors=1.0)
        if host == "visnet":
            for layer in single.host.layers:
                assert layer.rescale.factor == message_divisor(scale, 2.0) ** -1
                layer.rescale.factor = 1.0
        assert torch.equal(single(graph()).forces, plain(graph()).forces)
    default = build_potential(ModelConfig(host=HOSTS[host], precision="float64"), STATISTICS, seed=2).eval()
    if PUBLISHED[host] == 1.0:
        assert torch.equal(default(graph()).forces, plain(graph()).forces)
        assert list(default.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("host", HOSTS)
def test_the_number_of_neighbours_comes_from_the_training_set_unless_it_is_given(host):
    counted = made(host, message_scale="mean", avg_num_neighbors=None)
    given = made(host, message_scale="mean", avg_num_neighbors=STATISTICS.avg_num_neighbors)
    other = made(host, message_scale="mean", avg_num_neighbors=STATISTICS.avg_num_neighbors + 1)
    assert torch.equal(counted(graph()).energy, given(graph()).energy)
    assert not torch.equal(counted(graph()).energy, other(graph()).energy)


@pytest.mark.parametrize("host", HOSTS)
def test_a_learned_scale_has_gradients_and_does_what_a_number_does(host):
    potential = made(host, message_scale="learned").train()
    gains = [value for name, value in potential.named_parameters() if name.endswith("gain")]
    assert len(gains) == len(potential.host.layers) + (host == "visnet")
    prediction = potential(graph())
    slopes = torch.autograd.grad(prediction.energy.sum() + prediction.forces.square().sum(), gains)
    assert all(slope.abs() > 1e-9 for slope in slopes)
    with torch.no_grad():
        for gain in gains:
            gain.mul_(0.5)
    halved = made(host, message_scale=2 * ROWS[host] ** 0.5)
    if host == "visnet":
        halved.host.rescale.factor = 0.5 / NEIGHBORS**0.5
    assert torch.allclose(potential.eval()(graph()).forces, halved(graph()).forces, rtol=0, atol=1e-12)


def inputs_of(potential, index):
    seen = []
    handle = potential.host.layers[index].register_forward_pre_hook(lambda module, given: seen.append(given))
    potential(graph(), forces=False)
    handle.remove()
    return seen[0]


def test_visnet_divides_scalar_and_vector_messages():
    """In the first layer scalars are a linear map of their sum, and vectors are their sum."""
    potential = made("visnet")
    layer, given = potential.host.layers[0], inputs_of(potential, 0)
    plain = layer(*given)[0]
    layer.rescale.factor = 0.25
    divided = layer(*given)[0]
    bias = layer.update.bias
    assert torch.allclose(divided[:, 0] - bias, 0.25 * (plain[:, 0] - bias), rtol=0, atol=1e-13)
    assert torch.allclose(divided[:, 1:], 0.25 * plain[:, 1:], rtol=0, atol=1e-13)
    assert plain[:, 1:].abs().max() > 1e-3


def test_o3mpnn_divides_its_messages():
    plain, divided = made("o3mpnn"), made("o3mpnn", message_scale=4.0)
    features, _, edges = inputs_of(plain, 1)
    messages = [potential.host.layers[1].message(features, edges) for potential in (plain, divided)]
    assert messages[0].abs().max() > 1e-2
    assert torch.allclose(4 * messages[1], messages[0], rtol=0, atol=1e-13)


# ----------------------------------------------------------------------------------------------------- gate per channel


class PerHead(EdgeGate):
    """The same alpha of every head for all edges."""

    def __init__(self, values):
        super().__init__()
        self.values = torch.tensor(values, dtype=torch.float64)

    def forward(self, features, edges):
        return self.values.expand(len(edges.senders), -1)


@pytest.mark.parametrize("host", HOSTS)
def test_a_gate_multiplies_the_channels_of_every_message_exactly_once(host):
    values = [0.3, 1.7]
    gated, bare = made(host, make_gate=lambda spec: PerHead(values)), made(host)
    assert not torch.allclose(gated(graph()).energy, bare(graph()).energy, atol=1e-6)
    channels = HOSTS[host].num_channels
    alpha = torch.tensor(values, dtype=torch.float64).repeat(channels // 2)
    with torch.no_grad():
        for layer in bare.host.layers:
            if host == "o3mpnn":
                layer.message.filter.mul_(alpha)
            elif host == "visnet":
                continue
            else:
                layer.radial_network.weights[-1].view(-1, layer.product.num_paths, channels).mul_(alpha)
    if host == "visnet":
        features, filters, _, edges, rows, shared = inputs_of(bare, 1)
        layer = bare.host.layers[1]
        kept, scalars = [], layer.norm(features[:, 0])
        attended = tuple(torch.nn.functional.silu(part).unsqueeze(1) for part in layer.filters.blocks(filters)[:2])
        for given in (None, PerHead(values)(features, edges)):
            kept.append(layer._messages(scalars, attended, given, rows, shared))
        # an atom's own rows stand behind those of the edges, and nothing gates them
        assert torch.allclose(kept[1][: rows.num_edges], kept[0][: rows.num_edges] * alpha, rtol=0, atol=1e-14)
        assert torch.equal(kept[1][rows.num_edges :], kept[0][rows.num_edges :])
        assert kept[0][rows.num_edges :].abs().max() > 1e-3
        return
    assert torch.allclose(gated(graph()).forces, bare(graph()).forces, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("host", HOSTS)
def test_heads_that_do_not_fit_are_refused(host):
    with pytest.raises(ValueError, match="a gate of 3 heads does not fit"):
        made(host, make_gate=lambda spec: PerHead([1.0, 1.0, 1.0]))(graph())


@pytest.mark.parametrize("host", HOSTS)
def test_slots_know_the_neighbours_and_the_harmonics(host):
    seen: list[SlotSpec] = []
    made(host, make_gate=seen.append)
    assert len(seen) > 1
    assert {spec.avg_num_neighbors for spec in seen} == {NEIGHBORS}
    assert {spec.l_max for spec in seen} == {HOSTS[host].l_max}
    assert {spec.unit_weights for spec in seen} == {host in ("mace", "nequip")}
