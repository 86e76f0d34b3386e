"""Triton's kernels of Euclidean fast attention against the plain ones; without a GPU under Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="kernels for GPUs need triton, which PyTorch brings with CUDA only")

from steradian.operators import efa_attention
from steradian.operators.efa_attention import DirectionRule, rotary_attention
from steradian.operators.efa_gpu import TritonSums
from steradian.operators.efa_kernel import PLAIN
from steradian.sphere.grids import lebedev

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: systems, points, frequencies (and those of the waves), components, atoms, values
SHAPES = [(1, 3, 2, 2, 4, 70, 5), (2, 5, 4, 4, 2, 33, 17), (1, 1, 1, 1, 2, 1, 1), (2, 2, 3, 1, 6, 130, 80)]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def problem(batch, points, pairs, of_waves, width, atoms, values, seed=0):
    waves = random(batch, points, 2, of_waves, atoms, seed=seed)
    features = random(batch, of_waves, pairs // of_waves * width, atoms, seed=seed + 1)
    rows = points * 2 * pairs * width
    return waves, features, random(batch, values, atoms, seed=seed + 2), random(batch, rows, values, seed=seed + 3)


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert float((ours - theirs).abs().max()) <= 2e-6 * float(theirs.abs().max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_sums(shape, count):
    waves, features, values, sums = problem(*shape)
    pairs = [(waves, features), problem(*shape, seed=10)[:2]][:count]
    ours = TritonSums()
    assert_close(ours.moments(values, pairs), PLAIN.moments(values, pairs))
    assert_close(ours.apply(sums, pairs), PLAIN.apply(sums, pairs))
    for wanted in ([True, True] * count, [False, True] * count, [True, False] * count):
        for one, other in zip(
            ours.contract(values, sums, pairs, wanted), PLAIN.contract(values, sums, pairs, wanted), strict=True
        ):
            assert (one is None) == (other is None)
            if one is not None:
                assert_close(one, other)


@pytest.mark.parametrize("functions", [False, True])
def test_attention_with_two_derivatives(functions, monkeypatch):
    monkeypatch.setattr(efa_attention, "_has_machine_code", lambda *given: False)
    monkeypatch.setattr(efa_attention, "pairs_are_cheaper", lambda *shape: False)
    grid = lebedev(26)
    made = DirectionRule.from_grid(grid.points, grid.weights).to(random(1))
    system = torch.arange(2, device=DEVICE).repeat_interleave(7)
    kwargs = {"functions": (random(1, 13), random(3, 13, seed=5))} if functions else {}
    found = []
    for way in (TritonSums(), PLAIN):
        monkeypatch.setattr(efa_attention, "way_for", lambda *given, way=way: way)
        inputs = [random(14, 4, 4, seed=seed) for seed in range(2)] + [random(14, 2, 3, seed=2), random(14, 3, seed=3)]
        inputs = [tensor.requires_grad_(True) for tensor in (*inputs, torch.tensor([0.2, 0.7], device=DEVICE))]
        y = rotary_attention(*inputs, made, system, 2, **kwargs)
        first = torch.autograd.grad((y * random(*y.shape, seed=9)).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), inputs)
        found.append([y, *first, *second])
    for ours, theirs in zip(*found, strict=True):
        assert float(theirs.detach().abs().max()) > 1e-3
        assert float((ours - theirs).detach().abs().max()) <= 1e-5 * float(theirs.detach().abs().max())


def test_fewer_digits():
    waves, features, _, sums = (x.bfloat16() for x in problem(*SHAPES[0]))
    ours = TritonSums().apply(sums, [(waves, features)])
    exact = PLAIN.apply(sums.float(), [(waves.float(), features.float())])
    assert ours.dtype == torch.bfloat16
    assert float((ours.float() - exact).abs().max()) <= 2**-8 * float(exact.abs().max())
