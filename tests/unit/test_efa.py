"""Euclidean fast attention on its own: derivatives, batches, symmetries, memory-saving blocks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from steradian.config.operators import EFAConfig, TensorIntegrationConfig
from steradian.equivariant.harmonics import spherical_harmonics
from steradian.equivariant.irreps import all_degrees, dim, natural_degrees
from steradian.equivariant.sphere import design, lebedev
from steradian.operators.efa import attention as efa_attention
from steradian.operators.efa import sums as efa_sums
from steradian.operators.efa.attention import Waves, arranged, join_blocks, rotary_attention
from steradian.operators.efa.operator import EuclideanFastAttention, Systems
from steradian.operators.efa.paper import (
    QKV,
    attention_per_direction,
    erope,
    frequencies_up_to,
    invariant_attention,
    mean_over_directions,
    tensor_integration,
)
from steradian.operators.efa.rules import DirectionRule


@pytest.fixture(params=["linear", "pairs"])
def order(request, monkeypatch):
    """Both orders of the same sums, whatever is cheaper; small pieces so that there are several."""
    monkeypatch.setattr(efa_attention, "pairs_are_cheaper", lambda *shape: request.param == "pairs")
    monkeypatch.setattr(efa_attention, "NUMBERS_OF_MOMENTS", 2000)
    monkeypatch.setattr(efa_sums, "NUMBERS_PER_TILE", 64)
    return request.param


SIZES = (4, 2, 4, 0, 1)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(seed=0, num_atoms=11, channels=4):
    return (
        random(num_atoms, 4, channels, seed=seed) / math.sqrt(4 * channels),
        random(num_atoms, 4, channels, seed=seed + 1),
        random(num_atoms, 4, 3, seed=seed + 2),
        2 * random(num_atoms, 3, seed=seed + 3),
        0.3 + random(channels // 2, seed=seed + 4).abs(),
    )


def rule(num_points=26):
    return DirectionRule.from_grid(lebedev(num_points))


def attend(q, k, v, positions, frequencies, made, sizes=SIZES, functions=None):
    """Without functions ``[N, D_v, F_v]``."""
    out = rotary_attention(QKV(q, k, v, positions), Waves.of_rule(made, frequencies, functions), sizes)
    return out.squeeze(1) if functions is None else out


def test_the_paper_turns_channels_as_complex_numbers():
    """Equation 1 with complex numbers, and what follows: only differences of positions along the direction matter."""
    q, k, v, positions, w = problem()
    direction = torch.tensor([0.48, -0.6, 0.64], dtype=torch.float64)
    turned = torch.view_as_complex(erope(q, positions, direction, w).unflatten(-1, (-1, 2)).contiguous())
    phase = torch.exp(1j * w * (positions @ direction)[:, None])
    assert torch.allclose(turned, torch.view_as_complex(q.unflatten(-1, (-1, 2))) * phase[:, None], atol=1e-15)
    moved = attention_per_direction(QKV(q, k, v, positions + 1.7), w, direction[None], SIZES)
    assert torch.allclose(
        moved, attention_per_direction(QKV(q, k, v, positions), w, direction[None], SIZES), atol=1e-12
    )


@pytest.mark.parametrize("grid", [lebedev(26), lebedev(74), design(5)], ids=lambda grid: grid.name)
def test_equals_the_paper(grid, order):
    """Lebedev 74 has negative weights, the design is no Lebedev rule."""
    q, k, v, positions, w = problem()
    theirs = invariant_attention(QKV(q, k, v, positions), w, grid.points, grid.weights, SIZES)
    ours = attend(q, k, v, positions, w, DirectionRule.from_grid(grid))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-13)


def test_a_grid_without_opposites_is_refused():
    grid = lebedev(26)
    for changed in (replace(grid, points=grid.points.abs()), replace(grid, weights=grid.weights + torch.arange(26))):
        with pytest.raises(ValueError, match="no inversion symmetry: take a Lebedev rule"):
            DirectionRule.from_grid(changed)


def test_two_atoms_have_the_analytic_answer(order):
    """Two atoms, one frequency, scalars: y = 1 + sin(w r) / (w r)."""
    for distance in (0.5, 2.0, 4.0):
        positions = torch.tensor([[0.3, -0.2, 1.0]] * 2, dtype=torch.float64)
        positions[1] += distance * torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)
        q = k = torch.tensor([[[1.0, 0.0]]] * 2, dtype=torch.float64)
        v = torch.ones(2, 1, 1, dtype=torch.float64)
        w = torch.tensor([0.7], dtype=torch.float64)
        y = attend(q, k, v, positions, w, rule(194), (2,))
        assert torch.allclose(y.flatten(), torch.full((2,), 1 + math.sin(0.7 * distance) / (0.7 * distance)).double())


def test_first_second_and_third_derivatives(order):
    inputs = [
        tensor[:6].requires_grad_(True) if tensor.ndim > 1 else tensor.requires_grad_(True) for tensor in problem()
    ]
    functions = (random(2, 7), random(3, 7, seed=9))
    for made, given in ((rule(14), None), (rule(14), functions)):

        def attention(*tensors, made=made, given=given):
            return attend(*tensors, made, SIZES[:2], functions=given)

        assert torch.autograd.gradcheck(attention, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(attention, inputs, fast_mode=True)

    def slope(positions):
        q, k, v, _, w = (tensor.detach() for tensor in inputs)
        y = attend(q, k, v, positions, w, rule(14), SIZES[:2])
        return torch.autograd.grad(y.square().sum(), positions, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(slope, [inputs[3]], fast_mode=True)


def test_each_derivative_can_be_had_alone(order):
    given = problem()
    inputs = [tensor.clone().requires_grad_(True) for tensor in given]
    together = torch.autograd.grad(attend(*inputs, rule()).square().sum(), inputs)
    for number, expected in enumerate(together):
        one = [tensor if place == number else given[place] for place, tensor in enumerate(inputs)]
        (alone,) = torch.autograd.grad(attend(*one, rule()).square().sum(), one[number])
        assert torch.allclose(alone, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", [SIZES, (3, 3, 3, 2)], ids=str)
def test_a_batch_equals_its_systems(sizes, order):
    """Padded, joined, and put back in order; also systems of equal size."""
    *given, w = problem()
    together = attend(*given, w, rule(), sizes)
    for one, *own in zip(together.split(sizes), *(tensor.split(sizes) for tensor in given)):
        assert torch.allclose(one, attend(*own, w, rule(), (len(one),)), rtol=0, atol=1e-13)


def test_blocks_hold_every_atom_once():
    sizes = (3, 7, 7, 1, 30, 6, 0, 8)
    blocks, place = arranged(sizes, torch.device("cpu"))
    assert sorted(number for block in blocks for number in block.systems) == [0, 1, 2, 3, 4, 5, 7]
    assert sum(len(block.systems) * block.num_atoms for block in blocks) < 1.2 * sum(sizes)
    values = random(sum(sizes), 2)
    assert torch.equal(join_blocks([block.take(values) for block in blocks], place), values)


def test_orders_blocks_and_chunks_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    given = [tensor.requires_grad_(True) for tensor in problem(num_atoms=321)]
    results = []
    for order, block, chunk in (
        ("linear", 1 << 30, 1 << 30),
        ("linear", 64 * 50, 300),
        ("pairs", 1 << 30, 0),
        ("pairs", 5000, 0),
    ):
        monkeypatch.setattr(efa_attention, "pairs_are_cheaper", lambda *shape, order=order: order == "pairs")
        monkeypatch.setattr(efa_sums, "NUMBERS_PER_TILE", block)
        monkeypatch.setattr(efa_sums, "NUMBERS_PER_BLOCK", block)
        monkeypatch.setattr(efa_attention, "NUMBERS_OF_MOMENTS", chunk)
        y = attend(*given, rule(), (321,))
        cotangent = torch.randn(y.shape, generator=generator.manual_seed(1), dtype=y.dtype)
        results.append([y, *torch.autograd.grad((y * cotangent).sum(), given)])
    for others in results[1:]:
        for one, other in zip(results[0], others):
            assert torch.allclose(one, other, rtol=0, atol=1e-11)


def test_functions_of_the_direction_are_integrated_with_the_attention(order):
    """Even and odd ones, against the paper's attention along every direction."""
    grid, made, (q, k, v, positions, w) = lebedev(26), rule(), problem()
    per_direction = attention_per_direction(QKV(q, k, v, positions), w, grid.points, SIZES)

    def functions(points):
        x, y, z = points.T
        return torch.stack([x * y, z * z]), torch.stack([z, x, x * x * y])

    values = torch.cat(functions(grid.points)).T[:, :, None, None] * per_direction.unsqueeze(2)  # [N, M, 5, D_v, F_v]
    expected = mean_over_directions(values, grid.weights)
    found = attend(q, k, v, positions, w, made, functions=functions(made.directions))
    assert torch.allclose(found, expected, rtol=0, atol=1e-13)


def test_float32_far_from_the_origin():
    q, k, v, positions, w = (tensor.float() for tensor in problem())
    shift = torch.tensor([512.0, -256.0, 1024.0])
    positions = positions + shift
    back = positions - shift  # the same rounded positions
    near = attend(q, k, v, back, w, rule().to(q))
    far = attend(q, k, v, positions, w, rule().to(q))
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
    systems, errors = Systems((7,)), []
    for num_points in (26, 50, 194):
        torch.manual_seed(0)
        config = EFAConfig(num_points=num_points, max_length_A=24.0, tensor_integration=integration, max_frequency=9.0)
        attention = EuclideanFastAttention(config, degrees, 4).double()
        assert attention.degrees_out == degrees
        before = turned(attention(features, positions, systems), degrees, matrix)
        after = attention(turned(features, degrees, matrix), positions @ matrix.T, systems)
        errors.append(((after - before).abs().max() / before.abs().max()).item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] < 1e-4
    assert errors[2] < 1e-12


@pytest.mark.filterwarnings("ignore:a system is about")
@pytest.mark.parametrize("scaling", [None, [1.0, 0.5, 2.0]])
def test_module_equals_the_paper(scaling, order):
    """With harmonics up to degree 2, their scaling, a learned coupling, and irreps that are said to be there but are
    not: the scale of the scores counts them."""
    torch.manual_seed(0)
    integration = {"max_degree_sph": 2, "max_degree": 2, "learned_paths": True, "degree_scaling": scaling}
    config = EFAConfig(num_points=26, tensor_integration=integration, divide_by=3.0, max_degree=2)
    attention = EuclideanFastAttention(config, natural_degrees(1), 4, nominal=natural_degrees(2)).double()
    features, positions, grid = random(11, 4, 4), 2 * random(11, 3, seed=1), lebedev(26)
    queries, keys, values = attention.projections(features)
    atoms = QKV(queries / math.sqrt(9 * 4), keys, values, positions)
    per_direction = attention_per_direction(atoms, attention.frequencies, grid.points, SIZES)
    degrees = torch.tensor([0, 1, 1, 1, 2, 2, 2, 2, 2])
    factors = (2 * degrees + 1).double().rsqrt() * torch.tensor(scaling or [1.0, 1.0, 1.0], dtype=torch.float64)[
        degrees
    ]
    harmonics = (spherical_harmonics(grid.points, 2) * factors).unsqueeze(-1).expand(-1, -1, 4)
    theirs = tensor_integration(harmonics, per_direction, grid.weights, attention.integration.product) / 3
    assert theirs.abs().max() > 0.01
    assert torch.allclose(attention(features, positions, Systems(SIZES)), theirs, rtol=0, atol=1e-13)


def test_small_systems_are_summed_pair_by_pair():
    """The number of atoms where the orders cost the same falls with the width of the features."""
    wide, narrow = (50, 16, 8, 128), (50, 8, 2, 32)
    assert efa_sums.pairs_are_cheaper(500, *wide)
    assert not efa_sums.pairs_are_cheaper(1000, *wide)
    assert efa_sums.pairs_are_cheaper(64, *narrow)
    assert not efa_sums.pairs_are_cheaper(200, *narrow)


def test_what_inference_mode_prepared_serves_gradients():
    sizes, x = (2, 3), random(5, 4, 4).float()
    attention = EuclideanFastAttention(EFAConfig(num_points=50), natural_degrees(1), 4)
    arranged.cache_clear()
    with torch.inference_mode():
        before = attention(x, x[:, :3, 0], Systems(sizes))
    positions = x[:, :3, 0].clone().requires_grad_(True)
    after = attention(x, positions, Systems(sizes))
    assert torch.equal(after, before)
    slope = torch.autograd.grad(after.square().sum(), positions, create_graph=True)[0]
    slope.square().sum().backward()
    assert bool(positions.grad.any())


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
    results = {}
    for name, options in {"plain": {}, "graded": {"graded": True}, "fine": {"num_points": 194}}.items():
        torch.manual_seed(0)
        config = EFAConfig(max_length_A=10.0, tensor_integration=integration, **options)
        attention = EuclideanFastAttention(config, natural_degrees(1), 32).double()
        results[name] = attention(features, positions, Systems((12,)))
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
