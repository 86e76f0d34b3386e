"""SiLU with cheap second derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["silu"]


def silu(x: Tensor) -> Tensor:
    """``x sigmoid(x)``, differentiable to any order.

    Training on forces differentiates twice. PyTorch then writes the first derivative as a chain of elementary steps and
    differentiates each of them, some eighteen passes over memory; here the second derivative is one formula.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return torch.nn.functional.silu(x)
    return _SiLU.apply(x)


class _SiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.nn.functional.silu(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _Slope.apply(x, cotangent)


class _Slope(torch.autograd.Function):
    """``c silu'(x)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cotangent: Tensor) -> Tensor:
        ctx.save_for_backward(x, cotangent)
        return torch.ops.aten.silu_backward(cotangent, x)

    @staticmethod
    def backward(ctx: Any, second: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, cotangent = ctx.saved_tensors
        along_x = along_cotangent = None
        if ctx.needs_input_grad[0]:
            along_x = _curvature(x, second * cotangent)
        if ctx.needs_input_grad[1]:
            along_cotangent = _Slope.apply(x, second)
        return along_x, along_cotangent


def _curvature(x: Tensor, factor: Tensor) -> Tensor:
    """``factor silu''(x)`` with ``silu'' = s (1 - s) (2 + x (1 - 2 s))``, s the sigmoid."""
    s = torch.sigmoid(x)
    if torch.is_grad_enabled():  # a third derivative is wanted: nothing in place
        return factor * s * (1 - s) * (2 + x * (1 - 2 * s))
    bend = torch.mul(x, s).mul_(-2).add_(x).add_(2).mul_(factor)
    return torch.ops.aten.sigmoid_backward(bend, s)
