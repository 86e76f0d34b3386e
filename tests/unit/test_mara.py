"""MARA in the laboratory frame: the factorised form against the dense one, derivatives, ablations, corner cases."""

import math
from itertools import product

import pytest
import torch
from torch.func import functional_call

from steradian.config import GaussLegendreGrid, LebedevGrid, MARAConfig
from steradian.equivariant.sphere import equiangular, gauss_legendre, lebedev
from steradian.operators.base import BareEdges, SlotSpec
from steradian.operators.mara import cpu as mara_cpu
from steradian.operators.mara import factorised, gate_of, paper
from steradian.operators.mara.factorised import sphere_field
from steradian.operators.mara.gate import MARA, SEAttention
from steradian.polynomials import use_backend
from tests.unit.mara_cases import DOUBLE, edges_of, random_mara, system, written_alpha


@pytest.fixture(autouse=True, params=["reference", "cpu"])
def backend(request):
    """Every test of this file runs in plain PyTorch and through machine code."""
    with use_backend(request.param):
        yield request.param


PUBLISHED = MARAConfig(form="published", frame="lab")
LEBEDEV_230 = LebedevGrid(num_points=230)
SPEC = SlotSpec("mace", 1, 2, ((0, 1), (1, -1)), 6, 5.0)


# ---------------------------------------------------------------------------------------------- factorised = dense


OPTIONS = [
    {"num_heads": heads, "where": where, "field": field, "gate": gate, "positional": positional, "residual": residual}
    for heads, where, field, gate, positional, residual in product(
        (1, 2), ("edge", "node"), ("distance", "squared"), ("neutral", "published"), (True, False), (True, False)
    )
] + [
    {"num_heads": heads, "positional": positional, "residual": residual, "normalize": True}
    for heads, positional, residual in product((1, 2), (True, False), (True, False))
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(str(value) for value in options.values()))
def test_factorised_equals_the_paper(options):
    features, positions = system()
    edges = edges_of(positions)
    mara = random_mara(5, gauss_legendre(3, 4), 8, **options)
    written, expected = mara.as_written(features, edges), written_alpha(mara, features, edges)
    assert expected.std() > 1e-3
    torch.testing.assert_close(mara(features, edges), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(mara.pooled(features, edges), written.pooled, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(mara(features, edges), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", [equiangular(4, 8), lebedev(26), equiangular(2, 2)], ids=lambda grid: grid.name)
def test_factorised_equals_the_paper_on_every_grid_and_in_blocks(grid, monkeypatch):
    monkeypatch.setattr(factorised, "NUMBERS_PER_BLOCK", 7 * grid.num_points**2)  # 7 edges in a block
    features, positions = system(8)
    edges = edges_of(positions)
    mara = random_mara(5, grid, 32, num_heads=4)
    torch.testing.assert_close(mara(features, edges), written_alpha(mara, features, edges), rtol=0, atol=1e-12)


def test_the_papers_equations_by_hand():
    """One edge, two points, one channel, numbers small enough to write out."""
    weights, points = torch.tensor([1.0, 3.0], dtype=DOUBLE), torch.tensor([[0.0, 0, 1], [1, 0, 0]], dtype=DOUBLE)
    edges = BareEdges(torch.tensor([1]), torch.tensor([0]), torch.tensor([[0.0, 0, 2]], dtype=DOUBLE))
    near, far = 0.0, 2 * 2**0.5  # from (0, 0, 2) to 2 (0, 0, 1) and to 2 (1, 0, 0)
    one = lambda number: torch.tensor([[number]], dtype=DOUBLE)  # noqa: E731
    p = torch.tensor([[0.1], [-0.2]], dtype=DOUBLE)
    given = paper.Weights(one(0.5), one(0.3)[0], one(-0.4)[0], one(0.7), one(0.2)[0], one(1.5)[0], p, one(9.0))
    found = paper.published(torch.tensor([[2.0], [-1.0]], dtype=DOUBLE), edges, points, weights, given)
    query = [0.5 * 2 + 0.3 * f + p_k for f, p_k in ((near, 0.1), (far, -0.2))]
    key = [9.0 * -1 - 0.4 * f + p_k for f, p_k in ((near, 0.1), (far, -0.2))]
    value = [0.7 * -1 + 0.2 * f + p_k for f, p_k in ((near, 0.1), (far, -0.2))]
    rows = [[w * math.exp(q * k) for w, k in zip((1, 3), key)] for q in query]
    output = [sum(a * v for a, v in zip(row, value)) / sum(row) for row in rows]
    pooled = (output[0] + 3 * output[1]) / 4
    assert found.pooled.item() == pytest.approx(pooled, abs=1e-14)
    assert found.alpha.item() == pytest.approx(1 / (1 + math.exp(-1.5 * pooled)), abs=1e-14)
    assert found.attention[0, 0, 1, 0].item() == pytest.approx(rows[1][0] / sum(rows[1]), abs=1e-14)
    received = (rows[0][1] / sum(rows[0]) + 3 * rows[1][1] / sum(rows[1])) / 4
    assert found.received[0, 0, 1].item() == pytest.approx(received, abs=1e-14)
    sent = torch.tensor([[4.0, 8.0]], dtype=DOUBLE)
    assert torch.equal(paper.message(found.alpha, sent, edges, 2), torch.cat([found.alpha * sent, 0 * sent]))


FORMS = [{"num_heads": heads, "field": field} for heads, field in product((1, 2), ("distance", "squared"))] + [
    {"where": "node"},
    {"residual": True},
    {"positional": False},
    {"normalize": True},
    {"gate": "published"},
]


@pytest.mark.parametrize("options", FORMS, ids=lambda options: " ".join(str(value) for value in options.values()))
@pytest.mark.parametrize("atoms", [2, 6, 9])
def test_two_derivatives_equal_those_of_the_paper(options, atoms, monkeypatch):
    """Value, first and second derivatives by everything, as training forms them: the last ones without a further graph,
    which is when machine code computes them. Blocks do not divide the edges."""
    monkeypatch.setattr(factorised, "NUMBERS_PER_BLOCK", 5 * 14**2)
    mara = random_mara(5, lebedev(14), 8, **options)

    def derivatives(function):
        leaves = [tensor.requires_grad_() for tensor in system(atoms)]
        inputs = [*leaves, *mara.parameters()]
        alpha = function(leaves[0], edges_of(leaves[1]))
        first = torch.autograd.grad(alpha, inputs, random_like([alpha], 1), create_graph=True, materialize_grads=True)
        mixture = sum((value * way).sum() for value, way in zip(first[:2], random_like(first[:2], 2)))
        second = torch.autograd.grad(mixture, inputs, materialize_grads=True)
        return [alpha, *first, *second]

    mine = derivatives(mara)
    theirs = derivatives(lambda features, edges: written_alpha(mara, features, edges))
    for place, (left, right) in enumerate(zip(mine, theirs)):
        torch.testing.assert_close(
            left, right, rtol=1e-9, atol=1e-11 * (1 + float(right.detach().abs().max())), msg=str(place)
        )


def random_like(values, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(value.shape, generator=generator, dtype=value.dtype) for value in values]


def test_third_derivatives_equal_those_of_the_paper():
    mara = random_mara(5, lebedev(14), 8, num_heads=2)

    def derivatives(function):
        leaves = [tensor.requires_grad_() for tensor in system(4)]
        inputs, last = [*leaves, *mara.parameters()], [function(leaves[0], edges_of(leaves[1]))]
        for order in range(3):
            mixture = sum((value * way).sum() for value, way in zip(last, random_like(last, order)))
            last = torch.autograd.grad(mixture, inputs, create_graph=True, materialize_grads=True)
        return last

    mine = derivatives(mara)
    for left, right in zip(mine, derivatives(lambda features, edges: written_alpha(mara, features, edges))):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10 * (1 + float(right.detach().abs().max())))


def test_many_edges_form_their_attention_again(monkeypatch):
    """The plain form keeps no attention of all edges; two derivatives are those of the form that keeps it."""
    mara = random_mara(5, lebedev(14), 8)

    def derivatives():
        features, positions = (tensor.requires_grad_() for tensor in system())
        sizes = []
        with (
            use_backend("reference"),
            torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x),
        ):
            alpha = mara(features, edges_of(positions))
        first = torch.autograd.grad(alpha.sum(), (features, positions), create_graph=True)
        loss = sum(gradient.square().sum() for gradient in first)
        return [alpha, *first, *torch.autograd.grad(loss, [features, positions, *mara.parameters()])], max(sizes)

    kept, largest = derivatives()
    monkeypatch.setattr(factorised, "NUMBERS_PER_BLOCK", 4 * 14**2)
    monkeypatch.setattr(factorised, "NUMBERS_KEPT", 0)
    again, smaller = derivatives()
    assert largest >= len(kept[0]) * 14**2 > 4 * 14**2 > smaller
    for left, right in zip(kept, again):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"num_heads": 2, "residual": True}, {"where": "node"}, {"normalize": True}])
def test_gradcheck(options):
    mara = random_mara(2, gauss_legendre(2, 3), 4, **options)
    names = [name for name, _ in mara.named_parameters()]
    features, positions = system(3, 2)

    def alpha(features, positions, *parameters):
        return functional_call(mara, dict(zip(names, parameters)), (features, edges_of(positions, 9.0)))

    inputs = [tensor.detach().clone().requires_grad_() for tensor in (features, positions, *mara.parameters())]
    assert torch.autograd.gradcheck(alpha, inputs)
    assert torch.autograd.gradgradcheck(alpha, inputs)


def test_forces_do_not_form_gradients_of_the_tables(monkeypatch):
    kinds, run = [], mara_cpu._run
    monkeypatch.setattr(mara_cpu, "_run", lambda kind, *inputs: kinds.append(kind) or run(kind, *inputs))
    features, positions = system()
    mara = random_mara(5)
    positions.requires_grad_()
    with use_backend("cpu"):
        alpha = mara(features, edges_of(positions))
    torch.autograd.grad(alpha.sum(), positions, retain_graph=True, create_graph=True)
    assert kinds == ["slopes"]
    torch.autograd.grad(alpha.sum(), mara.p)
    assert kinds == ["slopes", "tables"]


def test_single_precision():
    features, positions = system()
    mara = random_mara(5)
    exact = mara(features, edges_of(positions))
    rounded = mara.float()(features.float(), edges_of(positions.float()))
    torch.testing.assert_close(rounded.double(), exact, rtol=0, atol=2e-6)


# ------------------------------------------------------------------------------------- what the paper leaves open


def test_neutral_start_is_one_to_the_last_bit():
    features, positions = system(dtype=torch.float32)
    for options in ({}, {"where": "node"}, {"num_heads": 4}, {"normalize": True, "residual": True}):
        alpha = MARA(5, **options)(features, edges_of(positions))
        assert torch.equal(alpha, torch.ones_like(alpha))
    published = MARA(5, gate="published")(features, edges_of(positions))
    assert ((published > 0) & (published < 1)).all()


def test_neutral_start_learns():
    """Every parameter moves after two steps, although W_gate starts at zero."""
    features, positions = system(dtype=torch.float32)
    for options in ({}, {"normalize": True}):
        torch.manual_seed(0)
        mara = MARA(5, **options)
        before = {name: parameter.detach().clone() for name, parameter in mara.named_parameters()}
        optimizer = torch.optim.SGD(mara.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            (mara(features, edges_of(positions)) - 0.5).square().sum().backward()
            optimizer.step()
        assert all((parameter != before[name]).any() for name, parameter in mara.named_parameters())


def test_the_node_term_of_the_keys_never_matters():
    features, positions = system()
    edges = edges_of(positions)
    mara = random_mara(5, num_heads=2)
    key_node = torch.randn(32, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(1)).requires_grad_()
    given = mara._written_weights(p=mara.p, Wk_h=key_node)
    with_it = paper.published(features, edges, mara.points, mara.weights, given, gate_kind="neutral").alpha
    torch.testing.assert_close(with_it, mara(features, edges), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(with_it.sum(), key_node)
    assert gradient.abs().max() < 1e-12
    # under LayerNorm it does matter
    normalized = random_mara(5, normalize=True)
    (gradient,) = torch.autograd.grad(normalized(features, edges).sum(), normalized.Wk_h)
    assert gradient.abs().max() > 1e-4


def test_alpha_turns_with_the_laboratory_and_says_so():
    features, positions = system()
    mara = random_mara(5)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))).Q
    change = mara(features, edges_of(positions)) - mara(features, edges_of(positions @ turn.T))
    assert change.abs().max() > 1e-3
    assert mara.rotation == "lab_frame"
    assert mara.supports_pbc


GRIDS = [equiangular(4, 8), equiangular(4, 8, poles=False), lebedev(26)]


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("field", ["distance", "squared"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_dimers_along_every_grid_direction(grid, field, dtype):
    """Finite first and second derivatives at the kinks, and no huge ones from rounding near them."""
    mara = random_mara(2, grid, 8, field=field, dtype=dtype)
    features = torch.randn(2, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    for shift in (0.0, 17.3):  # rounded differences of coordinates miss the grid direction by a little
        positions = torch.zeros(grid.num_points, 2, 3, dtype=dtype)
        positions[:, 1] = 1.3 * grid.points.to(dtype)
        positions = (positions + shift).requires_grad_()
        senders = torch.arange(2 * grid.num_points).reshape(-1, 2).flip(1).flatten()
        receivers = torch.arange(2 * grid.num_points)
        flat = positions.reshape(-1, 3)
        edges = BareEdges(senders=senders, receivers=receivers, vectors=flat[senders] - flat[receivers])
        alpha = mara(features.repeat(grid.num_points, 1), edges)
        (first,) = torch.autograd.grad(alpha.sum(), positions, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), [positions, *mara.parameters()])
        assert torch.isfinite(alpha).all()
        assert torch.isfinite(first).all()
        assert all(torch.isfinite(gradient).all() for gradient in second)
        assert first.abs().max() < 10
        assert second[0].abs().max() < 1e4


def test_force_at_a_kink_is_that_of_central_differences():
    grid = equiangular(4, 8)
    mara = random_mara(2, grid, 8)
    features = torch.ones(2, 2, dtype=DOUBLE)

    def alpha(bond):
        edges = BareEdges(senders=torch.tensor([1, 0]), receivers=torch.tensor([0, 1]), vectors=bond)
        return mara(features, edges).sum()

    for direction in grid.points[[0, 9, 21]]:
        bond = torch.stack([1.3 * direction, -1.3 * direction]).requires_grad_()
        (gradient,) = torch.autograd.grad(alpha(bond), bond)
        step = 1e-5 * torch.eye(3, dtype=DOUBLE)
        pull = torch.stack([alpha(bond + torch.stack([s, -s])) - alpha(bond - torch.stack([s, -s])) for s in step])
        torch.testing.assert_close(gradient[0] - gradient[1], pull / 2e-5, rtol=0, atol=1e-7)


def test_squared_field_is_the_square_and_a_polynomial():
    grid, vectors = lebedev(14), torch.randn(5, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    distance = sphere_field(vectors, grid.points)
    lengths = vectors.norm(dim=1, keepdim=True)
    polynomial = 2 * lengths**2 - 2 * lengths * (vectors @ grid.points.T)
    torch.testing.assert_close(sphere_field(vectors, grid.points, "squared"), polynomial, rtol=0, atol=1e-13)
    torch.testing.assert_close(distance**2, polynomial, rtol=0, atol=1e-13)
    assert torch.allclose(
        sphere_field(1.7 * grid.points, grid.points).diagonal(), torch.zeros(14, dtype=DOUBLE), atol=1e-15
    )


@pytest.mark.parametrize("options", [{}, {"where": "node"}, {"normalize": True}, {"field": "squared"}])
def test_empty_and_zero_length(options):
    mara = random_mara(5, **options)
    none = edges_of(torch.zeros(0, 3, dtype=DOUBLE))
    assert mara(torch.zeros(0, 5, dtype=DOUBLE), none).shape == (0,)
    features, positions = system(2)
    positions = (100 * torch.arange(2.0)[:, None] + positions.detach()).requires_grad_()
    alone = mara(features, edges_of(positions))
    assert alone.shape == (0,)
    assert all(
        torch.isfinite(g).all()
        for g in torch.autograd.grad(alone.sum(), list(mara.parameters()), allow_unused=True)
        if g is not None
    )

    vectors = torch.zeros(2, 3, dtype=DOUBLE, requires_grad=True)
    pair = BareEdges(
        senders=torch.tensor([1, 0]),
        receivers=torch.tensor([0, 1]),
        vectors=vectors,
        envelope=torch.ones(2, dtype=DOUBLE),
    )
    alpha = mara(features, pair)
    (first,) = torch.autograd.grad(alpha.sum(), vectors, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum() + alpha.sum(), vectors)
    assert torch.isfinite(alpha).all()
    assert torch.isfinite(first).all()
    assert torch.isfinite(second).all()


# ------------------------------------------------------------------------------------------------- gate of a node


def test_node_gate_belongs_to_the_sender():
    features, positions = system()
    edges = edges_of(positions)
    alpha = random_mara(5, where="node")(features, edges)
    for atom in range(6):
        own = alpha[edges.senders == atom]
        assert (own == own[0]).all()
    with pytest.raises(ValueError, match="envelope, which these edges do not have"):
        random_mara(5, where="node")(
            features, BareEdges(senders=edges.senders, receivers=edges.receivers, vectors=edges.vectors)
        )


def test_node_gate_without_a_neighbour_inside_the_cutoff_is_one():
    """At the cutoff the envelope is zero, or what rounding makes of it."""
    features, positions = system(2)
    for rounding in (0.0, 1e-17, -1e-17):
        edges = edges_of(positions, 20.0)
        envelope = torch.full((2,), rounding, dtype=DOUBLE, requires_grad=True)
        pair = BareEdges(senders=edges.senders, receivers=edges.receivers, vectors=edges.vectors, envelope=envelope)
        alpha = random_mara(5, where="node")(features, pair)
        (slope,) = torch.autograd.grad(alpha.sum(), envelope)
        assert torch.equal(alpha, torch.ones(2, dtype=DOUBLE))
        assert torch.equal(slope, torch.zeros(2, dtype=DOUBLE))


def test_node_gate_is_smooth_when_a_neighbour_leaves():
    """Value and slope of a gated sum of messages across the cutoff; without the envelope the same test fails."""
    cutoff = 4.0
    features, _ = system(4)
    others = torch.tensor([[0.0, 0.0, 0.0], [1.1, 0.3, 0.0], [-0.4, 1.2, 0.5]], dtype=DOUBLE)
    mara = random_mara(5, where="node")

    def total(distance, flat):
        leaver = others[0] + distance * torch.tensor([0.48, -0.6, 0.64], dtype=DOUBLE)
        edges = edges_of(torch.cat([others, leaver[None]]), cutoff)
        weight = edges.envelope
        if flat:
            edges = BareEdges(
                senders=edges.senders,
                receivers=edges.receivers,
                vectors=edges.vectors,
                envelope=torch.ones_like(weight),
            )
        return (mara(features, edges) * weight).sum()

    def jumps(flat):
        at = torch.tensor(cutoff, dtype=DOUBLE)
        values, slopes = [], []
        for side in (-1e-7, 1e-7):
            distance = (at + side).requires_grad_()
            value = total(distance, flat)
            (slope,) = torch.autograd.grad(value, distance)
            values.append(value.item())
            slopes.append(slope.item())
        return abs(values[1] - values[0] - 1e-7 * sum(slopes)), abs(slopes[1] - slopes[0])

    smooth, broken = jumps(flat=False), jumps(flat=True)
    assert max(smooth) < 1e-6
    assert max(broken) > 1e-3


# -------------------------------------------------------------------------------------------------------- ablations


def test_ablation_switches():
    assert MARA(5, positional=False).p is None
    frozen = MARA(5, frozen_projections=True)
    assert {name for name, p in frozen.named_parameters() if p.requires_grad} == {"p", "W_gate"}
    both = MARA(5, positional=False, frozen_projections=True)
    assert {name for name, p in both.named_parameters() if p.requires_grad} == {"W_gate"}
    for lat, lon in [(2, 2), (2, 4), (4, 4), (4, 8), (8, 8)]:
        assert MARA(5, equiangular(lat, lon)).p.shape == (lat * lon, 32)


def test_dropout_acts_in_training_only_and_keeps_the_mean():
    features, positions = system()
    edges = edges_of(positions)
    for normalize in (False, True):
        mara = random_mara(5, dropout=0.3, normalize=normalize)
        plain = mara.eval()(features, edges)
        assert torch.equal(plain, mara(features, edges))
        mara.train()
        torch.manual_seed(0)
        draws = torch.stack([mara.pooled(features, edges) for _ in range(200)]).detach()
        assert draws.std(0).min() > 1e-3
        error = draws.mean(0) - mara.eval().pooled(features, edges)
        assert (error.abs() < 5 * draws.std(0) / 14 + 1e-6).all()


def test_from_config_and_state():
    config = MARAConfig(
        form="published",
        frame="lab",
        num_heads=2,
        hidden_dim=16,
        where="node",
        grid=GaussLegendreGrid(num_lat=3, num_lon=6),
        dropout=0.1,
    )
    mara = gate_of(config, SPEC)
    assert (mara.num_features, mara.hidden_dim, mara.num_heads, mara.where, mara.field) == (
        6,
        16,
        2,
        "node",
        "distance",
    )
    assert mara.grid.num_points == 18
    other = gate_of(config, SPEC)
    other.load_state_dict(mara.state_dict())
    features, positions = system(num_features=6, dtype=torch.float32)
    stacked = torch.cat([features[:, None], torch.randn(6, 3, 6)], dim=1)
    edges = edges_of(positions)
    assert torch.equal(other.eval()(stacked, edges), mara.eval()(features, edges))
    assert set(mara.state_dict()) == {"W_h", "W_f", "Wk_f", "Wv_h", "Wv_f", "p", "W_gate"}


def test_start_is_reproducible():
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(MARA(5).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["p"], states[2]["p"])


def test_grid_keeps_its_digits_through_casts():
    mara = MARA(5).half().double()
    assert torch.equal(mara.points, mara.grid.points)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MARA(5, lebedev(74)), "Lebedev 74 has negative ones"),
        (lambda: MARA(5, hidden_dim=10, num_heads=4), "multiple of num_heads"),
        (lambda: MARA(5, dropout=1.0), "dropout must be"),
        (lambda: MARA(5, where="atom"), "where must be 'edge' or 'node', not 'atom'"),
        (lambda: gate_of(PUBLISHED.model_copy(update={"grid": LEBEDEV_230}), SPEC), "Lebedev 230 has negative ones"),
        (lambda: MARA(5)(torch.zeros(2, 4), edges_of(torch.zeros(0, 3))), "built for 5 features per atom, got 4"),
    ],
)
def test_mistakes_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------------- alone, and maps


def test_published_call():
    torch.manual_seed(0)
    features, positions = system(dtype=torch.float32)
    attention = SEAttention(input_size=5, hidden_size=16, H=4, W=8)
    edges = edges_of(positions)
    edge_index = torch.stack([edges.senders, edges.receivers])
    gated, gate = attention(features, positions, edge_index)
    assert torch.equal(gate, attention.mara(features, edges))
    assert torch.equal(gated, gate[:, None] * features[edges.senders])
    messages = torch.randn(len(gate), 3, 2)
    assert torch.equal(attention(features, positions, edge_index, messages)[0], gate[:, None, None] * messages)
    moved, shifts = positions.clone(), torch.zeros(len(gate), 3)
    moved[0] += 10
    shifts[edges.senders == 0] -= 10
    shifts[edges.receivers == 0] += 10
    torch.testing.assert_close(attention(features, moved, edge_index, shifts=shifts)[1], gate, rtol=0, atol=1e-5)


def test_attention_maps():
    features, positions = system()
    edges = edges_of(positions)
    for options in ({"num_heads": 2}, {"normalize": True}):
        mara = random_mara(5, **options)
        maps = mara.attention_maps(features, edges, torch.tensor([4, 1]))
        assert maps.attention.shape == (2, mara.num_heads, 32, 32)
        assert maps.profile.shape == (2, 32)
        torch.testing.assert_close(maps.attention.sum(-1), torch.ones(2, mara.num_heads, 32, dtype=DOUBLE))
        torch.testing.assert_close(maps.profile.sum(-1), torch.ones(2, dtype=DOUBLE))
        everything = mara.attention_maps(features, edges)
        torch.testing.assert_close(everything.attention[[4, 1]], maps.attention, rtol=0, atol=1e-14)
        torch.testing.assert_close(maps.alpha, mara(features, edges), rtol=0, atol=1e-14)
        assert maps.grid is mara.grid
