"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MovingAverage"]


class MovingAverage:
    """Moving average of parameters, ``a <- d a + (1 - d) p`` after every optimiser step.

    The decay starts low, ``d = min(decay, (1 + n) / (10 + n))`` at update n, so that the random weights of the start
    are soon forgotten.

    Args:
        parameters: the parameters to follow; kept by reference.
        decay: d, between 0 and 1.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.num_updates = 0
        self.averages = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights."""
        self._follow_device()
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self.averages, [parameter.detach() for parameter in self.parameters], 1.0 - decay)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Put the averages into the model inside a ``with`` block; the weights come back to the last bit."""
        self._follow_device()
        kept = [parameter.detach().clone() for parameter in self.parameters]
        self._write(self.averages)
        try:
            yield
        finally:
            self._write(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates, "averages": [average.clone() for average in self.averages]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: the state belongs to another model.
        """
        shapes = [tuple(average.shape) for average in self.averages]
        if [tuple(average.shape) for average in state["averages"]] != shapes:
            raise ValueError("the moving average belongs to a model of another shape")
        self.num_updates = int(state["num_updates"])
        for average, saved in zip(self.averages, state["averages"]):
            average.copy_(saved)

    def _follow_device(self) -> None:
        if self.parameters and self.averages[0].device != self.parameters[0].device:
            self.averages = [average.to(parameter.device) for average, parameter in self.pairs()]

    def pairs(self) -> Iterator[tuple[Tensor, nn.Parameter]]:
        """(average, parameter) pairs."""
        return zip(self.averages, self.parameters)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values):
            parameter.copy_(value)
