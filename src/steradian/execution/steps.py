"""Steps over batches of a data set: loss and gradients of all weights, or predictions to validate, prepared once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from steradian.compiler.capture import static_step
from steradian.execution.buffers import GraphBuffers, StepCache, tensors_of, with_tensors
from steradian.execution.check import MismatchError, check_gradients, check_loss, check_prediction, weights_state
from steradian.execution.dataset import DeviceData
from steradian.execution.graphs import CudaRecorder, Recorded, Recorder, first_line, map_tensors, record, say
from steradian.execution.padding import Buckets, Sizes, pad_graph
from steradian.execution.runner import Mode, kernels_of, prepared
from steradian.execution.trace import compile_step, named_state
from steradian.graph import Graph, Prediction
from steradian.operators.base import GlobalMixer
from steradian.potential import Potential

__all__ = ["BatchSteps", "GradientStep", "PredictionStep", "with_gradients"]

Batch = Graph | Sequence[int]
"""A batch: indices of frames of the data on the device, or a graph."""


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

    @property
    def names(self) -> list[str]:
        """The trained weights."""
        return [name for name, weight in self.potential.named_parameters() if weight.requires_grad]

    def __call__(self, graph: Graph, scale: Tensor, state: dict[str, Tensor] | None = None) -> LossAndGradients:
        """The step on a graph; with other weights than the potential's own where a state is given.

        Gradients are taken by tensors made here that share the memory of the weights: autograd binds a weight to the
        stream where it was used first, and a recording must not touch other streams.
        """
        potential = self.potential
        state = named_state(potential) if state is None else state
        with torch.enable_grad(), potential.policy.matrix_units():
            weights = {name: state[name].detach().requires_grad_() for name in self.names}
            prediction = torch.func.functional_call(potential, {**state, **weights}, (graph,), self.options)
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


class PredictionStep:
    """Prediction of a batch and the padded graph itself, whose labels it is compared with."""

    what = "the validation step"
    draws = False

    def __init__(self, potential: Potential, *, forces: bool, stress: bool) -> None:
        self.potential = potential
        self.options = {"forces": forces, "stress": stress}

    def __call__(
        self, graph: Graph, scale: Tensor, state: dict[str, Tensor] | None = None
    ) -> tuple[Prediction, dict[str, Tensor]]:
        """Prediction, and energy, forces, stress and numbers of the batch."""
        with torch.enable_grad():
            if state is None:
                prediction = self.potential(graph, **self.options)
            else:
                prediction = torch.func.functional_call(self.potential, state, (graph,), self.options)
        kept = {name: value for name, value in tensors_of(graph).items() if name in ("energy", "forces", "stress")}
        found: Prediction = map_tensors(Tensor.detach, prediction)
        return found, {"numbers": graph.numbers, **kept}

    def check(self, found: Any, expected: Any) -> None:
        """Raises MismatchError where the two differ by more than rounding."""
        check_prediction(found[0], expected[0], self.potential.policy)


@dataclass
class _Prepared:
    """A step of one bucket: how a batch is written into it, and how it is run."""

    write: Callable[[Batch], None]
    run: Recorded[Any]


class BatchSteps:
    """Runs a step over batches, recorded or compiled once per bucket.

    Args:
        step: what is run.
        data: on the device, for batches named by frames; None: batches are graphs.
        mode: ``eager``, ``compile`` or ``cuda_graph``.
        buckets: sizes of padded batches.
        keep: how many buckets are kept ready.
        recorder: for tests, or to share memory with other steps; None makes one on a GPU.
        backend: compiler, a name of ``torch.compile``.

    Attributes:
        reason: why steps are called instead, where preparing one failed.
    """

    def __init__(
        self,
        step: GradientStep | PredictionStep,
        data: DeviceData | None,
        mode: Mode,
        *,
        buckets: Buckets | None = None,
        keep: int = 8,
        recorder: Recorder | None = None,
        backend: str = "inductor",
    ) -> None:
        self.step, self.data, self.mode, self.backend = step, data, mode, backend
        self.potential = step.potential
        self.buckets = buckets or Buckets()
        self.reason: str | None = None
        self._recorder = recorder
        self._steps: StepCache[_Prepared] = StepCache(keep, step.what)
        self._state: Any = None
        self._by_layout = any(isinstance(module, GlobalMixer) for module in self.potential.modules())
        self._scale = torch.ones((), device=self.potential.device)

    def __call__(self, batch: Batch, scale: Tensor | None = None) -> Any:
        """What the step gives for a batch; overwritten by the next call.

        Args:
            batch: frames of the data, or a graph on any device.
            scale: of the loss ``[]``.
        """
        if scale is None:
            self._scale.fill_(1.0)
        else:
            self._scale.copy_(scale, non_blocking=True)
        real = Sizes.of(batch) if isinstance(batch, Graph) else self._data.sizes(batch)
        if not self._can_serve(batch):
            return self._called(batch, real.with_ghosts())  # no step is kept, so no padding is needed
        sizes = self.buckets.choose(real)
        state = weights_state(self.potential)
        if state != self._state:
            self._steps.clear()
            self._state = state
        try:
            prepared_step = self._steps.get(self._key(batch, sizes), lambda: self._make(batch, sizes))
        except Exception as error:
            self._give_up(error)
            return self._called(batch, sizes)
        prepared_step.write(batch)
        return prepared_step.run()

    # ------------------------------------------------------------------------------------------------------ inside

    def _can_serve(self, batch: Batch) -> bool:
        """Attention between all atoms of a crystal asks for the lattice, so it cannot be recorded."""
        if self.mode == "eager" or self.reason is not None:
            return False
        return not (self._by_layout and (batch.is_periodic if isinstance(batch, Graph) else self._data.periodic))

    @property
    def _data(self) -> DeviceData:
        if self.data is None:
            raise ValueError("batches named by frames need their data on the device")
        return self.data

    def _key(self, batch: Batch, sizes: Sizes) -> Any:
        if isinstance(batch, Graph):
            layout = tuple(batch.atoms_per_system.tolist()) if self._by_layout else None
            return sizes, layout, tuple(tensors_of(batch)), batch.is_periodic
        return sizes, self._data.layout(batch, sizes) if self._by_layout else None

    def _padded(self, batch: Graph, sizes: Sizes) -> Graph:
        if self._by_layout and batch.layout is None:
            batch = replace(batch, layout=tuple(batch.atoms_per_system.tolist()))
        graph = prepared(replace(batch, config_type=()), self.potential)
        return pad_graph(graph, sizes, number=self.potential.elements[0], cutoff=self.potential.cutoff)

    def _source(self, batch: Batch, sizes: Sizes) -> tuple[Callable[[Batch], None], Callable[[], Graph]]:
        """How a batch is written, and how its graph is made of what was written (inside the step)."""
        if isinstance(batch, Graph):
            buffers = GraphBuffers(self._padded(batch, sizes))

            def follow(new: Batch) -> None:
                assert isinstance(new, Graph)
                buffers.follow(new, lambda: self._padded(new, sizes))

            return follow, lambda: buffers.graph
        data, layout = self._data, self._data.layout(batch, sizes) if self._by_layout else None
        frames = data.indices(batch, sizes).to(data.device)

        def write(new: Batch) -> None:
            frames.copy_(data.indices(new, sizes), non_blocking=True)  # type: ignore[arg-type]

        return write, lambda: data.batch(frames, sizes, layout)

    def _run(self, graph: Graph) -> Any:
        with kernels_of(self.potential.device), static_step():
            return self.step(graph, self._scale)

    def _called(self, batch: Batch, sizes: Sizes) -> Any:
        _, graph = self._source(batch, sizes)
        return self._run(graph())

    def _make(self, batch: Batch, sizes: Sizes) -> _Prepared:
        write, graph = self._source(batch, sizes)
        expected = self._run(graph())

        def called() -> Any:
            return self._run(graph())

        function = called if self.mode == "cuda_graph" else self._compiled(graph(), graph)
        if self.mode == "compile":
            self.step.check(function(), expected)
        run = record(function, device=self.potential.device, what=self.step.what, recorder=self._recording())
        if run.reason is not None and self.mode == "cuda_graph":
            self.reason = run.reason  # it has been said
        if not run.eager and not self.step.draws:
            self.step.check(run(), expected)
        return _Prepared(write, run)

    def _compiled(self, example: Graph, graph: Callable[[], Graph]) -> Callable[[], Any]:
        if self.step.draws:
            raise MismatchError("dropout draws other numbers in every call, so a compiled step cannot be checked")

        def step(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> Any:
            given = dict(inputs)
            scale = given.pop("scale")
            return self.step(with_tensors(example, given), scale, state)

        inputs = {**tensors_of(example), "scale": self._scale}
        with kernels_of(self.potential.device):
            run = compile_step(step, self.potential, inputs, backend=self.backend)
        return lambda: run({**tensors_of(graph()), "scale": self._scale})

    def _recording(self) -> Recorder | None:
        if self._recorder is None and self.potential.device.type == "cuda":
            self._recorder = CudaRecorder(self.potential.device)
        return self._recorder

    def _give_up(self, error: Exception) -> None:
        self.reason = first_line(error)
        self._steps.clear()
        what = "gives other results" if isinstance(error, MismatchError) else "cannot be prepared"
        say(
            f"{self.step.what}, {'compiled' if self.mode == 'compile' else 'recorded'}, {what} ({self.reason});"
            " it is called instead. training.execution=eager does so without trying"
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
