"""MARA's Triton kernels against plain PyTorch; without a GPU under Triton's interpreter."""

from __future__ import annotations

import dataclasses
import os
import warnings

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="kernels for GPUs need triton, which PyTorch brings with CUDA only")

from torch.fx.experimental.proxy_tensor import make_fx

from steradian.build import build_potential
from steradian.compiler import checked
from steradian.compiler.checked import FirstUse
from steradian.config import MACEConfig, MARAConfig, ModelConfig
from steradian.data.statistics import DatasetStatistics
from steradian.equivariant.sphere import equiangular, lebedev
from steradian.graph import Graph
from steradian.operators.mara import triton as mara_gpu
from steradian.operators.mara.triton import plain_pool, pool_on_sphere
from steradian.polynomials import use_backend
from steradian.polynomials.backend import on_every_device
from tests.unit.mara_cases import edges_of, random_mara, system

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRIDS = {6: lebedev(6), 32: equiangular(4, 8), 50: lebedev(50)}


def problem(num_points, heads, atoms=4, dtype=torch.float64, nodes=None, cutoff=4.0):
    """Leaves, receivers and grid of a random gate on a cluster."""
    mara = random_mara(5, GRIDS[num_points], 8, num_heads=heads)
    features, positions = system(atoms)
    edges = edges_of(positions, cutoff)
    tables = mara._tables().detach()
    given = [edges.vectors, mara._node_tables(features)[0].detach(), tables]
    leaves = [x.to(DEVICE, kind) for x, kind in zip(given, (dtype, nodes or dtype, dtype))]
    return leaves, edges.receivers.to(DEVICE), mara.points.to(DEVICE, dtype)


def directions(values, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v) for v in values]


def derivatives(pool, leaves, *rest):
    """Pooled, what forces take, and derivatives by all inputs of both, formed as training does."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    pooled = pool(*leaves, *rest)
    first = torch.autograd.grad(pooled, leaves[:2], *directions([pooled], 1), create_graph=True)
    loss = sum((v * d).sum() for v, d in zip((pooled, *first), directions((pooled, *first), 2)))
    return [v.detach() for v in (pooled, *first, *torch.autograd.grad(loss, leaves))]


def assert_equal(ours, theirs, tolerance):
    for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert one.dtype == other.dtype
        scale = max(float(other.abs().max()), 1e-3)
        assert float((one - other).abs().max()) <= tolerance * scale, place


@pytest.mark.parametrize(
    ("num_points", "heads", "squared"), [(6, 1, False), (6, 4, True), (32, 1, False), (32, 1, True), (50, 1, False)]
)
def test_two_derivatives_equal_the_plain_form(num_points, heads, squared):
    leaves, *rest = problem(num_points, heads, atoms=4 if num_points == 6 else 2)
    assert num_points > 6 or len(rest[0]) > 8  # more than a block
    ours = derivatives(pool_on_sphere, leaves, *rest, squared)
    theirs = derivatives(plain_pool, leaves, *rest, squared)
    assert all(float(value.abs().max()) > 1e-4 for value in theirs)
    assert_equal(ours, theirs, 1e-12)


def test_tables_alone():
    leaves, *rest = problem(6, 2)
    ours, theirs = (
        torch.autograd.grad(pool(*leaves[:2], tables, *rest, False).square().sum(), tables)[0]
        for pool, tables in ((pool, leaves[2].clone().requires_grad_()) for pool in (pool_on_sphere, plain_pool))
    )
    assert_equal([ours], [theirs], 1e-12)


def test_float32():
    leaves, *rest = problem(32, 1, atoms=3)
    exact = derivatives(plain_pool, leaves, *rest, False)
    leaves, *rest = problem(32, 1, atoms=3, dtype=torch.float32)
    ours = [value.double() for value in derivatives(pool_on_sphere, leaves, *rest, False)]
    # the second derivatives of a cluster with close neighbours amplify rounding; plain float32 errs by as much
    plain = [value.double() for value in derivatives(plain_pool, leaves, *rest, False)]
    assert_equal(ours[:3], exact[:3], 4e-6)
    for one, other, truth in zip(ours, plain, exact):
        allowed = max(4e-6 * float(truth.abs().max()), 2 * float((other - truth).abs().max()))
        assert float((one - truth).abs().max()) <= allowed


@pytest.mark.parametrize(("short", "tolerance"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-9)])
def test_nodes_in_fewer_digits_and_sums_in_float32(short, tolerance):
    leaves, *rest = problem(6, 2, dtype=torch.float32, nodes=short)
    ours, theirs = (derivatives(pool, leaves, *rest, False) for pool in (pool_on_sphere, plain_pool))
    assert ours[2].dtype == short
    assert_equal(ours[:2], theirs[:2], 4e-6)  # nothing is rounded before the result
    assert_equal([value.float() for value in ours], [value.float() for value in theirs], tolerance)


def test_third_derivatives_are_those_of_the_plain_form():
    leaves, *rest = problem(6, 1)
    found = []
    for pool in (pool_on_sphere, plain_pool):
        last = values = [leaf.clone().requires_grad_() for leaf in leaves]
        last = [pool(*values, *rest, False)]
        for order in range(3):
            mixture = sum((v * d).sum() for v, d in zip(last, directions(last, order)))
            last = torch.autograd.grad(mixture, values, create_graph=True)
        found.append([value.detach() for value in last])
    assert_equal(*found, 1e-12)


def test_atoms_without_edges_and_edges_in_any_order():
    leaves, receivers, grid = problem(6, 2)
    lonely = torch.cat([leaves[1][:1], leaves[1], leaves[1][:2]])  # first and last atoms have no neighbours
    order = torch.randperm(len(receivers), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    leaves, receivers = [leaves[0][order], lonely, leaves[2]], (receivers + 1)[order]
    assert not bool((receivers[1:] >= receivers[:-1]).all())
    ours = derivatives(pool_on_sphere, leaves, receivers, grid, False)
    assert_equal(ours, derivatives(plain_pool, leaves, receivers, grid, False), 1e-12)
    assert not ours[2][0].any()


def test_no_edges_and_an_edge_of_no_length():
    leaves, receivers, grid = problem(6, 2)
    empty = [leaves[0][:0], *leaves[1:]]
    ours = derivatives(pool_on_sphere, empty, receivers[:0], grid, False)
    assert ours[0].shape == (0, 2)
    assert not any(value.any() for value in ours)
    leaves[0][1] = 0.0
    leaves[0][2] = 1.7 * grid[3]  # towards a grid point: the kink
    ours, theirs = (derivatives(pool, leaves, receivers, grid, False) for pool in (pool_on_sphere, plain_pool))
    assert all(bool(value.isfinite().all()) for value in ours)
    assert_equal(ours, theirs, 1e-12)


def test_bits_do_not_depend_on_blocks_or_runs(monkeypatch):
    leaves, *rest = problem(6, 2, dtype=torch.float32)
    first = derivatives(pool_on_sphere, leaves, *rest, False)
    again = derivatives(pool_on_sphere, leaves, *rest, False)
    assert all(torch.equal(one, other) for one, other in zip(first, again))
    monkeypatch.setattr(mara_gpu, "MANY_EDGES", 1)
    blocked = derivatives(pool_on_sphere, leaves, *rest, False)
    assert all(torch.equal(one, other) for one, other in zip(first, blocked))
    # the tables' sums have a fixed order of their own
    monkeypatch.setattr(mara_gpu, "EDGES_OF_CHUNK", 3)
    chunked = derivatives(pool_on_sphere, leaves, *rest, False)
    assert all(torch.equal(one, other) for one, other in zip(first[:5], chunked[:5]))
    assert_equal(first[5:], chunked[5:], 4e-6)


# ----------------------------------------------------------------------------------------------------------- in models


def cluster():
    generator = torch.Generator().manual_seed(3)
    grid = torch.tensor([[i, j, 0] for i in range(2) for j in range(2)], dtype=torch.float64)
    positions = 1.4 * grid + 0.2 * torch.randn(4, 3, generator=generator, dtype=torch.float64)
    receivers, senders = (~torch.eye(4, dtype=torch.bool)).nonzero(as_tuple=True)
    return Graph(
        positions=positions, numbers=torch.tensor([8, 1, 1, 8]), senders=senders, receivers=receivers,
        shifts=torch.zeros(len(senders), 3, dtype=torch.float64), system=torch.zeros(4, dtype=torch.int64),
        cell=torch.zeros(1, 3, 3, dtype=torch.float64), pbc=torch.zeros(1, 3, dtype=torch.bool), num_systems=1,
    ).to(DEVICE)  # fmt: skip


def potential(**options):
    host = MACEConfig(num_channels=4, cutoff_A=4.0, radial_mlp=[4], correlation=2)
    usual = {"form": "published", "frame": "lab", "grid": {"kind": "lebedev", "num_points": 6}, "hidden_dim": 8}
    gate = MARAConfig(gate="published", **(usual | options))
    statistics = DatasetStatistics((1, 8), {1: -13.6, 8: -2000.0}, avg_num_neighbors=3.0, force_rms=1.3)
    config = ModelConfig(host=host, precision="float64", edge_gate=gate)
    return build_potential(config, statistics, seed=0).to(DEVICE)


def training_gradient(model):
    predicted = model(cluster(), forces=True)
    loss = predicted.energy.sum() + predicted.forces.square().sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [predicted.energy.detach(), predicted.forces.detach(), *(value for value in found if value is not None)]


def test_mace_with_the_gate_trains_the_same_with_and_without(monkeypatch):
    calls = []
    monkeypatch.setattr(mara_gpu._Run, "by_tables", _counted(mara_gpu._Run.by_tables, calls))
    model = potential(layers=[1]).train()
    with use_backend("reference"):
        theirs = training_gradient(model)
    assert not calls
    with on_every_device():
        ours = training_gradient(model)
    assert calls
    assert_equal(ours, theirs, 1e-11)


def _counted(function, calls):
    def run(*arguments, **options):
        calls.append(1)
        return function(*arguments, **options)

    return run


def test_energy_and_forces_can_be_traced(monkeypatch):
    mara = random_mara(5, GRIDS[6], 8)
    features, positions = system(3)
    edges = edges_of(positions)
    vectors = edges.vectors.detach()

    def step(vectors, features):
        vectors = vectors.detach().requires_grad_()
        alpha = mara(features, dataclasses.replace(edges, vectors=vectors))
        return alpha, torch.autograd.grad(alpha.square().sum(), vectors)[0]

    with use_backend("reference"), on_every_device():
        for mode in ("real", "fake"):
            traced = make_fx(step, tracing_mode=mode, _allow_non_fake_inputs=True)(vectors, features)
            assert any("mara_pooled" in str(node.target) for node in traced.graph.nodes)
            for one, other in zip(traced(1.1 * vectors, features), step(1.1 * vectors, features), strict=True):
                assert torch.equal(one, other)


def test_the_attention_role_reaches_the_gate():
    model = random_mara(5, GRIDS[6], 8, dtype=torch.float32)
    features, positions = (tensor.float() for tensor in system(4))
    edges = edges_of(positions)
    wide = model(features, edges)
    model.low = torch.bfloat16
    assert model._node_tables(features)[0].dtype == torch.bfloat16
    with on_every_device():
        ours = model(features, edges)
    with use_backend("reference"):
        theirs = model(features, edges)
    assert ours.dtype == torch.float32
    assert 0 < float((ours - wide).detach().abs().max()) < 0.05
    assert_equal([ours.detach()], [theirs.detach()], 4e-6)


def test_kernels_that_are_wrong_are_not_used(monkeypatch):
    model, (features, positions) = random_mara(5, GRIDS[6], 8), system(4)
    expected = model(features, edges_of(positions))
    monkeypatch.setattr(checked, "_OPERATORS", FirstUse())
    monkeypatch.setattr(mara_gpu, "pool_on_sphere", lambda *given: 1.001 * pool_on_sphere(*given))
    with on_every_device():
        with pytest.warns(UserWarning, match=r"MARA \(float64 float64, 1 heads, 6 points, distance\) differ"):
            found = model(features, edges_of(positions))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(features, edges_of(positions))  # told once
    assert_equal([found.detach()], [expected.detach()], 1e-12)


def test_dropout_stays_plain():
    model = random_mara(5, GRIDS[6], 8, dropout=0.5).train()
    features, positions = system(4)
    found = []
    for context in (on_every_device(), use_backend("reference")):
        torch.manual_seed(0)
        with context:
            found.append(model(features, edges_of(positions)).detach())
    assert torch.equal(*found)
