"""MARA's gate through machine code: geometry, attention, pooling and two derivatives in one run over the edges.

The formulas are those of :mod:`steradian.operators.mara.factorised`, which takes over beyond the second derivative.

A force needs the derivatives by vectors and nodes, so these are formed with the value (``slopes``); gradients of the
weights pass through the tables, so those are formed only when asked for (``tables``). Training on forces needs the
derivative of ``D . c`` with D the first derivatives and c what the loss sends back to them: one derivative along the
direction c (``tangent``) gives it for everything at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from steradian.compiler.lanes import lanes_of
from steradian.compiler.native import function_of, run_tasks
from steradian.graph.topology import Rows
from steradian.operators.mara import factorised
from steradian.operators.mara.cpu_code import (
    ARGUMENTS,
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
    """What a call needs and never differentiates; see :func:`pool_on_sphere`."""

    by_receiver: Rows
    grid: Tensor
    field: Literal["distance", "squared"]

    def plain(self, vectors: Tensor, nodes: Tensor, tables: Tensor) -> Tensor:
        """Pooled attention by plain PyTorch."""
        return factorised.pool_on_sphere(vectors, nodes, tables, self.by_receiver.index, self.grid, self.field)


def pool_on_sphere(
    vectors: Tensor,
    nodes: Tensor,
    tables: Tensor,
    by_receiver: Rows,
    grid: Tensor,
    field: Literal["distance", "squared"],
) -> Tensor:
    """Pooled attention of every edge and head, ``[E, H]``: :func:`steradian.operators.mara.factorised.pool_on_sphere`,
    with the receivers as rows and ``nodes`` in the format of ``vectors``.

    Raises:
        IndexError: a receiver that is not an atom.
    """
    constants = _Constants(by_receiver.look(), grid.contiguous(), field)
    if not (torch.is_grad_enabled() and any(value.requires_grad for value in (vectors, nodes, tables))):
        return _run("value", constants, vectors, nodes, tables).pooled
    pooled = _Pooled.apply(vectors, nodes, (tables,), constants)
    # a zero whose backward knows the tables: a force differentiates by vectors and nodes and does not reach it
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
        return *_Slopes.apply(gradient, *ctx.saved_tensors, ctx.constants), None, None


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
        # head after head: [H, E, 3] is not formed a second time, and the order of the sum is fixed
        total = heads[0].unsqueeze(1) * by_vectors[0]
        for head in range(1, len(heads)):
            total = total + heads[head].unsqueeze(1) * by_vectors[head]
        return total, _to_nodes(rows, heads, nodes, constants)

    @staticmethod
    def backward(ctx: Any, by_vectors: Tensor, by_nodes: Tensor) -> Any:
        constants, nothing = ctx.constants, (None, None, None)
        if torch.is_grad_enabled():  # somebody will differentiate a third time
            gradient, vectors, nodes, tables = inputs = _aliases(*ctx.saved_tensors)
            pooled = constants.plain(vectors, nodes, tables)
            first = torch.autograd.grad(pooled, [vectors, nodes], gradient, create_graph=True)
            return *torch.autograd.grad(first, inputs, (by_vectors, by_nodes), create_graph=True), *nothing
        gradient, vectors, nodes, tables = ctx.saved_tensors
        results = _run("tangent", constants, vectors, nodes, tables, gradient, (by_vectors, by_nodes))
        wanted = ctx.needs_input_grad
        # first derivatives are linear in the gradient: by it, along the direction, they give the tangent of pooled
        return (
            results.pooled,
            results.by_vectors.sum(0) if wanted[1] else None,
            _to_nodes(results.rows, None, nodes, constants) if wanted[2] else None,
            results.by_tables if wanted[3] else None,
            *nothing,
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
            pooled = ctx.constants.plain(vectors, nodes, tables)
            return torch.autograd.grad(pooled, tables, gradient, create_graph=True)[0], None, None
        return _run("tables", ctx.constants, vectors, nodes, tables, gradient).by_tables, None, None


def _aliases(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors where differentiation can stop, although one of them may be a function of another."""
    return tuple(tensor.view_as(tensor) for tensor in tensors)


# ------------------------------------------------------------------------------------------------------------- machine


@cache
def _function(kind: str, field: str, itemsize: int) -> Callable:
    return function_of(f"sphere attention, {kind}", sphere_attention_module, (kind, field, itemsize), 5)


def _run(
    kind: str,
    constants: _Constants,
    vectors: Tensor,
    nodes: Tensor,
    tables: Tensor,
    gradient: Tensor | None = None,
    direction: tuple[Tensor, Tensor] | None = None,
) -> _Results:
    """One kind of kernel (:data:`steradian.operators.mara.cpu_code.KINDS`) over all edges, head by head."""
    num_edges, num_heads, num_points = vectors.shape[0], nodes.shape[1], nodes.shape[2] - 1
    lanes = lanes_of(vectors.element_size())
    row_size = -(-(num_points + 1) // lanes) * lanes
    with_rows, with_sums = kind in ("slopes", "tangent"), kind in ("tables", "tangent")
    with torch.no_grad():
        results = _Results(
            pooled=vectors.new_empty(num_heads, num_edges),
            by_vectors=vectors.new_empty(num_heads if with_rows else 0, num_edges, 3),
            # zeros fill up the last vector: the sums over edges below read whole ones
            rows=vectors.new_zeros(num_heads if with_rows else 0, num_edges, row_size),
            by_tables=vectors.new_empty(num_heads if with_sums else 0, tables.shape[1]),
        )
        shared = {"vectors": vectors, "receivers": constants.by_receiver.index, "grid": constants.grid}
        of_head = {"nodes": nodes.transpose(0, 1), "tables": tables, "pooled": results.pooled}
        if with_rows:
            of_head |= {"by_vectors": results.by_vectors, "rows": results.rows}
        if gradient is not None:
            of_head["gradient"] = gradient.t()
        if direction is not None:
            shared["vectors_direction"], of_head["nodes_direction"] = direction[0], direction[1].transpose(0, 1)
        shared, of_head = ({key: value.contiguous() for key, value in part.items()} for part in (shared, of_head))
        sizes = {"num_edges": num_edges, "num_points": num_points, "row_size": row_size}
        numbers = sizes | {name: value.data_ptr() for name, value in shared.items()}
        function = _function(kind, constants.field, vectors.element_size())
        for head in range(num_heads):
            numbers |= {name: value[head].data_ptr() for name, value in of_head.items()}
            arguments = np.array([numbers.get(name, 0) for name in ARGUMENTS], dtype=np.int64)
            _over_edges(function, arguments, numbers, lanes, results.by_tables[head] if with_sums else None)
    return results._replace(pooled=results.pooled.t())


def _over_edges(
    function: Callable, arguments: np.ndarray, sizes: dict[str, int], lanes: int, by_tables: Tensor | None
) -> None:
    """All edges of one head, cut into parts for the threads; ``by_tables`` receives the sums of the parts."""
    num_edges, num_points = sizes["num_edges"], sizes["num_points"]
    blocks = -(-num_edges // lanes)
    threads = min(torch.get_num_threads(), max(1, num_edges * num_points**2 // WORTH_A_THREAD))
    parts, sums = threads, None
    if by_tables is not None:
        # as many sums whatever the threads: gradients of the weights have the same bits on one core and on many
        parts = max(1, min(MOST_SUMS, blocks // BLOCKS_PER_SUM))
        sums = by_tables.new_zeros(parts, num_table(num_points), lanes)
    cuts = [blocks * part // parts for part in range(parts + 1)]
    # 64 bytes more than needed, so that vectors can start at a multiple of that
    size = 64 * num_scratch(num_points)
    scratch = np.empty(parts * size + 64, dtype=np.uint8)
    start = -(-scratch.ctypes.data // 64) * 64
    tasks = [
        (arguments.ctypes.data, start + part * size, 0 if sums is None else sums[part].data_ptr(), first, last)
        for part, (first, last) in enumerate(pairwise(cuts))
    ]
    if threads == 1:
        for task in tasks:
            function(*task)
    else:
        run_tasks(function, tasks, threads)
    if by_tables is not None and sums is not None:
        torch.sum(sums, (0, 2), out=by_tables)


# ------------------------------------------------------------------------------------- sums over the edges of an atom


def _to_nodes(rows: Tensor, scales: Tensor | None, nodes: Tensor, constants: _Constants) -> Tensor:
    """``[N, H, 1 + K]`` sums of rows ``[H, E, S]`` (times scales ``[H, E]``) over the edges of each centre."""
    program = _summing_program(scales is not None)
    heads = []
    for head in range(nodes.shape[1]):
        inputs = [rows[head].unsqueeze(1), *([] if scales is None else [scales[head].unsqueeze(1)])]
        (sums,) = run_program(program, (constants.by_receiver,), rows.shape[1], inputs, rows.shape[2])
        heads.append(sums.squeeze(1)[:, : nodes.shape[2]])
    return torch.stack(heads, dim=1)


@cache
def _summing_program(scaled: bool) -> Program:
    """``sums[receiver] += rows (scale)`` as a polynomial, whose threads own whole rows of the output."""
    inputs = (Operand("rows", 1), Operand("scale", 1, has_channels=False))[: 2 if scaled else 1]
    zeros = np.zeros((1, len(inputs)), dtype=np.int64)
    terms = Terms(tuple(range(len(inputs))), zeros, np.zeros(1, dtype=np.int64), np.ones(1))
    return program_of(Polynomial(inputs, Operand("sums", 1), (terms,)), (None,) * len(inputs), 0)
