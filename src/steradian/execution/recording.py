"""Recorded steps: the kernels of a step are launched once, recorded, and from then on replayed with one call.

A small system keeps a GPU busy for less time than it takes to launch its kernels; a CUDA graph launches all of them
together. What is recorded works on tensors that stay where they are: inputs are written into them before a replay, and
outputs are overwritten by the next one.

Only a GPU can test :class:`CudaRecorder`. Everything around it (warm-up, state that is put back, failure, buckets) is
the same for :class:`Repeater`, which stands in for it on a CPU.
"""

from __future__ import annotations

import itertools
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from steradian.compiler.checked import OF_GRADIENTS, MismatchError, allowed, require_equal
from steradian.equivariant.symmetric_contraction import SymmetricContraction
from steradian.graph import Graph, Prediction
from steradian.potential import Potential
from steradian.precision import PrecisionPolicy

__all__ = [
    "CudaRecorder",
    "GraphBuffers",
    "MismatchError",
    "Recorded",
    "Recorder",
    "Repeater",
    "StepCache",
    "check_gradients",
    "check_loss",
    "check_prediction",
    "first_line",
    "map_tensors",
    "record",
    "say",
    "tensors_in",
    "tensors_of",
    "tolerance",
    "weights_state",
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


# ------------------------------------------------------------------------------------------------------------- buffers


def tensors_of(graph: Graph) -> dict[str, Tensor]:
    """The tensors of a graph by name, those of its pairs and the mark of its real systems included."""
    found = {each.name: getattr(graph, each.name) for each in fields(graph)}
    found = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    pairs = graph.prepared().pairs
    if pairs is not None:
        found |= {"pairs.first": pairs.first, "pairs.of_edge": pairs.of_edge}
    if graph.real is not None:
        found["real"] = graph.real
    return found


class GraphBuffers:
    """A padded graph of its own tensors, into which graphs of the same sizes are written.

    Args:
        graph: the first one; cloned.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph.mapped(lambda tensor: tensor.detach().clone())
        self._own = tensors_of(self.graph)
        self._source: list[tuple[Tensor, int]] = []

    def follow(self, source: Graph, padded: Callable[[], Graph]) -> None:
        """Take over a graph of which ``padded`` makes the contents; does nothing where its tensors are the last ones.

        Args:
            source: as it was given. Its tensors are kept, and changes in place are seen.
        """
        given = [value for _, value in sorted(tensors_of(source).items())]
        same = len(given) == len(self._source) and all(
            value is before and _version(value) == version for value, (before, version) in zip(given, self._source)
        )
        if not same:
            self.write(padded())
            self._source = [(value, _version(value)) for value in given]

    def write(self, graph: Graph) -> None:
        """Take over the contents of a graph on any device.

        Raises:
            ValueError: it has other tensors or other sizes.
        """
        given = tensors_of(graph)
        if given.keys() != self._own.keys():
            raise ValueError(f"the graph differs in {', '.join(sorted(given.keys() ^ self._own.keys()))}")
        for name, value in given.items():
            if value.shape != self._own[name].shape:
                raise ValueError(f"{name}: {list(value.shape)} does not fit {list(self._own[name].shape)}")
        with torch.no_grad():
            for name, value in given.items():
                self._own[name].copy_(value, non_blocking=True)
        assert self.graph.topology is not None
        self.graph.topology.refresh()


def _version(value: Tensor) -> int:
    """Grows with every change in place; never the same for a tensor that does not count them."""
    if value.is_inference():
        return next(_UNCOUNTED)
    return int(value._version)


_UNCOUNTED = itertools.count(start=-1, step=-1)


class StepCache(Generic[T]):
    """The steps last used; the one not used for the longest time makes room.

    Args:
        keep: how many.
        what: for the message, such as "training steps".
    """

    def __init__(self, keep: int, what: str) -> None:
        if keep < 1:
            raise ValueError(f"at least one step must be kept, not {keep}")
        self.keep, self.what = keep, what
        self.made = 0
        self._warned = False
        self._steps: OrderedDict[Hashable, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._steps)

    def clear(self) -> None:
        """Forget all steps: the weights, their format or their device have changed."""
        self._steps.clear()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The step of a key, made where it is not known."""
        if key in self._steps:
            self._steps.move_to_end(key)
            return self._steps[key]
        while len(self._steps) >= self.keep:
            self._steps.popitem(last=False)
        self._steps[key] = step = make()
        self.made += 1
        if self.made > 4 * self.keep and not self._warned:
            self._warned = True
            say(
                f"{self.what}: {self.made} different sizes so far, of which {self.keep} are kept ready; most of the"
                " time goes into preparing them. Use batches of more equal size (data.batch.max_atoms and max_edges) or"
                " training.execution=eager"
            )
        return step


# --------------------------------------------------------------------------------- whether a prepared step may be used


def tolerance(policy: PrecisionPolicy) -> float:
    """Largest difference, relative to the largest number, that is allowed to a prepared step."""
    formats = [policy.weights, policy.radial, policy.messages, policy.paths, policy.node, policy.attention]
    narrow = policy.tf32 or policy.int8 or any(dtype.itemsize < 4 for dtype in formats)
    return allowed("prepared step", "narrow" if narrow else policy.weights)


def check_prediction(found: Prediction, expected: Prediction, policy: PrecisionPolicy) -> None:
    """Compare energies, forces and stresses.

    Raises:
        MismatchError: they differ; the message says by how much.
    """
    for name in ("interaction_energy", "forces", "stress"):
        value, truth = getattr(found, name), getattr(expected, name)
        if truth is not None:
            require_equal(name.replace("_", " "), value, truth, tolerance(policy), floor=1e-3)


def check_loss(found: Tensor, expected: Tensor, policy: PrecisionPolicy) -> None:
    """Compare two losses ``[]``.

    Raises:
        MismatchError: they differ.
    """
    bound = OF_GRADIENTS["prepared step"] * tolerance(policy)
    require_equal("the loss", found.reshape(1), expected.reshape(1), bound, floor=1e-6)


def check_gradients(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], policy: PrecisionPolicy) -> None:
    """Compare the gradients of all weights, relative to the largest of them.

    Raises:
        MismatchError: they differ.
    """
    if [value is None for value in found] != [value is None for value in expected]:
        raise MismatchError("other weights have gradients")
    given = [value.double().flatten() for value in found if value is not None]
    truth = [value.double().flatten() for value in expected if value is not None]
    if truth:
        bound = OF_GRADIENTS["prepared step"] * tolerance(policy)
        require_equal("gradients", torch.cat(given), torch.cat(truth), bound, floor=1e-12)


def weights_state(potential: Potential) -> Hashable:
    """What a prepared step depends on besides the numbers of weights that are trained; compared before every call.

    Weights that take no gradient may have been folded into constants, so their versions count.
    """
    weights = tuple(
        (weight.data_ptr(), weight.dtype, weight.requires_grad or weight._version)
        for weight in (*potential.parameters(), *potential.buffers())
    )
    orders = tuple(module.order for module in potential.modules() if isinstance(module, SymmetricContraction))
    return weights, orders, potential.training, potential.policy.name, potential.radial_table_error, potential.device
