"""MARA's machine code against plain PyTorch: derivatives, threads, the order of edges."""

from itertools import pairwise

import pytest
import torch

from steradian.equivariant.sphere import lebedev
from steradian.graph.topology import Rows
from steradian.operators.mara import cpu as mara_cpu
from steradian.operators.mara import factorised
from steradian.operators.mara.cpu_code import num_scratch
from steradian.polynomials import use_backend
from tests.unit.mara_cases import edges_of, random_mara, system


@pytest.fixture(autouse=True)
def machine_code():
    with use_backend("cpu"):
        yield


def problem(atoms, dtype=torch.float64, **options):
    """Vectors, nodes and tables of a random gate on a cluster; receivers and points."""
    mara = random_mara(5, lebedev(14), 8, num_heads=2, **options)
    features, positions = system(atoms)
    edges = edges_of(positions)
    leaves = [edges.vectors, mara._node_tables(features)[0], mara._tables()]
    return [leaf.detach().to(dtype) for leaf in leaves], edges.receivers, mara.points.to(dtype)


def machine(vectors, nodes, tables, receivers, grid, field):
    return mara_cpu.pool_on_sphere(vectors, nodes, tables, Rows(receivers, len(nodes)), grid, field)


def derivatives(pool, leaves, *rest):
    """Pooled, the tables' gradient alone, what forces take, and derivatives by everything of what forces take."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    with torch.no_grad():
        value = pool(*leaves, *rest)
    pooled = pool(*leaves, *rest)
    (way,) = random_like([pooled], 1)
    by_tables = torch.autograd.grad(pooled, leaves[2], way, retain_graph=True)
    first = torch.autograd.grad(pooled, leaves[:2], way.requires_grad_(), create_graph=True)
    mixture = sum((one * direction).sum() for one, direction in zip(first, random_like(first, 2)))
    return [v.detach() for v in (value, pooled, *by_tables, *first, *torch.autograd.grad(mixture, [way, *leaves]))]


def random_like(values, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v.dtype) for v in values]


@pytest.mark.parametrize("field", ["distance", "squared"])
@pytest.mark.parametrize("atoms", [2, 6, 9])
def test_every_kernel_equals_plain_pytorch(field, atoms, monkeypatch):
    """Against automatic differentiation of the plain form; that the machine code runs, and nothing else, is counted."""
    kinds, run = [], mara_cpu._run
    monkeypatch.setattr(mara_cpu, "_run", lambda kind, *given: kinds.append(kind) or run(kind, *given))
    leaves, *rest = problem(atoms)
    found = derivatives(machine, leaves, *rest, field)
    assert kinds == ["value", "slopes", "tables", "tangent"]
    expected = derivatives(factorised.pool_on_sphere, leaves, *rest, field)
    for place, (one, truth) in enumerate(zip(found, expected, strict=True)):
        assert truth.abs().max() > 1e-5
        atol = 1e-12 * float(truth.abs().max())
        torch.testing.assert_close(one, truth, rtol=1e-10, atol=atol, msg=lambda text, place=place: f"{place}: {text}")
    # the quadrature weights in the tables are constants
    points = len(rest[1])
    assert not found[-1][:, 2 + 3 * points : 2 + 4 * points].any()


@pytest.mark.parametrize("field", ["distance", "squared"])
def test_single_precision_code_equals_the_double(field):
    exact = derivatives(factorised.pool_on_sphere, *problem(9), field)
    leaves, *rest = problem(9, torch.float32)
    found = derivatives(machine, leaves, *rest, field)
    for one, truth in zip(found, exact, strict=True):
        assert float((one - truth).abs().max()) <= 2e-5 * float(truth.abs().max())


def test_threads_do_not_change_a_bit(monkeypatch):
    monkeypatch.setattr(mara_cpu, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(mara_cpu, "BLOCKS_PER_SUM", 1)
    mara = random_mara(5, dtype=torch.float32)
    features, positions = (tensor.float() for tensor in system(12))
    edges = edges_of(positions)
    leaves = [edges.vectors, mara._node_tables(features)[0].detach(), mara._tables().detach()]
    results = {}

    def training_step():
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        pooled = machine(*inputs, edges.receivers, mara.points, "distance")
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
    leaves, receivers, grid = problem(6)
    order = torch.randperm(len(receivers), generator=torch.Generator().manual_seed(0))
    before = derivatives(machine, leaves, receivers, grid, "distance")
    leaves[0] = leaves[0][order]
    expected = derivatives(factorised.pool_on_sphere, leaves, receivers[order], grid, "distance")
    found = derivatives(machine, leaves, receivers[order], grid, "distance")
    torch.testing.assert_close(found[0], before[0][order], rtol=0, atol=1e-14)
    for one, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(one, truth, rtol=1e-10, atol=1e-12 * float(truth.abs().max()))


def test_an_atom_that_does_not_exist_is_refused():
    leaves, receivers, grid = problem(4)
    with pytest.raises(IndexError, match=r"row index out of range: 0..4 for 4 rows"):
        machine(*leaves, receivers + (receivers == 3), grid, "distance")


def test_parts_have_their_own_scratch_and_their_sums_are_added(monkeypatch):
    """Several threads, and more sums of table derivatives than one."""
    monkeypatch.setattr(mara_cpu, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(mara_cpu, "BLOCKS_PER_SUM", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    several = []

    def one_after_the_other(function, tasks, threads):
        places = sorted(task[1] for task in tasks)
        assert all(after - before >= 64 * num_scratch(14) for before, after in pairwise(places))
        several.append(len(tasks))
        for task in tasks:
            function(*task)

    monkeypatch.setattr(mara_cpu, "run_tasks", one_after_the_other)
    leaves, *rest = problem(9)
    found = derivatives(machine, leaves, *rest, "distance")
    for one, truth in zip(found, derivatives(factorised.pool_on_sphere, leaves, *rest, "distance"), strict=True):
        torch.testing.assert_close(one, truth, rtol=1e-10, atol=1e-12 * float(truth.abs().max()))
    assert len(several) == 2 * 4  # heads x kinds
    assert min(several) > 1


@pytest.mark.parametrize("field", ["distance", "squared"])
def test_an_edge_of_no_length_and_one_towards_a_grid_point(field):
    leaves, receivers, grid = problem(4)
    leaves[0][1] = 0.0
    leaves[0][2:4] = 1.7 * grid[3:5]
    leaves[0][3] += 1e-10  # as rounding of coordinates would
    found = derivatives(machine, leaves, receivers, grid, field)
    expected = derivatives(factorised.pool_on_sphere, leaves, receivers, grid, field)
    for one, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(one, truth, rtol=1e-10, atol=1e-12 * float(truth.abs().max()))
