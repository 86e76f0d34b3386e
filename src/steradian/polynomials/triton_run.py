"""Programs run by Triton: kernels loaded from their text, sizes of tiles, launches.

Results do not depend on scheduling: every number of an output is stored once, by one instance, whose sums run in a
fixed order; sums divided among several instances are added up by a reduction of fixed shape.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from steradian.compiler.native import cache_folder
from steradian.polynomials.polynomial import Operand
from steradian.polynomials.program import Graph, Program, Slot
from steradian.polynomials.triton_parts import Part, SortedRows, parts_of
from steradian.polynomials.triton_source import FUNCTION, Layout, layout_of, source_of

__all__ = ["Tile", "kernel_of", "run_program", "tile_of"]

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
_KERNELS: WeakKeyDictionary[Part, Any] = WeakKeyDictionary()
_LAYOUTS: WeakKeyDictionary[Part, Layout] = WeakKeyDictionary()
_LOCK = threading.RLock()
_seconds = 0.0


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
    if part not in _LAYOUTS:
        _LAYOUTS[part] = layout_of(part.program)
    return _LAYOUTS[part]


def kernel_of(part: Part) -> Any:
    """Triton's function of a part, from a file in the cache (Triton reads the source of what it compiles)."""
    with _LOCK:
        if part not in _KERNELS:
            text = source_of(part.program, part.index)
            name = f"steradian_{hashlib.sha256(text.encode()).hexdigest()[:24]}"
            _KERNELS[part] = getattr(_module(name, text), FUNCTION)
        return _KERNELS[part]


@cache
def _module(name: str, text: str) -> Any:
    path = _file(name, text)
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _file(name: str, text: str) -> Path:
    """The file with this text, made where it is missing or damaged; in a temporary folder if the cache is read-only."""
    for folder in (cache_folder() / "triton", Path(tempfile.gettempdir()) / f"steradian-triton-{os.getuid()}"):
        path = folder / f"{name}.py"
        with contextlib.suppress(OSError):
            if path.read_text() == text:
                return path
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, temporary = tempfile.mkstemp(dir=folder)
            with os.fdopen(handle, "w") as stream:
                stream.write(text)
            os.replace(temporary, path)
            return path
    raise OSError("no folder to keep kernels in: set STERADIAN_CACHE to a folder that can be written")
