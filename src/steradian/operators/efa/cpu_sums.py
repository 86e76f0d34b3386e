"""The sums of Euclidean fast attention by machine code: moments, their application, and the contraction of both.

.. math:: T = \\sum_i \\sum_{ρ a e} t_{iρ} \\, x_{i, n(ρ) a} \\, S_{ρa,e} \\, y_{i,e} ,

see :mod:`steradian.operators.efa.sums`, where :class:`CpuSums` serves as a way to compute: derivatives of any order are
made of the same three functions. The product ``z = t x`` is formed for one small block at a time, in the first-level
cache, right before a product of matrices reads it. Sixteen (float64: eight) atoms are a block: ``t [B, K, R, W]``,
``x [B, K, X, W]``, ``y [B, C, K W, P]``, ``S [B, C, J, P]`` with W lanes, columns e in C panels of P = W or 2 W, K
even, and J = R a rows, a multiple of eight. Row j multiplies row ``wave_of[j]`` of t and row ``feature_of[j]`` of x.
The product z may be a sum over several (t, x).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steradian.compiler.lanes import ROWS, Tiles, Value
from steradian.compiler.native import function_of, run_tasks

__all__ = ["CpuSums", "aligned", "run_kernel", "sums_module"]

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
#: moments: S = sum_i t x y; tasks are parts of the B J / 8 self.
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
    return _Code(kind, itemsize, columns, whole, single).text


class _Code(Tiles):
    def __init__(self, kind: str, itemsize: int, columns: int, whole: bool, single: bool) -> None:
        super().__init__(ARGUMENTS, itemsize)
        self.columns, self.one_wave, self.single = columns, whole, single
        self.zero = self.value(0.0)
        {"moments": self._moments, "apply": self._apply, "contract": self._contract}[kind]()
        self.text = self.finish()

    # ---------------------------------------------------------------------------------------------------- parts of all

    def _rows(self, tile: Any) -> list[tuple[Any, Any]]:
        """Rows of t and x of the rows of a tile."""
        given = self.given
        rows = [self.plus(self.times(tile, ROWS), row) for row in range(ROWS)]
        if self.one_wave:
            wave, feature = (self.integer_at(given[name], rows[0]) for name in ("wave_of", "feature_of"))
            return [(wave, self.plus(feature, row)) for row in range(ROWS)]
        return [(self.integer_at(given["wave_of"], row), self.integer_at(given["feature_of"], row)) for row in rows]

    def _block_of(self, address: Any, block: Any, rows: str) -> Any:
        return self.vector_address(address, self.times(block, self.given[rows]))

    def _products(self, block: Any, rows: list[tuple[Any, Any]]) -> list[Value]:
        """z of a block of atoms, for some rows."""
        given = self.given

        def of_pair(pair: Any) -> list[Value]:
            t = self._block_of(self.integer_at(given["waves"], pair), block, "num_waves")
            x = self._block_of(self.integer_at(given["features"], pair), block, "num_features")
            if self.one_wave:
                self.prefetch(self.vector_address(t, self.plus(rows[0][0], 1)), 1)  # the next tile's wave
            return [self.vector_at(t, wave) * self.vector_at(x, feature) for wave, feature in rows]

        if self.single:
            return of_pair(0)
        with self.loop(0, given["num_pairs"], *[self.zero] * len(rows)) as pairs:
            pairs.totals = [total + z for total, z in zip(pairs.totals, of_pair(pairs.index))]
        return pairs.totals

    def _multiply(self, chunk: Any, place: Any, count: Any, numbers: Any, right: Any) -> None:
        """Add to a tile ``numbers(k)`` times vectors ``right + k``: sums of sums, so that rounding stays small. The
        first chunk finds anything in memory and does not use it."""
        at = range(ROWS * self.columns)
        self.prefetch(place, len(at))
        totals = self.product([self.zero for _ in at], count, numbers, lambda k: self._panel_row(right, k))
        first = self.b.icmp_signed("==", chunk, self.integer(0))
        for index, total in zip(at, totals):
            before = self.vector_at(place, index)
            self.put(total + self.zero.where(first, before), place, index)

    def _panel_row(self, base: Any, row: Any) -> list[Value]:
        place = self._panel_place(base, row)
        return [self.vector_at(place, column) for column in range(self.columns)]

    def _panel_place(self, base: Any, row: Any) -> Any:
        return self.vector_address(base, self.times(row, self.columns))

    def _panel(self, name: str, system: Any, panel: Any) -> Any:
        """Where a panel of y or S begins."""
        given = self.given
        rows = self.times(given["num_blocks"], self.width) if name == "values" else self.times(given["num_tiles"], ROWS)
        number = self.plus(self.times(system, given["num_panels"]), panel)
        return self._panel_place(given[name], self.times(number, rows))

    # ----------------------------------------------------------------------------------------------------------- kinds

    def _moments(self) -> None:
        given, b = self.given, self.b
        # chunks are the outermost loop: all tiles read the values of sixteen blocks of atoms while they are cached
        chunks = b.sdiv(self.plus(given["num_blocks"], BLOCKS - 1), self.integer(BLOCKS))
        with self.loop(0, chunks) as chunk:
            start = self.times(chunk.index, BLOCKS)
            count = self.smaller(BLOCKS, b.sub(given["num_blocks"], start))
            with self.loop(self.first, self.last) as task:
                system, tile = b.sdiv(task.index, given["num_tiles"]), b.srem(task.index, given["num_tiles"])
                first = self.plus(self.times(system, given["num_blocks"]), start)
                rows = self._rows(tile)
                with self.loop(0, count) as blocks:
                    for row, z in enumerate(self._products(self.plus(first, blocks.index), rows)):
                        self.put(z, self.scratch, self.plus(blocks.index, row * BLOCKS))
                with self.loop(0, given["num_panels"]) as panel:
                    values = self._panel_place(
                        self._panel("values", system, panel.index), self.times(start, self.width)
                    )
                    sums = self._panel_place(self._panel("sums", system, panel.index), self.times(tile, ROWS))
                    self._multiply(chunk.index, sums, self.times(count, self.width), self._of_rows, values)

    def _of_rows(self, atom: Any) -> list[Value]:
        """z of one atom, from rows of blocks."""
        step = 64 * BLOCKS
        return [self.broadcast(self.plus(self.scratch, step * row), atom) for row in range(ROWS)]

    def _apply(self) -> None:
        given, b = self.given, self.b
        depth = DEPTH // ROWS
        # likewise: 128 rows of S are read by all blocks of atoms
        chunks = b.sdiv(self.plus(given["num_tiles"], depth - 1), self.integer(depth))
        with self.loop(0, chunks) as chunk:
            start = self.times(chunk.index, depth)
            count = self.smaller(depth, b.sub(given["num_tiles"], start))
            with self.loop(self.first, self.last) as task:
                with self.loop(0, count) as part:
                    rows = self._rows(self.plus(start, part.index))
                    for row, z in enumerate(self._products(task.index, rows)):
                        self.put(z, self.scratch, self.plus(self.times(part.index, ROWS), row))
                system, block = b.sdiv(task.index, given["num_blocks"]), b.srem(task.index, given["num_blocks"])
                with self.loop(0, given["num_panels"]) as panel:
                    sums = self._panel_place(self._panel("sums", system, panel.index), self.times(start, ROWS))
                    values = self._panel("values", system, panel.index)
                    for atoms in range(0, self.width, ROWS):

                        def numbers(row: Any, atoms: int = atoms) -> list[Value]:
                            place = self.vector_address(self.scratch, row)
                            return [self.broadcast(place, atoms + atom) for atom in range(ROWS)]

                        place = self._panel_place(values, self.plus(self.times(block, self.width), atoms))
                        self._multiply(chunk.index, place, self.times(count, ROWS), numbers, sums)

    def _contract(self) -> None:
        given, b = self.given, self.b
        length = self.width * self.columns
        with self.loop(self.first, self.last) as task:
            block = self.times(task.index, 2)
            system, place = b.sdiv(block, given["num_blocks"]), b.srem(block, given["num_blocks"])
            # S y of an atom meets its waves and features, which have atoms in their lanes: so must y
            self._transpose(system, place, length)
            with self.loop(0, given["num_tiles"]) as loop:
                with self.loop(0, given["num_panels"], *[self.zero] * (2 * ROWS)) as panel:
                    sums = self._panel_place(self._panel("sums", system, panel.index), self.times(loop.index, ROWS))
                    right = self.vector_address(self.scratch, self.times(panel.index, 2 * length))
                    panel.totals = self._contract_panel(panel.totals, length, sums, right)
                self._distribute(block, self._rows(loop.index), [panel.totals[::2], panel.totals[1::2]])

    def _contract_panel(self, totals: list[Value], length: int, sums: Any, right: Any) -> list[Value]:
        step = self.itemsize * length

        def numbers(column: Any) -> list[Value]:
            return [self.broadcast(self.plus(sums, step * row), column) for row in range(ROWS)]

        def vectors(column: Any) -> list[Value]:
            place = self.vector_address(right, self.times(column, 2))
            return [self.vector_at(place, half) for half in range(2)]

        return self.product(totals, length, numbers, vectors)

    def _transpose(self, system: Any, block: Any, length: int) -> None:
        """Values of two blocks of atoms into scratch memory, atoms in the lanes."""
        b, kind = self.b, self.whole_addresses
        step = self.itemsize * length
        with self.loop(0, self.given["num_panels"]) as panel:
            values = self._panel("values", system, panel.index)
            target = self.vector_address(self.scratch, self.times(panel.index, 2 * length))
            for half in range(2):
                base = self.plus(values, self.times(self.plus(block, half), self.width * step))
                steps = b.mul(self.splat(self.integer(step), kind), self.lane_numbers)
                addresses = b.add(self.splat(base, kind), steps)
                with self.loop(0, length) as loop:
                    value = self.gather(addresses, loop.index)
                    self.put(value, target, self.plus(self.times(loop.index, 2), half))

    def _distribute(self, block: Any, rows: list[tuple[Any, Any]], found: list[list[Value]]) -> None:
        """Add products of S y with x to dT/dt and with t to dT/dx."""
        given, b = self.given, self.b
        with self.loop(0, given["num_pairs"]) as pairs:
            tables = ("waves", "features", "by_waves", "by_features")
            waves, features, by_waves, by_features = (self.integer_at(given[name], pairs.index) for name in tables)
            for half in range(2):
                at = self.plus(block, half)
                t, to_t = (self._block_of(address, at, "num_waves") for address in (waves, by_waves))
                x, to_x = (self._block_of(address, at, "num_features") for address in (features, by_features))
                with b.if_then(b.icmp_signed("!=", by_waves, self.integer(0))):
                    self._add_rows(to_t, [w for w, _ in rows], found[half], x, [f for _, f in rows], self.one_wave)
                with b.if_then(b.icmp_signed("!=", by_features, self.integer(0))):
                    self._add_rows(to_x, [f for _, f in rows], found[half], t, [w for w, _ in rows], False)

    def _add_rows(self, to: Any, places: list, found: list[Value], factors: Any, chosen: list, one: bool) -> None:
        products = [value * self.vector_at(factors, row) for value, row in zip(found, chosen)]
        if one:
            # eight rows of one wave: added up in registers, memory is touched once
            total = products[0]
            for product in products[1:]:
                total = total + product
            places, products = places[:1], [total]
        for place, product in zip(places, products):
            self.add_to(product, to, place)


# ------------------------------------------------------------------------------------------------------------ launching

WORTH_A_THREAD = 1_000_000
"""Multiply-adds below which a second thread costs more than it brings."""


def aligned(tensor: Tensor) -> Tensor:
    """The tensor as kernels read it: contiguous, from an address that is a multiple of 64; a copy where it is not."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 64 else tensor


def run_kernel(
    function: Callable, names: Sequence[str], numbers: dict[str, int], scratch: int, parts: int, work: int
) -> None:
    """Run machine code of ``(arguments, scratch, first, last)`` over as many threads as PyTorch uses and it is worth.

    Args:
        function: the code.
        names: of its arguments.
        numbers: their values; what is not named is 0.
        scratch: vectors of scratch memory that a thread needs.
        parts: how many parts the work may be cut into.
        work: multiply-adds.
    """
    if not parts:
        return
    arguments = np.array([numbers.get(name, 0) for name in names], dtype=np.int64)
    threads = max(1, min(torch.get_num_threads(), parts, work // WORTH_A_THREAD))
    memory = np.empty(64 * (threads * scratch + 1), dtype=np.uint8)
    start = -(-memory.ctypes.data // 64) * 64  # vectors start at a multiple of their size
    # no two parts write to the same number, so results do not depend on how many threads there are
    cuts = [parts * part // threads for part in range(threads + 1)]
    calls = [
        (arguments.ctypes.data, start + 64 * scratch * part, first, last)
        for part, (first, last) in enumerate(pairwise(cuts))
    ]
    if threads == 1:
        function(*calls[0])
    else:
        run_tasks(function, calls, threads)


@cache
def _function(kind: str, itemsize: int, columns: int, whole: bool, single: bool) -> Callable:
    name = f"sums of attention, {kind}"
    return function_of(name, sums_module, (kind, itemsize, columns, whole, single), 4)


class CpuSums:
    """Sums for one arrangement of rows.

    Args:
        wave_of, feature_of: ``[J]`` int64, rows of waves and features that make row j; J a multiple of eight.
        whole: every eight rows from the start share one wave and have features next to each other.
    """

    def __init__(self, wave_of: Tensor, feature_of: Tensor, whole: bool) -> None:
        self.wave_of, self.feature_of, self.whole = wave_of.contiguous(), feature_of.contiguous(), whole
        self.num_rows = len(wave_of)
        if self.num_rows % ROWS:
            raise ValueError(f"{self.num_rows} rows are no multiple of {ROWS}")

    def moments(self, values: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """``[B, C, J, P]`` from ``[B, C, K W, P]`` and pairs of ``[B, K, R, W]`` and ``[B, K, X, W]``."""
        sums = values.new_empty(*values.shape[:2], self.num_rows, values.shape[3])
        self._run("moments", aligned(values), sums, pairs)
        return sums

    def apply(self, sums: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """``[B, C, K W, P]`` from ``[B, C, J, P]`` and pairs."""
        _, blocks, _, lanes = pairs[0][0].shape
        values = sums.new_empty(*sums.shape[:2], blocks * lanes, sums.shape[3])
        self._run("apply", values, aligned(sums), pairs)
        return values

    def contract(
        self, values: Tensor, sums: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """Derivatives of T by the waves and features of every pair, where wanted."""
        flat = [tensor for pair in pairs for tensor in pair]
        outputs = [
            torch.zeros_like(x, memory_format=torch.contiguous_format) if asked else None
            for x, asked in zip(flat, wanted)
        ]
        self._run("contract", aligned(values), aligned(sums), pairs, outputs)
        return outputs

    def _run(
        self,
        kind: str,
        values: Tensor,
        sums: Tensor,
        pairs: Sequence[tuple[Tensor, Tensor]],
        outputs: Sequence[Tensor | None] = (),
    ) -> None:
        waves, features = ([aligned(pair[number]) for pair in pairs] for number in range(2))
        batch, blocks, num_waves, lanes = waves[0].shape
        panels, width = values.shape[1], values.shape[3]
        tables = {
            "waves": _addresses(waves), "features": _addresses(features),
            "by_waves": _addresses(outputs[::2]), "by_features": _addresses(outputs[1::2]),
        }  # fmt: skip
        numbers = {name: table.ctypes.data for name, table in tables.items()} | {
            "num_blocks": blocks, "num_waves": num_waves, "num_features": features[0].shape[2],
            "num_panels": panels, "num_tiles": self.num_rows // ROWS, "num_pairs": len(pairs),
            "wave_of": self.wave_of.data_ptr(), "feature_of": self.feature_of.data_ptr(),
            "values": values.data_ptr(), "sums": sums.data_ptr(),
        }  # fmt: skip
        parts = batch * {"moments": self.num_rows // ROWS, "apply": blocks, "contract": blocks // 2}[kind]
        function = _function(kind, values.element_size(), width // lanes, self.whole, len(pairs) == 1)
        work = batch * blocks * lanes * self.num_rows * panels * width
        scratch = num_scratch(panels * width)
        run_kernel(function, ARGUMENTS, numbers, scratch, parts if panels else 0, work)


def _addresses(tensors: Sequence[Tensor | None]) -> np.ndarray:
    return np.array([0 if tensor is None else tensor.data_ptr() for tensor in tensors], dtype=np.int64)
