"""Products of small matrices and sines in the language of :mod:`steradian.compiler.lanes`.

A tile is eight rows times one or two vectors: all of its sums live in registers, every turn of its loop reads eight
numbers (given to all lanes) and the vectors, and multiplies each with each.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from steradian.compiler.lanes import I64, Lanes, Value

__all__ = ["ROWS", "Tiles"]

#: Rows of a tile.
ROWS = 8


class Tiles(Lanes):
    """A function ``run(arguments, scratch, first, last)``.

    Args:
        names: what the int64 numbers and addresses at ``arguments`` are called; see ``given``.
        itemsize: 4 or 8.

    Attributes:
        given: the arguments by name.
        scratch, first, last: the others.
    """

    def __init__(self, names: Sequence[str], itemsize: int) -> None:
        super().__init__("run", 4, itemsize)
        arguments, self.scratch, self.first, self.last = self.function.args
        self.given = {name: self.integer_at(arguments, place) for place, name in enumerate(names)}
        self.whole_addresses = ir.VectorType(I64, self.width)
        self.lane_numbers = ir.Constant(self.whole_addresses, list(range(self.width)))

    # ------------------------------------------------------------------------------------------------------ integers

    def plus(self, *numbers: Any) -> Any:
        total = self.integer(numbers[0])
        for number in numbers[1:]:
            total = self.b.add(total, self.integer(number))
        return total

    def times(self, *numbers: Any) -> Any:
        total = self.integer(numbers[0])
        for number in numbers[1:]:
            total = self.b.mul(total, self.integer(number))
        return total

    def smaller(self, one: Any, other: Any) -> Any:
        one, other = self.integer(one), self.integer(other)
        return self.b.select(self.b.icmp_signed("<", one, other), one, other)

    # ---------------------------------------------------------------------------------------------- numbers and vectors

    def vector_at(self, base: Any, index: Any = 0) -> Value:
        """Vector number ``index`` from an address that is a multiple of 64."""
        loaded = self.b.load(self._place(base, index))
        loaded.align = 64
        return Value(self, loaded)

    def put(self, value: Value, base: Any, index: Any = 0) -> None:
        self.b.store(value.ir, self._place(base, index)).align = 64

    def add_to(self, value: Value, base: Any, index: Any = 0) -> None:
        self.put(self.vector_at(base, index) + value, base, index)

    def vector_address(self, base: Any, index: Any) -> Any:
        return self.plus(base, self.times(index, 64))

    def number_address(self, base: Any, index: Any) -> Any:
        return self.plus(base, self.times(index, self.itemsize))

    def _place(self, base: Any, index: Any) -> Any:
        return self.b.inttoptr(self.vector_address(base, index), self.pointer)

    # ------------------------------------------------------------------------------------------------------- products

    def product(
        self,
        totals: Sequence[Value],
        count: Any,
        numbers: Callable[[Any], Sequence[Value]],
        vectors: Callable[[Any], Sequence[Value]],
    ) -> list[Value]:
        """``totals[r V + v] += sum_k numbers(k)[r] vectors(k)[v]`` for k below ``count``."""
        with self.loop(0, count, *totals) as loop:
            right = vectors(loop.index)
            left = numbers(loop.index)
            loop.totals = [
                loop.totals[row * len(right) + column] + a * b
                for row, a in enumerate(left)
                for column, b in enumerate(right)
            ]
        return loop.totals

    # ---------------------------------------------------------------------------------------------------------- sines

    def cos_sin(self, angle: Value) -> tuple[Value, Value]:
        """Cosine and sine to the rounding of the type, of angles up to about 10^5 (float32) or 10^9 (float64)."""
        b, single = self.b, self.itemsize == 4
        turns = self.intrinsic("rint", angle * (2 / math.pi))
        rest = angle
        for part in _parts_of_quarter(single):  # each step is exact, or rounds what the next one is too small to see
            rest = self.fma(-turns, self.value(part), rest)
        square = rest * rest
        sine = rest + rest * square * self._polynomial(square, _sine(single))
        cosine = self.value(1.0) + square * self._polynomial(square, _cosine(single))
        quarter = b.fptosi(turns.ir, self.whole)
        one, two = (ir.Constant(self.whole, [number] * self.width) for number in (1, 2))
        odd = b.icmp_signed("!=", b.and_(quarter, one), ir.Constant(self.whole, [0] * self.width))
        first, second = sine.where(odd, cosine), cosine.where(odd, sine)
        return self._signed(first, b.and_(b.add(quarter, one), two)), self._signed(second, b.and_(quarter, two))

    def _polynomial(self, x: Value, coefficients: Sequence[float]) -> Value:
        *lower, total = (self.value(c) for c in coefficients)
        for coefficient in reversed(lower):
            total = total * x + coefficient
        return total

    def _signed(self, value: Value, bit: Any) -> Value:
        """Minus the value where bit 1 is set."""
        b = self.b
        shift = ir.Constant(self.whole, [8 * self.itemsize - 2] * self.width)
        return Value(self, b.bitcast(b.xor(b.bitcast(value.ir, self.whole), b.shl(bit, shift)), self.vector))


def _parts_of_quarter(single: bool) -> list[float]:
    """pi / 2 as a sum of numbers of the type."""
    if single:
        parts, rest = [], math.pi / 2
        for _ in range(3):
            parts.append(struct.unpack("f", struct.pack("f", rest))[0])
            rest -= parts[-1]
        return parts
    return [1.5707963267948966, 6.123233995736766e-17, -1.4973849048591833e-33]


def _sine(single: bool) -> list[float]:
    """(sin x - x) / x^3 in x^2 on [-pi/4, pi/4]: minimax (Cephes) or Taylor."""
    if single:
        return [-1.6666654611e-1, 8.3321608736e-3, -1.9515295891e-4]
    return [(-1) ** k / math.factorial(2 * k + 1) for k in range(1, 9)]


def _cosine(single: bool) -> list[float]:
    """(cos x - 1) / x^2 in x^2."""
    if single:
        return [-0.5, 4.166664568298827e-2, -1.388731625493765e-3, 2.443315711809948e-5]
    return [(-1) ** k / math.factorial(2 * k) for k in range(1, 10)]
