"""The sums of Euclidean fast attention through Triton as operators of PyTorch, differentiable at any order.

``steradian::efa_moments``, ``efa_apply`` and ``efa_contract`` have each other as derivatives; they can be traced
(``make_fx``, ``torch.compile``) and captured in CUDA graphs. Blocks are chosen from shapes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steradian.compiler.checked import allowed, register_operator
from steradian.polynomials.backend import may_serve, on_its_device, triton_serves

__all__ = ["ALIGNED", "FLOAT32_PRODUCTS", "TritonSums", "triton_sums"]

BLOCK = 64
"""Rows, atoms and values of a tile (values: fewer where there are fewer)."""
RUN = 8
"""Tiles that matrix units add up by themselves."""
ALIGNED = 16
"""Atoms are padded to a multiple of this, so that rows can be read in vectors."""
PROGRAMS = 512
"""Long loops are cut into parts until there are about so many programs (an H200 has 132 multiprocessors)."""
FLOAT32_PRODUCTS = "tf32x3"
"""How products of float32 are formed on NVIDIA's GPUs: by matrix units, as three of TF32 (22 bits), or ``ieee``."""
LARGEST_OFFSET = 1 << 31
"""Tensors of a system with fewer numbers are addressed with 32 bits, which leaves more registers."""
FORMATS = ("ieee", "tf32x3", "tf32", "bfloat16", "float16")


class TritonSums:
    """Sums in the layout of the plain ones: t ``[B, m, 2, n, N]``, x ``[B, n, a, N]``, y ``[B, e, N]``,
    S ``[B, m 2 n a, e]``. Results are float32 (float64 for float64); they carry their own derivatives.

    Args:
        products: format of the factors: ``ieee`` (as given), ``tf32x3``, ``tf32``, ``bfloat16``, ``float16``.

    Raises:
        ValueError: another format.
    """

    #: Results are differentiable without the functions of :mod:`steradian.operators.efa.sums`.
    own_derivatives = True

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
        return _spread(_contract(values, sums, _flat(pairs), list(wanted), self.products), wanted)


def _flat(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [tensor for pair in pairs for tensor in pair]


def _spread(found: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Any]:
    remaining = iter(found)
    return [next(remaining) if asked else None for asked in wanted]


# ----------------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("steradian::efa_moments", mutates_args=())
@on_its_device
def _moments(values: Tensor, flat: list[Tensor], products: str) -> Tensor:
    from steradian.operators.efa.triton_kernels import moments_kernel

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
    from steradian.operators.efa.triton_kernels import apply_kernel

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


# --------------------------------------------------------------------------------------------------------- derivatives


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    first, flat, ctx.products = inputs
    ctx.save_for_backward(first, *flat)


def _moments_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    values, *flat = ctx.saved_tensors
    wanted, wanted_flat, _ = ctx.needs_input_grad
    by_values = _apply(gradient, flat, ctx.products).to(values.dtype) if wanted else None
    return by_values, _by_pairs(values, gradient, flat, wanted_flat, ctx.products), None


def _apply_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    sums, *flat = ctx.saved_tensors
    wanted, wanted_flat, _ = ctx.needs_input_grad
    by_sums = _moments(gradient, flat, ctx.products).to(sums.dtype) if wanted else None
    return by_sums, _by_pairs(gradient, sums, flat, wanted_flat, ctx.products), None


def _by_pairs(
    values: Tensor, sums: Tensor, flat: list[Tensor], wanted: Sequence[bool], products: str
) -> list[Tensor | None]:
    """Derivatives of ``T = sum t x S y`` by the waves and features of every pair, where wanted."""
    if not any(wanted):
        return [None] * len(flat)
    found = _spread(_contract(values, sums, flat, list(wanted), products), wanted)
    return [None if one is None else one.to(tensor.dtype) for one, tensor in zip(found, flat)]


def _save_contract(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    values, sums, flat, ctx.wanted, ctx.products = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(values, sums, *flat)


def _contract_backward(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
    values, sums, *flat = ctx.saved_tensors
    cotangents = _spread(gradients, ctx.wanted)
    needs = ctx.needs_input_grad
    # T with one factor replaced by its cotangent, for every output
    new: list[Tensor] = []
    origin: list[int] = []  # which input of a new pair is an input of this operator
    for number, (waves, features) in enumerate(_pairs(flat)):
        for_waves, for_features = cotangents[2 * number : 2 * number + 2]
        if for_waves is not None:
            new, origin = [*new, for_waves, features], [*origin, -1, 2 * number + 1]
        if for_features is not None:
            new, origin = [*new, waves, for_features], [*origin, 2 * number, -1]
    if not new:
        return None, None, [None] * len(flat), None, None
    by_values = _apply(sums, new, ctx.products).to(values.dtype) if needs[0] else None
    by_sums = _moments(values, new, ctx.products).to(sums.dtype) if needs[1] else None
    wanted = [index >= 0 and bool(needs[2][index]) for index in origin]
    by_inputs: list[Tensor | None] = [None] * len(flat)
    for index, found in zip(origin, _by_pairs(values, sums, new, wanted, ctx.products)):
        if found is not None:
            by_inputs[index] = found.to(flat[index].dtype)
    return by_values, by_sums, by_inputs, None, None


_moments.register_autograd(_moments_backward, setup_context=_save)
_apply.register_autograd(_apply_backward, setup_context=_save)
_contract.register_autograd(_contract_backward, setup_context=_save_contract)


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
        import triton
        import triton.language as tl

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
        from steradian.operators.efa.triton_kernels import contract_kernel

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
    from steradian.operators.efa.sums import PLAIN

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
