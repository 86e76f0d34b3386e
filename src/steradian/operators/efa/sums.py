"""Linear attention through plane waves: the sums over atoms of Euclidean fast attention, differentiable at any order.

Everything is a contraction of one form,

.. math:: T = \\sum_i \\sum_{m τ n a e} t_{i,mτn} \\, x_{i,na} \\, S_{mτna,e} \\, y_{i,e} ,

with waves t (cosine and sine, τ, of the phase of frequency n at grid point m), queries or keys x (a runs over the
components and both channels of a pair), values y and their sums S over the atoms of a system. Moments (dT/dS), their
application (dT/dy) and both contractions (dT/dx, dT/dt) are enough for the attention, and the derivatives of each are
made of the others. ``z = t x`` exists for one block of atoms at a time.

Atoms are the last axis, so that elementwise work runs over contiguous memory; B systems of equal (padded) size lie in
front: ``t [B, m, 2, n, N]``, ``x [B, n, a, N]``, ``y [B, e, N]``, ``S [B, m 2 n a, e]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from steradian.operators.efa.triton import triton_sums

__all__ = ["PLAIN", "Sums", "apply_moments", "moments", "plane_waves", "way_for"]

NUMBERS_PER_BLOCK = 1 << 18
"""Numbers of z that exist at a time: one block fits into the second-level cache."""

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
    if getattr(way, "own_derivatives", False) and way is not None:
        return way.moments(values, [(waves, keys)])
    return _Moments.apply(way or PLAIN, values, waves, keys)


def apply_moments(sums: Tensor, *pairs: Tensor, way: Sums | None = None) -> Tensor:
    """``y_i = sum t_i q_i S``, ``[B, e, N]``, summed over the given waves and queries ``t1, q1, t2, q2, ...``."""
    if getattr(way, "own_derivatives", False) and way is not None:
        return way.apply(sums, _pairs(pairs))
    return _Apply.apply(way or PLAIN, sums, *pairs)


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
            contracted = torch.bmm(sums, values[..., block]).view(batch, num_points, 2, num_pairs, -1, _length(block))
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


def way_for(keys: Tensor, num_values: int, low: torch.dtype | None = None) -> Sums:
    """How sums of keys ``[B, n, a, N]`` with so many values are formed: by Triton on a GPU in up to 32 bits where it is
    installed and agrees with the plain way, else plainly.

    Args:
        keys, num_values: as above.
        low: format that factors are rounded to on a GPU, if not theirs.
    """
    return triton_sums(keys, num_values, low) or PLAIN


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, way: Sums, values: Tensor, *flat: Tensor) -> Tensor:  # type: ignore[override]
        ctx.way = way
        ctx.save_for_backward(values, *flat)
        return way.moments(values, _pairs(flat))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, *flat = ctx.saved_tensors
        by_values = _Apply.apply(ctx.way, gradient, *flat) if ctx.needs_input_grad[1] else None
        return None, by_values, *_by_pairs(ctx.way, values, gradient, flat, ctx.needs_input_grad[2:])


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, way: Sums, sums: Tensor, *flat: Tensor) -> Tensor:  # type: ignore[override]
        ctx.way = way
        ctx.save_for_backward(sums, *flat)
        return way.apply(sums, _pairs(flat))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        sums, *flat = ctx.saved_tensors
        by_sums = _Moments.apply(ctx.way, gradient, *flat) if ctx.needs_input_grad[1] else None
        return None, by_sums, *_by_pairs(ctx.way, gradient, sums, flat, ctx.needs_input_grad[2:])


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
        by_values = _Apply.apply(way, sums, *new) if ctx.needs_input_grad[2] else None
        by_sums = _Moments.apply(way, values, *new) if ctx.needs_input_grad[3] else None
        wanted = [index >= 0 and ctx.needs_input_grad[4 + index] for index in origin]
        by_inputs: list[Tensor | None] = [None] * len(flat)
        for index, found in zip(origin, _by_pairs(way, values, sums, new, wanted)):
            if found is not None:
                by_inputs[index] = found
        return (None, None, by_values, by_sums, *by_inputs)


def _length(block: slice) -> int:
    return block.stop - block.start
