"""Euclidean fast attention pair by pair through machine code; see :mod:`steradian.operators.efa.cpu_code_pairs`.

Arrays are ``[B, K, rows, W]`` with W atoms in the lanes of a block; rows of waves belong to frequencies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from steradian.compiler.native import function_of
from steradian.compiler.tiles import ROWS
from steradian.operators.efa.cpu_code_pairs import ARGUMENTS, ARRAYS, num_scratch, pairs_module
from steradian.operators.efa.cpu_sums import Task, aligned, run_kernel

__all__ = ["PairShape", "attend_pairs", "attend_pairs_plainly"]


class PairShape(NamedTuple):
    """What a call needs and never differentiates.

    Attributes:
        starts: first row of the waves of every frequency, and the number of rows.
        num_atoms: of the largest system; later atoms of the blocks are padding.
    """

    starts: tuple[int, ...]
    num_atoms: int


def attend_pairs(waves: Tensor, queries: Tensor, keys: Tensor, values: Tensor, shape: PairShape) -> Tensor:
    """``y_i = sum_j s_ij v_j``, ``[B, K, e, W]``, with derivatives of any order; the first two by machine code.

    Args:
        waves: ``[B, K, R, W]``.
        queries, keys: ``[B, K, n a, W]``.
        values: ``[B, K, e, W]``.
        shape: the frequencies' rows.
    """
    return _Attend.apply(shape, waves, queries, keys, values)


def attend_pairs_plainly(waves: Tensor, queries: Tensor, keys: Tensor, values: Tensor, shape: PairShape) -> Tensor:
    """The same in plain PyTorch, all pairs at once: the truth, and the way to third derivatives."""
    t, q, k, v = (array.transpose(2, 3).flatten(1, 2) for array in (waves, queries, keys, values))  # [B, K W, rows]
    width = q.shape[2] // (len(shape.starts) - 1)
    scores = torch.zeros((), dtype=t.dtype)
    for n, (first, last) in enumerate(zip(shape.starts, shape.starts[1:])):
        wave, own = t[..., first:last], slice(n * width, (n + 1) * width)
        scores = scores + (wave @ wave.transpose(1, 2)) * (q[..., own] @ k[..., own].transpose(1, 2))
    return (scores @ v).unflatten(1, (values.shape[1], -1)).transpose(2, 3)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shape: PairShape, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        ctx.shape = shape
        ctx.save_for_backward(*inputs)
        (out,) = _run("value", shape, inputs, outputs=("gradient",))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, *_Slopes.apply(ctx.shape, ctx.needs_input_grad[1:], gradient, *ctx.saved_tensors)


class _Slopes(torch.autograd.Function):
    """Derivatives of ``sum(gradient y)`` by waves, queries, keys and values, where wanted."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, shape: PairShape, wanted: Sequence[bool], gradient: Tensor, *inputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.shape = shape
        ctx.save_for_backward(gradient, *inputs)
        if not any(wanted[1:]):
            return *_run("positions", shape, inputs, gradient, outputs=("waves",)), None, None, None
        found = _run("slopes", shape, inputs, gradient, outputs=ARRAYS[:-1])
        return tuple(tensor if asked else None for tensor, asked in zip(found, wanted))

    @staticmethod
    def backward(ctx: Any, *changes: Tensor | None) -> Any:
        gradient, *inputs = ctx.saved_tensors
        if all(change is None for change in changes):
            return (None,) * 7
        full = [torch.zeros_like(array) if change is None else change for array, change in zip(inputs, changes)]
        if torch.is_grad_enabled():
            found = _changes_plainly(ctx.shape, gradient, inputs, full)
        else:
            found = _run("changes", ctx.shape, inputs, gradient, full, outputs=("gradient", *ARRAYS[:-1]))
        return None, None, *(tensor if ask else None for tensor, ask in zip(found, ctx.needs_input_grad[2:]))


def _changes_plainly(
    shape: PairShape, gradient: Tensor, inputs: Sequence[Tensor], changes: Sequence[Tensor]
) -> Sequence[Tensor]:
    """By differentiation of the plain formula, so that it can be differentiated once more."""
    gradient, waves, queries, keys, values = every = [_differentiable(tensor) for tensor in (gradient, *inputs)]
    out = attend_pairs_plainly(waves, queries, keys, values, shape)
    first = torch.autograd.grad(out, every[1:], gradient, create_graph=True)
    return torch.autograd.grad(first, every, changes, create_graph=True, materialize_grads=True)


def _differentiable(tensor: Tensor) -> Tensor:
    """The same tensor where differentiation can stop, although it may be a function of another one."""
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_(True)


@cache
def _function(kind: str, itemsize: int) -> Callable:
    return function_of(f"attention by pairs, {kind}", pairs_module, (kind, itemsize), 4)


def _run(
    kind: str,
    shape: PairShape,
    inputs: Sequence[Tensor],
    gradient: Tensor | None = None,
    changes: Sequence[Tensor] = (),
    *,
    outputs: Sequence[str],
) -> list[Tensor]:
    waves, queries, _, values = inputs
    batch, blocks = waves.shape[:2]
    arrays = dict(zip(ARRAYS, inputs)) | ({} if gradient is None else {"gradient": gradient})
    arrays |= {f"{name}_change": change for name, change in zip(ARRAYS, changes)}
    arrays = {name: aligned(array) for name, array in arrays.items()}
    shapes = dict(zip(ARRAYS, (*inputs, values)))
    results = {name: values.new_zeros(shapes[name].shape) for name in outputs}
    starts = np.array(shape.starts, dtype=np.int64)
    num_pairs = len(starts) - 1
    numbers = {name: array.data_ptr() for name, array in arrays.items()} | {
        "num_blocks": blocks, "num_tiles": -(-shape.num_atoms // ROWS), "num_pairs": num_pairs,
        "width": queries.shape[2] // num_pairs, "num_waves": waves.shape[2], "num_values": values.shape[2],
        "starts": starts.ctypes.data,
    }  # fmt: skip
    numbers |= {f"by_{name}": result.data_ptr() for name, result in results.items()}
    work = batch * (blocks * waves.shape[3]) ** 2 * (waves.shape[2] + queries.shape[2] + values.shape[2])
    function = _function(kind, values.element_size())
    run_kernel(Task(function, ARGUMENTS, numbers, num_scratch(), batch * blocks, work))
    return list(results.values())
