"""MARA outside steradian: the call of the published module, for anybody's model."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from steradian.operators.mara.mara import MARA
from steradian.sphere.grids import equiangular

__all__ = ["SEAttention"]


class _Pairs(NamedTuple):
    senders: Tensor
    receivers: Tensor
    vectors: Tensor


class SEAttention(nn.Module):
    """Gate messages by attention on the sphere, called as the published module is.

    Args:
        input_size: F, invariant features per node.
        hidden_size: d, attention channels.
        H, W: latitudes and longitudes of the equiangular grid (poles included).
        options: any further argument of :class:`steradian.operators.mara.mara.MARA`; ``gate`` is ``published`` here, so
            gates lie between 0 and 1 from a random start.

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
        gate = self.mara(features, _Pairs(senders, receivers, vectors))
        if messages is None:
            messages = features.index_select(0, senders)
        return messages * gate.reshape(-1, *[1] * (messages.dim() - 1)), gate
