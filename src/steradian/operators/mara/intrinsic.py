"""MARA in the atom's own frame: the gate is invariant under rotations and reflections.

In place of the constants ``p_k`` of the published form every atom has a signal on the sphere that turns with it,
``p_i(g) = sum_lm (W_l c_i,lm) Y_lm(g)``, and the field is the squared distance, a polynomial of degree 1 in g. So
queries, keys and values are polynomials of low degree L, the logits are ``sum_bb' Y_b(g) M_bb' Y_b'(g')`` with one
small matrix M per edge, and sums over a sphere rule converge fast (``exp``) or are exact (``polynomial``).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from steradian.equivariant.harmonics import spherical_harmonics
from steradian.operators.mara.intrinsic_kernel import basis_attention, pool_exponential, pool_polynomial
from steradian.operators.mara.mara import MARA
from steradian.sphere.grids import SphereGrid, lebedev

__all__ = ["IntrinsicMARA"]

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


class IntrinsicMARA(MARA):
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
        hidden_dim, num_heads, where, gate, positional (False: no signal), frozen_projections: see :class:`MARA`.

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
        super().__init__(
            num_features,
            lebedev(50) if grid is None else grid,
            hidden_dim,
            num_heads,
            where=where,
            field="squared",
            gate=gate,
            positional=False,
            frozen_projections=frozen_projections,
        )
        self.kernel, self.positional = kernel, positional
        start, turning = 0, []
        for degree, parity in degrees:
            if 1 <= degree <= signal_l_max and parity == (-1) ** degree and positional:
                turning.append((degree, start))
            start += 2 * degree + 1
        self.from_density = positional and not turning
        if self.from_density:
            turning = [(degree, degree**2) for degree in range(1, signal_l_max + 1)]
        self.turning = tuple(turning)  # (degree, first component) of what the signal is made of
        self.l_max = max([degree for degree, _ in turning], default=1)
        self.rotation = "exact" if kernel == "polynomial" else "quadrature"
        self._require_degree()

        width = num_radial if self.from_density else num_features
        self.signal = nn.ParameterList(nn.Parameter(torch.randn(width, hidden_dim) * width**-0.5) for _ in turning)
        self.temperature = nn.Parameter(torch.zeros(num_heads))
        self._place_grid()

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
        if not hasattr(self, "l_max"):
            return  # called by the base class before the degrees are known
        weights = self.grid.weights / self.grid.weights.sum()
        basis = spherical_harmonics(self.grid.points, self.l_max)  # [K, B]
        self.basis = basis.to(self.W_gate)
        self.overlap = torch.einsum("k,ka,kb->ab", weights, basis, basis).to(self.W_gate)
        self.triple = torch.einsum("k,ka,kb,kc->abc", weights, basis, basis, basis).to(self.W_gate)
        self.first = torch.einsum("k,ka->a", weights, basis).to(self.W_gate)
        degree = torch.arange(self.l_max + 1).repeat_interleave(2 * torch.arange(self.l_max + 1) + 1)
        self.degree_weights = (4.0 ** (degree - 1).clamp(min=0)).to(self.W_gate)

    # -------------------------------------------------------------------------------------------------------- forward

    def pooled(self, features: Tensor, edges: Any) -> Tensor:
        """``Pool_{k,c}[o_k]`` of each head, ``[E, H]``."""
        scalars = self._scalars(features)
        logits, value = self._logits_and_values(features, scalars, edges)
        if self.kernel == "exp":
            pooled = pool_exponential(logits, value, self.basis, self.weights)
        else:
            pooled = pool_polynomial(logits, value, self.first, self.overlap, self.triple)
        value_node = self._head_mean(self._mixed(scalars, self.Wv_h.T))
        return pooled + value_node.index_select(0, edges.senders)

    def _attention(self, features: Tensor, edges: Any, chosen: Tensor) -> tuple[Tensor, Tensor]:
        logits, _ = self._logits_and_values(features, self._scalars(features), edges)
        attention, profile = basis_attention(logits[chosen], self.basis, self.weights, self.kernel)
        return attention, profile.mean(1)

    def _logits_and_values(self, features: Tensor, scalars: Tensor, edges: Any) -> tuple[Tensor, Tensor]:
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

    def _field_coefficients(self, vectors: Tensor) -> Tensor:
        """``[E, B]`` with ``f(g) = 2 r^2 - 2 r (r_ij . g) = sum_b coefficient_b Y_b(g)``; smooth at r = 0."""
        squared_lengths = vectors.square().sum(1, keepdim=True)
        safe = torch.where(squared_lengths > 0, squared_lengths, 1.0).sqrt()
        lengths = torch.where(squared_lengths > 0, safe, 0.0)
        higher = vectors.new_zeros((vectors.shape[0], (self.l_max + 1) ** 2 - 4))
        return torch.cat([2 * squared_lengths, (-2 / 3**0.5) * lengths * vectors, higher], dim=1)

    def _signal(self, features: Tensor, edges: Any) -> Tensor:
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

    def _neighbour_density(self, num_atoms: int, edges: Any) -> Tensor:
        """``sum_j R(r_ij) Y_lm(r_ij)``, ``[N, (l_max + 1)^2, R]``."""
        radial = getattr(edges, "radial", None)
        if radial is None:
            raise ValueError("the intrinsic frame makes its signal from edges.radial, which these edges do not have")
        harmonics = getattr(edges, "harmonics", None)
        size = (self.l_max + 1) ** 2
        if harmonics is None or harmonics.shape[1] < size:
            squared = edges.vectors.square().sum(1, keepdim=True)
            directions = edges.vectors * torch.where(squared > 0, squared, 1.0).rsqrt()
            harmonics = spherical_harmonics(directions, self.l_max)
        per_edge = harmonics[:, :size].unsqueeze(2) * radial.unsqueeze(1)
        return per_edge.new_zeros((num_atoms, *per_edge.shape[1:])).index_add(0, edges.receivers, per_edge)

    def _intrinsic_tables(self, features: Tensor, scalars: Tensor, edges: Any) -> _NodeTables:
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
