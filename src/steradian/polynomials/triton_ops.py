"""Programs as one operation that PyTorch knows, ``steradian::polynomial``.

Tracing (``make_fx``, ``torch.compile``) and CUDA graphs see one opaque call with tensors, numbers and a name. The name
says which program: that of a polynomial is a hash of its contents, that of a derivative is its parent's name and which
inputs and outputs take part, so a process that loads a compiled graph can make the derivative from its parent. The
derivative of the operation is the operation on the derived program: derivatives of any order.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steradian.polynomials.program import Program, needed_in_order
from steradian.polynomials.triton_parts import SortedRows

__all__ = ["name_of", "polynomial", "program_named"]

_PROGRAMS: dict[str, Program] = {}
_LOCK = threading.Lock()


def name_of(program: Program) -> str:
    """Register a program under a name that depends on its contents."""
    name = _hash(program)
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
        parent, _, choice = name.rpartition("|")
        if not parent:
            raise KeyError(f"no polynomial named {name} in this process: build the model before loading a graph of it")
        wanted, given = choice.split(":")
        known = program_named(parent).gradient(_bits(wanted), _bits(given))
        with _LOCK:
            known = _PROGRAMS.setdefault(name, known)
    return known


def _bits(text: str) -> tuple[bool, ...]:
    return tuple(letter == "1" for letter in text)


def _text(bits: Sequence[bool]) -> str:
    return "".join("01"[bool(bit)] for bit in bits)


def _hash(program: Program) -> str:
    order, graph = needed_in_order(program), program.graph
    slots = [
        [(slot.operand.dim, slot.operand.has_channels, slot.index) for slot in side]
        for side in (program.inputs, program.outputs)
    ]
    nodes = [(node, graph.vector[node], graph.source[node], graph.terms[node]) for node in order]
    return hashlib.sha256(repr((slots, program.nodes, nodes)).encode()).hexdigest()[:24]


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
    from steradian.polynomials.triton_run import run_program

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
