"""Whether an operator's Triton kernels serve a tensor: they are installed, wanted, and were compared once.

Before its first use on a device a set of kernels computes a small random problem, values and derivatives, and is
compared with plain PyTorch. Where it fails, plain PyTorch runs, and one warning says so.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from steradian.polynomials import backend

__all__ = [
    "largest_error",
    "may_serve",
    "on_every_device",
    "on_its_device",
    "passes",
    "register_check",
    "triton_serves",
]

Result = TypeVar("Result")
Check = Callable[[torch.device, str], float]
"""Error over tolerance of kernels on a device, for a kind of problem in words."""

_CHECKS: dict[str, Check] = {}
_PASSED: dict[tuple[str, str, str], bool] = {}
_everywhere = False


@contextlib.contextmanager
def on_every_device() -> Iterator[None]:
    """Let the kernels run on a CPU too, by Triton's interpreter, whatever the backend; for tests."""
    global _everywhere
    before, _everywhere = _everywhere, True
    try:
        yield
    finally:
        _everywhere = before


def register_check(kernels: str, check: Check) -> None:
    """Name the function that compares kernels with plain PyTorch."""
    _CHECKS[kernels] = check


def may_serve(tensor: Tensor) -> bool:
    """Whether Triton's kernels run where the tensor lies, and are wanted."""
    if _everywhere:
        return True
    # whoever computes on a CPU need not import triton
    return (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and backend.triton_serves(tensor)


def triton_serves(kernels: str, problem: str, *tensors: Tensor) -> bool:
    """Whether these kernels run for tensors of one device.

    Args:
        kernels: name under which their check is registered.
        problem: what decides how they are compiled: formats, sizes; passed to the check.
        tensors: what they would read.
    """
    if not may_serve(tensors[0]) or torch._C._functorch.maybe_current_level() is not None:
        return False
    return passes(kernels, problem, str(tensors[0].device))


def passes(kernels: str, problem: str, device: str) -> bool:
    """Whether the kernels agree with plain PyTorch; asked of the device once."""
    key = kernels, problem, device
    if key not in _PASSED:
        if device.startswith("cuda") and torch.cuda.is_current_stream_capturing():
            return False  # comparing waits for the device; whoever captures has run the step before
        _PASSED[key] = _compare(*key)
    return _PASSED[key]


# what torch.compiler.assume_constant_result sets; calling that imports torch._dynamo, and so triton, for everybody
passes._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _compare(kernels: str, problem: str, device: str) -> bool:
    try:
        with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
            error = _CHECKS[kernels](torch.device(device), problem)
    except Exception as failure:
        reason = f"failed ({type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''})"
    else:
        if error <= 1.0:
            return True
        reason = f"differ from plain PyTorch by {error:.1e} times what is allowed"
    warnings.warn(
        f"the Triton kernels of {kernels} ({problem}) {reason} on {device}: plain PyTorch runs instead", stacklevel=2
    )
    return False


def on_its_device(operator: Callable[..., Result]) -> Callable[..., Result]:
    """An operator that launches kernels on the device of its first tensor, whichever is the current one."""

    @wraps(operator)
    def run(*given: Any, **named: Any) -> Result:
        with torch.cuda.device_of(given[0]):
            return operator(*given, **named)

    return run


def largest_error(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> float:
    """Largest difference over ``tolerance`` times the largest number of each tensor; infinite where not finite."""
    worst = 0.0
    for one, other in zip(ours, theirs, strict=True):
        if one.shape != other.shape:
            return float("inf")
        if not other.numel():
            continue
        scale = float(other.detach().double().abs().max())
        error = float((one.detach().double() - other.detach().double()).abs().max())
        error = error / (tolerance * max(scale, 1e-6))
        worst = max(worst, error if error == error else float("inf"))
    return worst
