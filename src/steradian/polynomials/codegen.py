"""A program as machine code: straight-line vector instructions inside three loops.

The function made of a program runs over segments (rows of the output), over the rows of a segment, and over blocks of
channels. The body has no branches: every term is one fused multiply-add on a vector of channels, factors are read where
they lie, scalars are broadcast. Nothing is interpreted at run time, which is what makes a term cost about a cycle.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from steradian.compiler.lanes import FLAGS, lanes_of
from steradian.compiler.native import FUNCTION
from steradian.polynomials.program import Program, Slot, Term, needed_in_order

__all__ = ["module_of"]

I64 = ir.IntType(64)
#: An input vector with more uses than this in a program with few of them stays in a register.
MANY_USES = 4
REGISTERS_FOR_INPUTS = 12


def module_of(program: Program, itemsize: int, channels: int, halves: tuple[bool, ...] = ()) -> str:
    """LLVM's text for a program in float32 (``itemsize`` 4) or float64 (8) and a number of channels.

    Channels are whole vectors, and constant, so that every address is a row's address plus a constant. ``halves`` says
    of every input and then of every output whether it is stored in bfloat16 (with ``itemsize`` 4 alone): such inputs
    are widened as they are read, such outputs rounded to nearest, ties to even, as they are written.

    The function takes, all int64: addresses of the tables ``inputs`` (an address each), ``gathers`` (the address of
    each input's row index), ``outputs``, ``order`` (rows in order of their segment, or 0 where that is 0, 1, 2, ...)
    and ``bounds`` of the segments; then the first and last segment, and the first and last block of channels.
    """
    return str(_Generator(program, itemsize, channels, halves).module)


@dataclass
class _Loop:
    index: ir.PhiInstr
    close: Callable[[], None]


class _Generator:
    def __init__(self, program: Program, itemsize: int, channels: int, halves: tuple[bool, ...]) -> None:
        self.stride = channels * itemsize
        halves = halves or (False,) * (len(program.inputs) + len(program.outputs))
        self.half_inputs, self.half_outputs = halves[: len(program.inputs)], halves[len(program.inputs) :]
        self.program, self.graph, self.itemsize = program, program.graph, itemsize
        self.real = ir.FloatType() if itemsize == 4 else ir.DoubleType()
        self.lanes = lanes_of(itemsize)
        self.vector = ir.VectorType(self.real, self.lanes)
        self.order = needed_in_order(program)
        self.module = ir.Module(name="program")
        kind = ir.FunctionType(ir.VoidType(), [I64] * 9)
        self.function = ir.Function(self.module, kind, name=FUNCTION)
        self.function.attributes.add("nounwind")
        self.entry = self.function.append_basic_block("entry")
        self.b = ir.IRBuilder(self.entry)
        self.values: dict[int, ir.Value] = {}
        self._generate()

    # ------------------------------------------------------------------------------------------------------- structure

    def _generate(self) -> None:
        inputs, gathers, outputs, order, bounds, first, last, block_first, block_last = self.function.args
        b = self.b
        self.input_bases = [self._load_index(inputs, I64(k)) for k in range(len(self.program.inputs))]
        self.index_bases = [self._load_index(gathers, I64(k)) for k in range(len(self.program.inputs))]
        self.output_bases = [self._load_index(outputs, I64(k)) for k in range(len(self.program.outputs))]
        self.scratch = b.alloca(self.real, max(self._count_products(), 1))
        self.scratch_used = 0
        self.sums = self._room_for_sums(channels=self.stride // self.itemsize)
        in_order = b.icmp_signed("==", order, I64(0))
        final = b.sub(self._load_index(bounds, last), I64(1))
        segments = self._loop(first, last)
        places = self._clear_sums(segments.index, block_first, block_last)
        start = self._load_index(bounds, segments.index)
        stop = self._load_index(bounds, b.add(segments.index, I64(1)))
        rows = self._loop(start, stop)
        listed = b.append_basic_block("listed")
        known = b.append_basic_block("known")
        before = b.block
        following = b.add(rows.index, I64(1))
        following = b.select(b.icmp_signed("<", following, final), following, final)
        b.cbranch(in_order, known, listed)
        b.position_at_end(listed)
        from_list = [self._load_index(order, index) for index in (rows.index, following)]
        b.branch(known)
        b.position_at_end(known)
        row, next_row = b.phi(I64), b.phi(I64)
        for phi, index, entry in zip((row, next_row), (rows.index, following), from_list):
            phi.add_incoming(index, before)
            phi.add_incoming(entry, listed)
        self.next_places = self._next_rows(next_row)
        self._row(segments.index, row, places, block_first, block_last)
        rows.close()
        self._round_sums(segments.index, places, block_first, block_last)
        segments.close()
        b.ret_void()

    # ------------------------------------------------------------------------------------------------- sums of segments

    def _room_for_sums(self, channels: int) -> dict[int, ir.Value]:
        """Addresses on the stack where outputs of bfloat16 that are sums over rows are summed in float32."""
        b = self.b
        room = {}
        for number, (slot, half) in enumerate(zip(self.program.outputs, self.half_outputs)):
            if half and slot.index is not None:
                place = b.alloca(self.real, slot.operand.dim * channels)
                room[number] = b.ptrtoint(place, I64)
        return room

    def _clear_sums(self, segment: ir.Value, block_first: ir.Value, block_last: ir.Value) -> dict[int, ir.Value]:
        """Put the sums of a segment to zero just before they are needed, so that they are in the cache; addresses of
        their rows by number of the output."""
        b = self.b
        zero = ir.Constant(self.vector, [0.0] * self.lanes)
        places = {}
        for number, slot in enumerate(self.program.outputs):
            if slot.index is None or not slot.operand.has_channels:
                continue
            size = self._row_size(slot, False)
            place = self.sums.get(number)
            if place is None:
                place = b.add(self.output_bases[number], b.mul(segment, I64(size)))
            places[number] = place
            components, blocks = self._loop(I64(0), I64(slot.operand.dim)), self._loop(block_first, block_last)
            at = b.add(b.mul(components.index, I64(self.stride)), b.mul(blocks.index, I64(64)))
            b.store(zero, self._pointer(b.add(place, at), self.vector)).align = self.itemsize
            blocks.close()
            components.close()
        return places

    def _round_sums(
        self, segment: ir.Value, places: dict[int, ir.Value], block_first: ir.Value, block_last: ir.Value
    ) -> None:
        """Complete sums of outputs in bfloat16 from the stack to where they belong."""
        b = self.b
        for number in self.sums:
            slot = self.program.outputs[number]
            row = b.add(self.output_bases[number], b.mul(segment, I64(self._row_size(slot, True))))
            components, blocks = self._loop(I64(0), I64(slot.operand.dim)), self._loop(block_first, block_last)
            at = b.add(b.mul(components.index, I64(self.stride)), b.mul(blocks.index, I64(64)))
            value = b.load(self._pointer(b.add(places[number], at), self.vector))
            value.align = self.itemsize
            self._store_half(b.add(row, b.lshr(at, I64(1))), value)
            blocks.close()
            components.close()

    def _next_rows(self, row: ir.Value) -> dict[int, ir.Value]:
        """Where the next row of the work finds its own rows of inputs, by number of the input.

        They come from memory, and the processor does not foresee where: a block of channels reads one line of 64 bytes
        here and there. Other gathered rows lie in a cache; asking for them costs more than it brings.
        """
        b = self.b
        places = {}
        for number, (slot, base) in enumerate(zip(self.program.inputs, self.input_bases)):
            if slot.operand.has_channels and (slot.index is None or slot.operand.read_once):
                at = row if slot.index is None else self._load_index(self.index_bases[number], row)
                size = self._row_size(slot, self.half_inputs[number])
                places[number] = b.add(base, b.mul(at, I64(size)))
        return places

    def _loop(self, first: ir.Value, last: ir.Value) -> _Loop:
        b = self.b
        before = b.block
        head, body, after = (b.append_basic_block(name) for name in ("head", "body", "after"))
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        index.add_incoming(first, before)
        b.cbranch(b.icmp_signed("<", index, last), body, after)
        b.position_at_end(body)

        def close() -> None:
            index.add_incoming(b.add(index, I64(1)), b.block)
            b.branch(head)
            b.position_at_end(after)

        return _Loop(index, close)

    def _row(
        self,
        segment: ir.Value,
        row: ir.Value,
        places: dict[int, ir.Value],
        block_first: ir.Value,
        block_last: ir.Value,
    ) -> None:
        b, graph = self.b, self.graph
        self.input_rows = []
        inputs = zip(self.program.inputs, self.input_bases, self.index_bases, self.half_inputs)
        for slot, base, index, half in inputs:
            at = row if slot.index is None else self._load_index(index, row)
            self.input_rows.append(b.add(base, b.mul(at, I64(self._row_size(slot, half)))))
        output_rows = []
        for number, (slot, base, half) in enumerate(zip(self.program.outputs, self.output_bases, self.half_outputs)):
            at = row if slot.index is None else segment
            known = places.get(number)
            output_rows.append(b.add(base, b.mul(at, I64(self._row_size(slot, half)))) if known is None else known)
        summed = self._summed_nodes()
        for node in self.order:
            if not graph.vector[node] and node not in summed:
                self.values[node] = self._scalar(node)
        self._hoist_products()
        dots = [node for node in self.order if node in summed and self._is_dot(node)]
        totals = self._blocks(block_first, block_last, output_rows, dots)
        for node, total in zip(dots, totals):
            self.values[node] = self._reduce(total)
        for node in self.order:
            if node in summed and node not in dots:
                self.values[node] = self._scalar(node)
        for slot, nodes, address in zip(self.program.outputs, self.program.nodes, output_rows):
            if slot.operand.has_channels:
                continue
            for component, target in enumerate(nodes):
                if target is not None:
                    pointer = self._pointer(b.add(address, I64(component * self.itemsize)), self.real)
                    b.store(b.fadd(b.load(pointer), self.values[target], flags=FLAGS), pointer)

    def _blocks(
        self, block_first: ir.Value, block_last: ir.Value, output_rows: list[ir.Value], dots: list[int]
    ) -> list[ir.Value]:
        """The loop over blocks of channels; returns the sums of the dots, a vector each."""
        b = self.b
        zero = ir.Constant(self.vector, [0.0] * self.lanes)
        before = b.block
        loop = self._loop(block_first, block_last)
        body = b.block
        b.position_at_end(loop.index.parent)
        b.position_after(loop.index)
        running = []
        for _ in dots:
            phi = b.phi(self.vector)
            phi.add_incoming(zero, before)
            running.append(phi)
        b.position_at_end(body)
        offsets = {half: b.mul(loop.index, I64(32 if half else 64)) for half in (False, True)}
        self.input_places = [b.add(base, offsets[half]) for base, half in zip(self.input_rows, self.half_inputs)]
        output_places = [
            b.add(base, offsets[half and number not in self.sums])
            for number, (base, half) in enumerate(zip(output_rows, self.half_outputs))
        ]
        self._prefetch(offsets)
        self.registers: dict[int, ir.Value] = {}
        self.kept = self._kept_inputs()
        outputs_of: dict[int, list[tuple[int, int]]] = {}
        for output, nodes in enumerate(self.program.nodes):
            for component, node in enumerate(nodes):
                if node is not None and self.graph.vector[node]:
                    outputs_of.setdefault(node, []).append((output, component))
        totals = dict(zip(dots, running))
        for node in self.order:
            if node in totals:
                total = self._sum(node, totals[node])
                totals[node].add_incoming(total, body)
            elif self.graph.vector[node]:
                if self.graph.source[node] is None:
                    self.values[node] = self._sum(node, None)
                for output, component in outputs_of.get(node, ()):
                    self._store(output, component, output_places[output], self._vector(node))
        for output, (slot, nodes) in enumerate(zip(self.program.outputs, self.program.nodes)):
            for component, node in enumerate(nodes):
                if node is None and slot.index is None and slot.operand.has_channels:
                    self._store(output, component, output_places[output], zero)
        loop.close()
        return running

    # -------------------------------------------------------------------------------------------------------- analysis

    def _row_size(self, slot: Slot, half: bool) -> int:
        """Bytes of one row."""
        return slot.operand.dim * (self.stride if slot.operand.has_channels else self.itemsize) // (1 + half)

    def _is_dot(self, node: int) -> bool:
        return any(b >= 0 and self.graph.vector[a] and self.graph.vector[b] for _, a, b in self.graph.terms[node])

    def _summed_nodes(self) -> set[int]:
        """Scalars that come out of sums over channels, computed after the loop over blocks."""
        summed: set[int] = set()
        for node in self.order:
            later = any(a in summed or b in summed for _, a, b in self.graph.terms[node])
            if later and self.graph.vector[node]:
                # cannot come of differentiating a polynomial: one channel does not depend on another
                raise NotImplementedError("channels that depend on a sum over channels")
            if later or (not self.graph.vector[node] and self._is_dot(node)):
                summed.add(node)
        return summed

    def _count_products(self) -> int:
        return sum(len(self.graph.terms[node]) for node in self.order)

    def _kept_inputs(self) -> set[int]:
        uses: dict[int, int] = {}
        for node in self.order:
            for _, a, b in self.graph.terms[node]:
                for factor in (a, b):
                    if factor >= 0 and self.graph.vector[factor] and self.graph.source[factor] is not None:
                        uses[factor] = uses.get(factor, 0) + 1
        often = sorted((node for node in uses if uses[node] > MANY_USES), key=lambda node: -uses[node])
        return set(often[:REGISTERS_FOR_INPUTS])

    # ------------------------------------------------------------------------------------------------------- arithmetic

    def _pointer(self, address: ir.Value, kind: ir.Type) -> ir.Value:
        return self.b.inttoptr(address, kind.as_pointer())

    def _load_index(self, base: ir.Value, position: ir.Value) -> ir.Value:
        return self.b.load(self._pointer(self.b.add(base, self.b.mul(position, I64(8))), I64))

    def _vector(self, node: int) -> ir.Value:
        """Value of a vector node; inputs are read at each use, which costs no more than a register would."""
        source = self.graph.source[node]
        if source is None:
            return self.values[node]
        if node in self.registers:
            return self.registers[node]
        operand, component = source
        b = self.b
        if self.half_inputs[operand]:
            value = self._load_half(b.add(self.input_places[operand], I64(self.stride // 2 * component)))
        else:
            address = b.add(self.input_places[operand], I64(self.stride * component))
            value = b.load(self._pointer(address, self.vector))
            value.align = self.itemsize
        # a vector of bfloat16 costs two instructions to widen, one that has gone to the stack a read
        if node in self.kept or self.half_inputs[operand]:
            self.registers[node] = value
        return value

    def _load_half(self, address: ir.Value) -> ir.Value:
        """A vector of bfloat16, widened: its bits are the upper half of a float32's."""
        b = self.b
        bits = b.load(self._pointer(address, ir.VectorType(ir.IntType(16), self.lanes)))
        bits.align = 2
        whole = ir.VectorType(ir.IntType(32), self.lanes)
        return b.bitcast(b.shl(b.zext(bits, whole), ir.Constant(whole, [16] * self.lanes)), self.vector)

    def _store_half(self, address: ir.Value, value: ir.Value) -> None:
        """Rounded to nearest, ties to even; NaN as PyTorch makes it stays NaN."""
        b = self.b
        whole = ir.VectorType(ir.IntType(32), self.lanes)
        sixteen, one, below = (ir.Constant(whole, [number] * self.lanes) for number in (16, 1, 0x7FFF))
        bits = b.bitcast(value, whole)
        odd = b.and_(b.lshr(bits, sixteen), one)
        rounded = b.lshr(b.add(bits, b.add(odd, below)), sixteen)
        short = ir.VectorType(ir.IntType(16), self.lanes)
        b.store(b.trunc(rounded, short), self._pointer(address, short)).align = 2

    def _store(self, output: int, component: int, place: ir.Value, value: ir.Value) -> None:
        b = self.b
        if self.half_outputs[output] and output not in self.sums:
            self._store_half(b.add(place, I64(self.stride // 2 * component)), value)
            return
        address = b.add(place, I64(self.stride * component))
        pointer = self._pointer(address, self.vector)
        if self.program.outputs[output].index is not None:
            before = b.load(pointer)
            before.align = self.itemsize
            value = b.fadd(before, value, flags=FLAGS)
        b.store(value, pointer).align = self.itemsize

    def _prefetch(self, offsets: dict[bool, ir.Value]) -> None:
        """Ask for this block of channels of the next row; ``offsets`` of vectors of whole and of half width."""
        b, graph = self.b, self.graph
        byte, whole = ir.IntType(8).as_pointer(), ir.IntType(32)
        name = "llvm.prefetch.p0"
        kind = ir.FunctionType(ir.VoidType(), [byte, whole, whole, whole])
        function = self.module.globals.get(name) or ir.Function(self.module, kind, name=name)
        hints = [whole(0), whole(3), whole(1)]  # to read, into all caches, data
        for node in self.order:
            source = graph.source[node]
            if source is not None and source[0] in self.next_places:
                half = self.half_inputs[source[0]]
                start = b.add(self.next_places[source[0]], offsets[half])
                address = b.add(start, I64(self.stride // (1 + half) * source[1]))
                b.call(function, [b.inttoptr(address, byte), *hints])

    def _splat(self, value: ir.Value) -> ir.Value:
        undefined = ir.Constant(self.vector, ir.Undefined)
        one = self.b.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
        mask = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        return self.b.shuffle_vector(one, undefined, mask)

    def _number(self, value: float) -> ir.Constant:
        if self.itemsize == 4:
            value = struct.unpack("f", struct.pack("f", value))[0]
        return ir.Constant(self.real, value)

    def _hoist_products(self) -> None:
        """Coefficient times scalar of every term that has both, once per row, in memory to broadcast from."""
        b = self.b
        self.hoisted: dict[tuple[float, int], ir.Value] = {}
        for node in self.order:
            if not self.graph.vector[node]:
                continue
            for coefficient, a, other in self.graph.terms[node]:
                if other < 0 or (self.graph.vector[a] and self.graph.vector[other]):
                    continue
                scalar = other if self.graph.vector[a] else a
                if (coefficient, scalar) in self.hoisted:
                    continue
                value = self.values[scalar]
                if coefficient != 1.0:
                    value = b.fmul(value, self._number(coefficient), flags=FLAGS)
                place = b.gep(self.scratch, [I64(self.scratch_used)])
                self.scratch_used += 1
                b.store(value, place)
                self.hoisted[coefficient, scalar] = place

    def _factors(self, term: Term) -> tuple[ir.Value, ir.Value | None]:
        """A term in a vector node or a dot as one or two vectors."""
        coefficient, a, other = term
        vector = self.graph.vector
        if other < 0:
            value = self._vector(a)
            if coefficient == 1.0:
                return value, None
            return value, ir.Constant(self.vector, [self._number(coefficient)] * self.lanes)
        if vector[a] and vector[other]:
            one, two = self._vector(a), self._vector(other)
            if coefficient != 1.0:
                one = self.b.fmul(one, ir.Constant(self.vector, [self._number(coefficient)] * self.lanes), flags=FLAGS)
            return one, two
        scalar = other if vector[a] else a
        return self._vector(a if vector[a] else other), self._splat(self.b.load(self.hoisted[coefficient, scalar]))

    def _sum(self, node: int, total: ir.Value | None) -> ir.Value:
        for term in self.graph.terms[node]:
            one, two = self._factors(term)
            if total is None:
                total = one if two is None else self.b.fmul(one, two, flags=FLAGS)
            elif two is None:
                total = self.b.fadd(total, one, flags=FLAGS)
            else:
                total = self.b.call(self._intrinsic("fma", self.vector, 3), [one, two, total])
        if total is None:
            return ir.Constant(self.vector, [0.0] * self.lanes)
        return total

    def _scalar(self, node: int) -> ir.Value:
        b = self.b
        source = self.graph.source[node]
        if source is not None:
            operand, component = source
            return b.load(self._pointer(b.add(self.input_rows[operand], I64(component * self.itemsize)), self.real))
        total = self._number(0.0)
        for coefficient, a, other in self.graph.terms[node]:
            value = self.values[a]
            if other >= 0:
                value = b.fmul(value, self.values[other], flags=FLAGS)
            if coefficient != 1.0:
                value = b.fmul(value, self._number(coefficient), flags=FLAGS)
            total = b.fadd(total, value, flags=FLAGS)
        return total

    def _reduce(self, total: ir.Value) -> ir.Value:
        reducer = self._intrinsic("vector.reduce.fadd", self.real, 1)
        return self.b.call(reducer, [self._number(0.0), total], fastmath=FLAGS)

    def _intrinsic(self, name: str, first: ir.Type, count: int) -> ir.Function:
        """LLVM's function ``name`` of ``count`` vectors, or of a number and ``count`` vectors."""
        full = f"llvm.{name}.v{self.lanes}f{8 * self.itemsize}"
        kinds = [self.vector] * count if first is self.vector else [first, *[self.vector] * count]
        known = self.module.globals.get(full)
        return known or ir.Function(self.module, ir.FunctionType(first, kinds), name=full)
