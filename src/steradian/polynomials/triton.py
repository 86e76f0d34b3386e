"""Polynomials on a GPU by Triton kernels made from the same programs as the machine code for CPUs."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from steradian.polynomials.polynomial import Polynomial
from steradian.polynomials.program import program_of
from steradian.polynomials.triton_ops import name_of, polynomial

__all__ = ["evaluate_triton"]

_NAMES: WeakKeyDictionary[Polynomial, dict[tuple, str]] = WeakKeyDictionary()


def evaluate_triton(
    table: Polynomial,
    inputs: list[Tensor],
    gathers: list[Tensor | None],
    scatter: Tensor | None,
    num_rows: int | None,
    in_order: bool,
    dtype: torch.dtype,
) -> Tensor:
    """See :func:`steradian.polynomials.evaluate`; the result is in ``dtype``.

    Weights shared by many rows are not multiplied with the coefficients first, as on a CPU: coefficients are constants
    of the instructions here and cost nothing, while the products would be read from memory for every row.
    """
    indices: list[Tensor] = []
    counts: list[int] = []

    def number(index: Tensor | None, count: int) -> int | None:
        if index is None:
            return None
        for position, known in enumerate(indices):
            if known is index and counts[position] == count:
                return position
        indices.append(index)
        counts.append(count)
        return len(indices) - 1

    gathered = tuple(number(index, value.shape[0]) for index, value in zip(gathers, inputs))
    scattered = number(scatter, num_rows or 0)
    names = _NAMES.setdefault(table, {})
    key = (gathered, scattered)
    if key not in names:
        names[key] = name_of(program_of(table, gathered, scattered))
    ascending = "".join("01"[in_order and position == scattered] for position in range(len(indices)))
    work = next((len(index) for index in indices), inputs[0].shape[0])
    formats = str(dtype).removeprefix("torch.")
    (out,) = polynomial(names[key], inputs, indices, counts, ascending, work, formats)
    return out
