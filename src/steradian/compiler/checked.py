"""One way to trust a fast way of computing: compared with its reference when it is first used, and not used where it
differs.

Kernels are made by compilers for processors that nobody tested them on, steps are recorded, models are converted from
other packages. Each of these is compared once, values and the derivatives that are wanted, on the user's own problem or
on one of its kind; one line says what was refused. :data:`TOLERANCES` is the only place that says how much rounding
explains.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    "OF_GRADIENTS",
    "TOLERANCES",
    "FirstUse",
    "MismatchError",
    "agrees",
    "allowed",
    "difference",
    "differs",
    "first_line",
    "is_static",
    "operator_passes",
    "register_operator",
    "require_equal",
]

#: Largest difference, relative to the largest number of a tensor, by what is compared and by the narrowest format.
TOLERANCES: dict[str, dict[str, float]] = {
    # One polynomial on forty rows, against float64: sums of some hundred products, each rounded to 2^-24 (2^-53), in
    # another order. What is stored in bfloat16 is rounded to its eight bits, half a unit of which is 2^-9; a sum just
    # beside the middle of two numbers may go to the other one.
    "polynomial": {"float64": 1e-11, "float32": 2e-5, "bfloat16": 2.0**-8},
    # Energies and forces of a model whose polynomials run on other kernels, or that comes from another package: sums
    # over some thousand terms lose two to three of seven digits in float32. In TF32 (11 bits) and 16 bits (11 and 8) a
    # sum that differs in its last bit may be rounded the other way in every layer.
    "model": {"float64": 1e-8, "float32": 2e-4, "tf32": 1e-2, "float16": 2e-2, "bfloat16": 1e-1},
    # A model of another package that keeps its constants in float32, here in float64: they stay rounded.
    "rounded model": {"float64": 5e-6, "float32": 2e-4},
    # The same step prepared (recorded, padded): the same kernels in the same order, but shapes, and with them the order
    # inside products of matrices, may differ. Narrow formats round as above, in fewer places.
    "prepared step": {"float64": 1e-8, "float32": 2e-4, "narrow": 0.03},
    # Triton's sums of Euclidean fast attention over 70 atoms, by the format in which factors are multiplied: three
    # products of TF32 keep 22 bits, one keeps 11.
    "EFA": {"ieee": 1e-5, "tf32x3": 2e-5, "tf32": 4e-3, "bfloat16": 3e-2, "float16": 4e-3},
    # Triton's kernels of MARA's gate with two derivatives, by the format of the nodes, to which derivatives are
    # rounded; the softmax's exponentials add to float32.
    "MARA": {"float64": 1e-10, "float32": 1e-4, "bfloat16": 0.03, "float16": 0.005},
}
#: How much more is allowed for gradients of the weights: second derivatives, and differences of large sums over the
#: batch, lose about a digit.
OF_GRADIENTS = {"model": 5.0, "prepared step": 10.0}


class MismatchError(RuntimeError):
    """A fast way of computing gives other numbers than its reference."""


def allowed(what: str, format: torch.dtype | str) -> float:
    """The bound of :data:`TOLERANCES` for what is compared, in a format."""
    return TOLERANCES[what][str(format).removeprefix("torch.")]


def difference(found: Tensor, truth: Tensor, floor: float = 1e-30) -> float:
    """Largest difference over the largest number of ``truth`` (at least ``floor``, in its units).

    Infinite where the shapes differ or the difference is not a number: whoever compares must not take NaN for small.
    """
    if found.shape != truth.shape:
        return math.inf
    if not truth.numel():
        return 0.0
    found, truth = found.detach().double(), truth.detach().double()
    relative = float((found - truth).abs().max()) / max(float(truth.abs().max()), floor)
    return relative if math.isfinite(relative) else math.inf


def differs(error: float, bound: float) -> str:
    """Why something is refused, in words."""
    return f"differs from the reference by {error:.1e} (relative; {bound:.0e} is allowed)"


def require_equal(name: str, found: Tensor, truth: Tensor, bound: float, floor: float) -> None:
    """Compare where the result must not be used otherwise.

    Args:
        name: for the message.
        found, truth: of one shape.
        bound: relative to the largest number of ``truth``, at least ``floor``.

    Raises:
        MismatchError: they differ; the message says by how much. A ``truth`` that is not finite refuses nothing: the
            model has failed, not the fast way.
    """
    scale = max(floor, float(truth.detach().abs().max().nan_to_num(math.inf))) if truth.numel() else floor
    if scale == math.inf:
        return
    if not difference(found, truth, floor) <= bound:
        worst = float((found.detach() - truth.detach()).abs().max()) if found.shape == truth.shape else math.inf
        raise MismatchError(f"{name} differ by {worst:.2g} of {scale:.2g}, allowed is {bound:.0e} of it")


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


class FirstUse:
    """Verdicts on fast kernels, each reached when it is first asked for."""

    def __init__(self) -> None:
        self._verdicts: dict[Hashable, bool] = {}
        self._lock = threading.RLock()

    def trusts(self, key: Hashable, compare: Callable[[], tuple[float, float]], line: str) -> bool:
        """Whether kernels may be used: :func:`agrees`, asked once for what ``key`` stands for."""
        if key not in self._verdicts:
            with self._lock:
                if key not in self._verdicts:
                    self._verdicts[key] = True  # comparing may come through here
                    self._verdicts[key] = agrees(compare, line)
        return self._verdicts[key]

    def knows(self, key: Hashable) -> bool:
        return key in self._verdicts


def agrees(compare: Callable[[], tuple[float, float]], line: str) -> bool:
    """Whether a fast way agrees with its reference; where not, one warning says so.

    Args:
        compare: returns the error and what is allowed; called with gradients on and nothing traced.
        line: the warning, with ``{}`` in place of "differs from ..." or "fails (...)".
    """
    try:
        with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
            error, bound = compare()
    except Exception as problem:  # whatever a compiler or a driver raises: the reference still computes
        reason = f"fails ({first_line(problem)})"
    else:
        if error <= bound:
            return True
        reason = differs(error, bound)
    warnings.warn(line.format(reason), stacklevel=2)
    return False


def is_static(value: Tensor) -> bool:
    """Whether a step is traced or recorded, so that nothing may be compared now: it was run before, or its backend was
    measured."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return value.is_cuda and torch.cuda.is_current_stream_capturing()


# ------------------------------------------------------------------------------------------------ an operator's kernels

OperatorCheck = Callable[[torch.device, str], tuple[Sequence[Tensor], Sequence[Tensor], float]]
"""Results on a device, those of plain PyTorch, and what is allowed, for a kind of problem in words."""

_CHECKS: dict[str, OperatorCheck] = {}
_OPERATORS = FirstUse()


def register_operator(kernels: str, check: OperatorCheck) -> None:
    """Name the function that computes a small random problem by kernels and by plain PyTorch."""
    _CHECKS[kernels] = check


def operator_passes(kernels: str, problem: str, device: str) -> bool:
    """Whether an operator's kernels agree with plain PyTorch; asked of the device once."""
    key = kernels, problem, device
    if not _OPERATORS.knows(key) and device.startswith("cuda") and torch.cuda.is_current_stream_capturing():
        return False  # comparing waits for the device; whoever records has run the step before

    def compare() -> tuple[float, float]:
        ours, theirs, bound = _CHECKS[kernels](torch.device(device), problem)
        return max(difference(one, other, 1e-6) for one, other in zip(ours, theirs, strict=True)), bound

    line = f"Triton's code of {kernels} ({problem}) {{}} on {device}: plain PyTorch runs instead"
    return _OPERATORS.trusts(key, compare, line)


# what torch.compiler.assume_constant_result sets; calling that imports torch._dynamo, and so triton, for everybody
operator_passes._dynamo_marked_constant = True  # type: ignore[attr-defined]
