"""Layers on features ``[N, D, C]`` as networks with one weight matrix per irrep and gated activations use them.

The building blocks of Unke and Maennel 2024 (arXiv:2401.07595): unscaled weights, a bias on the scalars, and
activations that multiply all components of a channel by a gate computed from the channel's own scalar.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from steradian.equivariant.irreps import Degrees, dim
from steradian.equivariant.linear import _per_irrep
from steradian.precision import WithRole, cast

__all__ = ["MLP", "Activation", "Dense", "add_features", "change_degrees", "gated", "lecun_normal", "union"]

Activation = Literal["identity", "silu", "gelu"]


def lecun_normal(shape: tuple[int, ...], fan_in: int) -> Tensor:
    """Normal numbers of variance 1 / fan_in, none beyond two standard deviations (of the uncut distribution)."""
    # 0.8796...: standard deviation of a normal distribution cut at two
    scale = fan_in**-0.5 / 0.87962566103423978
    return nn.init.trunc_normal_(torch.empty(shape), std=scale, a=-2 * scale, b=2 * scale)


def gated(features: Tensor, activation: Activation) -> Tensor:
    """Features ``[N, D, C]`` times a gate from each channel's scalar (component 0): silu, gelu (tanh form) or none."""
    if activation == "identity":
        return features
    scalars = features[:, :1]
    if activation == "silu":
        gate = torch.sigmoid(scalars)
    else:
        gate = 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (scalars + 0.044715 * scalars.pow(3))))
    return gate * features


def change_degrees(features: Tensor, before: Degrees, after: Degrees) -> Tensor:
    """Features with the irreps ``after``: some are dropped, missing ones are zero. ``[N, D, C] -> [N, D', C]``."""
    if before == after:
        return features
    blocks = dict(zip(before, features.split([2 * degree + 1 for degree, _ in before], dim=1)))
    if all(irrep in blocks for irrep in after):
        kept = [blocks[irrep] for irrep in after]
    else:
        empty = features.new_zeros((features.shape[0], 1, features.shape[2]))
        kept = [blocks[i] if i in blocks else empty.expand(-1, 2 * i[0] + 1, -1) for i in after]
    return kept[0] if len(kept) == 1 else torch.cat(kept, dim=1)


def union(one: Degrees, other: Degrees) -> Degrees:
    """The irreps of a sum: those of both, up to the higher degree, and of both parities where either has both."""
    both = set(one) | set(other)
    return tuple(sorted(both, key=lambda irrep: _position(irrep, _is_natural(both))))


def _is_natural(degrees: set[tuple[int, int]]) -> bool:
    return all(parity == (-1) ** degree for degree, parity in degrees)


def _position(irrep: tuple[int, int], natural: bool) -> tuple[int, int]:
    """Natural lists run over the degree; lists with both parities have the even irreps first."""
    return (0, irrep[0]) if natural else (-irrep[1], irrep[0])


def add_features(one: Tensor, degrees_one: Degrees, other: Tensor, degrees_other: Degrees) -> tuple[Tensor, Degrees]:
    """Sum of features with different irreps; missing ones count as zero."""
    degrees = union(degrees_one, degrees_other)
    return change_degrees(one, degrees_one, degrees) + change_degrees(other, degrees_other, degrees), degrees


class Dense(WithRole):
    """One matrix per irrep and a bias on the scalars: ``[N, D, C_in] -> [N, D, C_out]``.

    Args:
        degrees: irreps; the bias goes to the first one, which must be 0e.
        channels_in, channels_out: C.
        bias: whether there is a bias.
        zero: start from zero weights instead of lecun-normal ones.
        unit: keep weights of unit variance and scale them by 1/sqrt(C_in) where they are used.

    Raises:
        ValueError: the first irrep is not 0e, but there is a bias.
    """

    def __init__(
        self,
        degrees: Degrees,
        channels_in: int,
        channels_out: int,
        *,
        bias: bool = True,
        zero: bool = False,
        unit: bool = False,
    ) -> None:
        super().__init__()
        if bias and degrees[0] != (0, 1):
            raise ValueError("a bias needs scalars: the first irrep must be 0e")
        self.degrees, self.dim = degrees, dim(degrees)
        shape = (len(degrees), channels_in, channels_out)
        self.scale = channels_in**-0.5 if unit else 1.0
        self.weight = nn.Parameter(torch.zeros(shape) if zero else lecun_normal(shape, 1 if unit else channels_in))
        self.bias = nn.Parameter(torch.zeros(channels_out)) if bias else None

    def forward(self, features: Tensor) -> Tensor:
        weight: Tensor = self.weight
        if self.scale != 1.0 or self.low is not None:
            weight = self.folded(self.low, lambda: cast(self.weight * self.scale, self.low), weight)
        out = _per_irrep(cast(features, self.low), self.degrees, weight).to(features.dtype)
        if self.bias is None:
            return out
        if self.dim == 1:
            return out + self.bias
        return torch.cat([out[:, :1] + self.bias, out[:, 1:]], dim=1)


class MLP(nn.Module):
    """Dense, gated silu, Dense; ``zero``: the last one starts from zero, so the MLP gives zero at first."""

    def __init__(self, degrees: Degrees, num_channels: int, *, zero: bool = False, unit: bool = False) -> None:
        super().__init__()
        self.first = Dense(degrees, num_channels, num_channels, unit=unit)
        self.last = Dense(degrees, num_channels, num_channels, zero=zero, unit=unit)

    def forward(self, features: Tensor) -> Tensor:
        return self.last(gated(self.first(features), "silu"))
