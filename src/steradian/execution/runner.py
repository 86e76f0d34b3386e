"""Energies, forces and stresses of a potential as one compiled or recorded step per size of the input."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from steradian.compiler.capture import static_step
from steradian.execution.buffers import GraphBuffers, StepCache, tensors_of, with_tensors
from steradian.execution.check import MismatchError, check_prediction, weights_state
from steradian.execution.graphs import CudaRecorder, Recorded, Recorder, first_line, record, say
from steradian.execution.padding import Buckets, Sizes, pad_graph, real_part
from steradian.graph import Graph, Prediction
from steradian.graph.pairs import with_pairs
from steradian.operators.base import GlobalMixer
from steradian.polynomials import use_backend
from steradian.potential import Potential

__all__ = ["Mode", "Runner", "StaticStep", "prepared", "resolve_mode"]

Mode = Literal["auto", "eager", "compile", "cuda_graph"]
MANY_ELEMENTS = 8
"""Above so many elements, maps per element run element by element, and a step holds for one composition."""


def resolve_mode(mode: str, device: torch.device) -> Mode:
    """How to run on a device: ``auto`` records on a GPU and calls elsewhere.

    Raises:
        ValueError: an unknown mode, or ``cuda_graph`` without a GPU.
    """
    mode = mode.replace("-", "_")
    if mode not in get_args(Mode):
        raise ValueError(f"execution '{mode}' is not known; choose {', '.join(get_args(Mode))}")
    if mode == "auto":
        return "cuda_graph" if device.type == "cuda" else "eager"
    if mode == "cuda_graph" and device.type != "cuda":
        raise ValueError("execution 'cuda_graph' needs a GPU; choose auto, eager or compile")
    return mode  # type: ignore[return-value]


def tell_of_compiling(mode: Mode, device: torch.device) -> None:
    """Say what compiling means on a CPU."""
    if mode == "compile" and device.type == "cpu":
        say("compiling on a CPU traces the plain PyTorch kernels; execution=eager runs machine code of our own")


def prepared(graph: Graph, potential: Potential, pairs: bool = True) -> Graph:
    """The graph with everything that a step would otherwise have to ask the device for; on the potential's device.

    Best given a graph on the CPU.

    Args:
        pairs: look for pairs of opposite edges, so that radial weights are computed once for both.

    Raises:
        ValueError: an element that the potential does not know.
    """
    if graph.numbers.device.type == "cpu" and graph.real is None:
        potential.check_elements(graph.numbers)
    if graph.periodic is None:
        graph = replace(graph, periodic=graph.is_periodic)
    if pairs:
        graph = with_pairs(graph)
    if len(potential.elements) > MANY_ELEMENTS and graph.composition is None and graph.num_systems == 1:
        found, counts = graph.numbers.unique(return_counts=True)
        graph = replace(graph, composition=tuple(zip(found.tolist(), counts.tolist())))
    return graph.to(potential.device)


def kernels_of(device: torch.device) -> AbstractContextManager[None]:
    """On a CPU the plain kernels: machine code sorts its rows by the contents of an index, once for each tensor."""
    return use_backend("reference") if device.type == "cpu" else nullcontext()


class StaticStep:
    """Evaluates one padded graph whose tensors are changed in place between calls.

    Attributes:
        graph: the graph.
        run: the recorded step.
    """

    def __init__(self, graph: Graph, run: Recorded[Prediction]) -> None:
        self.graph, self.run = graph, run

    def __call__(self) -> Prediction:
        """Prediction for the present contents, ghosts included; overwritten by the next call."""
        return self.run()


class Runner:
    """Calls a potential through steps that are prepared once per size of the input.

    A graph is filled up to a bucket (:mod:`~steradian.execution.padding`); the step of the bucket is recorded as a CUDA
    graph (``cuda_graph``), compiled first (``compile``), or called (``eager``). On its first use a step is checked
    against the potential on the same graph; where it cannot be made or does not pass, one line says why and the
    potential is called as it is from then on.

    Args:
        potential: weights may change between calls, in place; its device, format or training mode too (steps are made
            anew then).
        mode: ``auto``, ``eager``, ``compile`` or ``cuda_graph``.
        forces, stress: what to give.
        buckets: sizes; None for steps of a quarter.
        keep: how many steps are kept ready.
        pairs: share radial weights between the two edges of a pair.
        recorder: what records, in place of CUDA graphs (for tests).
        backend: compiler, a name of ``torch.compile``.

    Not supported: graphs spread over processes, and what EFA does in crystals (it asks for the lattice); both are
    called.
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
        pairs: bool = True,
        recorder: Recorder | None = None,
        backend: str = "inductor",
    ) -> None:
        self.potential, self.forces, self.stress = potential, forces, stress
        self.mode: Mode = "cuda_graph" if recorder is not None and mode == "auto" else _mode(mode, potential, recorder)
        self.buckets, self.pairs, self.backend = buckets or Buckets(), pairs, backend
        self.reason: str | None = None
        self._recorder = recorder
        self._steps: StepCache[tuple[GraphBuffers, Recorded[Prediction]]] = StepCache(keep, "energies and forces")
        self._state: Hashable = None
        self._by_layout = any(isinstance(module, GlobalMixer) for module in potential.modules())
        tell_of_compiling(self.mode, potential.device)

    def __call__(self, graph: Graph) -> Prediction:
        """Predict a batch of any size; new tensors. In training mode the derivatives cannot be differentiated again."""
        if not self._can_serve(graph):
            return self._called(graph)
        self._follow()
        # steps with attention between all atoms hold for one list of systems
        if self._by_layout and graph.layout is None:
            graph = replace(graph, layout=tuple(graph.atoms_per_system.tolist()))
        graph = prepared(graph, self.potential, self.pairs)
        real = Sizes.of(graph)
        host = (graph.layout, graph.periodic, graph.composition)
        key = (self.buckets.choose(real), host, tuple(tensors_of(graph)), _formats(graph))
        try:
            buffers, step = self._steps.get(key, lambda: self._make(self.padded(graph), real))
        except Exception as error:
            self._give_up(error)
            return self._called(graph)
        buffers.follow(graph, lambda: self.padded(graph))
        return real_part(step(), real)

    def padded(self, graph: Graph) -> Graph:
        """A (prepared) graph filled up to its bucket."""
        sizes = self.buckets.choose(Sizes.of(graph))
        return pad_graph(graph, sizes, number=self.potential.elements[0], cutoff=self.potential.cutoff)

    def static(self, graph: Graph, warm_up: int = 3) -> StaticStep:
        """The step of one padded graph; its tensors stay those of the caller, who changes them in place.

        Args:
            graph: prepared and padded (:func:`prepared`, :meth:`padded`), or unpadded with edges that never change.
            warm_up: calls before the recording.
        """
        function = self.function(graph)
        if self.mode == "eager" or self.reason is not None:
            return StaticStep(graph, Recorded(function, eager=True))
        run = record(
            function,
            device=self.potential.device,
            what="the step of energies and forces",
            recorder=self._recording(),
            warm_up=warm_up,
        )
        return StaticStep(graph, run)

    def function(self, graph: Graph) -> Callable[[], Prediction]:
        """A function of the graph's present contents: compiled where asked, not recorded.

        It can be part of a larger step that the caller records (:func:`~steradian.execution.graphs.record`).
        """
        if self.mode == "compile" and self.reason is None and self._can_serve(graph):
            try:
                return self._compiled(graph)
            except Exception as error:
                self._give_up(error)
        return lambda: self._evaluate(graph)

    # ------------------------------------------------------------------------------------------------------ inside

    def _evaluate(self, graph: Graph) -> Prediction:
        with kernels_of(self.potential.device), static_step():
            return _free(self.potential(graph, forces=self.forces, stress=self.stress))

    def _called(self, graph: Graph) -> Prediction:
        return self.potential(graph.to(self.potential.device), forces=self.forces, stress=self.stress)

    def _can_serve(self, graph: Graph) -> bool:
        if self.mode == "eager" or self.reason is not None or graph.share is not None or not graph.num_atoms:
            return False
        return not (self._by_layout and graph.is_periodic)

    def _follow(self) -> None:
        """Forget the steps if the potential is not what they were made for."""
        state = weights_state(self.potential)
        if state != self._state:
            self._steps.clear()
            self._state = state

    def _make(self, padded: Graph, real: Sizes) -> tuple[GraphBuffers, Recorded[Prediction]]:
        buffers = GraphBuffers(padded)
        expected = real_part(self._evaluate(padded), real)
        run = self.static(buffers.graph).run
        if run.reason is not None and self.mode == "cuda_graph":
            self.reason = run.reason  # it has been said
        if not run.eager:
            check_prediction(real_part(run(), real), expected, self.potential.policy)
        return buffers, run

    def _compiled(self, graph: Graph) -> Callable[[], Prediction]:
        from steradian.execution.trace import compile_step

        potential, options = self.potential, {"forces": self.forces, "stress": self.stress}

        def step(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> Prediction:
            given = with_tensors(graph, inputs)
            return _free(torch.func.functional_call(potential, state, (given,), options))

        expected = self._evaluate(graph)  # and whatever is made on first use
        with kernels_of(potential.device):
            run = compile_step(step, potential, tensors_of(graph), backend=self.backend)
        function = lambda: run(tensors_of(graph))  # noqa: E731
        check_prediction(function(), expected, potential.policy)
        return function

    def _recording(self) -> Recorder | None:
        if self._recorder is None and self.potential.device.type == "cuda":
            self._recorder = CudaRecorder(self.potential.device)
        return self._recorder

    def _give_up(self, error: Exception) -> None:
        self.reason = first_line(error)
        what = "gives other results" if isinstance(error, MismatchError) else "cannot be prepared"
        say(
            f"the {'compiled' if self.mode == 'compile' else 'recorded'} step of energies and forces {what}"
            f" ({self.reason}); the potential is called instead. execution=eager does so without trying"
        )


def _formats(graph: Graph) -> tuple[torch.dtype, ...]:
    return tuple(value.dtype for value in tensors_of(graph).values())


def _mode(mode: str, potential: Potential, recorder: Recorder | None) -> Mode:
    if recorder is not None and mode.replace("-", "_") == "cuda_graph":
        return "cuda_graph"
    return resolve_mode(mode, potential.device)


def _free(prediction: Prediction) -> Prediction:
    from steradian.execution.graphs import map_tensors

    found: Prediction = map_tensors(Tensor.detach, prediction)
    return found
