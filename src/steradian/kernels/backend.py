"""Which backend evaluates a tensor.

``reference`` is plain PyTorch and runs anywhere; ``cpu`` is machine code made by LLVM (which numba brings) and takes
float32 and float64 tensors on a CPU. The choice is automatic; :func:`set_backend` or the environment variable
``STERADIAN_BACKEND`` overrides it.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

__all__ = ["BACKENDS", "backend_for", "set_backend", "use_backend"]

BACKENDS = ("auto", "reference", "cpu")

_chosen: str | None = None


def set_backend(name: str | None) -> None:
    """Choose the backend for all following calls: ``auto`` (or None), ``reference`` or ``cpu``.

    Raises:
        ValueError: an unknown name.
        RuntimeError: ``cpu`` where no machine code can be made.
    """
    global _chosen
    if name not in (None, *BACKENDS):
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not '{name}'")
    if name == "cpu" and not compiler_works():
        raise RuntimeError("the cpu backend needs numba: pip install numba")
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


def backend_for(*tensors: Tensor) -> str:
    """``reference`` or ``cpu``: the backend that evaluates these tensors (all of one dtype and device)."""
    choice = _chosen or os.environ.get("STERADIAN_BACKEND", "auto")
    if choice not in BACKENDS:
        raise ValueError(f"STERADIAN_BACKEND must be one of {', '.join(BACKENDS)}, not '{choice}'")
    if choice == "reference":
        return "reference"
    first = tensors[0]
    served = first.device.type == "cpu" and first.dtype in (torch.float32, torch.float64)
    if not served or torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return "reference"
    return "cpu" if compiler_works() else "reference"


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
