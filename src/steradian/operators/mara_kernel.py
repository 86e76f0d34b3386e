"""The inner loop of MARA: from the field on the sphere to one pooled number per edge and head.

Symbols as in the paper: an edge has a field ``f_k`` on K grid points; k is the point that asks, l the one that answers.
With ``a_i = W_h h_i``, ``u = W_f``, ``u' = W'_f`` the logits of one head are

.. math:: s_{kl} = f_l (a_i u' + u u' f_k + p_k u') + f_k (u p_l) + a_i p_l + p_k p_l

(divided by the root of the head's width; terms without l cancel in the softmax and are dropped). So all that depends on
the hidden width is a few tables, gathered in :class:`LogitTables`; nothing of shape [edges, K, channels] exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LogitTables", "gate_logits_to_pooled"]

#: Edges per block: the [block, K, K] logits of 32 points stay in the second-level cache.
EDGES_PER_BLOCK = 256


@dataclass(frozen=True)
class LogitTables:
    """Everything the logits and the values need besides the field. H heads, N atoms (centres), K points.

    Tables of the grid points have no atom axis in the published form, where the embedding ``p`` of a point is a
    constant, and may have one, ``[N, H, ...]``, where it belongs to the atom.

    Attributes:
        node_slope: ``[N, H]`` a_i . u', factor of f_l.
        node_point: ``[N, H, K]`` a_i . p_l plus the logarithm of the quadrature weight of l.
        field_field: ``[H]`` u . u', factor of f_k f_l.
        point_field: ``[H, K]`` p_k . u', factor of f_l.
        field_point: ``[H, K]`` u . p_l, factor of f_k.
        point_point: ``[H, K, K]`` p_k . p_l.
        value_field: ``[H]`` channel mean of u'', slope of the value.
        value_point: ``[H, K]`` channel mean of p_l, offset of the value.
    """

    node_slope: Tensor
    node_point: Tensor
    field_field: Tensor
    point_field: Tensor
    field_point: Tensor
    point_point: Tensor
    value_field: Tensor
    value_point: Tensor


def gate_logits_to_pooled(
    field: Tensor, receivers: Tensor, tables: LogitTables, weights: Tensor, dropout: float = 0.0
) -> Tensor:
    """Attend on the sphere and pool: ``[E, H]``.

    ``pooled = sum_k weights_k sum_l softmax_l(s_kl) (value_field f_l + value_point_l)`` without the value's node term:
    rows of the attention and the weights sum to one, so it passes through and the caller adds it.

    Args:
        field: ``[E, K]`` f.
        receivers: ``[E]`` centre of each edge.
        tables: see :class:`LogitTables`.
        weights: ``[K]`` quadrature weights divided by 4 pi.
        dropout: probability with which an entry of the attention is dropped (and the rest scaled up).
    """
    num_edges, num_heads = field.shape[0], tables.field_field.shape[0]
    per_head = []
    for head in range(num_heads):
        blocks = [
            _pool_block(
                field[start : start + EDGES_PER_BLOCK],
                receivers[start : start + EDGES_PER_BLOCK],
                tables,
                head,
                weights,
                dropout,
            )
            for start in range(0, num_edges, EDGES_PER_BLOCK)
        ]
        per_head.append(torch.cat(blocks) if blocks else field.sum(1))
    return torch.stack(per_head, dim=1)


def _logits(field: Tensor, receivers: Tensor, tables: LogitTables, head: int) -> Tensor:
    """``[e, K, K]`` logits, logarithms of the weights of l included: a product of rank three plus a table."""

    def of_centre(table: Tensor, grid_axes: int) -> Tensor:
        return table[:, head].index_select(0, receivers) if table.dim() == 2 + grid_axes else table[head]

    slope = of_centre(tables.node_slope, 0)
    from_field = slope.unsqueeze(1) + tables.field_field[head] * field + of_centre(tables.point_field, 1)
    left = torch.stack([field, torch.ones_like(field), from_field], dim=2)
    right = torch.stack(
        [of_centre(tables.field_point, 1).expand_as(field), of_centre(tables.node_point, 1), field], dim=1
    )
    return torch.baddbmm(of_centre(tables.point_point, 2), left, right)


def _pool_block(
    field: Tensor, receivers: Tensor, tables: LogitTables, head: int, weights: Tensor, dropout: float
) -> Tensor:
    attention = torch.softmax(_logits(field, receivers, tables, head), dim=-1)
    if dropout:
        attention = torch.nn.functional.dropout(attention, dropout)
    received = torch.matmul(weights, attention)  # [e, K]
    point = (
        tables.value_point[:, head].index_select(0, receivers)
        if tables.value_point.dim() == 3
        else (tables.value_point[head])
    )
    return (received * (tables.value_field[head] * field + point)).sum(1)
