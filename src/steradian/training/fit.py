"""One call that trains: data, statistics, potential, plan, Lightning, record."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from steradian.data.load import load_dataset

from steradian.build import build_potential
from steradian.config import ConfigError, RunConfig
from steradian.data.batching import BatchSampler, GraphDataset
from steradian.data.statistics import DatasetStatistics, compute_statistics
from steradian.data.structures import Structure
from steradian.potential import Potential
from steradian.training.keeper import Reason, RunKeeper, StopTraining, stop_on_signals
from steradian.training.loaders import TrainingData
from steradian.training.loggers import make_loggers
from steradian.training.losses import LABELS, check_labels, labels_in_use
from steradian.training.module import TrainingModule
from steradian.training.plan import check_monitor, plan_rows
from steradian.training.progress import Reporter, make_reporter, spell_seconds, summary
from steradian.training.record import RunDirectory
from steradian.training.state import Position, ResumeError, read_state, seed_all
from steradian.training.trainer import Process, device_line, make_trainer, quiet_lightning

__all__ = ["RunResult", "fit"]

CHANGEABLE = ("max_epochs", "max_time_s", "checkpoint_every_s", "loggers", "threads", "early_stopping_patience")
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


@dataclass(frozen=True)
class Prepared:
    """Everything built before the first step."""

    config: RunConfig
    statistics: DatasetStatistics
    potential: Potential
    data: TrainingData
    position: Position
    provenance: dict[str, Any]
    rows: PlanRows


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
        config: the run. With ``resume`` only the settings in :data:`CHANGEABLE` may differ from the stored ones.
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
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    check_monitor(config.training.monitor, labels_in_use(config.training.loss))
    directory = RunDirectory(Path(resume) if resume is not None else config.output / config.name)
    saved = None
    if resume is not None:
        saved = read_state(directory.state)
        check_resumable(directory, config)
    elif process.rank == 0 and not overwrite and not dry_run:
        directory.check_free()
    loggers = make_loggers(config, directory) if process.rank == 0 and not dry_run else []
    with quiet_lightning():
        prepared = prepare(config, process, saved, directory)
        if process.rank == 0 and show_plan is not None:
            show_plan(prepared.rows)
        if over(prepared):
            return result_of(directory, prepared.position, (saved or {}).get("best_metrics", {}), "finished")
        if process.rank == 0 and not dry_run:
            begin_record(directory, prepared, resume is not None, overwrite)
        if dry_run:
            return take_dry_steps(prepared, process, directory)
        return train(prepared, process, directory, saved, progress, loggers)


def check_resumable(directory: RunDirectory, config: RunConfig) -> None:
    """Refuse to resume with settings that would make another run.

    Raises:
        ResumeError: names the settings.
    """
    stored = directory.read_config()
    old, new = flat(stored.model_dump(mode="json")), flat(config.model_dump(mode="json"))
    free = {"name", "output", *(f"training.{name}" for name in CHANGEABLE)}
    changed = [
        key
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and key not in free and not key.startswith("training.loggers")
    ]
    if changed:
        lines = ", ".join(f"{key} ({old.get(key)} -> {new.get(key)})" for key in changed[:5])
        raise ResumeError(
            f"{directory.path}: cannot resume with other settings: {lines}; start a new run with --set name=NEW"
            f" (only {', '.join(CHANGEABLE)} may change)"
        )


def flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested sections as one dictionary with dotted keys."""
    if not isinstance(content, dict):
        return {prefix: content}
    values: dict[str, Any] = {}
    for key, item in content.items():
        values |= flat(item, f"{prefix}.{key}" if prefix else str(key))
    return values


def prepare(config: RunConfig, process: Process, saved: dict[str, Any] | None, directory: RunDirectory) -> Prepared:
    """Read the data and build the potential; on a resumed run with the stored statistics, weights and position."""
    labels = labels_in_use(config.training.loss)
    dataset = load_dataset(config.data, require=labels)
    cutoff = config.model.host.cutoff_A
    statistics, train_frames = compute_statistics(
        dataset.train, cutoff, config.data.reference_energies, keys=config.data.keys, units=config.data.units
    )
    if not dataset.validation:
        raise ConfigError("data.validation: there are no validation frames; set data.split.validation or give a file")
    check_labels(train_frames, labels, "training")
    check_labels(dataset.validation, labels, "validation")
    position = Position()
    potential = build_potential(config.model, statistics, seed=config.training.seed)
    train_set = GraphDataset(only(train_frames, labels), cutoff)
    validation_set = GraphDataset(only(dataset.validation, labels), cutoff)
    shared = {"rank": process.rank, "num_replicas": process.count}
    train_sampler = BatchSampler(train_set, config.data.batch, shuffle=True, seed=config.training.seed, **shared)
    validation_sampler = BatchSampler(validation_set, config.data.validation_batch, shuffle=False, **shared)
    if saved is not None:
        position.load_state_dict(saved["position"])
        restore(potential, statistics, train_sampler, saved, directory, process)
    data = TrainingData(train_set, validation_set, train_sampler, validation_sampler, position)
    sets = {"training": train_frames, "validation": dataset.validation, "test": dataset.test or []}
    counts = len(train_sampler.batches(0)), len(validation_sampler.batches(0))
    rows = plan_rows(config, sets, statistics, potential, counts, device_line(process))
    return Prepared(config, statistics, potential, data, position, dict(dataset.provenance), rows)


def restore(
    potential: Potential,
    statistics: DatasetStatistics,
    sampler: BatchSampler,
    saved: dict[str, Any],
    directory: RunDirectory,
    process: Process,
) -> None:
    """Put back weights, and refuse data or processes that are not those of the saved state."""
    if len(saved["ranks"]) != process.count:
        raise ResumeError(
            f"{directory.path}: the run used {len(saved['ranks'])} processes, this one has {process.count};"
            " resume with the same number"
        )
    potential.load_state_dict(saved["weights"])
    if saved["statistics"] != statistics.to_dict():
        raise ResumeError(f"{directory.path}: the training data have changed since the run was started")
    try:
        sampler.load_state_dict(saved["sampler"])
    except ValueError as error:
        raise ResumeError(f"{directory.path}: {error}") from None


def only(frames: list[Structure], labels: tuple[str, ...]) -> list[Structure]:
    """Frames without the labels that are not used, which may be known for some frames only."""
    unused: dict[str, Any] = {label: None for label in LABELS if label not in labels}
    if not any(getattr(frame, label) is not None for frame in frames for label in unused):
        return frames
    return [replace(frame, **unused) for frame in frames]


def over(prepared: Prepared) -> bool:
    """Whether a resumed run has nothing left to do."""
    training, position = prepared.config.training, prepared.position
    patience = training.early_stopping_patience
    stale = patience is not None and position.stale >= patience
    return position.epoch >= training.max_epochs or stale


def begin_record(directory: RunDirectory, prepared: Prepared, resumed: bool, overwrite: bool) -> None:
    """Make the run's folder, or cut its table back to the saved state."""
    if resumed:
        directory.keep_rows(prepared.position.rows)
        directory.log(f"resumed at epoch {prepared.position.epoch + 1}, step {prepared.position.step}")
        return
    directory.start(prepared.config, overwrite)
    directory.write_json(directory.statistics, prepared.statistics.to_dict())
    directory.write_json(directory.provenance, prepared.provenance)
    directory.log("\n".join(f"{name}: {value}" for name, value in prepared.rows))


def total_steps(prepared: Prepared) -> int:
    batches = len(prepared.data.train_sampler.batches(0))
    return -(-batches // prepared.config.training.optimizer.accumulate) * prepared.config.training.max_epochs


def take_dry_steps(prepared: Prepared, process: Process, directory: RunDirectory) -> RunResult:
    """Two steps and one validation batch; nothing is written."""
    seed_all(prepared.config.training.seed + process.rank)
    module = TrainingModule(prepared.potential, prepared.config.training, total_steps(prepared))
    training = prepared.config.training
    trainer = make_trainer(training, process, [], max_epochs=1, limit_train_batches=DRY_STEPS, limit_val_batches=1)
    started = time.monotonic()
    trainer.fit(module, datamodule=prepared.data)
    module.check_finite()
    return RunResult(directory.path, None, module.metrics, "finished", 0, module.step, time.monotonic() - started)


def train(
    prepared: Prepared,
    process: Process,
    directory: RunDirectory,
    saved: dict[str, Any] | None,
    progress: bool,
    loggers: list[Any],
) -> RunResult:
    """Run Lightning until the run ends or is stopped."""
    config, position = prepared.config, prepared.position
    training = config.training
    seed_all(training.seed + process.rank)
    module = TrainingModule(prepared.potential, training, total_steps(prepared))
    first = process.rank == 0
    reporter: Reporter = make_reporter(
        progress and first,
        training.max_epochs,
        len(prepared.data.train_sampler.batches(0)),
        training.monitor,
        training.max_time_s,
    )

    def on_row(row: dict[str, float | int]) -> None:
        directory.log(summary(row, training.max_epochs))
        for logger in loggers:
            logger.log_metrics({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))

    reason: Reason = "finished"
    with stop_on_signals() as request:
        keeper = RunKeeper(
            directory if first else None,
            training,
            position,
            reporter,
            request,
            saved=saved,
            on_row=on_row if first else None,
        )
        trainer = make_trainer(training, process, [keeper])
        # Lightning counts epochs from where the run stands, so that validation falls on the same epochs.
        trainer.fit_loop.epoch_progress.current.processed = position.epoch
        trainer.fit_loop.epoch_progress.current.completed = position.epoch
        try:
            trainer.fit(module, datamodule=prepared.data)
        except StopTraining as stop:
            reason = stop.reason
        finally:
            reporter.stop()
            for logger in loggers:
                logger.finalize("success")
    result = result_of(directory, position, keeper.best_metrics, reason, keeper.elapsed_s)
    if first:
        directory.log(closing_line(result, training.monitor))
    return result


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
