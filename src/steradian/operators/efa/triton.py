"""The sums of Euclidean fast attention on a GPU: kernels in Triton, as operators of PyTorch.

The same three sums, in the same layout, as :class:`steradian.operators.efa.sums.PlainSums`, with its derivatives: waves
t ``[B, W, N]`` (W = points x 2 x pairs), features x ``[B, F, N]`` (F = pairs x width), values y ``[B, e, N]``,
sums S ``[B, W width, e]``. The product ``z = t x`` is formed in registers; nothing larger than waves, features, values
and their sums is stored. ``steradian::efa_moments``, ``efa_apply`` and ``efa_contract`` can be traced (``make_fx``,
``torch.compile``) and recorded as CUDA graphs. Blocks are chosen from shapes alone.

Factors are rounded to FORMAT right before they are multiplied, in units for UNITS (the same, except in Triton's
interpreter). Sums are WIDE: float32, or float64. Matrix units truncate when they add, so what they add up is taken over
into another sum now and then. All sums have a fixed order: there are no atomic operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from steradian.compiler.checked import allowed, register_operator
from steradian.operators.efa.sums import PLAIN
from steradian.polynomials.backend import may_serve, on_its_device, triton_serves

__all__ = ["FLOAT32_PRODUCTS", "TritonSums", "apply_kernel", "contract_kernel", "moments_kernel", "triton_sums"]

BLOCK = 64
"""Rows, atoms and values of a tile (values: fewer where there are fewer)."""
RUN = 8
"""Tiles that matrix units add up by themselves."""
PROGRAMS = 512
"""Long loops are cut into parts until there are about so many programs (an H200 has 132 multiprocessors)."""
FLOAT32_PRODUCTS = "tf32x3"
"""How products of float32 are formed on NVIDIA's GPUs: by matrix units, as three of TF32 (22 bits), or ``ieee``."""
LARGEST_OFFSET = 1 << 31
"""Tensors of a system with fewer numbers are addressed with 32 bits, which leaves more registers."""
FORMATS = ("ieee", "tf32x3", "tf32", "bfloat16", "float16")


class TritonSums:
    """Sums in the layout of the plain ones: t ``[B, m, 2, n, N]``, x ``[B, n, a, N]``, y ``[B, e, N]``,
    S ``[B, m 2 n a, e]``. Results are float32 (float64 for float64).

    Args:
        products: format of the factors: ``ieee`` (as given), ``tf32x3``, ``tf32``, ``bfloat16``, ``float16``.

    Raises:
        ValueError: another format.
    """

    #: Atoms are padded to a multiple of this, so that rows can be read in vectors.
    aligned = 16

    def __init__(self, products: str = "ieee") -> None:
        if products not in FORMATS:
            raise ValueError(f"products must be one of {', '.join(FORMATS)}, not '{products}'")
        self.products = products

    def moments(self, values: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """``S = sum_i t_i x_i y_i``."""
        return _moments(values, _flat(pairs), self.products)

    def apply(self, sums: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """``y_i = sum t_i x_i S``."""
        return _apply(sums, _flat(pairs), self.products)

    def contract(
        self, values: Tensor, sums: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """dT/dt and dT/dx of every pair in turn, where wanted."""
        found = iter(_contract(values, sums, _flat(pairs), list(wanted), self.products))
        return [next(found) if asked else None for asked in wanted]


def _flat(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [tensor for pair in pairs for tensor in pair]


# ------------------------------------------------------------------------------------------------------------- kernels


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


# ----------------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("steradian::efa_moments", mutates_args=())
@on_its_device
def _moments(values: Tensor, flat: list[Tensor], products: str) -> Tensor:
    shape = _Shape.of(values.shape[0], values.shape[1], flat, products)
    sums = values.new_empty((shape.batch, shape.rows, shape.values), dtype=_wide(values))
    grid = (-(-shape.rows // BLOCK), -(-shape.values // shape.value_block), shape.batch)
    for number, (waves, features) in enumerate(_pairs(flat)):
        moments_kernel[grid](
            waves.contiguous(), features.contiguous(), values.contiguous(), sums, *shape.sizes,
            ADD=number > 0, ROWS=BLOCK, ATOMS=BLOCK // 2, VALUES=shape.value_block, RUN=2 * RUN, **shape.meaning,
        )  # fmt: skip
    return sums


@_moments.register_fake
def _(values: Tensor, flat: list[Tensor], products: str) -> Tensor:
    _, num_points, parts, num_pairs, _ = flat[0].shape
    rows = num_points * parts * num_pairs * flat[1].shape[2]
    return values.new_empty((values.shape[0], rows, values.shape[1]), dtype=_wide(values))


@torch.library.custom_op("steradian::efa_apply", mutates_args=())
@on_its_device
def _apply(sums: Tensor, flat: list[Tensor], products: str) -> Tensor:
    shape = _Shape.of(sums.shape[0], sums.shape[2], flat, products)
    blocks = -(-shape.atoms // BLOCK) * -(-shape.values // shape.value_block) * shape.batch
    rows, parts = shape.parts(shape.rows, blocks, BLOCK * RUN)
    values = sums.new_empty((parts, shape.batch, shape.values, shape.atoms), dtype=_wide(sums))
    grid = (-(-shape.atoms // BLOCK), -(-shape.values // shape.value_block), shape.batch * parts)
    for number, (waves, features) in enumerate(_pairs(flat)):
        apply_kernel[grid](
            waves.contiguous(), features.contiguous(), sums.contiguous(), values, *shape.sizes, shape.batch, rows,
            ADD=number > 0, ROWS=BLOCK, ATOMS=BLOCK, VALUES=shape.value_block, RUN=RUN, **shape.meaning,
        )  # fmt: skip
    return values.sum(0) if parts > 1 else values.view(values.shape[1:])


@_apply.register_fake
def _(sums: Tensor, flat: list[Tensor], products: str) -> Tensor:
    return sums.new_empty((sums.shape[0], sums.shape[2], flat[0].shape[-1]), dtype=_wide(sums))


@torch.library.custom_op("steradian::efa_contract", mutates_args=())
@on_its_device
def _contract(values: Tensor, sums: Tensor, flat: list[Tensor], wanted: list[bool], products: str) -> list[Tensor]:
    shape, found = _Shape.of(values.shape[0], values.shape[1], flat, products), []
    for number, (waves, features) in enumerate(_pairs(flat)):
        asked = wanted[2 * number : 2 * number + 2]
        if any(asked):
            found += shape.contract(values.contiguous(), sums.contiguous(), waves, features, asked)
    return found


@_contract.register_fake
def _(values: Tensor, sums: Tensor, flat: list[Tensor], wanted: list[bool], products: str) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape, dtype=_wide(values)) for tensor, asked in zip(flat, wanted) if asked]


def _pairs(flat: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(flat[::2], flat[1::2]))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------------------ launches


@dataclass(frozen=True)
class _Shape:
    """Sizes and formats that the kernels take."""

    batch: int
    waves: int
    num_pairs: int
    width: int
    values: int
    atoms: int
    products: str
    wide: torch.dtype

    @classmethod
    def of(cls, batch: int, num_values: int, flat: Sequence[Tensor], products: str) -> _Shape:
        _, num_points, parts, num_pairs, atoms = flat[0].shape
        return cls(
            batch, num_points * parts * num_pairs, num_pairs, flat[1].shape[2], num_values, atoms, products,
            _wide(flat[0]),
        )  # fmt: skip

    @property
    def rows(self) -> int:
        return self.waves * self.width

    @property
    def value_block(self) -> int:
        return min(BLOCK, max(16, _power_of_two(self.values)))  # products need sixteen

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        return self.waves, self.num_pairs * self.width, self.values, self.atoms, self.width

    @property
    def meaning(self) -> dict[str, Any]:
        """Formats of sums and of factors, and how these are multiplied."""
        short = {"bfloat16": tl.bfloat16, "float16": tl.float16}
        wide = tl.float64 if self.wide == torch.float64 else tl.float32
        precision = self.products if self.products in ("tf32x3", "tf32") and wide == tl.float32 else "ieee"
        launch = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}
        waves, features, values, atoms, _ = self.sizes
        largest = max(waves * atoms, features * atoms, values * atoms, self.rows * values)
        index = tl.int32 if largest < LARGEST_OFFSET else tl.int64
        short_format = short.get(self.products, wide)
        # the interpreter cannot multiply bfloat16; products of two such numbers are exact in float32
        units = wide if triton.knobs.runtime.interpret else short_format
        formats = {"WIDE": wide, "FORMAT": short_format, "UNITS": units, "PRECISION": precision}
        return {"INDEX": index} | formats | launch

    def parts(self, length: int, blocks: int, step: int) -> tuple[int, int]:
        """Length of a part of a loop, in steps, and number of parts that give enough programs."""
        number = max(1, min(PROGRAMS // max(1, blocks), -(-length // step)))
        size = max(1, -(-length // (number * step)) * step)
        return size, max(1, -(-length // size))

    def contract(
        self, values: Tensor, sums: Tensor, waves: Tensor, features: Tensor, asked: Sequence[bool]
    ) -> list[Tensor]:
        """dT/dt and dT/dx of a pair, those that are asked for."""
        width = min(BLOCK, _power_of_two(self.width))
        pairs = min(max(1, BLOCK // width), max(_power_of_two(self.num_pairs), 16 // width))
        chunks, blocks = -(-self.width // width), -(-self.num_pairs // pairs)
        grid = -(-self.atoms // BLOCK), chunks * blocks
        points, parts = self.parts(self.waves // self.num_pairs, grid[0] * grid[1] * self.batch, 1)
        by_waves = values.new_empty((chunks, *waves.shape) if asked[0] else 1, dtype=self.wide)
        by_features = values.new_empty((parts, *features.shape) if asked[1] else 1, dtype=self.wide)
        contract_kernel[(*grid, self.batch * parts)](
            waves.contiguous(), features.contiguous(), values, sums, by_waves, by_features, *self.sizes,
            self.num_pairs, self.batch, points, BY_WAVES=asked[0], BY_FEATURES=asked[1], PAIRS=pairs, WIDTH=width,
            ATOMS=BLOCK, VALUES=self.value_block, **self.meaning,
        )  # fmt: skip
        found = [value for value, ask in zip((by_waves, by_features), asked) if ask]
        return [value.sum(0) if len(value) > 1 else value.view(value.shape[1:]) for value in found]


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


# ---------------------------------------------------------------------------------------------------------- comparison

_SUMS = {products: TritonSums(products) for products in FORMATS}


def triton_sums(features: Tensor, num_values: int, low: torch.dtype | None) -> TritonSums | None:
    """The kernels for features ``[B, n, a, N]`` and values of a width, or None where they do not serve.

    Args:
        features, num_values: as above.
        low: format of the role ``attention`` where it is not that of the features.
    """
    if not may_serve(features) or features.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    products = _products(features, low)
    sizes = f"{features.shape[1]} pairs of width {features.shape[2]}, {num_values} values"
    return _SUMS[products] if triton_serves("EFA", f"{products}, {sizes}", features) else None


def _products(features: Tensor, low: torch.dtype | None) -> str:
    low = low or features.dtype
    if low in (torch.bfloat16, torch.float16):
        return str(low).removeprefix("torch.")
    if torch.version.hip is not None or not features.is_cuda:
        return "ieee"
    # what ``PrecisionPolicy.matrix_units`` sets where the policy says tf32
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else FLOAT32_PRODUCTS


def _check(device: torch.device, problem: str) -> tuple[list[Tensor], list[Tensor], float]:
    """The three sums by kernels and in plain PyTorch, for two systems of 70 atoms, and what is allowed."""
    products, sizes, values = problem.split(", ")
    num_pairs, width, num_values = int(sizes.split()[0]), int(sizes.split()[-1]), int(values.split()[0])
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    pairs = [(random(2, 3, 2, num_pairs, 70), random(2, num_pairs, width, 70))]
    y, s = random(2, num_values, 70), random(2, 6 * num_pairs * width, num_values)
    short = [(t.float(), x.float()) for t, x in pairs]
    way = _SUMS[products]
    ours = [way.moments(y.float(), short), way.apply(s.float(), short)]
    theirs = [PLAIN.moments(y, pairs), PLAIN.apply(s, pairs)]
    for found, given in ((ours, way.contract(y.float(), s.float(), short, [True, True])),
                         (theirs, PLAIN.contract(y, s, pairs, [True, True]))):  # fmt: skip
        found += [tensor for tensor in given if tensor is not None]
    return ours, theirs, allowed("EFA", products)


register_operator("EFA", _check)
