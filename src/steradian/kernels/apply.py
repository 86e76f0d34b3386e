"""Programs under autograd: gather, run, scatter, and derivatives of any order by derived programs."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from steradian.kernels.polynomial import Operand, Polynomial
from steradian.kernels.program import Program, folded, program_of
from steradian.kernels.tape import Tape, tape_of

__all__ = ["evaluate_cpu"]

#: Multiply-adds below which a second thread costs more than it brings.
WORTH_A_THREAD = 400_000


@dataclass(frozen=True)
class Rows:
    """A row index ``[B]`` and how it sorts the work: rows in order of their target, and where each target's begin."""

    index: Tensor
    num_rows: int
    order: np.ndarray
    bounds: np.ndarray
    in_order: bool


_ROWS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def rows_of(index: Tensor, num_rows: int) -> Rows:
    """The sorted form of an index, kept as long as the index lives."""
    known = _ROWS.get(index)
    if known is None or known.num_rows != num_rows:
        contiguous = index.contiguous()
        array = contiguous.numpy()
        if array.size and not 0 <= array.min() <= array.max() < num_rows:
            raise IndexError(f"row index out of range: {array.min()}..{array.max()} for {num_rows} rows")
        in_order = bool((array[1:] >= array[:-1]).all())
        order = np.arange(array.size) if in_order else np.argsort(array, kind="stable")
        bounds = np.zeros(num_rows + 1, dtype=np.int64)
        np.cumsum(np.bincount(array, minlength=num_rows), out=bounds[1:])
        known = Rows(contiguous, num_rows, order, bounds, in_order)
        # the entry must not keep its own key alive
        _ROWS[index] = known if contiguous is not index else Rows(index.detach(), num_rows, order, bounds, in_order)
        known = _ROWS[index]
    return known


@dataclass(frozen=True)
class Pass:
    """One run over the rows: the outputs that are scattered by one index, or by none."""

    tape: Tape
    positions: tuple[int, ...]
    index: int | None
    coefficients: dict[torch.dtype, np.ndarray]


_PASSES: WeakKeyDictionary[Program, list[Pass]] = WeakKeyDictionary()


def passes_of(program: Program) -> list[Pass]:
    """Split a program by the index of its outputs; outputs without one join the first pass."""
    if program not in _PASSES:
        by_index: dict[int | None, list[int]] = {}
        for position, slot in enumerate(program.outputs):
            by_index.setdefault(slot.index, []).append(position)
        free = by_index.pop(None, [])
        if free and by_index:
            by_index[next(iter(by_index))] += free
        elif free:
            by_index[None] = free
        found = []
        for index, positions in by_index.items():
            tape = tape_of(program.part(tuple(positions)))
            kinds = {torch.float32: np.float32, torch.float64: np.float64}
            coefficients = {dtype: tape.coefficients.astype(kind) for dtype, kind in kinds.items()}
            found.append(Pass(tape, tuple(positions), index, coefficients))
        _PASSES[program] = found
    return _PASSES[program]


def run_program(
    program: Program, rows: tuple[Rows, ...], num_rows: int, inputs: list[Tensor], channels: int
) -> list[Tensor]:
    """Outputs of a program; inputs are contiguous, with channels a multiple of a block."""
    outputs: list[Tensor | None] = [None] * len(program.outputs)
    like = inputs[0]
    for one in passes_of(program):
        for position in one.positions:
            slot = program.outputs[position]
            count = num_rows if slot.index is None else rows[slot.index].num_rows
            shape = (count, slot.operand.dim, channels) if slot.operand.has_channels else (count, slot.operand.dim)
            written = slot.index is None and slot.operand.has_channels and one.tape.complete[one.positions.index(position)]
            outputs[position] = like.new_empty(shape) if written else like.new_zeros(shape)
        _run_pass(one, program, rows, num_rows, inputs, outputs, channels)
    return outputs  # type: ignore[return-value]


def _run_pass(
    one: Pass, program: Program, rows: tuple[Rows, ...], num_rows: int, inputs: list[Tensor], outputs: list, channels: int
) -> None:
    from steradian.kernels.cpu import run

    width = next(block for block in _blocks() if channels % block == 0)
    tape = one.tape
    input_table = np.array(
        [
            (value.data_ptr(), slot.operand.dim, 0 if slot.index is None else rows[slot.index].index.data_ptr(),
             slot.operand.has_channels)
            for slot, value in zip(program.inputs, inputs)
        ],
        dtype=np.int64,
    )  # fmt: skip
    output_table = np.array(
        [
            (outputs[position].data_ptr(), program.outputs[position].operand.dim,
             program.outputs[position].index is not None, program.outputs[position].operand.has_channels)
            for position in one.positions
        ],
        dtype=np.int64,
    )  # fmt: skip
    if one.index is None:
        order, bounds, in_order = _plain_rows(num_rows)
    else:
        sorted_rows = rows[one.index]
        order, bounds, in_order = sorted_rows.order, sorted_rows.bounds, sorted_rows.in_order
    sizes = np.array([tape.num_vectors, tape.num_buffers, tape.num_scalars, channels, in_order], dtype=np.int64)
    tables = (tape.nodes, tape.factors, one.coefficients[inputs[0].dtype], tape.loads, tape.load_bounds, tape.stores)
    num_segments, num_blocks = len(bounds) - 1, channels // width
    lanes = (0,) * (width // 16)

    def work(first: int, last: int, block_first: int, block_last: int) -> None:
        run(*tables, sizes, input_table, output_table, order, bounds, first, last, block_first, block_last, lanes)

    threads = torch.get_num_threads()
    if threads == 1 or tape.weight * num_rows * channels < WORTH_A_THREAD:
        work(0, num_segments, 0, num_blocks)
        return
    sums_channels = any(not slot.operand.has_channels for slot in (program.outputs[p] for p in one.positions))
    if num_segments < 4 * threads and num_blocks > 1 and not sums_channels:
        cuts = [round(num_blocks * part / threads) for part in range(threads + 1)]
        tasks = [(0, num_segments, a, b) for a, b in zip(cuts, cuts[1:]) if b > a]
    else:
        targets = [len(order) * part // threads for part in range(threads + 1)]
        cuts = [0, *np.searchsorted(bounds, targets[1:-1]).tolist(), num_segments]
        tasks = [(a, b, 0, num_blocks) for a, b in zip(cuts, cuts[1:]) if b > a]
    for future in [_pool(os.getpid(), threads).submit(work, *task) for task in tasks]:
        future.result()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    # one pool per process: the threads of a pool do not survive a fork
    return ThreadPoolExecutor(threads, thread_name_prefix="steradian")


@cache
def _blocks() -> tuple[int, ...]:
    from steradian.kernels.cpu import BLOCKS

    return BLOCKS


@cache
def _plain_rows(count: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Rows that are each a segment of their own."""
    return np.zeros(1, dtype=np.int64), np.arange(count + 1), True


class _Apply(torch.autograd.Function):
    """A program as a differentiable function; its backward is the derived program, under this same function."""

    @staticmethod
    def forward(ctx: Any, program: Program, rows: tuple[Rows, ...], num_rows: int, *inputs: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.program, ctx.rows, ctx.num_rows = program, rows, num_rows
        ctx.save_for_backward(*inputs)
        channels = next(
            value.shape[2] for slot, value in zip(program.inputs, inputs) if slot.operand.has_channels
        )
        return tuple(run_program(program, rows, num_rows, [value.contiguous() for value in inputs], channels))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        inputs = ctx.saved_tensors
        wanted = tuple(ctx.needs_input_grad[3:])
        given = tuple(cotangent is not None for cotangent in cotangents)
        derived = ctx.program.gradient(wanted, given)
        extra = [cotangent for cotangent in cotangents if cotangent is not None]
        gradients = iter(_Apply.apply(derived, ctx.rows, ctx.num_rows, *inputs, *extra))
        return (None, None, None, *(next(gradients) if asked else None for asked in wanted))


_PROGRAMS: WeakKeyDictionary[Polynomial, dict] = WeakKeyDictionary()


def _cached(polynomial: Polynomial, key: tuple, make: Any) -> Any:
    known = _PROGRAMS.setdefault(polynomial, {})
    if key not in known:
        known[key] = make()
    return known[key]


def evaluate_cpu(
    polynomial: Polynomial,
    inputs: list[Tensor],
    gathers: list[Tensor | None],
    scatter: Tensor | None,
    num_rows: int | None,
) -> Tensor:
    """See :func:`steradian.kernels.evaluate`."""
    if not any(operand.has_channels for operand in polynomial.inputs):
        return _rows_as_channels(polynomial, inputs[0])
    outer = polynomial.outer
    if outer is not None and gathers[outer] is not None:
        # weights shared by many rows: put everything linear in them together first
        matrix, polynomial = _cached(polynomial, ("folded",), lambda: _folded_tensors(polynomial))
        weights = inputs[outer]
        key = (weights.dtype, weights.device)
        inputs = [*inputs]
        inputs[outer] = torch.matmul(matrix.setdefault(key, matrix["float64"].to(device=key[1], dtype=key[0])), weights)
    indices: list[Tensor] = []
    counts: list[int] = []

    def number(index: Tensor | None, count: int) -> int | None:
        if index is None:
            return None
        for position, known in enumerate(indices):
            if known is index:
                return position
        indices.append(index)
        counts.append(count)
        return len(indices) - 1

    gathered = tuple(number(index, value.shape[0]) for index, value in zip(gathers, inputs))
    scattered = number(scatter, num_rows or 0)
    program = _cached(
        polynomial, (gathered, scattered), lambda: program_of(polynomial, gathered, scattered)
    )
    rows = tuple(rows_of(index, count) for index, count in zip(indices, counts))
    work = next((len(index) for index in indices), inputs[0].shape[0])
    channels = max(value.shape[2] for value in inputs if value.ndim == 3)
    missing = -channels % 16
    if missing:
        inputs = [torch.nn.functional.pad(value, (0, missing)) if value.ndim == 3 else value for value in inputs]
    (out,) = _Apply.apply(program, rows, work, *inputs)
    return out[..., :channels] if missing else out


def _folded_tensors(polynomial: Polynomial) -> tuple[dict, Polynomial]:
    matrix, small = folded(polynomial)
    return {"float64": torch.from_numpy(matrix)}, small


def _rows_as_channels(polynomial: Polynomial, value: Tensor) -> Tensor:
    """A polynomial of one input without channels: the rows take the place of the channels."""
    widened = _cached(polynomial, ("rows as channels",), lambda: _with_channels(polynomial))
    across = value.t().unsqueeze(0)
    missing = -across.shape[2] % 64
    program = _cached(widened, (), lambda: program_of(widened, (None,), None))
    (out,) = _Apply.apply(program, (), 1, torch.nn.functional.pad(across, (0, missing)))
    return out[0, :, : value.shape[0]].t()


def _with_channels(polynomial: Polynomial) -> Polynomial:
    inputs = tuple(Operand(operand.name, operand.dim) for operand in polynomial.inputs)
    return Polynomial(inputs, Operand(polynomial.output.name, polynomial.output.dim), polynomial.terms, polynomial.outer)
