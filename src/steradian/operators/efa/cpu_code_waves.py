"""Machine code of the waves of Euclidean fast attention, combined into fewer functions, and of their derivatives.

For a frequency ω, row ρ is ``t_ρ = sum_m M_ρm cos(ω u_m . x)``, and with sines for the rows behind the first ones; see
:mod:`steradian.operators.efa.basis`. W atoms are a block, one in each lane: positions ``[G, 3, W]``, waves
``[G, R, W]``, G even.
"""

from __future__ import annotations

from typing import Any

from steradian.compiler.lanes import Value
from steradian.compiler.tiles import Tiles

__all__ = ["ARGUMENTS", "KINDS", "num_scratch", "waves_module"]

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
TILE = 4


def num_scratch(num_directions: int) -> int:
    """Vectors of scratch memory that a task needs."""
    return 12 * num_directions


def waves_module(kind: str, itemsize: int) -> str:
    """LLVM's text of ``run(arguments, scratch, first, last)``."""
    return _Kernel(kind, itemsize).text


class _Kernel:
    """Scratch memory holds vectors for every direction, of the two blocks side by side."""

    def __init__(self, kind: str, itemsize: int) -> None:
        self.tiles = tiles = Tiles(ARGUMENTS, itemsize)
        self.given, self.zero = tiles.given, tiles.value(0.0)
        step = tiles.times(self.given["num_directions"], 128)
        self.projections, self.cosines, self.sines, self.by_cosines, self.by_sines, self.by_projections = (
            tiles.plus(tiles.scratch, tiles.times(step, number)) for number in range(6)
        )
        with tiles.loop(tiles.first, tiles.last) as task:
            self.block = tiles.times(task.index, 2)
            self._project()
            if kind == "value":
                self._value()
            else:
                self._slope()
        self.text = tiles.finish()

    def _position(self, address: Any, half: int) -> Any:
        return self.tiles.vector_address(address, self.tiles.times(self.tiles.plus(self.block, half), 3))

    def _direction(self, m: Any) -> list[Value]:
        tiles = self.tiles
        return [tiles.broadcast(self.given["directions"], tiles.plus(tiles.times(m, 3), axis)) for axis in range(3)]

    def _project(self) -> None:
        """Positions along the directions."""
        tiles = self.tiles
        places = [self._position(self.given["positions"], half) for half in range(2)]
        x = [[tiles.vector_at(place, axis) for axis in range(3)] for place in places]
        with tiles.loop(0, self.given["num_directions"]) as loop:
            u = self._direction(loop.index)
            for half in range(2):
                along = x[half][0] * u[0] + x[half][1] * u[1] + x[half][2] * u[2]
                tiles.put(along, self.projections, tiles.plus(tiles.times(loop.index, 2), half))

    def _turn(self, frequency: Value) -> None:
        """Cosines and sines along all directions."""
        tiles = self.tiles
        with tiles.loop(0, tiles.times(self.given["num_directions"], 2)) as loop:
            cosine, sine = tiles.cos_sin(frequency * tiles.vector_at(self.projections, loop.index))
            tiles.put(cosine, self.cosines, loop.index)
            tiles.put(sine, self.sines, loop.index)

    def _group(self, n: Any, sines: int) -> tuple[Any, Any, Any]:
        """First row of a frequency's cosines or sines, the number of rows, and their matrix."""
        tiles = self.tiles
        number = tiles.plus(tiles.times(n, 2), sines)
        start = tiles.integer_at(self.given["starts"], number)
        end = tiles.integer_at(self.given["starts"], tiles.plus(number, 1))
        return start, tiles.b.sub(end, start), tiles.integer_at(self.given["matrices"], number)

    def _wave_place(self, half: int, row: Any) -> Any:
        tiles = self.tiles
        block = tiles.times(tiles.plus(self.block, half), self.given["num_waves"])
        return tiles.vector_address(self.given["waves"], tiles.plus(block, row))

    def _tiles_of(self, count: Any) -> Any:
        tiles = self.tiles
        return tiles.loop(0, tiles.b.sdiv(tiles.plus(count, TILE - 1), tiles.integer(TILE)))

    def _rows_of(self, tile: Any, count: Any) -> list[Any]:
        """Rows of a tile; the last one again where there are no more."""
        tiles = self.tiles
        last = tiles.b.sub(count, tiles.integer(1))
        return [tiles.smaller(tiles.plus(tiles.times(tile, TILE), row), last) for row in range(TILE)]

    def _dense_or_not(self, group: tuple[Any, Any, Any]) -> Any:
        return self.tiles.b.if_else(self.tiles.b.icmp_signed("!=", group[2], self.tiles.integer(0)))

    def _copy(self, array: Any, start: Any, to_waves: bool) -> None:
        """Between waves and cosines (or sines) where the matrix is diagonal."""
        tiles = self.tiles
        with tiles.loop(0, self.given["num_directions"]) as loop:
            root = tiles.broadcast(self.given["roots"], loop.index)
            for half in range(2):
                wave = self._wave_place(half, tiles.plus(start, loop.index))
                at = tiles.plus(tiles.times(loop.index, 2), half)
                if to_waves:
                    tiles.put(tiles.vector_at(array, at) * root, wave)
                else:
                    tiles.put(tiles.vector_at(wave) * root, array, at)

    # ----------------------------------------------------------------------------------------------------------- value

    def _value(self) -> None:
        tiles = self.tiles
        with tiles.loop(0, self.given["num_frequencies"]) as loop:
            self._turn(tiles.broadcast(self.given["frequencies"], loop.index))
            for sines, source in enumerate((self.cosines, self.sines)):
                group = self._group(loop.index, sines)
                with self._dense_or_not(group) as (dense, diagonal):
                    with dense:
                        self._combine(source, *group)
                    with diagonal:
                        self._copy(source, group[0], to_waves=True)

    def _combine(self, source: Any, start: Any, count: Any, matrix: Any) -> None:
        tiles, m = self.tiles, self.given["num_directions"]
        with self._tiles_of(count) as tile:
            rows = self._rows_of(tile.index, count)
            bases = [tiles.number_address(matrix, tiles.times(row, m)) for row in rows]
            totals = tiles.product(
                [self.zero] * (2 * TILE),
                m,
                lambda k: [tiles.broadcast(base, k) for base in bases],
                lambda k: [tiles.vector_at(source, tiles.plus(tiles.times(k, 2), half)) for half in range(2)],
            )
            for number, row in enumerate(rows):
                for half in range(2):
                    tiles.put(totals[2 * number + half], self._wave_place(half, tiles.plus(start, row)))

    # ----------------------------------------------------------------------------------------------------------- slope

    def _slope(self) -> None:
        tiles, m = self.tiles, self.given["num_directions"]
        with tiles.loop(0, tiles.times(m, 2)) as loop:
            tiles.put(self.zero, self.by_projections, loop.index)
        with tiles.loop(0, self.given["num_frequencies"]) as loop:
            frequency = tiles.broadcast(self.given["frequencies"], loop.index)
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
        tiles, m = self.tiles, self.given["num_directions"]
        with self._tiles_of(m) as tile:
            directions = self._rows_of(tile.index, m)
            waves = [self._wave_place(half, start) for half in range(2)]
            totals = tiles.product(
                [self.zero] * (2 * TILE),
                count,
                lambda k: [tiles.broadcast(matrix, tiles.plus(tiles.times(k, m), at)) for at in directions],
                lambda k: [tiles.vector_at(place, k) for place in waves],
            )
            for number, at in enumerate(directions):
                for half in range(2):
                    tiles.put(totals[2 * number + half], target, tiles.plus(tiles.times(at, 2), half))

    def _by_phases(self, frequency: Value, n: Any) -> None:
        """Collect derivatives by the projections and by a frequency."""
        tiles = self.tiles
        with tiles.loop(0, self.given["num_directions"], self.zero, self.zero) as loop:
            totals = []
            for half, total in enumerate(loop.totals):
                at = tiles.plus(tiles.times(loop.index, 2), half)
                cosine, sine, by_cosine, by_sine, along = (
                    tiles.vector_at(array, at)
                    for array in (self.cosines, self.sines, self.by_cosines, self.by_sines, self.projections)
                )
                slope = cosine * by_sine - sine * by_cosine
                tiles.add_to(frequency * slope, self.by_projections, at)
                totals.append(total + slope * along)
            loop.totals = totals
        wanted = tiles.b.icmp_signed("!=", self.given["by_frequencies"], tiles.integer(0))
        with tiles.b.if_then(wanted):
            for half, total in enumerate(loop.totals):
                block = tiles.times(tiles.plus(self.block, half), self.given["num_frequencies"])
                tiles.put(total, self.given["by_frequencies"], tiles.plus(block, n))

    def _to_positions(self) -> None:
        tiles = self.tiles
        with tiles.loop(0, self.given["num_directions"], *[self.zero] * 6) as loop:
            u = self._direction(loop.index)
            slopes = [
                tiles.vector_at(self.by_projections, tiles.plus(tiles.times(loop.index, 2), half)) for half in range(2)
            ]
            loop.totals = [total + slopes[number // 3] * u[number % 3] for number, total in enumerate(loop.totals)]
        for number, total in enumerate(loop.totals):
            tiles.put(total, self._position(self.given["by_positions"], number // 3), number % 3)
