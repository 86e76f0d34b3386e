"""Machine code of the sums of Euclidean fast attention: moments, their application, and the contraction of both.

.. math:: T = \\sum_i \\sum_{ρ a e} t_{iρ} \\, x_{i, n(ρ) a} \\, S_{ρa,e} \\, y_{i,e} ,

see :mod:`steradian.operators.efa_kernel`. The product ``z = t x`` is formed for one small block at a time, in the
first-level cache, right before a product of matrices reads it. Sixteen (float64: eight) atoms are a block:
``t [B, K, R, W]``, ``x [B, K, X, W]``, ``y [B, K W, E]``, ``S [B, J, E]`` with W lanes, E a multiple of W, K even, and
J = R a rows, a multiple of eight. Row j multiplies row ``wave_of[j]`` of t and row ``feature_of[j]`` of x. All of t and
x may be sums over several (t, x).
"""

from __future__ import annotations

from typing import Any

from steradian.kernels.lanes import Value
from steradian.kernels.tiles import ROWS, Tiles

__all__ = ["ARGUMENTS", "KINDS", "VERSION", "num_scratch", "sums_module"]

#: Part of what identifies the code in the cache: to be raised with every change here, in ``tiles`` or in ``lanes``.
VERSION = 1
#: Names of the numbers and addresses that a call finds in its first argument.
ARGUMENTS = (
    "num_blocks",  # K
    "num_waves",  # R
    "num_features",  # X
    "num_vectors",  # E / W
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
#: moments: S += sum_i t x y; tasks are parts of the B J / 8 tiles.
#: apply: y += sum t x S; tasks are parts of the B K blocks.
#: contract: dT/dt and dT/dx are added to; tasks are parts of the B K / 2 pairs of blocks.
KINDS = ("moments", "apply", "contract")
BLOCKS = 16
"""Blocks of atoms whose z is formed at a time for the moments; their values stay in the second-level cache."""
DEPTH = 128
"""Rows whose z is formed at a time for the application; so much of S stays in the first-level cache."""


def num_scratch(num_vectors: int, itemsize: int) -> int:
    """Vectors of scratch memory that a task needs."""
    return max(ROWS * BLOCKS, DEPTH, 2 * num_vectors * (64 // itemsize))


def sums_module(kind: str, itemsize: int, pair: bool, whole: bool) -> str:
    """LLVM's text of ``run(arguments, scratch, first, last)``.

    Args:
        kind: one of KINDS.
        itemsize: 4 or 8.
        pair: E / W is even, so that tiles are two vectors wide.
        whole: the rows of every tile have one wave.
    """
    return _Kernel(kind, itemsize, pair, whole).text


class _Kernel:
    def __init__(self, kind: str, itemsize: int, pair: bool, whole: bool) -> None:
        self.tiles = Tiles(ARGUMENTS, itemsize)
        self.given, self.columns, self.whole = self.tiles.given, 2 if pair else 1, whole
        self.zero = self.tiles.value(0.0)
        {"moments": self._moments, "apply": self._apply, "contract": self._contract}[kind]()
        self.text = self.tiles.finish()

    # ------------------------------------------------------------------------------------------------------ parts of all

    def _rows(self, tile: Any) -> list[tuple[Any, Any]]:
        """Rows of t and x of the rows of a tile."""
        tiles, given = self.tiles, self.given
        rows = [tiles.plus(tiles.times(tile, ROWS), row) for row in range(ROWS)]
        return [
            (tiles.integer_at(given["wave_of"], row), tiles.integer_at(given["feature_of"], row)) for row in rows
        ]

    def _block_of(self, address: Any, block: Any, rows: str) -> Any:
        return self.tiles.vector_address(address, self.tiles.times(block, self.given[rows]))

    def _products(self, block: Any, rows: list[tuple[Any, Any]]) -> list[Value]:
        """z of a block of atoms, for some rows."""
        tiles, given = self.tiles, self.given
        with tiles.loop(0, given["num_pairs"], *[self.zero] * len(rows)) as pairs:
            t = self._block_of(tiles.integer_at(given["waves"], pairs.index), block, "num_waves")
            x = self._block_of(tiles.integer_at(given["features"], pairs.index), block, "num_features")
            pairs.totals = [
                total + tiles.vector_at(t, wave) * tiles.vector_at(x, feature)
                for total, (wave, feature) in zip(pairs.totals, rows)
            ]
        return pairs.totals

    def _multiply(self, place: Any, row_step: Any, count: Any, numbers: Any, vectors: Any) -> None:
        """Add a product to a tile: rows ``row_step`` vectors apart."""
        tiles = self.tiles
        places = [
            tiles.plus(place, tiles.times(row_step, 64 * row), 64 * column)
            for row in range(ROWS)
            for column in range(self.columns)
        ]
        totals = tiles.product([tiles.vector_at(at) for at in places], count, numbers, vectors)
        for total, at in zip(totals, places):
            tiles.put(total, at)

    def _columns(self) -> Any:
        """A loop over the tiles' columns."""
        return self.tiles.loop(0, self.tiles.b.sdiv(self.given["num_vectors"], self.tiles.integer(self.columns)))

    # ------------------------------------------------------------------------------------------------------------- kinds

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
                self._moments_of_tile(task.index, tiles.times(first, tiles.width), tiles.times(count, tiles.width))

    def _moments_of_tile(self, task: Any, first_atom: Any, num_atoms: Any) -> None:
        tiles, given = self.tiles, self.given
        vectors = given["num_vectors"]
        values = tiles.vector_address(given["values"], tiles.times(first_atom, vectors))
        sums = tiles.vector_address(given["sums"], tiles.times(task, ROWS, vectors))
        with self._columns() as columns:
            offset = tiles.times(columns.index, 64 * self.columns)

            def numbers(atom: Any) -> list[Value]:
                return [
                    tiles.broadcast(tiles.plus(tiles.scratch, 64 * BLOCKS * row), atom) for row in range(ROWS)
                ]

            def right(atom: Any) -> list[Value]:
                place = tiles.plus(tiles.vector_address(values, tiles.times(atom, vectors)), offset)
                return [tiles.vector_at(place, column) for column in range(self.columns)]

            self._multiply(tiles.plus(sums, offset), vectors, num_atoms, numbers, right)

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
                system = b.sdiv(task.index, given["num_blocks"])
                row = tiles.times(tiles.plus(tiles.times(system, given["num_tiles"]), start), ROWS)
                self._apply_to_block(task.index, row, tiles.times(count, ROWS))

    def _apply_to_block(self, block: Any, first_row: Any, num_rows: Any) -> None:
        tiles, given = self.tiles, self.given
        vectors = given["num_vectors"]
        sums = tiles.vector_address(given["sums"], tiles.times(first_row, vectors))
        values = tiles.vector_address(given["values"], tiles.times(block, tiles.width, vectors))
        with self._columns() as columns:
            offset = tiles.times(columns.index, 64 * self.columns)

            def right(row: Any) -> list[Value]:
                place = tiles.plus(tiles.vector_address(sums, tiles.times(row, vectors)), offset)
                return [tiles.vector_at(place, column) for column in range(self.columns)]

            for atoms in range(0, tiles.width, ROWS):

                def numbers(row: Any, atoms: int = atoms) -> list[Value]:
                    place = tiles.vector_address(tiles.scratch, row)
                    return [tiles.broadcast(place, atoms + atom) for atom in range(ROWS)]

                place = tiles.plus(values, offset, tiles.times(vectors, 64 * atoms))
                self._multiply(place, vectors, num_rows, numbers, right)

    def _contract(self) -> None:
        tiles, given, b = self.tiles, self.given, self.tiles.b
        length = tiles.times(given["num_vectors"], tiles.width)
        with tiles.loop(tiles.first, tiles.last) as task:
            block = tiles.times(task.index, 2)
            self._transpose(block, length)
            system = b.sdiv(block, given["num_blocks"])
            first = tiles.times(system, given["num_tiles"])
            with tiles.loop(0, given["num_tiles"]) as loop:
                row = tiles.times(tiles.plus(first, loop.index), ROWS)
                sums = tiles.vector_address(given["sums"], tiles.times(row, given["num_vectors"]))

                def numbers(column: Any, sums: Any = sums) -> list[Value]:
                    steps = [tiles.times(given["num_vectors"], 64 * row) for row in range(ROWS)]
                    return [tiles.broadcast(tiles.plus(sums, step), column) for step in steps]

                def right(column: Any) -> list[Value]:
                    place = tiles.vector_address(tiles.scratch, tiles.times(column, 2))
                    return [tiles.vector_at(place, column) for column in range(2)]

                found = tiles.product([self.zero] * (2 * ROWS), length, numbers, right)
                self._distribute(block, self._rows(loop.index), [found[::2], found[1::2]])

    def _transpose(self, block: Any, length: Any) -> None:
        """Values of two blocks of atoms into scratch memory, atoms in the lanes."""
        tiles = self.tiles
        for half in range(2):
            kind = tiles.whole_addresses
            steps = tiles.times(length, tiles.itemsize)
            base = tiles.plus(
                self.given["values"], tiles.times(tiles.plus(block, half), tiles.width, steps)
            )
            addresses = tiles.b.add(
                tiles.splat(base, kind), tiles.b.mul(tiles.splat(steps, kind), tiles.lane_numbers)
            )
            with tiles.loop(0, length) as loop:
                value = tiles.gather(addresses, loop.index)
                tiles.put(value, tiles.scratch, tiles.plus(tiles.times(loop.index, 2), half))

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
