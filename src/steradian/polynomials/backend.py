"""Which backend evaluates a tensor.

``reference`` is plain PyTorch and runs anywhere; ``cpu`` is machine code made by LLVM (which numba brings) and takes
float32 and float64 tensors on a CPU; ``triton`` and ``cuequivariance`` take such tensors on a GPU. The choice is
automatic (``auto``): on a GPU what :func:`steradian.polynomials.prepare_backend` measured to be fastest for it, else
Triton. :func:`set_backend` or the environment variable ``STERADIAN_BACKEND`` overrides it. Tensors on a device that
the chosen backend does not serve are evaluated as by ``auto`` on a CPU and by ``reference`` on a GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

__all__ = [
    "BACKENDS",
    "GPU_BACKENDS",
    "backend_for",
    "backend_on",
    "chosen_backend",
    "measured_backend",
    "set_backend",
    "set_measured_backend",
    "triton_serves",
    "use_backend",
]

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton", "cuequivariance")
#: Those that a choice by measurement is made among, in the order in which equals are preferred.
GPU_BACKENDS = ("triton", "cuequivariance", "reference")

_chosen: str | None = None
_measured: dict[str, str] = {}
_LOCK = threading.Lock()


def set_backend(name: str | None) -> None:
    """Choose the backend for all following calls: ``auto`` (or None) or one of :data:`BACKENDS`; ``cuda`` is ``auto``
    on GPUs.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend whose packages are not installed.
    """
    global _chosen
    if name not in (None, *BACKENDS):
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not '{name}'")
    if name == "cpu" and not compiler_works():
        raise RuntimeError("the cpu backend needs numba: pip install numba")
    if name == "triton" and not triton_works():
        raise RuntimeError("the triton backend needs triton (Linux): pip install triton")
    if name == "cuequivariance" and not _cuequivariance_works():
        raise RuntimeError(
            "the cuequivariance backend needs cuEquivariance's kernels: "
            "pip install cuequivariance-torch cuequivariance-ops-torch-cu12"
        )
    _chosen = None if name == "auto" else name


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """:func:`set_backend` for the length of a ``with`` block."""
    global _chosen
    before = _chosen
    set_backend(name)
    try:
        yield
    finally:
        _chosen = before


def chosen_backend() -> str:
    """What the user chose, ``auto`` where nothing.

    Raises:
        ValueError: ``STERADIAN_BACKEND`` holds an unknown name.
    """
    choice = _chosen or os.environ.get("STERADIAN_BACKEND", "auto")
    if choice not in BACKENDS:
        raise ValueError(f"STERADIAN_BACKEND must be one of {', '.join(BACKENDS)}, not '{choice}'")
    return choice


def set_measured_backend(device: torch.device, name: str | None) -> None:
    """Keep the backend that ``auto`` takes on a device; None forgets it."""
    with _LOCK:
        if name is None:
            _measured.pop(_key(device), None)
        else:
            _measured[_key(device)] = name


def measured_backend(device: torch.device) -> str | None:
    """The backend that was measured to be fastest on a device, or None."""
    return _measured.get(_key(device))


def _key(device: torch.device) -> str:
    if device.type == "cuda" and device.index is None:
        return f"cuda:{torch.cuda.current_device()}"
    return str(device)


def backend_for(*tensors: Tensor) -> str:
    """The backend that evaluates these tensors (all of one dtype and device): ``reference``, ``cpu``, ``triton`` or
    ``cuequivariance``."""
    return backend_on(tensors[0].device, tensors[0].dtype)


def backend_on(device: torch.device, dtype: torch.dtype) -> str:
    """As :func:`backend_for`, for tensors of a format on a device."""
    choice = chosen_backend()
    if choice == "reference":
        return "reference"
    if dtype not in (torch.float32, torch.float64) or torch._C._functorch.maybe_current_level() is not None:
        return "reference"
    if device.type == "cuda":
        return _on_gpu(choice, device)
    if choice == "triton" and interprets():
        return "triton"
    if device.type != "cpu" or torch.compiler.is_compiling():
        return "reference"
    return "cpu" if compiler_works() else "reference"


def _on_gpu(choice: str, device: torch.device) -> str:
    if choice == "cpu":
        return "reference"
    if choice in ("auto", "cuda"):
        choice = measured_backend(device) or "triton"
    if choice == "cuequivariance" and torch.are_deterministic_algorithms_enabled():
        _say_once("cuequivariance is not known to be deterministic: Triton's kernels run instead")
        choice = "triton"
    if choice == "triton" and not triton_works():
        _say_once("Triton cannot be imported: slower plain PyTorch runs on the GPU. pip install triton")
        return "reference"
    return choice


def triton_serves(tensor: Tensor) -> bool:
    """Whether Triton kernels of our own may work on this tensor, whichever backend polynomials have."""
    choice = chosen_backend()
    if choice in ("reference", "cpu") or not triton_works():
        return False
    return tensor.device.type == "cuda" or (choice == "triton" and interprets())


@cache
def triton_works() -> bool:
    """Whether Triton can be imported."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        import triton  # noqa: F401
    except Exception as error:
        warnings.warn(f"triton cannot be used ({error}): slower plain PyTorch runs on GPUs", stacklevel=2)
        return False
    return True


def interprets() -> bool:
    """Whether Triton's kernels run in its interpreter, on tensors of a CPU: for tests."""
    if os.environ.get("TRITON_INTERPRET") != "1" or not triton_works():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def _cuequivariance_works() -> bool:
    from steradian.polynomials.cuequivariance import cuequivariance_works

    return cuequivariance_works()


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def import_compiler() -> None:
    """Import what makes machine code; part of numba."""
    import llvmlite.binding
    import llvmlite.ir  # noqa: F401


@cache
def compiler_works() -> bool:
    """Whether machine code can be made; warns once where it cannot."""
    try:
        import_compiler()
    except Exception as error:
        warnings.warn(
            f"numba cannot be used ({error}): the slower plain PyTorch kernels run instead. pip install numba",
            stacklevel=2,
        )
        return False
    return True
