"""What a run needs to go on exactly where it stopped, and how it is kept on disk.

The file holds tensors and plain numbers, lists and dictionaries only; it is read with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import io
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steradian.checkpoint import write_atomically

__all__ = [
    "Position",
    "ResumeError",
    "on_cpu",
    "random_state",
    "read_state",
    "restore_random_state",
    "seed_all",
    "write_state",
]

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
