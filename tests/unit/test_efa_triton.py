"""Triton's kernels of Euclidean fast attention against the plain ones; without a GPU under Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="kernels for GPUs need triton, which PyTorch brings with CUDA only")

from torch.fx.experimental.proxy_tensor import make_fx

from steradian.build import build_potential
from steradian.config import EFAConfig, ModelConfig, O3MPNNConfig, PrecisionConfig
from steradian.data.statistics import DatasetStatistics
from steradian.equivariant.sphere import lebedev
from steradian.graph import Graph
from steradian.operators.efa import attention as efa_attention
from steradian.operators.efa import triton as efa_gpu
from steradian.operators.efa.attention import Waves, rotary_attention
from steradian.operators.efa.paper import QKV
from steradian.operators.efa.rules import DirectionRule
from steradian.operators.efa.sums import PLAIN, moments
from steradian.operators.efa.triton import TritonSums
from steradian.polynomials import use_backend
from steradian.polynomials.backend import on_every_device

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
    made = DirectionRule.from_grid(lebedev(26)).to(random(1))
    given = (random(1, 13), random(3, 13, seed=5)) if functions else None
    found = []
    for way in (TritonSums(), PLAIN):
        monkeypatch.setattr(efa_attention, "_sums_for", lambda *given, way=way: way)
        inputs = [random(14, 4, 4, seed=seed) for seed in range(2)] + [random(14, 2, 3, seed=2), random(14, 3, seed=3)]
        inputs = [tensor.requires_grad_(True) for tensor in (*inputs, torch.tensor([0.2, 0.7], device=DEVICE))]
        y = rotary_attention(QKV(*inputs[:4]), Waves.of_rule(made, inputs[4], given), (7, 7)) / 4
        first = torch.autograd.grad((y * random(*y.shape, seed=9)).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), inputs)
        found.append([y, *first, *second])
    for ours, theirs in zip(*found, strict=True):
        assert float(theirs.detach().abs().max()) > 1e-3
        assert float((ours - theirs).detach().abs().max()) <= 1e-5 * float(theirs.detach().abs().max())


FORMATS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("products", list(FORMATS))
@pytest.mark.parametrize("short_inputs", [False, True])
def test_factors_in_fewer_digits_and_sums_in_float32(products, short_inputs):
    """As the plain form of rounded factors in float64: z and y, S and z, S and y."""
    short = FORMATS[products]
    way, shape = TritonSums(products), SHAPES[1]
    waves, features, values, sums = (x.to(short if short_inputs else x.dtype) for x in problem(*shape))

    def rounded(tensor):
        if short == torch.bfloat16 and DEVICE == "cpu":  # the interpreter cuts digits off where a GPU rounds
            return (tensor.float().contiguous().view(torch.int32) & -65536).view(torch.float32).double()
        return tensor.float().to(short).double()

    z = (waves.float().unsqueeze(4) * features.float()[:, None, None]).flatten(1, 4)
    y, s = rounded(values), rounded(sums)
    contracted = (s @ y).view(shape[0], shape[1], 2, features.shape[1], -1, shape[5])
    pairs = [(waves, features)]
    ours = [way.moments(values, pairs), way.apply(sums, pairs), *way.contract(values, sums, pairs, [True, True])]
    theirs = [
        rounded(z) @ y.transpose(1, 2),
        s.transpose(1, 2) @ rounded(z),
        (contracted * features.double()[:, None, None]).sum(4),
        (contracted * waves.double().unsqueeze(4)).sum((1, 2)),
    ]
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float32
        assert_close(one.double(), other)


@pytest.mark.parametrize("products", ["tf32x3", "tf32", "bfloat16"])
def test_gradients_have_the_formats_of_their_inputs(products):
    waves, features, values, _ = problem(*SHAPES[2])
    inputs = [tensor.requires_grad_() for tensor in (waves.half(), features.bfloat16(), values)]
    sums = moments(*inputs, way=TritonSums(products))
    first = torch.autograd.grad(sums.square().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(x.float().square().sum() for x in first), inputs)
    for found in (first, second):
        assert [x.dtype for x in found] == [x.dtype for x in inputs]
        assert all(bool(x.isfinite().all()) and bool(x.any()) for x in found)


def test_unknown_formats_are_refused():
    with pytest.raises(ValueError, match="products must be one of ieee, tf32x3, tf32, bfloat16, float16, not 'int4'"):
        TritonSums("int4")


def test_sums_do_not_depend_on_parts_of_loops_or_on_offsets(monkeypatch):
    waves, features, values, sums = problem(2, 4, 2, 2, 80, 70, 17)  # a width of more than a block
    pairs = [(waves, features)]

    def everything():
        way = TritonSums()
        return [way.moments(values, pairs), way.apply(sums, pairs), *way.contract(values, sums, pairs, [True, True])]

    monkeypatch.setattr(efa_gpu, "PROGRAMS", 1)
    whole = everything()
    monkeypatch.setattr(efa_gpu, "LARGEST_OFFSET", 1)
    assert all(torch.equal(one, other) for one, other in zip(whole, everything()))
    monkeypatch.setattr(efa_gpu, "PROGRAMS", 64)
    for one, other, exact in zip(everything(), whole, plain(values, sums, pairs), strict=True):
        assert_close(one, other)
        assert_close(one, exact)


def plain(values, sums, pairs):
    contracted = PLAIN.contract(values, sums, pairs, [True] * 2 * len(pairs))
    return [PLAIN.moments(values, pairs), PLAIN.apply(sums, pairs), *contracted]


# ----------------------------------------------------------------------------------------------------------- in models


def clusters(dtype=torch.float32, sizes=(3, 4)):
    generator = torch.Generator().manual_seed(3)
    positions = 1.5 * torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64)
    system = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    near = (system[:, None] == system) & ~torch.eye(sum(sizes), dtype=torch.bool)
    receivers, senders = near.nonzero(as_tuple=True)
    return Graph(
        positions=positions, numbers=torch.tensor([8, 1] * 4)[: sum(sizes)], senders=senders, receivers=receivers,
        shifts=torch.zeros(len(senders), 3), system=system, cell=torch.zeros(len(sizes), 3, 3),
        pbc=torch.zeros(len(sizes), 3, dtype=torch.bool), num_systems=len(sizes),
    ).to(DEVICE, dtype)  # fmt: skip


def potential(precision="float32"):
    host = O3MPNNConfig(num_channels=8, num_layers=1, cutoff_A=4.0, zero_init=False)
    mixer = EFAConfig(num_points=14, max_frequency=1.5, num_features_qk=4, num_features_v=4)
    statistics = DatasetStatistics((1, 8), {1: -13.6, 8: -2000.0}, avg_num_neighbors=3.0, force_rms=1.3)
    config = ModelConfig(host=host, precision=precision, global_mixer=mixer)
    return build_potential(config, statistics, seed=0).to(DEVICE)


def training_gradient(model, graph):
    predicted = model(graph, forces=True)
    loss = (predicted.energy - predicted.energy.detach()).sum() + predicted.forces.square().sum()
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [predicted.energy.detach(), predicted.forces.detach(), *(value for value in found if value is not None)]


def test_a_network_trains_the_same_with_and_without(monkeypatch):
    monkeypatch.setattr(efa_attention, "pairs_are_cheaper", lambda *shape: False)
    model, graph = potential().train(), clusters()
    found = []
    for allowed in (True, False):
        calls = count_calls(monkeypatch, "triton_sums")
        with on_every_device() if allowed else use_backend("reference"):
            monkeypatch.setattr(efa_attention, "_has_machine_code", lambda *given: False)
            found.append(training_gradient(model, graph))
        assert any(calls) == allowed
    for ours, theirs in zip(*found, strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-5 * max(float(theirs.abs().max()), 1e-2)


def count_calls(monkeypatch, name):
    served, real = [], getattr(efa_gpu, name)

    def asked(*given):
        way = real(*given)
        served.append(way is not None)
        return way

    monkeypatch.setattr(efa_gpu, name, asked)
    return served


def test_the_attention_role_reaches_the_sums(monkeypatch):
    monkeypatch.setattr(efa_attention, "pairs_are_cheaper", lambda *shape: False)
    monkeypatch.setattr(efa_attention, "_has_machine_code", lambda *given: False)
    asked = []
    monkeypatch.setattr(efa_gpu, "triton_sums", lambda keys, width, low: asked.append(low))
    model = potential(PrecisionConfig(preset="float32", roles={"attention": "bfloat16"})).eval()
    with on_every_device():
        model(clusters())
    assert asked
    assert set(asked) == {torch.bfloat16}


def test_energy_and_forces_can_be_traced(monkeypatch):
    monkeypatch.setattr(efa_attention, "pairs_are_cheaper", lambda *shape: False)
    rule = DirectionRule.from_grid(lebedev(14)).to(random(1))
    given = [random(7, 1, 4), random(7, 1, 4, seed=1), random(7, 1, 3, seed=2)]
    waves = Waves.of_rule(rule, torch.tensor([0.2, 0.7], device=DEVICE))

    def step(positions):
        positions = positions.detach().requires_grad_()
        y = rotary_attention(QKV(*given, positions), waves, (3, 4))
        return y, torch.autograd.grad(y.square().sum(), positions)[0]

    with use_backend("reference"), on_every_device():
        positions = random(7, 3, seed=3)
        step(positions)
        traced = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(positions)
        assert {"efa_moments", "efa_apply", "efa_contract"} <= {
            str(n.target).split(".")[1] for n in traced.graph.nodes if "steradian" in str(n.target)
        }
        for one, other in zip(traced(1.1 * positions), step(1.1 * positions), strict=True):
            assert torch.equal(one, other)
