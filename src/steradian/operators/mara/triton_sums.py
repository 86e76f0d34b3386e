"""Sums of MARA's derivatives on a GPU, by Triton: over the edges of a centre, and over all edges for the tables."""

from __future__ import annotations

import triton
import triton.language as tl

from steradian.operators.mara.triton_kernels import (
    LOG2_E,
    field_along,
    field_of,
    load_direction,
    load_edge,
    load_xyz,
    logits_along,
)

__all__ = ["node_kernel", "table_kernel"]


@triton.jit
def node_kernel(
    by_slope, by_point, gradient, order, bounds, by_nodes, num_edges, num_points, num_heads,
    SCALED: tl.constexpr, ORDERED: tl.constexpr, EDGES: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """``by_nodes [N, H, 1 + K]``: sums of ``by_slope [H, E]`` and ``by_point [H, K, E]`` over the edges of a centre, if
    SCALED times ``gradient [E, H]``. Centre n has the edges ``bounds[n] .. bounds[n + 1]``, or if ORDERED those that
    ``order`` lists there."""
    centre, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    k = (tl.program_id(2) * POINTS + tl.arange(0, POINTS)).to(tl.int64)
    real = k < num_points
    stop = tl.load(bounds + centre + 1)
    kind = by_point.dtype.element_ty
    total, slope = tl.zeros((POINTS, EDGES), dtype=kind), tl.zeros((EDGES,), dtype=kind)
    for first in range(tl.load(bounds + centre), stop, EDGES):
        edge = first + tl.arange(0, EDGES).to(tl.int64)
        own = edge < stop
        if ORDERED:
            edge = tl.load(order + edge, mask=own, other=0)
        rows = tl.load(
            by_point + (head * num_points + k)[:, None] * num_edges + edge[None, :],
            mask=real[:, None] & own[None, :], other=0.0,
        )  # fmt: skip
        slopes = tl.load(by_slope + head * num_edges + edge, mask=own, other=0.0)
        if SCALED:
            scale = tl.load(gradient + edge * num_heads + head, mask=own, other=0.0).to(kind)
            rows, slopes = rows * scale[None, :], slopes * scale
        total += rows
        slope += slopes
    place = by_nodes + (centre * num_heads + head) * (num_points + 1)
    tl.store(place + 1 + k, tl.sum(total, 1), mask=real)
    if tl.program_id(2) == 0:
        tl.store(place, tl.sum(slope, 0))


@triton.jit
def _kept_number(kept, array, k, edge, num_points, num_edges, real):
    """``kept[array, k, edge]`` for a block of k."""
    return tl.load(kept + (array * num_points + k) * num_edges + edge, mask=real, other=0.0)


@triton.jit
def _store_sums(sums, matrices, k, at, real_k, real_l, block_k, block_l, blocks, num_points):
    """What a block of k and a block of l add to the derivatives by P, B, F, v, c and V."""
    inside = real_k[:, None] & real_l[None, :]
    tl.store(sums + k[:, None] * num_points + at[None, :], matrices[0], mask=inside)
    place = sums + num_points * num_points + block_l * num_points
    tl.store(place + k, tl.sum(matrices[1], 1), mask=real_k)
    place = sums + num_points * (num_points + blocks) + block_k * num_points
    tl.store(place + at, tl.sum(matrices[2], 0), mask=real_l)
    tl.store(place + blocks * num_points + at, tl.sum(matrices[3], 0), mask=real_l)
    place = sums + num_points * (num_points + 3 * blocks) + 2 * (block_k * blocks + block_l)
    tl.store(place, tl.sum(tl.sum(matrices[4], 1), 0))
    tl.store(place + 1, tl.sum(tl.sum(matrices[5], 1), 0))


@triton.jit
def _added(sums, by_logit, weight, f, t):
    """Sums of table derivatives with one more edge: M and w A for fields f of k and t of l."""
    with_t = by_logit * t
    return (
        sums[0] + by_logit, sums[1] + with_t, sums[2] + by_logit * f, sums[3] + weight, sums[4] + with_t * f,
        sums[5] + weight * t,
    )  # fmt: skip


@triton.jit
def _added_along(sums, by_logit, by_logit_dot, weight, weight_dot, f, df, t, dt):
    """The same for the derivative along the direction."""
    with_t = by_logit_dot * t + by_logit * dt
    return (
        sums[0] + by_logit_dot, sums[1] + with_t, sums[2] + by_logit_dot * f + by_logit * df, sums[3] + weight_dot,
        sums[4] + with_t * f + by_logit * (t * df), sums[5] + weight_dot * t + weight * dt,
    )  # fmt: skip


@triton.jit
def table_kernel(
    vectors, receivers, nodes, tables, grid, vectors_dot, nodes_dot, gradient, kept, sums, num_edges, num_points,
    num_heads, table_size, chunk, sums_size, TANGENT: tl.constexpr, ARRAYS: tl.constexpr, SQUARED: tl.constexpr,
    KINK: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """Derivatives by the tables, of ``sum gradient pooled`` or of its tangent, summed over a chunk of edges.

    A program has a block of k and a block of l. ``sums [H, chunks, size]``: P ``[K, K]``, then for each block of l B
    ``[K]``, for each block of k F and v ``[K]`` each, for each pair of blocks c and V."""
    blocks = tl.cdiv(num_points, POINTS)
    block_k, block_l = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    number, head = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    k = (block_k * POINTS + tl.arange(0, POINTS)).to(tl.int64)
    at = (block_l * POINTS + tl.arange(0, POINTS)).to(tl.int64)
    real_k, real_l = k < num_points, at < num_points
    tables, kept = tables + head * table_size, kept + head * ARRAYS * num_points * num_edges
    gk, gl = load_xyz(grid, k, real_k), load_xyz(grid, at, real_l)
    c, value_slope = tl.load(tables), tl.load(tables + 1)
    asking_table = tl.load(tables + 2 + k, mask=real_k, other=0.0)
    column = tl.load(tables + 2 + num_points + at, mask=real_l, other=0.0)[None, :]
    value_table = tl.load(tables + 2 + 2 * num_points + at, mask=real_l, other=0.0)
    w = tl.load(tables + 2 + 3 * num_points + k, mask=real_k, other=0.0)[:, None]
    inside = real_k[:, None] & real_l[None, :]
    entry = tl.load(tables + 2 + 4 * num_points + k[:, None] * num_points + at[None, :], mask=inside, other=0.0)
    nothing = entry * 0.0
    matrices = (nothing, nothing, nothing, nothing, nothing, nothing)
    for edge in range(number * chunk, tl.minimum(number * chunk + chunk, num_edges)):
        x, per_r = load_edge(vectors, edge, True)
        centre = tl.load(receivers + edge) * num_heads + head
        node = nodes + centre * (num_points + 1)
        scale = tl.load(gradient + edge * num_heads + head).to(entry.dtype)
        fk, inverse_k = field_of(x, gk, SQUARED, KINK)
        fl, inverse_l = field_of(x, gl, SQUARED, KINK)
        b = tl.load(node).to(entry.dtype) + c * fk + asking_table
        q = tl.load(node + 1 + at, mask=real_l, other=0.0).to(entry.dtype)
        level = _kept_number(kept, 0, k, edge, num_points, num_edges, real_k)
        output = _kept_number(kept, 1, k, edge, num_points, num_edges, real_k)
        logit = b[:, None] * fl[None, :] + (fk[:, None] * column + (q[None, :] + entry))
        share = tl.where(inside, tl.exp2((tl.where(inside, logit - level[:, None], 0.0)) * LOG2_E), 0.0)
        weight = (scale * w) * share
        by_logit = weight * ((value_slope * fl + value_table)[None, :] - output[:, None])
        if TANGENT:
            dx = load_direction(vectors_dot, edge, True, x, per_r)
            dk, dl = field_along(x, dx, gk, inverse_k), field_along(x, dx, gl, inverse_l)
            node_dot = nodes_dot + centre * (num_points + 1)
            db = tl.load(node_dot).to(entry.dtype) + c * dk
            q_dot = tl.load(node_dot + 1 + at, mask=real_l, other=0.0).to(entry.dtype)
            mean = _kept_number(kept, 2, k, edge, num_points, num_edges, real_k)
            output_dot = _kept_number(kept, 3, k, edge, num_points, num_edges, real_k)
            asking, moving = (fk[:, None], b[:, None]), (dk[:, None], db[:, None])
            t, dt = fl[None, :], dl[None, :]
            turned = logits_along(asking, moving, t, dt, column, q_dot[None, :]) - mean[:, None]
            by_logit_dot = by_logit * turned + weight * ((value_slope * dl)[None, :] - output_dot[:, None])
            matrices = _added_along(
                matrices, by_logit, by_logit_dot, weight, weight * turned, asking[0], moving[0], t, dt
            )
        else:
            matrices = _added(matrices, by_logit, weight, fk[:, None], fl[None, :])
    sums += (head * tl.num_programs(1) + number) * sums_size
    _store_sums(sums, matrices, k, at, real_k, real_l, block_k, block_l, blocks, num_points)
