"""The sums over atoms of Euclidean fast attention in plain PyTorch, differentiable at any order, in two orders.

**Linear.** Everything is a contraction of one form,

.. math:: T = \\sum_i \\sum_{m τ n a e} t_{i,mτn} \\, x_{i,na} \\, S_{mτna,e} \\, y_{i,e} ,

with waves t (cosine and sine, τ, of the phase of frequency n at grid point m), queries or keys x (a runs over the
components and both channels of a pair), values y and their sums S over the atoms of a system. Moments (dT/dS), their
application (dT/dy) and both contractions (dT/dx, dT/dt) are enough for the attention, and the derivatives of each are
made of the others. ``z = t x`` exists for one block of atoms at a time.

**Pair by pair**, for systems so small that this is cheaper: the linear order costs ``4 M D D_v`` per atom, the pairwise
one about ``2 M n`` per pair of atoms (n = D / channels of a pair). Scores are formed for a tile of atoms at a time:

.. math:: s_{ij} = \\sum_n \\Big(\\sum_μ l_{i,nμ} r_{j,nμ}\\Big) \\Big(\\sum_a q_{i,na} k_{j,na}\\Big), \\quad
          y_i = \\sum_j s_{ij} v_j

with waves l and r (μ runs over grid points, cosine and sine), weights of the points in r.

Atoms are the last axis, so that elementwise work runs over contiguous memory; B systems of equal (padded) size lie in
front: ``t [B, m, 2, n, N]``, ``x [B, n, a, N]``, ``y [B, e, N]``, ``S [B, m 2 n a, e]``. In the pairwise order pairs n
are joined to the batch: ``l, r [B n, 2 m, N]``, ``q, k [B n, a, N]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["PLAIN", "PlainSums", "Sums", "apply_moments", "attend_pairs", "moments", "pairs_are_cheaper", "plane_waves"]

NUMBERS_PER_BLOCK = 1 << 18
"""Numbers of z that exist at a time: one block fits into the second-level cache."""
NUMBERS_PER_TILE = 1 << 20
"""Scores (of all pairs of channels) that exist at a time."""
ELEMENTWISE = 60, 134
"""Measured: what elementwise work on a product t x and on a score costs, in multiply-adds of a product of matrices."""

Pair = tuple[Tensor, Tensor]


class Sums(Protocol):
    """A way to compute the three sums; their derivatives are made of them."""

    def moments(self, values: Tensor, pairs: Sequence[Pair]) -> Tensor:
        """``S = sum_i t_i x_i y_i``, from y and pairs of t and x, of which the products are added up."""

    def apply(self, sums: Tensor, pairs: Sequence[Pair]) -> Tensor:
        """``y_i = sum t_i x_i S``."""

    def contract(
        self, values: Tensor, sums: Tensor, pairs: Sequence[Pair], wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """dT/dt and dT/dx of every pair in turn, where wanted."""


def plane_waves(projections: Tensor, frequencies: Tensor) -> Tensor:
    """Cosine and sine of ``frequency * projection``.

    Args:
        projections: ``[B, m, N]`` positions along the wave vectors [Å], or phases where frequencies are 1.
        frequencies: ``[n]`` [1/Å].

    Returns:
        ``[B, m, 2, n, N]``.
    """
    return _Waves.apply(projections, frequencies)


def moments(waves: Tensor, keys: Tensor, values: Tensor, way: Sums | None = None) -> Tensor:
    """``S = sum_i t_i k_i v_i``, ``[B, m 2 n a, e]``, from ``[B, m, 2, n, N]``, ``[B, n, a, N]`` and ``[B, e, N]``.

    Another way to compute may want its own shapes.
    """
    return _Linear.apply(way or PLAIN, "moments", values, waves, keys)


def apply_moments(sums: Tensor, *pairs: Tensor, way: Sums | None = None) -> Tensor:
    """``y_i = sum t_i q_i S``, ``[B, e, N]``, summed over the given waves and queries ``t1, q1, t2, q2, ...``."""
    return _Linear.apply(way or PLAIN, "apply", sums, *pairs)


class _Waves(torch.autograd.Function):
    """The derivative of the waves is made of the waves, so phases are not kept."""

    @staticmethod
    def forward(ctx: Any, projections: Tensor, frequencies: Tensor) -> Tensor:
        phases = projections.unsqueeze(2) * frequencies.unsqueeze(-1)
        batch, num_points, num_pairs, num_atoms = phases.shape
        waves = phases.new_empty((batch, num_points, 2, num_pairs, num_atoms))
        torch.cos(phases, out=waves[:, :, 0])
        torch.sin(phases, out=waves[:, :, 1])
        ctx.save_for_backward(projections, frequencies, waves)
        return waves

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        projections, frequencies, waves = ctx.saved_tensors
        by_phase = waves[:, :, 0] * gradient[:, :, 1] - waves[:, :, 1] * gradient[:, :, 0]
        by_projection = torch.einsum("bmnN,n->bmN", by_phase, frequencies) if ctx.needs_input_grad[0] else None
        by_frequency = torch.einsum("bmnN,bmN->n", by_phase, projections) if ctx.needs_input_grad[1] else None
        return by_projection, by_frequency


def _pairs(flat: Sequence[Tensor]) -> list[Pair]:
    return list(zip(flat[::2], flat[1::2]))


def _blocks(pairs: Sequence[Pair]) -> Iterator[slice]:
    """Slices of atoms whose z is small."""
    waves, features = pairs[0]
    rows = waves[..., 0].numel() // features.shape[1] * features[0, ..., 0].numel()
    num_atoms = features.shape[-1]
    # whole cache lines of atoms, however many rows there are
    size = max(64, NUMBERS_PER_BLOCK // max(1, rows) // 64 * 64)
    for start in range(0, num_atoms, size):
        yield slice(start, min(start + size, num_atoms))


def _product(pairs: Sequence[Pair], block: slice) -> Tensor:
    """z of a block, ``[B, m 2 n a, block]``."""
    out = None
    for waves, features in pairs:
        t, x = waves[..., block].unsqueeze(4), features[:, None, None, ..., block]
        out = t * x if out is None else out.addcmul_(t, x)
    assert out is not None
    return out.flatten(1, 4)


class PlainSums:
    """In PyTorch."""

    #: Atoms are padded to a multiple of this.
    aligned = 1

    def moments(self, values: Tensor, pairs: Sequence[Pair]) -> Tensor:
        out = None
        for block in _blocks(pairs):
            z, y = _product(pairs, block), values[..., block].transpose(1, 2)
            out = torch.bmm(z, y) if out is None else out.baddbmm_(z, y)
        assert out is not None
        return out

    def apply(self, sums: Tensor, pairs: Sequence[Pair]) -> Tensor:
        transposed = sums.transpose(1, 2)
        parts = [torch.bmm(transposed, _product(pairs, block)) for block in _blocks(pairs)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def contract(
        self, values: Tensor, sums: Tensor, pairs: Sequence[Pair], wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """``U = S y`` once, then sums of its products with x and with t."""
        flat = [tensor for pair in pairs for tensor in pair]
        outputs = [torch.empty_like(tensor) if asked else None for tensor, asked in zip(flat, wanted)]
        for block in _blocks(pairs):
            batch, num_points, _, num_pairs, _ = pairs[0][0].shape
            contracted = torch.bmm(sums, values[..., block]).view(
                batch, num_points, 2, num_pairs, -1, block.stop - block.start
            )
            for number, (waves, features) in enumerate(pairs):
                by_waves, by_features = outputs[2 * number : 2 * number + 2]
                if by_waves is not None:
                    x = features[:, None, None, ..., block]
                    torch.sum(contracted * x, dim=4, out=by_waves[..., block])
                if by_features is not None:
                    t = waves[..., block].unsqueeze(4)
                    torch.sum(contracted * t, dim=(1, 2), out=by_features[..., block])
        return outputs


PLAIN = PlainSums()


class _Linear(torch.autograd.Function):
    """``moments`` of values, or ``apply`` to sums: T is linear in both, so each is the derivative of the other."""

    @staticmethod
    def forward(ctx: Any, way: Sums, kind: str, given: Tensor, *flat: Tensor) -> Tensor:  # type: ignore[override]
        ctx.way, ctx.kind = way, kind
        ctx.save_for_backward(given, *flat)
        return way.moments(given, _pairs(flat)) if kind == "moments" else way.apply(given, _pairs(flat))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        given, *flat = ctx.saved_tensors
        # no order of differentiation needs more than three functions: T is linear in each of its four factors
        other = "apply" if ctx.kind == "moments" else "moments"
        by_given = _Linear.apply(ctx.way, other, gradient, *flat) if ctx.needs_input_grad[2] else None
        values, sums = (given, gradient) if ctx.kind == "moments" else (gradient, given)
        return None, None, by_given, *_by_pairs(ctx.way, values, sums, flat, ctx.needs_input_grad[3:])


def _by_pairs(
    way: Sums, values: Tensor, sums: Tensor, flat: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Derivatives of T by the waves and features of every pair, where wanted."""
    if not any(wanted):
        return [None] * len(flat)
    found = iter(_Contract.apply(way, tuple(wanted), values, sums, *flat))
    return [next(found) if asked else None for asked in wanted]


class _Contract(torch.autograd.Function):
    """dT/dt and dT/dx of every pair."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, way: Sums, wanted: tuple[bool, ...], values: Tensor, sums: Tensor, *flat: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.way, ctx.wanted = way, wanted
        ctx.save_for_backward(values, sums, *flat)
        outputs = way.contract(values, sums, _pairs(flat), wanted)
        return tuple(output for output in outputs if output is not None)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        way = ctx.way
        values, sums, *flat = ctx.saved_tensors
        given = iter(gradients)
        cotangents = [next(given) if asked else None for asked in ctx.wanted]
        # T with one factor replaced by its cotangent, for every output
        new: list[Tensor] = []
        origin: list[int] = []  # which input of a new pair is an input of this function
        for number, (waves, features) in enumerate(_pairs(flat)):
            for_waves, for_features = cotangents[2 * number : 2 * number + 2]
            if for_waves is not None:
                new += [for_waves, features]
                origin += [-1, 2 * number + 1]
            if for_features is not None:
                new += [waves, for_features]
                origin += [2 * number, -1]
        if not new:
            return (None,) * (4 + len(flat))
        by_values = _Linear.apply(way, "apply", sums, *new) if ctx.needs_input_grad[2] else None
        by_sums = _Linear.apply(way, "moments", values, *new) if ctx.needs_input_grad[3] else None
        wanted = [index >= 0 and ctx.needs_input_grad[4 + index] for index in origin]
        by_inputs: list[Tensor | None] = [None] * len(flat)
        for index, found in zip(origin, _by_pairs(way, values, sums, new, wanted)):
            if found is not None:
                by_inputs[index] = found
        return (None, None, by_values, by_sums, *by_inputs)


# --------------------------------------------------------------------------------------------------------- pair by pair


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
    batch, _, num_atoms = values.shape
    num_pairs = len(left) // batch
    systems = max(1, NUMBERS_PER_TILE // max(1, num_pairs * num_atoms**2))
    if systems >= batch:
        return _Pairs.apply(left, right, queries, keys, values)
    groups = zip(*(x.split(systems * num_pairs) for x in (left, right, queries, keys)), values.split(systems))
    return torch.cat([_Pairs.apply(*group) for group in groups])


def _tiles(left: Tensor) -> Iterator[slice]:
    """Atoms i of every tile."""
    rows, _, num_atoms = left.shape
    size = NUMBERS_PER_TILE // max(1, rows * num_atoms)
    size = num_atoms if size >= num_atoms else max(8, size // 8 * 8)
    for start in range(0, num_atoms, size):
        yield slice(start, min(start + size, num_atoms))


def _factors(left: Tensor, right: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors of the scores of a tile, ``[B n, I, N]``."""
    return torch.bmm(left.transpose(1, 2), right), torch.bmm(queries.transpose(1, 2), keys)


class _Pairs(torch.autograd.Function):
    """The backward forms the tiles again; it is made of differentiable operations."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(left, right, queries, keys, values)
        out = torch.empty_like(values)
        for atoms in _tiles(left):
            waves, products = _factors(left[..., atoms], right, queries[..., atoms], keys)
            scores = waves.mul_(products).unflatten(0, (len(values), -1)).sum(1)
            out[..., atoms] = torch.bmm(values, scores.transpose(1, 2))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        left, right, queries, keys, values = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        parts: list[list[Tensor]] = [[] for _ in wanted]
        for atoms in _tiles(left):
            wave, q, g = left[..., atoms], queries[..., atoms], gradient[..., atoms]
            # formed again, not kept: scores are N^2 numbers for every pair of channels
            waves, products = _factors(wave, right, q, keys)
            # one for all pairs of channels, since the score is their sum
            by_scores = torch.bmm(g.transpose(1, 2), values).unsqueeze(1)  # [B, 1, I, N]
            if wanted[0] or wanted[1]:
                by_waves = _times(products, by_scores)
                parts[0].append(torch.bmm(right, by_waves.transpose(1, 2)))
                parts[1].append(torch.bmm(wave, by_waves))
            if wanted[2] or wanted[3]:
                by_products = _times(waves, by_scores)
                parts[2].append(torch.bmm(keys, by_products.transpose(1, 2)))
                parts[3].append(torch.bmm(q, by_products))
            if wanted[4]:
                parts[4].append(torch.bmm(g, (waves * products).unflatten(0, (len(values), -1)).sum(1)))
        # by the tile's own atoms i: one tile beside the other; by the atoms j that all tiles see: their sum
        return tuple(
            None if not part else torch.cat(part, dim=2) if number in (0, 2) else sum(part[1:], part[0])
            for number, part in enumerate(parts)
        )


def _times(factors: Tensor, by_scores: Tensor) -> Tensor:
    """``[B n, I, N]`` of every pair of channels times ``[B, 1, I, N]`` of its system."""
    return (factors.unflatten(0, (len(by_scores), -1)) * by_scores).flatten(0, 1)
