"""Radial bases, envelopes and networks."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steradian.compiler.activations import silu
from steradian.compiler.folding import constant
from steradian.config import RadialConfig
from steradian.polynomials import Operand, Polynomial, Terms, evaluate
from steradian.precision import WithRole

__all__ = [
    "RadialBasis",
    "RadialNetwork",
    "RadialTable",
    "bernstein_basis",
    "cosine_envelope",
    "polynomial_envelope",
    "safe_norm",
    "smooth_envelope",
]

SILU_SECOND_MOMENT = 1.6791767923989418
"""1 / sqrt(E[silu(z)^2]) for a normal z: makes the activation keep unit variance (e3nn's ``normalize2mom``)."""


def safe_norm(vectors: Tensor) -> Tensor:
    """``[E]`` norms of ``[E, 3]``; at zero length the value and all derivatives are zero instead of NaN."""
    squared = vectors.square().sum(-1)
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, torch.ones_like(squared)).sqrt(), 0.0)


def polynomial_envelope(lengths: Tensor, cutoff: float | Tensor, p: int) -> Tensor:
    """Smooth cutoff with value, slope and curvature zero at the cutoff (Gasteiger et al. 2020, equation 8).

    Args:
        lengths: ``[E]`` [Å].
        cutoff: [Å], one for all edges or ``[E]``.
        p: order; a larger one stays near 1 for longer.
    """
    x = lengths / cutoff
    # Horner form of 1 - (p+1)(p+2)/2 x^p + p(p+2) x^(p+1) - p(p+1)/2 x^(p+2)
    value = 1.0 + x.pow(p) * (-0.5 * (p + 1) * (p + 2) + x * (p * (p + 2) - 0.5 * p * (p + 1) * x))
    return torch.where(x < 1.0, value, 0.0)


def smooth_envelope(lengths: Tensor, cutoff: float) -> Tensor:
    """``exp(1 - 1 / (1 - (r / r_c)^2))`` below the cutoff, where all its derivatives are zero."""
    inside = lengths < cutoff
    x = torch.where(inside, lengths / cutoff, 0.0)
    rest = (1.0 - x) * (1.0 + x)
    return torch.where(inside & (rest > 1e-6), torch.exp(1.0 - 1.0 / rest.clamp(min=1e-6)), 0.0)


def cosine_envelope(lengths: Tensor, cutoff: float) -> Tensor:
    """``(1 + cos(pi r / r_c)) / 2`` below the cutoff, where value and slope are zero."""
    return torch.where(lengths < cutoff, 0.5 * (1.0 + torch.cos(lengths * (math.pi / cutoff))), 0.0)


def bernstein_basis(x: Tensor, num: int) -> Tensor:
    """Bernstein polynomials of order ``num - 1``, ``[E] -> [E, num]``: ``C(n, k) x^k (1 - x)^(n - k)``."""
    return _Bernstein.apply(x, num)


class _Bernstein(torch.autograd.Function):
    """The derivative is made of the polynomials of the next lower order, so there are no powers of zero in it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.num = num
        binomials = constant(tuple(math.comb(num - 1, k) for k in range(num)), x.dtype, x.device)
        return _powers(x, num) * _powers(1 - x, num).flip(-1) * binomials

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        (x,) = ctx.saved_tensors
        if ctx.num == 1:
            return torch.zeros_like(x), None
        # b'_k = n (b_{k-1} of order n - 1 - b_k of order n - 1)
        lower = _Bernstein.apply(x, ctx.num - 1)
        return (ctx.num - 1) * ((gradient[..., 1:] - gradient[..., :-1]) * lower).sum(-1), None


def _powers(x: Tensor, num: int) -> Tensor:
    """``[E, num]`` powers 0 .. num - 1 by doubling."""
    out, step = torch.ones_like(x).unsqueeze(-1), x.unsqueeze(-1)
    while out.shape[-1] < num:
        out, step = torch.cat([out, out * step], dim=-1), step * step
    return out[..., :num]


class RadialBasis(nn.Module):
    """Basis functions of the distance, before the envelope: ``[E] -> [E, R]``.

    * ``bessel``: ``sqrt(2 / r_c) sin(n pi r / r_c) / r``, n = 1..R;
    * ``gaussian``: R Gaussians with equidistant centres in [0, r_c] and a width of one spacing;
    * ``chebyshev``: Chebyshev polynomials T_1..T_R of the distance.

    Raises:
        ValueError: trainable Chebyshev polynomials.
    """

    def __init__(self, config: RadialConfig, cutoff: float) -> None:
        super().__init__()
        self.kind, self.num, self.cutoff = config.kind, config.num, cutoff
        if config.kind == "bessel":
            start = torch.arange(1, config.num + 1, dtype=torch.float64) * (math.pi / cutoff)
        elif config.kind == "gaussian":
            start = torch.linspace(0.0, cutoff, config.num, dtype=torch.float64)
        else:
            start = torch.arange(1, config.num + 1, dtype=torch.float64)
            if config.trainable:
                raise ValueError("radial basis 'chebyshev' has nothing to train; set model.host.radial.trainable=false")
        # made in float64 and cast with the whole model, so that a float64 model has all digits
        self.positions: Tensor
        if config.trainable:
            self.positions = nn.Parameter(start)
        else:
            self.register_buffer("positions", start)

    def forward(self, lengths: Tensor) -> Tensor:
        r = lengths.unsqueeze(-1)
        if self.kind == "bessel":
            # w sinc(w r) has the right limit and finite derivatives at r = 0
            return math.sqrt(2.0 / self.cutoff) * self.positions * torch.sinc(r * self.positions / math.pi)
        if self.kind == "gaussian":
            spacing = self.cutoff / max(self.num - 1, 1)
            return torch.exp(-0.5 / spacing**2 * (r - self.positions).square())
        return _chebyshev(lengths, self.num)


def _chebyshev(x: Tensor, num: int) -> Tensor:
    values = [torch.ones_like(x), x]
    for _ in range(num - 1):
        values.append(2.0 * x * values[-1] - values[-2])
    return torch.stack(values[1 : num + 1], dim=-1)


class RadialNetwork(WithRole):
    """Bias-free perceptron from the radial basis to the weights of a tensor product: ``[E, R] -> [E, P, C]``.

    Layers are scaled by 1/sqrt(fan-in) and SiLU to unit second moment: unit-variance weights keep unit variance. The
    last layer is linear, so an edge gate may scale its input instead of its (wider) output.

    A format of its own (:mod:`steradian.precision`) is that of the last product, by far the largest, and of its result,
    which tensor products take as it is. The narrow layers before it would bring most of the error and little speed.

    Args:
        num_radial: R.
        hidden: widths of the hidden layers.
        num_paths, num_channels: P and C of the weights.
        gain: factor on SiLU, where a published model has another one.
    """

    role = "radial"
    takes_int8 = True

    def __init__(
        self,
        num_radial: int,
        hidden: Sequence[int],
        num_paths: int,
        num_channels: int,
        gain: float = SILU_SECOND_MOMENT,
    ) -> None:
        super().__init__()
        self.gain = gain
        widths = [num_radial, *hidden, num_paths * num_channels]
        self.num_paths, self.num_channels = num_paths, num_channels
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(a, b)) for a, b in itertools.pairwise(widths))
        self.table: RadialTable | None = None

    def forward(self, radial: Tensor, gate: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """Weights ``[E, P, C]`` from the basis times envelope ``[E, R]``, each edge's times its gate ``[E]``.

        With a table (:meth:`tabulate`) and lengths ``[E]`` [Å] the weights are interpolated instead.
        """
        if self.table is not None and lengths is not None:
            return self.table(lengths, gate)
        x = radial  # constants go into the weights, which are smaller than what they multiply
        *hidden, last = self.weights
        scale = hidden[0].shape[0] ** -0.5 if hidden else last.shape[0] ** -0.5
        for place, weight in enumerate(hidden):
            x = silu(x @ (weight * scale) if self.int8 is None else self.multiply(x, weight, scale, place))
            scale = self.gain * weight.shape[1] ** -0.5
        if gate is not None:
            x = x * gate.unsqueeze(-1)
        return self.multiply(x, last, scale, len(hidden)).view(-1, self.num_paths, self.num_channels)

    def tabulate(self, radial_of: Callable[[Tensor], Tensor], cutoff: float, num_intervals: int) -> float:
        """From now on interpolate the weights, which depend on nothing but the distance (until :meth:`train`).

        Args:
            radial_of: ``[M]`` lengths to ``[M, R]`` basis times envelope, in float64.
            cutoff: [Å]; beyond it the weights are zero.
            num_intervals: of the table; the error of a weight falls with the fourth power of their width.

        Returns:
            Largest error of a weight half way between knots, relative to the largest weight.
        """
        exact = copy.deepcopy(self).double()
        exact.table = exact.low = exact.int8 = None

        def weights(lengths: Tensor) -> Tensor:
            return exact(radial_of(lengths)).detach()

        like = self.weights[0]
        knots = torch.linspace(0.0, cutoff, num_intervals + 1, dtype=torch.float64, device=like.device)
        width = cutoff / num_intervals
        # five-point differences with a step of an eighth: the first knot has one side only
        step = width / 8
        sides = [weights((knots + factor * step).abs()) for factor in (-2, -1, 1, 2)]
        slopes = (sides[0] - 8 * sides[1] + 8 * sides[2] - sides[3]) / (12 * step)
        ahead = [weights(knots[:1] + factor * step)[0] for factor in range(5)]
        slopes[0] = sum(c * value for c, value in zip((-25, 48, -36, 16, -3), ahead)) / (12 * step)  # one-sided
        self.table = RadialTable(weights(knots), slopes, width, like.dtype)
        middles = knots[:-1] + 0.5 * width
        truth = weights(middles)
        return float((self.table(middles.to(like.dtype)).double() - truth).abs().max() / truth.abs().max())

    def train(self, mode: bool = True) -> RadialNetwork:
        """Training changes the weights, so it drops the table."""
        if mode:
            self.table = None
        return super().train(mode)


class RadialTable:
    """Radial weights by cubic Hermite interpolation: values and slopes are continuous (so forces are).

    Args:
        values, slopes: ``[M + 1, P, C]`` at equidistant knots from zero to the cutoff.
        width: of an interval [Å].
        dtype: to compute in.
    """

    def __init__(self, values: Tensor, slopes: Tensor, width: float, dtype: torch.dtype) -> None:
        low, high = values[:-1], values[1:]
        slope_low, slope_high = width * slopes[:-1], width * slopes[1:]
        rise = high - low
        powers = [low, slope_low, 3 * rise - 2 * slope_low - slope_high, slope_low + slope_high - 2 * rise]
        table = torch.cat(powers, dim=1)  # [M, 4 P, C]
        # one more interval of zeros, for edges beyond the cutoff
        self.table = torch.cat([table, torch.zeros_like(table[:1])]).to(dtype).contiguous()
        self.width = width
        self.polynomial = _interpolation(values.shape[1])

    def __call__(self, lengths: Tensor, gate: Tensor | None = None) -> Tensor:
        position = lengths / self.width
        interval = position.detach().floor().clamp(max=self.table.shape[0] - 1).long()
        t = position - interval
        square = t * t
        powers = torch.stack([torch.ones_like(t), t, square, square * t], dim=1)
        if gate is not None:
            powers = powers * gate.unsqueeze(1)
        return evaluate(self.polynomial, [self.table, powers], gathers=[interval, None], locality=interval)


@cache
def _interpolation(num_paths: int) -> Polynomial:
    """``w_p = sum_k t^k table_kp``."""
    order, path = np.divmod(np.arange(4 * num_paths), num_paths)
    terms = Terms((0, 1), np.stack([np.arange(4 * num_paths), order], axis=1), path, np.ones(4 * num_paths))
    operands = (Operand("table", 4 * num_paths), Operand("powers", 4, has_channels=False))
    return Polynomial(operands, Operand("weights", num_paths), (terms,))
