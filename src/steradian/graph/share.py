"""One process's part of a system that is spread over several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Share", "from_owners", "sum_over_processes"]


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

    def from_owners(self, values: Tensor) -> Tensor:
        """Values of atoms ``[N, ...]`` with those of copies as their owners have them, differentiable.

        As they are here: a process lists the surroundings of its atoms so far out that what it finds for the copies
        that matter is what their owners find.
        """
        return values

    def anchored(self, energies: Tensor) -> Tensor:
        """The same energies ``[N]``, whose derivative passes through everything that was exchanged."""
        return energies


def from_owners(values: Tensor, share: Share | None) -> Tensor:
    """Sums over neighbours ``[N, ...]`` before neighbours see them: what owners have, where a system is shared."""
    return values if share is None else share.from_owners(values)


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
        # summed in place, and autograd must find the input as it was. Processes are matched by the order of their calls
        # alone: one that leaves a sum out makes the others wait for ever, or adds to another sum
        out = values.contiguous().clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # the energy is the sum of all processes' energies, and each of them depends on this sum: what it gets back is
        # the sum of all their cotangents
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None
