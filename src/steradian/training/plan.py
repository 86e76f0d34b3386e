"""What a run is about to do, said before it starts; and what cannot work, refused."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ase.data import chemical_symbols

from steradian.config import ConfigError, RunConfig
from steradian.evaluation.metrics import METRICS
from steradian.precision import policy_of
from steradian.training.losses import LABELS

if TYPE_CHECKING:
    from steradian.data.statistics import DatasetStatistics
    from steradian.graph.structures import Structure
    from steradian.potential import Potential

__all__ = ["check_monitor", "plan_rows"]


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


def plan_rows(
    config: RunConfig,
    sets: Mapping[str, Sequence[Structure]],
    statistics: DatasetStatistics,
    potential: Potential,
    batches: tuple[int, int],
    device: str,
) -> list[tuple[str, str]]:
    """Name and value of every line of the plan.

    Args:
        sets: frames of "train", "validation" and, where given, "test". batches: training batches per epoch, validation
            batches. device: where it runs, in words.
    """
    training = config.training
    rows = [(f"{name} data", _set_line(frames)) for name, frames in sets.items() if frames]
    rows += [(f"{label} labels", _coverage(config, sets, label)) for label in LABELS]
    references = ", ".join(
        f"{chemical_symbols[number]} {energy:.4f}" for number, energy in sorted(statistics.atom_references.items())
    )
    steps = -(-batches[0] // training.optimizer.accumulate)
    total = sum(parameter.numel() for parameter in potential.parameters())
    rows += [
        ("reference energies [eV]", references),
        ("  from", statistics.reference_report),
        ("neighbours per atom", f"{statistics.avg_num_neighbors:.1f} within {config.model.host.cutoff_A} Å"),
        ("model", _model_line(config, total)),
        ("batches", f"{batches[0]} per epoch, {batches[1]} for validation"),
        ("steps", f"{steps} per epoch, at most {steps * training.max_epochs} in {training.max_epochs} epochs"),
        ("optimiser", _optimizer_line(config)),
        ("best model by", training.monitor),
        ("device", device),
    ]
    if training.max_time_s is not None:
        rows.append(("time limit", f"{training.max_time_s:g} s"))
    return rows


def _set_line(frames: Sequence[Structure]) -> str:
    sizes = [len(frame.numbers) for frame in frames]
    atoms = f"{sizes[0]} atoms each" if min(sizes) == max(sizes) else f"{min(sizes)}-{max(sizes)} atoms"
    elements = sorted({int(number) for frame in frames for number in frame.numbers})
    periodic = sum(bool(frame.pbc.any()) for frame in frames)
    kind = "" if not periodic else f", {periodic} periodic"
    return f"{len(frames)} frames, {atoms} ({' '.join(chemical_symbols[number] for number in elements)}){kind}"


def _coverage(config: RunConfig, sets: Mapping[str, Sequence[Structure]], label: str) -> str:
    weight = getattr(config.training.loss, f"{label}_weight")
    counts = ", ".join(
        f"{name} {sum(getattr(frame, label) is not None for frame in frames)}/{len(frames)}"
        for name, frames in sets.items()
        if frames
    )
    return f"{counts}; {config.training.loss.kind} weight {weight:g}" if weight else f"{counts}; not used"


def _model_line(config: RunConfig, total: int) -> str:
    host, gate = config.model.host, config.model.edge_gate
    parts = [host.kind.upper(), f"{host.num_layers} layers", f"{host.num_channels} channels", f"L = {host.hidden_l}"]
    if gate.kind != "none":
        parts.append(f"gate {gate.kind.upper()}")
    return f"{', '.join(parts)}; {total} parameters, {policy_of(config.model.precision).name}"


def _optimizer_line(config: RunConfig) -> str:
    optimizer, schedule = config.training.optimizer, config.training.schedule
    warmup = f", {schedule.warmup_steps} steps of warm-up" if schedule.warmup_steps else ""
    average = config.training.ema_decay
    return (
        f"{optimizer.kind}, learning rate {optimizer.learning_rate:g} ({schedule.kind}{warmup})"
        f", average of the weights {'off' if average is None else average}"
    )
