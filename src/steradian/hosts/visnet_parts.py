"""Modules of ViSNet that know nothing of edges: its radial basis, the norm of its vectors, the scale of its sums."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from steradian.config import ViSNetConfig
from steradian.hosts.base import message_divisor
from steradian.radial import safe_norm

__all__ = ["ExpNormalBasis", "Rescale", "VectorNorm"]


class ExpNormalBasis(nn.Module):
    """``c(r) exp(-beta_n (exp(-5 r / r_c) - mu_n)^2)``, ``[E] -> [E, R]`` (Unke and Meuwly 2019, equation 7).

    Args:
        num: R.
        cutoff: r_c [Å].
        trainable: learn mu and beta.
    """

    def __init__(self, num: int, cutoff: float, trainable: bool) -> None:
        super().__init__()
        self.cutoff = cutoff
        start = math.exp(-cutoff)  # as published; the exponential at the cutoff is exp(-5)
        means = torch.linspace(start, 1.0, num, dtype=torch.float64)
        betas = torch.full((num,), (2.0 / num * (1.0 - start)) ** -2, dtype=torch.float64)
        self.means: Tensor
        self.betas: Tensor
        for name, value in (("means", means), ("betas", betas)):
            if trainable:
                setattr(self, name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def forward(self, lengths: Tensor, envelope: Tensor) -> Tensor:
        shape = torch.exp(-5.0 / self.cutoff * lengths).unsqueeze(-1) - self.means
        return envelope.unsqueeze(-1) * torch.exp(-self.betas * shape.square())


class Rescale(nn.Module):
    """Divides a sum over rows as ``config.message_scale`` says; nothing is done, or learned, where it is 1.

    Args:
        config: of the host.
        num_rows: how many rows the average atom sums over.
    """

    def __init__(self, config: ViSNetConfig, num_rows: float) -> None:
        super().__init__()
        self.factor = 1.0 / message_divisor(config.message_scale, num_rows)
        self.gain = nn.Parameter(torch.ones(())) if config.message_scale == "learned" else None

    def forward(self, summed: Tensor) -> Tensor:
        if self.factor != 1.0:
            summed = summed * self.factor
        return summed if self.gain is None else summed * self.gain


class VectorNorm(nn.Module):
    """Scales vectors ``[N, size, C]`` channel by channel, after the published ``max_min`` rescaling of their lengths.

    With ``max_min`` the lengths of the channels of one degree and atom are mapped to [0, 1]; that has kinks where the
    longest or shortest channel changes.
    """

    def __init__(self, num_channels: int, l_max: int, kind: str | None, trainable: bool) -> None:
        super().__init__()
        self.kind = kind
        self.sizes = [2 * degree + 1 for degree in range(1, l_max + 1)]
        self.weight: Tensor | None = None
        if trainable:
            self.weight = nn.Parameter(torch.ones(num_channels))

    def forward(self, vectors: Tensor) -> Tensor:
        if self.kind == "max_min":
            vectors = torch.cat([self._rescaled(part) for part in vectors.split(self.sizes, dim=1)], dim=1)
        return vectors if self.weight is None else vectors * self.weight

    @staticmethod
    def _rescaled(vectors: Tensor) -> Tensor:
        lengths = safe_norm(vectors.transpose(1, 2)).clamp(min=1e-12)  # [N, C]
        low, high = lengths.amin(1, keepdim=True), lengths.amax(1, keepdim=True)
        spread = torch.where(high == low, 1.0, high - low)
        return ((lengths - low) / spread / lengths).unsqueeze(1) * vectors
