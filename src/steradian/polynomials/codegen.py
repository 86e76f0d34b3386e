"""A program as machine code: straight-line vector instructions inside three loops.

The function made of a program runs over segments (rows of the output), over the rows of a segment, and over blocks of
channels. The body has no branches: every term is one fused multiply-add on a vector of channels, factors are read where
they lie, scalars are broadcast. Nothing is interpreted at run time, which is what makes a term cost about a cycle.
"""

from __future__ import annotations

from llvmlite import ir

from steradian.compiler.lanes import FLAGS, I64, Lanes, Value
from steradian.compiler.native import FUNCTION, Code, code_of
from steradian.polynomials.program import Program, Slot, Term, needed_in_order

__all__ = ["compiled", "module_of"]

#: An input vector with more uses than this in a program with few of them stays in a register.
MANY_USES = 4
#: Of the 32 registers of AVX512; the others hold sums and factors on their way.
REGISTERS_FOR_INPUTS = 12


def compiled(program: Program, itemsize: int, channels: int, halves: tuple[bool, ...] = ()) -> Code:
    """The machine code of a program; the arguments are those of :func:`module_of`."""

    def make() -> Code:
        name = ", ".join(slot.operand.name for slot in program.outputs)
        description = f"{itemsize} {channels} {halves} {program.contents()}"
        return code_of(name, module_of, (program, itemsize, channels, halves), 9, description)

    code: Code = program.made.once(("code", itemsize, channels, halves), make)
    return code


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


class _Generator(Lanes):
    def __init__(self, program: Program, itemsize: int, channels: int, halves: tuple[bool, ...]) -> None:
        super().__init__(FUNCTION, 9, itemsize)
        self.stride = channels * itemsize
        halves = halves or (False,) * (len(program.inputs) + len(program.outputs))
        self.half_inputs, self.half_outputs = halves[: len(program.inputs)], halves[len(program.inputs) :]
        self.program, self.graph = program, program.graph
        self.order = needed_in_order(program)
        self.zero = self.constant(0.0)
        self.values: dict[int, ir.Value] = {}
        self._generate()

    # ------------------------------------------------------------------------------------------------------- structure

    def _generate(self) -> None:
        inputs, gathers, outputs, order, bounds, first, last, *blocks = self.function.args
        b = self.b
        self.block_range = blocks
        self.input_bases = [self.integer_at(inputs, k) for k in range(len(self.program.inputs))]
        self.index_bases = [self.integer_at(gathers, k) for k in range(len(self.program.inputs))]
        self.output_bases = [self.integer_at(outputs, k) for k in range(len(self.program.outputs))]
        # in the entry block: inside of a loop every turn would take more of the stack
        self.scratch = b.alloca(self.real, max(self._count_products(), 1))
        self.scratch_used = 0
        self.sums = self._room_for_sums(channels=self.stride // self.itemsize)
        in_order = b.icmp_signed("==", order, I64(0))
        # the last row names itself as the next one: nothing beyond the lists is read to foresee it
        final = b.sub(self.integer_at(bounds, last), I64(1))
        with self.loop(first, last) as segments:
            places = self._clear_sums(segments.index)
            start = self.integer_at(bounds, segments.index)
            stop = self.integer_at(bounds, b.add(segments.index, I64(1)))
            with self.loop(start, stop) as rows:
                row, next_row = self._listed(rows.index, final, order, in_order)
                self.next_places = self._next_rows(next_row)
                self._row(segments.index, row, places)
            self._round_sums(segments.index, places)
        b.ret_void()

    def _listed(self, position: ir.Value, final: ir.Value, order: ir.Value, in_order: ir.Value) -> list[ir.Value]:
        """The rows at a position of the work and at the next one, of a list or in order; at the end the last again."""
        b = self.b
        before = b.block
        listed, known = b.append_basic_block("listed"), b.append_basic_block("known")
        following = b.add(position, I64(1))
        following = b.select(b.icmp_signed("<", following, final), following, final)
        b.cbranch(in_order, known, listed)
        b.position_at_end(listed)
        from_list = [self.integer_at(order, index) for index in (position, following)]
        b.branch(known)
        b.position_at_end(known)
        found = [b.phi(I64), b.phi(I64)]
        for phi, index, entry in zip(found, (position, following), from_list):
            phi.add_incoming(index, before)
            phi.add_incoming(entry, listed)
        return found

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

    def _clear_sums(self, segment: ir.Value) -> dict[int, ir.Value]:
        """Put the sums of a segment to zero just before they are needed, so that they are in the cache; addresses of
        their rows by number of the output."""
        b = self.b
        places = {}
        for number, slot in enumerate(self.program.outputs):
            if slot.index is None or not slot.operand.has_channels or slot.operand.period is not None:
                continue  # what is a sum over channels too is zero before the first block
            place = self.sums.get(number)
            if place is None:
                place = b.add(self.output_bases[number], b.mul(segment, I64(self._row_size(slot, False))))
            places[number] = place
            with self.loop(0, slot.operand.dim) as components, self.loop(*self.block_range) as blocks:
                at = b.add(b.mul(components.index, I64(self.stride)), b.mul(blocks.index, I64(64)))
                self._put(self.zero, b.add(place, at))
        return places

    def _round_sums(self, segment: ir.Value, places: dict[int, ir.Value]) -> None:
        """Complete sums of outputs in bfloat16 from the stack to where they belong."""
        b = self.b
        for number in self.sums:
            slot = self.program.outputs[number]
            row = b.add(self.output_bases[number], b.mul(segment, I64(self._row_size(slot, True))))
            with self.loop(0, slot.operand.dim) as components, self.loop(*self.block_range) as blocks:
                at = b.add(b.mul(components.index, I64(self.stride)), b.mul(blocks.index, I64(64)))
                self._store_half(b.add(row, b.lshr(at, I64(1))), self._get(b.add(places[number], at)))

    def _next_rows(self, row: ir.Value) -> dict[int, ir.Value]:
        """Where the next row of the work finds its own rows of inputs, by number of the input.

        They come from memory, and the processor does not foresee where: a block of channels reads one line of 64 bytes
        here and there. Other gathered rows lie in a cache; asking for them costs more than it brings.
        """
        b = self.b
        places = {}
        for number, (slot, base) in enumerate(zip(self.program.inputs, self.input_bases)):
            if slot.operand.has_channels and (slot.index is None or slot.operand.read_once):
                at = row if slot.index is None else self.integer_at(self.index_bases[number], row)
                size = self._row_size(slot, self.half_inputs[number])
                places[number] = b.add(base, b.mul(at, I64(size)))
        return places

    def _row(self, segment: ir.Value, row: ir.Value, places: dict[int, ir.Value]) -> None:
        b, graph = self.b, self.graph
        self.input_rows = []
        inputs = zip(self.program.inputs, self.input_bases, self.index_bases, self.half_inputs)
        for slot, base, index, half in inputs:
            at = row if slot.index is None else self.integer_at(index, row)
            self.input_rows.append(b.add(base, b.mul(at, I64(self._row_size(slot, half)))))
        output_rows = []
        for number, (slot, base, half) in enumerate(zip(self.program.outputs, self.output_bases, self.half_outputs)):
            at = row if slot.index is None else segment
            known = places.get(number)
            output_rows.append(b.add(base, b.mul(at, I64(self._row_size(slot, half)))) if known is None else known)
        # scalars (harmonics) are the same for all channels and formed once per row; vectors follow in the loop over
        # blocks of channels; what needs a sum over all channels comes after it
        summed = graph.summed(self.order)
        for node in self.order:
            if not graph.vector[node] and node not in summed:
                self.values[node] = self._scalar(node)
        self._hoist_products()
        dots = [node for node in self.order if node in summed and graph.is_dot(node)]
        totals = self._blocks(output_rows, dots)
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
                    # added to what the caller has set to zero: the rows of a segment come one after the other
                    pointer = self.at(b.add(address, I64(component * self.itemsize)), self.real)
                    b.store(b.fadd(b.load(pointer), self.values[target], flags=FLAGS), pointer)

    def _blocks(self, output_rows: list[ir.Value], dots: list[int]) -> list[ir.Value]:
        """The loop over blocks of channels; returns the sums of the dots, a vector each."""
        b = self.b
        with self.loop(*self.block_range, *[Value(self, self.zero)] * len(dots)) as loop:
            offsets = {half: b.mul(loop.index, I64(32 if half else 64)) for half in (False, True)}
            self.input_places = [
                b.add(base, self._offset(slot, half, offsets))
                for slot, base, half in zip(self.program.inputs, self.input_rows, self.half_inputs)
            ]
            output_places = [
                b.add(base, self._offset(slot, half and number not in self.sums, offsets))
                for number, (slot, base, half) in enumerate(zip(self.program.outputs, output_rows, self.half_outputs))
            ]
            self._prefetch(offsets)
            self.registers: dict[int, ir.Value] = {}
            self.kept = self._kept_inputs()
            outputs_of: dict[int, list[tuple[int, int]]] = {}
            for output, nodes in enumerate(self.program.nodes):
                for component, node in enumerate(nodes):
                    if node is not None and self.graph.vector[node]:
                        outputs_of.setdefault(node, []).append((output, component))
            totals = {node: total.ir for node, total in zip(dots, loop.totals)}
            for node in self.order:
                if node in totals:
                    totals[node] = self._sum(node, totals[node])
                elif self.graph.vector[node]:
                    if self.graph.source[node] is None:
                        self.values[node] = self._sum(node, None)
                    # stored as soon as it is known: no register has to hold it any longer
                    for output, component in outputs_of.get(node, ()):
                        self._store(output, component, output_places[output], self._vector(node))
            for output, (slot, nodes) in enumerate(zip(self.program.outputs, self.program.nodes)):
                for component, node in enumerate(nodes):
                    if node is None and slot.index is None and slot.operand.has_channels and not slot.operand.period:
                        self._store(output, component, output_places[output], self.zero)
            loop.totals = [Value(self, totals[node]) for node in dots]
        return [total.ir for total in loop.totals]

    # -------------------------------------------------------------------------------------------------------- analysis

    def _row_size(self, slot: Slot, half: bool) -> int:
        """Bytes of one row."""
        return slot.operand.dim * (self._stride(slot) if slot.operand.has_channels else self.itemsize) // (1 + half)

    def _stride(self, slot: Slot) -> int:
        """Bytes of one component of an input or output with channels."""
        return self.stride if slot.operand.period is None else slot.operand.period * self.itemsize

    def _offset(self, slot: Slot, half: bool, offsets: dict[bool, ir.Value]) -> ir.Value:
        """Bytes from a component's start to a block of channels, of the few that repeat to the same one again."""
        if slot.operand.period is None:
            return offsets[half]
        return self.b.urem(offsets[half], I64(self._stride(slot) // (1 + half)))

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

    def constant(self, number: float) -> ir.Constant:
        constant: ir.Constant = self.value(number).ir
        return constant

    def _get(self, address: ir.Value) -> ir.Value:
        # rows of a view may begin anywhere; where they do lie on 64 bytes an unaligned read costs no more
        value = self.b.load(self.at(address, self.vector))
        value.align = self.itemsize
        return value

    def _put(self, value: ir.Value, address: ir.Value) -> None:
        self.b.store(value, self.at(address, self.vector)).align = self.itemsize

    def _vector(self, node: int) -> ir.Value:
        """Value of a vector node; inputs are read at each use, which costs no more than a register would."""
        source = self.graph.source[node]
        if source is None:
            return self.values[node]
        if node in self.registers:
            return self.registers[node]
        operand, component = source
        b, stride = self.b, self._stride(self.program.inputs[operand])
        if self.half_inputs[operand]:
            value = self._load_half(b.add(self.input_places[operand], I64(stride // 2 * component)))
        else:
            value = self._get(b.add(self.input_places[operand], I64(stride * component)))
        # a vector of bfloat16 costs two instructions to widen, one that has gone to the stack a read
        if node in self.kept or self.half_inputs[operand]:
            self.registers[node] = value
        return value

    def _load_half(self, address: ir.Value) -> ir.Value:
        """A vector of bfloat16, widened: its bits are the upper half of a float32's."""
        b = self.b
        bits = b.load(self.at(address, ir.VectorType(ir.IntType(16), self.width)))
        bits.align = 2
        whole = ir.VectorType(ir.IntType(32), self.width)
        return b.bitcast(b.shl(b.zext(bits, whole), ir.Constant(whole, [16] * self.width)), self.vector)

    def _store_half(self, address: ir.Value, value: ir.Value) -> None:
        """Rounded to nearest, ties to even; NaN as PyTorch makes it stays NaN."""
        b = self.b
        whole = ir.VectorType(ir.IntType(32), self.width)
        sixteen, one, below = (ir.Constant(whole, [number] * self.width) for number in (16, 1, 0x7FFF))
        bits = b.bitcast(value, whole)
        odd = b.and_(b.lshr(bits, sixteen), one)
        rounded = b.lshr(b.add(bits, b.add(odd, below)), sixteen)
        short = ir.VectorType(ir.IntType(16), self.width)
        b.store(b.trunc(rounded, short), self.at(address, short)).align = 2

    def _store(self, output: int, component: int, place: ir.Value, value: ir.Value) -> None:
        b = self.b
        if self.half_outputs[output] and output not in self.sums:
            self._store_half(b.add(place, I64(self.stride // 2 * component)), value)
            return
        slot = self.program.outputs[output]
        address = b.add(place, I64(self._stride(slot) * component))
        if slot.index is not None or slot.operand.period is not None:
            # a plain sum, no atomic one: a thread has whole segments (or whole channels), so nobody else writes here
            value = b.fadd(self._get(address), value, flags=FLAGS)
        self._put(value, address)

    def _prefetch(self, offsets: dict[bool, ir.Value]) -> None:
        """Ask for this block of channels of the next row; ``offsets`` of vectors of whole and of half width."""
        b, graph = self.b, self.graph
        for node in self.order:
            source = graph.source[node]
            if source is not None and source[0] in self.next_places:
                slot, half = self.program.inputs[source[0]], self.half_inputs[source[0]]
                start = b.add(self.next_places[source[0]], self._offset(slot, half, offsets))
                self.prefetch(b.add(start, I64(self._stride(slot) // (1 + half) * source[1])))

    def _number(self, value: float) -> ir.Constant:
        """A number of the type, not a vector."""
        return self.constant(value).constant[0]

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
                # broadcast as it is read, a factor takes no register for longer than one multiply-add
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
            return value, self.constant(coefficient)
        if vector[a] and vector[other]:
            one, two = self._vector(a), self._vector(other)
            if coefficient != 1.0:
                one = self.b.fmul(one, self.constant(coefficient), flags=FLAGS)
            return one, two
        scalar = other if vector[a] else a
        return self._vector(a if vector[a] else other), self.splat(
            self.b.load(self.hoisted[coefficient, scalar]), self.vector
        )

    def _sum(self, node: int, total: ir.Value | None) -> ir.Value:
        for term in self.graph.terms[node]:
            one, two = self._factors(term)
            if total is None:
                total = one if two is None else self.b.fmul(one, two, flags=FLAGS)
            elif two is None:
                total = self.b.fadd(total, one, flags=FLAGS)
            else:
                total = self.fma(*(Value(self, value) for value in (one, two, total))).ir
        if total is None:
            return self.zero
        return total

    def _scalar(self, node: int) -> ir.Value:
        b = self.b
        source = self.graph.source[node]
        if source is not None:
            operand, component = source
            return b.load(self.at(b.add(self.input_rows[operand], I64(component * self.itemsize)), self.real))
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
        """The sum over the lanes of a vector."""
        name = f"llvm.vector.reduce.fadd.v{self.width}f{8 * self.itemsize}"
        kind = ir.FunctionType(self.real, [self.real, self.vector])
        function = self.module.globals.get(name) or ir.Function(self.module, kind, name=name)
        return self.b.call(function, [self._number(0.0), total], fastmath=FLAGS)
