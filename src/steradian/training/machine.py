"""What a run has of the machine: processes, device, threads, signals, numbers on their way from a GPU."""

from __future__ import annotations

import os
import platform
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, distributed, nn

from steradian.config import ConfigError, TrainingConfig
from steradian.execution.steps import resolve_mode
from steradian.training.record import random_state, restore_random_state

__all__ = [
    "AsynchronousValues",
    "Process",
    "StopRequest",
    "device_line",
    "end_processes",
    "run_settings",
    "stop_on_signals",
    "training_device",
]

SAME_REQUEST_S = 1.0  # torchrun passes on a Ctrl-C that the terminal has sent to every process already
LONGEST_WAIT = timedelta(minutes=30)  # for another process
T = TypeVar("T")


# ----------------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Process:
    """This process among those of a run, as ``torchrun`` tells it, and what they do together.

    The methods are collective: every process must call them in the same order, and waits there for the others.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def present(cls) -> Process:
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls()
        return cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))

    @property
    def first(self) -> bool:
        """Whether this one prints and writes."""
        return self.rank == 0

    def join(self, device: torch.device) -> None:
        """Meet the others: through NCCL where steps are on GPUs, through gloo on CPUs."""
        if self.count > 1 and not distributed.is_initialized():
            distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=LONGEST_WAIT)

    def share_weights(self, model: nn.Module) -> None:
        """Every process starts from the weights of the first, to the last bit."""
        if self.count > 1:
            for parameter in model.parameters():
                distributed.broadcast(parameter.detach(), 0)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Put the mean over all processes into the gradients, with one message per dtype.

        A parameter that has no gradient in any process keeps none: an optimiser leaves it alone then, where a gradient
        of zero would let it decay. Which have one travels behind the gradients in the same message; a process looks at
        that only where it lacks some itself, because looking waits for a GPU.
        """
        if self.count == 1:
            return
        for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
            group = [parameter for parameter in parameters if parameter.dtype == dtype]
            known = [parameter.grad is not None for parameter in group]
            parts = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in group]
            flags = torch.tensor(known, dtype=dtype, device=group[0].device)
            message = torch.cat([part.reshape(-1) for part in (*parts, flags)])
            distributed.all_reduce(message.div_(self.count))
            *means, flags = message.split([part.numel() for part in (*parts, flags)])
            found = known if all(known) else [bool(flag) for flag in flags.tolist()]
            for parameter, mean, has_gradient in zip(group, means, found):
                if has_gradient:
                    if parameter.grad is None:
                        parameter.grad = torch.empty_like(parameter)
                    # copied, because fused optimisers want the strides of the parameter, which may be transposed
                    parameter.grad.copy_(mean.view_as(parameter))

    def mean(self, value: Tensor) -> float:
        """Mean of a scalar ``[]`` over the processes."""
        if self.count > 1:
            value = value.clone()
            distributed.all_reduce(value)
            value = value / self.count
        return float(value)

    def largest(self, value: int, device: torch.device) -> int:
        """Largest of a number that every process has."""
        if self.count == 1:
            return value
        together = torch.tensor(value, device=device)
        distributed.all_reduce(together, distributed.ReduceOp.MAX)
        return int(together)

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, in order."""
        values: list[Any] = [value]
        if self.count > 1:
            values = [None] * self.count
            distributed.all_gather_object(values, value)
        return values


def end_processes() -> None:
    """Leave the group of processes in order; one that dies with its threads running aborts the others' launcher."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


# -------------------------------------------------------------------------------------------- device, threads, settings


def training_device(config: TrainingConfig, process: Process | None = None) -> torch.device:
    """Where a run computes.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError(
            "training.device is 'cuda', but PyTorch finds no GPU: install a CUDA build of it or set training.device=cpu"
        )
    if available and config.device != "cpu":
        return torch.device("cuda", process.local_rank if process is not None else 0)
    return torch.device("cpu")


def device_line(process: Process, config: TrainingConfig) -> str:
    """Where a run computes and how, in words."""
    count = f"{process.count} processes, " if process.count > 1 else ""
    device = training_device(config, process)
    mode = resolve_mode(config.execution, device)
    how = ", steps recorded as CUDA graphs" if mode == "cuda_graph" else ""
    if device.type == "cuda":
        return f"{count}GPU {torch.cuda.get_device_name(device)}{how}"
    return f"{count}CPU ({platform.machine()}), {torch.get_num_threads()} threads{how}"


@contextmanager
def run_settings(threads: int | None) -> Iterator[None]:
    """The settings of PyTorch that a run needs, whatever the caller has set; afterwards everything is as it was.

    Inside, gradients are recorded, nothing is cast behind the run's back, and new tensors are float32. Put back are
    these, the number of threads, and the random generators of torch, numpy and Python.

    Args:
        threads: CPU threads; None leaves PyTorch's number.
    """
    generators, count, dtype = random_state(), torch.get_num_threads(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(count)
        restore_random_state(generators)


# ------------------------------------------------------------------------------------------------------------- signals


class StopRequest:
    """Whether a signal has asked to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._when = 0.0

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        if self.signal is None:
            self.signal, self._when = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._when > SAME_REQUEST_S:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Inside the block Ctrl-C, SIGTERM and SIGHUP only leave a request; a second Ctrl-C ends the program as usual.

    SIGHUP (the terminal was closed) stays ignored where it is, as under ``nohup``.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, request.receive) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------- values from a device


class AsynchronousValues(Generic[T]):
    """Scalars in order, each with something that belongs to it, that are looked at when they have arrived.

    A scalar on a GPU is copied to the host behind the work that makes it, and is handed out once the copy is done, so
    that nothing waits for it; on a CPU it is handed out at once.

    Args:
        most: so many may be on their way; then the oldest is waited for.
    """

    def __init__(self, most: int = 64) -> None:
        self.most = most
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None, T]] = deque()

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, value: Tensor, belongs: T) -> None:
        """Note a scalar ``[]``."""
        if value.device.type != "cuda":
            self._pending.append((value.detach().clone(), None, belongs))
            return
        host = torch.empty((), dtype=value.dtype, pin_memory=True)
        host.copy_(value.detach(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((host, event, belongs))

    def arrived(self, wait: bool = False) -> list[tuple[float, T]]:
        """Values that have not been handed out, oldest first; with ``wait`` all of them."""
        found: list[tuple[float, T]] = []
        while self._pending:
            value, event, belongs = self._pending[0]
            if event is not None and not event.query():
                if not wait and len(self._pending) <= self.most:
                    break
                event.synchronize()
            self._pending.popleft()
            found.append((float(value), belongs))
        return found

    def clear(self) -> None:
        """Forget what has not arrived."""
        self._pending.clear()
