"""Intrinsic MARA: invariance against the number of points, exactness of the polynomial kernel, the dense sums."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.func import functional_call

from steradian.config import LebedevGrid, MARAConfig, SphericalDesign
from steradian.equivariant.harmonics import spherical_harmonics
from steradian.equivariant.sphere import design, gauss_legendre, lebedev
from steradian.operators.base import BareEdges, SlotSpec
from steradian.operators.mara import gate_of, intrinsic
from steradian.operators.mara.gate import MARA
from steradian.operators.mara.intrinsic import IntrinsicMARA
from tests.unit import mara_cases
from tests.unit.mara_cases import random_turn, turn_features

DOUBLE = torch.float64
SCALARS, VECTORS = ((0, 1),), ((0, 1), (1, -1))
UP_TO_TWO = ((0, 1), (1, -1), (2, 1))
MIXED = ((0, 1), (0, -1), (1, -1), (1, 1), (2, -1))  # with irreps that must be left out
CHANNELS = 6


def edges_of(positions, cutoff=5.0):
    edges = mara_cases.edges_of(positions, cutoff)
    radial = edges.envelope[:, None] * torch.exp(-((edges.lengths[:, None] - torch.arange(4.0)) ** 2))
    return dataclasses.replace(edges, radial=radial)


def system(degrees, seed=0, num_atoms=5):
    generator = torch.Generator().manual_seed(seed)
    dim = sum(2 * degree + 1 for degree, _ in degrees)
    positions = 1.4 * torch.randn(num_atoms, 3, generator=generator, dtype=DOUBLE)
    return torch.randn(num_atoms, dim, CHANNELS, generator=generator, dtype=DOUBLE), positions


def random_gate(degrees, grid, seed=0, size=1.0, **options):
    """A gate at its highest temperature; ``size`` scales all its weights."""
    torch.manual_seed(seed)
    gate = IntrinsicMARA(CHANNELS, degrees, 4, grid, hidden_dim=8, **options).to(DOUBLE)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.mul_(size)
        nn.init.ones_(gate.W_gate)
        gate.temperature.fill_(30.0)
    return gate


def worst_change(gate, degrees, turns=8, act=turn_features):
    """Largest change of a pooled value under rotations and reflections, and the spread of the values over edges."""
    features, positions = system(degrees)
    pooled = gate.pooled(features, edges_of(positions)).detach()
    changes = []
    for seed in range(turns):
        turn = random_turn(seed, improper=bool(seed % 2))
        turned = gate.pooled(act(features, degrees, turn), edges_of(positions @ turn.T)).detach()
        changes.append((turned - pooled).abs().max().item())
    return max(changes), pooled.std().item()


# -------------------------------------------------------------------------------------------------------- symmetry


@pytest.mark.parametrize("size", [1.0, 10.0])
@pytest.mark.parametrize("degrees", [SCALARS, VECTORS, UP_TO_TWO], ids=["density", "vectors", "degree 2"])
def test_exp_kernel_converges_and_is_below_1e_6_at_86_points(degrees, size):
    errors = {}
    for points in (14, 26, 50, 86):
        errors[points], spread = worst_change(random_gate(degrees, lebedev(points), size=size), degrees)
    assert spread > 1e-2, "nothing to compare"
    assert errors[14] > 1e-6, "the first rule resolves everything: the test sees no convergence"
    assert errors[14] > errors[26] > errors[50] > errors[86]
    assert errors[86] < 1e-7 * size
    assert random_gate(degrees, lebedev(50)).rotation == "quadrature"


@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize(
    ("degrees", "grid", "l_max"),
    [
        (VECTORS, lebedev(6), 2),
        (VECTORS, design(3), 2),
        (MIXED, lebedev(6), 2),
        (SCALARS, lebedev(6), 1),
        (SCALARS, design(6), 2),
        (UP_TO_TWO, lebedev(26), 2),
        (UP_TO_TWO, gauss_legendre(4, 8), 2),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_polynomial_kernel_is_exact(degrees, grid, l_max, size):
    gate = random_gate(degrees, grid, size=size, kernel="polynomial", signal_l_max=l_max)
    change, spread = worst_change(gate, degrees)
    assert spread > 1e-3
    assert change < 1e-12 * size
    assert gate.rotation == "exact"


def test_polynomial_kernel_refuses_a_rule_that_is_too_small():
    message = r"signal of degree 2 needs a rule of degree 6.*degree 3; take 26 Lebedev points or a lower signal_l_max"
    with pytest.raises(ValueError, match=message):
        IntrinsicMARA(CHANNELS, UP_TO_TWO, grid=lebedev(6), kernel="polynomial")
    # and rightly so: without the refusal the gate turns with the laboratory
    gate = random_gate(UP_TO_TWO, lebedev(26), kernel="polynomial")
    gate.grid = lebedev(6)
    gate._place_grid()
    assert worst_change(gate, UP_TO_TWO)[0] > 1e-6


class LeavesPseudovectorsIn(IntrinsicMARA):
    """Broken on purpose: treats a pseudovector as if it turned with the points of the sphere."""

    def __init__(self, num_features, degrees, *arguments, **options):
        super().__init__(num_features, tuple((degree, (-1) ** degree) for degree, _ in degrees), *arguments, **options)


def test_the_symmetry_test_notices_broken_gates():
    degrees = ((0, 1), (1, 1))
    torch.manual_seed(0)
    broken = LeavesPseudovectorsIn(CHANNELS, degrees, 4, lebedev(6), hidden_dim=8, kernel="polynomial").to(DOUBLE)
    assert worst_change(broken, degrees)[0] > 1e-3
    unturned = random_gate(VECTORS, lebedev(6), kernel="polynomial")
    assert worst_change(unturned, VECTORS, act=lambda features, degrees, turn: features)[0] > 1e-3
    torch.manual_seed(0)
    lab = MARA(CHANNELS, lebedev(86), field="squared").to(DOUBLE)
    assert worst_change(lab, VECTORS)[0] > 1e-3


# ------------------------------------------------------------------------------------------------- the dense sums


@pytest.mark.parametrize("kernel", ["exp", "polynomial"])
@pytest.mark.parametrize(
    "degrees", [SCALARS, VECTORS, UP_TO_TWO, MIXED], ids=["density", "vectors", "degree 2", "mixed"]
)
@pytest.mark.parametrize("options", [{}, {"num_heads": 2}, {"where": "node"}, {"positional": False}], ids=str)
def test_two_derivatives_equal_those_of_the_sums_as_written(degrees, kernel, options):
    grid = lebedev(38)
    gate = random_gate(degrees, grid, kernel=kernel, **options)

    def derivatives(function):
        leaves = [tensor.requires_grad_() for tensor in system(degrees)]
        inputs = [*leaves, *gate.parameters()]
        alpha = function(leaves[0], edges_of(leaves[1]))
        first = torch.autograd.grad(alpha.square().sum(), inputs, create_graph=True, materialize_grads=True)
        forces = sum(gradient.square().sum() for gradient in first[:2])
        return [alpha, *first, *torch.autograd.grad(forces, inputs, materialize_grads=True)]

    mine = derivatives(gate)
    written = derivatives(lambda features, edges: mara_cases.written_alpha(gate, features, edges))
    assert mine[0].std() > 1e-3
    for left, right in zip(mine, written, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-11 * (1 + float(right.detach().abs().max())))


@pytest.mark.parametrize("kernel", ["exp", "polynomial"])
def test_attention_maps(kernel):
    features, positions = system(UP_TO_TWO)
    gate = random_gate(UP_TO_TWO, lebedev(38), kernel=kernel)
    maps = gate.attention_maps(features, edges_of(positions), torch.tensor([2]))
    torch.testing.assert_close(maps.attention.sum(-1), torch.ones(1, 1, 38, dtype=DOUBLE))
    torch.testing.assert_close(maps.profile.sum(-1), torch.ones(1, dtype=DOUBLE))


def test_polynomial_kernel_does_not_depend_on_the_rule():
    features, positions = system(UP_TO_TWO)
    gates = [random_gate(UP_TO_TWO, grid, kernel="polynomial") for grid in (design(7), lebedev(194))]
    coarse, fine = gates[0].pooled(features, edges_of(positions)), gates[1].as_written(features, edges_of(positions))
    torch.testing.assert_close(coarse, fine.pooled, rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------- derivatives, corner cases


@pytest.mark.parametrize("kernel", ["exp", "polynomial"])
@pytest.mark.parametrize("degrees", [SCALARS, VECTORS], ids=["density", "vectors"])
def test_gradcheck(degrees, kernel):
    torch.manual_seed(0)
    gate = IntrinsicMARA(2, degrees, 4, lebedev(6), 4, 2, kernel=kernel, signal_l_max=1, gate="published").to(DOUBLE)
    names = [name for name, _ in gate.named_parameters()]
    features, positions = system(degrees, num_atoms=3)

    def alpha(features, positions, *parameters):
        return functional_call(gate, dict(zip(names, parameters)), (features, edges_of(positions, 9.0)))

    inputs = [t.detach().clone().requires_grad_() for t in (features[..., :2], positions, *gate.parameters())]
    assert torch.autograd.gradcheck(alpha, inputs)
    assert torch.autograd.gradgradcheck(alpha, inputs)


@pytest.mark.parametrize("kernel", ["exp", "polynomial"])
@pytest.mark.parametrize("degrees", [SCALARS, VECTORS], ids=["density", "vectors"])
def test_dimers_empty_and_zero_length(degrees, kernel):
    gate = random_gate(degrees, lebedev(26), kernel=kernel)
    features, _ = system(degrees, num_atoms=2)
    senders, receivers = torch.tensor([1, 0]), torch.tensor([0, 1])
    for bond in [*gate.grid.points[[0, 7, 20]], torch.zeros(3, dtype=DOUBLE)]:
        vectors = torch.stack([bond, -bond]).requires_grad_()
        radial = torch.ones(2, 4, dtype=DOUBLE)
        alpha = gate(features, BareEdges(senders=senders, receivers=receivers, vectors=vectors, radial=radial))
        (first,) = torch.autograd.grad(alpha.sum(), vectors, create_graph=True)
        second = torch.autograd.grad(first.square().sum() + alpha.sum(), [vectors, *gate.parameters()])
        assert torch.isfinite(alpha).all()
        assert torch.isfinite(first).all()
        assert all(torch.isfinite(gradient).all() for gradient in second)
    far = edges_of(torch.tensor([[0.0, 0.0, 0.0], [50.0, 0.0, 0.0]], dtype=DOUBLE))
    assert gate(features, far).shape == (0,)
    assert gate(features[:0], edges_of(torch.zeros(0, 3, dtype=DOUBLE))).shape == (0,)


def test_neutral_start_and_node_gate():
    features, positions = system(VECTORS)
    edges = edges_of(positions)
    for where in ("edge", "node"):
        for kernel in ("exp", "polynomial"):
            alpha = IntrinsicMARA(CHANNELS, VECTORS, grid=lebedev(26), kernel=kernel, where=where).to(DOUBLE)(
                features, edges
            )
            assert torch.equal(alpha, torch.ones_like(alpha))
    alpha = random_gate(VECTORS, lebedev(26), where="node")(features, edges)
    assert alpha[edges.senders == 2].std() == 0
    assert alpha.std() > 0


# ------------------------------------------------------------------------------------------------ where p comes from


def test_what_the_signal_is_made_of():
    assert [degree for degree, _ in random_gate(UP_TO_TWO, lebedev(26)).turning] == [1, 2]
    mixed = random_gate(MIXED, lebedev(26))
    assert mixed.turning == ((1, 2),)  # only 1o, which starts behind 0e + 0o
    assert not mixed.from_density
    first = random_gate(((0, 1), (1, 1)), lebedev(26))
    assert first.from_density
    assert first.signal[0].shape == (4, 8)
    plain = random_gate(VECTORS, lebedev(26), positional=False)
    assert not plain.turning
    assert not plain.from_density
    assert worst_change(plain, VECTORS)[0] < 1e-7


def test_from_config():
    config = MARAConfig(
        form="published", kernel="polynomial", grid=SphericalDesign(degree=7), hidden_dim=16, num_heads=2
    )
    spec = SlotSpec("mace", 1, 2, UP_TO_TWO, CHANNELS, 5.0)
    gate = gate_of(config, spec)
    assert isinstance(gate, IntrinsicMARA)
    assert (gate.rotation, gate.num_heads, gate.l_max, gate.field) == ("exact", 2, 2, "squared")
    lower = gate_of(config.model_copy(update={"signal_l_max": 1, "grid": LebedevGrid(num_points=6)}), spec)
    assert lower.l_max == 1
    with pytest.raises(ValueError, match="Lebedev 74 has negative ones"):
        gate_of(config.model_copy(update={"kernel": "exp", "grid": LebedevGrid(num_points=74)}), spec)


def test_mistakes_are_explained():
    features, positions = system(VECTORS)
    edges = edges_of(positions)
    edges = BareEdges(edges.senders, edges.receivers, edges.vectors)
    with pytest.raises(ValueError, match="radial, which these edges do not have"):
        random_gate(SCALARS, lebedev(26))(features[:, :1], edges)
    with pytest.raises(ValueError, match="pass them all"):
        random_gate(VECTORS, lebedev(26))(features[:, 0], edges)
    with pytest.raises(ValueError, match="kernel must be"):
        IntrinsicMARA(4, kernel="linear")


def test_second_derivatives_block_by_block_keep_no_attention(monkeypatch):
    grid, edges, size = lebedev(14), 11, 4
    basis = spherical_harmonics(grid.points, 1)
    weights = grid.weights / grid.weights.sum()
    generator = torch.Generator().manual_seed(0)
    shapes = [(edges, 1, size, size), (edges, 1, size)]
    given = [0.5 * torch.randn(shape, dtype=DOUBLE, generator=generator) for shape in shapes]

    def derivatives():
        inputs = [tensor.clone().requires_grad_() for tensor in given]
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            pooled = intrinsic.pool_exponential(*inputs, basis, weights)
            first = torch.autograd.grad(pooled.square().sum(), inputs, create_graph=True)
            loss = sum(value.square().sum() for value in first)
        return [pooled, *first, *torch.autograd.grad(loss, inputs)], max(sizes)

    whole, _ = derivatives()
    monkeypatch.setattr(intrinsic, "NUMBERS_PER_BLOCK", 3 * 14**2)
    blocked, largest = derivatives()
    assert largest < edges * 14**2
    for one, other in zip(whole, blocked, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
    # the same by automatic differentiation of the formula
    inputs = [tensor.clone().requires_grad_() for tensor in given]
    scores = (basis @ inputs[0] @ basis.T).exp() * weights
    pooled = ((scores @ (inputs[1] @ basis.T).unsqueeze(-1)).squeeze(-1) / scores.sum(-1)) @ weights
    first = torch.autograd.grad(pooled.square().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(value.square().sum() for value in first), inputs)
    for one, other in zip(whole, [pooled, *first, *second], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)
