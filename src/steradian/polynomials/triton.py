"""Polynomials on a GPU by Triton kernels made from the same programs as the machine code for CPUs.

A program is one operation that PyTorch knows, ``steradian::polynomial``: tracing and CUDA graphs see one opaque call
with tensors, numbers and a name. The name says which program: that of a polynomial is a hash of its contents, that of a
derivative is its parent's name and which inputs and outputs take part, so a process that loads a traced graph can make
the derivative from its parent. The derivative of the operation is the operation on the derived program: derivatives of
any order.

Results do not depend on scheduling: every number of an output is stored once, by one instance, whose sums run in a
fixed order; sums divided among several instances are added up by a reduction of fixed shape.
"""

from __future__ import annotations

import contextlib
import hashlib
import linecache
import sys
import threading
import time
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from steradian.graph.topology import Rows
from steradian.polynomials.polynomial import Operand, Polynomial
from steradian.polynomials.program import Graph, Program, RowIndices, Slot, program_of
from steradian.polynomials.triton_source import FUNCTION, Layout, Part, layout_of, parts_of, source_of

__all__ = ["Tile", "evaluate_triton", "kernel_of", "name_of", "polynomial", "program_named", "run_program", "tile_of"]

WARP = 64 if torch.version.hip else 32
#: Channels of a tile, one per thread.
CHANNELS = 32
#: Threads of an instance. Four warps share the rows of a segment, so that a molecule of a hundred atoms still gives
#: every multiprocessor of a large GPU work; their sums meet in shared memory once per segment.
THREADS = 128
#: Rows of a segment from which on four rows at a time pay; shorter segments are left to one warp.
LONG_SEGMENT = 8
#: Two channels per thread halve the loads and products of what has no channels, but also the number of warps: done
#: where the kernel is small enough for the registers and where this many warps remain.
MOST_TERMS_OF_WIDE_TILES = 128
WARPS_OF_WIDE_TILES = 8192
#: Warps to keep a large GPU busy (132 multiprocessors, four schedulers, four warps each); segments are divided in
#: parts where there are fewer, such as the atoms of each element.
WARPS_WANTED = 2112
MOST_PARTS = 64
#: Seconds of a launch that mean that something was compiled, and of all of these before the user is told.
WORTH_COUNTING, WORTH_A_LINE = 0.05, 1.0

_REAL = {torch.float32: tl.float32, torch.float64: tl.float64}
_seconds = 0.0
_PROGRAMS: dict[str, Program] = {}
_LOCK = threading.RLock()


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
    numbered = RowIndices.of(inputs, gathers, scatter, num_rows)
    key = (numbered.gathers, numbered.scatter)
    name: str = table.made.once(("triton", *key), lambda: name_of(program_of(table, *key)))
    rows, work, formats = numbered.rows, numbered.num_work(inputs), str(dtype).removeprefix("torch.")
    # a gather becomes a sum in the derivative by what is gathered
    sums = {numbered.scatter, *(place for place, value in zip(numbered.gathers, inputs) if value.requires_grad)}
    both = [_sorted(row, place in sums) for place, row in enumerate(rows)]
    order, bounds = [own for own, _ in both], [begin for _, begin in both]
    listed, counts = [row.index for row in rows], [row.num_rows for row in rows]
    (out,) = polynomial(name, inputs, listed, order, bounds, counts, work, formats)
    return out


def _sorted(rows: Rows, wanted: bool) -> tuple[Tensor, Tensor]:
    """Order and bounds for :func:`polynomial`; empty where there are none."""
    nothing = rows.index.new_empty(0)
    if not wanted:
        return nothing, nothing
    return nothing if rows.order is None else rows.order, rows.bounds


def name_of(program: Program) -> str:
    """Register a program under a name that depends on its contents."""
    name = hashlib.sha256(program.contents().encode()).hexdigest()[:24]
    with _LOCK:
        _PROGRAMS.setdefault(name, program)
    return name


def program_named(name: str) -> Program:
    """The program of a name; derivatives are made from their parents.

    Raises:
        KeyError: a polynomial that this process has not evaluated.
    """
    known = _PROGRAMS.get(name)
    if known is None:
        parent, _, which = name.rpartition("|")
        if not parent:
            raise KeyError(f"no polynomial named {name} in this process: build the model before loading a graph of it")
        wanted, given = which.split(":")
        known = program_named(parent).gradient(_bits(wanted), _bits(given))
        with _LOCK:
            known = _PROGRAMS.setdefault(name, known)
    return known


def _bits(text: str) -> tuple[bool, ...]:
    return tuple(letter == "1" for letter in text)


def _text(bits: Sequence[bool]) -> str:
    return "".join("01"[bool(bit)] for bit in bits)


@torch.library.custom_op("steradian::polynomial", mutates_args=())
def polynomial(
    name: str,
    inputs: Sequence[Tensor],
    indices: Sequence[Tensor],
    order: Sequence[Tensor],
    bounds: Sequence[Tensor],
    counts: Sequence[int],
    num_work: int,
    formats: str,
) -> list[Tensor]:
    """Outputs of a program.

    Args:
        name: of the program.
        inputs: as its slots say, ``[rows, dim, C]`` or ``[rows, dim]``.
        indices: row indices ``[num_work]``, int64.
        order, bounds: of each of them, see :class:`~steradian.graph.topology.Rows`; without numbers where it is in
            order as it is, and where no output and no derivative is summed by it.
        counts: how many rows each of them refers to.
        num_work: rows of the work.
        formats: of the outputs, such as ``float32,bfloat16``.
    """
    program = program_named(name)
    rows = [SortedRows(own if len(own) else None, begin) for own, begin in zip(order, bounds)]
    given = [value.contiguous() for value in inputs]
    return run_program(program, rows, list(indices), list(counts), num_work, given, _dtypes(formats))


@polynomial.register_fake
def _fake(
    name: str,
    inputs: Sequence[Tensor],
    indices: Sequence[Tensor],
    order: Sequence[Tensor],
    bounds: Sequence[Tensor],
    counts: Sequence[int],
    num_work: int,
    formats: str,
) -> list[Tensor]:
    program = program_named(name)
    channels = next((value.shape[2] for value in inputs if value.ndim == 3), 1)
    outputs = []
    for slot, dtype in zip(program.outputs, _dtypes(formats)):
        rows = num_work if slot.index is None else counts[slot.index]
        shape = (rows, slot.operand.dim, channels) if slot.operand.has_channels else (rows, slot.operand.dim)
        outputs.append(inputs[0].new_empty(shape, dtype=dtype))
    return outputs


def _remember(ctx: Any, inputs: tuple, output: Any) -> None:
    name, values, indices, order, bounds, counts, num_work, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.settings = name, len(values), len(indices), counts, num_work
    ctx.save_for_backward(*values, *indices, *order, *bounds)


def _backward(ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple:
    name, number, rows, counts, num_work = ctx.settings
    inputs, saved = ctx.saved_tensors[:number], list(ctx.saved_tensors[number:])
    indices, order, bounds = saved[:rows], saved[rows : 2 * rows], saved[2 * rows :]
    wanted = ctx.needs_input_grad[1]
    given = [cotangent is not None for cotangent in cotangents]
    nothing: list[Tensor | None] = [None] * number
    if any(given) and any(wanted):
        derived = f"{name}|{_text(wanted)}:{_text(given)}"
        formats = ",".join(_name(value.dtype) for value, asked in zip(inputs, wanted) if asked)
        extra = [cotangent for cotangent in cotangents if cotangent is not None]
        found = iter(polynomial(derived, [*inputs, *extra], indices, order, bounds, counts, num_work, formats))
        nothing = [next(found) if asked else None for asked in wanted]
    unknown: list[None] = [None] * rows
    return None, nothing, unknown, unknown, unknown, None if counts else [], None, None


polynomial.register_autograd(_backward, setup_context=_remember)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtypes(formats: str) -> list[torch.dtype]:
    return [getattr(torch, name) for name in formats.split(",")]


# ------------------------------------------------------------------------------------------------------------ launches


class SortedRows(NamedTuple):
    """The sorted form of a row index (:class:`~steradian.graph.topology.Rows`), as kernels read it."""

    order: Tensor | None
    bounds: Tensor


@dataclass(frozen=True)
class Tile:
    """How a kernel is launched: rows and channels at a time, warps, parts of each segment."""

    rows: int
    block: int
    warps: int
    parts: int = 1


def tile_of(part: Part, num_work: int, num_targets: int, channels: int, real: torch.dtype) -> Tile:
    """The sizes for a kernel; they depend on shapes alone."""
    graph = part.program.graph
    if not any(graph.vector[node] for node in _layout(part).nodes):
        return Tile(THREADS, 1, THREADS // WARP)
    block = min(CHANNELS, triton.next_power_of_2(channels))
    rows, warps = THREADS // block, THREADS // WARP
    average = num_work / max(1, num_targets)
    if part.index is not None and average < LONG_SEGMENT:
        rows, warps = max(1, WARP // block), 1
    instances = (num_targets if part.index is not None else -(-num_work // rows)) * -(-channels // block)
    small = part.num_terms <= MOST_TERMS_OF_WIDE_TILES and real == torch.float32
    if small and channels % (2 * CHANNELS) == 0 and instances * warps >= 2 * WARPS_OF_WIDE_TILES:
        return Tile(rows, 2 * CHANNELS, warps)
    parts = 1
    if part.index is not None:
        most = min(MOST_PARTS, int(average) // (4 * rows))
        while 2 * parts <= most and instances * warps * parts < WARPS_WANTED:
            parts *= 2
    return Tile(rows, block, warps, parts)


def run_program(
    program: Program,
    rows: Sequence[SortedRows],
    indices: Sequence[Tensor],
    counts: Sequence[int],
    num_work: int,
    inputs: Sequence[Tensor],
    formats: Sequence[torch.dtype],
) -> list[Tensor]:
    """Outputs of a program.

    Args:
        program: see :class:`~steradian.polynomials.program.Program`.
        rows: for every row index its sorted form; not read where no output is scattered by it.
        indices: the row indices ``[num_work]``, int64.
        counts: how many rows each of them refers to.
        num_work: rows of the work.
        inputs: contiguous, ``[rows, dim, C]`` or ``[rows, dim]``, of float16, bfloat16, float32 or float64.
        formats: of the outputs; sums are kept in float32, or float64 where an input is, and rounded when complete.
    """
    real = torch.float64 if any(value.dtype == torch.float64 for value in inputs) else torch.float32
    channels = next((value.shape[2] for slot, value in zip(program.inputs, inputs) if slot.operand.has_channels), 1)
    outputs: dict[int, Tensor] = {}
    for part in parts_of(program):
        targets = num_work if part.index is None else counts[part.index]
        tile = tile_of(part, num_work, targets, channels, real)
        places: dict[int, Tensor] = {}
        for place, position in enumerate(part.positions):
            if tile.parts > 1:
                shape = (tile.parts, *_shape(part.program, place, targets, channels))
                places[position] = _empty(part.program, place, shape, real, inputs[0])
            elif position in outputs:
                places[position] = outputs[position]
            else:
                shape = _shape(program, position, targets, channels)
                places[position] = _empty(program, position, shape, formats[position], inputs[0])
        _launch(part, tile, rows, indices, num_work, targets, channels, real, inputs, places)
        for position, value in places.items():
            if tile.parts > 1:  # so it is for every kernel of an output: components of the others are zero
                total = value.sum(0).to(formats[position])
                value = outputs[position] + total if position in outputs else total
            outputs[position] = value
    for position, slot in enumerate(program.outputs):
        scattered = slot.index is not None and slot.operand.has_channels
        if position not in outputs:  # zero everywhere
            targets = counts[slot.index] if scattered else num_work  # type: ignore[index]
            outputs[position] = inputs[0].new_zeros(
                _shape(program, position, targets, channels), dtype=formats[position]
            )
        if slot.index is not None and not slot.operand.has_channels:
            outputs[position] = _summed(outputs[position], slot.index, rows, indices, counts)
    return [outputs[position] for position in range(len(program.outputs))]


def _shape(program: Program, position: int, targets: int, channels: int) -> tuple[int, ...]:
    operand = program.outputs[position].operand
    return (targets, operand.dim, channels) if operand.has_channels else (targets, operand.dim)


def _empty(program: Program, position: int, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Memory for an output; zeros where the kernels leave components out."""
    return like.new_zeros(shape, dtype=dtype) if None in program.nodes[position] else like.new_empty(shape, dtype=dtype)


def _summed(
    value: Tensor, index: int, rows: Sequence[SortedRows], indices: Sequence[Tensor], counts: Sequence[int]
) -> Tensor:
    """Rows without channels summed by target: their components take the place of the channels."""
    program = _row_sum(index)
    one = run_program(program, rows, indices, counts, len(value), [value.unsqueeze(1)], [value.dtype])
    return one[0].squeeze(1)


@cache
def _row_sum(index: int) -> Program:
    graph = Graph()
    node = graph.input(0, 0, True)
    row = Operand("row", 1)
    return Program(graph, (Slot(row, None),), (Slot(row, index),), ((node,),))


def _launch(
    part: Part,
    tile: Tile,
    rows: Sequence[SortedRows],
    indices: Sequence[Tensor],
    num_work: int,
    targets: int,
    channels: int,
    real: torch.dtype,
    inputs: Sequence[Tensor],
    places: dict[int, Any],
) -> None:
    if not targets or not channels:
        return
    layout, program = _layout(part), part.program
    arguments = [inputs[operand] for operand in layout.read]
    arguments += [indices[program.inputs[operand].index] for operand in layout.gathered]  # type: ignore[index]
    constants: dict[str, Any] = {}
    blocks = triton.cdiv(channels, tile.block)
    if part.index is None:
        loops = any(not program.outputs[place].operand.has_channels for place in layout.written)
        grid = (triton.cdiv(targets, tile.rows), 1 if loops else blocks, 1)
    else:
        order, bounds = rows[part.index]
        arguments += [bounds if order is None else order, bounds]
        constants = {"ORDERED": order is not None, "PARTS": tile.parts}
        grid = (targets, blocks, tile.parts)
    arguments += [places[part.positions[place]] for place in layout.written]
    with _on(inputs[0].device), _told_if_slow():
        kernel_of(part)[grid](
            *arguments, targets, C=channels, ROWS=tile.rows, BLOCK=tile.block, REAL=_REAL[real], TOGETHER=together(),
            **constants, num_warps=tile.warps, **_options(),
        )  # fmt: skip


@cache
def _options() -> dict[str, Any]:
    """Products and sums are contracted to fused multiply-adds, which later versions of Triton do only when asked."""
    return {} if knobs.runtime.interpret else {"enable_fp_fusion": True}


@contextlib.contextmanager
def _told_if_slow() -> Iterator[None]:
    """Launching takes some microseconds; where it takes seconds, kernels are being compiled, and a line says so."""
    global _seconds
    started = time.perf_counter()
    yield
    spent = time.perf_counter() - started
    if spent > WORTH_COUNTING and not knobs.runtime.interpret:
        before, _seconds = _seconds, _seconds + spent
        if before < WORTH_A_LINE <= _seconds:
            print("steradian: compiling kernels of this model for the GPU (once; kept for later runs)", file=sys.stderr)


def together() -> bool:
    """Whether sums are taken together; the interpreter is slow at that."""
    return not knobs.runtime.interpret


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def _layout(part: Part) -> Layout:
    layout: Layout = part.program.made.once("layout", lambda: layout_of(part.program))
    return layout


def kernel_of(part: Part) -> Any:
    """Triton's function of a part."""
    with _LOCK:
        return part.program.made.once("triton", lambda: _function(source_of(part.program, part.index)))


@cache
def _function(text: str) -> Any:
    """The function of a text. Triton reads the source of what it compiles where Python's tracebacks do, so the text
    need not lie in a file, where somebody else could change it."""
    name = f"steradian_{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    module = types.ModuleType(name)
    module.__file__ = f"<{name}>"
    linecache.cache[module.__file__] = (len(text), None, text.splitlines(keepends=True), module.__file__)
    exec(compile(text, module.__file__, "exec"), module.__dict__)
    return getattr(module, FUNCTION)
