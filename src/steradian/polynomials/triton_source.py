"""A program as Triton kernels: how its outputs are divided among them, and the text of each.

A kernel is straight-line code on tiles of rows times channels.

One program instance handles ``ROWS`` rows of the work at a time and ``BLOCK`` channels. What has channels is a tile
``[ROWS, BLOCK]``, what has none is ``[ROWS, 1]``, which Triton keeps once per thread. Two forms of the loops:

* outputs in the order of the work (``plain``): an instance takes ``ROWS`` rows; where an output has no channels it
  goes through all blocks of channels, adds up the products of a sum over channels in registers, and reduces them at
  the end;
* outputs scattered by an index (``segments``): an instance takes one row of the output (or one of ``PARTS`` parts of
  it) and goes through the rows of the work that belong to it, ``ROWS`` at a time; the sums stay in registers and are
  stored once.

Nothing is added to memory, so results do not depend on the order in which instances run. The number of channels is a
constant of the compiled kernel: every address is a row's address plus a constant. Arithmetic is in ``REAL`` (float32,
or float64 where an input is), whatever inputs and outputs are stored in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from steradian.polynomials.program import Program, Slot, Term, needed_in_order

__all__ = ["FUNCTION", "Layout", "Part", "layout_of", "parts_of", "source_of"]

FUNCTION = "kernel"
#: Terms of a kernel. Compiled for sm_90 with a channel per thread, the kernels of MACE (correlation 3, l_max 3) up to
#: this size keep within 255 registers without spilling; one and a half times as many terms take ten times as long to
#: compile, three times as many spill (benchmarks/gpu_compile.py).
MOST_TERMS = 1000
#: Sums that one kernel keeps in registers from row to row.
MOST_SUMS = 96
#: Inputs up to which all are read at the head of the body, so that their loads are under way together.
READ_AHEAD = 64
#: Terms of one statement.
TERMS_PER_LINE = 8
#: Sums over the rows, or channels, of an instance that are taken in one reduction.
SUMS_TOGETHER = 16

HEAD = '''"""Made by steradian from a polynomial."""

import triton
import triton.language as tl


'''


# --------------------------------------------------------------------------------------------------- parts of a program


@dataclass(frozen=True, eq=False)
class Part:
    """One kernel.

    Attributes:
        program: of the whole program's outputs those at ``positions``; components of other kernels are None.
        positions: of its outputs in the whole program.
        index: number of the row index that scatters them; None: in the order of the work.
        num_terms: multiply-adds per row and channel.
    """

    program: Program
    positions: tuple[int, ...]
    index: int | None
    num_terms: int


def parts_of(program: Program) -> list[Part]:
    """The kernels of a program; kept with it.

    Outputs in the order of the work share a kernel, as do those scattered by one index; what is too large is divided
    by components. An output without channels that is scattered is given in the order of the work: its rows are summed
    afterwards.
    """

    def make() -> list[Part]:
        groups: dict[int | None, list[int]] = {}
        for position, slot in enumerate(program.outputs):
            groups.setdefault(slot.index if slot.operand.has_channels else None, []).append(position)
        return [part for index, positions in groups.items() for part in _divided(program, index, tuple(positions))]

    parts: list[Part] = program.made.once("parts", make)
    return parts


def _divided(program: Program, index: int | None, positions: tuple[int, ...]) -> list[Part]:
    targets = [
        (position, component, node)
        for position in positions
        for component, node in enumerate(program.nodes[position])
        if node is not None
    ]
    reach: dict[int, frozenset[int]] = {}
    bunches: list[list[tuple[int, int, int]]] = []
    nodes: frozenset[int] = frozenset()
    for target in targets:
        needed = _reach(program, target[2], reach)
        together = nodes | needed
        full = bunches and (_terms(program, together) > MOST_TERMS or len(bunches[-1]) >= MOST_SUMS)
        if full or not bunches:
            bunches.append([])
            together = needed
        nodes = together
        bunches[-1].append(target)
    return [_part(program, index, bunch) for bunch in bunches]


def _part(program: Program, index: int | None, targets: list[tuple[int, int, int]]) -> Part:
    positions = tuple(sorted({position for position, _, _ in targets}))
    chosen: dict[int, list[int | None]] = {p: [None] * program.outputs[p].operand.dim for p in positions}
    for position, component, node in targets:
        chosen[position][component] = node
    outputs = tuple(program.outputs[position] for position in positions)
    part = Program(program.graph, program.inputs, outputs, tuple(tuple(chosen[p]) for p in positions))
    return Part(part, positions, index, part.num_terms)


def _reach(program: Program, node: int, known: dict[int, frozenset[int]]) -> frozenset[int]:
    """Everything that a node is computed from, itself included."""
    stack = [node]
    while stack:
        top = stack[-1]
        below = [factor for _, a, b in program.graph.terms[top] for factor in (a, b) if factor >= 0]
        missing = [factor for factor in below if factor not in known]
        if missing:
            stack += missing
            continue
        stack.pop()
        known[top] = frozenset([top]).union(*(known[factor] for factor in below))
    return known[node]


def _terms(program: Program, nodes: frozenset[int]) -> int:
    return sum(len(program.graph.terms[node]) for node in nodes)


# ------------------------------------------------------------------------------------------------------------- its text


def source_of(program: Program, index: int | None) -> str:
    """The text of a module with one Triton kernel, called :data:`FUNCTION`.

    Its arguments are pointers to the inputs, to every row index that gathers one of them, (with segments) to the order
    of the rows and the bounds of the segments, to the outputs that are written; the number of rows (of segments); then
    the constants C, ROWS, BLOCK, REAL, TOGETHER (sums over a tile are taken together) and, with segments, ORDERED
    (rows are not in order of their segment) and PARTS.

    Args:
        program: outputs that are None everywhere are not written.
        index: number of the row index that scatters the outputs, all with channels then; None: rows in order.
    """
    return _Writer(program, index).text()


@dataclass(frozen=True)
class Layout:
    """What a program reads and writes.

    Attributes:
        nodes: in the order in which they are computed.
        read: operands.
        gathered: the first operand of every row index.
        written: outputs.
    """

    nodes: list[int]
    read: list[int]
    gathered: list[int]
    written: list[int]


def _adder(size: int) -> str:
    """What a reduction of several tiles does to each."""
    left, right = ([f"{side}{k}" for k in range(size)] for side in "ab")
    sums = ", ".join(f"{a} + {b}" for a, b in zip(left, right))
    return f"@triton.jit\ndef add{size}({', '.join(left + right)}):\n    return {sums}\n\n\n"


def layout_of(program: Program) -> Layout:
    nodes = needed_in_order(program)
    read = sorted({source[0] for node in nodes if (source := program.graph.source[node]) is not None})
    firsts: dict[int, int] = {}
    for operand in read:
        index = program.inputs[operand].index
        if index is not None:
            firsts.setdefault(index, operand)
    gathered = list(firsts.values())
    written = [place for place, nodes_of in enumerate(program.nodes) if any(node is not None for node in nodes_of)]
    return Layout(nodes, read, gathered, written)


class _Writer:
    def __init__(self, program: Program, index: int | None) -> None:
        self.program, self.graph, self.index = program, program.graph, index
        self.layout = layout_of(program)
        self.summed = self.graph.summed(self.layout.nodes)
        self.lines: list[str] = []
        self.indent = 1
        self.scaled: dict[tuple[float, int], str] = {}
        self.loaded: set[int] = set()
        self.sizes: set[int] = set()  # of sums taken together

    # ------------------------------------------------------------------------------------------------------- structure

    def text(self) -> str:
        if self.index is None:
            self._plain()
        else:
            self._segments()
        helpers = "".join(_adder(size) for size in sorted(self.sizes))
        arguments = self._arguments()
        # one kernel for any number of rows, and for indices wherever they lie in memory
        indices = [name for name in arguments if name[0] == "g" or name in ("order", "bounds")]
        jit = f"@triton.jit(do_not_specialize=['num_rows'], do_not_specialize_on_alignment={indices})"
        head = f"{jit}\ndef {FUNCTION}(\n    {', '.join(arguments)},\n):\n"
        return HEAD + helpers + head + "\n".join(self.lines) + "\n"

    def _arguments(self) -> list[str]:
        layout = self.layout
        names = [*(f"i{k}" for k in layout.read), *(f"g{k}" for k in layout.gathered)]
        constants = ["C", "ROWS", "BLOCK", "REAL", "TOGETHER"]
        if self.index is not None:
            names += ["order", "bounds"]
            constants += ["ORDERED", "PARTS"]
        return [
            *names,
            *(f"o{k}" for k in layout.written),
            "num_rows",
            *(f"{name}: tl.constexpr" for name in constants),
        ]

    def _plain(self) -> None:
        self._line("row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]")
        self._line("known = row < num_rows")
        self._rows()
        for place in self.layout.written:
            self._line(f"q{place} = o{place} + row * ({self._size(self.program.outputs[place])})")
        dots = [node for node in self.layout.nodes if node in self.summed and self.graph.is_dot(node)]
        self._scalars(node for node in self.layout.nodes if node not in self.summed)
        if any(self.graph.vector[node] for node in self.layout.nodes):
            for node in dots:
                self._line(f"v{node} = tl.zeros((ROWS, BLOCK), REAL)")
            sums_channels = any(not self.program.outputs[place].operand.has_channels for place in self.layout.written)
            if sums_channels:
                self._line("for block in range(0, (C + BLOCK - 1) // BLOCK):")
                self.indent += 1
            self._channels("block" if sums_channels else "tl.program_id(1)")
            self._vectors(set(dots))
            self.indent = 1
        self._reduce([f"v{node}" for node in dots], 1)
        self._scalars(node for node in self.layout.nodes if node in self.summed and node not in dots)
        self._line("lane = tl.zeros((ROWS, BLOCK), tl.int32)")
        self._line("once = known & (tl.arange(0, BLOCK) == 0)[None, :]")
        for place in self.layout.written:
            if not self.program.outputs[place].operand.has_channels:
                for component, target in enumerate(self.program.nodes[place]):
                    if target is not None:
                        value = f"tl.broadcast_to({self._value(target)}, (ROWS, BLOCK))"
                        self._line(f"tl.store(q{place} + {component} + lane, {value}, mask=once)")

    def _segments(self) -> None:
        self._line("segment = tl.program_id(0).to(tl.int64)")
        self._line("part = tl.program_id(2)")
        self._line("begin = tl.load(bounds + segment)")
        self._line("count = tl.load(bounds + segment + 1) - begin")
        self._line("last = begin + count * (part + 1) // PARTS")
        targets = [
            (place, component, node)
            for place in self.layout.written
            for component, node in enumerate(self.program.nodes[place])
            if node is not None
        ]
        for place, component, _ in targets:
            self._line(f"t{place}_{component} = tl.zeros((ROWS, BLOCK), REAL)")
        self._line("for start in range(begin + count * part // PARTS, last, ROWS):")
        self.indent += 1
        self._line("place = (start + tl.arange(0, ROWS))[:, None]")
        self._line("known = place < last")
        self._line("if ORDERED:")
        self._line("    row = tl.load(order + place, mask=known, other=0)")
        self._line("else:")
        self._line("    row = place")
        self._rows()
        self._scalars(self.layout.nodes)
        self._channels("tl.program_id(1)")
        self._vectors(set(), {node: f"t{place}_{component}" for place, component, node in targets})
        self.indent = 1
        # stored by the first row of the tile: a tile of its own shape would have to be exchanged between warps
        self._line("target = tl.broadcast_to((tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :], (ROWS, BLOCK))")
        self._line("once = (tl.arange(0, ROWS)[:, None] == 0) & (target < C)")
        for place in self.layout.written:
            size = self._size(self.program.outputs[place])
            self._line(f"q{place} = o{place} + (part.to(tl.int64) * num_rows + segment) * ({size}) + target")
        self._reduce([f"t{place}_{component}" for place, component, _ in targets], 0)
        for place, component, _ in targets:
            total = f"tl.broadcast_to(t{place}_{component}, (ROWS, BLOCK))"
            self._line(f"tl.store(q{place} + {component} * C, {total}, mask=once)")

    def _reduce(self, names: list[str], axis: int) -> None:
        """Sums of tiles over an axis; compiled code takes them together, with one exchange between warps."""
        if not names:
            return
        self._line("if TOGETHER:")
        for start in range(0, len(names), SUMS_TOGETHER):
            some = names[start : start + SUMS_TOGETHER]
            self.sizes.add(len(some))
            given = f"({', '.join(some)})" if len(some) > 1 else some[0]
            self._line(f"    {', '.join(some)} = tl.reduce({given}, {axis}, add{len(some)}, keep_dims=True)")
        self._line("else:")
        for name in names:
            self._line(f"    {name} = tl.sum({name}, axis={axis}, keep_dims=True)")

    def _rows(self) -> None:
        """Addresses of the rows of the inputs; nothing is read for rows that are not there."""
        read: set[int] = set()
        for operand in self.layout.read:
            slot = self.program.inputs[operand]
            if slot.index is not None and slot.index not in read:
                read.add(slot.index)
                self._line(f"r{slot.index} = tl.load(g{operand} + row, mask=known, other=0).to(tl.int64)")
            at = "row" if slot.index is None else f"r{slot.index}"
            self._line(f"p{operand} = i{operand} + {at} * ({self._size(slot)})")

    def _channels(self, block: str) -> None:
        self._line(f"channel = ({block} * BLOCK + tl.arange(0, BLOCK))[None, :]")
        self._line("if C % BLOCK == 0:")
        self._line("    inside = known")
        self._line("else:")
        self._line("    inside = known & (channel < C)")

    def _scalars(self, nodes: Iterable[int]) -> None:
        for node in nodes:
            if self.graph.vector[node]:
                continue
            source = self.graph.source[node]
            if source is not None:
                operand, component = source
                self._line(f"v{node} = tl.load(p{operand} + {component}, mask=known, other=0.0).to(REAL)")
            else:
                self._sum(f"v{node}", node, "")

    def _vectors(self, dots: set[int], totals: dict[int, str] | None = None) -> None:
        """The part of the body that has channels; ``totals`` names what a node is added to."""
        self._hoist()
        inputs = [node for node in self.layout.nodes if self._is_vector_input(node)]
        if len(inputs) <= READ_AHEAD:
            for node in inputs:
                self._load(node)
        stores: dict[int, list[tuple[int, int]]] = {}
        for place in self.layout.written:
            if self.program.outputs[place].operand.has_channels:
                for component, target in enumerate(self.program.nodes[place]):
                    if target is not None:
                        stores.setdefault(target, []).append((place, component))
        for node in self.layout.nodes:
            if node in dots:
                self._sum(f"v{node}", node, f"v{node}")
                continue
            if not self.graph.vector[node]:
                continue
            if self._is_vector_input(node):
                self._load(node)
            else:
                self._sum(f"v{node}", node, "")
            for place, component in stores.get(node, ()):
                if totals is None:
                    self._line(f"tl.store(q{place} + {component} * C + channel, {self._value(node)}, mask=inside)")
                else:
                    name = f"t{place}_{component}"
                    self._line(f"{name} += {self._value(node)}")

    # ------------------------------------------------------------------------------------------------------ arithmetic

    def _line(self, text: str) -> None:
        self.lines.append("    " * self.indent + text)

    def _size(self, slot: Slot) -> str:
        return f"{slot.operand.dim} * C" if slot.operand.has_channels else str(slot.operand.dim)

    def _is_vector_input(self, node: int) -> bool:
        return self.graph.vector[node] and self.graph.source[node] is not None

    def _load(self, node: int) -> None:
        if node not in self.loaded:
            self.loaded.add(node)
            operand, component = self.graph.source[node]  # type: ignore[misc]
            self._line(f"v{node} = tl.load(p{operand} + {component} * C + channel, mask=inside, other=0.0).to(REAL)")

    def _value(self, node: int) -> str:
        return f"v{node}"

    def _hoist(self) -> None:
        """Coefficient times a number without channels, once for all terms that have both."""
        for node in self.layout.nodes:
            if not self.graph.vector[node] and not self.graph.is_dot(node):
                continue
            for coefficient, a, b in self.graph.terms[node]:
                if b < 0 or coefficient in (1.0, -1.0) or self.graph.vector[a] == self.graph.vector[b]:
                    continue
                scalar = b if self.graph.vector[a] else a
                if (coefficient, scalar) not in self.scaled:
                    name = f"h{len(self.scaled)}"
                    self.scaled[coefficient, scalar] = name
                    self._line(f"{name} = {self._value(scalar)} * {coefficient!r}")

    def _term(self, term: Term) -> str:
        coefficient, a, b = term
        if b < 0:
            return self._value(a) if coefficient == 1.0 else f"{self._value(a)} * {coefficient!r}"
        if self.graph.vector[b] and not self.graph.vector[a]:
            a, b = b, a
        if coefficient == 1.0:
            return f"{self._value(a)} * {self._value(b)}"
        scaled = self.scaled.get((coefficient, b)) if self.graph.vector[a] and not self.graph.vector[b] else None
        if scaled:
            return f"{self._value(a)} * {scaled}"
        return f"{self._value(a)} * {coefficient!r} * {self._value(b)}"

    def _sum(self, name: str, node: int, before: str) -> None:
        terms = [self._term(term) for term in self.graph.terms[node]]
        if not terms:
            raise NotImplementedError("a sum without terms")
        for start in range(0, len(terms), TERMS_PER_LINE):
            known = [before] if before else []
            self._line(f"{name} = {' + '.join([*known, *terms[start : start + TERMS_PER_LINE]])}")
            before = name
