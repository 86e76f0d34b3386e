r"""The channel gate: invariant numbers for paths and channels of every message, exact under rotations and reflections.

With :math:`h^l` the degree-l features of an atom, :math:`Y^l` the harmonics of the edge's direction, b its radial
basis times envelope, d hidden numbers and :math:`A_i^l = \sum_j R(r_{ij}) (W h_j^0) Y^l / \sqrt{\bar n}` the density of
the receiver's neighbours,

.. math::
    x = \frac{W_i h_i^0 + W_j h_j^0}{\sqrt C} + \frac{W_r b(r_{ij})}{\sqrt R}
        + \sum_{l \ge 1} \frac{(h_i^l U_l + h_j^l V_l) \cdot Y^l}{\sqrt{3 (2 l + 1) C}}
        + \sum_{l \ge 1} \frac{(A_i^l T_l) \cdot Y^l}{\sqrt{3 (2 l + 1) d}}

    α_{pk} = g(W_{gate}\, s(W_2\, s(x) / \sqrt d))_{pk}, \qquad s(x) = 1.679\, \mathrm{silu}(x)

and the weight of path p and channel c of the message is multiplied by :math:`α_{pk}`, k = c modulo the number of heads.

:math:`h^l \cdot Y^l` is the signal on the sphere of :mod:`steradian.operators.mara.intrinsic` read at the edge's own
direction: the sharp limit of attention on the sphere. The density gives directions to a first layer, whose features
have none, and higher degrees to the others. ``W_gate`` starts at zero, so alpha is exactly 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from steradian.compiler.activations import silu
from steradian.equivariant.irreps import natural_degrees
from steradian.equivariant.tensor_product import channelwise_polynomial
from steradian.graph.topology import Rows
from steradian.operators.base import AttentionMaps, EdgeGate, EdgesOfGate, SlotSpec
from steradian.operators.mara.gate import mean_at_senders
from steradian.operators.mara.intrinsic import IntrinsicMARA
from steradian.polynomials import Operand, Polynomial, Terms, evaluate
from steradian.precision import WithRole, cast
from steradian.radial import SILU_SECOND_MOMENT

__all__ = ["ACTIVATIONS", "ChannelGate"]

#: Heads of a gate that is not told how many: one vector of float32, so that code reads a gate once for all channels.
MOST_HEADS = 16

#: alpha of z; all are 1 at zero. The last two are positive, the second is bounded by 2, the last by exp(3).
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda z: 1 + z,
    "sigmoid": lambda z: 2 * torch.sigmoid(z),
    "exp": lambda z: torch.exp(3 * torch.tanh(z / 3)),
}


@cache
def sum_polynomial(receiver: tuple[int, ...], sender: tuple[int, ...], radial: bool) -> Polynomial:
    """``x = a_i0 + b_j0 + r + sum_lm (a_i,lm + b_j,lm) Y_lm`` of tables of both atoms whose blocks are these degrees.

    Operands: tables of the receiver and the sender ``[N, B, d]``, harmonics ``[E, (l_max + 1)^2]`` and, with
    ``radial``, ``[Q, 1, d]``. A block of degree 0 is added as it is.
    """
    top = max((*receiver, *sender), default=0)
    operands = [Operand("harmonics", (top + 1) ** 2, False)]
    terms = []
    for name, degrees in (("receiver", receiver), ("sender", sender)):
        if not degrees:
            continue
        operand, places = len(operands), np.cumsum([0] + [2 * degree + 1 for degree in degrees])
        operands.append(Operand(name, int(places[-1])))
        for degree, place in zip(degrees, places):
            component = np.arange(2 * degree + 1)
            columns = np.stack([place + component, degree**2 + component], axis=1)
            columns, factors = (columns, (operand, 0)) if degree else (columns[:, :1], (operand,))
            terms.append(Terms(factors, columns, 0 * component, np.ones(len(component))))
    if radial:
        terms.append(Terms((len(operands),), np.zeros((1, 1), int), np.zeros(1, int), np.ones(1)))
        operands.append(Operand("radial", 1))
    return Polynomial(tuple(operands), Operand("gate input", 1), tuple(terms))


class ChannelGate(WithRole, EdgeGate):
    """See the module; a small network of what both atoms and the edge know.

    Args:
        spec: the slot.
        heads: H; None for as many up to 16 as divide the channels. Channel c belongs to head c modulo H.
        resolution: ``path``: every weight of a message has gates of its own; ``message``: all share them.
        inputs: of ``scalars`` (both atoms' invariants), ``radial``, ``projections`` (features along the edge),
            ``density`` (of the receiver's neighbours: the elements around it, seen in the edge's direction),
            ``sphere`` (pooled attention on the sphere).
        hidden_dim: d.
        activation: g, a name in :data:`ACTIVATIONS`.
        where: ``edge``, or ``node``: all messages of a sender get the mean of its gates, weighted by the envelope.
        frozen_projections: True keeps all but ``W_gate`` at their random start (ablation).
        sphere: the attention whose pooled heads are one of the inputs; None without ``sphere``.

    Raises:
        ValueError: heads that do not share out the channels, or inputs that the slot does not have.
    """

    def __init__(
        self,
        spec: SlotSpec,
        heads: int | None = None,
        inputs: Sequence[str] = ("scalars", "radial", "projections", "density"),
        hidden_dim: int = 32,
        activation: str = "linear",
        where: str = "edge",
        *,
        resolution: str = "path",
        frozen_projections: bool = False,
        sphere: IntrinsicMARA | None = None,
    ) -> None:
        super().__init__()
        channels = spec.num_channels
        self.heads = heads or max(h for h in range(1, MOST_HEADS + 1) if channels % h == 0)
        self.num_weights = spec.num_weights if resolution == "path" else 1
        if channels % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide the {channels} channels of host {spec.host}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not '{activation}'")
        if ("sphere" in inputs) != (sphere is not None):
            raise ValueError("the input 'sphere' and the attention belong together")
        if where not in ("edge", "node"):
            raise ValueError(f"where must be edge or node, not '{where}'")
        if "density" in inputs and spec.l_max < 1:
            raise ValueError(f"the input 'density' needs harmonics of degree 1: give host {spec.host} an l_max of 1")
        self.num_features, self.hidden_dim, self.activation, self.where = channels, hidden_dim, activation, where
        self.unit = spec.unit_weights
        self.further_reach = int(where == "node")  # the mean is one over the sender's neighbours
        self.uses_radial = "radial" in inputs
        self._place_tables(spec, inputs)
        self.W_r = self._weight(spec.num_radial, hidden_dim) if self.uses_radial else None
        self.density = _Density(spec, hidden_dim, self._weight) if "density" in inputs else None
        self.sphere = sphere
        if sphere is not None:
            # its heads are read before its own last step, so it has none to learn
            dead = sphere.W_gate
            del sphere.W_gate
            sphere.register_buffer("W_gate", torch.zeros_like(dead), persistent=False)
            self.rotation, self.grid = sphere.rotation, sphere.grid
        self.W_a = self._weight(sphere.num_heads, hidden_dim) if sphere is not None else None
        self.W_2 = self._weight(hidden_dim, hidden_dim)
        if frozen_projections:
            for parameter in self.parameters():
                parameter.requires_grad_(False)
        self.W_gate = nn.Parameter(torch.zeros(hidden_dim, self.num_weights * self.heads))

    def _place_tables(self, spec: SlotSpec, inputs: Sequence[str]) -> None:
        """What is read of the node features: ``blocks`` of (degree, first component), and a matrix for each."""
        starts = np.cumsum([0] + [2 * degree + 1 for degree, _ in spec.degrees]).tolist()
        self.blocks: list[tuple[int, int]] = [(0, 0)] if "scalars" in inputs else []
        if "projections" in inputs:
            # only what turns and reflects as the harmonics do gives an invariant with them
            self.blocks += [
                (degree, start)
                for (degree, parity), start in zip(spec.degrees, starts)
                if 0 < degree <= spec.l_max and parity == (-1) ** degree
            ]
        # both sides of an edge with one product: W_i beside W_j, U beside V
        self.tables = nn.ParameterList(self._weight(spec.num_channels, 2 * self.hidden_dim) for _ in self.blocks)

    def _weight(self, size_in: int, size_out: int) -> nn.Parameter:
        start = torch.randn(size_in, size_out)
        return nn.Parameter(start if self.unit else start * size_in**-0.5)

    def _scaled(self, weight: Tensor, extra: float = 1.0) -> Tensor:
        scale = extra * (weight.shape[0] ** -0.5 if self.unit else 1.0)
        return weight if scale == 1.0 else weight * scale

    def summary(self) -> str:
        what = f"{self.num_weights} x {self.heads}" if self.num_weights > 1 else str(self.heads)
        return f"channel gate, {what} numbers per message; rotation: {self.rotation}"

    # -------------------------------------------------------------------------------------------------------- forward

    def forward(self, features: Tensor, edges: EdgesOfGate) -> Tensor:
        """alpha of every edge, ``[E, H]``, or ``[E, P, H]`` for every weight of a message.

        Args:
            features: ``[N, D, C]`` node features, invariants first.
            edges: :class:`steradian.graph.Edges` or :class:`steradian.operators.base.BareEdges` with ``radial`` and
                ``harmonics``, where these are inputs.

        Raises:
            ValueError: features of the wrong width, or edges that lack what the gate reads.
        """
        x = self._sum(features, edges)
        gain = SILU_SECOND_MOMENT
        hidden = silu(x) @ self._scaled(self.W_2, gain)
        z = silu(hidden) @ (self.W_gate * (gain * self.hidden_dim**-0.5))
        alpha = ACTIVATIONS[self.activation](z)
        if self.num_weights > 1:
            alpha = alpha.unflatten(1, (self.num_weights, self.heads))
        return alpha if self.where == "edge" else mean_at_senders(alpha, edges, features.shape[0])

    def _sum(self, features: Tensor, edges: EdgesOfGate) -> Tensor:
        """x ``[E, d]``."""
        if features.dim() != 3 or features.shape[-1] != self.num_features:
            raise ValueError(
                f"this gate was built for features [N, D, {self.num_features}], got {list(features.shape)}"
            )
        receiver: dict[int, Tensor] = {}
        sender: dict[int, Tensor] = {}
        for number, (degree, start) in enumerate(self.blocks):
            both = _product(features[:, start : start + 2 * degree + 1], self._matrix(number, degree), self.low)
            for side, part in zip((receiver, sender), both.split(self.hidden_dim, dim=2)):
                side[degree] = side[degree] + part if degree in side else part
        if self.density is not None:
            for degree, part in self.density(features, edges).items():
                receiver[degree] = receiver[degree] + part if degree in receiver else part
        if receiver or sender:
            x = self._along(receiver, sender, edges)
        elif self.uses_radial:
            x = self._radial(edges, of_pairs=False)
        else:  # a first layer, whose features have no direction, with projections alone
            x = features.new_zeros((len(edges.senders), self.hidden_dim))
        if self.sphere is not None and self.W_a is not None:
            x = x + self.sphere.pooled(features, edges) @ self._scaled(self.W_a)
        return x

    def _along(self, receiver: dict[int, Tensor], sender: dict[int, Tensor], edges: EdgesOfGate) -> Tensor:
        """The sum of what both atoms and the edge say, ``[E, d]``, from a table ``[N, 2 l + 1, d]`` per degree."""
        by_receiver, by_sender, pairs = _rows(edges)
        top = max((*receiver, *sender))
        harmonics = edges.harmonics
        if not top:
            harmonics = edges.vectors.new_ones((len(edges.senders), 1))  # not read
        if harmonics is None or harmonics.shape[1] < (top + 1) ** 2:
            raise ValueError(f"the gate reads harmonics up to degree {top}, which these edges do not have")
        given = [harmonics[:, : (top + 1) ** 2]]
        gathers: list[Rows | Tensor | None] = [None]
        for side, rows in ((receiver, by_receiver), (sender, by_sender)):
            if side:
                parts = [side[degree] for degree in sorted(side)]
                given.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
                gathers.append(rows)
        if self.uses_radial:
            given.append(self._radial(edges, pairs is not None).unsqueeze(1))
            gathers.append(pairs)
        polynomial = sum_polynomial(tuple(sorted(receiver)), tuple(sorted(sender)), self.uses_radial)
        return evaluate(polynomial, given, gathers=gathers).squeeze(1)

    def _matrix(self, number: int, degree: int) -> Tensor:
        weight = self.tables[number]
        extra = (3 * (2 * degree + 1)) ** -0.5 if degree else 1.0
        return self.folded((number, self.low), lambda: cast(self._scaled(weight, extra), self.low), weight)

    def _radial(self, edges: EdgesOfGate, of_pairs: bool) -> Tensor:
        """``[Q, d]`` of pairs, or ``[E, d]``."""
        radial = edges.pair_radial if of_pairs else edges.radial  # type: ignore[attr-defined]
        assert self.W_r is not None
        return _read(radial, "radial") @ self._scaled(self.W_r)

    def attention_maps(self, features: Tensor, edges: EdgesOfGate, chosen: Tensor | None = None) -> AttentionMaps:
        if self.sphere is None:
            return super().attention_maps(features, edges, chosen)
        maps = self.sphere.attention_maps(features, edges, chosen)
        return maps._replace(alpha=self(features, edges))


class _Density(nn.Module):
    """``A_i,lm = sum_j R(r_ij) (W h_j^0) Y_lm(r_ij) / sqrt(average number of neighbours)``, and its tables."""

    def __init__(self, spec: SlotSpec, width: int, weight: Callable[[int, int], nn.Parameter]) -> None:
        super().__init__()
        self.l_max = spec.l_max
        # a product of its own: no role of the host's messages is meant for it
        self.polynomial, _ = channelwise_polynomial(natural_degrees(0), self.l_max, natural_degrees(self.l_max)[1:])
        self.degrees = list(range(1, self.l_max + 1))
        self.width, self.scale = width, spec.avg_num_neighbors**-0.5
        self.unit = spec.unit_weights
        self.W_h = weight(spec.num_channels, width)
        self.W_r = weight(spec.num_radial, self.l_max * width)
        self.tables = nn.ParameterList(weight(width, width) for _ in self.degrees)

    def _scaled(self, weight: Tensor, extra: float = 1.0) -> Tensor:
        return weight * (extra * (weight.shape[0] ** -0.5 if self.unit else 1.0))

    def forward(self, features: Tensor, edges: EdgesOfGate) -> dict[int, Tensor]:
        """A table ``[N, 2 l + 1, d]`` for every degree l from 1."""
        by_receiver, by_sender, pairs = _rows(edges)
        scalars = features[:, :1] @ self._scaled(self.W_h, self.scale)
        radial = _read(edges.radial if pairs is None else edges.pair_radial, "radial")  # type: ignore[attr-defined]
        weights = (radial @ self._scaled(self.W_r)).view(len(radial), self.l_max, self.width)
        harmonics = _read(edges.harmonics, "harmonics")[:, : (self.l_max + 1) ** 2]
        gathers: list[Rows | Tensor | None] = [by_sender, None, pairs]
        summed = evaluate(
            self.polynomial, [scalars, harmonics, weights], gathers=gathers, scatter=by_receiver, num_rows=len(features)
        )
        parts = summed.split([2 * degree + 1 for degree in self.degrees], dim=1)
        return {
            degree: part @ self._scaled(table, (3 * (2 * degree + 1)) ** -0.5)
            for part, degree, table in zip(parts, self.degrees, self.tables)
        }


def _read(part: Tensor | None, name: str) -> Tensor:
    if part is None:
        raise ValueError(f"the gate reads edges.{name}, which these edges do not have")
    return part


def _product(block: Tensor, matrix: Tensor, low: torch.dtype | None) -> Tensor:
    """``[N, d, C] @ [C, width]`` as one product of matrices, in the format of the role."""
    rows = cast(block, low).reshape(-1, block.shape[-1])
    return (rows @ matrix).to(block.dtype).view(*block.shape[:-1], matrix.shape[1])


def _rows(edges: EdgesOfGate) -> tuple[Rows | Tensor, Rows | Tensor, Rows | None]:
    """Receivers, senders and pairs as the polynomial wants them."""
    topology = edges.topology
    if topology is None:
        return edges.receivers, edges.senders, None
    pairs = topology.pairs
    return topology.by_receiver, topology.by_sender, None if pairs is None else pairs.rows
