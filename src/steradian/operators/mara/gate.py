"""MARA as modules: what both frames share, and the published form in the laboratory frame.

Equation numbers are those of :mod:`steradian.operators.mara.paper`, which says what is computed; the form that turns
with the atom is :mod:`steradian.operators.mara.intrinsic`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steradian.equivariant.sphere import SphereGrid, equiangular
from steradian.graph.share import from_owners
from steradian.graph.topology import Rows
from steradian.operators.base import AttentionMaps, BareEdges, EdgeGate, EdgesOfGate, Rotation
from steradian.operators.mara import factorised, paper, triton
from steradian.polynomials import backend_for
from steradian.precision import WithRole, cast

__all__ = ["MARA", "SEAttention", "SphereGate", "mean_at_senders"]

#: Size of the field at a usual neighbour distance, [Å] and [Å^2]: only the scale of the random start depends on it.
TYPICAL_FIELD = {"distance": 4.0, "squared": 20.0}


class SphereGate(WithRole, EdgeGate):
    """What the two frames share: projections, heads, the last step from pooled attention to alpha.

    A frame gives :meth:`pooled` and, for pictures and tests, :meth:`as_written`. Arguments: see :class:`MARA`.
    """

    grid: SphereGrid

    def __init__(
        self,
        num_features: int,
        grid: SphereGrid,
        hidden_dim: int,
        num_heads: int,
        *,
        field: Literal["distance", "squared"],
        where: Literal["edge", "node"],
        gate: Literal["neutral", "published"],
    ) -> None:
        super().__init__()
        if hidden_dim % num_heads:
            raise ValueError(f"hidden_dim ({hidden_dim}) must be a multiple of num_heads ({num_heads})")
        for name, value, known in (
            ("where", where, ("edge", "node")),
            ("field", field, ("distance", "squared")),
            ("gate", gate, ("neutral", "published")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be '{known[0]}' or '{known[1]}', not '{value}'")
        grid.require_positive_weights("MARA's softmax")
        self.grid, self.num_features, self.hidden_dim, self.num_heads = grid, num_features, hidden_dim, num_heads
        self.field, self.where, self.gate = field, where, gate
        self.further_reach = int(where == "node")

        field_scale = 0.5 / TYPICAL_FIELD[field]
        self.W_h = nn.Parameter(nn.init.xavier_uniform_(torch.empty(hidden_dim, num_features)))
        self.W_f = nn.Parameter(field_scale * torch.randn(hidden_dim))
        self.Wk_f = nn.Parameter(field_scale * torch.randn(hidden_dim))
        self.Wv_h = nn.Parameter(nn.init.xavier_uniform_(torch.empty(hidden_dim, num_features)))
        self.Wv_f = nn.Parameter(field_scale * torch.randn(hidden_dim))

    def _start_gate(self, frozen_projections: bool) -> None:
        """The last weights, after all other projections exist."""
        if frozen_projections:
            for name, parameter in self.named_parameters(recurse=False):
                parameter.requires_grad_(not name.startswith("W"))
        heads = self.num_heads
        start = torch.zeros(heads) if self.gate == "neutral" else torch.randn(heads) * heads**-0.5
        self.W_gate = nn.Parameter(start)
        self._place_grid()

    def _place_grid(self) -> None:
        """Points and weights / 4 pi in the dtype and on the device of the parameters, always from float64."""
        like = self.W_gate.detach()
        self.points = self.grid.points.to(like)
        self.weights = (self.grid.weights / (4 * math.pi)).to(like)

    def _apply(self, fn: Any, recurse: bool = True) -> SphereGate:
        super()._apply(fn, recurse)
        self._place_grid()  # casting a rounded grid back to float64 would not restore its digits
        return self

    def summary(self) -> str:
        return f"{type(self).__name__}, {self.grid.name}; rotation: {self.rotation}"

    # -------------------------------------------------------------------------------------------------------- forward

    def forward(self, features: Tensor, edges: EdgesOfGate) -> Tensor:
        """alpha of every edge, ``[E]`` (equations 2 to 7).

        Args:
            features: ``[N, D, F]`` node features, invariants first, or the invariants ``[N, F]`` alone.
            edges: :class:`steradian.graph.Edges` or :class:`steradian.operators.base.BareEdges`.

        Raises:
            ValueError: features of the wrong width, or edges that lack what the form needs.
        """
        alpha = paper.gate(self.pooled(features, edges), self.W_gate, self.gate)
        return alpha if self.where == "edge" else mean_at_senders(alpha, edges, features.shape[0])

    @abstractmethod
    def pooled(self, features: Tensor, edges: EdgesOfGate) -> Tensor:
        """``Pool_{k,c}[o_k]`` of each head, ``[E, H]`` (equation 7)."""

    @abstractmethod
    def as_written(self, features: Tensor, edges: EdgesOfGate, chosen: Tensor | None = None) -> paper.Written:
        """The same as the equations stand, every tensor formed, of chosen edges (None for all), before ``where``."""

    @torch.no_grad()
    def attention_maps(self, features: Tensor, edges: EdgesOfGate, chosen: Tensor | None = None) -> AttentionMaps:
        alpha = self(features, edges)
        if chosen is None:
            chosen = torch.arange(len(alpha), device=alpha.device)
        written = self.as_written(features, edges, chosen)
        return AttentionMaps(alpha, written.attention, written.received.mean(1), chosen, self.grid)

    def _written_weights(self, **more: Tensor | None) -> paper.Weights:
        return paper.Weights(self.W_h, self.W_f, self.Wk_f, self.Wv_h, self.Wv_f, self.W_gate, **more)

    def _scalars(self, features: Tensor) -> Tensor:
        """``[N, F]`` invariants of ``[N, D, F]`` features, or what is given if these are the invariants alone."""
        if features.shape[-1] != self.num_features:
            raise ValueError(f"MARA was built for {self.num_features} features per atom, got {features.shape[-1]}")
        return features[:, 0] if features.dim() == 3 else features

    def _head_mean(self, table: Tensor) -> Tensor:
        """Mean over the channels of each head: ``[..., d] -> [..., H]``."""
        return table.unflatten(-1, (self.num_heads, -1)).mean(-1)


def mean_at_senders(alpha: Tensor, edges: EdgesOfGate, num_atoms: int) -> Tensor:
    """:func:`steradian.operators.mara.paper.of_senders`, of ``[E, ...]``; defined without neighbours, too.

    Raises:
        ValueError: edges without ``envelope``.
    """
    envelope = edges.envelope
    if envelope is None:
        raise ValueError("where='node' weighs neighbours with edges.envelope, which these edges do not have")
    total = envelope.new_zeros(num_atoms).index_add(0, edges.receivers, envelope)
    reached = total > torch.finfo(total.dtype).eps
    # the mean of alpha - 1, so that a neutral gate stays exactly 1
    shape = (-1, *[1] * (alpha.dim() - 1))
    excess = envelope.view(shape) * (alpha - 1)
    excess = excess.new_zeros((num_atoms, *alpha.shape[1:])).index_add(0, edges.receivers, excess)
    mean = torch.where(reached.view(shape), excess, 0.0) / torch.where(reached, total, 1.0).view(shape)
    return from_owners(1 + mean, edges.share).index_select(0, edges.senders)


class MARA(SphereGate):
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
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {dropout}")
        grid = equiangular() if grid is None else grid
        super().__init__(num_features, grid, hidden_dim, num_heads, field=field, where=where, gate=gate)
        self.dropout, self.normalize, self.residual = dropout, normalize, residual
        self.Wk_h: nn.Parameter | None = None
        self.p = nn.Parameter(0.5 * torch.randn(grid.num_points, hidden_dim)) if positional else None
        if normalize:
            self.Wk_h = nn.Parameter(nn.init.xavier_uniform_(torch.empty(hidden_dim, num_features)))
            self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(hidden_dim) for _ in range(3))
            # the mean over channels of a normalised value is zero unless channels weigh differently
            nn.init.uniform_(self.norm_v.weight, 0.0, 2.0)
        self._start_gate(frozen_projections)

    def as_written(self, features: Tensor, edges: EdgesOfGate, chosen: Tensor | None = None) -> paper.Written:
        options: dict[str, Any] = {"field_kind": self.field, "gate_kind": self.gate, "residual": self.residual}
        if self.normalize:
            options["norms"] = (self.norm_q, self.norm_k, self.norm_v)
        weights = self._written_weights(p=self.p, Wk_h=self.Wk_h)
        edges = bare(edges, chosen)
        return paper.published(self._scalars(features), edges, self.points, self.weights, weights, **options)

    def pooled(self, features: Tensor, edges: EdgesOfGate) -> Tensor:
        scalars = self._scalars(features)
        if self.normalize:
            return self._pooled_normalized(scalars, edges)
        nodes, value, query = self._node_tables(scalars)
        tables = self._tables()
        pooled = self._attend(edges, nodes, tables) + value.index_select(0, edges.senders)
        if self.residual:  # its mean over directions and channels needs no attention
            mean_field = (factorised.sphere_field(edges.vectors, self.points, self.field) @ self.weights).unsqueeze(1)
            pooled = pooled + query.index_select(0, edges.receivers) + mean_field * self._head_mean(self.W_f)
            mean_p = self._positions().unflatten(1, (self.num_heads, -1)).transpose(0, 1).mean(2)  # [H, K]
            pooled = pooled + mean_p @ self.weights
        return pooled

    def _attend(self, edges: EdgesOfGate, nodes: Tensor, tables: Tensor) -> Tensor:
        """``[E, H]`` pooled attention without the value's node term, by what serves the tensors."""
        dropout = self.dropout if self.training else 0.0
        squared = self.field == "squared"
        given = edges.vectors, nodes, tables
        if not dropout and triton.is_served(edges.vectors, nodes, self.grid.num_points, squared):
            in_order = edges.topology is not None
            return triton.pool_on_sphere(*given, edges.receivers, self.points, squared, in_order)
        if not dropout and backend_for(edges.vectors, nodes.to(edges.vectors.dtype)) == "cpu":
            from steradian.operators.mara import cpu  # needs llvmlite

            rows = Rows(edges.receivers, len(nodes)) if edges.topology is None else edges.topology.by_receiver
            # machine code reads the format of the vectors, whatever the role's products are rounded to
            return cpu.pool_on_sphere(
                edges.vectors, nodes.to(edges.vectors.dtype), tables, rows, self.points, self.field
            )
        return factorised.pool_on_sphere(*given, edges.receivers, self.points, self.field, dropout)

    def _positions(self) -> Tensor:
        """``[K, d]`` p, or zeros without it."""
        return self.W_f.new_zeros((self.grid.num_points, self.hidden_dim)) if self.p is None else self.p

    def _learned_positions(self) -> list[Tensor]:
        return [] if self.p is None else [self.p]

    def _node_tables(self, scalars: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per atom a . u' and a . p ``[N, H, 1 + K]`` in the format of the role; mean value, mean query ``[N, H]``."""
        weights = self.W_h, self.Wk_f, self.Wv_h
        columns = self.folded(
            ("columns", self.low),
            lambda: cast(factorised.node_columns(*weights, self.p, self.num_heads), self.low),
            *weights,
            *self._learned_positions(),
        )
        out = (cast(scalars, self.low) @ columns).unflatten(1, (self.num_heads, -1))
        nodes = out[..., 2:]
        if self.p is None:
            nodes = torch.cat([nodes, out.new_zeros((*out.shape[:2], self.grid.num_points))], dim=2)
        return nodes, out[..., 0].to(scalars.dtype), out[..., 1].to(scalars.dtype)

    def _tables(self) -> Tensor:
        """``[H, 2 + 4 K + K^2]``, see :func:`steradian.operators.mara.factorised.logit_tables`."""
        weights = self.W_f, self.Wk_f, self.Wv_f
        return self.folded(
            "tables",
            lambda: factorised.logit_tables(*weights, self._positions(), self.weights, self.num_heads),
            *weights,
            *self._learned_positions(),
        )

    def _pooled_normalized(self, scalars: Tensor, edges: EdgesOfGate) -> Tensor:
        """Figure 5: LayerNorm couples all channels, so the equations are evaluated as written, block by block."""
        assert self.Wk_h is not None
        of_query, of_key, of_value = (scalars @ weight.T for weight in (self.W_h, self.Wk_h, self.Wv_h))
        field = factorised.sphere_field(edges.vectors, self.points, self.field)
        points, heads = self.grid.num_points, self.num_heads
        block = max(1, factorised.NUMBERS_PER_BLOCK // (points * max(points, self.hidden_dim)))
        pooled = []
        for start in range(0, max(1, len(field)), block):
            part = slice(start, start + block)
            f, i, j = field[part], edges.receivers[part], edges.senders[part]
            query = paper.embedding(of_query[i], f, self.W_f, self.p)
            key = self.norm_k(paper.embedding(of_key[j], f, self.Wk_f, self.p))
            value = self._head_mean(self.norm_v(paper.embedding(of_value[j], f, self.Wv_f, self.p)))  # [e, K, H]
            attention = paper.attention(
                paper.per_head(self.norm_q(query), heads), paper.per_head(key, heads), self.weights
            )
            attention = nn.functional.dropout(attention, self.dropout, self.training)
            output = (attention @ value.transpose(1, 2).unsqueeze(3)).squeeze(3)  # [e, H, K]
            if self.residual:
                output = output + self._head_mean(query).transpose(1, 2)
            pooled.append(output @ self.weights)
        return torch.cat(pooled)


def bare(edges: EdgesOfGate, chosen: Tensor | None) -> BareEdges:
    """Ends and vectors of chosen edges, of all for None."""
    ends = edges.senders, edges.receivers, edges.vectors
    return BareEdges(*(ends if chosen is None else (part[chosen] for part in ends)))


class SEAttention(nn.Module):
    """MARA outside steradian, called as the published module is: gates messages by attention on the sphere.

    Args:
        input_size: F, invariant features per node.
        hidden_size: d, attention channels.
        H, W: latitudes and longitudes of the equiangular grid (poles included).
        options: any further argument of :class:`MARA`; ``gate`` is ``published`` here, so gates lie between 0 and 1
            from a random start.

    Example:
        ``gated, gate = SEAttention(128, 32, H=4, W=8)(features, positions, edge_index, messages)``
    """

    def __init__(self, input_size: int = 128, hidden_size: int = 32, H: int = 4, W: int = 8, **options: Any) -> None:
        super().__init__()
        options.setdefault("gate", "published")
        self.mara = MARA(input_size, equiangular(H, W), hidden_size, **options)

    def forward(
        self,
        features: Tensor,
        positions: Tensor,
        edge_index: Tensor,
        messages: Tensor | None = None,
        shifts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Gated messages ``[E, ...]`` and their gates ``[E]``.

        Args:
            features: ``[N, F]`` invariant node features.
            positions: ``[N, 3]`` positions [Å].
            edge_index: ``[2, E]`` as in PyTorch Geometric: row 0 the sender j, row 1 the receiver i.
            messages: ``[E, ...]`` what to gate; None for the features of the sender, ``[E, F]``.
            shifts: ``[E, 3]`` added to the sender's position [Å], for periodic images.
        """
        senders, receivers = edge_index
        vectors = positions.index_select(0, senders) - positions.index_select(0, receivers)
        if shifts is not None:
            vectors = vectors + shifts
        gate = self.mara(features, BareEdges(senders, receivers, vectors))
        if messages is None:
            messages = features.index_select(0, senders)
        return messages * gate.reshape(-1, *[1] * (messages.dim() - 1)), gate
