"""A potential called through steps that are prepared once per size of the input."""

from __future__ import annotations

from collections.abc import Callable

from steradian.execution.graphs import Recorder
from steradian.execution.padding import Buckets, Sizes, real_part
from steradian.execution.steps import PredictionStep, Steps
from steradian.graph import Graph, Prediction
from steradian.potential import Potential

__all__ = ["Runner"]


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
