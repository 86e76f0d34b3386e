"""The sums of Euclidean fast attention on a GPU: kernels in Triton, launched by :mod:`steradian.operators.efa.triton`.

The same three sums, in the same layout, as :class:`steradian.operators.efa.sums.PlainSums`: waves t ``[B, W, N]``
(W = points x 2 x pairs), features x ``[B, F, N]`` (F = pairs x width), values y ``[B, e, N]``, sums S
``[B, W width, e]``. The product ``z = t x`` is formed in registers; nothing larger than waves, features, values and
their sums is stored.

Factors are rounded to FORMAT right before they are multiplied, in units for UNITS (the same, except in Triton's
interpreter). Sums are WIDE: float32, or float64. Matrix units truncate when they add, so what they add up is taken over
into another sum now and then. All sums have a fixed order: there are no atomic operations.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["apply_kernel", "contract_kernel", "moments_kernel"]


@triton.jit
def _load(values, row, atom, atoms, known, WIDE: tl.constexpr):
    """``values[row, atom]`` of ``[rows, atoms]``, zero where not known."""
    return tl.load(values + (row * atoms + atom), mask=known, other=0.0).to(WIDE)


@triton.jit
def _product(t, x, row, atom, features, width, atoms, known, WIDE: tl.constexpr):
    """z of a tile: row j is row j // width of the waves times row j % features of the features."""
    wave = _load(t, (row // width)[:, None], atom[None, :], atoms, known, WIDE)
    return wave * _load(x, (row % features)[:, None], atom[None, :], atoms, known, WIDE)


@triton.jit
def moments_kernel(
    t, x, y, s, waves, features, values, atoms, width,
    ADD: tl.constexpr, ROWS: tl.constexpr, ATOMS: tl.constexpr, VALUES: tl.constexpr, RUN: tl.constexpr,
    INDEX: tl.constexpr, WIDE: tl.constexpr, FORMAT: tl.constexpr, UNITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``S[j, e] = sum_i z[j, i] y[e, i]``, or added to what is there."""
    batch = tl.program_id(2).to(tl.int64)
    t, x, y = t + batch * waves * atoms, x + batch * features * atoms, y + batch * values * atoms
    s += batch * waves * width * values
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(INDEX)
    value = (tl.program_id(1) * VALUES + tl.arange(0, VALUES)).to(INDEX)
    known_row, known_value = (row < waves * width)[:, None], (value < values)[None, :]
    total = tl.zeros((ROWS, VALUES), dtype=WIDE)
    for start in range(0, atoms, ATOMS * RUN):
        part = tl.zeros((ROWS, VALUES), dtype=WIDE)
        for first in range(start, tl.minimum(start + ATOMS * RUN, atoms), ATOMS):
            atom = (first + tl.arange(0, ATOMS)).to(INDEX)
            z = _product(t, x, row, atom, features, width, atoms, known_row & (atom < atoms)[None, :], WIDE)
            known = known_value & (atom < atoms)[:, None]
            right = _load(y, value[None, :], atom[:, None], atoms, known, WIDE)
            part = tl.dot(
                z.to(FORMAT).to(UNITS), right.to(FORMAT).to(UNITS), part, input_precision=PRECISION, out_dtype=WIDE
            )
        total += part
    place = s + (row[:, None] * values + value[None, :])
    if ADD:
        total += tl.load(place, mask=known_row & known_value, other=0.0)
    tl.store(place, total, mask=known_row & known_value)


@triton.jit
def apply_kernel(
    t, x, s, y, waves, features, values, atoms, width, batches, rows_of_part,
    ADD: tl.constexpr, ROWS: tl.constexpr, ATOMS: tl.constexpr, VALUES: tl.constexpr, RUN: tl.constexpr,
    INDEX: tl.constexpr, WIDE: tl.constexpr, FORMAT: tl.constexpr, UNITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``y[e, i] = sum_j S[j, e] z[j, i]``, or added to what is there; ``y [parts, B, e, N]`` for parts of the rows."""
    batch, part_ = (tl.program_id(2) % batches).to(tl.int64), tl.program_id(2) // batches
    t, x, s = t + batch * waves * atoms, x + batch * features * atoms, s + batch * waves * width * values
    y += (part_.to(tl.int64) * batches + batch) * values * atoms
    atom = (tl.program_id(0) * ATOMS + tl.arange(0, ATOMS)).to(INDEX)
    value = (tl.program_id(1) * VALUES + tl.arange(0, VALUES)).to(INDEX)
    known_atom, known_value = (atom < atoms)[None, :], (value < values)[:, None]
    begin = part_ * rows_of_part
    end = tl.minimum(begin + rows_of_part, waves * width)
    total = tl.zeros((VALUES, ATOMS), dtype=WIDE)
    for start in range(begin, end, ROWS * RUN):
        part = tl.zeros((VALUES, ATOMS), dtype=WIDE)
        for first in range(start, tl.minimum(start + ROWS * RUN, end), ROWS):
            row = (first + tl.arange(0, ROWS)).to(INDEX)
            z = _product(t, x, row, atom, features, width, atoms, (row < end)[:, None] & known_atom, WIDE)
            left = _load(s, row[None, :], value[:, None], values, known_value & (row < end)[None, :], WIDE)
            part = tl.dot(
                left.to(FORMAT).to(UNITS), z.to(FORMAT).to(UNITS), part, input_precision=PRECISION, out_dtype=WIDE
            )
        total += part
    place = y + (value[:, None] * atoms + atom[None, :])
    if ADD:
        total += tl.load(place, mask=known_value & known_atom, other=0.0)
    tl.store(place, total, mask=known_value & known_atom)


@triton.jit
def _contracted(
    s, y, row, atom, values, atoms, known_row, ROWS: tl.constexpr, ATOMS: tl.constexpr, VALUES: tl.constexpr,
    INDEX: tl.constexpr, WIDE: tl.constexpr, FORMAT: tl.constexpr, UNITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``U = S y`` of some rows and atoms."""
    total = tl.zeros((ROWS, ATOMS), dtype=WIDE)
    for start in range(0, values, VALUES):
        value = (start + tl.arange(0, VALUES)).to(INDEX)
        left = _load(s, row[:, None], value[None, :], values, known_row[:, None] & (value < values)[None, :], WIDE)
        known = (value < values)[:, None] & (atom < atoms)[None, :]
        right = _load(y, value[:, None], atom[None, :], atoms, known, WIDE)
        total = tl.dot(
            left.to(FORMAT).to(UNITS), right.to(FORMAT).to(UNITS), total, input_precision=PRECISION, out_dtype=WIDE
        )
    return total


@triton.jit
def contract_kernel(
    t, x, y, s, by_t, by_x, waves, features, values, atoms, width, pairs, batches, points_of_part,
    BY_WAVES: tl.constexpr, BY_FEATURES: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr, ATOMS: tl.constexpr,
    VALUES: tl.constexpr, INDEX: tl.constexpr, WIDE: tl.constexpr, FORMAT: tl.constexpr, UNITS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``U = S y``, then the sums of its products with x over the width, ``by_t [chunks, B, W, N]``, and with t over the
    points, ``by_x [parts, B, F, N]``. A program has some pairs and a chunk of the width, and loops over a part of the
    points (cosines and sines apart)."""
    batch, part = (tl.program_id(2) % batches).to(tl.int64), tl.program_id(2) // batches
    chunks = tl.cdiv(width, WIDTH)
    chunk, block = tl.program_id(1) % chunks, tl.program_id(1) // chunks
    t, x, s = t + batch * waves * atoms, x + batch * features * atoms, s + batch * waves * width * values
    y += batch * values * atoms
    by_t += (chunk.to(tl.int64) * batches + batch) * waves * atoms
    by_x += (part.to(tl.int64) * batches + batch) * features * atoms
    atom = (tl.program_id(0) * ATOMS + tl.arange(0, ATOMS)).to(INDEX)
    local = tl.arange(0, PAIRS * WIDTH).to(INDEX)
    pair, own = block * PAIRS + local // WIDTH, chunk * WIDTH + local % WIDTH
    known_row = (pair < pairs) & (own < width)
    known = known_row[:, None] & (atom < atoms)[None, :]
    feature = pair * width + own
    right = _load(x, feature[:, None], atom[None, :], atoms, known, WIDE)
    by_feature = tl.zeros((PAIRS * WIDTH, ATOMS), dtype=WIDE)
    block_pair = (block * PAIRS + tl.arange(0, PAIRS)).to(INDEX)
    known_wave = (block_pair < pairs)[:, None] & (atom < atoms)[None, :]
    for point in range(part * points_of_part, tl.minimum((part + 1) * points_of_part, waves // pairs)):
        contracted = _contracted(
            s, y, point * features + feature, atom, values, atoms, known_row,
            PAIRS * WIDTH, ATOMS, VALUES, INDEX, WIDE, FORMAT, UNITS, PRECISION,
        )  # fmt: skip
        if BY_FEATURES:
            by_feature += contracted * _load(t, (point * pairs + pair)[:, None], atom[None, :], atoms, known, WIDE)
        if BY_WAVES:
            by_wave = tl.sum(tl.reshape(contracted * right, (PAIRS, WIDTH, ATOMS)), 1)
            place = (point * pairs + block_pair)[:, None] * atoms + atom[None, :]
            tl.store(by_t + place, by_wave, mask=known_wave)
    if BY_FEATURES:
        tl.store(by_x + (feature[:, None] * atoms + atom[None, :]), by_feature, mask=known)
