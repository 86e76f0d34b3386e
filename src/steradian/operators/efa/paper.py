"""Euclidean fast attention as the paper writes it: every tensor formed, one function per equation.

Frank, Chmiela, Müller, Unke, "Euclidean Fast Attention: Machine Learning Global Atomic Representations at Linear Cost"
(2024, arXiv:2412.08541); numbers of equations are those of the article, Nature Machine Intelligence (2026).

Every atom turns its query and its key by an angle that grows along a direction u. Their product then depends on how far
two atoms are apart along u, and its mean over all directions on their distance alone, ``sin(w r) / (w r)``. Because the
sum over the atoms that are attended to is formed first, the cost grows as the number of atoms.

Nothing here is fast, and nothing fast is imported: this is what tests compare the operator with.

====  ==============================================================================================
N     atoms of one system, or of several, one after the other
M     directions u_j of a quadrature rule, with weights λ_j that sum to one
D, F  components (all degrees and parities) and channels of queries and keys; F is even
n     pairs of channels, F / 2, with a frequency ω each
====  ==============================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from steradian.equivariant.paths import CoupledProduct

__all__ = [
    "QKV",
    "attention_along",
    "attention_per_direction",
    "erope",
    "frequencies_up_to",
    "invariant_attention",
    "mean_over_directions",
    "sinc_kernel",
    "sum_over_pairs",
    "tensor_integration",
]


class QKV(NamedTuple):
    """What every atom brings to the attention.

    Attributes:
        queries, keys: ``[N, D, F]``: channels 2n and 2n + 1 are the real and imaginary part of a complex number. The
            published code divides queries by the root of their size, ``(D F)^(1/2)``; here whoever makes them does.
        values: ``[N, D_v, F_v]``.
        positions: ``[N, 3]`` [Å].
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor

    def of(self, atoms: slice) -> QKV:
        """Of some atoms."""
        return QKV(*(tensor[atoms] for tensor in self))

    def channels(self, pairs: slice) -> QKV:
        """With some pairs of channels of queries and keys."""
        own = slice(2 * pairs.start, 2 * pairs.stop)
        return self._replace(queries=self.queries[..., own], keys=self.keys[..., own])


def frequencies_up_to(max_frequency: float, max_length: float, count: int) -> Tensor:
    """``[n]`` equally spaced frequencies from 0 to ``ω_max = b_max / r_max`` (15) [1/Å]; one alone is the largest.

    Args:
        max_frequency: b_max, dimensionless: the largest phase that atoms r_max apart differ by.
        max_length: r_max [Å].
        count: n, one per pair of channels.
    """
    largest = max_frequency / max_length
    if count == 1:
        return torch.tensor([largest], dtype=torch.float64)
    return torch.linspace(0.0, largest, count, dtype=torch.float64)


def erope(features: Tensor, positions: Tensor, direction: Tensor, frequencies: Tensor) -> Tensor:
    """Rotary encoding of positions along a direction, ``x exp(i ω u . r)`` (1), in real numbers (11).

    Args:
        features: ``[N, D, F]``.
        positions: ``[N, 3]`` [Å].
        direction: ``[3]`` unit vector u.
        frequencies: ``[n]`` ω [1/Å].

    Returns:
        ``[N, D, F]``: ``x'[2n] = x[2n] cos - x[2n + 1] sin`` and ``x'[2n + 1] = x[2n + 1] cos + x[2n] sin``.

    Raises:
        ValueError: the channels are not pairs, one for every frequency.
    """
    if features.shape[-1] != 2 * len(frequencies):
        raise ValueError(f"channels rotate in pairs; {features.shape[-1]} are not two for each of {len(frequencies)}")
    phases = ((positions @ direction).unsqueeze(-1) * frequencies).unsqueeze(1)  # [N, 1, n]
    real, imaginary = features[..., ::2], features[..., 1::2]
    turned = real * phases.cos() - imaginary * phases.sin(), imaginary * phases.cos() + real * phases.sin()
    return torch.stack(turned, dim=-1).flatten(-2)


def attention_along(atoms: QKV, frequencies: Tensor, direction: Tensor) -> Tensor:
    """``B_u = Q_u (K_u^T V)`` (13), ``[N, D_v, F_v]``, for the atoms of one system.

    There is no softmax and no division by the number of atoms (4), and an atom attends to itself too.
    """
    queries = erope(atoms.queries, atoms.positions, direction, frequencies).flatten(1)
    keys = erope(atoms.keys, atoms.positions, direction, frequencies).flatten(1)
    outer = torch.einsum("jx,jdf->xdf", keys, atoms.values)  # [D F, D_v, F_v], the only sum over atoms
    return torch.einsum("ix,xdf->idf", queries, outer)


def attention_per_direction(atoms: QKV, frequencies: Tensor, directions: Tensor, sizes: Sequence[int]) -> Tensor:
    """``[N, M, D_v, F_v]``: :func:`attention_along` every direction ``[M, 3]``, for systems of so many atoms each."""
    parts, first = [], 0
    for size in sizes:
        own = atoms.of(slice(first, first + size))
        parts.append(torch.stack([attention_along(own, frequencies, direction) for direction in directions], dim=1))
        first += size
    return torch.cat(parts)


def mean_over_directions(values: Tensor, weights: Tensor) -> Tensor:
    """``1 / 4π ∫ f(u) du`` as ``sum_j λ_j f(u_j)`` (12): ``[N, ...]`` from ``[N, M, ...]`` and weights of any sum."""
    return torch.einsum("m,nm...->n...", weights / weights.sum(), values)


def invariant_attention(
    atoms: QKV, frequencies: Tensor, directions: Tensor, weights: Tensor, sizes: Sequence[int]
) -> Tensor:
    """Euclidean fast attention without harmonics (3), ``[N, D_v, F_v]``: the mean over directions ``[M, 3]``."""
    return mean_over_directions(attention_per_direction(atoms, frequencies, directions, sizes), weights)


def tensor_integration(harmonics: Tensor, attention: Tensor, weights: Tensor, product: CoupledProduct) -> Tensor:
    """``sum_j λ_j Y(u_j) ⊗ B_u_j`` (14) for attention with directions between atoms, ``[N, D, F_v]``.

    Args:
        harmonics: ``[M, D_Y, F_v]``, or ``[N, M, D_Y, F_v]``.
        attention: ``[N, M, D_v, F_v]`` of :func:`attention_per_direction`.
        weights: ``[M]`` λ.
        product: ⊗ (10), a coefficient per path and channel.
    """
    coupled = [
        product(harmonics[..., j, :, :].expand(len(attention), -1, -1), attention[:, j])
        for j in range(attention.shape[1])
    ]
    return mean_over_directions(torch.stack(coupled, dim=1), weights)


# ------------------------------------------------------------------------------------------ what the integral comes to


def sinc_kernel(distances: Tensor, frequencies: Tensor) -> Tensor:
    """``1 / 4π ∫ exp(i ω u . r) du = sin(ω r) / (ω r)`` (2), ``[..., n]`` from distances ``[...]`` [Å]."""
    return torch.sinc(distances.unsqueeze(-1) * frequencies / torch.pi)


def sum_over_pairs(atoms: QKV, kernel: Tensor) -> Tensor:
    """``sum_j sum_n <q_i, k_j>_n K_n(i, j) v_j``, ``[N, D_v, F_v]``, at quadratic cost.

    With :func:`sinc_kernel` it is what (3) tends to as the rule of directions is refined.

    Args:
        atoms: of one system.
        kernel: ``[N, N, n]`` for every pair of channels.
    """
    queries, keys = (features.unflatten(-1, (-1, 2)) for features in (atoms.queries, atoms.keys))
    return torch.einsum("idnp,jdnp,ijn,jef->ief", queries, keys, kernel, atoms.values)
