"""How the outputs of a program are divided among Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor

from steradian.polynomials.program import Program

__all__ = ["Part", "SortedRows", "parts_of"]

#: Terms of a kernel. Compiled for sm_90 with a channel per thread, the kernels of MACE (correlation 3, l_max 3) up to
#: this size keep within 255 registers without spilling; one and a half times as many terms take ten times as long to
#: compile, three times as many spill (benchmarks/gpu_compile.py).
MOST_TERMS = 1000
#: Sums that one kernel keeps in registers from row to row.
MOST_SUMS = 96


class SortedRows(NamedTuple):
    """The sorted form of a row index (:class:`~steradian.graph.topology.Rows`), as kernels read it."""

    order: Tensor | None
    bounds: Tensor


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


_PARTS: WeakKeyDictionary[Program, list[Part]] = WeakKeyDictionary()


def parts_of(program: Program) -> list[Part]:
    """The kernels of a program; kept with it.

    Outputs in the order of the work share a kernel, as do those scattered by one index; what is too large is divided
    by components. An output without channels that is scattered is given in the order of the work: its rows are summed
    afterwards.
    """
    if program not in _PARTS:
        groups: dict[int | None, list[int]] = {}
        for position, slot in enumerate(program.outputs):
            groups.setdefault(slot.index if slot.operand.has_channels else None, []).append(position)
        _PARTS[program] = [
            part for index, positions in groups.items() for part in _divided(program, index, tuple(positions))
        ]
    return _PARTS[program]


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
