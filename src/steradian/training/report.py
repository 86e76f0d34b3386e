"""What a person sees of a run: the plan, then a bar on a terminal, one line per validation elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ase.data import chemical_symbols
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from steradian.config import RunConfig
from steradian.data.statistics import DatasetStatistics
from steradian.graph.structures import Structure
from steradian.potential import Potential
from steradian.precision import policy_of
from steradian.training.optimisation import LABELS
from steradian.training.record import Position

__all__ = ["BarReporter", "LineReporter", "Reporter", "make_reporter", "plan_rows", "spell_seconds", "summary"]

REFRESH_S = 0.5


class Reporter:
    """Shows nothing; what the other reporters share.

    Args:
        max_epochs: of the run. batches_per_epoch: of this process. monitor: the metric to show with its best mark.
        max_time_s: the run stops then.
    """

    def __init__(self, max_epochs: int, batches_per_epoch: int, monitor: str, max_time_s: float | None = None) -> None:
        self.max_epochs = max_epochs
        self.batches_per_epoch = max(batches_per_epoch, 1)
        self.monitor = monitor
        self.max_time_s = max_time_s
        self._started = 0.0
        self._first = 0
        self._elapsed_before = 0.0

    def silent(self) -> Reporter:
        """A reporter of the same run that shows nothing."""
        return Reporter(self.max_epochs, self.batches_per_epoch, self.monitor, self.max_time_s)

    def start(self, position: Position) -> None:
        self._started = time.monotonic()
        self._first = self._done(position)
        self._elapsed_before = position.elapsed_s

    def step(self, position: Position, losses: Tensor) -> None:
        """After every batch; ``losses`` is the sum over the epoch's batches."""

    def validating(self) -> None:
        """A validation begins."""

    def validation(self, row: Mapping[str, float | int], best: bool) -> None:
        """A validation has ended; ``row`` of the metrics table."""

    def stop(self) -> None:
        """The run is over."""

    def _done(self, position: Position) -> int:
        return position.epoch * self.batches_per_epoch + position.batch

    def remaining_s(self, done: int) -> float:
        """Estimate of the seconds left [s]."""
        elapsed = time.monotonic() - self._started
        total = self.max_epochs * self.batches_per_epoch
        left = elapsed / max(done - self._first, 1) * max(total - done, 0)
        if self.max_time_s is not None:
            left = min(left, max(self.max_time_s - self._elapsed_before - elapsed, 0.0))
        return left


class LineReporter(Reporter):
    """One line per validation."""

    def __init__(self, *args: Any, write: Callable[[str], object] = print, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.write = write

    def validation(self, row: Mapping[str, float | int], best: bool) -> None:
        left = self.remaining_s(int(row["epoch"]) * self.batches_per_epoch)
        self.write(f"{summary(row, self.max_epochs)}  left {spell_seconds(left)}{'  best' if best else ''}")


class BarReporter(Reporter):
    """A bar with the time left, the loss of the epoch and the figures of the last validation."""

    def __init__(self, *args: Any, console: Console | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.progress = Progress(
            TextColumn("{task.fields[epoch]}"),
            BarColumn(bar_width=24),
            TextColumn("left {task.fields[left]}"),
            TextColumn("{task.fields[loss]}"),
            TextColumn("{task.fields[figures]}"),
            console=console,
            auto_refresh=False,
        )
        self.task = self.progress.add_task("", total=1, epoch="", left="?", loss="", figures="")
        self._shown = 0.0

    def start(self, position: Position) -> None:
        super().start(position)
        self.progress.update(self.task, total=self.max_epochs * self.batches_per_epoch)
        self.progress.start()

    def step(self, position: Position, losses: Tensor) -> None:
        now = time.monotonic()
        if now - self._shown < REFRESH_S:
            return
        self._shown = now
        done = self._done(position)
        self.progress.update(
            self.task,
            completed=done,
            epoch=f"epoch {position.epoch + 1}/{self.max_epochs}",
            left=spell_seconds(self.remaining_s(done)),
            loss=f"loss {float(losses) / max(position.batch, 1):.3g}",
        )
        self.progress.refresh()

    def validating(self) -> None:
        self.progress.update(self.task, loss="validating")
        self.progress.refresh()

    def validation(self, row: Mapping[str, float | int], best: bool) -> None:
        done = int(row["epoch"]) * self.batches_per_epoch
        text = figures_text(row) + (" (best)" if best else "")
        self.progress.update(self.task, completed=done, figures=text, loss=f"loss {row['train/loss']:.3g}")
        self.progress.refresh()

    def stop(self) -> None:
        self.progress.stop()


def make_reporter(
    progress: bool, max_epochs: int, batches_per_epoch: int, monitor: str, max_time_s: float | None
) -> Reporter:
    """A bar on a terminal, lines elsewhere, nothing where ``progress`` is off."""
    arguments = (max_epochs, batches_per_epoch, monitor, max_time_s)
    if not progress:
        return Reporter(*arguments)
    if sys.stdout.isatty():
        return BarReporter(*arguments)
    return LineReporter(*arguments, write=_print_now)


def _print_now(text: str) -> None:
    print(text, flush=True)


def summary(row: Mapping[str, float | int], max_epochs: int) -> str:
    """One line about a validation."""
    return (
        f"epoch {row['epoch']}/{max_epochs}  step {row['step']}  {spell_seconds(float(row['time_s']))}"
        f"  lr {row['learning_rate']:.1e}  loss {row['train/loss']:.3g}  {figures_text(row)}"
    )


def figures_text(row: Mapping[str, float | int]) -> str:
    """The main figures of a validation in meV."""
    shown = (
        ("validation/forces_mae", "F mae", "meV/Å"),
        ("validation/forces_q99", "q99", "meV/Å"),
        ("validation/energy_mae", "E mae", "meV"),
        ("validation/stress_mae", "S mae", "meV/Å³"),
    )
    parts = [f"{name} {_short(1000 * row[key])} {unit}" for key, name, unit in shown if key in row]
    return "  ".join(parts)


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def spell_seconds(seconds: float) -> str:
    """``42 s``, ``3:05`` (minutes) or ``2:03:05`` (hours)."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


# ---------------------------------------------------------------------------------------------------------- the plan


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
