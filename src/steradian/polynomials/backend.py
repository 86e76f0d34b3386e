"""Which backend evaluates a tensor.

``reference`` is plain PyTorch and runs anywhere; ``cpu`` is machine code made by LLVM and takes float32 and float64
tensors on a CPU; ``triton`` and ``cuequivariance`` take such tensors on a GPU. By itself (``auto``) a GPU uses what
:func:`steradian.execution.backend_benchmark.prepare_backend` measured to be fastest for it, else Triton.
:func:`set_backend` or the environment variable ``STERADIAN_BACKEND`` overrides it. Tensors on a device that the backend
asked for does not serve are evaluated as by ``auto`` on a CPU and by ``reference`` on a GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from steradian.compiler.checked import operator_passes

__all__ = [
    "BACKENDS",
    "GPU_BACKENDS",
    "backend_for",
    "backend_on",
    "cuequivariance_works",
    "may_serve",
    "measured_backend",
    "on_every_device",
    "on_its_device",
    "requested_backend",
    "set_backend",
    "set_measured_backend",
    "triton_serves",
    "use_backend",
]

Result = TypeVar("Result")

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton", "cuequivariance")
#: Those that a benchmark compares, in the order in which equals are preferred.
GPU_BACKENDS = ("triton", "cuequivariance", "reference")

_everywhere = False
_requested: str | None = None
_measured: dict[str, str] = {}
_LOCK = threading.Lock()


def set_backend(name: str | None) -> None:
    """Choose the backend for all following calls: ``auto`` (or None) or one of :data:`BACKENDS`; ``cuda`` is ``auto``
    on GPUs.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend whose packages are not installed.
    """
    global _requested
    if name not in (None, *BACKENDS):
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not '{name}'")
    if name == "cpu" and not compiler_works():
        raise RuntimeError("the cpu backend needs llvmlite: pip install llvmlite")
    if name == "triton" and not triton_works():
        raise RuntimeError("the triton backend needs triton (Linux): pip install triton")
    if name == "cuequivariance" and not cuequivariance_works():
        raise RuntimeError(
            "the cuequivariance backend needs cuEquivariance's kernels: "
            "pip install cuequivariance-torch cuequivariance-ops-torch-cu12"
        )
    _requested = None if name == "auto" else name


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """:func:`set_backend` for the length of a ``with`` block."""
    global _requested
    before = _requested
    set_backend(name)
    try:
        yield
    finally:
        _requested = before


def requested_backend() -> str:
    """What the user asked for, ``auto`` where nothing.

    Raises:
        ValueError: ``STERADIAN_BACKEND`` holds an unknown name.
    """
    name = _requested or os.environ.get("STERADIAN_BACKEND", "auto")
    if name not in BACKENDS:
        raise ValueError(f"STERADIAN_BACKEND must be one of {', '.join(BACKENDS)}, not '{name}'")
    return name


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
    name = requested_backend()
    if name == "reference":
        return "reference"
    if dtype not in (torch.float32, torch.float64) or torch._C._functorch.maybe_current_level() is not None:
        return "reference"
    if device.type == "cuda":
        return _on_gpu(name, device)
    if name == "triton" and interprets():
        return "triton"
    if device.type != "cpu" or torch.compiler.is_compiling():
        return "reference"
    return "cpu" if compiler_works() else "reference"


def _on_gpu(name: str, device: torch.device) -> str:
    if name == "cpu":
        return "reference"
    if name in ("auto", "cuda"):
        name = measured_backend(device) or "triton"
    if name == "cuequivariance" and torch.are_deterministic_algorithms_enabled():
        _say_once("cuequivariance is not known to be deterministic: Triton's kernels run instead")
        name = "triton"
    if name == "triton" and not triton_works():
        _say_once("Triton cannot be imported: slower plain PyTorch runs on the GPU. pip install triton")
        return "reference"
    return name


# ---------------------------------------------------------------------------------------- Triton's kernels of operators


@contextlib.contextmanager
def on_every_device() -> Iterator[None]:
    """Let operators' kernels run on a CPU too, by Triton's interpreter, whatever the backend; for tests."""
    global _everywhere
    before, _everywhere = _everywhere, True
    try:
        yield
    finally:
        _everywhere = before


def may_serve(tensor: Tensor) -> bool:
    """Whether an operator's Triton kernels run where a tensor lies and are wanted, whatever evaluates polynomials."""
    if _everywhere:
        return True
    on_gpu = tensor.device.type == "cuda"
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        return False  # whoever computes on a CPU need not import triton
    name = requested_backend()
    if name in ("reference", "cpu") or not triton_works():
        return False
    return on_gpu or (name == "triton" and interprets())


def triton_serves(kernels: str, problem: str, *tensors: Tensor) -> bool:
    """Whether an operator's kernels run for tensors of one device, and were right when they were compared.

    Args:
        kernels: name under which their comparison is registered, see :mod:`steradian.compiler.checked`.
        problem: what decides how they are compiled: formats, sizes.
        tensors: what they would read.
    """
    if not may_serve(tensors[0]) or torch._C._functorch.maybe_current_level() is not None:
        return False
    return operator_passes(kernels, problem, str(tensors[0].device))


def on_its_device(operator: Callable[..., Result]) -> Callable[..., Result]:
    """An operator that launches kernels on the device of its first tensor, whichever is the current one."""

    @wraps(operator)
    def run(*given: Any, **named: Any) -> Result:
        with torch.cuda.device_of(given[0]):
            return operator(*given, **named)

    return run


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


@cache
def cuequivariance_works() -> bool:
    """Whether cuEquivariance and its kernels for GPUs are installed."""
    return all(importlib.util.find_spec(name) for name in ("cuequivariance_torch", "cuequivariance_ops_torch"))


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def import_compiler() -> None:
    """Import what makes machine code."""
    import llvmlite.binding
    import llvmlite.ir  # noqa: F401


@cache
def compiler_works() -> bool:
    """Whether machine code can be made; warns once where it cannot."""
    try:
        import_compiler()
    except Exception as error:
        warnings.warn(
            f"llvmlite cannot be used ({error}): the slower plain PyTorch kernels run instead. pip install llvmlite",
            stacklevel=2,
        )
        return False
    return True
