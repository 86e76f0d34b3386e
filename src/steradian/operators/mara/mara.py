"""MARA: attention on the sphere around an atom decides how much each neighbour's message counts.

Leonardi, Bonev, Riesen, "MARA: Continuous SE(3)-Equivariant Attention for Molecular Force Fields" (2026).
Equation numbers are those of the paper.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steradian.config import MARAConfig
from steradian.graph import Edges
from steradian.operators.base import EdgeGate, GateFactory, Rotation, SlotSpec, in_layer
from steradian.operators.mara import triton as mara_gpu
from steradian.operators.mara.factorised import (
    NUMBERS_PER_BLOCK,
    LogitTables,
    attention_on_sphere,
    flat_tables,
    gate_logits_to_pooled,
)
from steradian.polynomials import backend_for
from steradian.precision import WithRole, cast
from steradian.sphere.grids import SphereGrid, equiangular, make_grid

__all__ = ["MARA", "mara_factory", "sphere_field"]

#: Size of the field at a usual neighbour distance, [Å] and [Å^2]: only the scale of the random start depends on it.
TYPICAL_FIELD = {"distance": 4.0, "squared": 20.0}


def sphere_field(vectors: Tensor, points: Tensor, kind: Literal["distance", "squared"] = "distance") -> Tensor:
    """Field of every edge on the grid, ``[E, K]`` (equation 2): ``|x_j - (x_i + r_ij g_k)|`` or its square.

    The distance has the slope discontinuity of |x| where the neighbour lies exactly on a grid direction. There, and
    closer to it than the root of the machine precision, its derivatives are zero (the mean over both sides), so first
    and second derivatives are always finite. The square is smooth. An edge of zero length has field zero.

    Args:
        vectors: ``[E, 3]`` from receiver to sender [Å].
        points: ``[K, 3]`` unit vectors.
        kind: ``distance`` [Å] or ``squared`` [Å^2].
    """
    if kind == "squared":
        return 2 * vectors.square().sum(1, keepdim=True) - 2 * _safe_lengths(vectors) * (vectors @ points.T)
    return _DistanceField.apply(vectors, points)


def _safe_lengths(vectors: Tensor) -> Tensor:
    """``[E, 1]`` norms; zero, with zero derivatives, for a zero vector."""
    squared = vectors.square().sum(1, keepdim=True)
    empty = squared == 0
    return torch.where(empty, 0.0, torch.where(empty, 1.0, squared).sqrt())


class _DistanceField(torch.autograd.Function):
    """``f_k = |x - |x| g_k|``; the derivatives are a few products with the points, differentiable again."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, points: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        # differences, not 2 r^2 (1 - cos): that loses half of the digits near a grid direction
        squared = vectors.new_zeros(vectors.shape[0], points.shape[0])
        for axis in range(3):
            difference = torch.addcmul(vectors[:, axis : axis + 1], lengths, points[:, axis], value=-1)
            squared.addcmul_(difference, difference)
        field = squared.sqrt_()
        ctx.save_for_backward(vectors, points, field)
        return field

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        vectors, points, field = ctx.saved_tensors
        lengths = _safe_lengths(vectors)
        at_kink = field <= torch.finfo(field.dtype).eps ** 0.5 * lengths
        pull = torch.where(at_kink, 0.0, gradient / torch.where(at_kink, 1.0, field))
        # df_k/dx = (x - r g_k - ((x . g_k) - r) x / r) / f_k
        along = (pull * (vectors @ points.T)).sum(1, keepdim=True) / torch.where(lengths > 0, lengths, 1.0)
        return vectors * (2 * pull.sum(1, keepdim=True) - along) - lengths * (pull @ points), None


class MARA(WithRole, EdgeGate):
    r"""Modular Angular-Radial Attention in the published, laboratory frame.

    For the edge from neighbour j to centre i with field ``f_k`` on the points of a sphere grid with weights ``w_k``:

    .. math::
        q_k = W_h h_i + W_f f_k + p_k, \quad k_k = W'_f f_k + p_k, \quad v_k = W''_h h_j + W''_f f_k + p_k

        A_{kl} = \frac{w_l \exp(q_k k_l / \sqrt d)}{\sum_m w_m \exp(q_k k_m / \sqrt d)}, \quad
        α_{ij} = σ\Big(W_{gate} \sum_k \frac{w_k}{4π} \langle \sum_l A_{kl} v_l \rangle_c\Big)

    with the mean over the channels c of each head. The node term of the paper's keys, ``W'_h h_j``, is the same for
    every l and cancels in the softmax: a dead parameter, left out (``normalize=True`` brings it back to life).

    The sum is evaluated in a factorised form that equals equations 2-8 to rounding and costs K^2 exponentials per edge
    and head; no tensor of shape [E, K, hidden_dim] exists (``normalize=True`` needs one, block by block).

    Args:
        num_features: F, invariant features per atom.
        grid: sphere rule with positive weights; None for the paper's 4 x 8 equiangular one.
        hidden_dim: d, attention channels of all heads together.
        num_heads: H; the scores of a head are divided by ``sqrt(d / H)``.
        where: ``edge`` weights every message (equation 8); ``node`` gives all messages of one sender its mean gate,
            ``alpha_j = sum_m c_jm alpha_jm / sum_m c_jm`` with the cutoff envelope c (edges must carry ``envelope``).
        field: ``distance`` (equation 2) or ``squared``, which has no kinks.
        gate: ``neutral``: ``alpha = 2 sigma(z)`` with ``W_gate = 0`` at the start, so alpha is exactly 1 and a host is
            unchanged; ``published``: ``alpha = sigma(z)`` from a random start.
        positional: False removes ``p`` (ablation).
        frozen_projections: True keeps the W's (not ``p`` and ``W_gate``) at their random start (ablation).
        dropout: probability of dropping an entry of A in training mode.
        normalize: LayerNorm over the channels of q, k and v (figure 5). Costs [block, K, d] and is slower.
        residual: adds the query embedding to the attention's output (figure 5); no extra cost.

    Not supported: exact rotation invariance. The grid and ``p`` are fixed in the laboratory frame, so alpha turns with
    the axes (forces stay conservative). See :class:`steradian.operators.mara.intrinsic.IntrinsicMARA`.

    Raises:
        ValueError: arguments that do not fit each other, or a grid with negative weights.
    """

    rotation: Rotation = "lab_frame"
    supports_pbc = True
    role = "attention"

    def __init__(
        self,
        num_features: int,
        grid: SphereGrid | None = None,
        hidden_dim: int = 32,
        num_heads: int = 1,
        *,
        where: Literal["edge", "node"] = "edge",
        field: Literal["distance", "squared"] = "distance",
        gate: Literal["neutral", "published"] = "neutral",
        positional: bool = True,
        frozen_projections: bool = False,
        dropout: float = 0.0,
        normalize: bool = False,
        residual: bool = False,
    ) -> None:
        super().__init__()
        if hidden_dim % num_heads:
            raise ValueError(f"hidden_dim ({hidden_dim}) must be a multiple of num_heads ({num_heads})")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {dropout}")
        for name, value, known in (
            ("where", where, ("edge", "node")),
            ("field", field, ("distance", "squared")),
            ("gate", gate, ("neutral", "published")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be '{known[0]}' or '{known[1]}', not '{value}'")
        self.grid = equiangular() if grid is None else grid
        self.grid.require_positive_weights("MARA's softmax")
        self.num_features, self.hidden_dim, self.num_heads = num_features, hidden_dim, num_heads
        self.where, self.field, self.gate = where, field, gate
        self.dropout, self.normalize, self.residual = dropout, normalize, residual

        field_scale = 0.5 / TYPICAL_FIELD[field]
        self.W_h = nn.Parameter(nn.init.xavier_uniform_(torch.empty(hidden_dim, num_features)))
        self.W_f = nn.Parameter(field_scale * torch.randn(hidden_dim))
        self.Wk_f = nn.Parameter(field_scale * torch.randn(hidden_dim))
        self.Wv_h = nn.Parameter(nn.init.xavier_uniform_(torch.empty(hidden_dim, num_features)))
        self.Wv_f = nn.Parameter(field_scale * torch.randn(hidden_dim))
        self.Wk_h: nn.Parameter | None = None
        self.p = nn.Parameter(0.5 * torch.randn(self.grid.num_points, hidden_dim)) if positional else None
        if normalize:
            self.Wk_h = nn.Parameter(nn.init.xavier_uniform_(torch.empty(hidden_dim, num_features)))
            self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(hidden_dim) for _ in range(3))
            # the mean over channels of a normalised value is zero unless channels weigh differently
            nn.init.uniform_(self.norm_v.weight, 0.0, 2.0)
        if frozen_projections:
            for name, parameter in self.named_parameters(recurse=False):
                parameter.requires_grad_(not name.startswith("W"))
        start = torch.zeros(num_heads) if gate == "neutral" else torch.randn(num_heads) * num_heads**-0.5
        self.W_gate = nn.Parameter(start)
        self._place_grid()

    @classmethod
    def from_config(cls, config: MARAConfig, spec: SlotSpec) -> MARA:
        """The gate that a configuration section asks for, in a slot of a host layer."""
        shared: dict[str, Any] = {
            name: getattr(config, name)
            for name in ("hidden_dim", "num_heads", "where", "gate", "positional", "frozen_projections")
        }
        if config.frame == "intrinsic":
            from steradian.operators.mara.intrinsic import IntrinsicMARA  # it builds on this class

            if config.dropout:
                raise ValueError("dropout belongs to the published form; set model.edge_gate.dropout to 0")
            return IntrinsicMARA(
                spec.num_channels,
                spec.degrees,
                spec.num_radial,
                make_grid(config.grid),
                kernel=config.kernel,
                signal_l_max=config.signal_l_max,
                **shared,
            )
        return MARA(
            spec.num_channels,
            make_grid(config.grid),
            field=config.field or "distance",
            dropout=config.dropout,
            normalize=config.normalize,
            residual=config.residual,
            **shared,
        )

    # ------------------------------------------------------------------------------------------------------- the grid

    def _place_grid(self) -> None:
        """Points and weights / 4 pi in the dtype and on the device of the parameters, always from float64."""
        like = self.W_gate.detach()
        self.points = self.grid.points.to(like)
        self.weights = (self.grid.weights / (4 * math.pi)).to(like)

    def _apply(self, fn: Any, recurse: bool = True) -> MARA:
        super()._apply(fn, recurse)
        self._place_grid()  # casting a rounded grid back to float64 would not restore its digits
        return self

    # -------------------------------------------------------------------------------------------------------- forward

    def forward(self, features: Tensor, edges: Any) -> Tensor:
        """alpha of every edge, ``[E]``.

        Args:
            features: ``[N, D, F]`` node features, invariants first, or the invariants ``[N, F]`` alone.
            edges: :class:`steradian.graph.Edges`, or any object with ``senders``, ``receivers`` and ``vectors``.

        Raises:
            ValueError: features of the wrong width, or ``where="node"`` for edges without an envelope.
        """
        alpha = self.activation(self.pooled(features, edges) @ self.W_gate)
        return alpha if self.where == "edge" else self._mean_at_senders(alpha, edges, features.shape[0])

    def activation(self, logits: Tensor) -> Tensor:
        """alpha from ``W_gate . pooled``."""
        alpha = torch.sigmoid(logits)
        return 2 * alpha if self.gate == "neutral" else alpha

    def pooled(self, features: Tensor, edges: Any) -> Tensor:
        """``Pool_{k,c}[o_k]`` of each head, ``[E, H]`` (equation 7)."""
        scalars = self._scalars(features)
        if self.normalize:
            return self._pooled_normalized(scalars, edges)
        nodes, value, query = self._node_tables(scalars)
        pooled = self._attend(edges, nodes) + value.index_select(0, edges.senders)
        if self.residual:
            mean_field = (sphere_field(edges.vectors, self.points, self.field) @ self.weights).unsqueeze(1)
            pooled = pooled + query.index_select(0, edges.receivers) + mean_field * self._head_mean(self.W_f)
            pooled = pooled + self._tables().value_point @ self.weights
        return pooled

    def _attend(self, edges: Any, nodes: Tensor) -> Tensor:
        """``[E, H]`` pooled attention without the value's node term."""
        dropout = self.dropout if self.training else 0.0
        if dropout:
            nodes = nodes.to(edges.vectors.dtype)
            return self._pool(edges.vectors, edges.receivers, nodes, self._tables(), dropout)
        squared = self.field == "squared"
        if mara_gpu.is_served(edges.vectors, nodes, self.grid.num_points, squared):
            flat = self._flat_tables()
            in_order = isinstance(edges, Edges)  # by definition
            return mara_gpu.pool_on_sphere(edges.vectors, nodes, flat, edges.receivers, self.points, squared, in_order)
        nodes = nodes.to(edges.vectors.dtype)
        if backend_for(edges.vectors, nodes) == "cpu":
            from steradian.operators.mara.cpu import pool_on_sphere

            reference = partial(self._pool_reference, edges.receivers)
            flat = self._flat_tables()
            return pool_on_sphere(edges.vectors, nodes, flat, edges.receivers, self.points, self.field, reference)
        return self._pool(edges.vectors, edges.receivers, nodes, self._tables())

    def _flat_tables(self) -> Tensor:
        names = ("W_f", "Wk_f", "Wv_f", *(("p",) if self.p is not None else ()))
        weights = [getattr(self, name) for name in names]
        return self.folded("tables", lambda: flat_tables(self._tables(), self.weights), *weights)

    def _pool_reference(self, receivers: Tensor, vectors: Tensor, nodes: Tensor, tables: Tensor) -> Tensor:
        """What the CPU's machine code computes, from its tables, in plain PyTorch."""
        points = self.grid.num_points
        pair, by_point, by_square = tables.split([2, 4 * points, points**2], dim=1)
        point_field, field_point, value_point, _ = by_point.unflatten(1, (4, points)).unbind(1)
        point_point = by_square.unflatten(1, (points, points)) - self.weights.log()
        unpacked = LogitTables(pair[:, 0], point_field, field_point, point_point, pair[:, 1], value_point)
        return self._pool(vectors, receivers, nodes, unpacked)

    def _pool(
        self, vectors: Tensor, receivers: Tensor, nodes: Tensor, tables: LogitTables, dropout: float = 0.0
    ) -> Tensor:
        field = sphere_field(vectors, self.points, self.field)
        centres = nodes.index_select(0, receivers)
        point = centres[..., 1:] + self.weights.log()
        return gate_logits_to_pooled(field, centres[..., 0], point, tables, self.weights, dropout)

    @torch.no_grad()
    def attention_maps(self, features: Tensor, edges: Any, chosen: Tensor | None = None) -> dict[str, Any]:
        """What the gate looked at, for pictures.

        Args:
            features, edges: as in :meth:`forward`.
            chosen: indices of the edges e to return maps of; None for all, which takes E * H * K * K numbers.

        Returns:
            ``attention [e, H, K, K]`` (point k asks, l answers, rows sum to one), ``profile [e, K]`` (how much point l
            is attended to, mean over asking points and heads, sums to one; divide by ``grid.weights / 4 pi`` for a
            density that is 1 where all directions count alike), ``alpha [E]`` of all edges, ``chosen [e]``, ``grid``.
        """
        alpha = self(features, edges)
        if chosen is None:
            chosen = torch.arange(len(alpha), device=alpha.device)
        attention, profile = self._attention(features, edges, chosen)
        return {"attention": attention, "profile": profile, "alpha": alpha, "chosen": chosen, "grid": self.grid}

    def _attention(self, features: Tensor, edges: Any, chosen: Tensor) -> tuple[Tensor, Tensor]:
        scalars, centres = self._scalars(features), edges.receivers[chosen]
        field = sphere_field(edges.vectors[chosen], self.points, self.field)
        if self.normalize:
            attention, _, _ = self._normalized_attention(scalars, field, centres, edges.senders[chosen])
        else:
            nodes = self._node_tables(scalars)[0][centres].to(scalars.dtype)
            point = nodes[..., 1:] + self.weights.log()
            attention = attention_on_sphere(field, nodes[..., 0], point, self._tables())
        return attention, (self.weights @ attention).mean(1)

    def _scalars(self, features: Tensor) -> Tensor:
        """``[N, F]`` invariants of ``[N, D, F]`` features, or what is given if these are the invariants alone."""
        if features.shape[-1] != self.num_features:
            raise ValueError(f"MARA was built for {self.num_features} features per atom, got {features.shape[-1]}")
        return features[:, 0] if features.dim() == 3 else features

    def _per_head(self, table: Tensor) -> Tensor:
        """``[..., d]`` as ``[..., H, d / H]``."""
        return table.unflatten(-1, (self.num_heads, -1))

    def _mixed(self, features: Tensor, weight: Tensor) -> Tensor:
        """``features @ weight``, multiplied in the format of the role."""
        return (cast(features, self.low) @ cast(weight, self.low)).to(features.dtype)

    def _head_mean(self, table: Tensor) -> Tensor:
        """Mean over the channels of each head: ``[..., d] -> [..., H]``."""
        return self._per_head(table).mean(-1)

    def _node_tables(self, scalars: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per atom a_i . u' and a_i . p ``[N, H, 1 + K]`` in the format of the role; mean value, mean query ``[N, H]``.

        The hidden width is contracted on the weights, before any atom is seen: one product with [F, H (K + 3)].
        """
        points = self.grid.num_points
        weights = [self.W_h, self.Wk_f, self.Wv_h, *([] if self.p is None else [self.p])]
        columns = self.folded(("columns", self.low), lambda: cast(self._node_columns(), self.low), *weights)
        out = (cast(scalars, self.low) @ columns).unflatten(1, (self.num_heads, -1))
        nodes = out[..., 2:]
        if self.p is None:
            nodes = torch.cat([nodes, out.new_zeros((*out.shape[:2], points))], dim=2)
        return nodes, out[..., 0].to(scalars.dtype), out[..., 1].to(scalars.dtype)

    def _node_columns(self) -> Tensor:
        """``[F, H (3 + K)]``: features to mean value, mean query, a . u', a . p of each head."""
        heads = self.num_heads
        scale = (self.hidden_dim // heads) ** -0.5
        query = self.W_h.unflatten(0, (heads, -1))  # [H, d/H, F]
        rows = [self.Wv_h.unflatten(0, (heads, -1)).mean(1).unsqueeze(1), query.mean(1).unsqueeze(1)]
        key = (self._per_head(self.Wk_f) * scale).unsqueeze(1)  # [H, 1, d/H]
        if self.p is not None:
            key = torch.cat([key, (self._per_head(self.p) * scale).transpose(0, 1)], dim=1)
        rows.append(torch.bmm(key, query))
        return torch.cat(rows, dim=1).flatten(0, 1).t()

    def _tables(self) -> LogitTables:
        scale = (self.hidden_dim // self.num_heads) ** -0.5
        query_f, key_f = self._per_head(self.W_f), self._per_head(self.Wk_f) * scale
        p = self.p if self.p is not None else self.W_f.new_zeros((self.grid.num_points, self.hidden_dim))
        p_heads = self._per_head(p).transpose(0, 1)  # [H, K, d/H]
        return LogitTables(
            field_field=(query_f * key_f).sum(-1),
            point_field=torch.einsum("hkc,hc->hk", p_heads, key_f),
            field_point=torch.einsum("hkc,hc->hk", p_heads, query_f * scale),
            point_point=torch.bmm(p_heads * scale, p_heads.transpose(1, 2)),
            value_field=self._head_mean(self.Wv_f),
            value_point=p_heads.mean(-1),
        )

    # -------------------------------------------------------------------- figure 5: LayerNorm couples all the channels

    def _pooled_normalized(self, scalars: Tensor, edges: Any) -> Tensor:
        field = sphere_field(edges.vectors, self.points, self.field)
        block = max(1, NUMBERS_PER_BLOCK // (self.grid.num_points * max(self.grid.num_points, self.hidden_dim)))
        pooled = []
        for start in range(0, max(1, len(field)), block):
            part = slice(start, start + block)
            attention, value, query = self._normalized_attention(
                scalars, field[part], edges.receivers[part], edges.senders[part]
            )
            if self.training and self.dropout:
                attention = nn.functional.dropout(attention, self.dropout)
            output = (attention @ value.unsqueeze(3)).squeeze(3)
            pooled.append((output + query if self.residual else output) @ self.weights)
        return torch.cat(pooled)

    def _normalized_attention(
        self, scalars: Tensor, field: Tensor, receivers: Tensor, senders: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention ``[e, H, K, K]``, channel means of values and of queries before LayerNorm ``[e, H, K]``."""
        assert self.Wk_h is not None
        rows, p = field.unsqueeze(2), 0.0 if self.p is None else self.p
        query = (scalars @ self.W_h.T)[receivers].unsqueeze(1) + rows * self.W_f + p
        key = (scalars @ self.Wk_h.T)[senders].unsqueeze(1) + rows * self.Wk_f + p
        value = (scalars @ self.Wv_h.T)[senders].unsqueeze(1) + rows * self.Wv_f + p
        query_heads = self._per_head(self.norm_q(query)).transpose(1, 2) * (self.hidden_dim // self.num_heads) ** -0.5
        key_heads = self._per_head(self.norm_k(key)).transpose(1, 2)
        attention = torch.softmax(query_heads @ key_heads.transpose(2, 3) + self.weights.log(), dim=-1)
        return attention, self._head_mean(self.norm_v(value)).transpose(1, 2), self._head_mean(query).transpose(1, 2)

    # ---------------------------------------------------------------------------------------------------- where="node"

    def _mean_at_senders(self, alpha: Tensor, edges: Any, num_atoms: int) -> Tensor:
        envelope = getattr(edges, "envelope", None)
        if envelope is None:
            raise ValueError("where='node' weighs neighbours with edges.envelope, which these edges do not have")
        total = envelope.new_zeros(num_atoms).index_add(0, edges.receivers, envelope)
        # the mean of alpha - 1, so that a neutral gate stays exactly 1
        excess = envelope.new_zeros(num_atoms).index_add(0, edges.receivers, envelope * (alpha - 1))
        reached = total > torch.finfo(total.dtype).eps
        mean = torch.where(reached, excess, 0.0) / torch.where(reached, total, 1.0)
        return (1 + mean).index_select(0, edges.senders)


def mara_factory(config: MARAConfig) -> GateFactory:
    """The factory that fills the edge gates of a model's layers as a configuration section says.

    It raises ValueError where ``config.layers`` lists a layer that the model does not have.
    """

    def make(spec: SlotSpec) -> EdgeGate | None:
        return MARA.from_config(config, spec) if in_layer(config.layers, spec, "model.edge_gate") else None

    return make
