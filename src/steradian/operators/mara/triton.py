"""MARA's gate through Triton as operators of PyTorch: two derivatives, ``torch.compile``, ``make_fx``, CUDA graphs.

``steradian::mara_pooled`` gives the pooled attention together with its derivatives, ``steradian::mara_spread`` the
gradient made of them, ``steradian::mara_tangent`` the gradient of that. Derivatives by the tables are an operator of
their own, because forces do not ask for them. Beyond the second derivative plain PyTorch takes over. Nothing waits for
the device, no shape depends on data, and sums have a fixed order.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from steradian.compiler.checked import allowed, register_operator
from steradian.graph.topology import Rows
from steradian.operators.mara import factorised
from steradian.polynomials.backend import may_serve, on_its_device, triton_serves

__all__ = ["is_served", "plain_pool", "pool_on_sphere"]

VALUE, SLOPES, TANGENT = 0, 1, 2
ARRAYS = {VALUE: 2, SLOPES: 3, TANGENT: 6}
"""Numbers per edge, head and point that one kernel leaves for the next."""
BYTES_OF_SUMS = 1 << 26
"""Largest buffer for sums of table derivatives over chunks of edges..."""
MOST_CHUNKS, EDGES_OF_CHUNK = 512, 16
"""...and how many chunks of how many edges there are at most and at least."""
MANY_EDGES = 1 << 14
"""From so many edges on a block of threads has twice as many of them, and a thread four numbers in place of two."""
LAUNCH: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}


def pool_on_sphere(
    vectors: Tensor,
    nodes: Tensor,
    tables: Tensor,
    receivers: Tensor,
    grid: Tensor,
    squared: bool,
    ascending: bool = False,
) -> Tensor:
    """Pooled attention of every edge and head, ``[E, H]``, with derivatives of any order.

    Args:
        vectors: ``[E, 3]`` from receiver to sender [Å]; float32 or float64, and so is the arithmetic.
        nodes: ``[N, H, 1 + K]`` per centre: factor s of f_l, then the terms q_l (without the rule's log weights); in
            this or a shorter format.
        tables: ``[H, 2 + 4 K + K^2]``, see :func:`steradian.operators.mara.factorised.logit_tables`.
        receivers: ``[E]`` centre of each edge.
        grid: ``[K, 3]`` points of the sphere.
        squared: the field is the squared distance.
        ascending: the caller's promise that receivers are in order; see :class:`~steradian.graph.topology.Rows`.
    """
    tables = tables.to(vectors.dtype)
    differentiated = torch.is_grad_enabled() and any(value.requires_grad for value in (vectors, nodes, tables))
    if not differentiated:
        return _value(vectors, nodes, tables, receivers, grid, squared)
    pooled, _, _, _ = _pooled(vectors, nodes, tables, receivers, grid, squared, ascending)
    if tables.requires_grad:
        pooled = pooled + _by_tables(tables, vectors, nodes, receivers, grid, squared)
    return pooled


def plain_pool(
    vectors: Tensor, nodes: Tensor, tables: Tensor, receivers: Tensor, grid: Tensor, squared: bool
) -> Tensor:
    """The same in plain PyTorch."""
    field: Literal["distance", "squared"] = "squared" if squared else "distance"
    return factorised.pool_on_sphere(vectors, nodes, tables, receivers, grid, field)


# ----------------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("steradian::mara_value", mutates_args=())
@on_its_device
def _value(vectors: Tensor, nodes: Tensor, tables: Tensor, receivers: Tensor, grid: Tensor, squared: bool) -> Tensor:
    run = _Run(vectors, nodes, tables, receivers, grid, squared)
    pooled, _, _ = run.rows(VALUE, keep=False)
    return pooled.t().contiguous()


_value.register_fake(lambda vectors, nodes, *rest: vectors.new_empty((vectors.shape[0], nodes.shape[1])))


@torch.library.custom_op("steradian::mara_pooled", mutates_args=())
@on_its_device
def _pooled(
    vectors: Tensor, nodes: Tensor, tables: Tensor, receivers: Tensor, grid: Tensor,
    squared: bool, ascending: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """pooled ``[E, H]``; its derivatives by vectors ``[H, E, 3]``, by s ``[H, E]`` and by q ``[H, K, E]``."""
    run = _Run(vectors, nodes, tables, receivers, grid, squared)
    pooled, by_slope, kept = run.rows(SLOPES)
    by_vectors, by_point = run.columns(SLOPES, kept)
    return pooled.t().contiguous(), by_vectors, by_slope, by_point


@_pooled.register_fake
def _(vectors: Tensor, nodes: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_edges, num_heads = vectors.shape[0], nodes.shape[1]
    return (
        vectors.new_empty((num_edges, num_heads)),
        vectors.new_empty((num_heads, num_edges, 3)),
        vectors.new_empty((num_heads, num_edges)),
        vectors.new_empty((num_heads, nodes.shape[2] - 1, num_edges)),
    )


def _save_pooled(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.squared, ctx.ascending = inputs
    ctx.set_materialize_grads(False)
    # first derivatives come along for the backward; they are differentiated there, by mara_tangent, all at once
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _pooled_backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 7
    by_vectors, by_nodes = _spread(gradient, *ctx.saved_tensors, ctx.squared, ctx.ascending)
    return by_vectors, by_nodes, *(None,) * 5


_pooled.register_autograd(_pooled_backward, setup_context=_save_pooled)


@torch.library.custom_op("steradian::mara_spread", mutates_args=())
@on_its_device
def _spread(
    gradient: Tensor, vectors: Tensor, nodes: Tensor, tables: Tensor, receivers: Tensor, grid: Tensor,
    by_vectors: Tensor, by_slope: Tensor, by_point: Tensor, squared: bool, ascending: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Derivatives of ``sum(gradient pooled)`` by vectors and nodes, from those of every edge."""
    if gradient.shape[1] == 1:
        total = gradient * by_vectors[0]
    else:
        total = (gradient.t().unsqueeze(2) * by_vectors).sum(0)
    rows = Rows(receivers, nodes.shape[0], ascending=ascending)
    return total, _to_nodes(by_slope, by_point, gradient, rows, nodes)


_spread.register_fake(lambda gradient, vectors, nodes, *rest: (torch.empty_like(vectors), nodes.new_empty(nodes.shape)))


def _save_spread(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.squared, ctx.ascending = inputs
    ctx.set_materialize_grads(False)
    # the three derivatives of every edge count as constants: mara_tangent begins with what they are made of
    ctx.save_for_backward(*tensors[:6])


def _spread_backward(ctx: Any, by_vectors: Tensor | None, by_nodes: Tensor | None) -> tuple[Tensor | None, ...]:
    gradient, vectors, nodes, tables, receivers, grid = ctx.saved_tensors
    along_vectors = torch.zeros_like(vectors) if by_vectors is None else by_vectors
    along_nodes = torch.zeros_like(nodes) if by_nodes is None else by_nodes
    nothing = (None,) * 7  # receivers, grid, the three saved derivatives, squared, ascending
    if torch.is_grad_enabled():  # somebody will differentiate again
        inputs = [_alias(tensor) for tensor in (gradient, vectors, nodes, tables)]
        pooled = plain_pool(inputs[1], inputs[2], inputs[3], receivers, grid, ctx.squared)
        first = torch.autograd.grad(pooled, inputs[1:3], inputs[0], create_graph=True)
        found = torch.autograd.grad(first, inputs, (along_vectors, along_nodes), create_graph=True, allow_unused=True)
        return *found, *nothing
    with_tables = bool(ctx.needs_input_grad[3])
    *found, by_tables = _tangent(
        gradient, vectors, nodes, tables, receivers, grid, along_vectors, along_nodes, ctx.squared, ctx.ascending,
        with_tables,
    )  # fmt: skip
    return *found, by_tables if with_tables else None, *nothing


def _alias(tensor: Tensor) -> Tensor:
    """The same tensor where differentiation can stop, although others may be functions of it."""
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


_spread.register_autograd(_spread_backward, setup_context=_save_spread)


@torch.library.custom_op("steradian::mara_tangent", mutates_args=())
@on_its_device
def _tangent(
    gradient: Tensor, vectors: Tensor, nodes: Tensor, tables: Tensor, receivers: Tensor, grid: Tensor,
    vectors_dot: Tensor, nodes_dot: Tensor, squared: bool, ascending: bool, with_tables: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Derivatives of ``sum(gradient tangent)`` by gradient, vectors, nodes and, if wanted, tables; the tangent is the
    derivative of pooled along the direction."""
    run = _Run(vectors, nodes, tables, receivers, grid, squared, gradient, (vectors_dot, nodes_dot))
    pooled, by_slope, kept = run.rows(TANGENT)
    by_vectors, by_point = run.columns(TANGENT, kept)
    # rows of ``by_point`` carry the gradient already
    by_slope = by_slope * gradient.t()
    by_nodes = _to_nodes(by_slope, by_point, None, Rows(receivers, nodes.shape[0], ascending=ascending), nodes)
    by_tables = run.by_tables(TANGENT, kept) if with_tables else tables.new_empty(0)
    return pooled.t().contiguous(), by_vectors.sum(0), by_nodes, by_tables


@_tangent.register_fake
def _(
    gradient: Tensor, vectors: Tensor, nodes: Tensor, tables: Tensor, receivers: Tensor, grid: Tensor,
    vectors_dot: Tensor, nodes_dot: Tensor, squared: bool, ascending: bool, with_tables: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    by_tables = tables.new_empty(tables.shape if with_tables else 0)
    pooled = vectors.new_empty((vectors.shape[0], nodes.shape[1]))
    return pooled, vectors.new_empty(vectors.shape), nodes.new_empty(nodes.shape), by_tables


@torch.library.custom_op("steradian::mara_by_tables", mutates_args=())
def _by_tables(
    tables: Tensor, vectors: Tensor, nodes: Tensor, receivers: Tensor, grid: Tensor, squared: bool
) -> Tensor:
    """Zero, ``[E, H]``, with the derivatives of pooled by the tables."""
    return vectors.new_zeros((vectors.shape[0], nodes.shape[1]))


_by_tables.register_fake(lambda tables, vectors, nodes, *rest: vectors.new_empty((vectors.shape[0], nodes.shape[1])))


def _save_by_tables(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.squared = inputs
    ctx.save_for_backward(*tensors)


def _by_tables_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    tables, vectors, nodes, receivers, grid = ctx.saved_tensors
    if torch.is_grad_enabled():
        tables, vectors, nodes = (_alias(tensor) for tensor in (tables, vectors, nodes))
        pooled = plain_pool(vectors, nodes, tables, receivers, grid, ctx.squared)
        return torch.autograd.grad(pooled, tables, gradient, create_graph=True)[0], *(None,) * 5
    return _sums_by_tables(gradient, tables, vectors, nodes, receivers, grid, ctx.squared), *(None,) * 5


_by_tables.register_autograd(_by_tables_backward, setup_context=_save_by_tables)


@torch.library.custom_op("steradian::mara_sums_by_tables", mutates_args=())
@on_its_device
def _sums_by_tables(
    gradient: Tensor, tables: Tensor, vectors: Tensor, nodes: Tensor, receivers: Tensor, grid: Tensor, squared: bool
) -> Tensor:
    """Derivatives of ``sum(gradient pooled)`` by the tables."""
    run = _Run(vectors, nodes, tables, receivers, grid, squared, gradient)
    _, _, kept = run.rows(VALUE)
    return run.by_tables(VALUE, kept)


_sums_by_tables.register_fake(lambda gradient, tables, *rest: torch.empty_like(tables))


# ------------------------------------------------------------------------------------------------------------- kernels


def _to_nodes(by_slope: Tensor, by_point: Tensor, gradient: Tensor | None, rows: Rows, nodes: Tensor) -> Tensor:
    """``[N, H, 1 + K]`` sums over the edges of each centre, in the format of ``nodes``."""
    from steradian.operators.mara.triton_sums import node_kernel

    num_nodes, num_heads, width = nodes.shape
    num_edges = by_slope.shape[1]
    if not num_edges:
        return torch.zeros_like(nodes)
    by_nodes = by_slope.new_empty(nodes.shape)
    points = min(32, _power_of_two(width - 1))
    # an instance has all edges of an atom and takes them in order: no atomic additions, the same bits in every run
    grid = (num_nodes, num_heads, -(-(width - 1) // points))
    node_kernel[grid](
        by_slope, by_point, by_slope if gradient is None else gradient.contiguous(),
        rows.bounds if rows.order is None else rows.order, rows.bounds, by_nodes,
        num_edges, width - 1, num_heads,
        SCALED=gradient is not None, ORDERED=rows.order is not None, EDGES=16, POINTS=points,
        num_warps=2, enable_fp_fusion=True,
    )  # fmt: skip
    return by_nodes.to(nodes.dtype)


class _Run:
    """The kernels on one set of edges."""

    def __init__(
        self, vectors: Tensor, nodes: Tensor, tables: Tensor, receivers: Tensor, grid: Tensor, squared: bool,
        gradient: Tensor | None = None, direction: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        given = [tensor.contiguous() for tensor in (vectors, receivers, nodes, tables, grid)]
        moves = given[0:3:2] if direction is None else [tensor.contiguous() for tensor in direction]
        self.vectors = vectors
        self.gradient = None if gradient is None else gradient.contiguous()
        self.given = (*given, *moves)
        self.num_edges, self.num_heads, self.num_points = vectors.shape[0], nodes.shape[1], len(grid)
        self.sizes = self.num_edges, self.num_points, self.num_heads, tables.shape[1]
        kink = torch.finfo(vectors.dtype).eps ** 0.5
        self.meaning = {"SQUARED": squared, "KINK": kink}

    def _blocks(self) -> dict[str, int]:
        edges = 16 if self.num_edges >= MANY_EDGES and self.vectors.dtype == torch.float32 else 8
        return {"EDGES": edges, "POINTS": min(32, _power_of_two(self.num_points)), "UNROLL": 2, **LAUNCH}

    def rows(self, kind: int, keep: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled (or its tangent) ``[H, E]``, its derivative by s ``[H, E]``, and what is kept ``[H, A, K, E]``."""
        from steradian.operators.mara.triton_kernels import row_kernel

        shape, arrays = (self.num_heads, self.num_edges), ARRAYS[kind] if keep else 0
        pooled = self.vectors.new_empty(shape)
        by_slope = self.vectors.new_empty(shape if kind else 1)
        kept = self.vectors.new_empty((self.num_heads, arrays, self.num_points, self.num_edges) if keep else 1)
        blocks = self._blocks()
        if self.num_edges:
            row_kernel[(-(-self.num_edges // blocks["EDGES"]), self.num_heads)](
                *self.given, pooled, by_slope, kept, *self.sizes, KIND=kind, ARRAYS=arrays, **self.meaning, **blocks
            )
        return pooled, by_slope, kept

    def columns(self, kind: int, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives by the vectors ``[H, E, 3]`` and by q ``[H, K, E]``."""
        from steradian.operators.mara.triton_kernels import column_kernel

        by_vectors = self.vectors.new_empty((self.num_heads, self.num_edges, 3))
        by_point = self.vectors.new_empty((self.num_heads, self.num_points, self.num_edges))
        blocks = self._blocks()
        if self.num_edges:
            column_kernel[(-(-self.num_edges // blocks["EDGES"]), self.num_heads)](
                *self.given, self.vectors if self.gradient is None else self.gradient, kept, by_vectors, by_point,
                *self.sizes, TANGENT=kind == TANGENT, ARRAYS=ARRAYS[kind], **self.meaning, **blocks,
            )  # fmt: skip
        return by_vectors, by_point

    def by_tables(self, kind: int, kept: Tensor) -> Tensor:
        """``[H, 2 + 4 K + K^2]``, in the order of the tables."""
        from steradian.operators.mara.triton_sums import table_kernel

        heads, points = self.num_heads, self.num_points
        if not self.num_edges:
            return self.vectors.new_zeros((heads, self.sizes[3]))
        block = min(16, _power_of_two(points))
        blocks = -(-points // block)
        size = points * (points + 3 * blocks) + 2 * blocks**2
        # weights get something from every edge: fixed chunks of edges are summed, and then their sums in one order
        most = min(MOST_CHUNKS, max(1, BYTES_OF_SUMS // (size * heads * self.vectors.element_size())))
        chunk = max(EDGES_OF_CHUNK, -(-self.num_edges // most))
        chunks = -(-self.num_edges // chunk)
        sums = self.vectors.new_empty((heads, chunks, size))
        table_kernel[(blocks**2, chunks, heads)](
            *self.given, self.gradient, kept, sums, *self.sizes, chunk, size,
            TANGENT=kind == TANGENT, ARRAYS=ARRAYS[kind], POINTS=block, **self.meaning, **LAUNCH,
        )  # fmt: skip
        entries, others, pair = sums.sum(1).split([points**2, 3 * blocks * points, 2 * blocks**2], dim=1)
        rest = others.view(heads, 3, blocks, points).sum(2)  # by B, F and v
        # zeros in the place of w: the weights of the rule are not learned
        return torch.cat([pair.view(heads, -1, 2).sum(1), rest.flatten(1), torch.zeros_like(rest[:, 0]), entries], 1)


def _power_of_two(number: int) -> int:
    return max(2, 1 << (number - 1).bit_length())


# ---------------------------------------------------------------------------------------------------------- comparison


def is_served(vectors: Tensor, nodes: Tensor, num_points: int, squared: bool) -> bool:
    """Whether the kernels run for these edges: see :func:`steradian.polynomials.backend.triton_serves`."""
    if not may_serve(vectors):
        return False
    formats = [str(tensor.dtype).removeprefix("torch.") for tensor in (vectors, nodes)]
    if formats[0] not in ("float32", "float64"):
        return False
    problem = (
        f"{' '.join(formats)}, {nodes.shape[1]} heads, {num_points} points, {'squared' if squared else 'distance'}"
    )
    return triton_serves("MARA", problem, vectors, nodes)


def _check(device: torch.device, problem: str) -> tuple[list[Tensor], list[Tensor], float]:
    """Values and two derivatives by kernels and in plain PyTorch, for 21 edges of 6 centres, and what is allowed."""
    formats, heads, points, field = problem.split(", ")
    wide, short = (getattr(torch, name) for name in formats.split())
    num_heads, num_points = int(heads.split()[0]), int(points.split()[0])
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tables = 0.3 * random(num_heads, 2 + 4 * num_points + num_points**2)
    tables[:, 2 + 3 * num_points : 2 + 4 * num_points] = 1 / num_points
    inputs = [random(21, 3), 0.3 * random(6, num_heads, 1 + num_points), tables]
    grid = torch.nn.functional.normalize(random(num_points, 3), dim=1).to(device, wide)
    receivers = torch.arange(21, device=device) // 4
    directions = [random(21, num_heads), *(random(*value.shape) for value in inputs)]
    found = []
    for pool in (pool_on_sphere, plain_pool):
        leaves = [value.to(device, dtype).requires_grad_() for value, dtype in zip(inputs, (wide, short, wide))]
        pooled = pool(leaves[0], leaves[1], leaves[2], receivers, grid, field == "squared")
        to = [direction.to(device) for direction in directions]
        first = torch.autograd.grad(pooled, leaves[:2], to[0].to(pooled.dtype), create_graph=True)
        mixture = sum((value * way.to(value.dtype)).sum() for value, way in zip((pooled, *first), (to[0], *to[1:3])))
        assert isinstance(mixture, Tensor)
        found.append([pooled, *first, *torch.autograd.grad(mixture, leaves)])
    return found[0], found[1], allowed("MARA", formats.split()[1])


register_operator("MARA", _check)
