"""Euclidean fast attention by machine code: its waves with their derivatives, and the attention over isolated systems.

For a frequency ω, row ρ is ``t_ρ = sum_m M_ρm cos(ω u_m . x)``, and with sines for the rows behind the first ones; see
:mod:`steradian.operators.efa.rules`. W atoms are a block, one in each lane: positions ``[G, 3, W]``, waves
``[G, R, W]``, G even.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from steradian.compiler.lanes import Tiles, Value, lanes_of
from steradian.compiler.native import function_of
from steradian.operators.efa.cpu_pairs import PairShape, attend_pairs
from steradian.operators.efa.cpu_sums import CpuSums, aligned, run_kernel
from steradian.operators.efa.rules import DirectionRule, WaveRows, step_of_phase
from steradian.operators.efa.sums import apply_moments, moments

__all__ = [
    "CombinedWaves",
    "attend_isolated",
    "waves_module",
]

#: Names of the numbers and addresses that a call finds in its first argument.
ARGUMENTS = (
    "num_directions",  # m
    "num_frequencies",  # n
    "num_waves",  # R
    "directions",  # [m, 3]
    "frequencies",  # [n]
    "positions",  # [G, 3, W]
    "starts",  # [2 n + 1] int64: the first row of cosines and of sines for every frequency, and R
    "matrices",  # [2 n] addresses of the [rows, m]; 0 for the diagonal matrix of the roots
    "roots",  # [m]
    "waves",  # [G, R, W]: result, or cotangent
    "by_positions",  # [G, 3, W] result
    "by_frequencies",  # [G, n, W] result, 0 where not wanted
)
#: Tasks are parts of the G / 2 pairs of blocks.
KINDS = ("value", "slope")
#: Rows (of waves, or of directions) that are formed at a time, for two blocks of atoms.
# With two blocks eight sums, as many as multiply-adds are under way at a time.
TILE = 4


def num_scratch(num_directions: int) -> int:
    """Vectors of scratch memory that a task needs."""
    return 12 * num_directions


def waves_module(kind: str, itemsize: int) -> str:
    """LLVM's text of ``run(arguments, scratch, first, last)``."""
    return _Code(kind, itemsize).text


class _Code(Tiles):
    """Scratch memory holds vectors for every direction, of the two blocks side by side."""

    def __init__(self, kind: str, itemsize: int) -> None:
        super().__init__(ARGUMENTS, itemsize)
        self.zero = self.value(0.0)
        step = self.times(self.given["num_directions"], 128)
        self.projections, self.cosines, self.sines, self.by_cosines, self.by_sines, self.by_projections = (
            self.plus(self.scratch, self.times(step, number)) for number in range(6)
        )
        with self.loop(self.first, self.last) as task:
            self.block = self.times(task.index, 2)
            self._project()
            if kind == "value":
                self._value()
            else:
                self._slope()
        self.text = self.finish()

    def _position(self, address: Any, half: int) -> Any:
        return self.vector_address(address, self.times(self.plus(self.block, half), 3))

    def _direction(self, m: Any) -> list[Value]:
        return [self.broadcast(self.given["directions"], self.plus(self.times(m, 3), axis)) for axis in range(3)]

    def _project(self) -> None:
        """Positions along the directions."""
        places = [self._position(self.given["positions"], half) for half in range(2)]
        x = [[self.vector_at(place, axis) for axis in range(3)] for place in places]
        with self.loop(0, self.given["num_directions"]) as loop:
            u = self._direction(loop.index)
            for half in range(2):
                along = x[half][0] * u[0] + x[half][1] * u[1] + x[half][2] * u[2]
                self.put(along, self.projections, self.plus(self.times(loop.index, 2), half))

    def _turn(self, frequency: Value) -> None:
        """Cosines and sines along all directions."""
        # a sine costs some twenty multiply-adds: once per direction and frequency, for all rows that are made of it
        with self.loop(0, self.times(self.given["num_directions"], 2)) as loop:
            cosine, sine = self.cos_sin(frequency * self.vector_at(self.projections, loop.index))
            self.put(cosine, self.cosines, loop.index)
            self.put(sine, self.sines, loop.index)

    def _group(self, n: Any, sines: int) -> tuple[Any, Any, Any]:
        """First row of a frequency's cosines or sines, the number of rows, and their matrix."""
        number = self.plus(self.times(n, 2), sines)
        start = self.integer_at(self.given["starts"], number)
        end = self.integer_at(self.given["starts"], self.plus(number, 1))
        return start, self.b.sub(end, start), self.integer_at(self.given["matrices"], number)

    def _wave_place(self, half: int, row: Any) -> Any:
        block = self.times(self.plus(self.block, half), self.given["num_waves"])
        return self.vector_address(self.given["waves"], self.plus(block, row))

    def _tiles_of(self, count: Any) -> Any:
        return self.loop(0, self.b.sdiv(self.plus(count, TILE - 1), self.integer(TILE)))

    def _rows_of(self, tile: Any, count: Any) -> list[Any]:
        """Rows of a tile; the last one again where there are no more."""
        last = self.b.sub(count, self.integer(1))
        return [self.smaller(self.plus(self.times(tile, TILE), row), last) for row in range(TILE)]

    def _dense_or_not(self, group: tuple[Any, Any, Any]) -> Any:
        return self.b.if_else(self.b.icmp_signed("!=", group[2], self.integer(0)))

    def _copy(self, array: Any, start: Any, to_waves: bool) -> None:
        """Between waves and cosines (or sines) where the matrix is diagonal."""
        with self.loop(0, self.given["num_directions"]) as loop:
            # no combination saves a row at this size. A wave carries the root of its weight, as a product of two needs
            # the weight once
            root = self.broadcast(self.given["roots"], loop.index)
            for half in range(2):
                wave = self._wave_place(half, self.plus(start, loop.index))
                at = self.plus(self.times(loop.index, 2), half)
                if to_waves:
                    self.put(self.vector_at(array, at) * root, wave)
                else:
                    self.put(self.vector_at(wave) * root, array, at)

    # ----------------------------------------------------------------------------------------------------------- value

    def _value(self) -> None:
        with self.loop(0, self.given["num_frequencies"]) as loop:
            self._turn(self.broadcast(self.given["frequencies"], loop.index))
            for sines, source in enumerate((self.cosines, self.sines)):
                group = self._group(loop.index, sines)
                with self._dense_or_not(group) as (dense, diagonal):
                    with dense:
                        self._combine(source, *group)
                    with diagonal:
                        self._copy(source, group[0], to_waves=True)

    def _combine(self, source: Any, start: Any, count: Any, matrix: Any) -> None:
        m = self.given["num_directions"]
        with self._tiles_of(count) as tile:
            rows = self._rows_of(tile.index, count)
            bases = [self.number_address(matrix, self.times(row, m)) for row in rows]
            totals = self.product(
                [self.zero] * (2 * TILE),
                m,
                lambda k: [self.broadcast(base, k) for base in bases],
                lambda k: [self.vector_at(source, self.plus(self.times(k, 2), half)) for half in range(2)],
            )
            for number, row in enumerate(rows):
                for half in range(2):
                    self.put(totals[2 * number + half], self._wave_place(half, self.plus(start, row)))

    # ----------------------------------------------------------------------------------------------------------- slope

    def _slope(self) -> None:
        m = self.given["num_directions"]
        with self.loop(0, self.times(m, 2)) as loop:
            self.put(self.zero, self.by_projections, loop.index)
        with self.loop(0, self.given["num_frequencies"]) as loop:
            frequency = self.broadcast(self.given["frequencies"], loop.index)
            self._turn(frequency)
            for sines, target in enumerate((self.by_cosines, self.by_sines)):
                group = self._group(loop.index, sines)
                with self._dense_or_not(group) as (dense, diagonal):
                    with dense:
                        self._uncombine(target, *group)
                    with diagonal:
                        self._copy(target, group[0], to_waves=False)
            self._by_phases(frequency, loop.index)
        self._to_positions()

    def _uncombine(self, target: Any, start: Any, count: Any, matrix: Any) -> None:
        """Derivatives by the cosines (or sines) of a frequency."""
        m = self.given["num_directions"]
        with self._tiles_of(m) as tile:
            directions = self._rows_of(tile.index, m)
            waves = [self._wave_place(half, start) for half in range(2)]
            totals = self.product(
                [self.zero] * (2 * TILE),
                count,
                lambda k: [self.broadcast(matrix, self.plus(self.times(k, m), at)) for at in directions],
                lambda k: [self.vector_at(place, k) for place in waves],
            )
            for number, at in enumerate(directions):
                for half in range(2):
                    self.put(totals[2 * number + half], target, self.plus(self.times(at, 2), half))

    def _by_phases(self, frequency: Value, n: Any) -> None:
        """Collect derivatives by the projections and by a frequency."""
        with self.loop(0, self.given["num_directions"], self.zero, self.zero) as loop:
            totals = []
            for half, total in enumerate(loop.totals):
                at = self.plus(self.times(loop.index, 2), half)
                cosine, sine, by_cosine, by_sine, along = (
                    self.vector_at(array, at)
                    for array in (self.cosines, self.sines, self.by_cosines, self.by_sines, self.projections)
                )
                # the phase is frequency times projection: both get its slope, each times the other
                slope = cosine * by_sine - sine * by_cosine
                self.add_to(frequency * slope, self.by_projections, at)
                totals.append(total + slope * along)
            loop.totals = totals
        wanted = self.b.icmp_signed("!=", self.given["by_frequencies"], self.integer(0))
        with self.b.if_then(wanted):
            for half, total in enumerate(loop.totals):
                block = self.times(self.plus(self.block, half), self.given["num_frequencies"])
                self.put(total, self.given["by_frequencies"], self.plus(block, n))

    def _to_positions(self) -> None:
        with self.loop(0, self.given["num_directions"], *[self.zero] * 6) as loop:
            u = self._direction(loop.index)
            slopes = [
                self.vector_at(self.by_projections, self.plus(self.times(loop.index, 2), half)) for half in range(2)
            ]
            loop.totals = [total + slopes[number // 3] * u[number % 3] for number, total in enumerate(loop.totals)]
        for number, total in enumerate(loop.totals):
            self.put(total, self._position(self.given["by_positions"], number // 3), number % 3)


# ---------------------------------------------------------------------------------------------- as functions of PyTorch


class CombinedWaves(torch.autograd.Function):
    """``[G, R, W]`` waves at ``[G, 3, W]``; where a second derivative is wanted the first one is plain PyTorch."""

    @staticmethod
    def forward(ctx: Any, positions: Tensor, frequencies: Tensor, rows: WaveRows) -> Tensor:  # type: ignore[override]
        ctx.rows = rows
        ctx.save_for_backward(positions, frequencies)
        waves = positions.new_empty((positions.shape[0], rows.padded, positions.shape[2]))
        waves[:, rows.starts[-1] :] = 0.0
        _run("value", rows, positions, frequencies, waves)
        return waves

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        positions, frequencies = ctx.saved_tensors
        rows, wanted = ctx.rows, ctx.needs_input_grad
        if torch.is_grad_enabled():
            inputs = [tensor.view_as(tensor) for tensor in (positions, frequencies)]
            asked = [tensor for tensor, ask in zip(inputs, wanted) if ask]
            found = iter(torch.autograd.grad(rows.waves(*inputs), asked, gradient, create_graph=True))
            return next(found) if wanted[0] else None, next(found) if wanted[1] else None, None
        by_positions = torch.empty_like(positions)
        count = len(frequencies) if wanted[1] else 0
        by_frequencies = positions.new_empty((positions.shape[0], count, positions.shape[2]))
        _run("slope", rows, positions, frequencies, aligned(gradient), by_positions, by_frequencies)
        return by_positions if wanted[0] else None, by_frequencies.sum((0, 2)) if wanted[1] else None, None


@cache
def _function(kind: str, itemsize: int) -> Callable:
    return function_of(f"waves of attention, {kind}", waves_module, (kind, itemsize), 4)


def _run(
    kind: str,
    rows: WaveRows,
    positions: Tensor,
    frequencies: Tensor,
    waves: Tensor,
    by_positions: Tensor | None = None,
    by_frequencies: Tensor | None = None,
) -> None:
    num_directions, blocks = len(rows.roots), positions.shape[0]
    starts = np.array(rows.starts, dtype=np.int64)
    # a matrix without rows has no address; 0 means the diagonal one
    matrices = np.array([0 if matrix is None else matrix.data_ptr() or -1 for matrix in rows.matrices], dtype=np.int64)
    frequencies = frequencies.detach().contiguous()
    directions, positions = rows.directions.contiguous(), aligned(positions)
    numbers = {
        "num_directions": num_directions, "num_frequencies": len(frequencies), "num_waves": rows.padded,
        "directions": directions.data_ptr(), "frequencies": frequencies.data_ptr(),
        "positions": positions.data_ptr(), "starts": starts.ctypes.data, "matrices": matrices.ctypes.data,
        "roots": rows.roots.data_ptr(), "waves": waves.data_ptr(),
    }  # fmt: skip
    if by_positions is not None:
        numbers["by_positions"] = by_positions.data_ptr()
    if by_frequencies is not None and by_frequencies.numel():
        numbers["by_frequencies"] = by_frequencies.data_ptr()
    work = positions.numel() // 3 * num_directions * (rows.padded + 20 * len(frequencies))
    function = _function(kind, positions.element_size())
    run_kernel(function, ARGUMENTS, numbers, num_scratch(num_directions), blocks // 2, work)


# ------------------------------------------------------------------------------------- attention over isolated systems


PAIRS_ARE_SLOWER = 0.9
"""Measured: speed of multiply-adds pair by pair over that of the sums."""
BYTES_OF_WAVES = 1 << 29
"""Waves of so many bytes are summed at a time, and so many derivatives by them exist at a time."""


def attend_isolated(
    queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, frequencies: Tensor, rule: DirectionRule
) -> Tensor:
    """Attention ``[B, N, e]`` in B systems of N atoms.

    Args:
        queries, keys: ``[B, N, D, F]``, F even, queries scaled; zero where there is no atom.
        values: ``[B, N, e]``, zero where there is no atom.
        positions: ``[B, N, 3]`` about the centre of each system [Å].
        frequencies: ``[F / 2]`` [1/Å].
        rule: directions and their weights, none of them negative.
    """
    batch, num_atoms, num_values = values.shape
    frequencies = frequencies.to(values)
    lanes = lanes_of(values.element_size())
    # kernels take two blocks of atoms at a time
    padding = -num_atoms % (2 * lanes)
    x = _blocks(positions, padding, lanes).flatten(0, 1).contiguous()
    q, k = (_blocks_of_pairs(features, padding, lanes) for features in (queries, keys))
    assert rule.waves is not None, "a rule with negative weights has no roots of them"
    steps = _steps(positions, frequencies)
    rows, width = rule.waves.rows(steps), 2 * queries.shape[2]
    if pairs_are_cheaper(num_atoms, rows.starts[-1], len(frequencies) * width, width, num_values):
        waves = CombinedWaves.apply(x, frequencies, rows).unflatten(0, (batch, -1))
        # every other start: sines follow their cosines, and a score's cos(a - b) is cos a cos b + sin a sin b
        by_pairs = attend_pairs(waves, q, k, _blocks(values, padding, lanes), PairShape(rows.starts[::2], num_atoms))
        return by_pairs.transpose(2, 3).flatten(1, 2)[:, :num_atoms]
    v = _panels(values, padding, lanes)
    out: Tensor | None = None
    for group in _groups(x, rows):
        rows, own = rule.waves.rows(steps[group]), slice(group.start * width, group.stop * width)
        waves = CombinedWaves.apply(x, frequencies[group], rows).unflatten(0, (batch, -1))
        way = _sums(rows.starts, rows.padded, width)
        part = apply_moments(moments(waves, k[:, :, own], v, way=way), waves, q[:, :, own], way=way)
        out = part if out is None else out + part
    assert out is not None
    return out.transpose(1, 2).flatten(2)[:, :num_atoms, :num_values]


def _groups(positions: Tensor, rows: WaveRows) -> list[slice]:
    """Neighbouring frequencies whose waves (and their derivatives) exist at a time."""
    count = len(rows.starts) // 2
    size = positions.numel() // 3 * rows.padded * positions.element_size()
    number = min(count, -(-size // BYTES_OF_WAVES))
    cuts = [count * part // number for part in range(number + 1)]
    return [slice(first, last) for first, last in pairwise(cuts)]


def pairs_are_cheaper(num_atoms: int, num_rows: int, num_features: int, width: int, num_values: int) -> bool:
    """Whether all pairs are less work than the sums.

    Args:
        num_atoms: N of a system.
        num_rows: R of the waves.
        num_features: n a of queries and keys.
        width: a.
        num_values: e.
    """
    return num_atoms * (num_rows + num_features + num_values) < PAIRS_ARE_SLOWER * 2 * num_rows * width * num_values


def _padded(values: Tensor, by: tuple[int, ...]) -> Tensor:
    return pad(values, by) if any(by) else values


def _blocks(values: Tensor, padding: int, lanes: int) -> Tensor:
    """``[B, N, e]`` to ``[B, K, e, W]``."""
    return _padded(values, (0, 0, 0, padding)).unflatten(1, (-1, lanes)).transpose(2, 3)


def _blocks_of_pairs(features: Tensor, padding: int, lanes: int) -> Tensor:
    """``[B, N, D, F]`` to ``[B, K, F D, W]``, rows ordered by the channels' pair, channel and component."""
    features = _padded(features, (0, 0, 0, 0, 0, padding))
    blocks = features.unflatten(3, (-1, 2)).unflatten(1, (-1, lanes))  # [B, K, W, D, n, 2]
    return blocks.permute(0, 1, 4, 5, 3, 2).reshape(*blocks.shape[:2], -1, lanes)


def _panels(values: Tensor, padding: int, lanes: int) -> Tensor:
    """``[B, N, e]`` to ``[B, C, K W, P]``."""
    vectors = -(-values.shape[2] // lanes)
    width = lanes * (2 if vectors % 2 == 0 else 1)
    values = _padded(values, (0, vectors * lanes - values.shape[2], 0, padding))
    return values.unflatten(2, (-1, width)).transpose(1, 2).contiguous()


def _steps(positions: Tensor, frequencies: Tensor) -> tuple[int | None, ...]:
    """Sizes that the basis has to be made for, one per frequency."""
    radius = float(positions.detach().square().sum(-1).max()) ** 0.5 if positions.numel() else 0.0
    sizes = [abs(frequency) * radius for frequency in frequencies.detach().tolist()]
    if frequencies.requires_grad:  # a frequency of zero has a curvature
        sizes = [max(size, 1e-30) for size in sizes]
    return tuple(step_of_phase(size) for size in sizes)


@lru_cache(maxsize=256)
def _sums(starts: tuple[int, ...], padded: int, width: int) -> CpuSums:
    """Sums over rows of waves (two groups per frequency, :class:`WaveRows`) times features of their frequency; rows of
    zeros meet those of the first."""
    pairs = [group // 2 for group, (first, last) in enumerate(pairwise(starts)) for _ in range(first, last)]
    pair = torch.tensor(pairs + [0] * (padded - len(pairs)), dtype=torch.int64)
    wave_of = torch.arange(padded).repeat_interleave(width)
    feature_of = (pair.unsqueeze(1) * width + torch.arange(width)).flatten()
    return CpuSums(wave_of, feature_of, width % 8 == 0)
