"""A small language for kernels in which every vector lane is a row of its own, written into LLVM's.

Values are vectors of 64 bytes with the usual operators; arrays of such vectors live in scratch memory; tables shared by
all rows are broadcast, tables of rows are gathered. No sum ever runs across lanes, so the inner sizes (points of a
grid, say) are loops of any length without padding.
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir

__all__ = [
    "Array",
    "Lanes",
    "Loop",
    "ROWS",
    "Tiles",
    "Value",
    "exp2_coefficients",
    "lanes_of",
]

I1, I32, I64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)
#: Sums may be fused and rearranged, once, when the code is made; NaN and infinity keep their meaning.
FLAGS = ("contract", "reassoc", "nsz")


def lanes_of(itemsize: int) -> int:
    """Numbers in one vector of 64 bytes."""
    return 64 // itemsize


def exp2_coefficients(itemsize: int) -> list[float]:
    """Coefficients of a polynomial for 2^x on [-1/2, 1/2], exact to the rounding of float32 (4) or float64 (8)."""
    degree = 6 if itemsize == 4 else 13
    if itemsize == 8:  # Taylor: ln2^14 / 2^14 / 14! is below 1e-17
        return [math.log(2) ** n / math.factorial(n) for n in range(degree + 1)]
    # at Chebyshev's nodes the error is spread evenly, close to the best that a polynomial of this degree can do
    nodes = np.cos((np.arange(degree + 1) + 0.5) * np.pi / (degree + 1)) / 2
    return [float(c) for c in np.polynomial.polynomial.polyfit(nodes, 2.0**nodes, degree)]


@dataclass(frozen=True, eq=False)
class Value:
    """A vector of numbers, one per row."""

    lanes: Lanes
    ir: Any

    def _with(self, operation: str, other: Any) -> Value:
        return Value(self.lanes, getattr(self.lanes.b, operation)(self.ir, self.lanes.value(other).ir, flags=FLAGS))

    def __add__(self, other: Any) -> Value:
        return self._with("fadd", other)

    def __sub__(self, other: Any) -> Value:
        return self._with("fsub", other)

    def __mul__(self, other: Any) -> Value:
        return self._with("fmul", other)

    def __truediv__(self, other: Any) -> Value:
        return self._with("fdiv", other)

    def __neg__(self) -> Value:
        return self.lanes.value(0.0) - self

    def sqrt(self) -> Value:
        return self.lanes.intrinsic("sqrt", self)

    def maximum(self, other: Any) -> Value:
        """The larger one; a NaN in ``other`` is kept."""
        other = self.lanes.value(other)
        return self.where(self.greater(other), other)

    def greater(self, other: Any) -> Any:
        return self.lanes.b.fcmp_ordered(">", self.ir, self.lanes.value(other).ir)

    def where(self, condition: Any, otherwise: Any) -> Value:
        return Value(self.lanes, self.lanes.b.select(condition, self.ir, self.lanes.value(otherwise).ir))


@dataclass(frozen=True)
class Array:
    """Vectors in scratch memory."""

    lanes: Lanes
    address: ir.Value

    def place(self, index: Any) -> Any:
        b = self.lanes.b
        return b.inttoptr(b.add(self.address, b.mul(self.lanes.integer(index), I64(64))), self.lanes.pointer)

    def __getitem__(self, index: Any) -> Value:
        loaded = self.lanes.b.load(self.place(index))
        loaded.align = 64
        return Value(self.lanes, loaded)

    def __setitem__(self, index: Any, value: Value) -> None:
        self.lanes.b.store(value.ir, self.place(index)).align = 64

    def add(self, index: Any, value: Value) -> None:
        self[index] = self[index] + value


@dataclass
class Loop:
    """The body of a loop: its index, and totals that go from one turn to the next (and out of the loop)."""

    index: Any
    totals: list[Value]


class Lanes:
    """Builds one function of int64 arguments."""

    def __init__(self, name: str, num_arguments: int, itemsize: int) -> None:
        self.itemsize, self.width = itemsize, lanes_of(itemsize)
        self.real = ir.FloatType() if itemsize == 4 else ir.DoubleType()
        self.whole = ir.VectorType(I32 if itemsize == 4 else I64, self.width)
        self.vector = ir.VectorType(self.real, self.width)
        self.pointer = self.vector.as_pointer()
        self.module = ir.Module(name=name)
        self.function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [I64] * num_arguments), name=name)
        self.function.attributes.add("nounwind")
        self.b = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.mask: Any = None

    def finish(self) -> str:
        self.b.ret_void()
        return str(self.module)

    # ---------------------------------------------------------------------------------------------------------- values

    def integer(self, value: Any) -> Any:
        return I64(value) if isinstance(value, int) else value

    def value(self, value: Any) -> Value:
        if isinstance(value, Value):
            return value
        # LLVM writes float32 constants as doubles and refuses one that float32 cannot hold
        number = struct.unpack("f", struct.pack("f", value))[0] if self.itemsize == 4 else value
        return Value(self, ir.Constant(self.vector, [ir.Constant(self.real, number)] * self.width))

    def at(self, address: Any, kind: Any) -> Any:
        """A pointer to what lies at an address."""
        return self.b.inttoptr(address, kind.as_pointer())

    def integer_at(self, base: Any, index: Any) -> Any:
        """An int64 of a table."""
        address = self.b.add(base, self.b.mul(self.integer(index), I64(8)))
        return self.b.load(self.at(address, I64))

    def prefetch(self, address: Any, count: int = 1) -> None:
        """Have some vectors brought into the cache while other work goes on."""
        byte = ir.IntType(8)
        kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), I32, I32, I32])
        name = "llvm.prefetch.p0"
        function = self.module.globals.get(name) or ir.Function(self.module, kind, name=name)
        for index in range(count):
            place = self.at(self.b.add(address, I64(64 * index)), byte)
            self.b.call(function, [place, I32(0), I32(3), I32(1)])  # to read, keep, data

    def splat(self, scalar: Any, kind: Any) -> Any:
        undefined = ir.Constant(kind, ir.Undefined)  # the pattern that LLVM knows as one broadcasting instruction
        one = self.b.insert_element(undefined, scalar, I32(0))
        return self.b.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(I32, self.width), [0] * self.width))

    def broadcast(self, base: Any, index: Any) -> Value:
        """Number ``index`` of a table, in all lanes."""
        b = self.b
        address = b.add(base, b.mul(self.integer(index), I64(self.itemsize)))
        return Value(self, self.splat(b.load(b.inttoptr(address, self.real.as_pointer())), self.vector))

    def intrinsic(self, name: str, *values: Value, flags: tuple[str, ...] = FLAGS) -> Value:
        full = f"llvm.{name}.v{self.width}f{8 * self.itemsize}"
        kind = ir.FunctionType(self.vector, [self.vector] * len(values))
        function = self.module.globals.get(full) or ir.Function(self.module, kind, name=full)
        return Value(self, self.b.call(function, [value.ir for value in values], fastmath=flags))

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a b + c, rounded once and never rearranged."""
        return self.intrinsic("fma", a, b, c, flags=())

    def exp2(self, x: Value) -> Value:
        """2^x for x <= 0; what is negligible against one (below 2^-100, 2^-700) is rounded up to that."""
        floor = self.value(-100.0 if self.itemsize == 4 else -700.0)
        # further down the sum below would leave the exponent's bits and give another number altogether
        x = floor.maximum(x)
        nearest = self.intrinsic("rint", x)
        rest = x - nearest
        *lower, total = (self.value(c) for c in exp2_coefficients(self.itemsize))
        for coefficient in reversed(lower):
            total = total * rest + coefficient
        b = self.b
        shift = ir.Constant(self.whole, [23 if self.itemsize == 4 else 52] * self.width)
        # 2^n is n added to the exponent, which lies above the mantissa's 23 (52) bits
        power = b.shl(b.fptosi(nearest.ir, self.whole), shift)
        return Value(self, b.bitcast(b.add(b.bitcast(total.ir, self.whole), power), self.vector))

    # ------------------------------------------------------------------------------------------------------------ rows

    def rows(self, block: Any, num_rows: Any) -> Any:
        """Rows of this block of lanes, the last row again where there are no more; sets the mask of true ones."""
        b = self.b
        kind = ir.VectorType(I64, self.width)
        steps = ir.Constant(kind, list(range(self.width)))
        rows = b.add(self.splat(b.mul(block, I64(self.width)), kind), steps)
        bound = self.splat(num_rows, kind)
        self.mask = b.icmp_signed("<", rows, bound)
        return b.select(self.mask, rows, b.sub(bound, ir.Constant(kind, [1] * self.width)))

    def addresses(self, base: Any, rows: Any, stride: Any) -> Any:
        """Byte addresses of rows of ``stride`` numbers."""
        b = self.b
        kind = ir.VectorType(I64, self.width)
        size = self.splat(b.mul(self.integer(stride), I64(self.itemsize)), kind)
        return b.add(self.splat(base, kind), b.mul(rows, size))

    def addresses_of_integers(self, base: Any, rows: Any) -> Any:
        """Byte addresses of entries of an int64 index."""
        kind = ir.VectorType(I64, self.width)
        return self.b.add(self.splat(base, kind), self.b.mul(rows, ir.Constant(kind, [8] * self.width)))

    def _pointers(self, addresses: Any, offset: Any, kind: Any, size: int) -> Any:
        b = self.b
        step = self.splat(b.mul(self.integer(offset), I64(size)), ir.VectorType(I64, self.width))
        return b.inttoptr(b.add(addresses, step), ir.VectorType(kind.as_pointer(), self.width))

    def gather(self, addresses: Any, offset: Any = 0) -> Value:
        return Value(self, self._gather(addresses, offset, self.real, self.itemsize))

    def gather_integers(self, addresses: Any) -> Any:
        return self._gather(addresses, 0, I64, 8)

    def _gather(self, addresses: Any, offset: Any, kind: Any, size: int) -> Any:
        vector = ir.VectorType(kind, self.width)
        pointers = self._pointers(addresses, offset, kind, size)
        mask = ir.VectorType(I1, self.width)
        short = f"v{self.width}{'i' if kind is I64 else 'f'}{8 * size}"
        name = f"llvm.masked.gather.{short}.v{self.width}p0"
        signature = ir.FunctionType(vector, [pointers.type, I32, mask, vector])
        function = self.module.globals.get(name) or ir.Function(self.module, signature, name=name)
        # rows past the end repeat the last one: every lane may be read
        every = ir.Constant(mask, [1] * self.width)
        return self.b.call(function, [pointers, I32(size), every, ir.Constant(vector, ir.Undefined)])

    def scatter(self, value: Value, addresses: Any, offset: Any = 0) -> None:
        """Write the true rows."""
        pointers = self._pointers(addresses, offset, self.real, self.itemsize)
        name = f"llvm.masked.scatter.v{self.width}f{8 * self.itemsize}.v{self.width}p0"
        signature = ir.FunctionType(ir.VoidType(), [self.vector, pointers.type, I32, self.mask.type])
        function = self.module.globals.get(name) or ir.Function(self.module, signature, name=name)
        self.b.call(function, [value.ir, pointers, I32(self.itemsize), self.mask])

    # ----------------------------------------------------------------------------------------------------------- loops

    @contextlib.contextmanager
    def loop(self, first: Any, last: Any, *totals: Value) -> Iterator[Loop]:
        """``for index in range(first, last)``; assign ``loop.totals`` in the body, read them after it."""
        b = self.b
        before = b.block
        head, body, after = (b.append_basic_block(name) for name in ("head", "body", "after"))
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        index.add_incoming(self.integer(first), before)
        # Totals are phis, so they stay in registers from turn to turn. What the end of the body gives them is known
        # once it is written, and comes from the block where it ended: with inner loops not the one where it began.
        running = []
        for total in totals:
            phi = b.phi(self.vector)
            phi.add_incoming(total.ir, before)
            running.append(phi)
        b.cbranch(b.icmp_signed("<", index, self.integer(last)), body, after)
        b.position_at_end(body)
        loop = Loop(index, [Value(self, phi) for phi in running])
        yield loop
        index.add_incoming(b.add(index, I64(1)), b.block)
        for phi, total in zip(running, loop.totals):
            phi.add_incoming(total.ir, b.block)
        b.branch(head)
        b.position_at_end(after)
        loop.totals = [Value(self, phi) for phi in running]


# --------------------------------------------------------------------------------------------------------------- tiles


#: Rows of a tile: with two vectors sixteen sums, half of the registers of AVX512. A multiply-add takes about four
#: cycles and two begin in each, so fewer than eight sums would leave the units waiting.
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
        # an outer product: R + V reads for R V multiply-adds, whose sums do not leave the registers
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
        # Cody and Waite: take off whole quarter turns, with pi / 2 in parts so that nothing of the rest is lost
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
        # after an odd number of quarter turns sine and cosine have changed places; signs follow from their number mod 4
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
