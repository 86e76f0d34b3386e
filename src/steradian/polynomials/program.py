"""Polynomials as programs: a graph of sums of products, and its derivatives.

A :class:`Graph` holds nodes, each a number (``scalar``) or a row of channels (``vector``) per row of the work. A node
is an input component or a sum of terms, each a coefficient times one or two nodes:

====================  ====================================================
in a vector node      vector; scalar * vector; vector * vector
in a scalar node      scalar; scalar * scalar; sum over channels of vector * vector
====================  ====================================================

The set is closed under differentiation (:meth:`Program.gradient` is reverse mode on the graph), so first and second
derivatives of a polynomial are programs of the same form, run by the same loop (:mod:`steradian.polynomials.cpu`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from steradian.graph.topology import Rows, rows_of
from steradian.polynomials.polynomial import Made, Operand, Polynomial, Terms

__all__ = ["Graph", "Program", "RowIndices", "Slot", "folded", "needed_in_order", "program_of"]

Term = tuple[float, int, int]
"""Coefficient, node, node or -1."""


@dataclass
class Graph:
    """Nodes of one or several programs, added in topological order; equal nodes are stored once.

    Attributes:
        vector: for each node whether it has channels.
        source: ``(operand, component)`` of an input node, None otherwise.
        terms: the terms of a node, empty for inputs.
    """

    vector: list[bool] = field(default_factory=list)
    source: list[tuple[int, int] | None] = field(default_factory=list)
    terms: list[tuple[Term, ...]] = field(default_factory=list)
    _known: dict[tuple, int] = field(default_factory=dict)

    def _add(self, key: tuple, vector: bool, source: tuple[int, int] | None, terms: tuple[Term, ...]) -> int:
        if key not in self._known:
            self._known[key] = len(self.vector)
            self.vector.append(vector)
            self.source.append(source)
            self.terms.append(terms)
        return self._known[key]

    def input(self, operand: int, component: int, vector: bool) -> int:
        return self._add((operand, component), vector, (operand, component), ())

    def sum(self, terms: list[Term], vector: bool) -> int:
        """The node of a sum of terms; like terms are added up, and a bare node stands for itself."""
        merged: dict[tuple[int, int], float] = defaultdict(float)
        for coefficient, a, b in terms:
            # couplings list x_i x_j and x_j x_i apart, the product rule brings more such: in order they are one
            # multiply-add
            merged[(a, b) if b < 0 or self._first(a, b) else (b, a)] += coefficient
        cleaned = tuple((coefficient, a, b) for (a, b), coefficient in merged.items() if coefficient != 0.0)
        if not vector:
            # a sum over channels is a node of its own
            dots = tuple(term for term in cleaned if self._is_dot(term))
            if dots and len(dots) < len(cleaned):
                rest = tuple(term for term in cleaned if not self._is_dot(term))
                cleaned = (*rest, (1.0, self._add(("sum", False, tuple(sorted(dots))), False, None, dots), -1))
        if len(cleaned) == 1:
            coefficient, a, b = cleaned[0]
            if coefficient == 1.0 and b < 0 and self.vector[a] == vector:
                return a
        return self._add(("sum", vector, tuple(sorted(cleaned))), vector, None, cleaned)

    def _is_dot(self, term: Term) -> bool:
        """Whether a term is a product of rows of channels, which in a scalar node is summed over the channels."""
        return term[2] >= 0 and self.vector[term[1]] and self.vector[term[2]]

    def is_dot(self, node: int) -> bool:
        """Whether a node is a scalar that is a sum over channels."""
        return not self.vector[node] and any(self._is_dot(term) for term in self.terms[node])

    def summed(self, order: Sequence[int]) -> set[int]:
        """Of nodes in order those that come out of sums over channels: known when all channels have been seen.

        Raises:
            NotImplementedError: one of them has channels. Cannot come of differentiating a polynomial, where one
                channel does not depend on another.
        """
        found: set[int] = set()
        for node in order:
            later = any(a in found or b in found for _, a, b in self.terms[node])
            if later and self.vector[node]:
                raise NotImplementedError("channels that depend on a sum over channels")
            if later or self.is_dot(node):
                found.add(node)
        return found

    def _first(self, a: int, b: int) -> bool:
        """Whether a comes first in a product: vectors before scalars, then older nodes."""
        if self.vector[a] != self.vector[b]:
            return self.vector[a]
        return a <= b


@dataclass(frozen=True)
class Slot:
    """An input or output of a program.

    Attributes:
        operand: name, number of components, channels or none.
        index: number of the row index that gathers (or scatters) it; None where row b of the work is row b.
    """

    operand: Operand
    index: int | None


@dataclass(eq=False)
class Program:
    """Inputs to outputs on a graph; compared by identity.

    Attributes:
        graph: shared by a program and its derivatives.
        inputs: operand k of the graph is ``inputs[k]``.
        outputs: the slots of the outputs.
        nodes: for each output the node of each component, None where the component is zero.
        locality: number of a row index; rows that share it are worked on one after the other where no output decides.
        polynomial: whose program it is, or None.
        derived: of which program it is the derivative, by which inputs, with which outputs' cotangents; or None.
        made: derivatives, machine code and so on, by their makers.
    """

    graph: Graph
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    nodes: tuple[tuple[int | None, ...], ...]
    locality: int | None = None
    polynomial: Polynomial | None = None
    derived: tuple[Program, tuple[bool, ...], tuple[bool, ...]] | None = None
    made: Made = field(default_factory=Made, init=False, repr=False)

    def gradient(self, wanted: tuple[bool, ...], given: tuple[bool, ...]) -> Program:
        """The program of the derivatives of ``sum(outputs * cotangents)`` by the wanted inputs.

        Its inputs are those of this program followed by the cotangents of the given outputs.
        """
        program: Program = self.made.once(("gradient", wanted, given), lambda: self._make_gradient(wanted, given))
        return program

    def _make_gradient(self, wanted: tuple[bool, ...], given: tuple[bool, ...]) -> Program:
        # Reverse mode: the adjoint of a node is the sum over its users of what their adjoints pass down, so nodes are
        # visited from the last to the first, each when all of its users are done. Operands are numbered per program, so
        # the derivative gets a graph of its own with this one's nodes first.
        graph = Graph(list(self.graph.vector), list(self.graph.source), list(self.graph.terms), dict(self.graph._known))
        inputs = list(self.inputs)
        adjoint: dict[int, list[Term]] = defaultdict(list)
        for slot, nodes, is_given in zip(self.outputs, self.nodes, given):
            if not is_given:
                continue
            for component, node in enumerate(nodes):
                if node is not None:
                    seed = graph.input(len(inputs), component, slot.operand.has_channels)
                    adjoint[node].append((1.0, seed, -1))
            inputs.append(Slot(replace(slot.operand, name=f"d {slot.operand.name}"), slot.index))
        last = len(self.graph.vector)
        results: dict[int, int] = {}
        # where forces alone are asked for, nothing is formed that only leads to weights
        needed = self._depends_on(wanted)
        for node in range(last - 1, -1, -1):
            if node not in adjoint or not needed[node]:
                continue
            bar = graph.sum(adjoint[node], graph.vector[node])
            results[node] = bar
            for coefficient, a, b in self.graph.terms[node]:
                if b < 0:
                    adjoint[a].append((coefficient, bar, -1))
                    continue
                for one, other in ((a, b), (b, a)):  # the product rule; a square passes down both
                    if needed[one]:
                        adjoint[one].append((coefficient, bar, other))
        outputs, nodes_out = [], []
        for position, (slot, is_wanted) in enumerate(zip(self.inputs, wanted)):
            if not is_wanted:
                continue
            outputs.append(slot)
            known = [graph._known.get((position, component)) for component in range(slot.operand.dim)]
            nodes_out.append(tuple(None if node is None else results.get(node) for node in known))
        origin = (self, wanted, given)
        return Program(graph, tuple(inputs), tuple(outputs), tuple(nodes_out), self.locality, derived=origin)

    def _depends_on(self, wanted: tuple[bool, ...]) -> list[bool]:
        """For each node whether it depends on a wanted input."""
        depends: list[bool] = []
        for source, terms in zip(self.graph.source, self.graph.terms):
            if source is not None:
                depends.append(source[0] < len(wanted) and wanted[source[0]])
            else:
                depends.append(any(depends[a] or (b >= 0 and depends[b]) for _, a, b in terms))
        return depends

    @property
    def num_terms(self) -> int:
        """Terms that the outputs need."""
        seen: set[int] = set()
        stack = [node for nodes in self.nodes for node in nodes if node is not None]
        count = 0
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                count += len(self.graph.terms[node])
                stack += [factor for _, a, b in self.graph.terms[node] for factor in (a, b) if factor >= 0]
        return count

    def contents(self) -> str:
        """Everything that code made of it depends on; equal in every process."""
        graph = self.graph
        slots = [
            [
                (one.operand.dim, one.operand.has_channels, one.operand.read_once, one.operand.period, one.index)
                for one in side
            ]
            for side in (self.inputs, self.outputs)
        ]
        nodes = [(node, graph.vector[node], graph.source[node], graph.terms[node]) for node in needed_in_order(self)]
        return repr((slots, self.nodes, nodes))

    def part(self, positions: tuple[int, ...]) -> Program:
        """The same program with some of the outputs only."""
        outputs = tuple(self.outputs[position] for position in positions)
        return Program(
            self.graph, self.inputs, outputs, tuple(self.nodes[position] for position in positions), self.locality
        )


def needed_in_order(program: Program) -> list[int]:
    """Nodes that the outputs need, each just before its first use: values live for a short time."""
    graph, seen = program.graph, set()
    order: list[int] = []
    for nodes in program.nodes:
        for target in nodes:
            stack = [(target, False)] if target is not None else []
            while stack:
                node, ready = stack.pop()
                if ready:
                    order.append(node)
                    continue
                if node in seen:
                    continue
                seen.add(node)
                stack.append((node, True))
                for _, a, b in reversed(graph.terms[node]):
                    stack += [(factor, False) for factor in (b, a) if factor >= 0 and factor not in seen]
    return order


def program_of(
    polynomial: Polynomial, gathers: tuple[int | None, ...], scatter: int | None, locality: int | None = None
) -> Program:
    """The program of a polynomial; ``gathers``, ``scatter`` and ``locality`` number the row indices."""
    graph = Graph()
    sums: list[list[Term]] = [[] for _ in range(polynomial.output.dim)]
    # monomials as paths through a tree of their factors in ascending order: what begins alike shares a node of Horner's
    # form; weights that are linear (``outer``) stand at its root
    tries: dict[int, dict] = defaultdict(dict)
    for group in polynomial.terms:
        for indices, output, coefficient in zip(group.indices, group.outputs, group.coefficients):
            factors = [(operand, int(index)) for operand, index in zip(group.factors, indices)]
            outer = [factor for factor in factors if factor[0] == polynomial.outer]
            inner = sorted(factor for factor in factors if factor[0] != polynomial.outer)
            entry = tries[int(output)].setdefault(tuple(outer), {})
            _insert(entry, inner, float(coefficient))
    builder = _Builder(graph, polynomial)
    for output, by_outer in tries.items():
        sums[output] = builder.output(by_outer)
    vector = polynomial.output.has_channels
    nodes = tuple(graph.sum(terms, vector) if terms else None for terms in sums)
    inputs = tuple(Slot(operand, index) for operand, index in zip(polynomial.inputs, gathers))
    return Program(graph, inputs, (Slot(polynomial.output, scatter),), (nodes,), locality, polynomial)


@dataclass(frozen=True)
class RowIndices:
    """The row indices of one evaluation, each once.

    Attributes:
        rows: the indices, prepared or not.
        gathers, scatter, locality: their numbers, as the slots of a program have them.
    """

    rows: list[Rows]
    gathers: tuple[int | None, ...]
    scatter: int | None
    locality: int | None

    @classmethod
    def of(
        cls,
        inputs: Sequence[Tensor],
        gathers: Sequence[Rows | Tensor | None],
        scatter: Rows | Tensor | None,
        num_rows: int | None,
        locality: Rows | Tensor | None = None,
    ) -> RowIndices:
        """Number the indices of :func:`steradian.polynomials.evaluate`; ``locality`` is one of ``gathers``."""
        given: list[Rows | Tensor] = []
        rows: list[Rows] = []

        def number(index: Rows | Tensor | None, count: int | None) -> int | None:
            if index is None:
                return None
            for position, known in enumerate(given):
                # receivers gather and scatter in one call: the same tensor is looked at and sorted once
                if known is index and count in (None, rows[position].num_rows):
                    return position
            given.append(index)
            rows.append(rows_of(index, count or 0))
            return len(rows) - 1

        gathered = tuple(number(index, value.shape[0]) for index, value in zip(gathers, inputs))
        return cls(rows, gathered, number(scatter, num_rows or 0), number(locality, None))

    def num_work(self, inputs: Sequence[Tensor]) -> int:
        """Rows of the work."""
        return len(self.rows[0]) if self.rows else inputs[0].shape[0]


def _insert(trie: dict, factors: list[tuple[int, int]], coefficient: float) -> None:
    for factor in factors:
        trie = trie.setdefault(factor, {})
    trie[None] = trie.get(None, 0.0) + coefficient


class _Builder:
    """Nodes of a polynomial in Horner's form: ``x_i (c_i + x_j (c_ij + ...))``."""

    def __init__(self, graph: Graph, polynomial: Polynomial) -> None:
        self.graph, self.polynomial = graph, polynomial

    def node(self, factor: tuple[int, int]) -> int:
        return self.graph.input(*factor, self._channels_of(factor))

    def output(self, by_outer: dict[tuple, dict]) -> list[Term]:
        """Terms of one output component."""
        if all(len(outer) == 1 and _is_monomial(trie) for outer, trie in by_outer.items()):
            # every weight has one monomial: the weights are the coefficients of Horner's form
            weighted: dict = {}
            for outer, trie in by_outer.items():
                factors, coefficient = _monomial(trie)
                place = weighted
                for factor in factors:
                    place = place.setdefault(factor, {})
                place.setdefault("weights", []).append((coefficient, self.node(outer[0]), -1))
            return self.horner(weighted)
        terms: list[Term] = []
        for outer, trie in by_outer.items():
            weight = self.node(outer[0]) if outer else None
            if self._has_scalars(trie) and (self._has_channels(trie) or (outer and self._channels_of(outer[0]))):
                terms += self.expanded(weight, trie)
            elif weight is None:
                terms += self.horner(trie)
            else:
                terms.append((1.0, weight, self.graph.sum(self.horner(trie), self._has_channels(trie))))
        return terms

    def expanded(self, weight: int | None, trie: dict) -> list[Term]:
        """Every monomial as ``c (w x_i ...) (y_j ...)``: the product with channels is shared by all that read it.

        Scalars are left as factors of the terms: sums of them would be nodes of their own, and their derivatives one
        sum over channels each.
        """
        terms: list[Term] = []
        for factors, coefficient in _monomials(trie):
            vectors = [self.node(factor) for factor in factors if self._channels_of(factor)]
            scalars = [self.node(factor) for factor in factors if not self._channels_of(factor)]
            if weight is not None:
                vectors.insert(0, weight)
            parts = [self._product(nodes, vector) for nodes, vector in ((vectors, True), (scalars, False)) if nodes]
            terms.append((coefficient, parts[0], parts[1] if len(parts) == 2 else -1))
        return terms

    def _product(self, nodes: list[int], vector: bool) -> int:
        product = nodes[0]
        for node in nodes[1:]:
            product = self.graph.sum([(1.0, product, node)], vector)
        return product

    def _channels_of(self, factor: tuple[int, int]) -> bool:
        return self.polynomial.inputs[factor[0]].has_channels

    def _has_scalars(self, trie: dict) -> bool:
        return any(
            not self._channels_of(factor) or self._has_scalars(rest)
            for factor, rest in trie.items()
            if factor not in (None, "weights")
        )

    def horner(self, trie: dict) -> list[Term]:
        """Terms of ``sum_factor factor * (rest)`` plus the weights that end here."""
        terms: list[Term] = list(trie.get("weights", ()))
        for factor, rest in trie.items():
            if factor in (None, "weights"):
                continue
            node = self.node(factor)
            deeper = [key for key in rest if key not in (None, "weights")]
            if None in rest:
                terms.append((rest[None], node, -1))
            if deeper and not rest.get("weights") and len(deeper) == 1 and _is_leaf(rest[deeper[0]]):
                # a bare product needs no node of its own
                terms.append((rest[deeper[0]][None], node, self.node(deeper[0])))
            elif deeper or rest.get("weights"):
                inner = self.horner({key: value for key, value in rest.items() if key is not None})
                if len(inner) == 1 and inner[0][2] < 0:
                    terms.append((inner[0][0], node, inner[0][1]))
                else:
                    terms.append((1.0, node, self.graph.sum(inner, self._has_channels(rest))))
        return terms

    def _has_channels(self, trie: dict) -> bool:
        if trie.get("weights"):
            return True
        for factor, rest in trie.items():
            if factor in (None, "weights"):
                continue
            if self._channels_of(factor) or self._has_channels(rest):
                return True
        return False


def _monomials(trie: dict) -> list[tuple[list[tuple[int, int]], float]]:
    """Every product of a trie with its coefficient."""
    found: list[tuple[list[tuple[int, int]], float]] = []
    for factor, rest in trie.items():
        if factor is None:
            found.append(([], rest))
        else:
            found += [([factor, *deeper], coefficient) for deeper, coefficient in _monomials(rest)]
    return found


def _is_leaf(trie: dict) -> bool:
    return set(trie) == {None}


def _is_monomial(trie: dict) -> bool:
    while set(trie) != {None}:
        if len(trie) != 1:
            return False
        trie = next(iter(trie.values()))
    return True


def _monomial(trie: dict) -> tuple[list[tuple[int, int]], float]:
    factors = []
    while set(trie) != {None}:
        ((factor, trie),) = trie.items()
        factors.append(factor)
    return factors, trie[None]


def folded(polynomial: Polynomial) -> tuple[np.ndarray, Polynomial]:
    """Gather everything linear in the outer input into one weight per monomial and output.

    Returns:
        ``[M, P]`` matrix from the old weights to the new ones, and the polynomial in these.
    """
    assert polynomial.outer is not None
    outer = polynomial.outer
    places: dict[tuple, int] = {}
    entries, terms = [], []
    for group in polynomial.terms:
        column = group.factors.index(outer)
        kept = [c for c in range(len(group.factors)) if c != column]
        factors = tuple(group.factors[c] for c in kept)
        start = len(places)
        rows = []
        for indices, output, coefficient in zip(group.indices, group.outputs, group.coefficients):
            key = (factors, tuple(int(indices[c]) for c in kept), int(output))
            # many couplings weigh the same monomial: the sum is formed once per element, not once per atom
            if key not in places:
                places[key] = len(places)
                rows.append((*key[1], places[key], output))
            entries.append((places[key], int(indices[column]), coefficient))
        if len(places) == start:
            continue
        table = np.array(rows, dtype=np.int64)
        terms.append(Terms((*factors, outer), table[:, :-1], table[:, -1], np.ones(len(table))))
    matrix = np.zeros((len(places), polynomial.inputs[outer].dim))
    for row, column, coefficient in entries:
        matrix[row, column] += coefficient
    inputs = list(polynomial.inputs)
    inputs[outer] = Operand(inputs[outer].name, len(places))
    return matrix, Polynomial(tuple(inputs), polynomial.output, tuple(terms), outer)
