"""Machine code of Euclidean fast attention pair by pair, with two derivatives.

Everything is in one function,

.. math:: T = \\sum_{ij} \\sum_n \\Big(\\sum_{ρ \\in n} t_{iρ} t_{jρ}\\Big) \\Big(\\sum_a q_{i,na} k_{j,na}\\Big)
              \\Big(\\sum_e g_{ie} v_{je}\\Big) ,

whose derivative by g is the attention, and whose others are those of ``sum(g y)``. A second derivative is wanted along
a direction only, so it is the derivative of these derivatives along that direction: every number is accompanied by its
change. Eight atoms at a time meet the atoms of one block, which lie in the lanes; no score leaves the registers and the
first-level cache. Arrays as in :mod:`steradian.operators.efa.cpu_code_sums`: ``[B, K, rows, W]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steradian.compiler.lanes import Value
from steradian.compiler.tiles import ROWS, Tiles

__all__ = ["ARGUMENTS", "KINDS", "num_scratch", "pairs_module"]

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
    return _Kernel(kind, itemsize).text


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


class _Kernel:
    """In a tile, i is one of eight atoms, l an atom in a lane. Terms of T with (i, l) are "given" by i to l and those
    with (l, i) "taken"."""

    def __init__(self, kind: str, itemsize: int) -> None:
        self.tiles = tiles = Tiles(ARGUMENTS, itemsize)
        self.given, self.kind, self.zero = tiles.given, kind, tiles.value(0.0)
        self.follow = kind == "changes"
        with tiles.loop(tiles.first, tiles.last) as task:
            self.lane_block = task.index
            first = tiles.times(tiles.b.sdiv(task.index, self.given["num_blocks"]), self.given["num_blocks"])
            with tiles.loop(0, self.given["num_tiles"]) as loop:
                atom = tiles.times(loop.index, ROWS)
                self.tile_block = tiles.plus(first, tiles.b.sdiv(atom, tiles.integer(tiles.width)))
                self.tile_lane = tiles.b.srem(atom, tiles.integer(tiles.width))
                self._tile()
        self.text = tiles.finish()

    # ---------------------------------------------------------------------------------------------------------- arrays

    def _num_rows(self, name: str) -> Any:
        if name == "waves":
            return self.given["num_waves"]
        if name in ("queries", "keys"):
            return self.tiles.times(self.given["num_pairs"], self.given["width"])
        return self.given["num_values"]

    def _lane(self, array: str, name: str, row: Any) -> Any:
        """Address of a row of an array that is shaped like ``name``, for the lanes."""
        tiles = self.tiles
        return tiles.vector_address(
            self.given[array], tiles.plus(tiles.times(self.lane_block, self._num_rows(name)), row)
        )

    def _eight(self, array: str, name: str, row: Any) -> list[Value]:
        """The same row's numbers of the tile's atoms."""
        tiles = self.tiles
        place = tiles.plus(tiles.times(self.tile_block, self._num_rows(name)), row)
        base = tiles.number_address(tiles.vector_address(self.given[array], place), self.tile_lane)
        return [tiles.broadcast(base, atom) for atom in range(ROWS)]

    def _changes(self, name: str) -> str | None:
        return f"{name}_change" if self.follow and name != "gradient" else None

    def _keep(self, name: str, eight: _Eight) -> None:
        tiles, place = self.tiles, 2 * ROWS * KEPT.index(name)
        for number, value in enumerate(eight.value + (eight.change or [])):
            tiles.put(value, tiles.scratch, place + number)

    def _kept(self, name: str) -> _Eight:
        place = 2 * ROWS * KEPT.index(name)
        kept = [self.tiles.vector_at(self.tiles.scratch, place + number) for number in range(ROWS * (1 + self.follow))]
        return _Eight(kept[:ROWS], kept[ROWS:] if self.follow else None)

    # ----------------------------------------------------------------------------------------------------------- sums

    def _product(self, in_tile: str, in_lanes: str, first: Any, count: Any) -> _Eight:
        """``sum_row x_i y_l`` of two arrays."""
        tiles = self.tiles
        with tiles.loop(0, count, *[self.zero] * (ROWS * (1 + self.follow))) as loop:
            row = tiles.plus(first, loop.index)
            x, y = self._eight(in_tile, in_tile, row), tiles.vector_at(self._lane(in_lanes, in_lanes, row))
            totals = [total + a * y for total, a in zip(loop.totals, x)]
            if self.follow:
                changes = loop.totals[ROWS:]
                if name := self._changes(in_lanes):
                    y_change = tiles.vector_at(self._lane(name, in_lanes, row))
                    changes = [total + a * y_change for total, a in zip(changes, x)]
                if name := self._changes(in_tile):
                    changes = [total + a * y for total, a in zip(changes, self._eight(name, in_tile, row))]
                totals += changes
            loop.totals = totals
        return _Eight(loop.totals[:ROWS], loop.totals[ROWS:] if self.follow else None)

    def _spread(self, to: str, factors: _Eight, in_tile: str, first: Any, count: Any) -> None:
        """Add ``sum_i factor_il x_i`` (or its change) to the rows of a result."""
        tiles = self.tiles
        with tiles.loop(0, count) as loop:
            row = tiles.plus(first, loop.index)
            x = self._eight(in_tile, in_tile, row)
            products = [a * b for a, b in zip(factors.change or factors.value, x)]
            if name := self._changes(in_tile):
                products += [a * b for a, b in zip(factors.value, self._eight(name, in_tile, row))]
            while len(products) > 1:
                products = [a + b for a, b in zip(products[::2], products[1::2])]
            tiles.add_to(products[0], self._lane(f"by_{to}", to, row))

    # ----------------------------------------------------------------------------------------------------------- tiles

    def _tile(self) -> None:
        """One tile: first the products of values, then frequency by frequency, then what needs the scores."""
        tiles, values = self.tiles, self.given["num_values"]
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
        with tiles.loop(0, self.given["num_pairs"]) as loop:
            self._frequency(loop.index, scores)
        if "score_given" in scores:
            self._spread("values", self._kept("score_given"), "gradient", 0, values)
        if "score_taken" in scores:
            self._spread("gradient", self._kept("score_taken"), "values", 0, values)

    def _extent(self, n: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """First row and number of rows of the waves and of the features of a frequency."""
        tiles = self.tiles
        start = tiles.integer_at(self.given["starts"], n)
        end = tiles.integer_at(self.given["starts"], tiles.plus(n, 1))
        return (start, tiles.b.sub(end, start)), (tiles.times(n, self.given["width"]), self.given["width"])

    def _attend(self) -> None:
        tiles = self.tiles
        with tiles.loop(0, self.given["num_pairs"], *self.nothing.value) as loop:
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
        by_waves = by_score["given"] * self._kept("given") + by_score["taken"] * self._kept("taken")
        self._spread("waves", by_waves, "waves", *waves)
        if self.kind == "positions":
            return
        wave = self._product("waves", "waves", *waves)
        for name in scores:
            self._keep(name, self._kept(name) + wave * by_score[name.removeprefix("score_")])
        self._spread("queries", wave * self._kept("taken"), "keys", *features)
        self._spread("keys", wave * self._kept("given"), "queries", *features)
