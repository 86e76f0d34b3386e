"""Recorded steps: the kernels of a step are launched once, recorded, and from then on replayed with one call.

A small system keeps a GPU busy for less time than it takes to launch its kernels; a CUDA graph launches all of them
together. What is recorded works on tensors that stay where they are: inputs are written into them before a replay, and
outputs are overwritten by the next one.

Only a GPU can test :class:`CudaRecorder`. Everything around it (warm-up, state that is put back, failure, buckets) is
the same for :class:`Repeater`, which stands in for it on a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

__all__ = [
    "CudaRecorder",
    "Recorded",
    "Recorder",
    "Repeater",
    "first_line",
    "map_tensors",
    "record",
    "say",
    "tensors_in",
]

T = TypeVar("T")


def say(line: str) -> None:
    """One line for the person at the terminal."""
    print(f"steradian: {line}", file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """What an exception says, in one short line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()[:160]}" if lines else type(error).__name__


class Recorder(Protocol):
    """Runs a function so that it can be run again without its Python code."""

    def warm_up(self, function: Callable[[], Any], times: int) -> None:
        """Run it before it is recorded, so that everything it makes once is made."""

    def record(self, function: Callable[[], T], generators: Sequence[torch.Generator]) -> Callable[[], T]:
        """Record it, without running it; the result runs it and gives its outputs, the same tensors every time."""


class CudaRecorder:
    """CUDA graphs. All graphs of one recorder share their memory, so they must not run at the same time.

    Args:
        device: of all tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None

    def warm_up(self, function: Callable[[], Any], times: int) -> None:
        # on a stream of its own, as capturing demands
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(times):
                function()
        torch.cuda.current_stream(self.device).wait_stream(stream)

    def record(self, function: Callable[[], T], generators: Sequence[torch.Generator]) -> Callable[[], T]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        # other threads (data) may allocate meanwhile: only this one must not
        with torch.cuda.device(self.device), torch.cuda.graph(
            graph, pool=self._pool, capture_error_mode="thread_local"
        ):  # fmt: skip
            outputs = function()

        def replay() -> T:
            graph.replay()
            return outputs

        return replay


class Repeater:
    """Calls the function again and writes the results into the same tensors: what a CUDA graph does, on any device."""

    def warm_up(self, function: Callable[[], Any], times: int) -> None:
        for _ in range(times):
            function()

    def record(self, function: Callable[[], T], generators: Sequence[torch.Generator]) -> Callable[[], T]:
        kept: list[T] = []

        def replay() -> T:
            outputs = function()
            if not kept:
                kept.append(map_tensors(lambda value: value.detach().clone(), outputs))
            else:
                targets, values = tensors_in(kept[0]), tensors_in(outputs)
                for target, value in zip(targets, values, strict=True):
                    target.copy_(value.detach())
            return kept[0]

        return replay


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nest of tuples, lists, dictionaries and dataclasses with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(change, item) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(change, item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: map_tensors(change, getattr(value, each.name)) for each in fields(value)})
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a nest, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, value)
    return found


class Recorded(Generic[T]):
    """A step that is replayed, or called where it could not be recorded.

    Attributes:
        eager: whether it is called.
        reason: why, where recording failed.
    """

    def __init__(self, run: Callable[[], T], eager: bool, reason: str | None = None) -> None:
        self._run, self.eager, self.reason = run, eager, reason

    def __call__(self) -> T:
        return self._run()


def record(
    function: Callable[[], T],
    *,
    device: torch.device | str,
    warm_up: int = 3,
    what: str = "this step",
    state: Sequence[Tensor] = (),
    generators: Sequence[torch.Generator] = (),
    recorder: Recorder | None = None,
) -> Recorded[T]:
    """Record a step; where that fails, say so in one line and call the function instead.

    Args:
        function: without arguments; reads and writes tensors that stay alive, returns tensors in tuples, lists,
            dictionaries or dataclasses (such as a prediction). It must not ask the device for a number.
        device: where its tensors are. On a CPU, without a recorder, the function is called.
        warm_up: calls before the recording.
        what: for the message, such as "the step of dynamics".
        state: tensors that the function changes; they are put back after the warm-up.
        generators: of random numbers that the function draws; put back too.
        recorder: shares its memory among all that it records; None makes one.
    """
    device = torch.device(device)
    if recorder is None:
        if device.type != "cuda":
            return Recorded(function, eager=True)
        recorder = CudaRecorder(device)
    kept = [value.clone() for value in state]
    drawn = [generator.get_state() for generator in generators]

    def put_back() -> None:
        with torch.no_grad():
            for value, before in zip(state, kept):
                value.copy_(before)
        for generator, before in zip(generators, drawn):
            generator.set_state(before)

    recorder.warm_up(function, warm_up)
    put_back()
    try:
        run = recorder.record(function, generators)
    except Exception as error:
        put_back()
        reason = first_line(error)
        say(
            f"{what} cannot be recorded as a CUDA graph ({reason}); it runs without, which is slower for small systems."
            " Set the execution to 'eager' to do without trying"
        )
        return Recorded(function, eager=True, reason=reason)
    return Recorded(run, eager=False)
