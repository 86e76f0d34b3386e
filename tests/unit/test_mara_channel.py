"""The channel gate: its value as the formula stands, symmetry, derivatives, neutral start, and it in every host."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from steradian.config import LebedevGrid, MARAConfig, PrecisionConfig
from steradian.equivariant.harmonics import spherical_harmonics
from steradian.graph import Edges
from steradian.operators.base import BareEdges, EdgeGate, SlotSpec
from steradian.operators.mara import ChannelGate, gate_of, paper
from steradian.polynomials import use_backend
from tests import cases
from tests.unit import mara_cases
from tests.unit.mara_cases import DOUBLE, random_turn, turn_features

SCALARS = ((0, 1),)
UP_TO_TWO = ((0, 1), (1, -1), (2, 1))
MIXED = ((0, 1), (0, -1), (1, -1), (1, 1), (2, -1), (2, 1))  # 0o, 1e and 2o give no invariant with the harmonics
CHANNELS, WIDTH, RADIAL = 6, 5, 4
ALL = ["scalars", "radial", "projections", "density", "sphere"]
INPUTS = [["scalars"], ["radial"], ["projections"], ["density"], ["scalars", "radial", "projections"], ALL]
EXACT = LebedevGrid(num_points=26)


def edges_of(positions: Tensor, l_max: int = 2, pairs: bool = True) -> Edges:
    """All pairs within 5 Å, with the harmonics and four radial functions; opposite edges known or not."""
    edges = mara_cases.edges_of(positions, 5.0)
    radial = edges.envelope[:, None] * torch.exp(-((edges.lengths[:, None] - torch.arange(float(RADIAL))) ** 2))
    harmonics = spherical_harmonics(edges.vectors / edges.lengths[:, None], l_max)
    if not pairs:
        edges.topology._pairs, edges.topology._looked_for_pairs = None, True
    assert (edges.pairs is not None) == pairs
    return dataclasses.replace(edges, radial=radial, harmonics=harmonics)


def system(degrees=UP_TO_TWO, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dim = sum(2 * degree + 1 for degree, _ in degrees)
    positions = 1.4 * torch.randn(5, 3, generator=generator, dtype=DOUBLE)
    return torch.randn(5, dim, CHANNELS, generator=generator, dtype=DOUBLE), positions


def slot(degrees=UP_TO_TWO, **changes) -> SlotSpec:
    options = {"num_radial": RADIAL, "avg_num_neighbors": 3.0, "l_max": 2, "num_weights": 4} | changes
    return SlotSpec("mace", 1, 2, degrees, CHANNELS, 5.0, **options)


def made(degrees=UP_TO_TWO, *, neutral: bool = False, spec: SlotSpec | None = None, **options) -> ChannelGate:
    torch.manual_seed(3)
    if "sphere" in options.get("inputs", ()):
        options = {"kernel": "polynomial", "grid": EXACT} | options
    gate = gate_of(MARAConfig(hidden_dim=WIDTH, **options), spec or slot(degrees)).to(DOUBLE)
    assert isinstance(gate, ChannelGate)
    if not neutral:
        torch.nn.init.normal_(gate.W_gate)
    return gate


# ---------------------------------------------------------------------------------------------------------- the value


def silu(x: Tensor) -> Tensor:
    return 1.6791767923989418 * x / (1 + torch.exp(-x))


def written(gate: ChannelGate, degrees, features: Tensor, edges: Edges, inputs) -> Tensor:
    """alpha ``[E, H]`` of section 8 of the specification, edge by edge; weights of variance 1 / (numbers summed)."""
    tables = iter(gate.tables)
    starts = [sum(2 * degree + 1 for degree, _ in degrees[:place]) for place in range(len(degrees))]
    of_scalars = next(tables) if "scalars" in inputs else None
    natural = [(irrep[0], start) for irrep, start in zip(degrees, starts) if irrep[0] and irrep[1] == (-1) ** irrep[0]]
    turning = [(degree, start, next(tables)) for degree, start in natural] if "projections" in inputs else []
    rows = []
    for e, (i, j) in enumerate(zip(edges.receivers.tolist(), edges.senders.tolist())):
        x = features.new_zeros(WIDTH)
        if of_scalars is not None:
            W_i, W_j = of_scalars.split(WIDTH, dim=1)
            x = x + (features[i, 0] @ W_i + features[j, 0] @ W_j) / CHANNELS**0.5
        if "radial" in inputs:
            x = x + edges.radial[e] @ gate.W_r / RADIAL**0.5
        for degree, start, table in turning:
            U, V = table.split(WIDTH, dim=1)
            part = slice(start, start + 2 * degree + 1)
            along = edges.harmonics[e, degree**2 : (degree + 1) ** 2]
            both = features[i, part] @ U + features[j, part] @ V
            x = x + along @ both / (3 * (2 * degree + 1) * CHANNELS) ** 0.5
        if "density" in inputs:
            x = x + of_density(gate, features, edges, e)
        if "sphere" in inputs:
            x = x + gate.sphere.pooled(features, edges)[e] @ gate.W_a / gate.W_a.shape[0] ** 0.5
        z = silu(silu(x) @ gate.W_2 / WIDTH**0.5) @ gate.W_gate / WIDTH**0.5
        rows.append(z)
    z = torch.stack(rows)
    return {
        "linear": 1 + z,
        "sigmoid": 2 / (1 + torch.exp(-z)),
        "exp": torch.exp(3 * torch.tanh(z / 3)),
    }[gate.activation]


def of_density(gate: ChannelGate, features: Tensor, edges: Edges, e: int) -> Tensor:
    """The receiver's density of neighbours, each weighed by its invariants and distance, along edge e."""
    density = gate.density
    total = features.new_zeros(WIDTH)
    of_atom = (edges.receivers == edges.receivers[e]).nonzero().flatten().tolist()
    for place, degree in enumerate((1, 2)):
        block = slice(degree**2, (degree + 1) ** 2)
        summed = features.new_zeros(2 * degree + 1, WIDTH)
        for k in of_atom:
            R = (edges.radial[k] @ density.W_r / RADIAL**0.5).view(2, WIDTH)[place]
            h = features[edges.senders[k], 0] @ density.W_h / CHANNELS**0.5
            summed = summed + edges.harmonics[k, block][:, None] * (R * h) / 3.0**0.5
        # a channelwise product with a scalar is divided by the root of its components' number, as all paths are
        total = (
            total + edges.harmonics[e, block] @ summed @ density.tables[place] / (3 * (2 * degree + 1) * WIDTH) ** 0.5
        )
    return total


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("degrees", [SCALARS, UP_TO_TWO, MIXED], ids=["scalars", "degree 2", "mixed"])
@pytest.mark.parametrize("inputs", INPUTS, ids=["+".join(inputs) for inputs in INPUTS])
def test_value_is_the_formula(inputs, degrees, pairs):
    features, positions = system(degrees)
    for activation, resolution in (("linear", "path"), ("sigmoid", "message"), ("exp", "path")):
        gate = made(degrees, inputs=inputs, heads=3, activation=activation, resolution=resolution)
        edges = edges_of(positions, pairs=pairs)
        alpha = gate(features, edges)
        assert alpha.shape == (len(edges.senders), 4, 3) if resolution == "path" else (len(edges.senders), 3)
        alpha = alpha.flatten(1)
        if inputs != ["projections"] or degrees != SCALARS:
            assert alpha.std(0).min() > 1e-3, "nothing to compare"
        assert torch.allclose(alpha, written(gate, degrees, features, edges, inputs), rtol=0, atol=1e-12)


def test_weights_of_a_host_without_unit_weights_are_scaled_at_the_start():
    """The same function: what is multiplied where a weight is used stands in the weight itself there."""
    one, other = made(), made(spec=slot(unit_weights=False), neutral=True)
    features, positions = system()
    edges = edges_of(positions)
    with torch.no_grad():
        other.W_gate.copy_(one.W_gate)
    # starts are made in float32
    assert torch.allclose(one(features, edges), other(features, edges), rtol=0, atol=1e-5)
    assert other.W_2.std() < 0.7 * one.W_2.std()


@pytest.mark.parametrize("activation", ["linear", "sigmoid", "exp"])
@pytest.mark.parametrize("where", ["edge", "node"])
def test_a_new_gate_is_exactly_one(where, activation):
    features, positions = system()
    gate = made(neutral=True, inputs=ALL, where=where, activation=activation)
    alpha = gate(features, edges_of(positions))
    assert torch.equal(alpha, torch.ones(alpha.shape, dtype=DOUBLE))
    (slope,) = torch.autograd.grad(alpha.square().sum(), gate.W_gate)
    assert slope.abs().max() > 1e-3, "it can learn from there"


def test_where_node_is_the_mean_over_what_a_sender_receives():
    features, positions = system()
    edges = edges_of(positions)
    by_edge, by_node = made(heads=2), made(heads=2, where="node")
    alpha = by_edge(features, edges).detach().flatten(1)
    expected = torch.stack([paper.of_senders(alpha[:, place], edges, 5) for place in range(8)], dim=1).view(-1, 4, 2)
    assert torch.allclose(by_node(features, edges), expected, rtol=0, atol=1e-12)
    assert expected.std(0).min() > 1e-3


def test_edges_without_a_topology_give_the_same():
    features, positions = system()
    edges = edges_of(positions)
    order = torch.randperm(len(edges.senders), generator=torch.Generator().manual_seed(0))
    names = ("senders", "receivers", "vectors", "envelope", "radial", "harmonics")
    bare = BareEdges(*(getattr(edges, name)[order] for name in names))
    gate = made()
    assert torch.allclose(gate(features, bare), gate(features, edges)[order], rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------- symmetry and derivatives


@pytest.mark.parametrize("where", ["edge", "node"])
@pytest.mark.parametrize("degrees", [SCALARS, UP_TO_TWO, MIXED], ids=["scalars", "degree 2", "mixed"])
def test_rotations_and_reflections_change_nothing(degrees, where):
    features, positions = system(degrees)
    gate = made(degrees, inputs=ALL, where=where)
    before = gate(features, edges_of(positions)).detach()
    assert before.std(0).min() > 1e-2
    for seed in range(4):
        turn = random_turn(seed, improper=bool(seed % 2))
        after = gate(turn_features(features, degrees, turn), edges_of(positions @ turn.T)).detach()
        assert torch.allclose(after, before, rtol=0, atol=1e-10)
    assert (gate.rotation == "exact") == (gate.grid is not None or "sphere" not in gate.summary())
    # one irrep turned the wrong way is seen, so the test can fail
    if len(degrees) > 1:
        features[:, 1:4] *= -1
        assert (gate(features, edges_of(positions)) - before).abs().max() > 1e-3


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("inputs", [INPUTS[4], [*INPUTS[4], "density"]], ids=["projections", "density"])
def test_first_and_second_derivatives(inputs, backend):
    features, positions = system()
    gate = made(inputs=inputs, heads=2, activation="exp")

    def alpha(positions: Tensor, features: Tensor) -> Tensor:
        return gate(features, edges_of(positions))[:6]

    given = (positions.requires_grad_(), features.requires_grad_())
    with use_backend(backend):
        assert torch.autograd.gradcheck(alpha, given, atol=1e-6)
        assert torch.autograd.gradgradcheck(alpha, given, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- in the hosts


class Squeezed(EdgeGate):
    """The one head of a gate as a number per message."""

    def __init__(self, gate: ChannelGate) -> None:
        super().__init__()
        self.inner = gate

    def forward(self, features, edges):
        return self.inner(features, edges).squeeze(1)


def with_gate(host: str, squeezed: bool):
    def make(spec: SlotSpec) -> EdgeGate:
        torch.manual_seed(spec.layer)
        gate = gate_of(MARAConfig(hidden_dim=8, heads=1, resolution="message"), spec)
        torch.nn.init.normal_(gate.W_gate, std=0.3)
        return Squeezed(gate) if squeezed else gate

    return cases.potential(host, make_gate=make)


@pytest.mark.parametrize("host", cases.HOSTS)
def test_one_head_is_a_number_per_message(host):
    graph = cases.batch(cases.ethanol(), cases.crystal())
    one, other = (with_gate(host, squeezed)(graph, stress=True) for squeezed in (False, True))
    assert one.gates[0].shape == (graph.num_edges, 1)
    assert other.gates[0].shape == (graph.num_edges,)
    assert (one.forces - cases.potential(host)(graph).forces).abs().max() > 1e-4
    for name in ("energy", "forces", "stress"):
        a, b = getattr(one, name), getattr(other, name)
        assert torch.allclose(a, b, rtol=0, atol=1e-12 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("operator", ["mara-channel", "mara-channel-all"])
@pytest.mark.parametrize("host", ["mace", "nequip", "visnet", "o3mpnn"])
@pytest.mark.parametrize("precision", ["mixed", "half", {"preset": "mixed", "roles": {"attention": "bfloat16"}}])
def test_low_precision_is_close_and_trains(host, operator, precision):
    graph = cases.graph(cases.ethanol())
    exact = cases.potential(host, operator)(graph).forces
    precision = PrecisionConfig.model_validate(precision) if isinstance(precision, dict) else precision
    potential = cases.potential(host, operator).set_precision(precision)
    gate = potential.host.layers[0].gate
    assert (gate.low is None) == (precision in ("mixed", "half"))
    prediction = potential.train()(graph)
    assert 1e-9 < (prediction.forces - exact).abs().max() < 0.1 * exact.abs().max()
    prediction.forces.square().sum().backward()
    assert torch.isfinite(gate.W_gate.grad).all()
    assert gate.W_gate.grad.abs().max() > 0


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: made(heads=4), r"heads \(4\) must divide the 6 channels of host mace"),
        (lambda: ChannelGate(slot(), activation="relu"), "activation must be one of linear, sigmoid, exp, not 'relu'"),
        (lambda: ChannelGate(slot(), where="atom"), "where must be edge or node, not 'atom'"),
        (lambda: ChannelGate(slot(), inputs=["sphere"]), "the input 'sphere' and the attention belong together"),
        (lambda: made(inputs=["density"], spec=slot(l_max=0)), "'density' needs harmonics of degree 1: give host mace"),
        (lambda: made()(torch.zeros(5, 9, 4), None), r"built for features \[N, D, 6\], got \[5, 9, 4\]"),
        (lambda: MARAConfig(heads=0), "heads"),
        (lambda: MARAConfig(inputs=["angles"]), "inputs"),
        (lambda: MARAConfig(grid=EXACT), "grid: of form 'published'; set form: published, or list 'sphere' in inputs"),
        (lambda: MARAConfig(inputs=["sphere"], num_heads=3), r"hidden_dim \(32\) must be a multiple of num_heads"),
        (lambda: MARAConfig(form="published", activation="exp"), "activation: of form 'channel'"),
    ],
)
def test_mistakes_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "left_out", "message"),
    [
        ({"inputs": ["radial"]}, "radial", "reads edges.radial, which these edges do not have"),
        ({"inputs": ["projections"]}, "harmonics", "reads harmonics up to degree 2, which these edges do not have"),
        ({"where": "node"}, "envelope", "weighs neighbours with edges.envelope"),
    ],
)
def test_edges_that_lack_what_the_gate_reads_are_refused(options, left_out, message):
    features, positions = system()
    edges = edges_of(positions)
    names = ("senders", "receivers", "vectors", "envelope", "radial", "harmonics")
    bare = BareEdges(*(None if name == left_out else getattr(edges, name) for name in names))
    with pytest.raises(ValueError, match=message):
        made(**options)(features, bare)


def test_the_frozen_gate_learns_its_last_weights_alone():
    gate = made(frozen_projections=True, inputs=ALL)
    assert [name for name, parameter in gate.named_parameters() if parameter.requires_grad] == ["W_gate"]
