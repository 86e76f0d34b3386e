"""The CPU backend against plain PyTorch: values, derivatives of three orders, odd sizes, threads, the kept code."""

from __future__ import annotations

import warnings

import pytest
import torch

from steradian.compiler import native as team
from steradian.equivariant.harmonics import harmonics_polynomial
from steradian.equivariant.irreps import natural_degrees
from steradian.equivariant.symmetric_contraction import contraction_polynomial
from steradian.equivariant.tensor_product import channelwise_polynomial
from steradian.polynomials import (
    Operand,
    Polynomial,
    Terms,
    backend_for,
    evaluate,
    set_backend,
    use_backend,
)
from steradian.polynomials import backend as backend_module
from steradian.polynomials import cpu as apply
from steradian.polynomials.cpu import passes_of
from steradian.polynomials.program import folded, program_of

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6}  # of the largest number; rounding of sums of some hundred terms
ATOMS, EDGES = 12, 70


def numbers(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + sum(shape)))


def rows(count, bound, seed=0):
    return torch.randint(0, bound, (count,), generator=torch.Generator().manual_seed(seed))


def product_case(channels, dtype, edges=EDGES, atoms=ATOMS, in_order=True):
    polynomial, table = channelwise_polynomial(natural_degrees(1), 2, natural_degrees(2))
    inputs = [
        numbers(atoms, 4, channels, dtype=dtype),
        numbers(edges, 9, dtype=dtype),
        numbers(edges, len(table.paths), channels, dtype=dtype),
    ]
    receivers = rows(edges, atoms, 1)
    receivers = receivers.sort().values if in_order else receivers
    return polynomial, inputs, {"gathers": [rows(edges, atoms, 2), None, None], "scatter": receivers, "num_rows": atoms}


def contraction_case(channels, dtype, atoms=ATOMS):
    polynomial = contraction_polynomial(natural_degrees(2), natural_degrees(1), 3)
    inputs = [numbers(3, polynomial.inputs[0].dim, channels, dtype=dtype), numbers(atoms, 9, channels, dtype=dtype)]
    return polynomial, inputs, {"gathers": [rows(atoms, 3, 3), None]}


def harmonics_case(channels, dtype, count=37):
    return harmonics_polynomial(3), [numbers(count, 3, dtype=dtype)], {}


CASES = {"product": product_case, "contraction": contraction_case, "harmonics": harmonics_case}


def derivatives(polynomial, inputs, arguments):
    """The value, the gradients by all inputs, and the gradients of a mixture of these by all inputs and cotangents."""
    inputs = [value.clone().requires_grad_() for value in inputs]
    value = evaluate(polynomial, inputs, **arguments)
    cotangent = numbers(*value.shape, dtype=value.dtype, seed=5).requires_grad_()
    first = torch.autograd.grad(value, inputs, cotangent, create_graph=True)
    mixture = sum((gradient * numbers(*gradient.shape, dtype=value.dtype, seed=6)).sum() for gradient in first)
    if not mixture.requires_grad:
        return [value, *first]
    second = torch.autograd.grad(mixture, [*inputs, cotangent], allow_unused=True, create_graph=True)
    second = [gradient for gradient in second if gradient is not None]
    mixture = sum((gradient * numbers(*gradient.shape, dtype=value.dtype, seed=7)).sum() for gradient in second)
    third = torch.autograd.grad(mixture, inputs, allow_unused=True) if mixture.requires_grad else []
    return [value, *first, *second, *(gradient for gradient in third if gradient is not None)]


def assert_backends_agree(polynomial, inputs, arguments):
    results = {}
    for name in ("reference", "cpu"):
        with use_backend(name):
            results[name] = derivatives(polynomial, inputs, arguments)
    assert len(results["cpu"]) == len(results["reference"])
    for ours, truth in zip(results["cpu"], results["reference"]):
        assert ours.shape == truth.shape
        scale = max(1e-30, float(truth.detach().abs().max())) if truth.numel() else 1.0
        error = (ours - truth).detach().abs().max() / scale if truth.numel() else 0.0
        assert error < TOLERANCE[truth.dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("channels", [1, 16, 33])
@pytest.mark.parametrize("case", CASES)
def test_values_and_three_derivatives_equal_the_reference(case, channels, dtype):
    assert_backends_agree(*CASES[case](channels, dtype))


@pytest.mark.parametrize(("atoms", "edges"), [(1, 0), (1, 1), (5, 0), (2, 9)])
def test_few_rows(atoms, edges):
    assert_backends_agree(*product_case(4, torch.float64, edges, atoms))
    assert_backends_agree(*contraction_case(4, torch.float64, atoms))


def test_no_rows_at_all():
    polynomial, inputs, arguments = contraction_case(8, torch.float32, atoms=0)
    with use_backend("cpu"):
        assert evaluate(polynomial, inputs, **arguments).shape == (0, 4, 8)
        assert evaluate(harmonics_polynomial(2), [torch.zeros(0, 3)]).shape == (0, 9)


def test_receivers_in_any_order():
    assert_backends_agree(*product_case(8, torch.float64, in_order=False))


@pytest.mark.parametrize("case", CASES)
def test_against_finite_differences(case):
    polynomial, inputs, arguments = CASES[case](2, torch.float64)
    if case == "product":
        polynomial, inputs, arguments = product_case(2, torch.float64, edges=4, atoms=2)
    elif case == "contraction":
        polynomial, inputs, arguments = contraction_case(1, torch.float64, atoms=2)
    else:
        inputs = [inputs[0][:2]]
    inputs = [value.clone().requires_grad_() for value in inputs]
    with use_backend("cpu"):
        assert torch.autograd.gradcheck(lambda *values: evaluate(polynomial, list(values), **arguments), inputs)
        assert torch.autograd.gradgradcheck(lambda *values: evaluate(polynomial, list(values), **arguments), inputs)


@pytest.mark.parametrize("openmp", [True, False], ids=["openmp", "pool"])
@pytest.mark.parametrize("case", CASES)
def test_threads_do_not_change_a_bit(case, openmp, monkeypatch):
    monkeypatch.setattr(apply, "WORTH_A_THREAD", 0)
    if not openmp:
        monkeypatch.setattr(team, "_openmp", lambda: None)
    polynomial, inputs, arguments = CASES[case](96, torch.float32)
    results = {}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with use_backend("cpu"):
                results[threads] = derivatives(polynomial, inputs, arguments)
    finally:
        torch.set_num_threads(1)
    for threads in (2, 3):
        for one, other in zip(results[1], results[threads]):
            assert torch.equal(one, other)


def test_a_sum_over_channels_and_a_repeated_factor():
    # y_0 = 2 s x_0 x_1 + s^2 x_0, with s without channels: its derivative sums over channels
    polynomial = Polynomial(
        (Operand("x", 2), Operand("s", 1, has_channels=False)),
        Operand("y", 1),
        (
            Terms((1, 0, 0), *_table([[0, 0, 1]], [0], [2.0])),
            Terms((1, 1, 0), *_table([[0, 0, 0]], [0], [1.0])),
        ),
    )
    assert_backends_agree(polynomial, [numbers(7, 2, 5), numbers(7, 1)], {})


def _table(indices, outputs, coefficients):
    return (
        torch.tensor(indices).numpy(),
        torch.tensor(outputs).numpy(),
        torch.tensor(coefficients, dtype=torch.float64).numpy(),
    )


def test_folding_keeps_the_polynomial():
    polynomial, (weights, features), _ = contraction_case(3, torch.float64)
    matrix, small = folded(polynomial)
    picked = rows(ATOMS, 3, 3)
    with use_backend("reference"):
        before = evaluate(polynomial, [weights, features], gathers=[picked, None])
        after = evaluate(small, [torch.from_numpy(matrix) @ weights, features], gathers=[picked, None])
    assert torch.allclose(before, after, rtol=0, atol=1e-12)
    assert small.num_terms <= polynomial.num_terms


def test_only_asked_derivatives_are_computed():
    polynomial, _ = channelwise_polynomial(natural_degrees(1), 2, natural_degrees(2))
    program = program_of(polynomial, (0, None, None), 1)
    everything = program.gradient((True, True, True), (True,))
    one = program.gradient((True, False, False), (True,))
    assert len(one.outputs) == 1
    assert one.num_terms < everything.num_terms / 2
    assert {part.index for part in passes_of(everything)} == {0, None}


def test_a_row_out_of_range_is_refused():
    polynomial, inputs, arguments = product_case(4, torch.float64)
    with use_backend("cpu"), pytest.raises(IndexError, match="out of range"):
        evaluate(polynomial, inputs, **{**arguments, "num_rows": 1})


class TestChoiceOfBackend:
    def test_unknown_names_are_refused(self, monkeypatch):
        with pytest.raises(ValueError, match="backend must be one of"):
            set_backend("fast")
        monkeypatch.setenv("STERADIAN_BACKEND", "fast")
        with pytest.raises(ValueError, match="STERADIAN_BACKEND"):
            backend_for(torch.zeros(1))

    def test_the_environment_chooses(self, monkeypatch):
        monkeypatch.setenv("STERADIAN_BACKEND", "reference")
        assert backend_for(torch.zeros(1)) == "reference"
        with use_backend("cpu"):
            assert backend_for(torch.zeros(1)) == "cpu"

    def test_other_dtypes_go_to_the_reference(self):
        assert backend_for(torch.zeros(1, dtype=torch.bfloat16)) == "reference"

    def test_without_the_compiler_there_is_one_warning(self, monkeypatch):
        monkeypatch.setattr(backend_module, "import_compiler", lambda: (_ for _ in ()).throw(ImportError("gone")))
        backend_module.compiler_works.cache_clear()
        try:
            with pytest.warns(UserWarning, match="pip install llvmlite"):
                assert backend_for(torch.zeros(1)) == "reference"
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert backend_for(torch.zeros(1)) == "reference"
            with pytest.raises(RuntimeError, match="pip install llvmlite"):
                set_backend("cpu")
        finally:
            backend_module.compiler_works.cache_clear()
