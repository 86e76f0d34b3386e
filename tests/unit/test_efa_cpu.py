"""Machine code of Euclidean fast attention against plain PyTorch, and the basis of its waves."""

from __future__ import annotations

import math

import pytest
import torch

from steradian.equivariant.sphere import lebedev
from steradian.operators.efa import cpu as efa_cpu
from steradian.operators.efa.attention import Waves, rotary_attention
from steradian.operators.efa.cpu import CombinedWaves
from steradian.operators.efa.cpu_pairs import PairShape, attend_pairs, attend_pairs_plainly
from steradian.operators.efa.cpu_sums import CpuSums, aligned
from steradian.operators.efa.paper import QKV, invariant_attention
from steradian.operators.efa.rules import STEPS, DirectionRule, RuleWaves, spiral, step_of_phase
from steradian.operators.efa.sums import moments
from steradian.polynomials.backend import use_backend

COUNTS = {"several": [4, 2, 0, 5, 1], "one atom": [1], "one system": [37], "equal": [3, 3, 3]}


@pytest.fixture(params=["sums", "pairs"])
def order(request, monkeypatch):
    """Both orders of the same sums, whatever is cheaper."""
    monkeypatch.setattr(efa_cpu, "pairs_are_cheaper", lambda *shape: request.param == "pairs")
    return request.param


def rule(num_points=26, dtype=torch.float64):
    return DirectionRule.from_grid(lebedev(num_points)).to(torch.zeros((), dtype=dtype))


def attend(q, k, v, positions, frequencies, made, sizes):
    return rotary_attention(QKV(q, k, v, positions), Waves.of_rule(made, frequencies), sizes).squeeze(1)


def problem(counts, channels=4, channels_v=3, components=(4, 2), dtype=torch.float64, size=2.0):
    """Queries, keys, values, positions and frequencies, the first of them zero."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    number = sum(counts)
    inputs = [random(number, components[0], channels) for _ in range(2)]
    inputs[0] /= math.sqrt(components[0] * channels)
    inputs += [random(number, components[1], channels_v), size * random(number, 3)]
    frequencies = torch.linspace(0.0, 0.7, channels // 2, dtype=torch.float64)
    return [tensor.to(dtype) for tensor in (*inputs, frequencies)]


def derivatives(backend, inputs, counts, made):
    """Attention, its first derivatives, and derivatives of a random combination of these."""
    inputs = [tensor.clone().requires_grad_(True) for tensor in inputs]
    generator = torch.Generator().manual_seed(1)

    def some(tensors):
        return sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum() for x in tensors)

    with use_backend(backend):
        y = attend(*inputs, made, counts)
        first = torch.autograd.grad(some([y]), inputs, create_graph=True)
        second = torch.autograd.grad(some(first), inputs)
    return [y, *first, *second]


def assert_close(ours, theirs, relative, scale=None):
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        if one.numel():
            largest = max(float(other.detach().abs().max()), 1.0 if scale is None else scale)
            assert float((one.double() - other.double()).detach().abs().max()) <= relative * largest


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("shape", [(4, 3, (4, 2)), (2, 1, (1, 1)), (6, 16, (3, 4))], ids=str)
def test_equals_plain_pytorch(counts, shape, order):
    inputs = problem(counts, *shape)
    ours, theirs = (derivatives(name, inputs, counts, rule()) for name in ("cpu", "reference"))
    assert float(theirs[0].detach().abs().max()) > 1e-3
    assert_close(ours, theirs, 1e-12)


def test_no_atoms():
    inputs = problem([0, 0])
    assert attend(*inputs, rule(), (0, 0)).shape == (0, 2, 3)


def test_single_precision(order):
    """Rounding, and what the basis leaves out, stay far below the tolerance of the reference's numbers."""
    inputs = problem([60], 8, 16, size=4.0)
    theirs = derivatives("reference", inputs, (60,), rule(50))
    ours = derivatives("cpu", [x.float() for x in inputs], (60,), rule(50, torch.float32))
    assert ours[0].dtype == torch.float32
    assert_close(ours, theirs, 5e-6, scale=0.0)
    rows = _rows(inputs[3].float(), inputs[4].float(), rule(50, torch.float32))
    assert rows.starts[-1] < 0.8 * 50 * len(inputs[4])  # the basis is in use


def _rows(positions, frequencies, made):
    return made.waves.rows(efa_cpu._steps(positions, frequencies))


def test_gradcheck(order):
    inputs = problem([3, 2], 4, 1, (1, 2))
    inputs = [tensor.requires_grad_(True) for tensor in inputs]
    made = rule(14)

    def attention(*given):
        return attend(*given, made, (3, 2))

    with use_backend("cpu"):
        assert torch.autograd.gradcheck(attention, inputs)
        assert torch.autograd.gradgradcheck(attention, inputs)


def test_third_derivatives(order):
    inputs = problem([4], 4, 2, (1, 1))
    found = []
    for name in ("cpu", "reference"):
        x = inputs[3].clone().requires_grad_(True)
        with use_backend(name):
            value = attend(*inputs[:3], x, inputs[4], rule(), (4,)).square().sum()
            for _ in range(2):
                value = torch.autograd.grad(value, x, create_graph=True)[0].pow(3).sum()
            found.append(torch.autograd.grad(value, x)[0])
    assert float(found[1].abs().max()) > 1e-3
    assert_close(found[:1], found[1:], 1e-11, scale=0.0)


def test_pairs_of_padded_blocks_equal_the_plain_formula():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, rows, 8, generator=generator, dtype=torch.float64) for rows in (5, 12, 12, 7)]
    shape = PairShape((0, 1, 1, 5), 24)  # a frequency without waves
    assert_close([attend_pairs(*inputs, shape)], [attend_pairs_plainly(*inputs, shape)], 1e-13)


def test_threads_change_nothing(order):
    inputs = problem([300], 8, 32, (4, 4), torch.float32)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(derivatives("cpu", inputs, (300,), rule(50, torch.float32)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for number in (0, 1, 2, 3, 4):
            assert torch.equal(other[number], found[0][number])


def test_tensors_at_odd_addresses():
    whole = torch.randn(1, 33 * 16)
    odd = whole[:, 1 : 1 + 32 * 16].view(1, 32, 16)
    assert odd.data_ptr() % 64
    assert aligned(odd).data_ptr() % 64 == 0
    assert torch.equal(aligned(odd), odd)
    straight = torch.empty(64)
    assert aligned(straight).data_ptr() == straight.data_ptr()


@pytest.mark.parametrize(("dtype", "largest", "allowed"), [(torch.float32, 1e4, 2e-7), (torch.float64, 1e6, 3e-16)])
def test_sines(dtype, largest, allowed):
    """Cosine and sine of one direction, far beyond what systems need, to the rounding of the type."""
    directions, weights = torch.tensor([[1.0, 0.0, 0.0]], dtype=dtype), torch.ones(1, dtype=dtype)
    x = torch.linspace(-largest, largest, 4096, dtype=torch.float64).to(dtype)
    positions = torch.zeros(4096, 3, dtype=dtype)
    positions[:, 0] = x
    lanes = 64 // x.element_size()
    rows = RuleWaves(directions, weights, 0.0).rows((step_of_phase(largest),))
    blocks = positions.unflatten(0, (-1, lanes)).transpose(1, 2).contiguous()
    waves = CombinedWaves.apply(blocks, torch.ones(1, dtype=dtype), rows)
    for row, exact in enumerate((x.double().cos(), x.double().sin())):
        assert float((waves[:, row].flatten().double() - exact).abs().max()) <= allowed


@pytest.mark.parametrize("phase", [1e-6, 1e-3, 0.05, 0.4, 1.3, 3.0, 9.0])
def test_basis_keeps_products_of_waves(phase):
    made, tolerance = rule(50), 1e-7
    waves = RuleWaves(made.directions, made.weights, tolerance)
    rows = waves.rows((step_of_phase(phase),))
    generator = torch.Generator().manual_seed(0)
    points = spiral(200) * torch.rand(200, 1, generator=generator, dtype=torch.float64) * phase
    blocks = points.unflatten(0, (-1, 8)).transpose(1, 2).contiguous()
    t = rows.waves(blocks, torch.ones(1, dtype=torch.float64)).transpose(1, 2).flatten(0, 1)
    apart = points[:, None] - points[None]
    exact = torch.cos(apart @ made.directions.T) @ made.weights
    assert float((t @ t.T - exact).abs().max()) < tolerance
    number = rows.starts[-1]
    assert number <= 50
    if phase < 0.5:
        assert number <= 16
    # the derivative of what is left out is small too, even where the whole product is nearly constant
    slope = torch.autograd.functional.jacobian(
        lambda x: (rows.waves(x.view(1, 3, 1), torch.ones(1, dtype=torch.float64))[0, :, 0] * t[0]).sum(), points[1]
    )
    expected = -(torch.sin((points[1] - points[0]) @ made.directions.T) * made.weights) @ made.directions
    assert float((slope - expected).norm()) < 1e-5 * float(expected.norm()) + 1e-7 * phase


def test_steps():
    assert step_of_phase(0.0) is None
    assert step_of_phase(1.0) == 0
    for phase in (0.3, 1.7, 5.0):
        assert phase <= 2.0 ** (step_of_phase(phase) / STEPS) < phase * 2 ** (1 / STEPS)
    assert step_of_phase(1e-300) == step_of_phase(1e-200)
    assert step_of_phase(math.inf) == step_of_phase(1e30)


def test_groups_of_frequencies(monkeypatch):
    """Many atoms are treated a few frequencies at a time."""
    monkeypatch.setattr(efa_cpu, "pairs_are_cheaper", lambda *shape: False)
    inputs = problem([40], 8, 3)
    whole = derivatives("cpu", inputs, (40,), rule())
    monkeypatch.setattr(efa_cpu, "BYTES_OF_WAVES", 20 * 80 * 8)
    assert_close(derivatives("cpu", inputs, (40,), rule()), whole, 1e-13)
    groups = efa_cpu._groups(torch.zeros(5, 3, 8, dtype=torch.float64), _rows(inputs[3], inputs[4], rule()))
    assert [group.stop - group.start for group in groups] == [2, 2]
    monkeypatch.setattr(efa_cpu, "BYTES_OF_WAVES", 1)
    assert_close(derivatives("cpu", inputs, (40,), rule()), whole, 1e-13)


def test_a_rule_with_negative_weights_runs_plainly():
    """It has no roots of its weights."""
    made, inputs = rule(74), problem([5, 3])
    assert made.waves is None
    grid = lebedev(74)
    theirs = invariant_attention(QKV(*inputs[:4]), inputs[4], grid.points, grid.weights, (5, 3))
    with use_backend("cpu"):
        assert_close([attend(*inputs, made, (5, 3))], [theirs], 1e-13)


def test_rows_that_do_not_fit():
    index = torch.arange(12)
    with pytest.raises(ValueError, match="multiple of 8"):
        CpuSums(index, index, False)


def test_moments_without_values():
    way = CpuSums(torch.arange(8), torch.arange(8), False)
    block = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    assert moments(block, block, torch.zeros(1, 0, 16, 8, dtype=torch.float64), way=way).shape == (1, 0, 8, 8)
