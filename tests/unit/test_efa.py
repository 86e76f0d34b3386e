"""Euclidean fast attention on its own: derivatives, batches, symmetries, memory-saving blocks."""

from __future__ import annotations

import math

import pytest
import torch

from steradian.config.efa import EFAConfig, TensorIntegrationConfig
from steradian.equivariant.irreps import all_degrees, dim, natural_degrees
from steradian.operators.efa import attention as efa_attention
from steradian.operators.efa import pairs as efa_pairs
from steradian.operators.efa import sums as efa_kernel
from steradian.operators.efa.attention import DirectionRule, attention_per_direction, rotary_attention, rotary_encoding
from steradian.operators.efa.efa import EuclideanFastAttention, frequencies_up_to
from steradian.operators.efa.systems import blocks_of_systems, join_blocks
from steradian.sphere.grids import design, lebedev


@pytest.fixture(params=["linear", "pairs"])
def order(request, monkeypatch):
    """Both orders of the same sums, whatever is cheaper; small pieces so that there are several."""
    monkeypatch.setattr(efa_attention, "pairs_are_cheaper", lambda *shape: request.param == "pairs")
    monkeypatch.setattr(efa_attention, "NUMBERS_OF_MOMENTS", 2000)
    monkeypatch.setattr(efa_pairs, "NUMBERS_PER_TILE", 64)
    return request.param


SYSTEM = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 4])  # system 3 has no atoms
NUM_SYSTEMS = 5


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(seed=0, num_atoms=11, channels=4):
    return (
        random(num_atoms, 4, channels, seed=seed),
        random(num_atoms, 4, channels, seed=seed + 1),
        random(num_atoms, 4, 3, seed=seed + 2),
        2 * random(num_atoms, 3, seed=seed + 3),
        0.3 + random(channels // 2, seed=seed + 4).abs(),
    )


def rule(num_points=26):
    grid = lebedev(num_points)
    return DirectionRule.from_grid(grid.points, grid.weights)


def quadratic(q, k, v, positions, frequencies, points, weights, system):
    """The definition, pair by pair."""
    weights = weights / weights.sum()
    out = torch.zeros_like(v)
    scale = q[0].numel() ** -0.5
    for direction, weight in zip(points, weights):
        phases = (positions @ direction)[:, None] * frequencies
        turned_q, turned_k = rotary_encoding(q, phases).flatten(1), rotary_encoding(k, phases).flatten(1)
        scores = scale * (turned_q @ turned_k.T) * (system[:, None] == system)
        out = out + weight * torch.einsum("ij,jde->ide", scores, v)
    return out


@pytest.mark.parametrize("grid", [lebedev(26), lebedev(74), design(5)], ids=lambda grid: grid.name)
def test_equals_the_sum_over_pairs(grid, order):
    made = DirectionRule.from_grid(grid.points, grid.weights)
    ours = rotary_attention(*problem(), made, SYSTEM, NUM_SYSTEMS)
    theirs = quadratic(*problem(), grid.points, grid.weights, SYSTEM)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-13)


def test_two_atoms_have_the_analytic_answer(order):
    """Two atoms, one frequency, scalars: y = 1 + sin(w r) / (w r)."""
    for distance in (0.5, 2.0, 4.0):
        positions = torch.tensor([[0.3, -0.2, 1.0]] * 2, dtype=torch.float64)
        positions[1] += distance * torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)
        q = torch.tensor([[[math.sqrt(2), 0.0]]] * 2, dtype=torch.float64)
        k, v = torch.tensor([[[1.0, 0.0]]] * 2, dtype=torch.float64), torch.ones(2, 1, 1, dtype=torch.float64)
        w = torch.tensor([0.7], dtype=torch.float64)
        y = rotary_attention(q, k, v, positions, w, rule(194), torch.zeros(2, dtype=torch.int64))
        assert torch.allclose(y.flatten(), torch.full((2,), 1 + math.sin(0.7 * distance) / (0.7 * distance)).double())


def test_first_second_and_third_derivatives(order):
    inputs = [
        tensor[:6].requires_grad_(True) if tensor.ndim > 1 else tensor.requires_grad_(True) for tensor in problem()
    ]
    system = SYSTEM[:6].contiguous()
    functions = (random(2, 7), random(3, 7, seed=9))
    for made, given in ((rule(14), None), (rule(14), functions)):

        def attention(*tensors, made=made, given=given):
            return rotary_attention(*tensors, made, system, NUM_SYSTEMS, functions=given)

        assert torch.autograd.gradcheck(attention, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(attention, inputs, fast_mode=True)

    def slope(positions):
        q, k, v, _, w = (tensor.detach() for tensor in inputs)
        y = rotary_attention(q, k, v, positions, w, rule(14), system, NUM_SYSTEMS)
        return torch.autograd.grad(y.square().sum(), positions, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(slope, [inputs[3]], fast_mode=True)


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_batch_equals_its_systems(shuffled, order):
    """Sizes 4, 2, 4, 0 and 1: padded, joined, and put back in order; also systems of equal size."""
    system = SYSTEM.clone() if not shuffled else torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3])
    q, k, v, positions, w = problem()
    together = rotary_attention(q, k, v, positions, w, rule(), system, NUM_SYSTEMS)
    for number in range(NUM_SYSTEMS):
        own = system == number
        alone = rotary_attention(
            q[own], k[own], v[own], positions[own], w, rule(), torch.zeros(int(own.sum()), dtype=torch.int64)
        )
        assert torch.allclose(together[own], alone, rtol=0, atol=1e-13)


def test_blocks_hold_every_atom_once():
    sizes = [3, 7, 7, 1, 30, 6, 0, 8]
    system = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    blocks, place = blocks_of_systems(system, len(sizes))
    assert sorted(number for block in blocks for number in block.systems) == [0, 1, 2, 3, 4, 5, 7]
    assert sum(len(block.systems) * block.num_atoms for block in blocks) < 1.2 * sum(sizes)
    values = random(len(system), 2)
    assert torch.equal(join_blocks([block.take(values) for block in blocks], place), values)
    assert blocks_of_systems(system, len(sizes))[0] is blocks


def test_orders_blocks_and_chunks_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    system = torch.zeros(300, dtype=torch.int64)
    given = [tensor.requires_grad_(True) for tensor in problem(num_atoms=300)]
    results = []
    for order, block, chunk in (
        ("linear", 1 << 30, 1 << 30),
        ("linear", 64 * 50, 300),
        ("pairs", 1 << 30, 0),
        ("pairs", 5000, 0),
    ):
        monkeypatch.setattr(efa_attention, "pairs_are_cheaper", lambda *shape, order=order: order == "pairs")
        monkeypatch.setattr(efa_pairs, "NUMBERS_PER_TILE", block)
        monkeypatch.setattr(efa_kernel, "NUMBERS_PER_BLOCK", block)
        monkeypatch.setattr(efa_attention, "NUMBERS_OF_MOMENTS", chunk)
        y = rotary_attention(*given, rule(), system)
        cotangent = torch.randn(y.shape, generator=generator.manual_seed(1), dtype=y.dtype)
        results.append([y, *torch.autograd.grad((y * cotangent).sum(), given)])
    for others in results[1:]:
        for one, other in zip(results[0], others):
            assert torch.allclose(one, other, rtol=0, atol=1e-11)


def test_deferred_integration_is_what_is_averaged(order):
    grid = lebedev(26)
    q, k, v, positions, w = problem()
    per_direction = attention_per_direction(q, k, v, positions, w, grid.points, SYSTEM, NUM_SYSTEMS)
    weights = grid.weights / grid.weights.sum()
    mean = torch.einsum("m,nmde->nde", weights, per_direction)
    assert torch.allclose(mean, rotary_attention(q, k, v, positions, w, rule(), SYSTEM, NUM_SYSTEMS), atol=1e-13)
    # with functions of the direction, even and odd, listed or not listed opposites
    x, y, z = grid.points.T
    even, odd = torch.stack([x * y, z * z]), torch.stack([z, x, x * x * y])
    expected = torch.einsum("m,am,nmde->nade", weights, torch.cat([even, odd]), per_direction)
    made = rule()
    x, y, z = made.directions.T
    functions = (torch.stack([x * y, z * z]), torch.stack([z, x, x * x * y]))
    found = rotary_attention(q, k, v, positions, w, made, SYSTEM, NUM_SYSTEMS, functions=functions)
    assert torch.allclose(found, expected, atol=1e-13)
    whole = DirectionRule(grid.points, weights, symmetric=False)
    found = rotary_attention(q, k, v, positions, w, whole, SYSTEM, NUM_SYSTEMS, functions=(even, odd))
    assert torch.allclose(found, expected, atol=1e-13)


def test_float32_far_from_the_origin():
    q, k, v, positions, w = (tensor.float() for tensor in problem())
    shift = torch.tensor([512.0, -256.0, 1024.0])
    positions = positions + shift
    back = positions - shift  # the same rounded positions
    near = rotary_attention(q, k, v, back, w, rule().to(q), SYSTEM, NUM_SYSTEMS)
    far = rotary_attention(q, k, v, positions, w, rule().to(q), SYSTEM, NUM_SYSTEMS)
    assert torch.allclose(near, far, rtol=0, atol=2e-4 * float(near.abs().max()))


def turned(features, degrees, matrix):
    """Features of degrees 0 and 1 turned by a rotation."""
    out, start = features.clone(), 0
    for degree, _ in degrees:
        if degree == 1:
            out[:, start : start + 3] = torch.einsum("ij,njc->nic", matrix, features[:, start : start + 3])
        start += 2 * degree + 1
    return out


@pytest.mark.filterwarnings("ignore:a system is about")
@pytest.mark.parametrize("integration", [None, TensorIntegrationConfig(learned_paths=True)])
@pytest.mark.parametrize("degrees", [natural_degrees(1), all_degrees(1)], ids=["natural", "both"])
def test_equivariance_improves_with_the_rule(degrees, integration, order):
    matrix = torch.linalg.qr(random(3, 3))[0]
    matrix = matrix * torch.linalg.det(matrix)
    features, positions = random(7, dim(degrees), 4), 2 * random(7, 3, seed=1)
    system, errors = torch.zeros(7, dtype=torch.int64), []
    for num_points in (26, 50, 194):
        torch.manual_seed(0)
        config = EFAConfig(num_points=num_points, max_length_A=24.0, tensor_integration=integration, max_frequency=9.0)
        attention = EuclideanFastAttention(config, degrees, 4).double()
        assert attention.degrees_out == degrees
        before = turned(attention(features, positions, system), degrees, matrix)
        after = attention(turned(features, degrees, matrix), positions @ matrix.T, system)
        errors.append(((after - before).abs().max() / before.abs().max()).item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] < 1e-4
    assert errors[2] < 1e-12


def test_small_systems_are_summed_pair_by_pair():
    """The number of atoms where the orders cost the same falls with the width of the features."""
    wide, narrow = (50, 16, 8, 128), (50, 8, 2, 32)
    assert efa_pairs.pairs_are_cheaper(500, *wide)
    assert not efa_pairs.pairs_are_cheaper(1000, *wide)
    assert efa_pairs.pairs_are_cheaper(64, *narrow)
    assert not efa_pairs.pairs_are_cheaper(200, *narrow)


def test_constants_keep_their_digits_through_casts():
    attention = EuclideanFastAttention(EFAConfig(num_points=50), natural_degrees(1), 4).float().double()
    assert torch.equal(attention.frequencies, frequencies_up_to(math.pi, 15.0, 2))
    assert abs(float(attention.bands[0].rule.weights.sum()) - 1) < 1e-15


@pytest.mark.parametrize("integration", [None, {"max_degree_sph": 1, "max_degree": 1}])
def test_graded_rules_keep_the_error(integration):
    """Lower frequencies need fewer directions for the same error, up to the largest distance there is."""
    features, positions = (
        random(12, 4, 32),
        5.7 * torch.rand(12, 3, generator=torch.Generator().manual_seed(1)).double(),
    )
    system = torch.zeros(12, dtype=torch.int64)
    results = {}
    for name, options in {"plain": {}, "graded": {"graded": True}, "fine": {"num_points": 194}}.items():
        torch.manual_seed(0)
        config = EFAConfig(max_length_A=10.0, tensor_integration=integration, **options)
        attention = EuclideanFastAttention(config, natural_degrees(1), 32).double()
        results[name] = attention(features, positions, system)
        if name == "graded":
            directions = [2 * len(band.rule.weights) for band in attention.bands]
            assert directions[-1] == 50
            assert directions == sorted(directions)
            counts = [band.pairs.stop - band.pairs.start for band in attention.bands]
            assert sum(counts) == 16
            assert sum(m * n for m, n in zip(directions, counts)) < (0.8 if integration is None else 1.0) * 800
            assert "points)" in attention.summary()
    scale = results["fine"].abs().max()
    errors = {name: ((results[name] - results["fine"]).abs().max() / scale).item() for name in ("plain", "graded")}
    assert 1e-13 < errors["plain"] < 1e-8
    assert 1e-13 < errors["graded"] < 1e-8
    with pytest.raises(ValueError, match="graded rules need fixed frequencies"):
        EFAConfig(graded=True, trainable_frequencies=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_degree_qk": 2}, "max_degree_qk 2 is asked for, but the features end at degree 1"),
        ({"max_degree_v": 3}, "max_degree_v 3"),
        ({"num_points": 51}, "no Lebedev rule with 51 points"),
        ({"parametrized": False}, "even number of channels, not 3"),  # of three channels, the others of four
        ({"tensor_integration": {"degree_scaling": [1.0]}}, "degree_scaling lists 1 factors for degrees 0..1"),
        ({"tensor_integration": {"max_degree": 3}}, "degree 3 cannot be reached"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        EuclideanFastAttention(
            EFAConfig.model_validate(options), natural_degrees(1), 3 if "parametrized" in options else 4
        )


def test_configuration_mistakes():
    with pytest.raises(ValueError, match="must be even"):
        EFAConfig(num_features_qk=5)
    with pytest.raises(ValueError, match="need parametrized"):
        EFAConfig(parametrized=False, num_features_v=4)
