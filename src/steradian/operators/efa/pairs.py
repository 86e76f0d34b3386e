"""Euclidean fast attention pair by pair: the same sums in another order, for systems so small that this is cheaper.

The linear order costs ``4 M D D_v`` per atom, the pairwise one about ``2 M n`` per pair of atoms (n = D / channels of a
pair), so below some hundred atoms the square is the smaller number. Scores are formed for a tile of atoms at a time:

.. math:: s_{ij} = \\sum_n \\Big(\\sum_μ l_{i,nμ} r_{j,nμ}\\Big) \\Big(\\sum_a q_{i,na} k_{j,na}\\Big), \\quad
          y_i = \\sum_j s_{ij} v_j

with waves l and r (μ runs over grid points, cosine and sine), weights of the points in r. Axes as in
:mod:`steradian.operators.efa.sums`, with the pairs n joined to the batch: ``l, r [B n, 2 m, N]``,
``q, k [B n, a, N]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["attend_pairs", "pairs_are_cheaper"]

NUMBERS_PER_TILE = 1 << 20
"""Scores (of all pairs of channels) that exist at a time."""
ELEMENTWISE = 60, 134
"""Measured: what elementwise work on a product t x and on a score costs, in multiply-adds of a product of matrices."""


def pairs_are_cheaper(num_atoms: int, num_waves: int, num_pairs: int, width: int, num_values: int) -> bool:
    """Whether the pairwise order needs less work than the linear one.

    Args:
        num_atoms: N of a system.
        num_waves: 2 m, cosines and sines.
        num_pairs, width: n and a of queries and keys.
        num_values: e.
    """
    linear = 2 * num_waves * num_pairs * width * (num_values + ELEMENTWISE[0])
    pairwise = num_atoms * (num_pairs * (num_waves + width + ELEMENTWISE[1]) + num_values)
    return pairwise < linear


def attend_pairs(left: Tensor, right: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """``[B, e, N]`` from ``[B n, 2 m, N]`` twice, ``[B n, a, N]`` twice and ``[B, e, N]``; differentiable twice."""
    return _Pairs.apply(left, right, queries, keys, values)


def _tiles(left: Tensor, values: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Systems, their rows of the joined axis, and atoms i of every tile."""
    batch, num_atoms = values.shape[0], values.shape[2]
    num_pairs = left.shape[0] // batch
    per_atom = num_pairs * num_atoms
    systems = max(1, NUMBERS_PER_TILE // max(1, per_atom * num_atoms))
    atoms = num_atoms if systems > 1 else max(8, NUMBERS_PER_TILE // max(1, per_atom) // 8 * 8)
    for first in range(0, batch, systems):
        last = min(first + systems, batch)
        for start in range(0, num_atoms, atoms):
            rows = slice(first * num_pairs, last * num_pairs)
            yield slice(first, last), rows, slice(start, min(start + atoms, num_atoms))


def _factors(left: Tensor, right: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors of the scores of a tile, ``[B n, I, N]``."""
    return torch.bmm(left.transpose(1, 2), right), torch.bmm(queries.transpose(1, 2), keys)


class _Pairs(torch.autograd.Function):
    """The backward forms the tiles again; it is made of differentiable operations."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(left, right, queries, keys, values)
        out = torch.empty_like(values)
        for systems, rows, atoms in _tiles(left, values):
            waves, products = _factors(left[rows, :, atoms], right[rows], queries[rows, :, atoms], keys[rows])
            scores = waves.mul_(products).unflatten(0, (systems.stop - systems.start, -1)).sum(1)
            out[systems, :, atoms] = torch.bmm(values[systems], scores.transpose(1, 2))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        left, right, queries, keys, values = ctx.saved_tensors
        by_left, by_right, by_queries, by_keys, by_values = ([] for _ in range(5))  # type: ignore[var-annotated]
        wanted = ctx.needs_input_grad
        for systems, rows, atoms in _tiles(left, values):
            wave, q, g = left[rows, :, atoms], queries[rows, :, atoms], gradient[systems, :, atoms]
            others, k, v = right[rows], keys[rows], values[systems]
            waves, products = _factors(wave, others, q, k)
            count = systems.stop - systems.start
            by_scores = torch.bmm(g.transpose(1, 2), v)  # [B, I, N]
            spread = by_scores.unsqueeze(1)
            if wanted[4]:
                scores = (waves * products).unflatten(0, (count, -1)).sum(1)
                by_values.append((systems, torch.bmm(g, scores)))
            if wanted[0] or wanted[1]:
                by_waves = (products.unflatten(0, (count, -1)) * spread).flatten(0, 1)
                if wanted[0]:
                    by_left.append((rows, torch.bmm(others, by_waves.transpose(1, 2))))
                if wanted[1]:
                    by_right.append((rows, torch.bmm(wave, by_waves)))
            if wanted[2] or wanted[3]:
                by_products = (waves.unflatten(0, (count, -1)) * spread).flatten(0, 1)
                if wanted[2]:
                    by_queries.append((rows, torch.bmm(k, by_products.transpose(1, 2))))
                if wanted[3]:
                    by_keys.append((rows, torch.bmm(q, by_products)))
        return (
            _side_by_side(by_left), _added(by_right), _side_by_side(by_queries), _added(by_keys), _added(by_values),
        )  # fmt: skip


def _by_rows(parts: list[tuple[slice, Tensor]]) -> list[list[Tensor]]:
    groups: dict[int, list[Tensor]] = {}
    for rows, part in parts:
        groups.setdefault(rows.start, []).append(part)
    return list(groups.values())


def _side_by_side(parts: list[tuple[slice, Tensor]]) -> Tensor | None:
    """Tiles of atoms next to each other, systems below each other."""
    joined = [group[0] if len(group) == 1 else torch.cat(group, dim=2) for group in _by_rows(parts)]
    return None if not joined else joined[0] if len(joined) == 1 else torch.cat(joined)


def _added(parts: list[tuple[slice, Tensor]]) -> Tensor | None:
    """The sum over tiles of atoms, systems below each other."""
    joined = []
    for group in _by_rows(parts):
        total = group[0]
        for part in group[1:]:
            total = total + part
        joined.append(total)
    return None if not joined else joined[0] if len(joined) == 1 else torch.cat(joined)
