"""Model files: one safetensors file with weights, resolved configuration and dataset statistics. No pickle."""

from __future__ import annotations

import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

__all__ = ["FORMAT_VERSION", "ModelFileError", "read_model_file", "write_atomically", "write_model_file"]

FORMAT_VERSION = 1


class ModelFileError(ValueError):
    """A file that is not a model of this package, or is damaged; the message says which."""


def write_atomically(path: Path | str, content: bytes) -> None:
    """Write a file so that it is either whole or not there, whatever interrupts."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def package_version() -> str:
    try:
        return version("steradian")
    except PackageNotFoundError:
        return "unknown"


def write_model_file(
    path: Path | str,
    weights: dict[str, Tensor],
    model: dict[str, Any],
    statistics: dict[str, Any],
    extra: dict[str, Any],
) -> None:
    """Write weights and everything needed to rebuild the model. See :func:`read_model_file`."""
    header = {
        "format_version": FORMAT_VERSION,
        "steradian_version": package_version(),
        "model": model,
        "statistics": statistics,
        "extra": extra,
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    write_atomically(path, save(tensors, metadata={"steradian": json.dumps(header)}))


def read_model_file(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and header (``model``, ``statistics``, ``extra``, ``format_version``, ``steradian_version``).

    Raises:
        ModelFileError: missing, damaged, not a steradian model, or of a later format.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise ModelFileError(f"{path}: no such model file; give a .safetensors file or the folder of a training run")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            weights: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path}: not a safetensors file, or damaged ({error})") from None
    if "steradian" not in metadata:
        raise ModelFileError(f"{path}: a safetensors file, but not a steradian model")
    header = json.loads(metadata["steradian"])
    if header["format_version"] > FORMAT_VERSION:
        raise ModelFileError(
            f"{path}: written by the newer steradian {header['steradian_version']}; upgrade steradian to read it"
        )
    return weights, header
