"""Everything of a run that is built before the first step."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from steradian.build import build_potential
from steradian.config import ConfigError, RunConfig
from steradian.data.load import load_dataset
from steradian.data.plausibility import plausibility
from steradian.data.statistics import DatasetStatistics, compute_statistics
from steradian.graph.batches import BatchSampler, GraphDataset
from steradian.graph.structures import Structure
from steradian.potential import Potential
from steradian.training.loaders import TrainingData
from steradian.training.losses import LABELS, check_labels, labels_in_use
from steradian.training.plan import plan_rows
from steradian.training.progressive import start_progressive
from steradian.training.record import RunDirectory
from steradian.training.state import Position, ResumeError
from steradian.training.trainer import Process, device_line

__all__ = ["CHANGEABLE", "Prepared", "check_resumable", "prepare"]

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
        ValueError: a subclass with one clear line; see :func:`steradian.training.fit.fit`.
    """
    labels = labels_in_use(config.training.loss)
    dataset = load_dataset(config.data, require=labels)
    statistics, frames = compute_statistics(
        dataset.train,
        config.model.host.cutoff_A,
        config.data.reference_energies,
        keys=config.data.keys,
        units=config.data.units,
    )
    if not dataset.validation:
        raise ConfigError("data.validation: there are no validation frames; set data.split.validation or give a file")
    check_labels(frames, labels, "training")
    check_labels(dataset.validation, labels, "validation")
    provenance = json.loads(json.dumps(dataset.provenance, default=str))
    if saved is not None:
        check_same_data(provenance, directory)
        statistics = DatasetStatistics.from_dict(saved["statistics"])
    potential = build_potential(config.model, statistics, seed=config.training.seed)
    if config.training.progressive_correlation is not None:
        start_progressive(potential.host)
    data = make_data(config, process, only(frames, labels), only(dataset.validation, labels))
    data.frame_names = frame_names(dataset.train, frames, provenance)
    if saved is not None:
        restore(potential, data, saved, directory, process)
    sets = {"training": frames, "validation": dataset.validation, "test": dataset.test or []}
    counts = len(data.train_sampler.batches(0)), len(data.validation_sampler.batches(0))
    rows = plan_rows(config, sets, statistics, potential, counts, device_line(process, config.training))
    usual = plausibility(frames, statistics.atom_references, declared=config.data.units.energy is not None)
    rows += [*usual.rows, *(("warning", warning) for warning in usual.warnings)]
    rows += [("note", warning) for warning in provenance.get("warnings", [])]
    return Prepared(config, potential, data, data.position, provenance, rows)


def make_data(config: RunConfig, process: Process, train: list[Structure], validation: list[Structure]) -> TrainingData:
    """Graphs and batches of this process."""
    cutoff = config.model.host.cutoff_A
    train_set, validation_set = GraphDataset(train, cutoff), GraphDataset(validation, cutoff)
    ranks = {"rank": process.rank, "num_replicas": process.count}
    return TrainingData(
        train_set,
        validation_set,
        BatchSampler(train_set, config.data.batch, shuffle=True, seed=config.training.seed, **ranks),
        BatchSampler(validation_set, config.data.validation_batch, shuffle=False, **ranks),
        Position(),
    )


def frame_names(before: list[Structure], frames: list[Structure], provenance: dict[str, Any]) -> list[str]:
    """``FILE:INDEX`` of every training frame, for messages."""
    places = [
        f"{file['path']}:{index}"
        for file in provenance.get("files", [])
        if file["role"] == "train"
        for index in range(file["frames"])
    ]
    indices = provenance.get("indices", {}).get("train", range(len(before)))
    names = {
        id(frame): places[index] if index < len(places) else f"frame {index}" for frame, index in zip(before, indices)
    }
    return [names.get(id(frame), f"frame {place}") for place, frame in enumerate(frames)]


def only(frames: list[Structure], labels: tuple[str, ...]) -> list[Structure]:
    """Frames without the labels that are not used, which may be known for some frames only."""
    unused: dict[str, Any] = {label: None for label in LABELS if label not in labels}
    if not any(getattr(frame, label) is not None for frame in frames for label in unused):
        return frames
    return [replace(frame, **unused) for frame in frames]


def restore(
    potential: Potential, data: TrainingData, saved: dict[str, Any], directory: RunDirectory, process: Process
) -> None:
    """Put back weights and position.

    Raises:
        ResumeError: another number of processes, or other batches.
    """
    if len(saved["ranks"]) != process.count:
        raise ResumeError(
            f"{directory.path}: the run used {len(saved['ranks'])} processes, this one has {process.count};"
            " resume with the same number"
        )
    potential.load_state_dict(saved["weights"])
    data.position.load_state_dict(saved["position"])
    try:
        data.train_sampler.load_state_dict(saved["sampler"])
    except ValueError as error:
        raise ResumeError(f"{directory.path}: {error}") from None


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
