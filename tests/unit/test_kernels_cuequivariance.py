"""Polynomials as cuEquivariance's segmented polynomials: the conversion, by its plain method on a CPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("cuequivariance_torch", reason="needs cuequivariance-torch")

from steradian.equivariant.harmonics import harmonics_polynomial
from steradian.equivariant.irreps import natural_degrees
from steradian.equivariant.symmetric_contraction import contraction_polynomial
from steradian.equivariant.tensor_product import channelwise_polynomial
from steradian.polynomials.backend import backend_for, cuequivariance_works, set_backend
from steradian.polynomials.cuequivariance import evaluate_cuequivariance, segmented
from steradian.polynomials.reference import evaluate_reference

ATOMS, EDGES, CHANNELS = 3, 7, 2


def numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def rows(count, bound, seed=0):
    return torch.randint(0, bound, (count,), generator=torch.Generator().manual_seed(seed))


def product():
    table, _ = channelwise_polynomial(natural_degrees(1), 1, natural_degrees(1))
    inputs = [numbers(ATOMS, 4, CHANNELS), numbers(EDGES, 4), numbers(EDGES, table.inputs[2].dim, CHANNELS)]
    return table, inputs, [rows(EDGES, ATOMS), None, None], rows(EDGES, ATOMS, 1), ATOMS


def contraction():
    table = contraction_polynomial(natural_degrees(1), natural_degrees(1), 3)
    inputs = [numbers(2, table.inputs[0].dim, CHANNELS), numbers(ATOMS, 4, CHANNELS)]
    return table, inputs, [rows(ATOMS, 2), None], None, None


def harmonics():
    return harmonics_polynomial(2), [numbers(EDGES, 3)], [None], None, None


def no_edges():
    table, (features, *_), *_ = product()
    empty = [features, numbers(0, 4), numbers(0, table.inputs[2].dim, CHANNELS)]
    nothing = torch.zeros(0, dtype=torch.int64)
    return table, empty, [nothing, None, None], nothing, ATOMS


CASES = {"product": product, "contraction": contraction, "harmonics": harmonics, "no edges": no_edges}


@pytest.mark.filterwarnings("ignore:cuequivariance_ops_torch is not available")
@pytest.mark.parametrize("name", CASES)
def test_value_and_two_derivatives_equal_the_reference(name):
    table, inputs, gathers, scatter, num_rows = CASES[name]()
    results = []
    for evaluate in (evaluate_reference, evaluate_cuequivariance):
        given = [value.clone().requires_grad_() for value in inputs]
        value = evaluate(table, given, gathers, scatter, num_rows)
        first = torch.autograd.grad((value**2).sum(), given, create_graph=True)
        second = torch.autograd.grad(sum((one**2).sum() for one in first), given)
        results.append([value, *first, *second])
    for truth, found in zip(*results):
        assert found.shape == truth.shape
        if truth.numel():
            assert float((found - truth).detach().abs().max()) <= 1e-12 * float(truth.detach().abs().max())


def test_components_are_segments_of_channels():
    table, *_ = product()
    descriptor = segmented(table, 128)
    assert [operand.size for operand in descriptor.operands] == [
        operand.dim * (128 if operand.has_channels else 1) for operand in (*table.inputs, table.output)
    ]
    ((_, operation),) = descriptor.operations
    assert operation.num_paths == table.num_terms


@pytest.mark.skipif(cuequivariance_works(), reason="the kernels are installed here")
def test_missing_kernels_are_named():
    with pytest.raises(RuntimeError, match="pip install cuequivariance-torch cuequivariance-ops-torch-cu12"):
        set_backend("cuequivariance")
    assert backend_for(torch.zeros(1)) in ("cpu", "reference")
