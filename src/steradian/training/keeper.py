"""Keeps the record of a run: saved state, best model, table, early stopping, stopping on time or on a signal."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from steradian.build import save_potential
from steradian.config import TrainingConfig
from steradian.training.module import TrainingModule
from steradian.training.progress import Reporter
from steradian.training.record import RunDirectory
from steradian.training.state import Position, random_state, restore_random_state, write_state

__all__ = ["RunKeeper", "StopRequest", "StopTraining", "stop_on_signals"]

SHORTEST_SAVE_INTERVAL_S = 20.0  # a state costs a flush to the disk, epochs of small runs take less than a second
SAME_REQUEST_S = 1.0  # torchrun passes on a Ctrl-C that the terminal has sent to every process already
AGREE_EVERY = 10  # steps between two questions to the other processes on a GPU, where asking waits for the device

Reason = Literal["finished", "early_stopping", "interrupted", "time_limit"]


class StopTraining(Exception):
    """Leaves the training loop at once; the state has been saved."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason: Reason = reason


class StopRequest:
    """Whether a signal has asked to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._when = 0.0

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._when = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._when > SAME_REQUEST_S:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Inside the block Ctrl-C and SIGTERM only leave a request; a second Ctrl-C ends the program as usual."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    kept = {number: signal.signal(number, request.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


class RunKeeper(pl.Callback):
    """Everything of a run that is not a step.

    States are saved between optimiser steps or between epochs, never between the last step of an epoch and its
    validation, so that a saved position always has a next batch.

    Args:
        directory: where to write; None writes nothing.
        config: the training section.
        position: where the run stands; updated here.
        reporter: shows progress (rank 0).
        request: set by signals.
        saved: state to go on from.
        extra: written into the model file.
    """

    def __init__(
        self,
        directory: RunDirectory | None,
        config: TrainingConfig,
        position: Position,
        reporter: Reporter,
        request: StopRequest,
        *,
        saved: dict[str, Any] | None = None,
        on_row: Callable[[dict[str, float | int]], None] | None = None,
    ) -> None:
        self.directory = directory
        self.config = config
        self.position = position
        self.reporter = reporter
        self.request = request
        self.saved = saved
        self.on_row = on_row
        self.best_metrics: dict[str, float] = dict(saved["best_metrics"]) if saved else {}
        self.reason: Reason = "finished"
        self._started = 0.0
        self._elapsed_before = position.elapsed_s
        self._last_save = 0.0

    # ---------------------------------------------------------------------------------------------- Lightning's hooks

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        if threading.current_thread() is threading.main_thread():
            signal.signal(
                signal.SIGTERM, self.request.receive
            )  # Lightning's own would start a collective in the handler
        if self.saved is not None:
            self._restore(trainer, pl_module, self.saved)
            self.saved = None
            self._started = self._last_save = time.monotonic()
        else:
            self._started = time.monotonic()
            self.save(trainer, pl_module)
        self.reporter.start(self.position)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The last epoch is always validated, whatever the interval.
        last = self.position.epoch + 1 >= self.config.max_epochs
        trainer.check_val_every_n_epoch = 1 if last else self.config.validate_every

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        stepped = pl_module.step != self.position.step
        self.position.batch += 1
        self.position.step = pl_module.step
        self.reporter.step(self.position, pl_module.losses)
        if not stepped or trainer.is_last_batch:
            return
        wish = self._wish(trainer)
        if wish:
            self.save(trainer, pl_module)
        if wish >= 2:
            raise StopTraining("interrupted" if wish == 3 else "time_limit")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.reporter.validating()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The model holds the averaged weights here."""
        assert isinstance(pl_module, TrainingModule)
        position, epoch = self.position, self.position.epoch + 1
        pl_module.check_finite()
        value = pl_module.metrics[self.config.monitor]
        if not math.isfinite(value):
            position.stale += 1
        elif value < position.best_value:
            position.best_value, position.best_epoch, position.stale = value, epoch, 0
            self.best_metrics = dict(pl_module.metrics)
            if self.directory is not None:
                extra = {"epoch": epoch, "metrics": self.best_metrics, "monitor": self.config.monitor}
                save_potential(self.directory.model, pl_module.potential, extra)  # type: ignore[arg-type]
        else:
            position.stale += 1
        rate = pl_module.learning_rate.at(max(pl_module.step - 1, 0))
        self._write_row(pl_module, epoch, rate)
        if math.isfinite(value):
            pl_module.learning_rate.after_validation(value, epoch - position.validated_epoch)
        position.validated_epoch = epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        self.position.epoch += 1
        self.position.batch = 0
        pl_module.losses = torch.zeros_like(pl_module.losses)
        patience = self.config.early_stopping_patience
        last = self.position.epoch >= self.config.max_epochs
        stale = patience is not None and self.position.stale >= patience
        # saving is collective, so a clock must not decide it in every process for itself
        wish = self._wish(trainer, SHORTEST_SAVE_INTERVAL_S)
        if stale or last or wish:
            self.save(trainer, pl_module)
        if stale and not last:
            raise StopTraining("early_stopping")
        if wish >= 2 and not last:
            raise StopTraining("interrupted" if wish == 3 else "time_limit")

    # --------------------------------------------------------------------------------------------------------- saving

    @property
    def elapsed_s(self) -> float:
        """Seconds of training, all sessions together."""
        return self._elapsed_before + (time.monotonic() - self._started if self._started else 0.0)

    def save(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Write the state of the run; collective where there are several processes."""
        module.check_finite()
        self._last_save = time.monotonic()
        self.position.elapsed_s = self.elapsed_s
        self.position.loss_sum = float(module.losses)
        own = {"random": random_state(), "loss_sum": self.position.loss_sum}
        ranks: list[Any] = [own]
        if trainer.world_size > 1:
            ranks = [None] * trainer.world_size
            torch.distributed.all_gather_object(ranks, own)
        if self.directory is None or not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        state = {
            "position": self.position.state_dict(),
            "statistics": module.potential.statistics.to_dict(),
            "weights": _on_cpu(module.potential.state_dict()),
            "optimizer": _on_cpu(trainer.optimizers[0].state_dict()),
            "average": _on_cpu(module.ema.state_dict()) if module.ema else None,
            "schedule": module.learning_rate.state_dict(),
            "scale": module.scale.state_dict(),
            "best_metrics": self.best_metrics,
            "sampler": data.train_sampler.state_dict(self.position.batch),
            "ranks": ranks,
        }
        write_state(self.directory.state, state)

    def _restore(self, trainer: pl.Trainer, module: TrainingModule, saved: dict[str, Any]) -> None:
        """Put back what Lightning makes anew; the weights were loaded before it started."""
        trainer.optimizers[0].load_state_dict(saved["optimizer"])
        if module.ema is not None and saved["average"] is not None:
            module.ema.load_state_dict(saved["average"])
        module.learning_rate.load_state_dict(saved["schedule"])
        module.scale.load_state_dict(saved.get("scale", {}))
        module.step = self.position.step
        own = saved["ranks"][trainer.global_rank]
        module.losses = torch.tensor(own["loss_sum"], dtype=torch.float64, device=module.device)
        restore_random_state(own["random"])

    def _write_row(self, module: TrainingModule, epoch: int, rate: float) -> None:
        batches = max(self.position.batch, 1)
        row: dict[str, float | int] = {
            "epoch": epoch,
            "step": module.step,
            "time_s": round(self.elapsed_s, 3),
            "learning_rate": rate,
            "train/loss": _mean_over_processes(module.losses) / batches,
            **module.scale.figures(),
            **module.metrics,
        }
        self.position.rows += 1
        if self.directory is not None:
            self.directory.add_row(row)
        if self.on_row is not None:
            self.on_row(row)
        self.reporter.validation(row, best=self.position.best_epoch == epoch)

    def _wish(self, trainer: pl.Trainer, interval: float = math.inf) -> int:
        """3: a signal asks to stop; 2: the time is up; 1: a state is due; 0: nothing. All processes agree.

        A state is due after ``interval`` or ``checkpoint_every_s``, whichever is shorter [s].
        """
        wish = 0
        if self.request.signal is not None:
            wish = 3
        elif self.config.max_time_s is not None and self.elapsed_s >= self.config.max_time_s:
            wish = 2
        elif time.monotonic() - self._last_save >= min(interval, self.config.checkpoint_every_s):
            wish = 1
        if trainer.world_size == 1:
            return wish
        device = trainer.strategy.root_device
        if device.type == "cuda" and interval == math.inf and self.position.step % AGREE_EVERY:
            return 0
        together = torch.tensor(wish, device=device)
        torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX)
        return int(together)


def _mean_over_processes(value: Tensor) -> float:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        value = value.clone()
        torch.distributed.all_reduce(value)
        value = value / torch.distributed.get_world_size()
    return float(value)


def _on_cpu(value: Any) -> Any:
    """Copy of a nested state with every tensor on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(item) for item in value)
    return value
