"""Everything of a run that is built before the first step."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from steradian.build import build_potential
from steradian.config import ConfigError, RunConfig
from steradian.data.labels import is_isolated_atom
from steradian.data.load import load_dataset
from steradian.data.statistics import DatasetStatistics, compute_statistics
from steradian.data.summary import plausibility
from steradian.evaluation.metrics import METRICS
from steradian.graph.batches import BatchSampler, GraphDataset
from steradian.graph.structures import Structure
from steradian.potential import Potential
from steradian.training.feeding import TrainingData
from steradian.training.machine import Process, device_line
from steradian.training.optimisation import LABELS, check_labels, labels_in_use, start_progressive
from steradian.training.record import WITHOUT_HASH, Position, ResumeError, RunDirectory
from steradian.training.report import plan_rows

__all__ = ["CHANGEABLE", "Prepared", "check_monitor", "check_resumable", "prepare"]

CHANGEABLE = (
    "max_epochs",
    "max_time_s",
    "checkpoint_every_s",
    "loggers",
    "threads",
    "early_stopping_patience",
    "device",
    "execution",
)


@dataclass(frozen=True)
class Prepared:
    """What a run trains, on what, from where; ``rows`` are the lines of the plan."""

    config: RunConfig
    potential: Potential
    data: TrainingData
    position: Position
    provenance: dict[str, Any]
    rows: list[tuple[str, str]]

    @property
    def batches_per_epoch(self) -> int:
        """Training batches of this process per epoch."""
        return len(self.data.train_sampler.batches(0))

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        training = self.config.training
        return -(-self.batches_per_epoch // training.optimizer.accumulate) * training.max_epochs


def prepare(
    config: RunConfig, process: Process, directory: RunDirectory, saved: dict[str, Any] | None = None
) -> Prepared:
    """Read the data and build the potential; with a saved state, put its statistics, weights and position back.

    Raises:
        ValueError: a subclass with one clear line; see :func:`steradian.training.run.fit`.
    """
    labels = labels_in_use(config.training.loss)
    dataset = load_dataset(config.data, require=labels)
    provenance = json.loads(json.dumps(dataset.provenance, default=str))
    if not dataset.validation:
        raise ConfigError(
            "there are no validation frames: give data.validation (a file), data.split.validation or more frames"
        )
    train = checked_graphs(only(dataset.train, labels), config)
    validation = checked_graphs(only(dataset.validation, labels), config)
    statistics, chosen = training_statistics(dataset.train, train, config)
    frames = [dataset.train[index] for index in chosen]
    check_labels(frames, labels, "training")
    check_labels(dataset.validation, labels, "validation")
    if saved is not None:
        check_same_data(provenance, directory)
        statistics = DatasetStatistics.from_dict(saved["statistics"])
    potential = build_potential(config.model, statistics, seed=config.training.seed)
    if config.training.progressive_correlation is not None:
        start_progressive(potential.host)
    if len(chosen) < len(train):
        train = GraphDataset([train.structures[index] for index in chosen], train.cutoff)
    data = make_data(config, process, train, validation)
    names = frame_names(provenance)
    data.frame_names = [names[index] for index in chosen]
    position = Position() if saved is None else restored_position(data, saved, directory, process)
    sets = {"training": frames, "validation": dataset.validation, "test": dataset.test or []}
    counts = len(data.train_sampler.batches(0)), len(data.validation_sampler.batches(0))
    rows = plan_rows(config, sets, statistics, potential, counts, device_line(process, config.training))
    usual = plausibility(frames, statistics.atom_references, declared=config.data.units.energy is not None)
    rows += [*usual.rows, *(("warning", warning) for warning in usual.warnings)]
    rows += [("note", warning) for warning in provenance.get("warnings", [])]
    if saved is not None and saved["format"] == WITHOUT_HASH:
        rows.append(("note", f"{directory.state} is of an earlier version and has no check sum: taken as it is"))
    return Prepared(config, potential, data, position, provenance, rows)


def checked_graphs(frames: list[Structure], config: RunConfig) -> GraphDataset:
    """Frames with all their neighbour lists.

    Raises:
        DataError: a frame has none, such as two atoms at one place; names file and frame.
    """
    graphs = GraphDataset(frames, config.model.host.cutoff_A)
    _ = graphs.num_edges  # makes the lists
    return graphs


def training_statistics(
    frames: list[Structure], graphs: GraphDataset, config: RunConfig
) -> tuple[DatasetStatistics, list[int]]:
    """Statistics, and the indices of the frames to train on (isolated atoms may only give reference energies).

    Args:
        frames: of the training set. graphs: of the same frames.

    Raises:
        DataError: no atom has a neighbour.
    """
    references = config.data.reference_energies
    leaves_atoms_out = references.kind in ("auto", "isolated_atoms")
    counts = [
        count
        for frame, count in zip(frames, graphs.num_edges.tolist())
        if not (leaves_atoms_out and is_isolated_atom(frame))
    ]
    statistics, chosen = compute_statistics(
        frames, graphs.cutoff, references, keys=config.data.keys, units=config.data.units, num_edges=counts
    )
    taken = {id(frame) for frame in chosen}
    return statistics, [index for index, frame in enumerate(frames) if id(frame) in taken]


def make_data(config: RunConfig, process: Process, train: GraphDataset, validation: GraphDataset) -> TrainingData:
    """The batches of this process."""
    ranks = {"rank": process.rank, "num_replicas": process.count}
    return TrainingData(
        train,
        validation,
        BatchSampler(train, config.data.batch, shuffle=True, seed=config.training.seed, **ranks),
        BatchSampler(validation, config.data.validation_batch, shuffle=False, **ranks),
    )


def frame_names(provenance: dict[str, Any]) -> list[str]:
    """``FILE:INDEX`` of every training frame, for messages."""
    files = [file for file in provenance["files"] if file["role"] == "train"]
    places = [f"{file['path']}:{index}" for file in files for index in range(file["frames"])]
    return [places[index] for index in provenance["indices"]["train"]]


def only(frames: list[Structure], labels: tuple[str, ...]) -> list[Structure]:
    """Frames without the labels that are not used, which may be known for some frames only."""
    unused: dict[str, Any] = {label: None for label in LABELS if label not in labels}
    if not any(getattr(frame, label) is not None for frame in frames for label in unused):
        return frames
    return [replace(frame, **unused) for frame in frames]


def restored_position(data: TrainingData, saved: dict[str, Any], directory: RunDirectory, process: Process) -> Position:
    """Where a saved run stands, in its data too.

    Raises:
        ResumeError: another number of processes, or other batches.
    """
    if len(saved["ranks"]) != process.count:
        raise ResumeError(
            f"{directory.path}: the run used {len(saved['ranks'])} processes, this one has {process.count};"
            " resume with the same number"
        )
    try:
        data.train_sampler.load_state_dict(saved["sampler"])
    except ValueError as error:
        raise ResumeError(f"{directory.path}: {error}") from None
    return Position(**saved["position"])


def check_same_data(provenance: dict[str, Any], directory: RunDirectory) -> None:
    """Refuse to resume on other data.

    Raises:
        ResumeError: names the file.
    """
    try:
        stored = json.loads(directory.provenance.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ResumeError(f"{directory.provenance}: cannot be read; start again with --overwrite") from None
    for old, new in zip(stored.get("files", []), provenance.get("files", [])):
        if old["sha256"] != new["sha256"]:
            raise ResumeError(
                f"{new['path']} has changed since {directory.path} was started; start a new run with --set name=NEW"
            )
    if stored.get("indices") != provenance.get("indices"):
        raise ResumeError(f"{directory.path}: the split of the data has changed; start a new run with --set name=NEW")


def check_monitor(monitor: str, labels: Sequence[str]) -> None:
    """Refuse a metric that no validation will have.

    Args:
        monitor: ``validation/NAME``. labels: labels in use.

    Raises:
        ConfigError: unknown, or of a label that is not trained on; with the known names.
    """
    known = [f"validation/{name}" for name in METRICS if name.split("_")[0] in labels]
    if monitor in known:
        return
    if monitor.removeprefix("validation/") in METRICS:
        label = monitor.removeprefix("validation/").split("_")[0]
        reason = f"needs {label}, which the loss does not use"
    else:
        near = difflib.get_close_matches(monitor, known, n=1, cutoff=0.5)
        reason = f"unknown metric; did you mean '{near[0]}'?" if near else "unknown metric"
    raise ConfigError(f"training.monitor: {monitor}: {reason} (known: {', '.join(known)})")


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
