"""Machine code of the sums of Euclidean fast attention: moments, their application, and the contraction of both.

.. math:: T = \\sum_i \\sum_{ρ a e} t_{iρ} \\, x_{i, n(ρ) a} \\, S_{ρa,e} \\, y_{i,e} ,

see :mod:`steradian.operators.efa.sums`. The product ``z = t x`` is formed for one small block at a time, in the
first-level cache, right before a product of matrices reads it. Sixteen (float64: eight) atoms are a block:
``t [B, K, R, W]``, ``x [B, K, X, W]``, ``y [B, C, K W, P]``, ``S [B, C, J, P]`` with W lanes, columns e in C panels of
P = W or 2 W, K even, and J = R a rows, a multiple of eight. Row j multiplies row ``wave_of[j]`` of t and row
``feature_of[j]`` of x. The product z may be a sum over several (t, x).
"""

from __future__ import annotations

from typing import Any

from steradian.compiler.lanes import Value
from steradian.compiler.tiles import ROWS, Tiles

__all__ = ["ARGUMENTS", "KINDS", "num_scratch", "sums_module"]

#: Names of the numbers and addresses that a call finds in its first argument.
ARGUMENTS = (
    "num_blocks",  # K
    "num_waves",  # R
    "num_features",  # X
    "num_panels",  # C
    "num_tiles",  # J / 8
    "wave_of",  # [J] int64
    "feature_of",  # [J] int64
    "num_pairs",
    "waves",  # addresses of the t
    "features",  # addresses of the x
    "values",  # y
    "sums",  # S
    "by_waves",  # addresses of dT/dt, 0 where not wanted
    "by_features",  # addresses of dT/dx, 0 where not wanted
)
#: moments: S = sum_i t x y; tasks are parts of the B J / 8 tiles.
#: apply: y = sum t x S; tasks are parts of the B K blocks.
#: contract: dT/dt and dT/dx are added to; tasks are parts of the B K / 2 pairs of blocks.
KINDS = ("moments", "apply", "contract")
BLOCKS = 16
"""Blocks of atoms whose z is formed at a time for the moments; their values stay in the second-level cache."""
DEPTH = 128
"""Rows whose z is formed at a time for the application; so much of S stays in the first-level cache."""


def num_scratch(num_columns: int) -> int:
    """Vectors of scratch memory that a task needs."""
    return max(ROWS * BLOCKS, DEPTH, 2 * num_columns)


def sums_module(kind: str, itemsize: int, columns: int, whole: bool, single: bool) -> str:
    """LLVM's text of ``run(arguments, scratch, first, last)``.

    Args:
        kind: one of KINDS.
        itemsize: 4 or 8.
        columns: vectors in a panel, P / W.
        whole: the rows of every tile have one wave, and features next to each other.
        single: there is one (t, x).
    """
    return _Kernel(kind, itemsize, columns, whole, single).text


class _Kernel:
    def __init__(self, kind: str, itemsize: int, columns: int, whole: bool, single: bool) -> None:
        self.tiles = Tiles(ARGUMENTS, itemsize)
        self.given, self.columns = self.tiles.given, columns
        self.whole, self.single = whole, single
        self.zero = self.tiles.value(0.0)
        {"moments": self._moments, "apply": self._apply, "contract": self._contract}[kind]()
        self.text = self.tiles.finish()

    # ---------------------------------------------------------------------------------------------------- parts of all

    def _rows(self, tile: Any) -> list[tuple[Any, Any]]:
        """Rows of t and x of the rows of a tile."""
        tiles, given = self.tiles, self.given
        rows = [tiles.plus(tiles.times(tile, ROWS), row) for row in range(ROWS)]
        if self.whole:
            wave, feature = (tiles.integer_at(given[name], rows[0]) for name in ("wave_of", "feature_of"))
            return [(wave, tiles.plus(feature, row)) for row in range(ROWS)]
        return [(tiles.integer_at(given["wave_of"], row), tiles.integer_at(given["feature_of"], row)) for row in rows]

    def _block_of(self, address: Any, block: Any, rows: str) -> Any:
        return self.tiles.vector_address(address, self.tiles.times(block, self.given[rows]))

    def _products(self, block: Any, rows: list[tuple[Any, Any]]) -> list[Value]:
        """z of a block of atoms, for some rows."""
        tiles, given = self.tiles, self.given

        def of_pair(pair: Any) -> list[Value]:
            t = self._block_of(tiles.integer_at(given["waves"], pair), block, "num_waves")
            x = self._block_of(tiles.integer_at(given["features"], pair), block, "num_features")
            if self.whole:
                tiles.prefetch(tiles.vector_address(t, tiles.plus(rows[0][0], 1)), 1)  # the next tile's wave
            return [tiles.vector_at(t, wave) * tiles.vector_at(x, feature) for wave, feature in rows]

        if self.single:
            return of_pair(0)
        with tiles.loop(0, given["num_pairs"], *[self.zero] * len(rows)) as pairs:
            pairs.totals = [total + z for total, z in zip(pairs.totals, of_pair(pairs.index))]
        return pairs.totals

    def _multiply(self, chunk: Any, place: Any, count: Any, numbers: Any, right: Any) -> None:
        """Add to a tile ``numbers(k)`` times vectors ``right + k``: sums of sums, so that rounding stays small. The
        first chunk finds anything in memory and does not use it."""
        tiles, at = self.tiles, range(ROWS * self.columns)
        tiles.prefetch(place, len(at))
        totals = tiles.product([self.zero for _ in at], count, numbers, lambda k: self._panel_row(right, k))
        first = tiles.b.icmp_signed("==", chunk, tiles.integer(0))
        for index, total in zip(at, totals):
            before = tiles.vector_at(place, index)
            tiles.put(total + self.zero.where(first, before), place, index)

    def _panel_row(self, base: Any, row: Any) -> list[Value]:
        place = self._panel_place(base, row)
        return [self.tiles.vector_at(place, column) for column in range(self.columns)]

    def _panel_place(self, base: Any, row: Any) -> Any:
        return self.tiles.vector_address(base, self.tiles.times(row, self.columns))

    def _panel(self, name: str, system: Any, panel: Any) -> Any:
        """Where a panel of y or S begins."""
        tiles, given = self.tiles, self.given
        rows = (
            tiles.times(given["num_blocks"], tiles.width) if name == "values" else tiles.times(given["num_tiles"], ROWS)
        )
        number = tiles.plus(tiles.times(system, given["num_panels"]), panel)
        return self._panel_place(given[name], tiles.times(number, rows))

    # ----------------------------------------------------------------------------------------------------------- kinds

    def _moments(self) -> None:
        tiles, given, b = self.tiles, self.given, self.tiles.b
        chunks = b.sdiv(tiles.plus(given["num_blocks"], BLOCKS - 1), tiles.integer(BLOCKS))
        with tiles.loop(0, chunks) as chunk:
            start = tiles.times(chunk.index, BLOCKS)
            count = tiles.smaller(BLOCKS, b.sub(given["num_blocks"], start))
            with tiles.loop(tiles.first, tiles.last) as task:
                system, tile = b.sdiv(task.index, given["num_tiles"]), b.srem(task.index, given["num_tiles"])
                first = tiles.plus(tiles.times(system, given["num_blocks"]), start)
                rows = self._rows(tile)
                with tiles.loop(0, count) as blocks:
                    for row, z in enumerate(self._products(tiles.plus(first, blocks.index), rows)):
                        tiles.put(z, tiles.scratch, tiles.plus(blocks.index, row * BLOCKS))
                with tiles.loop(0, given["num_panels"]) as panel:
                    values = self._panel_place(
                        self._panel("values", system, panel.index), tiles.times(start, tiles.width)
                    )
                    sums = self._panel_place(self._panel("sums", system, panel.index), tiles.times(tile, ROWS))
                    self._multiply(chunk.index, sums, tiles.times(count, tiles.width), self._of_rows, values)

    def _of_rows(self, atom: Any) -> list[Value]:
        """z of one atom, from rows of blocks."""
        step = 64 * BLOCKS
        return [self.tiles.broadcast(self.tiles.plus(self.tiles.scratch, step * row), atom) for row in range(ROWS)]

    def _apply(self) -> None:
        tiles, given, b = self.tiles, self.given, self.tiles.b
        depth = DEPTH // ROWS
        chunks = b.sdiv(tiles.plus(given["num_tiles"], depth - 1), tiles.integer(depth))
        with tiles.loop(0, chunks) as chunk:
            start = tiles.times(chunk.index, depth)
            count = tiles.smaller(depth, b.sub(given["num_tiles"], start))
            with tiles.loop(tiles.first, tiles.last) as task:
                with tiles.loop(0, count) as part:
                    rows = self._rows(tiles.plus(start, part.index))
                    for row, z in enumerate(self._products(task.index, rows)):
                        tiles.put(z, tiles.scratch, tiles.plus(tiles.times(part.index, ROWS), row))
                system, block = b.sdiv(task.index, given["num_blocks"]), b.srem(task.index, given["num_blocks"])
                with tiles.loop(0, given["num_panels"]) as panel:
                    sums = self._panel_place(self._panel("sums", system, panel.index), tiles.times(start, ROWS))
                    values = self._panel("values", system, panel.index)
                    for atoms in range(0, tiles.width, ROWS):

                        def numbers(row: Any, atoms: int = atoms) -> list[Value]:
                            place = tiles.vector_address(tiles.scratch, row)
                            return [tiles.broadcast(place, atoms + atom) for atom in range(ROWS)]

                        place = self._panel_place(values, tiles.plus(tiles.times(block, tiles.width), atoms))
                        self._multiply(chunk.index, place, tiles.times(count, ROWS), numbers, sums)

    def _contract(self) -> None:
        tiles, given, b = self.tiles, self.given, self.tiles.b
        length = tiles.width * self.columns
        with tiles.loop(tiles.first, tiles.last) as task:
            block = tiles.times(task.index, 2)
            system, place = b.sdiv(block, given["num_blocks"]), b.srem(block, given["num_blocks"])
            self._transpose(system, place, length)
            with tiles.loop(0, given["num_tiles"]) as loop:
                with tiles.loop(0, given["num_panels"], *[self.zero] * (2 * ROWS)) as panel:
                    sums = self._panel_place(self._panel("sums", system, panel.index), tiles.times(loop.index, ROWS))
                    right = tiles.vector_address(tiles.scratch, tiles.times(panel.index, 2 * length))
                    panel.totals = self._contract_panel(panel.totals, length, sums, right)
                self._distribute(block, self._rows(loop.index), [panel.totals[::2], panel.totals[1::2]])

    def _contract_panel(self, totals: list[Value], length: int, sums: Any, right: Any) -> list[Value]:
        tiles = self.tiles
        step = tiles.itemsize * length

        def numbers(column: Any) -> list[Value]:
            return [tiles.broadcast(tiles.plus(sums, step * row), column) for row in range(ROWS)]

        def vectors(column: Any) -> list[Value]:
            place = tiles.vector_address(right, tiles.times(column, 2))
            return [tiles.vector_at(place, half) for half in range(2)]

        return tiles.product(totals, length, numbers, vectors)

    def _transpose(self, system: Any, block: Any, length: int) -> None:
        """Values of two blocks of atoms into scratch memory, atoms in the lanes."""
        tiles, b, kind = self.tiles, self.tiles.b, self.tiles.whole_addresses
        step = tiles.itemsize * length
        with tiles.loop(0, self.given["num_panels"]) as panel:
            values = self._panel("values", system, panel.index)
            target = tiles.vector_address(tiles.scratch, tiles.times(panel.index, 2 * length))
            for half in range(2):
                base = tiles.plus(values, tiles.times(tiles.plus(block, half), tiles.width * step))
                steps = b.mul(tiles.splat(tiles.integer(step), kind), tiles.lane_numbers)
                addresses = b.add(tiles.splat(base, kind), steps)
                with tiles.loop(0, length) as loop:
                    value = tiles.gather(addresses, loop.index)
                    tiles.put(value, target, tiles.plus(tiles.times(loop.index, 2), half))

    def _distribute(self, block: Any, rows: list[tuple[Any, Any]], found: list[list[Value]]) -> None:
        """Add products of S y with x to dT/dt and with t to dT/dx."""
        tiles, given, b = self.tiles, self.given, self.tiles.b
        with tiles.loop(0, given["num_pairs"]) as pairs:
            tables = ("waves", "features", "by_waves", "by_features")
            waves, features, by_waves, by_features = (tiles.integer_at(given[name], pairs.index) for name in tables)
            for half in range(2):
                at = tiles.plus(block, half)
                t, to_t = (self._block_of(address, at, "num_waves") for address in (waves, by_waves))
                x, to_x = (self._block_of(address, at, "num_features") for address in (features, by_features))
                with b.if_then(b.icmp_signed("!=", by_waves, tiles.integer(0))):
                    self._add_rows(to_t, [w for w, _ in rows], found[half], x, [f for _, f in rows], self.whole)
                with b.if_then(b.icmp_signed("!=", by_features, tiles.integer(0))):
                    self._add_rows(to_x, [f for _, f in rows], found[half], t, [w for w, _ in rows], False)

    def _add_rows(self, to: Any, places: list, found: list[Value], factors: Any, chosen: list, one: bool) -> None:
        products = [value * self.tiles.vector_at(factors, row) for value, row in zip(found, chosen)]
        if one:
            total = products[0]
            for product in products[1:]:
                total = total + product
            places, products = places[:1], [total]
        for place, product in zip(places, products):
            self.tiles.add_to(product, to, place)
