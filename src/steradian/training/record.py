"""The folder of a run: configuration, metrics table, log, saved state and model."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steradian.checkpoint import FolderInUseError, held, write_atomically
from steradian.config import ConfigError, RunConfig, dump_config, load_config

__all__ = ["RunDirectory", "RunExistsError"]

FIRST_COLUMNS = ("epoch", "step", "time_s", "learning_rate", "train/loss")


class RunExistsError(ValueError):
    """The folder of a run holds another run already."""


class RunDirectory:
    """Paths and files of a run.

    ``config.yaml`` (resolved), ``statistics.json``, ``provenance.json``, ``metrics.csv`` (one row per validation),
    ``log.txt``, ``last.ckpt`` (to resume), ``model.safetensors`` (the best model).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.statistics = path / "statistics.json"
        self.provenance = path / "provenance.json"
        self.metrics = path / "metrics.csv"
        self.log_file = path / "log.txt"
        self.state = path / "last.ckpt"
        self.model = path / "model.safetensors"
        self.lock = path / ".lock"

    @property
    def in_use(self) -> bool:
        """Whether a run has written here."""
        return any(file.exists() for file in self.files)

    @property
    def files(self) -> tuple[Path, ...]:
        return (
            self.config,
            self.statistics,
            self.provenance,
            self.metrics,
            self.log_file,
            self.state,
            self.model,
        )

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
        """Keep other processes from training in this folder; a killed process holds nothing.

        Raises:
            RunExistsError: another process trains there.
            OSError: the folder cannot be made; names it and the way out.
        """
        try:
            with held(self.path, "training"):
                yield
        except FolderInUseError as error:
            raise RunExistsError(f"{error}, or choose another name with --set name=NEW") from None

    def start(self, config: RunConfig, overwrite: bool) -> None:
        """Make the folder for a new run and write its configuration.

        Raises:
            RunExistsError: the folder holds a run and ``overwrite`` is off.
        """
        if not overwrite:
            self.check_free()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for file in self.files:
                file.unlink(missing_ok=True)
            shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
            write_atomically(self.config, dump_config(config).encode())
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot write the run there ({error.strerror})") from None

    def go_on(self, config: RunConfig, rows: int) -> None:
        """Make the folder ready to go on: the settings of now, the table cut back, leftovers of a kill removed."""
        if self.config.read_text(encoding="utf-8") != dump_config(config):
            write_atomically(self.config, dump_config(config).encode())
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        self.keep_rows(rows)

    def read_config(self) -> RunConfig:
        return load_config(self.config)

    def write_json(self, path: Path, content: dict[str, Any]) -> None:
        write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False, default=str).encode() + b"\n")

    def log(self, text: str) -> None:
        """Add lines to the log, each with the time of day."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with open(self.log_file, "a", encoding="utf-8") as file:
            file.writelines(f"{stamp}  {line}\n" for line in text.splitlines())

    def add_row(self, row: dict[str, float | int]) -> None:
        """Append a validation to the metrics table; the first row fixes the columns."""
        if not self.metrics.exists():
            rest = [name for name in row if name not in FIRST_COLUMNS]
            write_atomically(self.metrics, _line([*FIRST_COLUMNS, *rest]).encode())
        with open(self.metrics, encoding="utf-8", newline="") as file:
            columns = next(csv.reader(file))
        with open(self.metrics, "a", encoding="utf-8", newline="") as file:
            file.write(_line([_written(row.get(name, "")) for name in columns]))

    def keep_rows(self, count: int) -> None:
        """Cut the metrics table back to its first rows, so that a resumed run doubles none."""
        if not self.metrics.exists():
            return
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        if count == 0:
            self.metrics.unlink()
        elif len(whole) > count + 1 or len(whole) != len(lines):
            write_atomically(self.metrics, "".join(whole[: count + 1]).encode())


def _line(values: list[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()


def _written(value: Any) -> Any:
    return f"{value:.8g}" if isinstance(value, float) else value
