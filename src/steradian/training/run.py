"""One call that trains: data, statistics, potential, plan, loop, record."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steradian.config import RunConfig
from steradian.training.loop import DivergenceError, Loop, Reason, Row, Steps
from steradian.training.machine import Process, run_settings, stop_on_signals, training_device
from steradian.training.optimisation import labels_in_use
from steradian.training.prepare import Prepared, check_monitor, check_resumable, prepare
from steradian.training.record import Loggers, Position, ResumeError, RunDirectory, read_state, seed_all
from steradian.training.report import make_reporter, spell_seconds, summary

__all__ = ["RunResult", "closing_line", "fit"]

DRY_STEPS = 2
PlanRows = list[tuple[str, str]]


@dataclass(frozen=True)
class RunResult:
    """What a run left.

    Attributes:
        run_dir: folder of the run.
        model_path: the best model (averaged weights), or None where there has been no validation.
        metrics: validation figures of the best model [eV, Å], named ``validation/...``.
        reason: why it ended: ``finished``, ``early_stopping``, ``interrupted`` or ``time_limit``.
        epochs, steps: done, all sessions together.
        elapsed_s: seconds of training, all sessions together.
    """

    run_dir: Path
    model_path: Path | None
    metrics: dict[str, float] = field(default_factory=dict)
    reason: Reason = "finished"
    epochs: int = 0
    steps: int = 0
    elapsed_s: float = 0.0


def fit(
    config: RunConfig,
    *,
    resume: Path | str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    dry_run: bool = False,
    show_plan: Callable[[PlanRows], None] | None = None,
) -> RunResult:
    """Train a potential.

    Writes ``config.yaml``, ``statistics.json``, ``provenance.json``, ``metrics.csv``, ``log.txt``, ``last.ckpt`` and
    ``model.safetensors`` (the best model, averaged weights) into ``config.output / config.name``. On a CPU an
    interrupted and resumed run ends with exactly the weights of an uninterrupted one. Under ``torchrun`` the processes
    share the batches; process 0 writes.

    Args:
        config: the run. With ``resume`` only the settings in
            :data:`steradian.training.prepare.CHANGEABLE` may differ from the stored ones.
        resume: folder of the run to go on with.
        overwrite: replace the run that the folder holds.
        progress: show a bar (on a terminal) or a line per validation.
        dry_run: build everything, take two steps, validate one batch, write nothing.
        show_plan: called with the lines of the plan before the first step (process 0).

    Raises:
        ValueError: a subclass with one clear line: a mistake in the configuration, data without the labels in use, a
            folder in use, a state that does not fit, or a loss that is not finite.
    """
    process = Process.present()
    check_monitor(config.training.monitor, labels_in_use(config.training.loss))
    Loggers.check(config)
    directory = RunDirectory(Path(resume) if resume is not None else config.output / config.name)
    saved = None
    if resume is not None:
        check_resumable(directory, config)
        saved = read_state(directory.state)
    elif process.first and not overwrite and not dry_run:
        directory.check_free()
    with run_settings(config.training.threads):
        prepared = prepare(config, process, directory, saved)
        if process.first and show_plan is not None:
            show_plan(prepared.rows)
        if saved is not None and is_over(prepared):
            if process.first:
                with suppress(OSError), directory.held():  # a folder that is read only can be asked, too
                    pass  # what a kill after the last state left goes
            return result_of(directory, prepared.position, saved["best_metrics"], "finished")
        steps = make_steps(prepared, process)
        if dry_run:
            return take_dry_steps(prepared, steps, directory)
        if saved is None:
            rehearse(steps)
        with directory.held() if process.first else nullcontext():
            if process.first:
                begin_record(directory, prepared, resume is not None, overwrite)
            return train(prepared, steps, directory, saved, progress)


def is_over(prepared: Prepared) -> bool:
    """Whether a resumed run has nothing left to do.

    Raises:
        ResumeError: its time is used up.
    """
    training, position = prepared.config.training, prepared.position
    patience = training.early_stopping_patience
    if position.epoch >= training.max_epochs or (patience is not None and position.stale >= patience):
        return True
    if training.max_time_s is not None and position.elapsed_s >= training.max_time_s:
        raise ResumeError(
            f"the time limit of {training.max_time_s:g} s is used up ({position.elapsed_s:.0f} s of training);"
            " raise it with --set training.max_time_s=SECONDS"
        )
    return False


def begin_record(directory: RunDirectory, prepared: Prepared, resumed: bool, overwrite: bool) -> None:
    """Make the run's folder, or cut its table back to the saved state."""
    position = prepared.position
    if resumed:
        directory.go_on(prepared.config, position.rows)
        directory.log(f"resumed at epoch {position.epoch + 1}, batch {position.batch}, step {position.step}")
        return
    directory.start(prepared.config, overwrite)
    directory.write_json(directory.statistics, prepared.potential.statistics.to_dict())
    directory.write_json(directory.provenance, prepared.provenance)
    directory.log("\n".join(f"{name}: {value}" for name, value in prepared.rows))


def make_steps(prepared: Prepared, process: Process) -> Steps:
    """The steps of a run, with the random generators where every run of this seed starts."""
    training = prepared.config.training
    seed_all(training.seed + process.rank)
    device = training_device(training, process)
    return Steps(prepared.potential, training, prepared.data, prepared.total_steps, process, device)


def rehearse(steps: Steps) -> None:
    """See that the first batches work.

    Raises:
        DivergenceError: the loss of the first batch is not finite.
    """
    try:
        steps.rehearse()
    except DivergenceError as error:
        raise DivergenceError(f"{error}, before training; look at these frames (nothing was written)") from None


def take_dry_steps(prepared: Prepared, steps: Steps, directory: RunDirectory) -> RunResult:
    """Two steps and one validation batch; nothing is written."""
    accumulate = prepared.config.training.optimizer.accumulate
    started = time.monotonic()
    plan = prepared.data.train_sampler.batches(0)[: DRY_STEPS * accumulate]
    for number, batch in zip(range(len(plan)), prepared.data.training_batches(0)):
        steps.accumulate(batch, first=number % accumulate == 0)
        if (number + 1) % accumulate == 0 or number + 1 == len(plan):
            steps.take(batch)
    with steps.averaged_weights():
        metrics = steps.validate(1)
    steps.check_finite()
    return RunResult(directory.path, None, metrics, "finished", 0, steps.step, time.monotonic() - started)


def train(
    prepared: Prepared, steps: Steps, directory: RunDirectory, saved: dict[str, Any] | None, progress: bool
) -> RunResult:
    """Train until the run ends or is stopped; the first process keeps the record."""
    training, position, is_first = prepared.config.training, prepared.position, steps.process.first
    reporter = make_reporter(
        progress and is_first, training.max_epochs, prepared.batches_per_epoch, training.monitor, training.max_time_s
    )
    record = directory if is_first else None
    loggers: Loggers | None = None

    def on_row(row: Row) -> None:
        if loggers is not None:
            directory.log(summary(row, training.max_epochs))
            loggers.add_row(row)

    with stop_on_signals() as request:
        loop = Loop(steps, position, record, reporter, request, saved=saved, on_row=on_row)
        if saved is None:
            loop.save()
            if is_first:
                directory.settle()
        loggers = Loggers(prepared.config, directory, position.step) if is_first else None
        try:
            reason = loop.run()
        except DivergenceError as error:
            raise diverged(error, directory, position) from None
        finally:
            with suppress(OSError):  # of a terminal that is gone
                reporter.stop()
            if loggers is not None:
                loggers.close()
    result = result_of(directory, position, loop.best_metrics, reason, loop.elapsed_s)
    if is_first:
        directory.log(closing_line(result, training.monitor))
    return result


def diverged(error: DivergenceError, directory: RunDirectory, position: Position) -> DivergenceError:
    """The error with what is left of the run and what to try."""
    directory.log(str(error))
    return DivergenceError(
        f"{error}; look at these frames, or lower training.optimizer.learning_rate"
        f" (the last good state is {directory.state}, {spell_seconds(position.elapsed_s)} into the run)"
    )


def result_of(
    directory: RunDirectory,
    position: Position,
    metrics: dict[str, float],
    reason: Reason,
    elapsed_s: float | None = None,
) -> RunResult:
    return RunResult(
        run_dir=directory.path,
        model_path=directory.model if position.best_epoch else None,
        metrics=metrics,
        reason=reason,
        epochs=position.epoch,
        steps=position.step,
        elapsed_s=position.elapsed_s if elapsed_s is None else elapsed_s,
    )


def closing_line(result: RunResult, monitor: str) -> str:
    """How a run ended, in one line."""
    how = {
        "finished": "finished",
        "early_stopping": "stopped early, the monitored metric no longer improves",
        "interrupted": "interrupted",
        "time_limit": "stopped at the time limit",
    }[result.reason]
    best = f"; best {monitor} {result.metrics[monitor]:.5g}" if monitor in result.metrics else ""
    done = f"{result.epochs} epochs, {result.steps} steps, {spell_seconds(result.elapsed_s)}"
    more = f"; go on with --resume {result.run_dir}" if result.reason in ("interrupted", "time_limit") else ""
    return f"{how}: {done}{best}{more}"
