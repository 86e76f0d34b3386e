"""Evaluation of polynomials: one function, several backends.

``reference`` is plain PyTorch and the truth; ``cpu`` runs machine code made from it
(:mod:`~steradian.polynomials.program`, :mod:`~steradian.polynomials.codegen`, :mod:`~steradian.polynomials.cpu`);
``triton`` runs kernels for GPUs made from the same programs, ``cuequivariance`` those of NVIDIA's library. Which of
these a GPU uses is measured (:mod:`steradian.execution.kernel_choice`), and none is used before its numbers were
compared with the reference's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steradian.graph.topology import Rows
from steradian.polynomials.backend import backend_for, set_backend, use_backend
from steradian.polynomials.gate import Evaluate, passes
from steradian.polynomials.polynomial import Operand, Polynomial, Terms
from steradian.polynomials.reference import evaluate_reference

__all__ = ["Operand", "Polynomial", "Terms", "backend_for", "evaluate", "set_backend", "use_backend"]


def evaluate(
    polynomial: Polynomial,
    inputs: Sequence[Tensor],
    *,
    gathers: Sequence[Rows | Tensor | None] | None = None,
    scatter: Rows | Tensor | None = None,
    num_rows: int | None = None,
    locality: Rows | Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Evaluate a polynomial row by row, gathering rows of the inputs and summing rows of the output on the way.

    Args:
        polynomial: the table.
        inputs: one tensor per input, ``[rows, dim, C]`` or, without channels, ``[rows, dim]``. Inputs of 16 bits are
            read exactly; the arithmetic and the result are in the widest format given, at least float32.
        gathers: for each input None or ``[B]`` the row to take for row b of the product; best prepared
            (:class:`~steradian.graph.topology.Rows`), else sorted anew in every call that needs it.
        scatter: ``[B]`` the row of the output to which row b is added, or None; likewise.
        num_rows: number of rows of the output; needed with a ``scatter`` that is not prepared.
        locality: one of ``gathers`` whose rows are large: work that shares a row is done together; results stay.
        dtype: format of the result, rounded to from complete sums; None for the widest format given.

    Returns:
        ``[B, dim, C]`` (``[num_rows, dim, C]`` with ``scatter``), without the last axis for an output without channels.

    Raises:
        ValueError: the tensors do not fit the table.
    """
    if len(inputs) != len(polynomial.inputs):
        raise ValueError(f"{len(polynomial.inputs)} inputs expected, got {len(inputs)}")
    for operand, value in zip(polynomial.inputs, inputs):
        if value.ndim != 2 + operand.has_channels or value.shape[1] != operand.dim:
            expected = f"[rows, {operand.dim}, C]" if operand.has_channels else f"[rows, {operand.dim}]"
            raise ValueError(f"input '{operand.name}' must be {expected}, got {list(value.shape)}")
    gathers = list(gathers) if gathers is not None else [None] * len(inputs)
    if isinstance(scatter, Rows):
        num_rows = scatter.num_rows
    elif scatter is not None and num_rows is None:
        raise ValueError("scatter needs num_rows")
    wide = arithmetic_of(inputs)
    first = inputs[0] if inputs[0].dtype == wide else inputs[0].new_empty(0, dtype=wide)
    backend = backend_for(first)
    if backend in ("triton", "cuequivariance"):
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
        out = evaluate_cpu(polynomial, list(inputs), gathers, scatter, num_rows, locality, stored)
    else:
        out = evaluate_reference(polynomial, inputs, [_plain(index) for index in gathers], _plain(scatter), num_rows)
    return out if dtype is None else out.to(dtype)


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
        from steradian.polynomials.cuequivariance import evaluate_cuequivariance

        given = [value.to(wide) for value in inputs]
        checked = final = evaluate_cuequivariance
    plain, target = [_plain(index) for index in gathers], _plain(scatter)
    if not passes(backend, polynomial, given, plain, target, checked):
        return None
    if backend != "triton":
        gathers, scatter = list(plain), target
    return final(polynomial, given, gathers, scatter, num_rows).to(dtype)


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
