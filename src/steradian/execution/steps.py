"""Steps over graphs and batches, prepared once per size of the input: predictions, or a loss and its gradients.

A batch is filled up to a bucket (:mod:`~steradian.execution.batches`), written into tensors that stay where they are,
and the step of the bucket is replayed (a CUDA graph). On its first use a step is checked against the same function
called on the same batch; where it cannot be made or does not pass, one line says why, and the function is called from
then on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from steradian.execution.batches import Buckets, DeviceData, Sizes, pad_graph, real_part
from steradian.execution.recording import (
    CudaRecorder,
    GraphBuffers,
    MismatchError,
    Recorded,
    Recorder,
    StepCache,
    check_gradients,
    check_loss,
    check_prediction,
    first_line,
    map_tensors,
    record,
    say,
    tensors_of,
    weights_state,
)
from steradian.graph import Graph, Prediction
from steradian.operators.base import declares
from steradian.potential import Potential

__all__ = [
    "GradientStep",
    "Mode",
    "PredictionStep",
    "Runner",
    "Step",
    "Steps",
    "resolve_mode",
    "with_gradients",
]

Mode = Literal["auto", "eager", "cuda_graph"]

Batch = Graph | Sequence[int]
"""A batch: indices of frames of the data on the device, or a graph."""

MANY_ELEMENTS = 8
"""Above so many elements, maps per element run element by element, and a step holds for one composition."""


def resolve_mode(mode: str, device: torch.device, recorder: Recorder | None = None) -> Mode:
    """How to run on a device: ``auto`` records on a GPU (or with a recorder of one's own) and calls elsewhere.

    Raises:
        ValueError: an unknown mode, or ``cuda_graph`` without a GPU.
    """
    mode = mode.replace("-", "_")
    if mode not in get_args(Mode):
        raise ValueError(f"execution '{mode}' is not known; choose {', '.join(get_args(Mode))}")
    records = device.type == "cuda" or recorder is not None
    if mode == "auto":
        return "cuda_graph" if records else "eager"
    if mode == "cuda_graph" and not records:
        raise ValueError("execution 'cuda_graph' needs a GPU; choose auto or eager")
    return mode  # type: ignore[return-value]


class Step(Protocol):
    """What is run over batches.

    Attributes:
        what: for messages.
        potential: that it evaluates.
        draws: whether two calls on one batch differ, so that they cannot be compared.
    """

    what: str
    potential: Potential

    @property
    def draws(self) -> bool: ...

    def __call__(self, graph: Graph, scale: Tensor) -> Any:
        """Tensors in tuples, dictionaries or dataclasses; asks the device for nothing where the graph is static.

        Args:
            graph: on the potential's device.
            scale: ``[]`` factor on a loss.
        """

    def check(self, found: Any, expected: Any) -> None:
        """Raises MismatchError where the two differ by more than rounding."""


class PredictionStep:
    """Prediction of a batch, and the labels of the batch to compare it with."""

    what = "the step of energies and forces"
    draws = False

    def __init__(self, potential: Potential, *, forces: bool = True, stress: bool = False) -> None:
        self.potential = potential
        self.options = {"forces": forces, "stress": stress}

    def __call__(self, graph: Graph, scale: Tensor | None = None) -> tuple[Prediction, dict[str, Tensor]]:
        """Prediction without history; energy, forces, stress and numbers of the batch."""
        found: Prediction = map_tensors(Tensor.detach, self.potential(graph, **self.options))
        kept = {name: value for name, value in tensors_of(graph).items() if name in ("energy", "forces", "stress")}
        return found, {"numbers": graph.numbers, **kept}

    def check(self, found: Any, expected: Any) -> None:
        """Raises MismatchError where the two differ by more than rounding."""
        check_prediction(found[0], expected[0], self.potential.policy)


@dataclass(frozen=True)
class LossAndGradients:
    """The loss of a batch, not scaled, and the gradients of the scaled one by the trained weights in order."""

    loss: Tensor
    gradients: tuple[Tensor | None, ...]


class GradientStep:
    """Loss and gradients by all weights that are trained, double derivatives included.

    Args:
        potential: in training mode.
        loss: total loss of a prediction and its padded graph.
        forces, stress: derivatives that the loss needs.
    """

    what = "the training step"

    def __init__(
        self, potential: Potential, loss: Callable[[Prediction, Graph], Tensor], *, forces: bool, stress: bool
    ) -> None:
        self.potential, self.loss = potential, loss
        self.options = {"forces": forces, "stress": stress}

    def __call__(self, graph: Graph, scale: Tensor) -> LossAndGradients:
        """The loss of a batch and its gradients.

        Gradients are taken by tensors made here that share the memory of the weights: autograd binds a weight to the
        stream where it was used first, and a recording must not touch other streams.
        """
        potential = self.potential
        with torch.enable_grad(), potential.policy.matrix_units():
            trained = {name: weight for name, weight in potential.named_parameters() if weight.requires_grad}
            weights = {name: weight.detach().requires_grad_() for name, weight in trained.items()}
            prediction = torch.func.functional_call(potential, weights, (graph,), self.options)
            loss = self.loss(prediction, graph)
            found = torch.autograd.grad(loss * scale.to(loss.dtype), list(weights.values()), allow_unused=True)
        return LossAndGradients(loss.detach(), tuple(found))

    def check(self, found: LossAndGradients, expected: LossAndGradients) -> None:
        """Raises MismatchError where the two differ by more than rounding."""
        check_loss(found.loss, expected.loss, self.potential.policy)
        check_gradients(found.gradients, expected.gradients, self.potential.policy)

    @property
    def draws(self) -> bool:
        """Whether two calls differ because of dropout."""
        return self.potential.training and any(
            float(getattr(module, "dropout", 0.0) or 0.0) > 0 or (isinstance(module, nn.Dropout) and module.p > 0)
            for module in self.potential.modules()
        )


@dataclass
class _Prepared:
    """A step of one bucket: how a batch is written into it, and how it is run."""

    write: Callable[[Batch], None]
    run: Recorded[Any]


class Steps:
    """Runs a step over batches, recorded once per bucket.

    Args:
        step: what is run. Weights may change between calls, in place; their device, format or training mode too (steps
            are made anew then).
        mode: ``auto``, ``eager`` or ``cuda_graph``.
        data: on the device, for batches named by frames; None: batches are graphs.
        buckets: sizes of padded batches; None for steps of a quarter.
        keep: how many buckets are kept ready.
        recorder: what records, in place of CUDA graphs (for tests), or to share memory with other steps.

    Attributes:
        mode: resolved.
        reason: why steps are called instead, where preparing one failed.

    Not supported: graphs spread over processes, and operators that ask for the lattice in crystals; see
    :meth:`can_serve`.
    """

    def __init__(
        self,
        step: Step,
        mode: str = "auto",
        *,
        data: DeviceData | None = None,
        buckets: Buckets | None = None,
        keep: int = 8,
        recorder: Recorder | None = None,
    ) -> None:
        self.step, self.potential, self.data = step, step.potential, data
        self.mode = resolve_mode(mode, self.potential.device, recorder)
        self.buckets = buckets or Buckets()
        self.reason: str | None = None
        self._recorder = recorder
        self._steps: StepCache[_Prepared] = StepCache(keep, step.what)
        self._state: Hashable = None
        # steps with attention between all atoms hold for one list of systems
        self._by_sizes = declares(self.potential, "needs_system_sizes")
        self._asks_for_lattice = declares(self.potential, "asks_for_the_lattice")
        self._scale = torch.ones((), device=self.potential.device)

    @property
    def made(self) -> int:
        """Steps that were prepared so far."""
        return self._steps.made

    def can_serve(self, batch: Batch) -> bool:
        """Whether a step of this batch can be prepared."""
        if self.mode == "eager" or self.reason is not None:
            return False
        if not isinstance(batch, Graph):
            return not (self._asks_for_lattice and self._data.periodic)
        return batch.share is None and bool(batch.num_atoms) and not (self._asks_for_lattice and batch.is_periodic)

    def __call__(self, batch: Batch, scale: Tensor | None = None) -> Any:
        """What the step gives for a batch, ghosts included; overwritten by the next call.

        Args:
            batch: frames of the data, or a graph on any device.
            scale: of the loss ``[]``.
        """
        if scale is None:
            self._scale.fill_(1.0)
        else:
            self._scale.copy_(scale, non_blocking=True)
        real = Sizes.of(batch) if isinstance(batch, Graph) else self._data.sizes(batch)
        if not self.can_serve(batch):
            return self._called(batch, real.with_ghosts())  # no step is kept, so no padding is needed
        sizes = self.buckets.choose(real)
        state = weights_state(self.potential)
        if state != self._state:
            self._steps.clear()
            self._state = state
        given = self._known(batch) if isinstance(batch, Graph) else batch
        try:
            prepared = self._steps.get(self._key(given, sizes), lambda: self._make(given, sizes))
        except Exception as error:
            self._give_up(error)
            return self._called(batch, sizes)
        prepared.write(given)
        return prepared.run()

    def static(self, graph: Graph, warm_up: int = 3) -> Callable[[], Any]:
        """The step of one graph whose tensors the caller changes in place (and whose topology he refreshes).

        Args:
            graph: with a static topology, or with edges that never change.
            warm_up: calls before the recording.

        Returns:
            A function that gives the outputs for the present contents, overwritten by the next call.
        """

        def called() -> Any:
            return self.step(graph, self._scale)

        if not self.can_serve(graph):
            return called
        device, what = self.potential.device, self.step.what
        run = record(called, device=device, what=what, recorder=self._recording(), warm_up=warm_up)
        self.reason = run.reason
        return run

    # ------------------------------------------------------------------------------------------------------ inside

    @property
    def _data(self) -> DeviceData:
        if self.data is None:
            raise ValueError("batches named by frames need their data on the device")
        return self.data

    def _known(self, graph: Graph) -> Graph:
        """The graph on the device with everything that a step would otherwise have to ask for.

        Raises:
            ValueError: an element that the potential does not know.
        """
        topology = graph.prepared()
        if graph.numbers.device.type == "cpu" and topology.real is None:
            self.potential.check_elements(graph.numbers)
        if len(self.potential.elements) > MANY_ELEMENTS and graph.num_systems == 1 and topology.composition is None:
            found, counts = graph.numbers.unique(return_counts=True)
            topology.composition = tuple(zip(found.tolist(), counts.tolist()))
        return replace(graph, config_type=()).to(self.potential.device)

    def _key(self, batch: Batch, sizes: Sizes) -> Hashable:
        if not isinstance(batch, Graph):
            return sizes, self._data.layout(batch, sizes) if self._by_sizes else None
        known = batch.prepared()
        formats = tuple((name, value.dtype) for name, value in tensors_of(batch).items())
        return sizes, known.sizes if self._by_sizes else None, known.is_periodic, known.composition, formats

    def _padded(self, graph: Graph, sizes: Sizes) -> Graph:
        return pad_graph(graph, sizes, number=self.potential.elements[0], cutoff=self.potential.cutoff)

    def _source(self, batch: Batch, sizes: Sizes) -> tuple[Callable[[Batch], None], Callable[[], Graph]]:
        """How a batch is written, and how its graph is made of what was written (inside the step)."""
        if isinstance(batch, Graph):
            buffers = GraphBuffers(self._padded(batch, sizes))

            def follow(new: Batch) -> None:
                assert isinstance(new, Graph)
                buffers.follow(new, lambda: self._padded(new, sizes))

            return follow, lambda: buffers.graph
        data, layout = self._data, self._data.layout(batch, sizes) if self._by_sizes else None
        frames = data.indices(batch, sizes).to(data.device)

        def write(new: Batch) -> None:
            frames.copy_(data.indices(new, sizes), non_blocking=True)  # type: ignore[arg-type]

        return write, lambda: data.batch(frames, sizes, layout)

    def _called(self, batch: Batch, sizes: Sizes) -> Any:
        given = self._known(batch) if isinstance(batch, Graph) else batch
        _, graph = self._source(given, sizes)
        return self.step(graph(), self._scale)

    def _make(self, batch: Batch, sizes: Sizes) -> _Prepared:
        write, graph = self._source(batch, sizes)

        def called() -> Any:
            return self.step(graph(), self._scale)

        expected = called()
        run = record(called, device=self.potential.device, what=self.step.what, recorder=self._recording())
        self.reason = run.reason  # where there is one, it has been said
        if not run.eager and not self.step.draws:
            self.step.check(run(), expected)
        return _Prepared(write, run)

    def _recording(self) -> Recorder | None:
        if self._recorder is None and self.potential.device.type == "cuda":
            self._recorder = CudaRecorder(self.potential.device)
        return self._recorder

    def _give_up(self, error: Exception) -> None:
        self.reason = first_line(error)
        self._steps.clear()
        what = "gives other results" if isinstance(error, MismatchError) else "cannot be prepared"
        say(
            f"{self.step.what}, recorded, {what} ({self.reason}); it is called instead. execution=eager does so without"
            " trying"
        )


class _Ready(torch.autograd.Function):
    """A loss whose gradients are known: its backward hands them out."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        # new tensors: the next replay overwrites the given ones
        given = [gradient.to(gradient.dtype) for gradient in ctx.gradients]
        by_format: dict[torch.dtype, list[int]] = {}
        for place, gradient in enumerate(given):
            by_format.setdefault(gradient.dtype, []).append(place)
        out: list[Tensor] = list(given)
        for dtype, places in by_format.items():
            scaled = torch._foreach_mul([given[place] for place in places], cotangent.to(dtype))
            for place, value in zip(places, scaled):
                out[place] = value
        return None, None, *out


def with_gradients(found: LossAndGradients, weights: Sequence[nn.Parameter], scale: Tensor | None = None) -> Tensor:
    """The (scaled) loss ``[]``, whose ``backward`` gives every weight the gradient that was worked out with it.

    So optimisers, gradient scaling, accumulation over batches and sums over processes need not know of prepared steps.
    """
    loss = found.loss if scale is None else found.loss * scale.to(found.loss.dtype)
    used = [(weight, gradient) for weight, gradient in zip(weights, found.gradients) if gradient is not None]
    ready: Tensor = _Ready.apply(loss, [gradient for _, gradient in used], *(weight for weight, _ in used))
    return ready


# --------------------------------------------------------------------------------------------------------- a potential


class Runner:
    """Energies, forces and stresses of graphs of any size; see :mod:`steradian.execution.steps`.

    Args:
        potential: weights may change between calls, in place; its device, format or training mode too.
        mode: ``auto`` (recorded on a GPU, called elsewhere), ``eager`` or ``cuda_graph``.
        forces, stress: what to give.
        buckets: sizes; None for steps of a quarter.
        keep: how many steps are kept ready.
        recorder: what records, in place of CUDA graphs (for tests).

    Not supported: graphs spread over processes, and what EFA does in crystals (it asks for the lattice); for both the
    potential is called as it is.
    """

    def __init__(
        self,
        potential: Potential,
        mode: str = "auto",
        *,
        forces: bool = True,
        stress: bool = False,
        buckets: Buckets | None = None,
        keep: int = 8,
        recorder: Recorder | None = None,
    ) -> None:
        self.potential, self._options = potential, {"forces": forces, "stress": stress}
        self._steps = Steps(
            PredictionStep(potential, **self._options), mode, buckets=buckets, keep=keep, recorder=recorder
        )

    @property
    def mode(self) -> str:
        """``eager`` or ``cuda_graph``."""
        return self._steps.mode

    @property
    def reason(self) -> str | None:
        """Why the potential is called as it is, where preparing a step failed."""
        return self._steps.reason

    def __call__(self, graph: Graph) -> Prediction:
        """Predict a batch of any size; new tensors. In training mode the derivatives cannot be differentiated again."""
        if not self._steps.can_serve(graph):
            return self.potential(graph.to(self.potential.device), **self._options)
        found, _ = self._steps(graph)
        return real_part(found, Sizes.of(graph))

    def static(self, graph: Graph, warm_up: int = 3) -> Callable[[], Prediction]:
        """A function of the present contents of a graph that the caller changes in place; see :meth:`Steps.static`."""
        run = self._steps.static(graph, warm_up)
        return lambda: run()[0]
