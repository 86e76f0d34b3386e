"""MARA as the paper writes it, with every tensor formed: the truth in tests and benchmarks, not what runs.

Nothing here is shared with the factorised form but the parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from steradian.operators.mara.mara import MARA

__all__ = ["DenseResult", "dense_mara"]


class DenseResult(dict[str, Tensor]):
    """``alpha [E]``, ``pooled [E, H]`` and ``attention [E, H, K, K]``."""


def dense_mara(mara: MARA, features: Tensor, edges: Any, key_node: Tensor | None = None) -> DenseResult:
    """Equations 2-8 (and figure 5's variants) with the parameters of ``mara``; memory E * K * max(K, d).

    Args:
        mara: a gate in the laboratory frame, without dropout.
        features: ``[N, F]`` invariants.
        edges: anything with ``senders``, ``receivers``, ``vectors`` (and ``envelope`` for ``where="node"``).
        key_node: ``[d, F]`` the paper's W'_h, to show that it never matters.
    """
    heads = mara.num_heads
    points, weights = mara.grid.points.to(features), mara.grid.weights.to(features)
    sender, receiver = features[edges.senders], features[edges.receivers]  # [E, F]

    # equation 2: distance from the neighbour to every point of the sphere of radius r_ij around the centre
    lengths = edges.vectors.norm(dim=1)
    field = (edges.vectors[:, None, :] - lengths[:, None, None] * points).norm(dim=2)  # [E, K]
    if mara.field == "squared":
        field = field**2

    # equations 3-5: queries, keys, values [E, K, d]
    position = torch.zeros_like(points[:, :1]) if mara.p is None else mara.p
    query = (receiver @ mara.W_h.T)[:, None, :] + field[:, :, None] * mara.W_f + position
    key = field[:, :, None] * mara.Wk_f + position
    value = (sender @ mara.Wv_h.T)[:, None, :] + field[:, :, None] * mara.Wv_f + position
    if key_node is None:
        key_node = mara.Wk_h
    if key_node is not None:
        key = key + (sender @ key_node.T)[:, None, :]
    embedded = query
    if mara.normalize:
        query, key, value = mara.norm_q(query), mara.norm_k(key), mara.norm_v(value)

    # equation 6: attention with quadrature weights, head by head
    query, key, value, embedded = (
        part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (query, key, value, embedded)
    )
    logits = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
    attention = weights * torch.exp(logits - logits.amax(3, keepdim=True))
    attention = attention / attention.sum(3, keepdim=True)
    output = attention @ value  # [E, H, K, d / H]
    if mara.residual:
        output = output + embedded

    # equation 7: weighted mean over directions, mean over the channels of a head
    pooled = (output.mean(3) * weights).sum(2) / weights.sum()  # [E, H]
    alpha = nn.functional.linear(pooled, mara.W_gate[None]).squeeze(1).sigmoid()
    if mara.gate == "neutral":
        alpha = 2 * alpha
    if mara.where == "node":
        mean = [
            (edges.envelope[mine] * alpha[mine]).sum() / edges.envelope[mine].sum()
            for mine in (edges.receivers == atom for atom in range(len(features)))
        ]
        alpha = torch.stack(mean)[edges.senders]
    return DenseResult(alpha=alpha, pooled=pooled, attention=attention)
