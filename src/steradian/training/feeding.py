"""Frames, the batches of an epoch from any position on, and the thread that makes them ahead of a device."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from steradian.graph import Graph, batch_graphs
from steradian.graph.batches import BatchSampler, GraphDataset

__all__ = ["Batch", "TrainingData", "prefetched", "to_device"]

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
