"""The training loop: step, accumulate, scale, clip, average, validate, save, resume; alone or shared by processes."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from steradian.build import save_potential
from steradian.config import TrainingConfig
from steradian.evaluation.metrics import ErrorAccumulator
from steradian.graph import Prediction
from steradian.potential import Potential
from steradian.training.feeding import Batch, TrainingData, make_pipeline, uses_pipeline
from steradian.training.machine import AsynchronousValues, Process, StopRequest
from steradian.training.optimisation import (
    LearningRate,
    Loss,
    LossScale,
    MovingAverage,
    labels_in_use,
    make_optimizer,
    order_at,
    set_order,
)
from steradian.training.record import Position, RunDirectory, on_cpu, random_state, restore_random_state, write_state
from steradian.training.report import Reporter

__all__ = ["DivergenceError", "Loop", "Reason", "Steps"]

SHORTEST_SAVE_INTERVAL_S = 20.0  # a state costs a flush to the disk, epochs of small runs take less than a second
AGREE_EVERY = 10  # steps between two questions to the other processes on a GPU, where asking waits for the device
NOTHING, SAVE, TIME_IS_UP, SIGNAL = range(4)  # what is due between two steps, in rising order of importance

Reason = Literal["finished", "early_stopping", "interrupted", "time_limit"]
STOPS: dict[int, Reason] = {TIME_IS_UP: "time_limit", SIGNAL: "interrupted"}
Row = dict[str, float | int]


class DivergenceError(ValueError):
    """A loss or a gradient that is not finite; the message names the frames of the batch."""


class Steps:
    """The steps of one process: gradients of batches, optimiser steps, validation.

    Args:
        potential: moved to the device, and trained.
        config: the training section.
        data: the batches of this process.
        total_steps: optimiser steps of the whole run, for the cosine schedule.
        process: this one.
        device: where steps are computed.

    Attributes:
        step: optimiser steps so far, over all sessions.
        losses: sum of the batch losses since it was last set to zero, float64 ``[]``, on the device.
    """

    def __init__(
        self,
        potential: Potential,
        config: TrainingConfig,
        data: TrainingData,
        total_steps: int,
        process: Process,
        device: torch.device,
    ) -> None:
        self.potential = potential.to(device).train()
        process.join(device)
        process.share_weights(potential)
        self.config = config
        self.data = data
        self.process = process
        self.device = device
        self.loss = Loss(config.loss)
        self.labels = labels_in_use(config.loss)
        self.optimizer = make_optimizer(potential, config.optimizer)
        self.learning_rate = LearningRate(config.schedule, config.optimizer.learning_rate, total_steps)
        self.scale = LossScale(potential)
        self.ema = None if config.ema_decay is None else MovingAverage(potential.parameters(), config.ema_decay)
        self.step = 0
        self.losses = torch.zeros((), dtype=torch.float64, device=device)
        self._watched: AsynchronousValues[tuple[str, int, Batch]] = AsynchronousValues()
        self.pipeline = None
        if uses_pipeline(config, device):
            self.pipeline = make_pipeline(potential, config, data)
            data.on_device = "named" if self.pipeline.on_device else device

    # ------------------------------------------------------------------------------------------------------- one step

    def accumulate(self, batch: Batch, first: bool = True) -> None:
        """Add the gradients of a batch; ``first`` forgets those of the last step."""
        ready, loss = self.loss_of(batch)
        self._watch("the loss", loss, batch)
        self.losses = self.losses + loss
        if first:
            self.optimizer.zero_grad()
        with self.potential.policy.matrix_units():
            # also where an epoch ends with fewer batches: every batch weighs the same
            (ready / self.config.optimizer.accumulate).backward()

    def loss_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The (scaled) loss of a batch, ready for ``backward``, and its value."""
        if self.pipeline is not None:
            scale = self.scale.scaled(torch.ones((), device=self.device)) if self.scale.active else None
            ready, loss = self.pipeline.loss(batch, scale)
            return ready, loss.detach()
        assert batch.graph is not None
        loss = self.loss(self.predict(batch), batch.graph).total
        return self.scale.scaled(loss), loss.detach()

    def take(self, batch: Batch) -> None:
        """One optimiser step from the gradients so far; ``batch`` is the last of them.

        The order matters: gradients are averaged over the processes, freed of the loss's scale, then clipped, so that
        the norm is that of the whole batch in every process.

        Raises:
            DivergenceError: a gradient or an earlier loss is not finite.
        """
        self.process.average_gradients(list(self.potential.parameters()))
        try:
            is_good = self.scale.take_back(self.optimizer)
        except FloatingPointError as error:
            raise DivergenceError(f"{error} at step {self.step + 1}, in {self.data.name_frames(batch)}") from None
        if is_good:  # else the gradients are gone, and the optimiser leaves all weights as they are
            self._watch("the gradient", self._clipped(), batch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate.at(self.step)
        self.optimizer.step()
        self.step += 1
        if self.ema is not None:
            self.ema.update()

    def _clipped(self) -> Tensor:
        """Norm of all gradients ``[]`` before they are scaled down to the largest norm that is allowed."""
        gradients = [weight.grad for weight in self.potential.parameters() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if self.config.optimizer.clip_norm is not None:
            weights = [weight for weight in self.potential.parameters() if weight.grad is not None]
            torch.nn.utils.clip_grads_with_norm_(weights, self.config.optimizer.clip_norm, norm, foreach=True)
        return norm.detach()

    def _watch(self, what: str, value: Tensor, batch: Batch) -> None:
        """Note a value that must be finite; on a GPU it is looked at when it has arrived, so that nothing waits."""
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
                raise DivergenceError(f"{what} is {value} at step {step}, in {self.data.name_frames(batch)}")

    def rehearse(self) -> None:
        """The gradients of one training batch and the errors of one validation batch, and no trace of them.

        What cannot work is found here, before a run has written anything.

        Raises:
            DivergenceError: the loss is not finite.
        """
        generators = random_state()
        with closing(self.data.training_batches(0)) as batches:
            self.accumulate(next(batches))
        self.optimizer.zero_grad()
        self.check_finite()
        self.validate(1)
        self.losses = torch.zeros_like(self.losses)
        restore_random_state(generators)

    # ----------------------------------------------------------------------------------------------------- validation

    def predict(self, batch: Batch) -> Prediction:
        """Prediction with the derivatives that the loss needs."""
        found: Prediction = self.potential(batch.graph, forces="forces" in self.labels, stress="stress" in self.labels)
        return found

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Inside a ``with`` block the model has the averaged weights, where there is an average."""
        return nullcontext() if self.ema is None else self.ema.averaged_weights()

    def validate(self, most: int | None = None) -> dict[str, float]:
        """Figures over all validation frames, those of the other processes included; over ``most`` batches if given."""
        errors = ErrorAccumulator()
        self.potential.eval()
        with closing(self.data.validation_batches()) as batches:
            for batch in islice(batches, most):
                self._add_errors(errors, batch)
        self.potential.train()
        # all errors, not figures, are gathered: a 99 % quantile of all frames is no mean of the processes' quantiles
        return ErrorAccumulator.from_states(self.process.gathered(errors.state())).compute("validation/")

    def _add_errors(self, errors: ErrorAccumulator, batch: Batch) -> None:
        if self.pipeline is None:
            assert batch.graph is not None
            errors.update(self.predict(batch), batch.graph)
            return
        with torch.no_grad():
            prediction, labels = self.pipeline.predict(batch)
        frames = [self.data.validation.structures[frame] for frame in batch.frames]
        counts = np.array([len(frame) for frame in frames], dtype=np.int64)
        errors.add(prediction, labels, counts, [frame.config_type for frame in frames])

    # ---------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything that steps depend on and all processes share, on the CPU."""
        return {
            "weights": on_cpu(self.potential.state_dict()),
            "optimizer": on_cpu(self.optimizer.state_dict()),
            "average": None if self.ema is None else on_cpu(self.ema.state_dict()),
            "schedule": self.learning_rate.state_dict(),
            "scale": self.scale.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.potential.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None and state["average"] is not None:
            self.ema.load_state_dict(state["average"])
        self.learning_rate.load_state_dict(state["schedule"])
        self.scale.load_state_dict(state.get("scale", {}))


class Loop:
    """Epochs of steps, each with its validation; everything of a run that is not a step.

    States are saved between optimiser steps or between epochs, never between the last step of an epoch and its
    validation, so that a saved position always has a next batch.

    Args:
        steps: what is done with batches.
        position: where the run stands; updated here.
        directory: where to write; None writes nothing.
        reporter: shows progress.
        request: set by signals.
        saved: state to go on from.
        on_row: called with every row of the metrics table.

    Attributes:
        best_metrics: figures of the best model.
    """

    def __init__(
        self,
        steps: Steps,
        position: Position,
        directory: RunDirectory | None,
        reporter: Reporter,
        request: StopRequest,
        *,
        saved: dict[str, Any] | None = None,
        on_row: Callable[[Row], None] | None = None,
    ) -> None:
        self.steps = steps
        self.config = steps.config
        self.process = steps.process
        self.position = position
        self.directory = directory
        self.reporter = reporter
        self.request = request
        self.on_row = on_row
        self.best_metrics: dict[str, float] = dict(saved["best_metrics"]) if saved else {}
        self._elapsed_before = position.elapsed_s
        self._started = self._last_save = time.monotonic()
        if saved is not None:
            self._restore(saved)

    @property
    def elapsed_s(self) -> float:
        """Seconds of training, all sessions together."""
        return self._elapsed_before + time.monotonic() - self._started

    def run(self) -> Reason:
        """Train until the run ends or is stopped; why it ended."""
        self._tell(self.reporter.start, self.position)
        while self.position.epoch < self.config.max_epochs:
            if reason := self._train_epoch() or self._end_epoch():
                return reason
        return "finished"

    def _train_epoch(self) -> Reason | None:
        """The batches that are left of the present epoch; a reason to stop before its end."""
        steps, position, accumulate = self.steps, self.position, self.config.optimizer.accumulate
        if self.config.progressive_correlation is not None:
            set_order(steps.potential.host, order_at(position.epoch, self.config.progressive_correlation))
        count = len(steps.data.train_sampler.batches(position.epoch))
        with closing(steps.data.training_batches(position.epoch, position.batch)) as batches:
            for batch in batches:
                # positions are saved between steps, so this is the first batch of a step in a resumed epoch too
                steps.accumulate(batch, first=position.batch % accumulate == 0)
                position.batch += 1
                is_last = position.batch == count
                is_step = is_last or position.batch % accumulate == 0
                if is_step:
                    steps.take(batch)
                    position.step = steps.step
                self._tell(self.reporter.step, position, steps.losses)
                if is_step and not is_last and (reason := self._between_steps(self._due())):
                    return reason
        return None

    def _end_epoch(self) -> Reason | None:
        """Validation, where one is due, and what follows from it."""
        config, position = self.config, self.position
        is_last = position.epoch + 1 >= config.max_epochs  # always validated, whatever the interval
        if is_last or (position.epoch + 1) % config.validate_every == 0:
            self._tell(self.reporter.validating)
            with self.steps.averaged_weights():
                self._judge(self.steps.validate(), position.epoch + 1)
        position.epoch += 1
        position.batch = 0
        self.steps.losses = torch.zeros_like(self.steps.losses)
        is_stale = config.early_stopping_patience is not None and position.stale >= config.early_stopping_patience
        # asked even where the answer does not matter: it is a question to all processes, and each must take part
        due = self._due(SHORTEST_SAVE_INTERVAL_S)
        if is_stale or is_last:
            self.save()
            return None if is_last else "early_stopping"
        return self._between_steps(due)

    def _judge(self, metrics: dict[str, float], epoch: int) -> None:
        """What a validation's figures change: best model, table, learning rate. The model has the averaged weights."""
        steps, position = self.steps, self.position
        # before anything is written: the last losses of the epoch may not have been looked at yet
        steps.check_finite()
        value = metrics[self.config.monitor]
        if value < position.best_value:  # never where it is not a number
            position.best_value, position.best_epoch, position.stale = value, epoch, 0
            self.best_metrics = dict(metrics)
            if self.directory is not None:
                extra = {"epoch": epoch, "metrics": self.best_metrics, "monitor": self.config.monitor}
                with self.directory.writing(self.directory.model):
                    save_potential(self.directory.model, steps.potential, extra)
        else:
            position.stale += 1
        self._write_row(metrics, epoch)
        if math.isfinite(value):
            steps.learning_rate.after_validation(value, epoch - position.validated_epoch)
        position.validated_epoch = epoch

    def _write_row(self, metrics: dict[str, float], epoch: int) -> None:
        steps = self.steps
        row: Row = {
            "epoch": epoch,
            "step": steps.step,
            "time_s": round(self.elapsed_s, 3),
            "learning_rate": steps.learning_rate.at(max(steps.step - 1, 0)),
            "train/loss": self.process.mean(steps.losses) / max(self.position.batch, 1),
            **steps.scale.figures(),
            **metrics,
        }
        self.position.rows += 1
        if self.directory is not None:
            self.directory.add_row(row)
        if self.on_row is not None:
            self.on_row(row)
        self._tell(self.reporter.validation, row, self.position.best_epoch == epoch)

    def _tell(self, event: Callable[..., None], *arguments: Any) -> None:
        """Show progress. Where nobody reads it any more (``| head``, a closed terminal) the run saves and ends."""
        try:
            event(*arguments)
        except OSError:
            self.reporter = self.reporter.silent()
            self.request.receive(signal.SIGTERM)

    # ------------------------------------------------------------------------------------------- saving, and stopping

    def _between_steps(self, due: int) -> Reason | None:
        if due >= SAVE:
            self.save()
        return STOPS.get(due)

    def _due(self, interval: float = math.inf) -> int:
        """What is due, the same in all processes: none of them may decide by a clock of its own.

        A state is due after ``interval`` or ``checkpoint_every_s``, whichever is shorter [s].
        """
        due = NOTHING
        if self.request.signal is not None:
            due = SIGNAL
        elif self.config.max_time_s is not None and self.elapsed_s >= self.config.max_time_s:
            due = TIME_IS_UP
        elif time.monotonic() - self._last_save >= min(interval, self.config.checkpoint_every_s):
            due = SAVE
        on_gpu = self.steps.device.type == "cuda"
        if self.process.count > 1 and on_gpu and interval == math.inf and self.position.step % AGREE_EVERY:
            return NOTHING
        # whatever is most important to one process is done by all
        return self.process.largest(due, self.steps.device)

    def save(self) -> None:
        """Write the state of the run; collective where there are several processes.

        Raises:
            DivergenceError: a loss or gradient since the last state is not finite; the last state stays.
        """
        self.steps.check_finite()
        self._last_save = time.monotonic()
        self.position.elapsed_s = self.elapsed_s
        self.position.loss_sum = float(self.steps.losses)
        # every process takes part, then one writes: each has its own random numbers and its own sum of losses
        ranks = self.process.gathered({"random": random_state(), "loss_sum": self.position.loss_sum})
        if self.directory is None:
            return
        state = {
            "position": asdict(self.position),
            "statistics": self.steps.potential.statistics.to_dict(),
            "best_metrics": self.best_metrics,
            "sampler": self.steps.data.train_sampler.state_dict(self.position.batch),
            "ranks": ranks,
            **self.steps.state_dict(),
        }
        with self.directory.writing(self.directory.state):
            write_state(self.directory.state, state)

    def _restore(self, saved: dict[str, Any]) -> None:
        own = saved["ranks"][self.process.rank]
        self.steps.load_state_dict(saved)
        self.steps.step = self.position.step
        self.steps.losses = torch.tensor(own["loss_sum"], dtype=torch.float64, device=self.steps.device)
        restore_random_state(own["random"])
