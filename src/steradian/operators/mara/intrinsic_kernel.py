"""The inner loop of intrinsic MARA: attention on the sphere for logits and values that are polynomials.

Both are given by coefficients of B spherical harmonics ``Y_b`` of low degree,
``s(g, g') = sum_bb' Y_b(g) M_bb' Y_b'(g')`` and ``v(g) = sum_b T_b Y_b(g)``. Leading axes (edges, heads) are arbitrary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steradian.operators.mara.factorised import NUMBERS_PER_BLOCK

__all__ = ["basis_attention", "pool_exponential", "pool_polynomial"]


def pool_polynomial(logits: Tensor, values: Tensor, first: Tensor, overlap: Tensor, triple: Tensor) -> Tensor:
    """``sum_kl w_k w_l c(s_kl) v_l / sum_kl w_k w_l c(s_kl)`` with ``c(s) = 1 + s + s^2 / 2``, ``[...]``.

    The sums over the rule are those of products of one, two and three harmonics; the rule enters through these alone.

    Args:
        logits: ``[..., B, B]`` M.
        values: ``[..., B]`` T.
        first, overlap, triple: ``[B]``, ``[B, B]``, ``[B, B, B]`` means over the sphere of Y_b, Y_a Y_b, Y_a Y_b Y_c.
    """
    asked = first @ logits  # [..., B] mean over k of s(k, .)
    squared = logits.transpose(-1, -2) @ (overlap @ logits)  # [..., B, B] mean over k of s(k, .)^2
    normaliser = 1 + asked @ first + 0.5 * (squared * overlap).sum((-1, -2))
    with_values = torch.tensordot(values, triple, dims=1)  # [..., B, B]
    weighted = values @ first + (asked @ overlap * values).sum(-1) + 0.5 * (squared * with_values).sum((-1, -2))
    return weighted / normaliser


def pool_exponential(logits: Tensor, values: Tensor, basis: Tensor, weights: Tensor) -> Tensor:
    """``sum_k w_k sum_l w_l exp(s_kl) v_l / sum_m w_m exp(s_km)``, ``[...]``; differentiable twice.

    Blocks as in :func:`steradian.operators.mara.factorised.gate_logits_to_pooled`.

    Args:
        logits: ``[..., B, B]`` M, bounded: s must stay below 80.
        values: ``[..., B]`` T.
        basis: ``[K, B]`` harmonics at the points; the first one is 1.
        weights: ``[K]`` quadrature weights over 4 pi.
    """
    leading = values.shape[:-1]
    flat_logits, flat_values = logits.flatten(0, -3), values.flatten(0, -2)
    if torch.is_grad_enabled() and (logits.requires_grad or values.requires_grad):
        pooled = _PoolOnBasis.apply(flat_logits, flat_values, basis, weights)
    else:
        (pooled,) = _in_blocks(_pooled, _numbers(flat_logits), flat_logits, flat_values, basis, weights)
    return pooled.unflatten(0, leading)


def basis_attention(logits: Tensor, basis: Tensor, weights: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """For pictures: attention ``[..., K, K]`` (rows sum to one) and what each point receives ``[..., K]``."""
    scores = basis @ logits @ basis.T
    if kernel == "exp":
        attention = torch.softmax(scores + weights.log(), dim=-1)
        return attention, weights @ attention
    together = weights.unsqueeze(1) * weights * (1 + scores + 0.5 * scores.square())
    return together / together.sum(-1, keepdim=True), together.sum(-2) / together.sum((-1, -2)).unsqueeze(-1)


def _exponentials(logits: Tensor, basis: Tensor) -> Tensor:
    """``[E, K, K]`` exp(s_kl). The logits are bounded, so no maximum needs to be taken off."""
    return ((basis @ logits) @ (basis.T * math.log2(math.e))).exp2_()  # exp2 is several times faster than exp


def _pooled(logits: Tensor, values: Tensor, basis: Tensor, weights: Tensor) -> tuple[Tensor]:
    value = values @ basis.T
    answers = torch.stack([weights.expand_as(value), weights * value], dim=1)
    normaliser, output = torch.bmm(answers, _exponentials(logits, basis).transpose(1, 2)).unbind(1)
    return ((output / normaliser) @ weights,)


def _pooled_and_slopes(logits: Tensor, values: Tensor, basis: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled value ``[E]`` and its derivatives by M ``[E, B, B]`` and T ``[E, B]``."""
    exponentials = _exponentials(logits, basis)
    value = values @ basis.T  # [E, K]
    shift = value.mean(1, keepdim=True)
    centred = value - shift
    weighted = (weights.unsqueeze(1) * basis).T  # [B, K]
    answering = torch.cat([weighted.expand(len(value), -1, -1), centred.unsqueeze(1) * weighted], dim=1)
    rows = torch.bmm(answering, exponentials.transpose(1, 2))  # [E, 2 B, K]
    answers, valued_answers = rows.chunk(2, dim=1)  # the first row, of the constant harmonic, is the plain sum
    per_sum = 1 / answers[:, :1]
    output = valued_answers[:, :1] * per_sum
    asked = weights * per_sum  # [E, 1, K]
    by_logits = ((asked * (valued_answers - output * answers)) @ basis).transpose(1, 2)
    received = torch.bmm(asked, exponentials).squeeze(1) * weights
    return output.squeeze(1) @ weights + shift.squeeze(1), by_logits, received @ basis


def _in_blocks(
    function: Callable[..., tuple[Tensor, ...]],
    numbers: int,
    logits: Tensor,
    values: Tensor,
    basis: Tensor,
    weights: Tensor,
) -> tuple[Tensor, ...]:
    block = max(1, numbers // len(basis) ** 2)
    if len(values) <= block:
        return function(logits, values, basis, weights)
    results = [
        function(logits[start : start + block], values[start : start + block], basis, weights)
        for start in range(0, len(values), block)
    ]
    return tuple(torch.cat(pieces) for pieces in zip(*results))


class _PoolOnBasis(torch.autograd.Function):
    """Derivatives are formed with the value."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, values: Tensor, basis: Tensor, weights: Tensor) -> Tensor:
        numbers = _numbers(logits)
        pooled, by_logits, by_values = _in_blocks(_pooled_and_slopes, numbers, logits, values, basis, weights)
        ctx.save_for_backward(logits, values, basis, weights, by_logits, by_values)
        return pooled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *_SlopesOnBasis.apply(gradient, *ctx.saved_tensors), None, None


class _SlopesOnBasis(torch.autograd.Function):
    """Derivatives times their cotangent. A second derivative forms the attention again, of one block at a time; only a
    third one keeps it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        gradient: Tensor,
        logits: Tensor,
        values: Tensor,
        basis: Tensor,
        weights: Tensor,
        by_logits: Tensor,
        by_values: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(gradient, logits, values, basis, weights)
        return gradient[:, None, None] * by_logits, gradient[:, None] * by_values

    @staticmethod
    def backward(ctx: Any, by_logits: Tensor, by_values: Tensor) -> tuple[Tensor | None, ...]:
        gradient, logits, values, basis, weights = ctx.saved_tensors
        again = torch.is_grad_enabled()
        size = max(1, _numbers(logits) // len(basis) ** 2)
        found = []
        for start in range(0, max(1, len(values)), max(1, len(values)) if again else size):
            part = slice(start, start + size) if not again else slice(None)
            inputs = [_alias(tensor[part], again) for tensor in (gradient, logits, values)]
            with torch.enable_grad():
                _, slope_logits, slope_values = _pooled_and_slopes(inputs[1], inputs[2], basis, weights)
                first = inputs[0][:, None, None] * slope_logits, inputs[0][:, None] * slope_values
                cotangents = by_logits[part], by_values[part]
                found.append(torch.autograd.grad(first, inputs, cotangents, create_graph=again))
        joined = found[0] if len(found) == 1 else [torch.cat(pieces) for pieces in zip(*found)]
        return *joined, None, None, None, None


def _alias(tensor: Tensor, keep: bool) -> Tensor:
    """The same numbers where differentiation can stop; ``keep``: and go on from there another time."""
    return tensor.view_as(tensor) if keep and tensor.requires_grad else tensor.detach().requires_grad_()


def _numbers(logits: Tensor) -> int:
    """Size of the attention of a block: small enough for a cache, or large enough for a GPU."""
    return NUMBERS_PER_BLOCK << (4 if logits.is_cuda else 0)
