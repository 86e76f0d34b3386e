"""MARA's machine code against plain PyTorch: derivatives, threads, the order of edges."""

import dataclasses

import pytest
import torch

from steradian.operators.mara import cpu as mara_cpu
from steradian.operators.mara.factorised import flat_tables
from steradian.polynomials import use_backend
from steradian.sphere.grids import lebedev
from tests.unit.mara_cases import edges_of, random_mara, system


@pytest.fixture(autouse=True)
def machine_code():
    with use_backend("cpu"):
        yield


def derivatives(mara, features, positions, edges_of=edges_of):
    """alpha, first, second and third derivatives along random directions."""
    features, positions = features.clone().requires_grad_(), positions.clone().requires_grad_()
    generator = torch.Generator().manual_seed(3)
    inputs = (positions, features, *mara.parameters())
    last = [mara(features, edges_of(positions))]
    results = [*last]
    for _ in range(3):
        directions = [torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in last]
        mixture = sum((value * direction).sum() for value, direction in zip(last, directions))
        last = torch.autograd.grad(mixture, inputs, create_graph=True, materialize_grads=True)
        results += last
    return [value.detach() for value in results]


@pytest.mark.parametrize("field", ["distance", "squared"])
@pytest.mark.parametrize("atoms", [2, 6, 9])
def test_three_derivatives_equal_the_reference(field, atoms):
    mara = random_mara(5, lebedev(14), 8, num_heads=2, field=field)
    results = derivatives(mara, *system(atoms))
    with use_backend("reference"):
        expected = derivatives(mara, *system(atoms))
    for value, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-11 * (1 + float(truth.abs().max())))


def test_threads_do_not_change_a_bit(monkeypatch):
    monkeypatch.setattr(mara_cpu, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(mara_cpu, "BLOCKS_PER_SUM", 1)
    mara = random_mara(5, dtype=torch.float32)
    features, positions = (tensor.float() for tensor in system(12))
    edges = edges_of(positions)
    leaves = [
        edges.vectors,
        mara._node_tables(features)[0].detach(),
        flat_tables(mara._tables(), mara.weights).detach(),
    ]
    results = {}

    def training_step():
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        pooled = mara_cpu.pool_on_sphere(*inputs, edges.receivers, mara.points, "distance", mara._pool_reference)
        first = torch.autograd.grad(pooled.square().sum(), inputs[:2], create_graph=True)
        loss = pooled.sum() + sum(gradient.square().sum() for gradient in first)
        return [pooled, *first, *torch.autograd.grad(loss, inputs)]

    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results[threads] = training_step()
    finally:
        torch.set_num_threads(1)
    assert len(edges.senders) > 32
    for threads in (2, 3):
        assert all(torch.equal(one, other) for one, other in zip(results[1], results[threads]))


def test_edges_in_any_order():
    features, positions = system()
    mara = random_mara(5)
    order = torch.randperm(len(edges_of(positions).senders), generator=torch.Generator().manual_seed(0))

    def shuffled(positions):
        edges = edges_of(positions)
        names = ("senders", "receivers", "vectors", "lengths", "radial", "envelope", "harmonics")
        return dataclasses.replace(edges, **{name: getattr(edges, name)[order] for name in names})

    before, after = derivatives(mara, features, positions), derivatives(mara, features, positions, shuffled)
    torch.testing.assert_close(after[0], before[0][order], rtol=0, atol=1e-14)
