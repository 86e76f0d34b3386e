"""A program as the flat tables that a compiled loop reads."""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass

import numpy as np

from steradian.kernels.program import Program, Term

__all__ = ["Tape", "tape_of"]

VECTOR, DOT, SCALAR = 0, 1, 2


@dataclass(frozen=True)
class Tape:
    """Instructions in order; places of vectors and of scalars are numbered separately.

    Attributes:
        nodes: ``[n, 8]`` int64: kind, place of the result, whether it adds to what is there, then the bounds of its
            terms: first, end of ``vector``, end of ``scalar * vector``, end of ``coefficient * vector * vector``, end
            of ``vector * vector``. Scalar nodes: first, end of ``scalar``, end of ``scalar * scalar``.
        factors: ``[T, 2]`` int64 places of the factors (the first one is the vector where there is one).
        coefficients: ``[T]`` float64.
        loads: ``[L, 4]`` int64 of the inputs in use: operand, component, place, 1 for a vector.
        load_bounds: ``[inputs + 1]`` int64, loads of each input.
        stores: ``[S, 4]`` int64 of the outputs: output, component, place, 1 for a vector.
        num_vectors: places of vectors; the first ``num_buffers`` of them are memory of the loop's own.
        num_buffers, num_scalars: as said.
        complete: for each output whether every component has a node.
        weight: multiply-adds per row and channel.
    """

    nodes: np.ndarray
    factors: np.ndarray
    coefficients: np.ndarray
    loads: np.ndarray
    load_bounds: np.ndarray
    stores: np.ndarray
    num_vectors: int
    num_buffers: int
    num_scalars: int
    complete: tuple[bool, ...]
    weight: int


def tape_of(program: Program) -> Tape:
    """Lay out the nodes that the outputs need, reusing the memory of those no longer needed."""
    return _Layout(program).tape()


class _Layout:
    def __init__(self, program: Program) -> None:
        self.program, self.graph = program, program.graph
        self.order = self._needed()
        self._check_channel_sums()
        self.last_use = self._last_uses()
        self.place: dict[int, int] = {}
        self.nodes: list[list[int]] = []
        self.factors: list[tuple[int, int]] = []
        self.coefficients: list[float] = []
        self.free: list[int] = []
        self.num_buffers = 0
        self.num_scalars = 0

    def _needed(self) -> list[int]:
        needed = {node for nodes in self.program.nodes for node in nodes if node is not None}
        stack = list(needed)
        while stack:
            for _, a, b in self.graph.terms[stack.pop()]:
                for node in (a, b):
                    if node >= 0 and node not in needed:
                        needed.add(node)
                        stack.append(node)
        return sorted(needed)  # nodes are added in topological order

    def _check_channel_sums(self) -> None:
        """Channels are worked on block by block, so what follows a sum over channels must be linear in it."""
        summed: set[int] = set()
        for node in self.order:
            parts = []
            for _, a, b in self.graph.terms[node]:
                dot = b >= 0 and self.graph.vector[a] and self.graph.vector[b] and not self.graph.vector[node]
                parts.append(int(dot) + (a in summed) + (b in summed))
            if any(parts):
                if self.graph.vector[node] or any(part != 1 for part in parts):
                    raise NotImplementedError("a polynomial that is not linear in a sum over channels")
                summed.add(node)

    def _last_uses(self) -> dict[int, int]:
        last = {}
        for node in self.order:
            for _, a, b in self.graph.terms[node]:
                last[a] = node
                if b >= 0:
                    last[b] = node
        return last

    def tape(self) -> Tape:
        graph = self.graph
        inputs = [node for node in self.order if graph.source[node] is not None]
        direct = self._direct_outputs()
        # vector places: buffers first, then inputs and outputs, whose number is known only at the end
        symbolic: dict[tuple[str, int], int] = {}

        def far(kind: str, key: int) -> int:
            return symbolic.setdefault((kind, key), -1 - len(symbolic))

        for node in inputs:
            self.place[node] = far("in", node) if graph.vector[node] else self._new_scalar()
        flat = [(o, c, node) for o, nodes in enumerate(self.program.nodes) for c, node in enumerate(nodes)]
        stores: list[tuple[int, int, int, int]] = []
        for node in self.order:
            if graph.source[node] is not None:
                continue
            if node in direct and graph.vector[node]:
                output, component = direct[node]
                self.place[node] = far("out", output * 10**6 + component)
                self._emit(node, self.place[node], self.program.outputs[output].index is not None)
            else:
                self.place[node] = self._new_buffer() if graph.vector[node] else self._new_scalar()
                self._emit(node, self.place[node], False)
            self._release(node)
        for output, component, node in flat:
            if node is None:
                continue
            if not graph.vector[node]:
                stores.append((output, component, self.place[node], 0))
                continue
            place = far("out", output * 10**6 + component)
            if direct.get(node) != (output, component):
                self._copy(node, place, self.program.outputs[output].index is not None)
            stores.append((output, component, place, 1))

        def final(place: int) -> int:
            return place if place >= 0 else self.num_buffers - 1 - place

        for row in self.nodes:
            if row[0] == VECTOR:
                row[1] = final(row[1])
        is_vector_place = self._vector_columns()
        factors = [
            (final(a) if va else a, final(b) if vb else b) for (a, b), (va, vb) in zip(self.factors, is_vector_place)
        ]
        loads = sorted(
            (*graph.source[node], final(self.place[node]) if graph.vector[node] else self.place[node],
             int(graph.vector[node]))
            for node in inputs
        )  # fmt: skip
        bounds = np.searchsorted([load[0] for load in loads], np.arange(len(self.program.inputs) + 1))
        return Tape(
            _table(self.nodes, 8),
            _table(factors, 2),
            np.array(self.coefficients, dtype=np.float64),
            _table(loads, 4),
            bounds.astype(np.int64),
            _table([(o, c, final(p) if v else p, v) for o, c, p, v in stores], 4),
            self.num_buffers + len(symbolic),
            self.num_buffers,
            max(self.num_scalars, 1),
            tuple(all(node is not None for node in nodes) for nodes in self.program.nodes),
            sum(row[7] - row[3] for row in self.nodes if row[0] != SCALAR),
        )

    def _direct_outputs(self) -> dict[int, tuple[int, int]]:
        """Nodes that are computed straight into an output: those nobody else reads."""
        direct: dict[int, tuple[int, int]] = {}
        uses = Counter(node for nodes in self.program.nodes for node in nodes)
        for output, nodes in enumerate(self.program.nodes):
            scattered = self.program.outputs[output].index is not None
            for component, node in enumerate(nodes):
                if node is None or self.graph.source[node] is not None or node in direct:
                    continue
                # a sum over rows is not the value of the node, which others want to read
                if not scattered or (node not in self.last_use and uses[node] == 1):
                    direct[node] = (output, component)
        return direct

    def _new_buffer(self) -> int:
        if self.free:
            return heapq.heappop(self.free)
        self.num_buffers += 1
        return self.num_buffers - 1

    def _new_scalar(self) -> int:
        self.num_scalars += 1
        return self.num_scalars - 1

    def _release(self, node: int) -> None:
        outputs = {n for nodes in self.program.nodes for n in nodes}
        for _, a, b in self.graph.terms[node]:
            for factor in {a, b}:
                ends = factor >= 0 and self.last_use[factor] == node and factor not in outputs
                if ends and self.graph.vector[factor] and self.graph.source[factor] is None and self.place[factor] >= 0:
                    heapq.heappush(self.free, self.place[factor])

    def _emit(self, node: int, place: int, adds: bool) -> None:
        terms = self.graph.terms[node]
        vector = self.graph.vector
        if vector[node]:
            groups = (
                [t for t in terms if t[2] < 0],
                [t for t in terms if t[2] >= 0 and not vector[t[2]]],
                [t for t in terms if t[2] >= 0 and vector[t[2]] and t[0] != 1.0],
                [t for t in terms if t[2] >= 0 and vector[t[2]] and t[0] == 1.0],
            )
            self._append(VECTOR, place, adds, groups)
            return
        dots = [t for t in terms if t[2] >= 0 and vector[t[1]]]
        rest = [t for t in terms if not (t[2] >= 0 and vector[t[1]])]
        if dots:
            unit = [t for t in dots if t[0] == 1.0]
            self._append(DOT, place, False, ([], [], [t for t in dots if t[0] != 1.0], unit))
        if rest or not dots:
            groups = ([t for t in rest if t[2] < 0], [t for t in rest if t[2] >= 0], [], [])
            self._append(SCALAR, place, bool(dots), groups)

    def _copy(self, node: int, place: int, adds: bool) -> None:
        self._append(VECTOR, place, adds, ([(1.0, node, -1)], [], [], []))

    def _append(self, kind: int, place: int, adds: bool, groups: tuple[list[Term], ...]) -> None:
        row = [kind, place, int(adds), len(self.factors)]
        for group in groups:
            for coefficient, a, b in group:
                self.factors.append((self.place[a], 0 if b < 0 else self.place[b]))
                self.coefficients.append(coefficient)
            row.append(len(self.factors))
        self.nodes.append(row)

    def _vector_columns(self) -> list[tuple[bool, bool]]:
        """For each term whether its factors are places of vectors."""
        columns = [(False, False)] * len(self.factors)
        for kind, _, _, start, first, second, _, stop in self.nodes:
            for term in range(start, stop):
                if kind == SCALAR:
                    continue
                columns[term] = (True, term >= second if kind == VECTOR else True)
                if kind == VECTOR and term < first:
                    columns[term] = (True, False)
        return columns


def _table(rows: list, width: int) -> np.ndarray:
    return np.ascontiguousarray(np.array(rows, dtype=np.int64).reshape(-1, width))
