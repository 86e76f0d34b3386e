"""The backend of polynomials on a GPU, chosen by measuring the user's own model on the user's own batch.

A candidate is used only where its energies, forces (and, for training, gradients of the weights) equal those of plain
PyTorch; of those that do, the fastest. One line says what was chosen.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steradian.polynomials.backend import (
    GPU_BACKENDS,
    backend_on,
    chosen_backend,
    measured_backend,
    set_measured_backend,
    triton_works,
    use_backend,
)

if TYPE_CHECKING:
    from steradian.graph import Graph
    from steradian.potential import Potential

__all__ = ["Choice", "available_backends", "choose_backend", "prepare_backend"]

#: Largest difference of energies and forces, relative to the largest, by the narrowest format of the model. In 16 bits
#: and TF32 sums in another order may round the other way.
TOLERANCE = {"float64": 1e-8, "float32": 2e-4, "tf32": 1e-2, "float16": 2e-2, "bfloat16": 1e-1}
#: Gradients of the weights are second derivatives summed over the batch, which lose a digit more.
OF_GRADIENTS = 5.0
WARMING, TIMED = 3, 7
#: Of a GPU's clock, about.
CYCLES_PER_SECOND = 2e9

Step = Callable[[], list[Tensor]]
Timer = Callable[[Step, torch.device], float]


@dataclass
class Choice:
    """What was measured.

    Attributes:
        name: the chosen backend.
        seconds: of a step (energies and forces, or these and the gradients of the weights) on every accepted backend.
        errors: largest relative difference from the reference of every backend that ran.
        refused: why a backend was not accepted.
    """

    name: str = "reference"
    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def line(self, device: torch.device) -> str:
        """One line for the user."""
        base = self.seconds["reference"]
        ratios = ", ".join(f"{name} {base / seconds:.2f}" for name, seconds in self.seconds.items())
        checked = f"; checked to {self.errors[self.name]:.0e}" if self.name != "reference" else ""
        return f"steradian: polynomials on {device}: {self.name} (speed: {ratios} times{checked})"


def prepare_backend(potential: Potential, graph: Graph, training: bool = False) -> str:
    """Choose the backend of polynomials for the potential's device, once, by measuring; does nothing on a CPU.

    Call it before the first step of a simulation or of training, and before a step is compiled or recorded: kernels
    are compiled here. A choice by :func:`~steradian.polynomials.set_backend` or ``STERADIAN_BACKEND`` stands.

    Args:
        potential: in the mode in which it will be used.
        graph: a batch of the usual size, on any device.
        training: measure the gradients of the weights too; the potential is then in training mode.

    Returns:
        The backend that polynomials now have on that device.
    """
    device = potential.device
    if device.type == "cuda" and chosen_backend() in ("auto", "cuda") and measured_backend(device) is None:
        choice = choose_backend(potential, graph.to(device), training)
        set_measured_backend(device, choice.name)
    return backend_on(device, potential.dtype)


def available_backends() -> list[str]:
    """What can be measured on a GPU here; the reference first."""
    from steradian.polynomials.cuequivariance import cuequivariance_works

    usable = {
        "reference": True,
        "triton": triton_works(),
        "cuequivariance": cuequivariance_works() and not torch.are_deterministic_algorithms_enabled(),
    }
    return ["reference", *(name for name in GPU_BACKENDS if usable[name] and name != "reference")]


def choose_backend(
    potential: Potential,
    graph: Graph,
    training: bool = False,
    candidates: Sequence[str] | None = None,
    timer: Timer | None = None,
    using: Callable[[str], AbstractContextManager] = use_backend,
) -> Choice:
    """Compare and time the backends on one batch; prints one line, and one for each that is refused.

    Args:
        potential: on the device in question.
        graph: a batch, on the same device.
        training: compare and time the gradients of the weights too.
        candidates: names; None for what is installed. The reference is always among them.
        timer: seconds of a step; None: the median of a few, after warming up.
        using: makes a backend current inside a ``with`` block.
    """
    names = available_backends() if candidates is None else ["reference", *(n for n in candidates if n != "reference")]
    timer = timer or _seconds
    choice, truth = Choice(), None
    device = potential.device
    for name in names:
        with using(name), _same_random_numbers(device):
            step = _step(potential, graph, training)
            try:
                found = step()
                if truth is None:
                    truth = found
                error, allowed = _worst(found, truth, potential, training)
                choice.errors[name] = error
                if not error <= allowed:
                    raise _RefusedError(
                        f"it differs from the reference by {error:.1e} (relative; {allowed:.0e} is allowed)"
                    )
                choice.seconds[name] = timer(step, device)
            except Exception as problem:
                if name == "reference":
                    raise
                choice.refused[name] = _reason(problem)
                _say(f"steradian: backend {name} is not used on {device}: {choice.refused[name]}")
    choice.name = min(choice.seconds, key=lambda name: choice.seconds[name])
    _say(choice.line(device))
    return choice


class _RefusedError(RuntimeError):
    pass


def _reason(problem: Exception) -> str:
    if isinstance(problem, _RefusedError):
        return str(problem)
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0] if lines else 'no message'}"


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _step(potential: Potential, graph: Graph, training: bool) -> Step:
    """Energies and forces, and the gradients of a sum of their squares by the weights."""
    parameters = [parameter for parameter in potential.parameters() if parameter.requires_grad]

    def step() -> list[Tensor]:
        out = potential(graph)
        assert out.forces is not None
        values = [out.interaction_energy, out.forces]
        if training and parameters:
            loss = out.interaction_energy.square().sum() + out.forces.square().sum()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            values.append(torch.cat([gradient.flatten().double() for gradient in gradients]))
        return [value.detach() for value in values]

    return step


def _worst(found: list[Tensor], truth: list[Tensor], potential: Potential, training: bool) -> tuple[float, float]:
    """Largest relative difference, and how much is allowed; gradients count less."""
    allowed = TOLERANCE[_narrowest(potential)]
    weights = (1.0, 1.0, 1 / OF_GRADIENTS)
    floors = (1e-3 * max(1, len(truth[1])), 1e-3, 1e-30)  # eV per atom, eV/Å: where all is nearly zero
    worst = 0.0
    for ours, theirs, weight, floor in zip(found, truth, weights, floors):
        if theirs.numel():
            difference = float((ours.double() - theirs.double()).abs().max())
            relative = weight * difference / max(float(theirs.abs().max()), floor)
            worst = max(worst, relative) if math.isfinite(relative) else math.inf
    return worst, allowed


def _narrowest(potential: Potential) -> str:
    from steradian.config.precision import ROLES

    policy = potential.policy
    formats = {getattr(policy, role) for role in ROLES}
    formats |= {dtype for own in policy.layers.values() for dtype in own.values()}
    for dtype in (torch.bfloat16, torch.float16):
        if dtype in formats:
            return str(dtype).removeprefix("torch.")
    if policy.tf32:
        return "tf32"
    return "float64" if formats == {torch.float64} else "float32"


@contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    """Dropout is the same for every backend, and the user's random numbers stay as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def _seconds(step: Step, device: torch.device) -> float:
    """Median time of a step; on a GPU of the GPU's own work, as when the step is recorded."""
    if device.type == "cuda":
        return _seconds_on_gpu(step, device)
    return median(_timed(step) for _ in range(WARMING + TIMED))


def _timed(step: Step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def _seconds_on_gpu(step: Step, device: torch.device) -> float:
    """The step is launched while the GPU is kept waiting, so that the time to launch its kernels does not count."""
    with torch.cuda.device(device):
        for _ in range(WARMING):
            step()
        torch.cuda.synchronize()
        launching = _timed(step)
        torch.cuda.synchronize()
        times = []
        for _ in range(TIMED):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(2 * launching * CYCLES_PER_SECOND))
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1000)
    return median(times)
