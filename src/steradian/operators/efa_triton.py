"""The sums of Euclidean fast attention on a GPU, by Triton.

The same three sums, in the same layout, as :class:`steradian.operators.efa_kernel.PlainSums`, and so the same
derivatives of any order. The product ``z = t x`` is formed in registers; nothing larger than waves, features, values
and their sums is stored. Products are accumulated in float32, without rounding factors to fewer digits. Unmeasured:
these kernels have been compared with the plain ones under the interpreter of Triton only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["TritonSums"]

BLOCK = 64
"""Rows, atoms and values of a tile (values: fewer where there are fewer)."""


@triton.jit
def _product(t, x, row, atom, rows, atoms, width, features):
    """z of a tile: row j is row j // width of the waves times row j % features of the features."""
    inside = (row < rows)[:, None] & (atom < atoms)[None, :]
    wave = tl.load(t + (row // width)[:, None] * atoms + atom[None, :], mask=inside, other=0.0)
    feature = tl.load(x + (row % features)[:, None] * atoms + atom[None, :], mask=inside, other=0.0)
    return wave.to(tl.float32), feature.to(tl.float32), inside


@triton.jit
def _moments(
    t, x, y, s, waves, rows, atoms, values, width, features,
    ROWS: tl.constexpr, ATOMS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """``S[j, e] += sum_i z[j, i] y[e, i]``"""
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    value = tl.program_id(1).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    total = tl.zeros((ROWS, VALUES), dtype=tl.float32)
    for start in range(0, atoms, ATOMS):
        atom = start + tl.arange(0, ATOMS)
        wave, feature, _ = _product(
            t + batch * waves * atoms, x + batch * features * atoms, row, atom, rows, atoms, width, features
        )
        known = (value < values)[None, :] & (atom < atoms)[:, None]
        right = tl.load(y + (batch * values + value)[None, :] * atoms + atom[:, None], mask=known, other=0.0)
        total = tl.dot(wave * feature, right.to(tl.float32), total, input_precision="ieee")
    place = s + (batch * rows + row)[:, None] * values + value[None, :]
    mask = (row < rows)[:, None] & (value < values)[None, :]
    tl.store(place, tl.load(place, mask=mask, other=0.0) + total, mask=mask)


@triton.jit
def _apply(
    t, x, y, s, waves, rows, atoms, values, width, features,
    ROWS: tl.constexpr, ATOMS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """``y[e, i] += sum_j S[j, e] z[j, i]``"""
    batch = tl.program_id(2).to(tl.int64)
    atom = tl.program_id(0).to(tl.int64) * ATOMS + tl.arange(0, ATOMS)
    value = tl.program_id(1).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    total = tl.zeros((VALUES, ATOMS), dtype=tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        wave, feature, _ = _product(
            t + batch * waves * atoms, x + batch * features * atoms, row, atom, rows, atoms, width, features
        )
        known = (value < values)[:, None] & (row < rows)[None, :]
        left = tl.load(s + (batch * rows + row)[None, :] * values + value[:, None], mask=known, other=0.0)
        total = tl.dot(left.to(tl.float32), wave * feature, total, input_precision="ieee")
    place = y + (batch * values + value)[:, None] * atoms + atom[None, :]
    mask = (value < values)[:, None] & (atom < atoms)[None, :]
    tl.store(place, tl.load(place, mask=mask, other=0.0) + total, mask=mask)


@triton.jit
def _contract(
    t, x, y, s, by_t, by_x, waves, rows, atoms, values, width, features,
    ROWS: tl.constexpr, ATOMS: tl.constexpr, VALUES: tl.constexpr, WAVES: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """``U = S y``, then its products with x added to dT/dt and with t added to dT/dx."""
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    atom = tl.program_id(1).to(tl.int64) * ATOMS + tl.arange(0, ATOMS)
    total = tl.zeros((ROWS, ATOMS), dtype=tl.float32)
    for start in range(0, values, VALUES):
        value = start + tl.arange(0, VALUES)
        left_known = (row < rows)[:, None] & (value < values)[None, :]
        left = tl.load(s + (batch * rows + row)[:, None] * values + value[None, :], mask=left_known, other=0.0)
        right_known = (value < values)[:, None] & (atom < atoms)[None, :]
        right = tl.load(y + (batch * values + value)[:, None] * atoms + atom[None, :], mask=right_known, other=0.0)
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    wave, feature, inside = _product(
        t + batch * waves * atoms, x + batch * features * atoms, row, atom, rows, atoms, width, features
    )
    if WAVES:
        place = by_t + (batch * waves + row // width)[:, None] * atoms + atom[None, :]
        tl.atomic_add(place, total * feature, mask=inside)
    if FEATURES:
        place = by_x + (batch * features + row % features)[:, None] * atoms + atom[None, :]
        tl.atomic_add(place, total * wave, mask=inside)


class TritonSums:
    """Sums in the layout of the plain ones: t ``[B, m, 2, n, N]``, x ``[B, n, a, N]``, y ``[B, e, N]``,
    S ``[B, m 2 n a, e]``; float32, or fewer digits (results are rounded to those in the end)."""

    def moments(self, values: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """``S = sum_i t_i x_i y_i``."""
        shape = _Shape(values, pairs[0])
        sums = values.new_zeros((values.shape[0], shape.rows, shape.values), dtype=torch.float32)
        for pair in pairs:
            grid = (triton.cdiv(shape.rows, BLOCK), triton.cdiv(shape.values, shape.block), values.shape[0])
            _moments[grid](*_contiguous(*pair, values), sums, *shape.sizes, **shape.blocks)
        return sums.to(values.dtype)

    def apply(self, sums: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """``y_i = sum t_i x_i S``."""
        batch, num_atoms = sums.shape[0], pairs[0][0].shape[-1]
        values = sums.new_zeros((batch, sums.shape[2], num_atoms), dtype=torch.float32)
        shape = _Shape(values, pairs[0])
        for pair in pairs:
            grid = (triton.cdiv(num_atoms, BLOCK), triton.cdiv(shape.values, shape.block), batch)
            waves, features, given = _contiguous(*pair, sums)
            _apply[grid](waves, features, values, given, *shape.sizes, **shape.blocks)
        return values.to(sums.dtype)

    def contract(
        self, values: Tensor, sums: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """dT/dt and dT/dx of every pair in turn, where wanted."""
        shape, outputs = _Shape(values, pairs[0]), []
        for number, pair in enumerate(pairs):
            asked = wanted[2 * number : 2 * number + 2]
            found = [
                torch.zeros(x.shape if ask else (1,), dtype=torch.float32, device=x.device)
                for x, ask in zip(pair, asked)
            ]
            grid = (triton.cdiv(shape.rows, BLOCK), triton.cdiv(shape.atoms, BLOCK), values.shape[0])
            given = _contiguous(*pair, values, sums)
            _contract[grid](*given, *found, *shape.sizes, **shape.blocks, WAVES=asked[0], FEATURES=asked[1])
            outputs += [x.to(values.dtype) if ask else None for x, ask in zip(found, asked)]
        return outputs


class _Shape:
    """Sizes that all kernels take."""

    def __init__(self, values: Tensor, pair: tuple[Tensor, Tensor]) -> None:
        waves, features = pair
        _, num_points, parts, num_pairs, self.atoms = waves.shape
        width, num_waves = features.shape[2], num_points * parts * num_pairs
        self.values, self.rows = values.shape[1], num_waves * width
        self.block = min(BLOCK, max(16, triton.next_power_of_2(self.values)))  # products need sixteen
        self.sizes = num_waves, self.rows, self.atoms, self.values, width, num_pairs * width
        self.blocks: dict[str, Any] = {"ROWS": BLOCK, "ATOMS": BLOCK, "VALUES": self.block}


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]
