"""The inner loop of MARA: from the field on the sphere to one pooled number per edge and head.

An edge has a field ``f_k`` on K grid points; k is the point that asks, l the one that answers. With the centre's query
``a = W_h h_i``, ``u = W_f`` and ``u' = W'_f`` the logits of one head are

.. math:: s_{kl} = f_l (a u' + u u' f_k + p_k u') + f_k (u p_l) + a p_l + p_k p_l

(over the root of the head's width; terms without l cancel in the softmax and are dropped). All that depends on the
hidden width is a few tables (:class:`LogitTables`): a product of rank three plus a K x K table gives the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["LogitTables", "attention_on_sphere", "flat_tables", "gate_logits_to_pooled"]

#: Numbers in a block of [edges, K, K] logits: small enough for the cache, large enough for few calls...
NUMBERS_PER_BLOCK = 2**20
#: ... and where autograd keeps every intermediate anyway.
NUMBERS_PER_KEPT_BLOCK = 2**21


class LogitTables(NamedTuple):
    """What logits and values need besides the field. H heads, K points.

    Attributes:
        field_field: ``[H]`` u . u', factor of f_k f_l.
        point_field: ``[H, K]`` p_k . u', factor of f_l.
        field_point: ``[H, K]`` u . p_l, factor of f_k.
        point_point: ``[H, K, K]`` p_k . p_l.
        value_field: ``[H]`` channel mean of u'', slope of the value.
        value_point: ``[H, K]`` channel mean of p_l, offset of the value.
    """

    field_field: Tensor
    point_field: Tensor
    field_point: Tensor
    point_point: Tensor
    value_field: Tensor
    value_point: Tensor


def flat_tables(tables: LogitTables, weights: Tensor) -> Tensor:
    """``[H, 2 + 4 K + K^2]`` of :class:`LogitTables` and quadrature weights ``[K]``:
    field_field, value_field, point_field, field_point, value_point, weights, point_point with log weights of l."""
    heads = tables.field_field.shape[0]
    return torch.cat(
        [
            torch.stack([tables.field_field, tables.value_field], dim=1),
            tables.point_field,
            tables.field_point,
            tables.value_point,
            weights.expand(heads, -1),
            (tables.point_point + weights.log()).flatten(1),
        ],
        dim=1,
    )


class _HeadInputs(NamedTuple):
    """One head: the first three have an axis of edges, the others are shared by all edges."""

    field: Tensor  # [E, K]
    slope: Tensor  # [E]
    point: Tensor  # [E, K]
    weights: Tensor  # [K]
    field_field: Tensor  # []
    point_field: Tensor  # [K]
    field_point: Tensor  # [K]
    point_point: Tensor  # [K, K]
    value_field: Tensor  # []
    value_point: Tensor  # [K]


def gate_logits_to_pooled(
    field: Tensor, slope: Tensor, point: Tensor, tables: LogitTables, weights: Tensor, dropout: float = 0.0
) -> Tensor:
    """Attend on the sphere and pool: ``[E, H]``, differentiable twice in everything but the weights.

    ``pooled = sum_k weights_k sum_l softmax_l(s_kl) (value_field f_l + value_point_l)`` without the value's node term:
    rows of the attention and the weights sum to one, so it passes through and the caller adds it.

    Only one block of edges has its K x K attention in memory. Where gradients are wanted, the derivatives by the three
    per-edge inputs are formed in the same pass, and those by the tables only if somebody asks for them (forces do not).
    A second derivative (training on forces) forms the attention again and keeps it.

    Args:
        field: ``[E, K]`` f.
        slope: ``[E, H]`` a . u' of the edge's centre, factor of f_l.
        point: ``[E, H, K]`` a . p_l of the edge's centre plus the logarithm of the quadrature weight of l.
        tables: see :class:`LogitTables`.
        weights: ``[K]`` quadrature weights over 4 pi.
        dropout: probability with which an entry of the attention is dropped (and the rest scaled up).
    """
    pooled = []
    for head in range(slope.shape[1]):
        inputs = _HeadInputs(field, slope[:, head], point[:, head], weights, *(table[head] for table in tables))
        if dropout:
            pooled.append(_pooled_with_dropout(inputs, dropout))
        elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            pooled.append(_Pool.apply(*inputs[:3], inputs) + _TableGradients.apply(*inputs[4:], inputs))
        else:
            (result,) = _in_blocks(_pooled, inputs, NUMBERS_PER_BLOCK)
            pooled.append(result)
    return torch.stack(pooled, dim=1)


def attention_on_sphere(field: Tensor, slope: Tensor, point: Tensor, tables: LogitTables) -> Tensor:
    """``[E, H, K, K]`` attention, for pictures: point k asks, l answers. Arguments as above."""
    heads = []
    for head in range(slope.shape[1]):
        # the rule's weights are in ``point`` already; those of the asking points play no role here
        per_head = _HeadInputs(field, slope[:, head], point[:, head], field[:0], *(table[head] for table in tables))
        exponentials = _exponentials(per_head)
        heads.append(exponentials / exponentials.sum(2, keepdim=True))
    return torch.stack(heads, dim=1)


def _in_blocks(
    function: Callable[..., tuple[Tensor, ...]], inputs: _HeadInputs, numbers: int, *more: Tensor
) -> tuple[Tensor, ...]:
    """Call ``function(inputs, *more)`` on blocks of edges and join the results."""
    num_edges, num_points = inputs.field.shape
    block = max(1, numbers // num_points**2)
    if num_edges <= block:
        return function(inputs, *more)
    results = []
    for start in range(0, num_edges, block):
        edges = slice(start, start + block)
        part = inputs._replace(field=inputs.field[edges], slope=inputs.slope[edges], point=inputs.point[edges])
        results.append(function(part, *(tensor[edges] for tensor in more)))
    return tuple(torch.cat(pieces) for pieces in zip(*results))


def _answer_slope(inputs: _HeadInputs) -> Tensor:
    """``[E, K]`` the factor of f_l in the logits of the asking point k."""
    return inputs.slope.unsqueeze(1) + inputs.field_field * inputs.field + inputs.point_field


def _exponentials(inputs: _HeadInputs) -> Tensor:
    """``[E, K, K]`` exp(logits), rows ask and columns answer, up to a factor per row (sums of rows normalise)."""
    # PyTorch's exp2 is several times faster than its exp or softmax on CPUs, so logits are in base 2
    field, in_base_2 = inputs.field, math.log2(math.e)
    asking = torch.stack([field * in_base_2, torch.full_like(field, in_base_2), _answer_slope(inputs) * in_base_2], 1)
    answering = torch.stack([inputs.field_point.expand_as(field), inputs.point, field], dim=1)
    logits = torch.baddbmm(inputs.point_point, asking.transpose(1, 2), answering, beta=in_base_2)
    return logits.sub_(logits.detach().amax(2, keepdim=True)).exp2_()


def _value(inputs: _HeadInputs) -> Tensor:
    """``[E, K]`` value of the answering point, without its node term."""
    return inputs.value_field * inputs.field + inputs.value_point


def _pooled(inputs: _HeadInputs) -> tuple[Tensor]:
    exponentials, value = _exponentials(inputs), _value(inputs)
    rows = torch.bmm(torch.stack([value, torch.ones_like(value)], 1), exponentials.transpose(1, 2))
    output, normaliser = rows.unbind(1)
    return ((output / normaliser) @ inputs.weights,)


def _pooled_with_dropout(inputs: _HeadInputs, dropout: float) -> Tensor:
    exponentials = _exponentials(inputs)
    attention = torch.nn.functional.dropout(exponentials / exponentials.sum(2, keepdim=True), dropout)
    return (torch.matmul(inputs.weights, attention) * _value(inputs)).sum(1)


def _pooled_and_slopes(inputs: _HeadInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pooled value ``[E]`` and its derivatives by field ``[E, K]``, slope ``[E]`` and point ``[E, K]``.

    With ``t`` the values and ``o = A t`` the derivative by a logit is ``w_k A_kl (t_l - o_k)``. Only sums of it over
    rows and columns are needed, so products of A with a few vectors give all derivatives.
    """
    exponentials, field, weights = _exponentials(inputs), inputs.field, inputs.weights
    value, ones = _value(inputs), torch.ones_like(field)
    # row sums are covariances under A: shifts drop out, and smaller numbers keep more digits
    value_shift = value.mean(1, keepdim=True)
    centred = value - value_shift
    field_centred = field - field.mean(1, keepdim=True)
    column = inputs.field_point - inputs.field_point.mean()
    vectors = [ones, centred, field_centred, centred * field_centred, column.expand_as(field), centred * column]
    rows = torch.bmm(torch.stack(vectors, dim=1), exponentials.transpose(1, 2))
    per_sum = 1 / rows[:, :1]
    output, row_field, row_value_field, row_column, row_value_column = (rows[:, 1:] * per_sum).unbind(1)
    by_answer_slope = weights * (row_value_field - output * row_field)
    by_column = weights * (row_value_column - output * row_column)

    answer_slope = _answer_slope(inputs)
    asked = torch.stack([ones, output, answer_slope, output * answer_slope], dim=1)
    columns = torch.bmm(asked * (weights * per_sum), exponentials)
    received, received_output, received_slope, received_slope_output = columns.unbind(1)
    by_point = centred * received - received_output
    by_field = (
        by_column
        + inputs.field_field * by_answer_slope
        + centred * received_slope
        - received_slope_output
        + inputs.value_field * received
    )
    return (output @ weights + value_shift.squeeze(1), by_field, by_answer_slope.sum(1), by_point)


def _table_gradients(inputs: _HeadInputs, gradient: Tensor) -> tuple[Tensor, ...]:
    """Derivatives of ``sum_e gradient_e pooled_e`` by the six tables."""
    exponentials, field = _exponentials(inputs), inputs.field
    value = _value(inputs)
    value = value - value.mean(1, keepdim=True)
    rows = torch.bmm(torch.stack([value, torch.ones_like(value)], 1), exponentials.transpose(1, 2))
    output = rows[:, 0] / rows[:, 1]
    asked = gradient.unsqueeze(1) * inputs.weights / rows[:, 1]  # [E, K]
    asking, answering = torch.stack([asked, -asked * output], 1), torch.stack([value, torch.ones_like(value)], 1)
    by_logit = torch.bmm(asking.transpose(1, 2), answering) * exponentials
    by_answer_slope = torch.bmm(by_logit, field.unsqueeze(2)).squeeze(2)
    by_column = torch.bmm(field.unsqueeze(1), by_logit).squeeze(1)
    received = torch.bmm(asked.unsqueeze(1), exponentials).squeeze(1)
    return (
        (field * by_answer_slope).sum(),
        by_answer_slope.sum(0),
        by_column.sum(0),
        by_logit.sum(0),
        (received * field).sum(),
        received.sum(0),
    )


class _Pool(torch.autograd.Function):
    """Pooled value of one head as a function of what belongs to the edges.

    The tables come along in ``inputs`` without being arguments for autograd, so that a backward pass for forces does
    not form their gradients (:class:`_TableGradients` does, when they are wanted).
    """

    @staticmethod
    def forward(ctx: Any, field: Tensor, slope: Tensor, point: Tensor, inputs: _HeadInputs) -> Tensor:
        pooled, *slopes = _in_blocks(_pooled_and_slopes, inputs, NUMBERS_PER_BLOCK)
        ctx.save_for_backward(*inputs, *slopes)
        return pooled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *saved, by_field, by_slope, by_point = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody will differentiate again
            _, by_field, by_slope, by_point = _in_blocks(
                _pooled_and_slopes, _HeadInputs(*saved), NUMBERS_PER_KEPT_BLOCK
            )
        column = gradient.unsqueeze(1)
        return column * by_field, gradient * by_slope, column * by_point, None


class _TableGradients(torch.autograd.Function):
    """Zero, with the derivatives of :class:`_Pool` by the tables."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        inputs: _HeadInputs = arguments[-1]
        ctx.save_for_backward(*inputs)
        return torch.zeros_like(inputs.slope)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs = _HeadInputs(*ctx.saved_tensors)
        numbers = NUMBERS_PER_KEPT_BLOCK if torch.is_grad_enabled() else NUMBERS_PER_BLOCK
        num_edges, num_points = inputs.field.shape
        block = max(1, numbers // num_points**2)
        total: list[Tensor] | None = None
        for start in range(0, max(num_edges, 1), block):
            edges = slice(start, start + block)
            part = inputs._replace(field=inputs.field[edges], slope=inputs.slope[edges], point=inputs.point[edges])
            gradients = _table_gradients(part, gradient[edges])
            total = list(gradients) if total is None else [sum_ + new for sum_, new in zip(total, gradients)]
        assert total is not None
        return *total, None
