"""MARA's gate through machine code: geometry, attention, pooling and two derivatives in one run over the edges.

The formulas are those of :mod:`steradian.operators.mara.factorised`, which remains the truth and takes over beyond the
second derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from steradian.compiler.lanes import lanes_of
from steradian.compiler.native import compiled_text
from steradian.compiler.threads import run_tasks
from steradian.graph.topology import Rows, rows_of
from steradian.operators.mara.cpu_code import (
    ARGUMENTS,
    VERSION,
    num_scratch,
    num_table,
    sphere_attention_module,
)
from steradian.polynomials.cpu import run_program
from steradian.polynomials.polynomial import Operand, Polynomial, Terms
from steradian.polynomials.program import Program, program_of

__all__ = ["pool_on_sphere"]

#: Blocks of edges that share one set of sums of table derivatives, so that the sums do not depend on the threads.
BLOCKS_PER_SUM = 32
MOST_SUMS = 16
#: Exponentials below which a second thread costs more than it brings.
WORTH_A_THREAD = 30_000


class _Constants(NamedTuple):
    """What a call needs and never differentiates.

    Attributes:
        receivers: ``[E]``.
        grid: ``[K, 3]`` points.
        field: ``distance`` or ``squared``.
        reference: ``(vectors, nodes, tables) -> pooled`` in plain PyTorch.
    """

    receivers: Tensor
    grid: Tensor
    field: str
    reference: Callable[[Tensor, Tensor, Tensor], Tensor]


def pool_on_sphere(
    vectors: Tensor,
    nodes: Tensor,
    tables: Tensor,
    receivers: Tensor,
    grid: Tensor,
    field: str,
    reference: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Pooled attention of every edge and head, ``[E, H]``, with derivatives of any order.

    Args:
        vectors: ``[E, 3]`` from receiver to sender [Å].
        nodes: ``[N, H, 1 + K]`` per centre: factor s of f_l, then the terms q_l (without the rule's log weights).
        tables: ``[H, 2 + 4 K + K^2]``, see :func:`flat_tables`.
        receivers: ``[E]`` centre of each edge.
        grid: ``[K, 3]`` points of the sphere.
        field: ``distance`` or ``squared``.
        reference: the same function of the first three, in plain PyTorch; for third derivatives.
    """
    constants = _Constants(receivers.contiguous(), grid.contiguous(), field, reference)
    if not (torch.is_grad_enabled() and any(value.requires_grad for value in (vectors, nodes, tables))):
        return _run("value", constants, vectors, nodes, tables).pooled
    pooled = _Pooled.apply(vectors, nodes, (tables,), constants)
    return pooled + _ByTables.apply(tables, (vectors, nodes), constants) if tables.requires_grad else pooled


class _Results(NamedTuple):
    pooled: Tensor  # [E, H]; for a tangent its derivative along the direction
    by_vectors: Tensor  # [H, E, 3]
    rows: Tensor  # [H, E, S] derivatives by the edge's copy of nodes, then zeros
    by_tables: Tensor  # [H, 2 + 4 K + K^2]


class _Pooled(torch.autograd.Function):
    """Pooled values as a function of vectors and nodes; the tables come along, hidden in a tuple, for a second
    derivative."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, vectors: Tensor, nodes: Tensor, others: tuple[Tensor], constants: _Constants
    ) -> Tensor:
        (tables,) = others
        results = _run("slopes", constants, vectors, nodes, tables)
        ctx.constants = constants
        ctx.save_for_backward(vectors, nodes, tables, results.by_vectors, results.rows)
        return results.pooled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        vectors, nodes, tables, by_vectors, rows = ctx.saved_tensors
        first = _Slopes.apply(gradient, vectors, nodes, tables, by_vectors, rows, ctx.constants)
        return *first, None, None


class _Slopes(torch.autograd.Function):
    """Derivatives of ``sum(gradient pooled)`` by vectors and nodes, from those of every edge."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        gradient: Tensor,
        vectors: Tensor,
        nodes: Tensor,
        tables: Tensor,
        by_vectors: Tensor,
        rows: Tensor,
        constants: _Constants,
    ) -> tuple[Tensor, Tensor]:
        ctx.constants = constants
        ctx.save_for_backward(gradient, vectors, nodes, tables)
        heads = gradient.t().contiguous()
        total = heads[0].unsqueeze(1) * by_vectors[0]
        for head in range(1, len(heads)):
            total = total + heads[head].unsqueeze(1) * by_vectors[head]
        return total, _to_nodes(rows, heads, nodes, constants)

    @staticmethod
    def backward(ctx: Any, by_vectors: Tensor, by_nodes: Tensor) -> Any:
        gradient, vectors, nodes, tables = ctx.saved_tensors
        constants = ctx.constants
        if torch.is_grad_enabled():
            return *_second_by_reference(ctx.saved_tensors, (by_vectors, by_nodes), constants), None, None, None
        results = _run("tangent", constants, vectors, nodes, tables, gradient, (by_vectors, by_nodes))
        wanted = ctx.needs_input_grad
        return (
            results.pooled,
            results.by_vectors.sum(0) if wanted[1] else None,
            _to_nodes(results.rows, None, nodes, constants) if wanted[2] else None,
            results.by_tables if wanted[3] else None,
            *(None, None, None),
        )


class _ByTables(torch.autograd.Function):
    """Zero, with the derivatives of :class:`_Pooled` by the tables: forces do not ask for these."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, tables: Tensor, others: tuple[Tensor, Tensor], constants: _Constants
    ) -> Tensor:
        vectors, nodes = others
        ctx.constants = constants
        ctx.save_for_backward(tables, vectors, nodes)
        return vectors.new_zeros(vectors.shape[0], nodes.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        tables, vectors, nodes = ctx.saved_tensors
        if torch.is_grad_enabled():
            tables, vectors, nodes = _aliases(tables, vectors, nodes)
            pooled = ctx.constants.reference(vectors, nodes, tables)
            return torch.autograd.grad(pooled, tables, gradient, create_graph=True)[0], None, None
        return _run("tables", ctx.constants, vectors, nodes, tables, gradient).by_tables, None, None


def _second_by_reference(saved: Any, cotangents: tuple[Tensor, Tensor], constants: _Constants) -> tuple[Tensor, ...]:
    gradient, vectors, nodes, tables = inputs = _aliases(*saved)
    pooled = constants.reference(vectors, nodes, tables)
    first = torch.autograd.grad(pooled, [vectors, nodes], gradient, create_graph=True)
    return torch.autograd.grad(first, inputs, cotangents, create_graph=True)


def _aliases(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors where differentiation can stop, although one of them may be a function of another."""
    return tuple(tensor.view_as(tensor) for tensor in tensors)


# ------------------------------------------------------------------------------------------------------------- machine


@cache
def _function(kind: str, field: str, itemsize: int) -> Callable:
    description = f"sphere attention {VERSION} {kind} {field} {itemsize}"
    return compiled_text(
        f"sphere attention, {kind}", description, lambda: sphere_attention_module(kind, field, itemsize), 5
    )


@dataclass
class _Call:
    """One run of a kernel for one head: where everything lies."""

    function: Callable
    numbers: dict[str, int]
    num_points: int
    tables: Tensor

    def run(self, num_edges: int, by_tables: Tensor | None) -> None:
        """Over all edges; ``by_tables`` receives the sums."""
        lanes = lanes_of(self.tables.element_size())
        arguments = np.array([self.numbers.get(name, 0) for name in ARGUMENTS], dtype=np.int64)
        blocks = -(-num_edges // lanes)
        threads = min(torch.get_num_threads(), max(1, num_edges * self.num_points**2 // WORTH_A_THREAD))
        sums = None
        if by_tables is None:
            parts = threads
        else:
            parts = max(1, min(MOST_SUMS, blocks // BLOCKS_PER_SUM))
            sums = self.tables.new_zeros(parts, num_table(self.num_points), lanes)
        cuts = [blocks * part // parts for part in range(parts + 1)]
        # 64 bytes more than needed, so that vectors can start at a multiple of that
        size = 64 * num_scratch(self.num_points)
        scratch = np.empty(parts * size + 64, dtype=np.uint8)
        start = -(-scratch.ctypes.data // 64) * 64
        tasks = [
            (arguments.ctypes.data, start + part * size, 0 if sums is None else sums[part].data_ptr(), first, last)
            for part, (first, last) in enumerate(pairwise(cuts))
        ]
        if threads == 1:
            for task in tasks:
                self.function(*task)
        else:
            run_tasks(self.function, tasks, threads)
        if by_tables is not None and sums is not None:
            torch.sum(sums, (0, 2), out=by_tables)


def _run(
    kind: str,
    constants: _Constants,
    vectors: Tensor,
    nodes: Tensor,
    tables: Tensor,
    gradient: Tensor | None = None,
    direction: tuple[Tensor, Tensor] | None = None,
) -> _Results:
    num_edges, num_heads, num_points = vectors.shape[0], nodes.shape[1], nodes.shape[2] - 1
    size = _row_size(num_points, vectors.element_size())
    with torch.no_grad():
        vectors, tables = vectors.contiguous(), tables.contiguous()
        per_head = nodes.transpose(0, 1).contiguous()
        gradients = None if gradient is None else gradient.t().contiguous()
        moves = None if direction is None else (direction[0].contiguous(), direction[1].transpose(0, 1).contiguous())
        sums_wanted = kind in ("tables", "tangent")
        rows_wanted = kind in ("slopes", "tangent")
        results = _Results(
            pooled=vectors.new_empty(num_heads, num_edges),
            by_vectors=vectors.new_empty(num_heads if rows_wanted else 0, num_edges, 3),
            rows=vectors.new_zeros(num_heads if rows_wanted else 0, num_edges, size),
            by_tables=vectors.new_empty(num_heads if sums_wanted else 0, tables.shape[1]),
        )
        shared = {
            "num_edges": num_edges,
            "num_points": num_points,
            "row_size": size,
            "vectors": vectors.data_ptr(),
            "receivers": constants.receivers.data_ptr(),
            "grid": constants.grid.data_ptr(),
        }
        function = _function(kind, constants.field, vectors.element_size())
        for head in range(num_heads):
            numbers = shared | {"nodes": per_head[head].data_ptr(), "tables": tables[head].data_ptr()}
            numbers["pooled"] = results.pooled[head].data_ptr()
            if gradients is not None:
                numbers["gradient"] = gradients[head].data_ptr()
            if moves is not None:
                numbers |= {"vectors_direction": moves[0].data_ptr(), "nodes_direction": moves[1][head].data_ptr()}
            if rows_wanted:
                numbers |= {"by_vectors": results.by_vectors[head].data_ptr(), "rows": results.rows[head].data_ptr()}
            _Call(function, numbers, num_points, tables).run(
                num_edges, results.by_tables[head] if sums_wanted else None
            )
    return results._replace(pooled=results.pooled.t())


def _row_size(num_points: int, itemsize: int) -> int:
    return -(-(num_points + 1) // lanes_of(itemsize)) * lanes_of(itemsize)


def _to_nodes(rows: Tensor, scales: Tensor | None, nodes: Tensor, constants: _Constants) -> Tensor:
    """``[N, H, 1 + K]`` sums of (scaled) rows over the edges of each centre."""
    by_receiver = rows_of(constants.receivers, nodes.shape[0]).look()
    heads = [
        _sum_rows(rows[head], None if scales is None else scales[head], by_receiver)[:, : nodes.shape[2]]
        for head in range(nodes.shape[1])
    ]
    return torch.stack(heads, dim=1)


@cache
def _summing_program(scaled: bool) -> Program:
    inputs = (Operand("rows", 1), Operand("scale", 1, has_channels=False))[: 2 if scaled else 1]
    factors = tuple(range(len(inputs)))
    zeros = np.zeros((1, len(inputs)), dtype=np.int64)
    polynomial = Polynomial(
        inputs, Operand("sums", 1), (Terms(factors, zeros, np.zeros(1, dtype=np.int64), np.ones(1)),)
    )
    return program_of(polynomial, (None,) * len(inputs), 0)


def _sum_rows(rows: Tensor, scale: Tensor | None, by_receiver: Rows) -> Tensor:
    inputs = [rows.unsqueeze(1)] if scale is None else [rows.unsqueeze(1), scale.unsqueeze(1).contiguous()]
    (sums,) = run_program(_summing_program(scale is not None), (by_receiver,), rows.shape[0], inputs, rows.shape[1])
    return sums.squeeze(1)
