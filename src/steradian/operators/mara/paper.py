"""MARA as the paper writes it, every tensor formed, one function per equation: read this file first.

Leonardi, Bonev, Riesen, "MARA: Continuous SE(3)-Equivariant Attention for Molecular Force Fields" (2026). Nothing here
is fast, and nothing here imports what is: these functions are what the tests hold the factorised form, the machine code
and the GPU kernels against, and what pictures are made of.

An atom i looks at its neighbour j from K directions g_k of a sphere grid (weights w_k). The directions attend to each
other; the result, pooled to one number alpha_ij, says how much the message of j counts.

=====  ==========================================================
N, E   atoms; edges from the neighbour j (sender) to the atom i (receiver)
F      invariant features h of an atom
K      points of the grid; k is the point that asks, l the one that answers
d, H   attention channels; heads, each of d / H channels
=====  ==========================================================

The same with a signal that turns with the atom, which the paper does not have, is at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steradian.equivariant.harmonics import spherical_harmonics
from steradian.operators.base import EdgesOfGate

__all__ = ["Weights", "Written", "intrinsic", "message", "published"]


class Weights(NamedTuple):
    """What is learned: W, W' and W'' of queries, keys and values, p and W_gate."""

    W_h: Tensor  # [d, F] query, of the atom's features
    W_f: Tensor  # [d] query, of the field
    Wk_f: Tensor  # [d] key, of the field
    Wv_h: Tensor  # [d, F] value, of the neighbour's features
    Wv_f: Tensor  # [d] value, of the field
    W_gate: Tensor  # [H]
    p: Tensor | None = None  # [K, d] one vector per grid point; None leaves it out
    Wk_h: Tensor | None = None  # [d, F] key, of the neighbour's features; None leaves it out


class Written(NamedTuple):
    """What the equations give."""

    alpha: Tensor  # [E]
    pooled: Tensor  # [E, H]
    attention: Tensor  # [E, H, K, K] point k asks, l answers; rows sum to one
    received: Tensor  # [E, H, K] how much point l is attended to, mean over k; sums to one


# ---------------------------------------------------------------------------------------------- equations 2 to 8


def field(vectors: Tensor, points: Tensor, kind: Literal["distance", "squared"] = "distance") -> Tensor:
    """Equation 2, ``f_ijk = |x_j - (x_i + r_ij g_k)|`` ``[E, K]`` [Å]: from the neighbour to the point at g_k on the
    sphere around i that the neighbour lies on. 0 towards the neighbour, 2 r_ij away from it; or its square [Å^2]."""
    lengths = vectors.norm(dim=1)  # r_ij
    on_sphere = lengths[:, None, None] * points  # [E, K, 3], seen from x_i
    distance = (vectors[:, None, :] - on_sphere).norm(dim=2)
    return distance if kind == "distance" else distance**2


def embedding(of_atom: Tensor | None, f: Tensor, W_f: Tensor, p: Tensor | None) -> Tensor:
    """Equations 3, 4 and 5, ``W_h h + W_f f_k + p_k`` ``[E, K, d]``: queries (h of i), keys and values (h of j).

    Args:
        of_atom: ``[E, d]`` W_h h of the atom in question at every edge; None leaves it out.
        f: ``[E, K]`` field.
        p: ``[K, d]``, or ``[E, K, d]`` where atoms have signals of their own; None leaves it out.
    """
    embedded = f[:, :, None] * W_f
    if of_atom is not None:
        embedded = of_atom[:, None, :] + embedded
    return embedded if p is None else embedded + p


def per_head(embedded: Tensor, num_heads: int) -> Tensor:
    """``[E, K, d] -> [E, H, K, d / H]``."""
    return embedded.unflatten(2, (num_heads, -1)).transpose(1, 2)


def attention(query: Tensor, key: Tensor, weights: Tensor) -> Tensor:
    """Equation 6, ``A_kl = w_l exp(q_k . k_l / sqrt(d)) / sum_m w_m exp(q_k . k_m / sqrt(d))`` ``[E, H, K, K]``.

    Args:
        query, key: ``[E, H, K, d / H]``; a head divides by the root of its own width.
        weights: ``[K]`` of the grid.
    """
    scores = (query * query.shape[3] ** -0.5) @ key.transpose(2, 3)
    return torch.softmax(scores + weights.log(), dim=3)


def pool(output: Tensor, weights: Tensor) -> Tensor:
    """Equation 7, ``Pool_{k,c}[o_k]`` ``[E, H]``: w-weighted mean over directions, mean over a head's channels."""
    return (output.mean(3) * weights).sum(2) / weights.sum()


def gate(pooled: Tensor, W_gate: Tensor, kind: Literal["neutral", "published"] = "published") -> Tensor:
    """Equation 7, ``alpha_ij = sigma(W_gate . pooled)`` ``[E]``; ``neutral`` is twice that: 1 where W_gate is 0."""
    alpha = torch.sigmoid(pooled @ W_gate)
    return 2 * alpha if kind == "neutral" else alpha


def message(alpha: Tensor, messages: Tensor, edges: EdgesOfGate, num_atoms: int) -> Tensor:
    """Equation 8, ``m_i = sum_j alpha_ij m~_ij`` ``[N, ...]`` of messages ``[E, ...]``."""
    gated = alpha.reshape(-1, *[1] * (messages.dim() - 1)) * messages
    return gated.new_zeros(num_atoms, *messages.shape[1:]).index_add(0, edges.receivers, gated)


def of_senders(alpha: Tensor, edges: EdgesOfGate, num_atoms: int) -> Tensor:
    """Node form (algorithms 2 and 3): all messages of j have the mean of the gates of what j itself receives,
    ``alpha_j = sum_m c_jm alpha_jm / sum_m c_jm`` with the cutoff's envelope c. ``[E]``."""
    assert edges.envelope is not None
    received = [edges.receivers == atom for atom in range(num_atoms)]
    mean = [(edges.envelope[mine] * alpha[mine]).sum() / edges.envelope[mine].sum() for mine in received]
    return torch.stack(mean)[edges.senders]


def published(
    features: Tensor,
    edges: EdgesOfGate,
    points: Tensor,
    weights: Tensor,
    given: Weights,
    *,
    field_kind: Literal["distance", "squared"] = "distance",
    gate_kind: Literal["neutral", "published"] = "published",
    norms: tuple[Callable[[Tensor], Tensor], ...] | None = None,
    residual: bool = False,
) -> Written:
    """Equations 2 to 7 one after the other, and figure 5's variants.

    Args:
        features: ``[N, F]``.
        points, weights: ``[K, 3]`` and ``[K]`` of the grid.
        norms: figure 5, LayerNorm of queries, keys and values before they attend.
        residual: figure 5, the query embedding is added to what the attention gives.
    """
    num_heads = len(given.W_gate)
    h_i, h_j = features[edges.receivers], features[edges.senders]
    f = field(edges.vectors, points, field_kind)  # equation 2
    query = embedding(h_i @ given.W_h.T, f, given.W_f, given.p)  # equation 3
    key = embedding(None if given.Wk_h is None else h_j @ given.Wk_h.T, f, given.Wk_f, given.p)  # equation 4
    value = embedding(h_j @ given.Wv_h.T, f, given.Wv_f, given.p)  # equation 5
    before = per_head(query, num_heads)
    if norms is not None:
        query, key, value = (norm(part) for norm, part in zip(norms, (query, key, value)))
    query, key, value = (per_head(part, num_heads) for part in (query, key, value))
    A = attention(query, key, weights)  # equation 6
    output = A @ value + before if residual else A @ value
    pooled = pool(output, weights)  # equation 7
    return Written(gate(pooled, given.W_gate, gate_kind), pooled, A, weights @ A / weights.sum())


# --------------------------------------------------------------------- beyond the paper: a signal that turns with i


def density(edges: EdgesOfGate, num_atoms: int, l_max: int) -> Tensor:
    """``sum_j R(r_ij) Y_lm(r_ij)`` ``[N, (l_max + 1)^2, R]``, for an atom that has no features above degree 0."""
    assert edges.radial is not None
    harmonics = spherical_harmonics(torch.nn.functional.normalize(edges.vectors, dim=1), l_max)
    per_edge = harmonics[:, :, None] * edges.radial[:, None, :]
    return message(torch.ones_like(per_edge[:, 0, 0]), per_edge, edges, num_atoms)


def signal(features: Tensor, parts: Sequence[tuple[int, int, Tensor]], points: Tensor) -> Tensor:
    """``p_i(g_k) = sum_lm (W_l c_i,lm) Y_lm(g_k)`` ``[N, K, d]``.

    Args:
        features: ``[N, D, C]`` c.
        parts: of every irrep that takes part its degree l, its first component in D, and W_l ``[C, d]``.
    """
    total = features.new_zeros(len(features), len(points), parts[0][2].shape[1])
    for degree, start, weight in parts:
        harmonics = spherical_harmonics(points, degree)[:, degree**2 :]  # [K, 2 l + 1]
        total = total + torch.einsum("km,nmc,cd->nkd", harmonics, features[:, start : start + 2 * degree + 1], weight)
    return total


def mean_square(embedded: Tensor, points: Tensor, weights: Tensor, l_max: int) -> Tensor:
    """``[E, H]`` mean square of queries or keys over channels and sphere, degree l counting ``4^(l - 1)`` times."""
    weights = weights / weights.sum()
    total = embedded.new_zeros(embedded.shape[:2])
    for degree in range(l_max + 1):
        harmonics = spherical_harmonics(points, degree)[:, degree**2 :]
        coefficients = torch.einsum("k,km,ehkd->ehmd", weights, harmonics, embedded)
        total = total + 4 ** max(degree - 1, 0) * coefficients.square().sum(2).mean(2)
    return total


def intrinsic(
    features: Tensor,
    edges: EdgesOfGate,
    points: Tensor,
    weights: Tensor,
    given: Weights,
    p: Tensor | None,
    temperature: Tensor,
    l_max: int,
    *,
    kernel: Literal["exp", "polynomial"] = "exp",
    gate_kind: Literal["neutral", "published"] = "published",
) -> Written:
    """The same with signals ``p`` ``[N, K, d]`` in place of ``p_k``, the squared field, no features in the keys, and
    bounded scores ``T_h q . k / (d_h sqrt((1 + |q|^2) (1 + |k|^2)))``.

    Args:
        temperature: ``[H]`` T_h.
        l_max: highest degree of the signal.
        kernel: ``exp`` as equation 6; ``polynomial``: ``1 + s + s^2 / 2`` for exp(s), normalised over k and l together.
    """
    num_heads = len(given.W_gate)
    own = None if p is None else p[edges.receivers]
    f = field(edges.vectors, points, "squared")
    query = per_head(embedding(features[edges.receivers] @ given.W_h.T, f, given.W_f, own), num_heads)
    key = per_head(embedding(None, f, given.Wk_f, own), num_heads)
    value = per_head(embedding(features[edges.senders] @ given.Wv_h.T, f, given.Wv_f, own), num_heads)
    sizes = (1 + mean_square(query, points, weights, l_max)) * (1 + mean_square(key, points, weights, l_max))
    scores = (temperature / query.shape[3] / sizes.sqrt())[:, :, None, None] * (query @ key.transpose(2, 3))
    if kernel == "exp":
        A = torch.softmax(scores + weights.log(), dim=3)
        received = weights @ A / weights.sum()
        pooled = pool(A @ value, weights)
    else:
        together = weights[:, None] * weights * (1 + scores + scores**2 / 2)
        together = together / together.sum((2, 3), keepdim=True)
        A = together / together.sum(3, keepdim=True)
        received = together.sum(2)
        pooled = (together @ value).mean(3).sum(2)
    return Written(gate(pooled, given.W_gate, gate_kind), pooled, A, received)
