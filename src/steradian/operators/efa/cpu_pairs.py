"""Euclidean fast attention pair by pair by machine code, with two derivatives.

Everything is in one function,

.. math:: T = \\sum_{ij} \\sum_n \\Big(\\sum_{ρ \\in n} t_{iρ} t_{jρ}\\Big) \\Big(\\sum_a q_{i,na} k_{j,na}\\Big)
              \\Big(\\sum_e g_{ie} v_{je}\\Big) ,

whose derivative by g is the attention, and whose others are those of ``sum(g y)``. A second derivative is wanted along
a direction only, so it is the derivative of these derivatives along that direction: every number is accompanied by its
change. Eight atoms at a time meet the atoms of one block, which lie in the lanes; no score leaves the registers and the
first-level cache. Arrays as in :mod:`steradian.operators.efa.cpu_sums`: ``[B, K, rows, W]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from steradian.compiler.lanes import ROWS, Tiles, Value
from steradian.compiler.native import function_of
from steradian.operators.efa.cpu_sums import aligned, run_kernel

__all__ = ["PairShape", "attend_pairs", "attend_pairs_plainly", "pairs_module"]

ARRAYS = ("waves", "queries", "keys", "values", "gradient")
#: Names of the numbers and addresses that a call finds in its first argument.
ARGUMENTS = (
    "num_blocks",  # K
    "num_tiles",  # eights of atoms in a system
    "num_pairs",  # n
    "width",  # a
    "num_waves",  # R
    "num_values",  # e
    "starts",  # [n + 1] int64: first row of the waves of every n
    *ARRAYS,
    *(f"{name}_change" for name in ARRAYS[:-1]),
    *(f"by_{name}" for name in ARRAYS),
)
#: value: by_gradient, the attention. positions: by_waves. slopes: by all but the gradient.
#: changes: the change of all derivatives along the changes of waves, queries, keys and values.
#: Tasks are parts of the B K blocks; results are added to.
KINDS = ("value", "positions", "slopes", "changes")
#: What is kept of a tile in scratch memory, and the change of each.
KEPT = ("given", "taken", "score_given", "score_taken")


def num_scratch() -> int:
    """Vectors of scratch memory that a task needs."""
    return 2 * len(KEPT) * ROWS


def pairs_module(kind: str, itemsize: int) -> str:
    """LLVM's text of ``run(arguments, scratch, first, last)``."""
    return _Code(kind, itemsize).text


@dataclass
class _Eight:
    """A number for every atom of a tile and every lane, and its change where that is followed."""

    value: list[Value]
    change: list[Value] | None

    def __mul__(self, other: _Eight) -> _Eight:
        value = [a * b for a, b in zip(self.value, other.value)]
        if self.change is None or other.change is None:
            return _Eight(value, None)
        change = [
            a * b_change + a_change * b
            for a, a_change, b, b_change in zip(self.value, self.change, other.value, other.change)
        ]
        return _Eight(value, change)

    def __add__(self, other: _Eight) -> _Eight:
        value = [a + b for a, b in zip(self.value, other.value)]
        if self.change is None or other.change is None:
            return _Eight(value, None)
        return _Eight(value, [a + b for a, b in zip(self.change, other.change)])


class _Code(Tiles):
    """In a tile, i is one of eight atoms, l an atom in a lane. Terms of T with (i, l) are "given" by i to l and those
    with (l, i) "taken"."""

    def __init__(self, kind: str, itemsize: int) -> None:
        super().__init__(ARGUMENTS, itemsize)
        self.kind, self.zero = kind, self.value(0.0)
        self.follow = kind == "changes"
        with self.loop(self.first, self.last) as task:
            self.lane_block = task.index
            first = self.times(self.b.sdiv(task.index, self.given["num_blocks"]), self.given["num_blocks"])
            # every ordered pair is met once, and only atoms in lanes collect: half of the work could be saved by
            # symmetry, but then threads would add to each other's atoms
            with self.loop(0, self.given["num_tiles"]) as loop:
                atom = self.times(loop.index, ROWS)
                self.tile_block = self.plus(first, self.b.sdiv(atom, self.integer(self.width)))
                self.tile_lane = self.b.srem(atom, self.integer(self.width))
                self._tile()
        self.text = self.finish()

    # ---------------------------------------------------------------------------------------------------------- arrays

    def _num_rows(self, name: str) -> Any:
        if name == "waves":
            return self.given["num_waves"]
        if name in ("queries", "keys"):
            return self.times(self.given["num_pairs"], self.given["width"])
        return self.given["num_values"]

    def _lane(self, array: str, name: str, row: Any) -> Any:
        """Address of a row of an array that is shaped like ``name``, for the lanes."""
        return self.vector_address(self.given[array], self.plus(self.times(self.lane_block, self._num_rows(name)), row))

    def _eight(self, array: str, name: str, row: Any) -> list[Value]:
        """The same row's numbers of the tile's atoms."""
        place = self.plus(self.times(self.tile_block, self._num_rows(name)), row)
        base = self.number_address(self.vector_address(self.given[array], place), self.tile_lane)
        return [self.broadcast(base, atom) for atom in range(ROWS)]

    def _changes(self, name: str) -> str | None:
        return f"{name}_change" if self.follow and name != "gradient" else None

    def _keep(self, name: str, eight: _Eight) -> None:
        place = 2 * ROWS * KEPT.index(name)
        for number, value in enumerate(eight.value + (eight.change or [])):
            self.put(value, self.scratch, place + number)

    def _kept(self, name: str) -> _Eight:
        place = 2 * ROWS * KEPT.index(name)
        kept = [self.vector_at(self.scratch, place + number) for number in range(ROWS * (1 + self.follow))]
        return _Eight(kept[:ROWS], kept[ROWS:] if self.follow else None)

    # ----------------------------------------------------------------------------------------------------------- sums

    def _product(self, in_tile: str, in_lanes: str, first: Any, count: Any) -> _Eight:
        """``sum_row x_i y_l`` of two arrays."""
        with self.loop(0, count, *[self.zero] * (ROWS * (1 + self.follow))) as loop:
            row = self.plus(first, loop.index)
            x, y = self._eight(in_tile, in_tile, row), self.vector_at(self._lane(in_lanes, in_lanes, row))
            totals = [total + a * y for total, a in zip(loop.totals, x)]
            if self.follow:
                changes = loop.totals[ROWS:]
                if name := self._changes(in_lanes):
                    y_change = self.vector_at(self._lane(name, in_lanes, row))
                    changes = [total + a * y_change for total, a in zip(changes, x)]
                if name := self._changes(in_tile):
                    changes = [total + a * y for total, a in zip(changes, self._eight(name, in_tile, row))]
                totals += changes
            loop.totals = totals
        return _Eight(loop.totals[:ROWS], loop.totals[ROWS:] if self.follow else None)

    def _spread(self, to: str, factors: _Eight, in_tile: str, first: Any, count: Any) -> None:
        """Add ``sum_i factor_il x_i`` (or its change) to the rows of a result."""
        with self.loop(0, count) as loop:
            row = self.plus(first, loop.index)
            x = self._eight(in_tile, in_tile, row)
            products = [a * b for a, b in zip(factors.change or factors.value, x)]
            if name := self._changes(in_tile):
                products += [a * b for a, b in zip(factors.value, self._eight(name, in_tile, row))]
            # in pairs: three additions wait for each other, not seven
            while len(products) > 1:
                products = [a + b for a, b in zip(products[::2], products[1::2])]
            self.add_to(products[0], self._lane(f"by_{to}", to, row))

    # ----------------------------------------------------------------------------------------------------------- tiles

    def _tile(self) -> None:
        """One tile: first the products of values, then frequency by frequency, then what needs the scores."""
        values = self.given["num_values"]
        self.nothing = _Eight([self.zero] * ROWS, [self.zero] * ROWS if self.follow else None)
        if self.kind == "value":
            self._attend()
            return
        self._keep("given", self._product("gradient", "values", 0, values))
        self._keep("taken", self._product("values", "gradient", 0, values))
        scores = [name for name, kinds in (("score_given", ("slopes", "changes")), ("score_taken", ("changes",)))
                  if self.kind in kinds]  # fmt: skip
        for name in scores:
            self._keep(name, self.nothing)
        with self.loop(0, self.given["num_pairs"]) as loop:
            self._frequency(loop.index, scores)
        if "score_given" in scores:
            self._spread("values", self._kept("score_given"), "gradient", 0, values)
        if "score_taken" in scores:
            self._spread("gradient", self._kept("score_taken"), "values", 0, values)

    def _extent(self, n: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """First row and number of rows of the waves and of the features of a frequency."""
        start = self.integer_at(self.given["starts"], n)
        end = self.integer_at(self.given["starts"], self.plus(n, 1))
        return (start, self.b.sub(end, start)), (self.times(n, self.given["width"]), self.given["width"])

    def _attend(self) -> None:
        with self.loop(0, self.given["num_pairs"], *self.nothing.value) as loop:
            waves, features = self._extent(loop.index)
            found = self._product("keys", "queries", *features) * self._product("waves", "waves", *waves)
            loop.totals = [total + score for total, score in zip(loop.totals, found.value)]
        self._spread("gradient", _Eight(loop.totals, None), "values", 0, self.given["num_values"])

    def _frequency(self, n: Any, scores: list[str]) -> None:
        waves, features = self._extent(n)
        by_score = {
            "given": self._product("queries", "keys", *features),
            "taken": self._product("keys", "queries", *features),
        }
        # the waves' factor of a score is symmetric: l's are in the scores that it asks and in those that it answers
        by_waves = by_score["given"] * self._kept("given") + by_score["taken"] * self._kept("taken")
        self._spread("waves", by_waves, "waves", *waves)
        if self.kind == "positions":
            return
        wave = self._product("waves", "waves", *waves)
        for name in scores:
            self._keep(name, self._kept(name) + wave * by_score[name.removeprefix("score_")])
        self._spread("queries", wave * self._kept("taken"), "keys", *features)
        self._spread("keys", wave * self._kept("given"), "queries", *features)


# ---------------------------------------------------------------------------------------------- as functions of PyTorch


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
        # features without gradients (a first layer's) leave only the positions: one sum in place of four
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
    run_kernel(function, ARGUMENTS, numbers, num_scratch(), batch * blocks, work)
    return list(results.values())
