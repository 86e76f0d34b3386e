"""One polynomial of a GPU backend against plain PyTorch, before the backend's numbers are used.

A kernel made by a compiler for a device that nobody tested it on may be wrong. So the first time that a backend is to
evaluate a polynomial, it does so on a few random rows, with the gradients that are wanted, and the result is compared
with the reference in float64. A backend that fails is not used for this polynomial, and one line says so.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from steradian.compiler.capture import capturing
from steradian.polynomials.polynomial import Polynomial
from steradian.polynomials.reference import evaluate_reference

__all__ = ["TOLERANCE", "Evaluate", "passes"]

Evaluate = Callable[[Polynomial, list[Tensor], list[Tensor | None], Tensor | None, int | None], Tensor]

#: Largest difference, relative to the largest number, that rounding of sums of some hundred terms explains.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}
ROWS, TARGETS = 40, 4

_RESULTS: WeakKeyDictionary[Polynomial, dict[tuple, bool]] = WeakKeyDictionary()
_LOCK = threading.RLock()


def passes(
    backend: str,
    polynomial: Polynomial,
    inputs: Sequence[Tensor],
    gathers: Sequence[Tensor | None],
    scatter: Tensor | None,
    evaluate: Evaluate,
) -> bool:
    """Whether a backend may evaluate a polynomial; checked once for a device, format and pattern of gathering.

    Nothing is checked while a step is traced or recorded: it was run before, or its backend was chosen by measurement.

    Args:
        backend: for the message.
        polynomial, inputs, gathers, scatter: as in :func:`steradian.polynomials.evaluate`.
        evaluate: the backend's function.
    """
    pattern = (*(index is not None for index in gathers), scatter is not None)
    kinds = tuple((value.dtype, value.requires_grad) for value in inputs)
    key = (backend, inputs[0].device, pattern, kinds)
    known = _RESULTS.setdefault(polynomial, {})
    if key in known:
        return known[key]
    if _is_static(inputs[0]):
        return True
    with _LOCK:
        if key not in known:
            known[key] = True  # the check itself comes through here
            known[key] = _check(backend, polynomial, inputs, pattern, evaluate)
    return known[key]


def _is_static(value: Tensor) -> bool:
    """Whether a step is traced or recorded."""
    if capturing() or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return value.is_cuda and torch.cuda.is_current_stream_capturing()


def _check(
    backend: str, polynomial: Polynomial, inputs: Sequence[Tensor], pattern: Sequence[bool], evaluate: Evaluate
) -> bool:
    device = inputs[0].device
    wide = torch.float64 if any(value.dtype == torch.float64 for value in inputs) else torch.float32
    try:
        with torch.inference_mode(False), torch.enable_grad():
            error = _error(polynomial, inputs, pattern, evaluate)
    except Exception as problem:
        reason = f"{type(problem).__name__}: {str(problem).strip().splitlines()[0] if str(problem).strip() else ''}"
    else:
        if error <= TOLERANCE[wide]:
            return True
        reason = f"it differs from the reference by {error:.1e} (relative; {TOLERANCE[wide]:.0e} is allowed)"
    warnings.warn(
        f"backend {backend} is not used for '{polynomial.output.name}' on {device}: {reason}; plain PyTorch runs",
        stacklevel=2,
    )
    return False


def _error(polynomial: Polynomial, inputs: Sequence[Tensor], pattern: Sequence[bool], evaluate: Evaluate) -> float:
    """The largest relative difference of value and gradients on random rows."""
    generator = torch.Generator().manual_seed(0)
    device = inputs[0].device

    def index(bound: int) -> Tensor:
        return torch.randint(0, bound, (ROWS,), generator=generator)

    gathers = [index(TARGETS).to(device) if gathered else None for gathered in pattern[:-1]]
    scatter = index(TARGETS).sort().values.to(device) if pattern[-1] else None
    values = []
    for value, gathered in zip(inputs, pattern):
        shape = (TARGETS if gathered else ROWS, *value.shape[1:])
        random = torch.randn(shape, generator=generator, dtype=torch.float64)
        values.append(random.to(device=device, dtype=value.dtype).requires_grad_(value.requires_grad))
    truths = [value.detach().double().requires_grad_(value.requires_grad) for value in values]
    rows = TARGETS if pattern[-1] else None
    found = evaluate(polynomial, values, gathers, scatter, rows)
    truth = evaluate_reference(polynomial, truths, gathers, scatter, rows)
    pairs = [(found, truth)]
    if found.requires_grad:
        cotangent = torch.randn(truth.shape, generator=generator, dtype=torch.float64).to(device)
        ours, theirs = (
            torch.autograd.grad(
                out, [v for v in given if v.requires_grad], cotangent.to(out.dtype), materialize_grads=True
            )
            for out, given in ((found, values), (truth, truths))
        )
        # gradients of inputs of 16 bits are rounded to these, which is no error of the backend
        pairs += [(a, b) for a, b in zip(ours, theirs) if a.dtype.itemsize >= 4]
    compared = ((a.detach().double(), b.detach()) for a, b in pairs)
    errors = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in compared]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf
