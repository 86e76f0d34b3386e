"""Learning rate over a run: warm-up, then constant, halved on a plateau, or a cosine.

The rate is a function of counters that are saved, not of calls that were made, so a resumed run has exactly the rates
of an uninterrupted one.
"""

from __future__ import annotations

import math
from typing import Any

from steradian.config import ScheduleConfig

__all__ = ["LearningRate"]


class LearningRate:
    """The learning rate of every optimiser step.

    * Warm-up: linear from ``base / warmup_steps`` to ``base`` over the first ``warmup_steps`` steps.
    * plateau: times ``factor`` after ``patience`` epochs without a better monitored metric, down to
      ``min_learning_rate``.
    * cosine: ``min + (base - min) (1 + cos(pi t)) / 2``, t from 0 after the warm-up to 1 at the last step
      (Loshchilov and Hutter 2017, equation 5, without restarts).

    Args:
        config: the schedule.
        base: learning rate of the optimiser.
        total_steps: optimiser steps of the whole run (for the cosine).
    """

    def __init__(self, config: ScheduleConfig, base: float, total_steps: int) -> None:
        self.config = config
        self.base = base
        self.total_steps = max(total_steps, 1)
        self.factor = 1.0
        self.best = math.inf
        self.stale_epochs = 0

    def at(self, step: int) -> float:
        """Learning rate of optimiser step ``step``, counted from 0."""
        warmup = self.config.warmup_steps
        if step < warmup:
            return self.base * (step + 1) / warmup
        lowest = min(self.config.min_learning_rate, self.base)
        if self.config.kind == "cosine":
            t = min(1.0, (step - warmup) / max(1, self.total_steps - warmup))
            return lowest + (self.base - lowest) * 0.5 * (1.0 + math.cos(math.pi * t))
        return max(self.base * self.factor, lowest)

    def after_validation(self, value: float, epochs: int) -> bool:
        """Take in the monitored metric after a validation.

        Args:
            value: the metric, smaller is better.
            epochs: epochs since the last validation.

        Returns:
            Whether the learning rate went down.
        """
        if self.config.kind != "plateau":
            return False
        if value < self.best:
            self.best, self.stale_epochs = value, 0
            return False
        self.stale_epochs += epochs
        if self.stale_epochs < self.config.patience or self.base * self.factor <= self.config.min_learning_rate:
            return False
        self.factor *= self.config.factor
        self.stale_epochs = 0
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor, "best": self.best, "stale_epochs": self.stale_epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factor = float(state["factor"])
        self.best = float(state["best"])
        self.stale_epochs = int(state["stale_epochs"])
