"""What the processes of a simulation tell each other: features of copies, and sums over all atoms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steradian.graph.share import Share

__all__ = ["Exchange", "Link", "Widths"]


@dataclass(frozen=True)
class Link:
    """Communication that an engine lends. All processes call the same functions in the same order.

    Attributes:
        forward: of a tensor ``[N, ...]``, whose rows of copies it overwrites with those of their owners.
        reverse: of a tensor ``[N, ...]``, whose rows of copies it adds to their owners' and sets to zero.
        sum: of a tensor, to which it adds those of all other processes.
    """

    forward: Callable[[Tensor], None]
    reverse: Callable[[Tensor], None]
    sum: Callable[[Tensor], None]


@dataclass(frozen=True)
class Exchange(Share):
    """A process's part of a system whose copies know nothing of their neighbours: features travel instead.

    Attributes:
        link: to the other processes; of this step.
    """

    link: Link | None = None
    #: differentiable: without neighbours features depend on no position, but all must take part on the way back
    _token: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))
    _exchanged: list[Tensor] = field(default_factory=list)

    def sum(self, values: Tensor) -> Tensor:
        return self._kept(_Sum.apply(values, self._token, self.link))

    def from_owners(self, values: Tensor) -> Tensor:
        return self._kept(_FromOwners.apply(values, self._token, self.link))

    def _kept(self, values: Tensor) -> Tensor:
        self._exchanged.append(values)
        return values

    def anchored(self, energies: Tensor) -> Tensor:
        # a process whose energies do not depend on what it was told would leave the others waiting on the way back
        for values in self._exchanged:
            energies = energies + values.flatten()[:0].sum().to(energies.dtype)
        return energies


class _FromOwners(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, token: Tensor, link: Link) -> Tensor:
        ctx.link = link
        out = values.detach().contiguous().clone()
        link.forward(out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradient.contiguous().clone()
        ctx.link.reverse(gradient)
        return gradient, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, token: Tensor, link: Link) -> Tensor:
        ctx.link = link
        out = values.detach().contiguous().clone()
        link.sum(out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradient.contiguous().clone()
        ctx.link.sum(gradient)
        return gradient, None, None


@dataclass(frozen=True)
class Widths(Share):
    """Notes what would be exchanged.

    Attributes:
        found: bytes per atom of every exchange so far.
    """

    found: list[int] = field(default_factory=list)

    def sum(self, values: Tensor) -> Tensor:
        return values

    def from_owners(self, values: Tensor) -> Tensor:
        self.found.append(values[:1].numel() * values.element_size())
        return values
