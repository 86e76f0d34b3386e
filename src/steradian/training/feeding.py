"""Frames and the batches of an epoch from any position on, made ahead of a device; and steps prepared for it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from steradian.config import TrainingConfig
from steradian.execution.backend_benchmark import prepare_backend
from steradian.execution.batches import Buckets, DeviceData, Sizes, room_for
from steradian.execution.recording import CudaRecorder, Recorder, say
from steradian.execution.steps import GradientStep, PredictionStep, Steps, resolve_mode, with_gradients
from steradian.graph import Graph, Prediction, batch_graphs
from steradian.graph.batches import BatchSampler, GraphDataset
from steradian.potential import Potential
from steradian.training.optimisation import Loss, labels_in_use

if TYPE_CHECKING:
    from steradian.graph.batches import BatchSampler, GraphDataset

__all__ = [
    "Batch",
    "Pipeline",
    "TrainingData",
    "make_pipeline",
    "prefetched",
    "to_device",
    "uses_pipeline",
]

SHOWN_FRAMES = 8


@dataclass(frozen=True)
class Batch:
    """A graph and the index of each of its systems in their set.

    The graph is None where the data are on the device, and the batch is gathered there from its frames.
    """

    graph: Graph | None
    frames: tuple[int, ...]


@dataclass
class TrainingData:
    """The batches of one process.

    Attributes:
        train, validation: graphs.
        train_sampler, validation_sampler: the batches of this process.
        frame_names: name of each training frame, for messages.
        on_device: where the data are: None, batches are made here; ``named``, they are on the device, and batches are
            their frames; a device, batches are made ahead and copied there.
    """

    train: GraphDataset
    validation: GraphDataset
    train_sampler: BatchSampler
    validation_sampler: BatchSampler
    frame_names: list[str] = field(default_factory=list)
    on_device: torch.device | Literal["named"] | None = None

    def training_batches(self, epoch: int, start: int = 0) -> Generator[Batch]:
        """The batches of an epoch (finished epochs before it) from the one with index ``start`` on."""
        return self._batches(self.train, self.train_sampler.batches(epoch)[start:])

    def validation_batches(self) -> Generator[Batch]:
        """All validation batches; none where there are fewer than processes."""
        return self._batches(self.validation, self.validation_sampler.batches(0))

    def name_frames(self, batch: Batch) -> str:
        """Words for the training frames of a batch."""
        names = [self.frame_names[index] for index in batch.frames]
        more = f" and {len(names) - SHOWN_FRAMES} more" if len(names) > SHOWN_FRAMES else ""
        kinds = sorted({kind for kind in (self.train.structures[frame].config_type for frame in batch.frames) if kind})
        kind = f" (config_type {', '.join(kinds[:SHOWN_FRAMES])})" if kinds else ""
        return f"training frames {', '.join(names[:SHOWN_FRAMES])}{more}{kind}"

    def _batches(self, graphs: GraphDataset, plan: Sequence[Sequence[int]]) -> Generator[Batch]:
        place = self.on_device
        if place == "named":
            yield from (Batch(None, tuple(frames)) for frames in plan)
            return

        def made(frames: Sequence[int]) -> Graph:
            return batch_graphs([graphs[index] for index in frames])

        if place is None:
            yield from (Batch(made(frames), tuple(frames)) for frames in plan)
            return
        stream = torch.cuda.Stream(place) if place.type == "cuda" else None

        def make(number: int) -> Batch:
            return Batch(to_device(made(plan[number]), place, stream), tuple(plan[number]))

        yield from prefetched(make, len(plan))


def prefetched(make: Callable[[int], Any], count: int, ahead: int = 2) -> Generator[Any]:
    """``make(0), make(1), ...``, made by a thread that is at most ``ahead`` of whoever takes them.

    An error in the thread is raised where its batch is taken. Leaving the loop early ends the thread.
    """
    line: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=max(1, ahead))
    stopped = threading.Event()

    def work() -> None:
        for index in range(count):
            try:
                item = (True, make(index))
            except BaseException as error:
                item = (False, error)
            while not stopped.is_set():
                try:
                    line.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if stopped.is_set() or not item[0]:
                return

    thread = threading.Thread(target=work, daemon=True, name="batches")
    thread.start()
    try:
        for _ in range(count):
            good, item = line.get()
            if not good:
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


def to_device(graph: Graph, device: torch.device, stream: Any = None) -> Graph:
    """The graph with its pairs on the device; copied from pinned memory on a stream of its own, which is waited for.

    Args:
        stream: ``torch.cuda.Stream`` to copy on; None copies as usual.
    """
    graph.prepared()
    if device.type != "cuda" or stream is None:
        return graph.to(device)
    pinned = graph.mapped(lambda value: value.pin_memory())
    with torch.cuda.device(device), torch.cuda.stream(stream):
        moved = pinned.mapped(lambda value: value.to(device, non_blocking=True))
        # this thread waits, not the one that trains; the copy is then complete for every stream
        stream.synchronize()
    return moved


# ------------------------------------------------------------------------------------------------------ prepared steps


LOOK_AHEAD = 5
"""Epochs whose batches decide about the sizes of buckets."""


def uses_pipeline(config: TrainingConfig, device: torch.device) -> bool:
    """Whether steps are prepared; on a CPU only where it is asked for."""
    return device.type == "cuda" or resolve_mode(config.execution, device) != "eager"


class Pipeline:
    """Training and validation steps of a run.

    Args:
        potential: on its device.
        config: the training section.
        train, validation: what the steps run over; see :class:`~steradian.execution.steps.Steps`.

    Attributes:
        on_device: whether the data are on the device, so that batches are named by their frames.
    """

    def __init__(
        self,
        potential: Potential,
        config: TrainingConfig,
        train: tuple[DeviceData | None, Buckets],
        validation: tuple[DeviceData | None, Buckets],
        mode: str,
        recorder: Recorder | None = None,
    ) -> None:
        labels, loss = labels_in_use(config.loss), Loss(config.loss)
        wanted = {"forces": "forces" in labels, "stress": "stress" in labels}

        def total(prediction: Prediction, graph: Graph) -> Tensor:
            return loss(prediction, graph).total

        self.potential = potential
        self.on_device = train[0] is not None
        self._train = Steps(
            GradientStep(potential, total, **wanted), mode, data=train[0], buckets=train[1], recorder=recorder
        )
        self._validation = Steps(
            PredictionStep(potential, **wanted), mode, data=validation[0], buckets=validation[1], recorder=recorder
        )

    def loss(self, batch: Batch, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The (scaled) loss of a batch, ready for ``backward``, and the plain one; new tensors.

        Args:
            scale: ``[]`` factor on the loss, for gradients in float16.
        """
        found = self._train(_named(batch), scale)
        weights = [weight for weight in self.potential.parameters() if weight.requires_grad]
        return with_gradients(found, weights, scale), found.loss.clone()

    def predict(self, batch: Batch) -> tuple[Prediction, dict[str, Tensor]]:
        """Prediction of a batch and its labels, ghosts included; overwritten by the next call."""
        found: tuple[Prediction, dict[str, Tensor]] = self._validation(_named(batch))
        return found


def _named(batch: Batch) -> Graph | Sequence[int]:
    return batch.frames if batch.graph is None else batch.graph


def make_pipeline(
    potential: Potential, config: TrainingConfig, data: TrainingData, recorder: Recorder | None = None
) -> Pipeline:
    """The pipeline of a run: choose kernels, put the data on the device where they fit, choose buckets.

    Args:
        potential: on its device.
        config: the training section.
        data: of the run.
        recorder: for tests.
    """
    device = potential.device
    mode = "cuda_graph" if recorder is not None else resolve_mode(config.execution, device)
    first = data.train_sampler.batches(0)[0]
    example = batch_graphs([data.train[index] for index in first])
    prepare_backend(potential.train(), example, training=True)
    if recorder is None and device.type == "cuda":
        recorder = CudaRecorder(device)  # one memory for all steps: they never run at the same time
    kept = _on_device(potential, data, device)
    train = _buckets(data.train, data.train_sampler, range(LOOK_AHEAD))
    validation = _buckets(data.validation, data.validation_sampler, range(1))
    return Pipeline(potential, config, (kept[0], train), (kept[1], validation), mode, recorder)


def _on_device(
    potential: Potential, data: TrainingData, device: torch.device
) -> tuple[DeviceData | None, DeviceData | None]:
    """Training and validation data, or None where they do not fit."""
    options: dict[str, Any] = {"number": potential.elements[0], "cutoff": potential.cutoff}
    found = [DeviceData(part, "cpu", **options) for part in (data.train, data.validation)]  # type: ignore[arg-type]
    size = sum(part.num_bytes for part in found)
    if not room_for(size, device):
        say(
            f"the data take {_spelled(size)}, too much for the memory of {device}: batches are made on the host and"
            " copied while the device works"
        )
        return None, None
    if device.type == "cuda":
        say(f"the data ({_spelled(size)}) are on {device}")
    return found[0].to(device), found[1].to(device)


def _spelled(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:.1f} GiB"


def _buckets(graphs: GraphDataset, sampler: BatchSampler, epochs: range) -> Buckets:
    """Buckets for the batches of some epochs."""
    atoms, edges = graphs.num_atoms, graphs.num_edges
    plans = [batch for epoch in epochs for batch in sampler.batches(epoch)] or [[0]]
    return Buckets.for_batches(Sizes(int(atoms[batch].sum()), int(edges[batch].sum()), len(batch)) for batch in plans)
