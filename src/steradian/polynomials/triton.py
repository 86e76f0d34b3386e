"""Polynomials on a GPU by Triton kernels made from the same programs as the machine code for CPUs."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from steradian.graph.topology import Rows, rows_of
from steradian.polynomials.polynomial import Polynomial
from steradian.polynomials.program import program_of
from steradian.polynomials.triton_ops import name_of, polynomial

__all__ = ["evaluate_triton"]

_NAMES: WeakKeyDictionary[Polynomial, dict[tuple, str]] = WeakKeyDictionary()


def evaluate_triton(
    table: Polynomial,
    inputs: list[Tensor],
    gathers: list[Rows | Tensor | None],
    scatter: Rows | Tensor | None,
    num_rows: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """See :func:`steradian.polynomials.evaluate`; the result is in ``dtype``.

    Weights shared by many rows are not multiplied with the coefficients first, as on a CPU: coefficients are constants
    of the instructions here and cost nothing, while the products would be read from memory for every row.
    """
    indices: list[Rows | Tensor] = []
    counts: list[int] = []

    def number(index: Rows | Tensor | None, count: int) -> int | None:
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
    rows = [rows_of(index, count) for index, count in zip(indices, counts)]
    # a gather becomes a sum in the derivative by what is gathered
    sums = {scattered, *(place for place, value in zip(gathered, inputs) if value.requires_grad)}
    both = [_sorted(row, place in sums) for place, row in enumerate(rows)]
    work = next((len(index) for index in indices), inputs[0].shape[0])
    formats = str(dtype).removeprefix("torch.")
    listed = [row.index for row in rows]
    (out,) = polynomial(
        names[key], inputs, listed, [own for own, _ in both], [begin for _, begin in both], counts, work, formats
    )
    return out


def _sorted(rows: Rows, wanted: bool) -> tuple[Tensor, Tensor]:
    """Order and bounds for :func:`~steradian.polynomials.triton_ops.polynomial`; empty where there are none."""
    nothing = rows.index.new_empty(0)
    if not wanted:
        return nothing, nothing
    return nothing if rows.order is None else rows.order, rows.bounds
