"""The backend of polynomials on a GPU: the fastest on the user's own model and batch.

A backend is used only where its energies, forces (and, for training, gradients of the weights) equal those of plain
PyTorch; of those that do, the fastest. One line says what was measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steradian.compiler.checked import OF_GRADIENTS, MismatchError, allowed, difference, differs
from steradian.config.precision import ROLES
from steradian.execution.recording import first_line, say
from steradian.polynomials.backend import (
    GPU_BACKENDS,
    backend_on,
    cuequivariance_works,
    measured_backend,
    requested_backend,
    set_measured_backend,
    triton_works,
    use_backend,
)

if TYPE_CHECKING:
    from steradian.graph import Graph
    from steradian.potential import Potential

__all__ = ["BackendBenchmark", "available_backends", "benchmark_backends", "prepare_backend"]

WARMING, TIMED = 3, 7
#: Of a GPU's clock, about.
CYCLES_PER_SECOND = 2e9

Step = Callable[[], list[Tensor]]
Timer = Callable[[Step, torch.device], float]


@dataclass
class BackendBenchmark:
    """What was measured.

    Attributes:
        name: the fastest accepted backend.
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
        return f"polynomials on {device}: {self.name} (speed: {ratios} times{checked})"


def prepare_backend(potential: Potential, graph: Graph, training: bool = False) -> str:
    """Find the fastest backend of polynomials for the potential's device, once; does nothing on a CPU.

    Call it before the first step of a simulation or of training, and before a step is recorded: kernels are compiled
    here. What was asked for by :func:`~steradian.polynomials.set_backend` or ``STERADIAN_BACKEND`` stands.

    Args:
        potential: in the mode in which it will be used.
        graph: a batch of the usual size, on any device.
        training: measure the gradients of the weights too; the potential is then in training mode.

    Returns:
        The backend that polynomials now have on that device.
    """
    device = potential.device
    if device.type == "cuda" and requested_backend() in ("auto", "cuda") and measured_backend(device) is None:
        set_measured_backend(device, benchmark_backends(potential, graph.to(device), training).name)
    return backend_on(device, potential.dtype)


def available_backends() -> list[str]:
    """What can be measured on a GPU here; the reference first."""
    usable = {
        "reference": True,
        "triton": triton_works(),
        "cuequivariance": cuequivariance_works() and not torch.are_deterministic_algorithms_enabled(),
    }
    return ["reference", *(name for name in GPU_BACKENDS if usable[name] and name != "reference")]


def benchmark_backends(
    potential: Potential,
    graph: Graph,
    training: bool = False,
    candidates: Sequence[str] | None = None,
    timer: Timer | None = None,
    using: Callable[[str], AbstractContextManager] = use_backend,
) -> BackendBenchmark:
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
    measured, truth = BackendBenchmark(), None
    device = potential.device
    for name in names:
        with using(name), _same_random_numbers(device):
            step = _step(potential, graph, training)
            try:
                found = step()
                if truth is None:
                    truth = found
                error, bound = _worst(found, truth), allowed("model", _narrowest(potential))
                measured.errors[name] = error
                if not error <= bound:
                    raise MismatchError(f"it {differs(error, bound)}")
                measured.seconds[name] = timer(step, device)
            except Exception as problem:
                if name == "reference":
                    raise
                measured.refused[name] = str(problem) if isinstance(problem, MismatchError) else first_line(problem)
                say(f"backend {name} is not used on {device}: {measured.refused[name]}")
    measured.name = min(measured.seconds, key=lambda name: measured.seconds[name])
    say(measured.line(device))
    return measured


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


def _worst(found: list[Tensor], truth: list[Tensor]) -> float:
    """Largest relative difference of energies, forces and gradients; the last count less."""
    floors = (1e-3 * max(1, len(truth[1])), 1e-3, 1e-30)  # eV per atom, eV/Å: where all is nearly zero
    weights = (1.0, 1.0, 1 / OF_GRADIENTS["model"])
    return max(
        weight * difference(ours, theirs, floor) for ours, theirs, weight, floor in zip(found, truth, weights, floors)
    )


def _narrowest(potential: Potential) -> str:
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
