"""Atoms of one system spread over processes: which ones a process answers for, and sums over all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Share", "sum_over_processes"]


@dataclass(frozen=True)
class Share:
    """A process's part of a system.

    Attributes:
        owned: ``[N]`` bool, the atoms it answers for. The others are copies that only serve as neighbours.
        group: the processes; None for all.
    """

    owned: Tensor
    group: Any = None

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, differentiable."""
        return sum_over_processes(values, self.group)


def sum_over_processes(values: Tensor, group: Any = None) -> Tensor:
    """Sum of a tensor over the processes of a group; all of them must call it, in the same order.

    Every process's result depends on every process's tensor, so the derivative is summed too (and not again: one
    derivative only).
    """
    return _Sum.apply(values, group)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = values.contiguous().clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None
