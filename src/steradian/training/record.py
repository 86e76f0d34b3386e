"""The folder of a run: configuration, metrics table, log, model, and the state from which it goes on."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib.util
import io
import json
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steradian.checkpoint import FolderInUseError, held, write_atomically
from steradian.config import ConfigError, RunConfig, dump_config, load_config

__all__ = [
    "Loggers",
    "Position",
    "ResumeError",
    "RunDirectory",
    "RunExistsError",
    "WriteError",
    "on_cpu",
    "random_state",
    "read_state",
    "restore_random_state",
    "seed_all",
    "write_state",
]

FIRST_COLUMNS = ("epoch", "step", "time_s", "learning_rate", "train/loss")


class RunExistsError(ValueError):
    """The folder of a run holds another run already."""


class WriteError(ValueError):
    """A file of the run cannot be written; the message names it and the way out."""


class RunDirectory:
    """Paths and files of a run.

    ``config.yaml`` (resolved), ``statistics.json``, ``provenance.json``, ``metrics.csv`` (one row per validation),
    ``log.txt``, ``last.ckpt`` (to resume), ``model.safetensors`` (the best model).

    A new run writes into the folder ``.new`` inside and moves out of it with its first state (:meth:`settle`): until
    then the run that it replaces is whole, and a start that fails leaves nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.staging = path / ".new"
        self._place(path)

    def _place(self, folder: Path) -> None:
        """Where the files are at present."""
        self.config = folder / "config.yaml"
        self.statistics = folder / "statistics.json"
        self.provenance = folder / "provenance.json"
        self.metrics = folder / "metrics.csv"
        self.log_file = folder / "log.txt"
        self.state = folder / "last.ckpt"
        self.model = folder / "model.safetensors"

    @property
    def files(self) -> tuple[Path, ...]:
        """The state is the last: without it there is nothing to go on with."""
        return (self.config, self.statistics, self.provenance, self.metrics, self.log_file, self.model, self.state)

    @property
    def in_use(self) -> bool:
        """Whether a run has written here."""
        return any(file.exists() for file in self.files)

    def check_free(self) -> None:
        """Refuse a folder that holds a run.

        Raises:
            RunExistsError: with the ways out.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunExistsError(f"{self.path} is a file; choose another name with --set name=NEW")
        if self.in_use:
            raise RunExistsError(
                f"{self.path} holds a run already: go on with --resume {self.path}, replace it with --overwrite,"
                " or choose another name with --set name=NEW"
            )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from training in this folder, and remove what killed ones left; these hold nothing.

        Raises:
            RunExistsError: another process trains there.
            OSError: the folder cannot be made; names it and the way out.
        """
        try:
            with held(self.path, "training"):
                try:
                    yield
                finally:
                    shutil.rmtree(self.staging, ignore_errors=True)
        except FolderInUseError as error:
            raise RunExistsError(f"{error}, or choose another name with --set name=NEW") from None

    def start(self, config: RunConfig, overwrite: bool) -> None:
        """Begin a new run beside the one that the folder may hold, and write its configuration.

        Raises:
            RunExistsError: the folder holds a run and ``overwrite`` is off.
        """
        if not overwrite:
            self.check_free()
        shutil.rmtree(self.staging, ignore_errors=True)
        self._place(self.staging)
        with self.writing(self.config):
            write_atomically(self.config, dump_config(config).encode())

    def settle(self) -> None:
        """Put a new run that has its first state into the place of the old one.

        The old state goes first and the new one comes last, so that no interruption leaves the state of one run with
        the files of the other.
        """
        new = self.files
        self._place(self.path)
        old = self.files
        with self.writing(self.state):
            for file in reversed(old):
                file.unlink(missing_ok=True)
            shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
            for source, target in zip(new, old):
                if source.exists():
                    source.replace(target)
            shutil.rmtree(self.staging, ignore_errors=True)

    def go_on(self, config: RunConfig, rows: int) -> None:
        """Make the folder ready to go on: the table cut back, the settings of now.

        Raises:
            ResumeError: the table lacks rows.
        """
        self.keep_rows(rows)
        with self.writing(self.config):
            if self.config.read_text(encoding="utf-8") != dump_config(config):
                write_atomically(self.config, dump_config(config).encode())

    @contextlib.contextmanager
    def writing(self, file: Path) -> Iterator[None]:
        """Inside the block the machine's refusals to write become one line with the way out.

        Raises:
            WriteError: the disk is full, the folder was removed, ...
        """
        try:
            yield
        except OSError as error:
            way_out = "start again"
            if (self.path / "last.ckpt").exists() and not self.staging.exists():
                way_out = f"go on with --resume {self.path}"
            reason = error.strerror or str(error)
            raise WriteError(f"{file}: cannot be written ({reason}); make room there and {way_out}") from None

    def read_config(self) -> RunConfig:
        return load_config(self.config)

    def write_json(self, path: Path, content: dict[str, Any]) -> None:
        with self.writing(path):
            write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False, default=str).encode() + b"\n")

    def log(self, text: str) -> None:
        """Add lines to the log, each with the time of day."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with self.writing(self.log_file), open(self.log_file, "a", encoding="utf-8") as file:
            file.writelines(f"{stamp}  {line}\n" for line in text.splitlines())

    def add_row(self, row: dict[str, float | int]) -> None:
        """Append a validation to the metrics table; the first row fixes the columns."""
        with self.writing(self.metrics):
            if not self.metrics.exists():
                rest = [name for name in row if name not in FIRST_COLUMNS]
                write_atomically(self.metrics, _line([*FIRST_COLUMNS, *rest]).encode())
            with open(self.metrics, encoding="utf-8", newline="") as file:
                columns = next(csv.reader(file))
            with open(self.metrics, "a", encoding="utf-8", newline="") as file:
                file.write(_line([_written(row.get(name, "")) for name in columns]))

    def keep_rows(self, count: int) -> None:
        """Cut the metrics table back to its first rows, so that a resumed run doubles none.

        Raises:
            ResumeError: it has fewer.
        """
        text = self.metrics.read_bytes() if self.metrics.exists() else b""
        lines = text.splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n") and b"\0" not in line]
        if count == 0:
            self.metrics.unlink(missing_ok=True)
        elif len(whole) < count + 1:
            raise ResumeError(
                f"{self.metrics}: {max(len(whole) - 1, 0)} of {count} rows are left (model and state are whole): put"
                " the table back, or start again with --overwrite"
            )
        elif len(whole) > count + 1 or len(whole) != len(lines):
            with self.writing(self.metrics):
                write_atomically(self.metrics, b"".join(whole[: count + 1]))


class Loggers:
    """Sends rows of the metrics table to TensorBoard and Weights & Biases as well.

    Args:
        config: the run. directory: of the run; it exists.
        step: optimiser step from which the run goes on; later points of an earlier session are dropped.
    """

    def __init__(self, config: RunConfig, directory: RunDirectory, step: int = 0) -> None:
        self._board = self._wandb = None
        if "tensorboard" in config.training.loggers:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(directory.path / "tensorboard"), purge_step=step + 1)
        if "wandb" in config.training.loggers:
            import wandb

            self._wandb = wandb.init(project="steradian", name=config.name, dir=str(directory.path))

    @staticmethod
    def check(config: RunConfig) -> None:
        """Refuse a logger whose package is missing.

        Raises:
            ConfigError: with the command that installs it.
        """
        for name in config.training.loggers:
            if name != "csv" and importlib.util.find_spec(name) is None:
                raise ConfigError(
                    f"training.loggers: {name} is not installed; pip install 'steradian[{name}]' or leave it out"
                )

    def add_row(self, row: dict[str, float | int]) -> None:
        step = int(row["step"])
        figures = {name: value for name, value in row.items() if name != "step"}
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log(figures, step=step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _line(values: list[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()


def _written(value: Any) -> Any:
    return f"{value:.8g}" if isinstance(value, float) else value


# --------------------------------------------------------------------------------------------------------- saved state


FORMAT, WITHOUT_HASH = "steradian-run-2", "steradian-run-1"
MARK = b"\nsha256:"  # stands behind the content, with the 64 digits of its hash


class ResumeError(ValueError):
    """A run that cannot be resumed; the message says why and what to do."""


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        epoch: finished epochs.
        batch: batches of the present epoch that this process has done.
        step: optimiser steps.
        elapsed_s: seconds of training, all sessions together.
        best_value: best monitored metric so far; best_epoch: the epoch it belongs to, counted from 1 (0: none yet).
        stale: validations since then.
        validated_epoch: epoch of the last validation, counted from 1.
        rows: rows of the metrics table.
        loss_sum: sum of the losses of the present epoch's batches.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    elapsed_s: float = 0.0
    best_value: float = float("inf")
    best_epoch: int = 0
    stale: int = 0
    validated_epoch: int = 0
    rows: int = 0
    loss_sum: float = 0.0


def seed_all(seed: int) -> None:
    """Seed torch, numpy and Python; the same seed gives the same run on the same machine."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (libraries draw from the global state)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """States of the random generators of this process: torch (CPU and present GPU), numpy, Python."""
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss)],
        "numpy_cached": float(cached),
        "python": random.getstate(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the generators to a state of :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    name, keys, position, has_gauss = state["numpy"]
    np.random.set_state(  # noqa: NPY002
        (name, keys.numpy().astype(np.uint32), position, has_gauss, state["numpy_cached"])
    )
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def on_cpu(value: Any) -> Any:
    """Copy of a nested state with every tensor on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_cpu(item) for item in value)
    return value


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state so that the file is always whole: the old one stays until the new one is on the disk."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    content = buffer.getvalue()
    write_atomically(path, content + MARK + hashlib.sha256(content).hexdigest().encode())


def read_state(path: Path) -> dict[str, Any]:
    """Read a state on the CPU.

    PyTorch does not look at the check sums inside its files, so a hash over all of it is looked at here. States of
    format ``steradian-run-1`` have none, and are taken as they are.

    Raises:
        ResumeError: the file is missing, damaged or of another format.
    """
    if not path.is_file():
        raise ResumeError(f"{path}: there is no saved state to resume from; start again with --overwrite")
    content = path.read_bytes()
    end = len(content) - len(MARK) - 64
    has_hash = content[max(end, 0) :].startswith(MARK)
    if has_hash:
        content, digest = content[:end], content[end + len(MARK) :]
        if hashlib.sha256(content).hexdigest().encode() != digest:
            raise ResumeError(f"{path}: damaged (its check sum is wrong); start again with --overwrite")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ResumeError(f"{path}: cannot be read ({reason}); start again with --overwrite") from None
    found = state.get("format") if isinstance(state, dict) else None
    if found not in (FORMAT, WITHOUT_HASH):
        raise ResumeError(f"{path}: format {found!r} is not {FORMAT!r}; resume with the version that wrote it")
    if found == FORMAT and not has_hash:
        raise ResumeError(f"{path}: damaged (its check sum is missing); start again with --overwrite")
    return state
