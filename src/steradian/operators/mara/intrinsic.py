"""MARA in the atom's own frame: the gate is invariant under rotations and reflections.

In place of the constants ``p_k`` of the published form every atom has a signal on the sphere that turns with it,
``p_i(g) = sum_lm (W_l c_i,lm) Y_lm(g)``, and the field is the squared distance, a polynomial of degree 1 in g. So
queries, keys and values are polynomials of low degree L, the logits are ``s(g, g') = sum_bb' Y_b(g) M_bb' Y_b'(g')``
with one small matrix M per edge and head, the values ``v(g) = sum_b T_b Y_b(g)``, and sums over a sphere rule converge
fast (:func:`pool_exponential`) or are exact (:func:`pool_polynomial`). B = (L + 1)^2 harmonics.

:func:`steradian.operators.mara.paper.intrinsic` is the same point by point.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from steradian.equivariant.harmonics import spherical_harmonics
from steradian.equivariant.sphere import SphereGrid, lebedev
from steradian.graph.share import from_owners
from steradian.operators.base import EdgesOfGate
from steradian.operators.mara import paper
from steradian.operators.mara.factorised import NUMBERS_PER_BLOCK
from steradian.operators.mara.gate import SphereGate, bare
from steradian.precision import cast

__all__ = ["IntrinsicMARA", "pool_exponential", "pool_polynomial"]

#: Bound of the temperature. With 86 Lebedev points, gates with random weights (0.3 to 30 times their start) turn by
#: less than 1e-7 of their spread over edges; the worst case found, one degree and one channel alone, by 6e-6.
MAX_TEMPERATURE = 1.0


class _NodeTables(NamedTuple):
    """Products over the hidden channels, per atom and head. B coefficients of degrees 0 to L."""

    query_key: Tensor  # [N, H, B, B]
    query_key_field: Tensor  # [N, H, B] query . u'
    query_field_key: Tensor  # [N, H, B] u . key
    query_norm: Tensor  # [N, H]
    query_cross: Tensor  # [N, H, B] query . u, weighted by degree
    key_norm: Tensor  # [N, H]
    key_cross: Tensor  # [N, H, B] key . u', weighted by degree
    value: Tensor  # [N, H, B] channel means


class IntrinsicMARA(SphereGate):
    r"""MARA whose grid constants are replaced by a signal that turns with the atom.

    .. math::
        q(g) = W_h h_i + W_f f(g) + p_i(g), \quad k(g) = W'_f f(g) + p_i(g), \quad
        v(g) = W''_h h_j + W''_f f(g) + p_i(g), \quad f(g) = |x_j - (x_i + r_{ij} g)|^2

    The signal is made of the node features of degree 1 to ``signal_l_max`` that turn with points on the sphere: parity
    (-1)^l. Others (pseudovectors and so on) change sign against the sphere under a reflection and are left out. Where
    the layer offers none, it is the density of neighbours, ``c_i,lm = sum_j R(r_ij) Y_lm(r_ij)`` (edges must carry
    ``radial``). Keys have no node term.

    Logits are bounded: ``s = T q . k / (d_h sqrt((1 + |q|^2) (1 + |k|^2)))`` with d_h the width of a head, ``T = max_T
    sigma(.)`` learned per head, and ``|q|^2`` the mean square over channels and sphere, where degree l counts 4^(l-1)
    times, because high degrees are what a rule resolves badly.

    * ``kernel="exp"``: softmax over the answering points, as published. Invariant up to the error of the rule
      (``rotation = "quadrature"``): take 50 or 86 Lebedev points, and measure the trained model.
    * ``kernel="polynomial"``: ``1 + s + s^2 / 2 > 0`` in place of exp(s), normalised over both points together. All
      sums are polynomials, so a rule of degree 3 L is exact at any logit size (``rotation = "exact"``). They are done
      once, on products of harmonics, and the cost per edge does not depend on the number of points.

    Args:
        num_features: F, channels of every irrep of the node features.
        degrees: (degree, parity) of the node features' irreps, in order.
        num_radial: R, width of ``edges.radial``; used where the signal is the neighbour density.
        grid: sphere rule; None for 50 Lebedev points.
        signal_l_max: highest degree of the signal.
        kernel: see above.
        hidden_dim, num_heads, where, gate, positional (False: no signal), frozen_projections: see
            :class:`steradian.operators.mara.gate.MARA`.

    Raises:
        ValueError: a rule with negative weights, or of too low a degree for the polynomial kernel.
    """

    def __init__(
        self,
        num_features: int,
        degrees: tuple[tuple[int, int], ...] = ((0, 1),),
        num_radial: int = 8,
        grid: SphereGrid | None = None,
        hidden_dim: int = 32,
        num_heads: int = 1,
        *,
        signal_l_max: int = 2,
        kernel: Literal["exp", "polynomial"] = "exp",
        where: Literal["edge", "node"] = "edge",
        gate: Literal["neutral", "published"] = "neutral",
        positional: bool = True,
        frozen_projections: bool = False,
    ) -> None:
        if kernel not in ("exp", "polynomial"):
            raise ValueError(f"kernel must be 'exp' or 'polynomial', not '{kernel}'")
        if signal_l_max < 1:
            raise ValueError(f"signal_l_max must be at least 1, not {signal_l_max}")
        grid = lebedev(50) if grid is None else grid
        super().__init__(num_features, grid, hidden_dim, num_heads, field="squared", where=where, gate=gate)
        self.kernel = kernel
        self.rotation = "exact" if kernel == "polynomial" else "quadrature"
        starts = [sum(2 * degree + 1 for degree, _ in degrees[:place]) for place in range(len(degrees))]
        turning = [
            (degree, start)
            for (degree, parity), start in zip(degrees, starts)
            if 1 <= degree <= signal_l_max and parity == (-1) ** degree
        ]
        self.from_density = positional and not turning
        if self.from_density:
            turning = [(degree, degree**2) for degree in range(1, signal_l_max + 1)]
        self.turning = tuple(turning) if positional else ()  # (degree, first component) of what the signal is made of
        self.l_max = max([degree for degree, _ in self.turning], default=1)
        self._require_degree()
        self._start_gate(frozen_projections)

        width = num_radial if self.from_density else num_features
        self.signal = nn.ParameterList(nn.Parameter(torch.randn(width, hidden_dim) * width**-0.5) for _ in self.turning)
        self.temperature = nn.Parameter(torch.zeros(num_heads))

    def _require_degree(self) -> None:
        needed = 3 * self.l_max
        if self.kernel == "polynomial" and self.grid.degree < needed:
            fix = {3: "6 Lebedev points", 6: "26 Lebedev points", 9: "38 Lebedev points"}.get(needed, "more points")
            raise ValueError(
                f"kernel 'polynomial' with a signal of degree {self.l_max} needs a rule of degree {needed}, but "
                f"{self.grid.name} has degree {self.grid.degree}; take {fix} or a lower signal_l_max"
            )

    def _place_grid(self) -> None:
        super()._place_grid()
        weights = self.grid.weights / self.grid.weights.sum()
        basis = spherical_harmonics(self.grid.points, self.l_max)  # [K, B]
        self.basis = basis.to(self.W_gate)
        self.overlap = torch.einsum("k,ka,kb->ab", weights, basis, basis).to(self.W_gate)
        self.triple = torch.einsum("k,ka,kb,kc->abc", weights, basis, basis, basis).to(self.W_gate)
        self.first = torch.einsum("k,ka->a", weights, basis).to(self.W_gate)
        degree = torch.arange(self.l_max + 1).repeat_interleave(2 * torch.arange(self.l_max + 1) + 1)
        self.degree_weights = (4.0 ** (degree - 1).clamp(min=0)).to(self.W_gate)

    # -------------------------------------------------------------------------------------------------------- forward

    def pooled(self, features: Tensor, edges: EdgesOfGate) -> Tensor:
        scalars = self._scalars(features)
        logits, value = self._logits_and_values(features, scalars, edges)
        if self.kernel == "exp":
            pooled = pool_exponential(logits, value, self.basis, self.weights)
        else:
            pooled = pool_polynomial(logits, value, self.first, self.overlap, self.triple)
        value_node = self._head_mean(self._mixed(scalars, self.Wv_h.T))
        return pooled + value_node.index_select(0, edges.senders)

    def as_written(self, features: Tensor, edges: EdgesOfGate, chosen: Tensor | None = None) -> paper.Written:
        p = None
        if self.turning:
            source = paper.density(edges, len(features), self.l_max) if self.from_density else features
            parts = [(degree, start, weight) for (degree, start), weight in zip(self.turning, self.signal)]
            p = paper.signal(source, parts, self.points)
        return paper.intrinsic(
            self._scalars(features),
            bare(edges, chosen),
            self.points,
            self.weights,
            self._written_weights(),
            p,
            MAX_TEMPERATURE * torch.sigmoid(self.temperature),
            self.l_max,
            kernel=self.kernel,
            gate_kind=self.gate,
        )

    def _logits_and_values(self, features: Tensor, scalars: Tensor, edges: EdgesOfGate) -> tuple[Tensor, Tensor]:
        """Coefficients of the logits ``[E, H, B, B]`` and of the values ``[E, H, B]``."""
        tables = _NodeTables(
            *(t.index_select(0, edges.receivers) for t in self._intrinsic_tables(features, scalars, edges))
        )
        query_f, key_f = self._per_head(self.W_f), self._per_head(self.Wk_f)
        field = self._field_coefficients(edges.vectors).unsqueeze(1)  # [E, 1, B]
        logits = tables.query_key + tables.query_key_field.unsqueeze(3) * field.unsqueeze(2)
        right = tables.query_field_key + (query_f * key_f).sum(1).unsqueeze(1) * field
        logits = logits + field.unsqueeze(3) * right.unsqueeze(2)

        squared_field = (field.square() * self.degree_weights).sum(2)
        width = self.hidden_dim // self.num_heads
        query = tables.query_norm + 2 * (tables.query_cross * field).sum(2) + query_f.square().sum(1) * squared_field
        key = tables.key_norm + 2 * (tables.key_cross * field).sum(2) + key_f.square().sum(1) * squared_field
        # norms are sums of squares; rounding must not take them below zero
        size = ((1 + query.clamp(min=0) / width) * (1 + key.clamp(min=0) / width)).rsqrt()
        scale = MAX_TEMPERATURE / width * torch.sigmoid(self.temperature) * size
        value = tables.value + self._head_mean(self.Wv_f).unsqueeze(1) * field
        return logits * scale[..., None, None], value

    def _mixed(self, features: Tensor, weight: Tensor) -> Tensor:
        """``features @ weight``, multiplied in the format of the role."""
        return (cast(features, self.low) @ cast(weight, self.low)).to(features.dtype)

    def _per_head(self, table: Tensor) -> Tensor:
        """``[..., d]`` as ``[..., H, d / H]``."""
        return table.unflatten(-1, (self.num_heads, -1))

    def _field_coefficients(self, vectors: Tensor) -> Tensor:
        """``[E, B]`` with ``f(g) = 2 r^2 - 2 r (r_ij . g) = sum_b coefficient_b Y_b(g)``; smooth at r = 0."""
        squared_lengths = vectors.square().sum(1, keepdim=True)
        safe = torch.where(squared_lengths > 0, squared_lengths, 1.0).sqrt()
        lengths = torch.where(squared_lengths > 0, safe, 0.0)
        higher = vectors.new_zeros((vectors.shape[0], (self.l_max + 1) ** 2 - 4))
        return torch.cat([2 * squared_lengths, (-2 / 3**0.5) * lengths * vectors, higher], dim=1)

    def _signal(self, features: Tensor, edges: EdgesOfGate) -> Tensor:
        """Coefficients of ``p_i(g)``, ``[N, B, d]``, degree 0 left empty."""
        num_atoms = features.shape[0]
        if self.turning and not self.from_density and features.dim() != 3:
            raise ValueError("this gate makes its signal from equivariant features: pass them all, [N, D, F]")
        source = self._neighbour_density(num_atoms, edges) if self.from_density else features
        blocks: dict[int, Tensor] = {}
        for (degree, start), weight in zip(self.turning, self.signal):
            block = self._mixed(source[:, start : start + 2 * degree + 1], weight)
            blocks[degree] = blocks[degree] + block if degree in blocks else block
        empty = {
            degree: features.new_zeros((num_atoms, 2 * degree + 1, self.hidden_dim)) for degree in range(self.l_max + 1)
        }
        return torch.cat([blocks.get(degree, empty[degree]) for degree in range(self.l_max + 1)], dim=1)

    def _neighbour_density(self, num_atoms: int, edges: EdgesOfGate) -> Tensor:
        """``sum_j R(r_ij) Y_lm(r_ij)``, ``[N, (l_max + 1)^2, R]``."""
        radial, harmonics = edges.radial, edges.harmonics
        if radial is None:
            raise ValueError("the intrinsic frame makes its signal from edges.radial, which these edges do not have")
        size = (self.l_max + 1) ** 2
        if harmonics is None or harmonics.shape[1] < size:
            squared = edges.vectors.square().sum(1, keepdim=True)
            directions = edges.vectors * torch.where(squared > 0, squared, 1.0).rsqrt()
            harmonics = spherical_harmonics(directions, self.l_max)
        per_edge = harmonics[:, :size].unsqueeze(2) * radial.unsqueeze(1)
        summed = per_edge.new_zeros((num_atoms, *per_edge.shape[1:])).index_add(0, edges.receivers, per_edge)
        return from_owners(summed, edges.share)

    def _intrinsic_tables(self, features: Tensor, scalars: Tensor, edges: EdgesOfGate) -> _NodeTables:
        signal = self._signal(features, edges)
        key = self._per_head(signal).transpose(1, 2)  # [N, H, B, d_h]
        degree_zero = self._per_head(self._mixed(scalars, self.W_h.T)).unsqueeze(2)
        query = torch.cat([key[:, :, :1] + degree_zero, key[:, :, 1:]], dim=2)
        query_f, key_f = self._per_head(self.W_f).unsqueeze(2), self._per_head(self.Wk_f).unsqueeze(2)
        weights = self.degree_weights
        return _NodeTables(
            query_key=query @ key.transpose(2, 3),
            query_key_field=(query @ key_f).squeeze(3),
            query_field_key=(key @ query_f).squeeze(3),
            query_norm=(query.square().sum(3) * weights).sum(2),
            query_cross=(query @ query_f).squeeze(3) * weights,
            key_norm=(key.square().sum(3) * weights).sum(2),
            key_cross=(key @ key_f).squeeze(3) * weights,
            value=key.mean(3),
        )


# ---------------------------------------------------------------------------- sums over the sphere, any leading axes


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

    Only one block of edges has its K x K attention in memory.

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
