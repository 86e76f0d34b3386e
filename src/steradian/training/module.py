"""The potential in Lightning's hands: one training step, one validation step, one optimiser step."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from steradian.config import TrainingConfig
from steradian.evaluation.metrics import ErrorAccumulator
from steradian.graph import Prediction
from steradian.potential import Potential
from steradian.training.ema import MovingAverage
from steradian.training.late import LateValues
from steradian.training.loaders import Batch, TrainingData
from steradian.training.losses import Loss, labels_in_use
from steradian.training.optimizers import make_optimizer
from steradian.training.pipeline import Pipeline, make_pipeline, uses_pipeline
from steradian.training.progressive import order_at, set_order
from steradian.training.scaling import LossScale
from steradian.training.schedules import LearningRate

__all__ = ["DivergenceError", "TrainingModule"]


class DivergenceError(ValueError):
    """A loss or a gradient that is not finite; the message names the frames of the batch."""


class TrainingModule(pl.LightningModule):
    """Trains a potential on energies, forces and stresses.

    Args:
        potential: called as ``potential(graph, forces=..., stress=...)``.
        config: the training section.
        total_steps: optimiser steps of the whole run, for the cosine schedule.
        name_frames: words for the frames of a batch, for messages.
        data: of the run, where steps may be prepared (:mod:`steradian.training.pipeline`).

    Attributes:
        step: optimiser steps so far, over all sessions.
        scale: of the loss, where products are float16.
        losses: sum of the batch losses since it was last set to zero, float64 ``[]``, on the device.
        metrics: figures of the last validation, named ``validation/...``.
    """

    potential: Potential

    def __init__(
        self,
        potential: Potential,
        config: TrainingConfig,
        total_steps: int,
        name_frames: Callable[[Batch], str] = lambda batch: f"training frames {batch.frames}",
        data: TrainingData | None = None,
    ) -> None:
        super().__init__()
        self.data = data
        self.pipeline: Pipeline | None = None
        self.name_frames = name_frames
        self.potential = potential
        self.config = config
        self.loss = Loss(config.loss)
        self.labels = labels_in_use(config.loss)
        self.ema = None if config.ema_decay is None else MovingAverage(potential.parameters(), config.ema_decay)
        self.learning_rate = LearningRate(config.schedule, config.optimizer.learning_rate, total_steps)
        self.errors = ErrorAccumulator()
        self.metrics: dict[str, float] = {}
        self.step = 0
        self.losses = torch.zeros((), dtype=torch.float64)
        self.scale = LossScale(potential)
        self._watched: LateValues[tuple[str, int, Batch]] = LateValues()
        self._batch: Batch | None = None
        self._averaged = ExitStack()

    def predict_batch(self, batch: Batch) -> Prediction:
        """Prediction with the derivatives that the loss needs."""
        prediction: Prediction = self.potential(
            batch.graph, forces="forces" in self.labels, stress="stress" in self.labels
        )
        return prediction

    def on_fit_start(self) -> None:
        if self.data is not None and uses_pipeline(self.config, self.device):
            self.pipeline = make_pipeline(self.potential, self.config, self.data)
            self.data.on_device = "named" if self.pipeline.on_device else self.device

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.pipeline is not None:
            scale = self.scale.scaled(torch.ones((), device=self.device)) if self.scale.active else None
            ready, loss = self.pipeline.loss(batch, scale)
        else:
            assert batch.graph is not None
            loss = self.loss(self.predict_batch(batch), batch.graph).total
            ready = self.scale.scaled(loss)
        self._batch = batch
        self._watch("the loss", loss.detach(), batch)
        self.losses = self.losses.to(loss.device) + loss.detach()
        return ready

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with self.potential.policy.matrix_units():
            super().backward(loss, *args, **kwargs)

    def on_train_epoch_start(self) -> None:
        if self.config.progressive_correlation is not None:
            set_order(self.potential.host, order_at(self.current_epoch, self.config.progressive_correlation))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.potential, self.config.optimizer)

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        assert self._batch is not None
        try:
            if not self.scale.take_back(optimizer):
                return  # the step is left out
        except FloatingPointError as error:
            raise DivergenceError(f"{error} at step {self.step + 1}, in {self.name_frames(self._batch)}") from None
        parameters = [parameter for parameter in self.potential.parameters() if parameter.grad is not None]
        largest = self.config.optimizer.clip_norm
        if largest is None:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        else:
            norm = torch.nn.utils.clip_grad_norm_(parameters, largest, foreach=True)
        self._watch("the gradient", norm.detach(), self._batch)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        rate = self.learning_rate.at(self.step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step(closure=optimizer_closure)
        self.step += 1
        if self.ema is not None:
            self.ema.update()

    def _watch(self, what: str, value: Tensor, batch: Batch) -> None:
        """Remember a value that must be finite; on a GPU it is looked at when it has arrived, so that nothing waits."""
        self._watched.add(value, (what, self.step + 1, batch))
        self.check_finite(wait=False)

    def check_finite(self, wait: bool = True) -> None:
        """Look at the values of past steps; of all of them, or of those that are known.

        Raises:
            DivergenceError: one is not finite.
        """
        for value, (what, step, batch) in self._watched.arrived(wait):
            if not math.isfinite(value):
                self._watched.clear()
                raise DivergenceError(f"{what} is {value} at step {step}, in {self.name_frames(batch)}")

    def on_validation_epoch_start(self) -> None:
        self.errors.reset()
        if self.ema is not None:
            self._averaged.enter_context(self.ema.averaged_weights())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if self.pipeline is not None and self.data is not None:
            prediction, labels = self.pipeline.predict(batch)
            if batch.counts:
                frames = [self.data.validation.structures[frame] for frame in batch.frames]
                counts = np.array([len(frame) for frame in frames], dtype=np.int64)
                self.errors.add(prediction, labels, counts, [frame.config_type for frame in frames])
            return
        assert batch.graph is not None
        with torch.enable_grad():
            prediction = self.predict_batch(batch)
        if batch.counts:
            self.errors.update(prediction, batch.graph)

    def on_validation_epoch_end(self) -> None:
        errors = self.errors
        if self.trainer.world_size > 1:
            states: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(states, errors.state())
            errors = ErrorAccumulator.from_states(states)
        self.metrics = errors.compute("validation/")

    def on_validation_end(self) -> None:
        # Lightning calls callbacks before the module, so they still see the averaged weights.
        self._averaged.close()
