"""MARA's gate on a GPU, by Triton: geometry, attention, pooling and two derivatives without any ``[E, K, K]`` array.

The formulas are those of :mod:`steradian.operators.mara.cpu_code`: for an edge with field ``f_k = |x - |x| g_k|``,

    s_kl = f_l b_k + f_k F_l + q_l + P_kl,  b_k = s + c f_k + B_k,  A = softmax_l(s),  t_l = V f_l + v_l,  o = A t

and ``pooled = sum_k w_k o_k``. The derivative by a logit is ``M_kl = w_k A_kl (t_l - o_k)``; derivatives are sums of it
over rows (:func:`row_kernel`), columns (:func:`column_kernel`) and, for the tables, over edges
(:mod:`steradian.operators.mara.triton_sums`). A second derivative is wanted along a direction only, so it is the
derivative of M along that direction: ``M' = w_k A_kl ((s'_kl - mean_k) (t_l - o_k) + t'_l - o'_k)``.

A thread owns an edge and a few points k (rows) or l (columns) and loops over the other points: sums stay in registers,
and grids of any size run. What connects the kernels are a few numbers per edge and point. Everything is summed in a
fixed order; there are no atomic operations.

Tuples of the kernels: ``x`` is (x, y, z, r) of the edges and ``dx`` its derivative; ``asking`` is (f_k, b_k) and
``moving`` its derivative.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["column_kernel", "row_kernel"]

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_xyz(table, row, known):
    """(x, y, z) of rows of a table ``[rows, 3]``, edges or points of the grid; zero where a row is not known."""
    place = table + row * 3
    x = tl.load(place, mask=known, other=0.0)
    y = tl.load(place + 1, mask=known, other=0.0)
    z = tl.load(place + 2, mask=known, other=0.0)
    return x, y, z


@triton.jit
def load_edge(vectors, edge, known):
    """(x, y, z, r) and 1/r (0 for 0) of edges ``[E, 3]``."""
    x, y, z = load_xyz(vectors, edge, known)
    squared = x * x + y * y + z * z
    some = squared > 0.0
    r = tl.where(some, tl.sqrt(tl.where(some, squared, 1.0)), 0.0)
    per_r = tl.where(some, 1.0 / tl.where(some, r, 1.0), 0.0)
    return (x, y, z, r), per_r


@triton.jit
def load_direction(vectors_dot, edge, known, x, per_r):
    """Derivative of (x, y, z, r)."""
    dx, dy, dz = load_xyz(vectors_dot, edge, known)
    return dx, dy, dz, (x[0] * dx + x[1] * dy + x[2] * dz) * per_r


@triton.jit
def across(x, AXIS: tl.constexpr):
    """The four tensors with a new axis."""
    return (
        tl.expand_dims(x[0], AXIS),
        tl.expand_dims(x[1], AXIS),
        tl.expand_dims(x[2], AXIS),
        tl.expand_dims(x[3], AXIS),
    )


@triton.jit
def across_points(g, AXIS: tl.constexpr):
    """The three tensors with a new axis."""
    return tl.expand_dims(g[0], AXIS), tl.expand_dims(g[1], AXIS), tl.expand_dims(g[2], AXIS)


@triton.jit
def field_of(x, g, SQUARED: tl.constexpr, KINK: tl.constexpr):
    """f and the factor of its derivative: 1/f (0 at the kink), or 2 for the square."""
    a, b, c = x[0] - x[3] * g[0], x[1] - x[3] * g[1], x[2] - x[3] * g[2]
    squared = a * a + b * b + c * c
    field = squared
    inverse = squared * 0.0 + 2.0
    if not SQUARED:
        field = tl.sqrt(squared)
        away = field > x[3] * KINK
        inverse = tl.where(away, 1.0 / tl.where(away, field, 1.0), 0.0)
    return field, inverse


@triton.jit
def field_along(x, dx, g, inverse):
    """The field's derivative along the direction."""
    return inverse * (
        (x[0] - x[3] * g[0]) * (dx[0] - dx[3] * g[0])
        + (x[1] - x[3] * g[1]) * (dx[1] - dx[3] * g[1])
        + (x[2] - x[3] * g[2]) * (dx[2] - dx[3] * g[2])
    )


@triton.jit
def _answer(x, grid, node, tables, num_points, at, known, SQUARED: tl.constexpr, KINK: tl.constexpr):
    """Answering point ``at`` of every edge: its direction, f, factor of the derivative, q, F and t."""
    g = load_xyz(grid, at, True)
    field, inverse = field_of(x, g, SQUARED, KINK)
    q = tl.load(node + 1 + at, mask=known, other=0.0).to(field.dtype)
    column = tl.load(tables + 2 + num_points + at)
    value = tl.load(tables + 1) * field + tl.load(tables + 2 + 2 * num_points + at)
    return g, field, inverse, q, column, value


@triton.jit
def _logits(asking, field, column, q, table):
    """s_kl of rows k and one l, ``[POINTS, EDGES]``."""
    return asking[1] * field[None, :] + (asking[0] * column + (q[None, :] + table[:, None]))


@triton.jit
def _row_top(
    x, asking, grid, node, tables, row, num_points, known, real, SQUARED: tl.constexpr, KINK: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Largest logit of every row; means of f, t and F over the points, to be taken off from them: shifts drop out of
    covariances, and smaller numbers keep more digits."""
    top = asking[0] * 0.0 - 3.0e38
    mean_f, mean_t, mean_column = x[3] * 0.0, x[3] * 0.0, tl.load(tables) * 0.0
    for at in tl.range(0, num_points, loop_unroll_factor=UNROLL):
        _, field, _, q, column, value = _answer(x, grid, node, tables, num_points, at, known, SQUARED, KINK)
        table = tl.load(row + at, mask=real, other=0.0)
        top = tl.maximum(top, _logits(asking, field, column, q, table))
        mean_f += field
        mean_t += value
        mean_column += column
    return top, (mean_f / num_points, mean_t / num_points, mean_column / num_points)


@triton.jit
def _row_sums(
    x, asking, top, means, grid, node, tables, row, num_points, known, real,
    SLOPES: tl.constexpr, SQUARED: tl.constexpr, KINK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """log sum exp and o (its mean t taken off) of every row; with SLOPES sums of A (t - o) with f and with F."""
    nothing = asking[0] * 0.0
    total, output, sum_f, sum_tf, sum_column, sum_tcolumn = nothing, nothing, nothing, nothing, nothing, nothing
    for at in tl.range(0, num_points, loop_unroll_factor=UNROLL):
        _, field, _, q, column, value = _answer(x, grid, node, tables, num_points, at, known, SQUARED, KINK)
        table = tl.load(row + at, mask=real, other=0.0)
        exponential = tl.exp2((_logits(asking, field, column, q, table) - top) * LOG2_E)
        valued = exponential * (value - means[1])[None, :]
        total += exponential
        output += valued
        if SLOPES:
            centred, column_centred = (field - means[0])[None, :], column - means[2]
            sum_f += exponential * centred
            sum_tf += valued * centred
            sum_column += exponential * column_centred
            sum_tcolumn += valued * column_centred
    per = 1.0 / total
    output = output * per
    level = top + tl.log2(total) * LN_2
    return level, output, per * (sum_tf - output * sum_f), per * (sum_tcolumn - output * sum_column)


@triton.jit
def logits_along(asking, moving, field, moved, column, q_dot):
    """Derivative of the logits; arguments of two axes."""
    return moving[0] * column + (moving[1] * field + (asking[1] * moved + q_dot))


@triton.jit
def _row_mean_along(
    x, dx, asking, moving, level, grid, node, node_dot, tables, row, num_points, known, real,
    SQUARED: tl.constexpr, KINK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Mean of s' under A of every row."""
    mean = level * 0.0
    for at in tl.range(0, num_points, loop_unroll_factor=UNROLL):
        g, field, inverse, q, column, _ = _answer(x, grid, node, tables, num_points, at, known, SQUARED, KINK)
        table = tl.load(row + at, mask=real, other=0.0)
        share = tl.exp2((_logits(asking, field, column, q, table) - level) * LOG2_E)
        moved = field_along(x, dx, g, inverse)
        q_dot = tl.load(node_dot + 1 + at, mask=known, other=0.0).to(field.dtype)
        mean += share * logits_along(asking, moving, field[None, :], moved[None, :], column, q_dot[None, :])
    return mean


@triton.jit
def _row_sums_along(
    x, dx, asking, moving, level, output, mean, means, grid, node, node_dot, tables, row, num_points, known, real,
    SQUARED: tl.constexpr, KINK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """o' of every row, sums of M / w with f and F, and the derivatives of these sums."""
    nothing = level * 0.0
    output_dot, first_f, first_column, sum_f, sum_column = nothing, nothing, nothing, nothing, nothing
    dot_f, dot_column = nothing, nothing
    slope = tl.load(tables + 1)
    for at in tl.range(0, num_points, loop_unroll_factor=UNROLL):
        g, field, inverse, q, column, value = _answer(x, grid, node, tables, num_points, at, known, SQUARED, KINK)
        table = tl.load(row + at, mask=real, other=0.0)
        share = tl.exp2((_logits(asking, field, column, q, table) - level) * LOG2_E)
        moved = field_along(x, dx, g, inverse)
        q_dot = tl.load(node_dot + 1 + at, mask=known, other=0.0).to(field.dtype)
        turned = logits_along(asking, moving, field[None, :], moved[None, :], column, q_dot[None, :]) - mean
        weighted = share * ((value - means[1])[None, :] - output)
        change = turned * weighted + share * (slope * moved)[None, :]
        centred, column_centred = (field - means[0])[None, :], column - means[2]
        output_dot += change
        first_f += weighted * centred
        first_column += weighted * column_centred
        sum_f += share * centred
        sum_column += share * column_centred
        dot_f += change * centred + weighted * moved[None, :]
        dot_column += change * column_centred
    return output_dot, first_f, first_column, dot_f - output_dot * sum_f, dot_column - output_dot * sum_column


@triton.jit
def _keep(kept, array, k, edge, num_points, num_edges, value, inside):
    """Into ``kept[array]`` of ``[A, K, E]``."""
    tl.store(kept + (array * num_points + k)[:, None] * num_edges + edge[None, :], value, mask=inside)


@triton.jit
def _keep_along(kept, k, edge, num_points, num_edges, mean, output_dot, asked, asked_dot, inside):
    """What the derivative along the direction leaves, after log sum exp and o."""
    _keep(kept, 2, k, edge, num_points, num_edges, mean, inside)
    _keep(kept, 3, k, edge, num_points, num_edges, output_dot, inside)
    _keep(kept, 4, k, edge, num_points, num_edges, asked, inside)
    _keep(kept, 5, k, edge, num_points, num_edges, asked_dot, inside)


@triton.jit
def _own_rows(nodes, receivers, edge, known, head, num_heads, num_points):
    """Address of the numbers of each edge's centre."""
    centre = tl.load(receivers + edge, mask=known, other=0) * num_heads + head
    return nodes + centre * (num_points + 1)


@triton.jit
def _first_tables(tables, k, real, num_points):
    """B_k, and w_k with an axis of edges."""
    asking = tl.load(tables + 2 + k, mask=real, other=0.0)
    return asking, tl.load(tables + 2 + 3 * num_points + k, mask=real, other=0.0)[:, None]


@triton.jit
def row_kernel(
    vectors, receivers, nodes, tables, grid, vectors_dot, nodes_dot, pooled, by_slope, kept, num_edges, num_points,
    num_heads, table_size, KIND: tl.constexpr, ARRAYS: tl.constexpr, SQUARED: tl.constexpr, KINK: tl.constexpr,
    EDGES: tl.constexpr, POINTS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Softmax of every row k. KIND 0: pooled ``[H, E]``. 1: also its derivative by s, ``by_slope [H, E]``. 2: pooled's
    derivative along the direction, and that of the derivative by s.

    ``kept [H, ARRAYS, K, E]`` receives log sum exp and o; for KIND 1 then the derivative by f_k as far as k asks; for
    KIND 2 then the mean of s', o', and the derivatives by f_k (k asking) of the value and of the tangent."""
    head = tl.program_id(1).to(tl.int64)
    edge = tl.program_id(0).to(tl.int64) * EDGES + tl.arange(0, EDGES)
    known = edge < num_edges
    x, per_r = load_edge(vectors, edge, known)
    node = _own_rows(nodes, receivers, edge, known, head, num_heads, num_points)
    node_dot = _own_rows(nodes_dot, receivers, edge, known, head, num_heads, num_points)
    tables += head * table_size
    kept += head * ARRAYS * num_points * num_edges
    pooled_sum, slope_sum = x[3] * 0.0, x[3] * 0.0
    for first in range(0, num_points, POINTS):
        k = (first + tl.arange(0, POINTS)).to(tl.int64)
        real = k < num_points
        inside = real[:, None] & known[None, :]
        g = load_xyz(grid, k, real)
        f, inverse = field_of(across(x, 0), across_points(g, 1), SQUARED, KINK)
        table, w = _first_tables(tables, k, real, num_points)
        asking = (f, tl.load(node, mask=known, other=0.0).to(f.dtype)[None, :] + tl.load(tables) * f + table[:, None])
        row = tables + 2 + 4 * num_points + k * num_points
        top, means = _row_top(x, asking, grid, node, tables, row, num_points, known, real, SQUARED, KINK, UNROLL)
        level, output, with_f, with_column = _row_sums(
            x, asking, top, means, grid, node, tables, row, num_points, known, real, KIND == 1, SQUARED, KINK, UNROLL
        )
        if ARRAYS:
            _keep(kept, 0, k, edge, num_points, num_edges, level, inside)
            _keep(kept, 1, k, edge, num_points, num_edges, output + means[1][None, :], inside)
        if KIND == 1:
            _keep(kept, 2, k, edge, num_points, num_edges, w * (with_column + tl.load(tables) * with_f), inside)
            slope_sum += tl.sum(w * with_f, 0)
        if KIND == 2:
            dx = load_direction(vectors_dot, edge, known, x, per_r)
            df = field_along(across(x, 0), across(dx, 0), across_points(g, 1), inverse)
            moving = (df, tl.load(node_dot, mask=known, other=0.0).to(f.dtype)[None, :] + tl.load(tables) * df)
            mean = _row_mean_along(
                x, dx, asking, moving, level, grid, node, node_dot, tables, row, num_points, known, real,
                SQUARED, KINK, UNROLL,
            )  # fmt: skip
            output_dot, first_f, first_column, dot_f, dot_column = _row_sums_along(
                x, dx, asking, moving, level, output, mean, means, grid, node, node_dot, tables, row, num_points,
                known, real, SQUARED, KINK, UNROLL,
            )  # fmt: skip
            asked = w * (first_column + tl.load(tables) * first_f)
            asked_dot = w * (dot_column + tl.load(tables) * dot_f)
            _keep_along(kept, k, edge, num_points, num_edges, mean, output_dot, asked, asked_dot, inside)
            slope_sum += tl.sum(w * dot_f, 0)
            pooled_sum += tl.sum(w * output_dot, 0)
        else:
            pooled_sum += tl.sum(w * (output + means[1][None, :]), 0)
    tl.store(pooled + head * num_edges + edge, pooled_sum, mask=known)
    if KIND != 0:
        tl.store(by_slope + head * num_edges + edge, slope_sum, mask=known)


@triton.jit
def _kept_row(kept, array, at, edge, num_points, num_edges, known):
    """``[EDGES]`` of row ``at``."""
    place = (edge * 0 + array * num_points + at) * num_edges + edge
    return tl.load(kept + place, mask=known, other=0.0)


@triton.jit
def _column_sums(
    x, dx, f, moved, q, q_dot, value, slope, slope_dot, grid, tables, column_of_l, table, kept, edge, num_points,
    num_edges, known, real, TANGENT: tl.constexpr, SQUARED: tl.constexpr, KINK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Sums over k for a block of l: M, derivative by f_l (l answering), and those of the tangent."""
    nothing = f * 0.0
    by_point, by_field, by_point_dot, by_field_dot = nothing, nothing, nothing, nothing
    c, value_slope = tl.load(tables), tl.load(tables + 1)
    for at in tl.range(0, num_points, loop_unroll_factor=UNROLL):
        g = load_xyz(grid, at, True)
        fk, inverse = field_of(x, g, SQUARED, KINK)
        b = (slope + c * fk + tl.load(tables + 2 + at))[None, :]
        level = _kept_row(kept, 0, at, edge, num_points, num_edges, known)
        output = _kept_row(kept, 1, at, edge, num_points, num_edges, known)
        entry = tl.load(table + at * num_points, mask=real, other=0.0)[:, None]
        logit = f * b + (fk[None, :] * column_of_l[:, None] + (q + entry))
        weight = tl.load(tables + 2 + 3 * num_points + at) * tl.exp2((logit - level[None, :]) * LOG2_E)
        centred = value - output[None, :]
        by_logit = weight * centred
        by_point += by_logit
        by_field += b * by_logit + value_slope * weight
        if TANGENT:
            dfk = field_along(x, dx, g, inverse)
            db = (slope_dot + c * dfk)[None, :]
            mean = _kept_row(kept, 2, at, edge, num_points, num_edges, known)
            output_dot = _kept_row(kept, 3, at, edge, num_points, num_edges, known)
            asking, moving = (fk[None, :], b), (dfk[None, :], db)
            turned = logits_along(asking, moving, f, moved, column_of_l[:, None], q_dot) - mean[None, :]
            by_logit_dot = by_logit * turned + weight * (value_slope * moved - output_dot[None, :])
            by_point_dot += by_logit_dot
            by_field_dot += db * by_logit + (b * by_logit_dot + value_slope * (weight * turned))
    return by_point, by_field, by_point_dot, by_field_dot


@triton.jit
def _pull(x, g, pull):
    """Sums over points of p, p x . g and p g, with df/dx = (2 x - (x . g) x / r - r g) p / by_field."""
    along = pull * (x[0][None, :] * g[0][:, None] + x[1][None, :] * g[1][:, None] + x[2][None, :] * g[2][:, None])
    gx, gy, gz = tl.sum(pull * g[0][:, None], 0), tl.sum(pull * g[1][:, None], 0), tl.sum(pull * g[2][:, None], 0)
    return tl.sum(pull, 0), tl.sum(along, 0), gx, gy, gz


@triton.jit
def _added(a, b):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4]


@triton.jit
def _by_vectors(by_vectors, edge, known, x, dx, per_r, first, second, scale, TANGENT: tl.constexpr):
    """Derivative by the vectors, D = x (2 P - Q / r) - r G, or that of the tangent, times ``scale``."""
    along = 2.0 * first[0] - first[1] * per_r
    a, b, c = x[0] * along - x[3] * first[2], x[1] * along - x[3] * first[3], x[2] * along - x[3] * first[4]
    if TANGENT:
        along_dot = 2.0 * second[0] - second[1] * per_r + first[1] * dx[3] * per_r * per_r
        a = dx[0] * along + x[0] * along_dot - dx[3] * first[2] - x[3] * second[2]
        b = dx[1] * along + x[1] * along_dot - dx[3] * first[3] - x[3] * second[3]
        c = dx[2] * along + x[2] * along_dot - dx[3] * first[4] - x[3] * second[4]
    place = by_vectors + edge * 3
    tl.store(place, a * scale, mask=known)
    tl.store(place + 1, b * scale, mask=known)
    tl.store(place + 2, c * scale, mask=known)


@triton.jit
def column_kernel(
    vectors, receivers, nodes, tables, grid, vectors_dot, nodes_dot, gradient, kept, by_vectors, by_point,
    num_edges, num_points, num_heads, table_size,
    TANGENT: tl.constexpr, ARRAYS: tl.constexpr, SQUARED: tl.constexpr, KINK: tl.constexpr,
    EDGES: tl.constexpr, POINTS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Derivatives of pooled (TANGENT: of ``gradient`` times its tangent) by the vectors, ``[H, E, 3]``, and by the q of
    the edge's centre, ``[H, K, E]``."""
    head = tl.program_id(1).to(tl.int64)
    edge = tl.program_id(0).to(tl.int64) * EDGES + tl.arange(0, EDGES)
    known = edge < num_edges
    x, per_r = load_edge(vectors, edge, known)
    node = _own_rows(nodes, receivers, edge, known, head, num_heads, num_points)
    node_dot = _own_rows(nodes_dot, receivers, edge, known, head, num_heads, num_points)
    tables += head * table_size
    kept += head * ARRAYS * num_points * num_edges
    by_point += head * num_points * num_edges
    slope = tl.load(node, mask=known, other=0.0).to(per_r.dtype)
    dx, slope_dot, scale = x, slope, per_r * 0.0 + 1.0
    if TANGENT:
        dx = load_direction(vectors_dot, edge, known, x, per_r)
        slope_dot = tl.load(node_dot, mask=known, other=0.0).to(per_r.dtype)
        scale = tl.load(gradient + edge * num_heads + head, mask=known, other=0.0).to(per_r.dtype)
    nothing = per_r * 0.0
    first_sums = (nothing, nothing, nothing, nothing, nothing)
    second_sums = (nothing, nothing, nothing, nothing, nothing)
    for first in range(0, num_points, POINTS):
        k = (first + tl.arange(0, POINTS)).to(tl.int64)
        real = k < num_points
        inside = real[:, None] & known[None, :]
        g = load_xyz(grid, k, real)
        f, inverse = field_of(across(x, 0), across_points(g, 1), SQUARED, KINK)
        q = tl.load(node[None, :] + 1 + k[:, None], mask=inside, other=0.0).to(f.dtype)
        value = tl.load(tables + 1) * f + tl.load(tables + 2 + 2 * num_points + k, mask=real, other=0.0)[:, None]
        column = tl.load(tables + 2 + num_points + k, mask=real, other=0.0)
        moved, q_dot = f, q
        if TANGENT:
            moved = field_along(across(x, 0), across(dx, 0), across_points(g, 1), inverse)
            q_dot = tl.load(node_dot[None, :] + 1 + k[:, None], mask=inside, other=0.0).to(f.dtype)
        of_point, of_field, of_point_dot, of_field_dot = _column_sums(
            x, dx, f, moved, q, q_dot, value, slope, slope_dot, grid, tables, column, tables + 2 + 4 * num_points + k,
            kept, edge, num_points, num_edges, known, real, TANGENT, SQUARED, KINK, UNROLL,
        )  # fmt: skip
        asked = kept + ((4 if TANGENT else 2) * num_points + k)[:, None] * num_edges + edge[None, :]
        pull = (of_field + tl.load(asked, mask=inside, other=0.0)) * tl.where(inside, inverse, 0.0)
        first_sums = _added(first_sums, _pull(x, g, pull))
        place = by_point + k[:, None] * num_edges + edge[None, :]
        if TANGENT:
            asked_dot = kept + (5 * num_points + k)[:, None] * num_edges + edge[None, :]
            change = (of_field_dot + tl.load(asked_dot, mask=inside, other=0.0)) * tl.where(inside, inverse, 0.0)
            if not SQUARED:
                change -= pull * moved * inverse
            second_sums = _added(second_sums, _pull(x, g, change))
            _, along, _, _, _ = _pull(dx, g, pull)
            second_sums = _added(second_sums, (nothing, along, nothing, nothing, nothing))
            tl.store(place, of_point_dot * scale[None, :], mask=inside)
        else:
            tl.store(place, of_point, mask=inside)
    by_vectors += head * num_edges * 3
    _by_vectors(by_vectors, edge, known, x, dx, per_r, first_sums, second_sums, scale, TANGENT)
