"""Programs under autograd: gather, run, scatter, and derivatives of any order by derived programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steradian.compiler.checked import agrees, allowed, difference, is_static
from steradian.compiler.folding import Folded
from steradian.compiler.lanes import lanes_of
from steradian.compiler.native import Code, run_tasks
from steradian.graph.topology import Rows
from steradian.polynomials.codegen import compiled
from steradian.polynomials.polynomial import Operand, Polynomial, without_periods
from steradian.polynomials.program import Program, RowIndices, folded, program_of
from steradian.polynomials.reference import ROWS, evaluate_program, sample, widened

__all__ = ["evaluate_cpu", "run_program"]

#: Multiply-adds below which a second thread costs more than it brings.
WORTH_A_THREAD = 400_000
#: Part of the separate work that a shared run may have at most.
WORTH_SHARING = 0.7
#: Bytes of the stack on which the machine code may sum, in float32, what it then stores in bfloat16.
MOST_STACK = 128 * 1024


@dataclass(frozen=True)
class Pass:
    """One run over the rows: the outputs that are scattered by one index, or by none.

    Attributes:
        program: with these outputs only.
        positions: of the outputs in the whole program.
        index: the row index that sorts the work, or None.
        written: for each output whether every number of it is written; others are added to.
        sums_channels: whether an output is a sum over channels, so that a row's channels belong to one thread.
        weight: multiply-adds per row and channel.
    """

    program: Program
    positions: tuple[int, ...]
    index: int | None
    written: tuple[bool, ...]
    sums_channels: bool
    weight: int


def passes_of(program: Program) -> list[Pass]:
    """Split the outputs of a program into runs over the rows; those scattered by different indices cannot share one.

    Outputs share a run where that saves a good part of the work: short code keeps its values in registers.
    """
    passes: list[Pass] = program.made.once("passes", lambda: _divided(program))
    return passes


def _divided(program: Program) -> list[Pass]:
    groups: list[tuple[int | None, tuple[int, ...]]] = []
    for position, slot in enumerate(program.outputs):
        new: tuple[int | None, tuple[int, ...]] = (slot.index, (position,))
        for place, (index, others) in enumerate(groups):
            together = program.part((*others, position)).num_terms
            apart = program.part(others).num_terms + program.part((position,)).num_terms
            # row b of an output without index is row b of the work, so any order serves it; two indices want two orders
            possible = None in (index, slot.index) or index == slot.index
            if possible and together <= WORTH_SHARING * apart:
                new = (slot.index if index is None else index, (*others, position))
                groups.pop(place)
                break
        groups.append(new)
    return [_make_pass(program, index, positions) for index, positions in groups]


def _make_pass(program: Program, index: int | None, positions: tuple[int, ...]) -> Pass:
    part = program.part(positions)
    # what repeats with the channels is a sum over them too
    written = tuple(slot.operand.has_channels and slot.operand.period is None for slot in part.outputs)
    sums = not all(written)
    return Pass(part, positions, index, written, sums, part.num_terms)


@dataclass
class Plan:
    """How a program runs for inputs of some formats: its passes, their code, and the format of every output.

    Attributes:
        trusted: whether the code gave the numbers of plain PyTorch; None: not known yet.
    """

    passes: list[tuple[Pass, Code, tuple[torch.dtype, ...]]]
    wide: torch.dtype
    trusted: bool | None = None


def _plan(program: Program, inputs: list[Tensor], channels: int, formats: tuple[torch.dtype, ...] | None) -> Plan:
    wide = torch.float64 if any(value.dtype == torch.float64 for value in inputs) else torch.float32
    passes = []
    for one in passes_of(program):
        written: list[torch.dtype] = []
        for position, complete in zip(one.positions, one.written):
            slot = program.outputs[position]
            # sums are kept in the wide format, and rounded when they are complete
            rounds = complete and (slot.index is None or 4 * slot.operand.dim * channels <= MOST_STACK)
            written.append(formats[position] if formats and rounds else wide)
        halves = tuple(dtype == torch.bfloat16 for dtype in (*(value.dtype for value in inputs), *written))
        code = compiled(one.program, wide.itemsize, channels, halves if any(halves) else ())
        passes.append((one, code, tuple(written)))
    return Plan(passes, wide)


def run_program(
    program: Program,
    rows: tuple[Rows, ...],
    num_rows: int,
    inputs: list[Tensor],
    channels: int,
    formats: tuple[torch.dtype, ...] | None = None,
) -> list[Tensor]:
    """Outputs of a program; inputs are contiguous, with whole vectors of channels.

    Inputs with channels may be bfloat16; ``formats`` says in which format each output is wanted (None: the widest).
    Code that was made in this process is compared with plain PyTorch first, and not used where it is wrong.
    """
    key = (channels, formats, tuple(value.dtype for value in inputs))
    plan: Plan = program.made.once(key, lambda: _plan(program, inputs, channels, formats))
    if plan.trusted is None and not is_static(inputs[0]):
        plan.trusted = _is_right(program, plan, rows, inputs, channels)
    if plan.trusted is False:
        given = [value.to(plan.wide) for value in inputs]
        indices, counts = [one.index for one in rows], [one.num_rows for one in rows]
        outputs = [value.detach() for value in evaluate_program(program, given, indices, counts, num_rows)]
    else:
        outputs = _run(program, plan, rows, num_rows, inputs, channels)
    return outputs if formats is None else [output.to(dtype) for output, dtype in zip(outputs, formats)]


def _is_right(program: Program, plan: Plan, rows: tuple[Rows, ...], inputs: list[Tensor], channels: int) -> bool:
    """Whether new code may be used, and kept for later processes, which then need not compare it again."""
    new = [code for _, code, _ in plan.passes if code.new]
    if not new:
        return True

    def compare() -> tuple[float, float]:
        small = sample(inputs, [slot.index for slot in program.inputs], [one.index for one in rows])
        sorted_rows = tuple(Rows(index, count).look() for index, count in zip(small.indices, small.counts))
        given = [value.contiguous() for value in small.inputs]
        found = _run(program, plan, sorted_rows, ROWS, given, channels)
        wide = [value.double() for value in given]
        truth = evaluate_program(program, wide, small.indices, small.counts, ROWS)
        errors = [(difference(ours, exact), allowed("polynomial", ours.dtype)) for ours, exact in zip(found, truth)]
        return max(errors, key=lambda pair: pair[0] / pair[1])

    names = ", ".join(slot.operand.name for slot in program.outputs)
    right = agrees(compare, f"machine code of '{names}' is not used on this processor: it {{}}; plain PyTorch runs")
    if right:
        for code in new:
            code.keep()
    return right


def _run(
    program: Program, plan: Plan, rows: tuple[Rows, ...], num_rows: int, inputs: list[Tensor], channels: int
) -> list[Tensor]:
    outputs: list[Any] = [None] * len(program.outputs)
    for one, code, formats in plan.passes:
        for position, written, dtype in zip(one.positions, one.written, formats):
            slot = program.outputs[position]
            count = num_rows if slot.index is None else rows[slot.index].num_rows
            own = slot.operand.period or channels
            shape = (count, slot.operand.dim, own) if slot.operand.has_channels else (count, slot.operand.dim)
            outputs[position] = (
                inputs[0].new_empty(shape, dtype=dtype) if written else inputs[0].new_zeros(shape, dtype=dtype)
            )
        mine = [outputs[position] for position in one.positions]
        _run_pass(one, code.call, plan.wide.itemsize, rows, num_rows, inputs, mine, channels)
    return outputs


def _run_pass(
    one: Pass,
    function: Callable,
    itemsize: int,
    rows: tuple[Rows, ...],
    num_rows: int,
    inputs: list[Tensor],
    outputs: list[Tensor],
    channels: int,
) -> None:
    slots = one.program.inputs
    tables = np.array(
        [
            *(value.data_ptr() for value in inputs),
            *(0 if slot.index is None else rows[slot.index].index.data_ptr() for slot in slots),
            *(value.data_ptr() for value in outputs),
        ],
        dtype=np.int64,
    )
    start = tables.ctypes.data
    addresses = (start, start + 8 * len(inputs), start + 16 * len(inputs))
    if one.index is None:
        locality = one.program.locality
        # no output wants an order: edges that share a row of an input follow each other, so it stays in the cache
        order, bounds = None if locality is None else rows[locality].order, _plain_rows(num_rows)
    else:
        order, bounds = rows[one.index].order, rows[one.index].bounds
    listing = (0 if order is None else order.data_ptr(), bounds.data_ptr())
    num_segments, num_blocks = len(bounds) - 1, channels * itemsize // 64

    threads = torch.get_num_threads()
    if threads == 1 or one.weight * num_rows * channels < WORTH_A_THREAD:
        function(*addresses, *listing, 0, num_segments, 0, num_blocks)
        return
    if num_segments < 4 * threads and num_blocks > 1 and not one.sums_channels:
        # few long segments (atoms of each element): threads share out channels, as none may add to another's row
        cuts = [round(num_blocks * part / threads) for part in range(threads + 1)]
        tasks = [(0, num_segments, a, b) for a, b in pairwise(cuts) if b > a]
    else:
        # segments differ in length: cut where equal numbers of rows lie between, not of segments
        targets = [num_rows * part // threads for part in range(1, threads)]
        cuts = [0, *np.searchsorted(bounds.numpy(), targets).tolist(), num_segments]
        tasks = [(a, b, 0, num_blocks) for a, b in pairwise(cuts) if b > a]
    run_tasks(function, [(*addresses, *listing, *task) for task in tasks], threads)


@cache
def _plain_rows(count: int) -> Tensor:
    """Bounds of rows that are each a segment of their own."""
    return torch.arange(count + 1)


class _Apply(torch.autograd.Function):
    """A program as a differentiable function; its backward is the derived program, under this same function."""

    @staticmethod
    def forward(
        ctx: Any, program: Program, rows: tuple[Rows, ...], num_rows: int, formats: Any, *inputs: Tensor
    ) -> Any:
        # without a cotangent its part of the derivative is left out; zeros would be multiplied all the way through
        ctx.set_materialize_grads(False)
        ctx.program, ctx.rows, ctx.num_rows = program, rows, num_rows
        ctx.save_for_backward(*inputs)
        channels = max(value.shape[2] for value in inputs if value.ndim == 3)
        return tuple(run_program(program, rows, num_rows, [value.contiguous() for value in inputs], channels, formats))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        inputs = ctx.saved_tensors
        wanted = tuple(ctx.needs_input_grad[4:])
        given = tuple(cotangent is not None for cotangent in cotangents)
        derived = ctx.program.gradient(wanted, given)
        extra = [cotangent for cotangent in cotangents if cotangent is not None]
        one = all(value.dtype == inputs[0].dtype for value in (*inputs, *extra))
        # a gradient has the format of its input; sums on the way are in the widest
        formats = None if one else tuple(value.dtype for value, asked in zip(inputs, wanted) if asked)
        gradients = iter(_Apply.apply(derived, ctx.rows, ctx.num_rows, formats, *inputs, *extra))
        return (None, None, None, None, *(next(gradients) if asked else None for asked in wanted))


def evaluate_cpu(
    polynomial: Polynomial,
    inputs: list[Tensor],
    gathers: list[Rows | Tensor | None],
    scatter: Rows | Tensor | None,
    num_rows: int | None,
    locality: Rows | Tensor | None = None,
    dtype: torch.dtype | None = None,
    keep: Folded | None = None,
) -> Tensor:
    """See :func:`steradian.polynomials.evaluate`."""
    if not any(operand.has_channels for operand in polynomial.inputs):
        return _rows_as_channels(polynomial, inputs[0])
    size = max(4, *(value.element_size() for value in inputs))
    if any(operand.period is not None and operand.period % lanes_of(size) for operand in polynomial.inputs):
        inputs, polynomial = widened(polynomial, inputs), without_periods(polynomial)  # code reads whole vectors
    outer = polynomial.outer
    if outer is not None and gathers[outer] is not None and polynomial.folds:
        # weights shared by many rows: put everything linear in them together first
        matrix, polynomial = polynomial.made.once("folded", lambda: _folded_tensors(polynomial))
        weights = inputs[outer]
        inputs = [*inputs]
        fold = matrix.setdefault(weights.dtype, matrix[torch.float64].to(weights.dtype))
        inputs[outer] = (keep or Folded())(polynomial, lambda: torch.matmul(fold, weights), weights)
    numbered = RowIndices.of(inputs, gathers, scatter, num_rows, locality)
    key = (numbered.gathers, numbered.scatter, numbered.locality)
    program: Program = polynomial.made.once(key, lambda: program_of(polynomial, *key))
    rows = tuple(one.look() for one in numbered.rows)
    work = numbered.num_work(inputs)
    channels = max(value.shape[2] for value in inputs if value.ndim == 3)
    # whole vectors: the code has no remainder to treat, and its inner addresses are constants
    missing = -channels % lanes_of(size)
    if missing:
        inputs = [torch.nn.functional.pad(value, (0, missing)) if value.ndim == 3 else value for value in inputs]
    formats = None if dtype is None or not polynomial.output.has_channels else (dtype,)
    (out,) = _Apply.apply(program, rows, work, formats, *inputs)
    return out[..., :channels] if missing else out


def _folded_tensors(polynomial: Polynomial) -> tuple[dict, Polynomial]:
    matrix, small = folded(polynomial)
    return {torch.float64: torch.from_numpy(matrix)}, small


def _rows_as_channels(polynomial: Polynomial, value: Tensor) -> Tensor:
    """A polynomial of one input without channels: the rows take the place of the channels."""
    widened: Polynomial = polynomial.made.once("rows as channels", lambda: _with_channels(polynomial))
    # directions of edges have three numbers and no channels: turned around, sixteen edges fill a vector
    across = value.t().unsqueeze(0)
    missing = -across.shape[2] % lanes_of(value.element_size())
    program: Program = widened.made.once("program", lambda: program_of(widened, (None,), None))
    (out,) = _Apply.apply(program, (), 1, None, torch.nn.functional.pad(across, (0, missing)))
    return out[0, :, : value.shape[0]].t()


def _with_channels(polynomial: Polynomial) -> Polynomial:
    inputs = tuple(Operand(operand.name, operand.dim) for operand in polynomial.inputs)
    return Polynomial(
        inputs, Operand(polynomial.output.name, polynomial.output.dim), polynomial.terms, polynomial.outer
    )
