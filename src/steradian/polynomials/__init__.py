"""Evaluation of polynomials: one function, several backends.

``reference`` is plain PyTorch and the truth; ``cpu`` runs machine code made from it
(:mod:`~steradian.polynomials.program`, :mod:`~steradian.polynomials.codegen`, :mod:`~steradian.polynomials.cpu`);
``triton`` runs kernels for GPUs made from the same programs, ``cuequivariance`` those of NVIDIA's library. Which of
these a GPU uses is measured (:mod:`steradian.execution.backend_benchmark`), and none is used before its numbers were
compared with the reference's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steradian.compiler.checked import FirstUse, allowed, difference, is_static
from steradian.compiler.folding import Folded
from steradian.graph.topology import Rows
from steradian.polynomials.backend import backend_for, set_backend, use_backend
from steradian.polynomials.cuequivariance import evaluate_cuequivariance
from steradian.polynomials.polynomial import Operand, Polynomial, Terms, without_periods
from steradian.polynomials.program import RowIndices
from steradian.polynomials.reference import evaluate_reference, sample, widened

__all__ = ["Operand", "Polynomial", "Terms", "backend_for", "evaluate", "set_backend", "use_backend"]

Evaluate = Callable[[Polynomial, list[Tensor], list[Tensor | None], Tensor | None, int | None], Tensor]


def evaluate(
    polynomial: Polynomial,
    inputs: Sequence[Tensor],
    *,
    gathers: Sequence[Rows | Tensor | None] | None = None,
    scatter: Rows | Tensor | None = None,
    num_rows: int | None = None,
    locality: Rows | Tensor | None = None,
    dtype: torch.dtype | None = None,
    folded: Folded | None = None,
) -> Tensor:
    """Evaluate a polynomial row by row, gathering rows of the inputs and summing rows of the output on the way.

    Args:
        polynomial: the table.
        inputs: one tensor per input, ``[rows, dim, C]`` (``[rows, dim, period]`` where the numbers repeat, with a
            period that divides C) or, without channels, ``[rows, dim]``. Inputs of 16 bits are
            read exactly; the arithmetic and the result are in the widest format given, at least float32.
        gathers: for each input None or ``[B]`` the row to take for row b of the product; best prepared
            (:class:`~steradian.graph.topology.Rows`), else sorted anew in every call that needs it.
        scatter: ``[B]`` the row of the output to which row b is added, or None; likewise.
        num_rows: number of rows of the output; needed with a ``scatter`` that is not prepared.
        locality: one of ``gathers`` whose rows are large: work that shares a row is done together; results stay.
        dtype: format of the result, rounded to from complete sums; None for the widest format given.
        folded: where the owner of the outer input keeps what is made of it.

    Returns:
        ``[B, dim, C]`` (``[num_rows, dim, C]`` with ``scatter``), without the last axis for an output without channels.

    Raises:
        ValueError: the tensors do not fit the table.
    """
    _check_shapes(polynomial, inputs)
    gathers = list(gathers) if gathers is not None else [None] * len(inputs)
    if isinstance(scatter, Rows):
        num_rows = scatter.num_rows
    elif scatter is not None and num_rows is None:
        raise ValueError("scatter needs num_rows")
    wide = arithmetic_of(inputs)
    first = inputs[0] if inputs[0].dtype == wide else inputs[0].new_empty(0, dtype=wide)
    backend = backend_for(first)
    if backend in ("triton", "cuequivariance"):
        inputs, polynomial = widened(polynomial, inputs), without_periods(polynomial)
        found = _on_gpu(backend, polynomial, inputs, gathers, scatter, num_rows, wide, dtype or wide)
        if found is not None:
            return found
        backend = "reference"
    readable = backend == "cpu" and wide == torch.float32
    inputs = [
        value if readable and _reads(polynomial, place, value, gathers) else value.to(wide)
        for place, value in enumerate(inputs)
    ]
    if backend == "cpu":
        from steradian.polynomials.cpu import evaluate_cpu

        stored = dtype if dtype == torch.bfloat16 and readable else None
        out = evaluate_cpu(polynomial, list(inputs), gathers, scatter, num_rows, locality, stored, folded)
    else:
        out = evaluate_reference(polynomial, inputs, [_plain(index) for index in gathers], _plain(scatter), num_rows)
    return out if dtype is None else out.to(dtype)


def _check_shapes(polynomial: Polynomial, inputs: Sequence[Tensor]) -> None:
    if len(inputs) != len(polynomial.inputs):
        raise ValueError(f"{len(polynomial.inputs)} inputs expected, got {len(inputs)}")
    for operand, value in zip(polynomial.inputs, inputs):
        wrong = operand.period is not None and value.shape[-1] != operand.period
        if value.ndim != 2 + operand.has_channels or value.shape[1] != operand.dim or wrong:
            expected = (
                f"[rows, {operand.dim}, {operand.period or 'C'}]" if operand.has_channels else f"[rows, {operand.dim}]"
            )
            raise ValueError(f"input '{operand.name}' must be {expected}, got {list(value.shape)}")


def _plain(index: Rows | Tensor | None) -> Tensor | None:
    return index.index if isinstance(index, Rows) else index


def _on_gpu(
    backend: str,
    polynomial: Polynomial,
    inputs: Sequence[Tensor],
    gathers: list[Rows | Tensor | None],
    scatter: Rows | Tensor | None,
    num_rows: int | None,
    wide: torch.dtype,
    dtype: torch.dtype,
) -> Tensor | None:
    """The value by a backend for GPUs in ``dtype``, or None where it was found to be wrong."""
    checked: Evaluate
    final: Any
    if backend == "triton":
        from steradian.polynomials.triton import evaluate_triton

        given = [value if value.dtype.itemsize == 2 else value.to(wide) for value in inputs]
        checked = partial(evaluate_triton, dtype=wide)
        final = partial(evaluate_triton, dtype=dtype)
    else:
        given = [value.to(wide) for value in inputs]
        checked = final = evaluate_cuequivariance
    plain, target = [_plain(index) for index in gathers], _plain(scatter)
    if not passes(backend, polynomial, given, plain, target, checked):
        return None
    if backend != "triton":
        gathers, scatter = list(plain), target
    return final(polynomial, given, gathers, scatter, num_rows).to(dtype)


def passes(
    backend: str,
    polynomial: Polynomial,
    inputs: Sequence[Tensor],
    gathers: Sequence[Tensor | None],
    scatter: Tensor | None,
    evaluate: Evaluate,
) -> bool:
    """Whether a backend may evaluate a polynomial; compared once for a device, format, wanted gradients and pattern of
    gathering. Nothing is compared while a step is traced or recorded.

    Args:
        backend: for the message.
        polynomial, inputs, gathers, scatter: as in :func:`evaluate`.
        evaluate: the backend's function.
    """
    pattern = (*(index is not None for index in gathers), scatter is not None)
    device, kinds = inputs[0].device, tuple((value.dtype, value.requires_grad) for value in inputs)
    key = (backend, device, pattern, kinds)
    verdicts: FirstUse = polynomial.made.once("verdicts", FirstUse)
    if not verdicts.knows(key) and is_static(inputs[0]):
        return True
    line = f"backend {backend} is not used for '{polynomial.output.name}' on {device}: it {{}}; plain PyTorch runs"
    return verdicts.trusts(key, lambda: _compare(polynomial, inputs, gathers, scatter, evaluate), line)


def _compare(
    polynomial: Polynomial,
    inputs: Sequence[Tensor],
    gathers: Sequence[Tensor | None],
    scatter: Tensor | None,
    evaluate: Evaluate,
) -> tuple[float, float]:
    """The largest relative difference of value and gradients on a sample, and what is allowed."""
    numbered = RowIndices.of(inputs, gathers, scatter, None)
    small = sample(inputs, numbered.gathers, [rows.index for rows in numbered.rows])
    picked = [None if number is None else small.indices[number] for number in numbered.gathers]
    into = (None, None) if scatter is None else (small.indices[numbered.scatter], small.counts[numbered.scatter])  # type: ignore[index]
    ours = [value.requires_grad_(given.requires_grad) for value, given in zip(small.inputs, inputs)]
    theirs = [value.detach().double().requires_grad_(value.requires_grad) for value in ours]
    found = evaluate(polynomial, ours, picked, *into)
    truth = evaluate_reference(polynomial, theirs, picked, *into)
    pairs = [(found, truth)]
    if found.requires_grad:
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(truth.shape, generator=generator, dtype=torch.float64).to(truth.device)
        gradients = (
            torch.autograd.grad(
                out, [v for v in given if v.requires_grad], cotangent.to(out.dtype), materialize_grads=True
            )
            for out, given in ((found, ours), (truth, theirs))
        )
        # gradients of inputs of 16 bits are rounded to these, which is no error of the backend
        pairs += [(one, exact) for one, exact in zip(*gradients) if one.dtype.itemsize >= 4]
    return max(difference(one, exact) for one, exact in pairs), allowed("polynomial", arithmetic_of(inputs))


def arithmetic_of(inputs: Sequence[Tensor]) -> torch.dtype:
    """The widest format of the inputs, at least float32."""
    formats = {value.dtype for value in inputs}
    if len(formats) == 1 and inputs[0].dtype.itemsize >= 4:
        return inputs[0].dtype
    return torch.float64 if torch.float64 in formats else torch.float32


def _reads(polynomial: Polynomial, place: int, value: Tensor, gathers: Sequence[Rows | Tensor | None]) -> bool:
    """Whether the machine code reads this input of bfloat16 itself; weights that are folded first are widened."""
    folded = polynomial.folds and place == polynomial.outer and gathers[place] is not None
    return value.dtype == torch.bfloat16 and polynomial.inputs[place].has_channels and not folded
