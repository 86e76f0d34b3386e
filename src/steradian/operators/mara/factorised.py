r"""MARA's factorised form in plain PyTorch: from vectors to one pooled number per edge and head.

It equals equations 2 to 7 (:mod:`steradian.operators.mara.paper`) and forms nothing that has both an axis of edges and
one of channels. With the field ``f_k``, the centre's query ``a = W_h h_i``, ``u = W_f`` and ``u' = W'_f`` the logits of
one head are, over the root of its width,

.. math:: s_{kl} = f_l (a u' + u u' f_k + p_k u') + f_k (u p_l) + a p_l + p_k p_l

Terms without l cancel in the softmax over l: the keys' node term among them. What depends on the channels is therefore
a few numbers per atom (s = a . u' and q_l = a . p_l, :func:`node_columns`) and per head (:func:`logit_tables`):

.. math:: s_{kl} = f_l b_k + f_k F_l + q_l + P_{kl}, \quad b_k = s + c f_k + B_k

The pooled value needs the channels' mean of the values alone, ``t_l = V f_l + v_l``, and its node term passes through
(rows of the attention and weights sum to one), so the caller adds it:

.. math:: pooled = \sum_k w_k \sum_l softmax_l(s_{kl}) t_l

The machine code (:mod:`.cpu_code`) and the GPU kernels (:mod:`.triton_kernels`) compute the same from the same numbers.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["logit_tables", "node_columns", "pool_on_sphere", "sphere_field"]

#: Numbers in a block of [edges, K, K] logits: small enough for the cache, large enough for few calls...
NUMBERS_PER_BLOCK = 2**20
#: ...and of how many of them autograd may keep the attention; of more, a backward pass forms each block again.
NUMBERS_KEPT = 2**24


# --------------------------------------------------------------------------------------------------------- the field


def sphere_field(vectors: Tensor, points: Tensor, kind: Literal["distance", "squared"] = "distance") -> Tensor:
    """Field of every edge on the grid, ``[E, K]`` (equation 2): ``|x_j - (x_i + r_ij g_k)|`` or its square.

    The distance has the slope discontinuity of |x| where the neighbour lies exactly on a grid direction. There, and
    closer to it than the root of the machine precision, its derivatives are zero (the mean over both sides), so first
    and second derivatives are always finite. The square is smooth. An edge of zero length has field zero.

    Args:
        vectors: ``[E, 3]`` from receiver to sender [Å].
        points: ``[K, 3]`` unit vectors.
        kind: ``distance`` [Å] or ``squared`` [Å^2].
    """
    if kind == "squared":
        return 2 * vectors.square().sum(1, keepdim=True) - 2 * _safe_lengths(vectors) * (vectors @ points.T)
    return _DistanceField.apply(vectors, points)


def _safe_lengths(vectors: Tensor) -> Tensor:
    """``[E, 1]`` norms; zero, with zero derivatives, for a zero vector."""
    squared = vectors.square().sum(1, keepdim=True)
    empty = squared == 0
    return torch.where(empty, 0.0, torch.where(empty, 1.0, squared).sqrt())


class _DistanceField(torch.autograd.Function):
    """``f_k = |x - |x| g_k|``; the derivatives are a few products with the points, differentiable again."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, points: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        # differences, not 2 r^2 (1 - cos): that loses half of the digits near a grid direction
        squared = vectors.new_zeros(vectors.shape[0], points.shape[0])
        for axis in range(3):
            difference = torch.addcmul(vectors[:, axis : axis + 1], lengths, points[:, axis], value=-1)
            squared.addcmul_(difference, difference)
        field = squared.sqrt_()
        ctx.save_for_backward(vectors, points, field)
        return field

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        vectors, points, field = ctx.saved_tensors
        lengths = _safe_lengths(vectors)
        at_kink = field <= torch.finfo(field.dtype).eps ** 0.5 * lengths
        pull = torch.where(at_kink, 0.0, gradient / torch.where(at_kink, 1.0, field))
        # df_k/dx = (x - r g_k - ((x . g_k) - r) x / r) / f_k
        along = (pull * (vectors @ points.T)).sum(1, keepdim=True) / torch.where(lengths > 0, lengths, 1.0)
        return vectors * (2 * pull.sum(1, keepdim=True) - along) - lengths * (pull @ points), None


# ------------------------------------------------------------------------------------------ what depends on channels


def node_columns(W_h: Tensor, Wk_f: Tensor, Wv_h: Tensor, p: Tensor | None, num_heads: int) -> Tensor:
    """``[F, H (3 + K)]``, an atom's features to its mean value, mean query, s = a . u' and q = a . p of each head.

    The hidden width is contracted here, on the weights, before any atom is seen. Without ``p`` [K, d] there is no q.
    """
    scale = (len(W_h) // num_heads) ** -0.5
    query = W_h.unflatten(0, (num_heads, -1))  # [H, d/H, F]
    rows = [Wv_h.unflatten(0, (num_heads, -1)).mean(1).unsqueeze(1), query.mean(1).unsqueeze(1)]
    key = (Wk_f.unflatten(0, (num_heads, -1)) * scale).unsqueeze(1)  # [H, 1, d/H]
    if p is not None:
        key = torch.cat([key, (p.unflatten(1, (num_heads, -1)) * scale).transpose(0, 1)], dim=1)
    rows.append(torch.bmm(key, query))
    return torch.cat(rows, dim=1).flatten(0, 1).t()


def logit_tables(W_f: Tensor, Wk_f: Tensor, Wv_f: Tensor, p: Tensor, weights: Tensor, num_heads: int) -> Tensor:
    """``[H, 2 + 4 K + K^2]``: c, V, then B, F, v, w ``[K]`` each, then P ``[K, K]`` with the logarithm of w_l.

    Args:
        W_f, Wk_f, Wv_f: ``[d]``; p: ``[K, d]``.
        weights: ``[K]`` quadrature weights over 4 pi.
    """
    scale = (len(W_f) // num_heads) ** -0.5
    query_f, key_f = W_f.unflatten(0, (num_heads, -1)), Wk_f.unflatten(0, (num_heads, -1)) * scale
    p_heads = p.unflatten(1, (num_heads, -1)).transpose(0, 1)  # [H, K, d/H]
    c = (query_f * key_f).sum(-1)
    B = torch.einsum("hkc,hc->hk", p_heads, key_f)
    F = torch.einsum("hkc,hc->hk", p_heads, query_f * scale)
    P = torch.bmm(p_heads * scale, p_heads.transpose(1, 2)) + weights.log()
    V, v = Wv_f.unflatten(0, (num_heads, -1)).mean(-1), p_heads.mean(-1)
    return torch.cat([torch.stack([c, V], dim=1), B, F, v, weights.expand(num_heads, -1), P.flatten(1)], dim=1)


# ------------------------------------------------------------------------------------------------------ the attention


def pool_on_sphere(
    vectors: Tensor,
    nodes: Tensor,
    tables: Tensor,
    receivers: Tensor,
    grid: Tensor,
    field: Literal["distance", "squared"],
    dropout: float = 0.0,
) -> Tensor:
    """Pooled attention of every edge and head, ``[E, H]``, without the value's node term; derivatives of any order.

    Computed block by block of edges, so that no attention of all edges is in memory beyond ``NUMBERS_KEPT``.

    Args:
        vectors: ``[E, 3]`` from receiver to sender [Å].
        nodes: ``[N, H, 1 + K]`` per centre: s, then q_l; in the format of ``vectors`` or a shorter one.
        tables: ``[H, 2 + 4 K + K^2]``, see :func:`logit_tables`; the weights in it are constants.
        receivers: ``[E]`` centre of each edge.
        grid: ``[K, 3]`` points of the sphere.
        field: ``distance`` or ``squared``.
        dropout: probability with which an entry of the attention is dropped (and the rest scaled up).
    """
    f = sphere_field(vectors, grid, field)
    centres = nodes.to(vectors.dtype).index_select(0, receivers)
    block = max(1, NUMBERS_PER_BLOCK // len(grid) ** 2)
    again = len(f) * len(grid) ** 2 > NUMBERS_KEPT and torch.is_grad_enabled()
    heads = []
    for head in range(len(tables)):
        parts = []
        for start in range(0, max(1, len(f)), block):
            given = f[start : start + block], centres[start : start + block, head], tables[head], dropout
            parts.append(checkpoint(_pooled, *given, use_reentrant=False) if again else _pooled(*given))
        heads.append(parts[0] if len(parts) == 1 else torch.cat(parts))
    return torch.stack(heads, dim=1)


def _pooled(field: Tensor, centre: Tensor, table: Tensor, dropout: float) -> Tensor:
    """``[E]`` of one head, from ``[E, K]``, ``[E, 1 + K]`` and the head's table."""
    num_points = field.shape[1]
    (c, V), (B, F, v, w), P = (
        part.unflatten(0, shape)
        for part, shape in zip(
            table.split([2, 4 * num_points, num_points**2]), ((2,), (4, num_points), (num_points, num_points))
        )
    )
    # a product of rank three plus a table; in base 2, for PyTorch's exp2 is several times faster than its exp on a CPU
    asking = torch.stack([field, torch.ones_like(field), centre[:, :1] + c * field + B], dim=1) * math.log2(math.e)
    answering = torch.stack([F.expand_as(field), centre[:, 1:], field], dim=1)
    logits = torch.baddbmm(P, asking.transpose(1, 2), answering, beta=math.log2(math.e))
    exponentials = logits.sub_(logits.detach().amax(2, keepdim=True)).exp2_()
    # the rows' sums and what they weigh in one product; a shift of the values passes through, and smaller numbers keep
    # more digits
    value = V * field + v
    shift = value.mean(1, keepdim=True)
    normaliser, output = (exponentials @ torch.stack([torch.ones_like(value), value - shift], dim=2)).unbind(2)
    if dropout:
        attention = torch.nn.functional.dropout(exponentials / normaliser.unsqueeze(2), dropout)
        return (torch.matmul(w.detach(), attention) * value).sum(1)
    return (output / normaliser) @ w.detach() + shift.squeeze(1)
