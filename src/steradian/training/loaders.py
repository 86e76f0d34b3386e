"""Batches of an epoch for Lightning, from any position on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch

from steradian.graph import Graph, batch_graphs
from steradian.training.prefetch import prefetched, to_device
from steradian.training.state import Position

if TYPE_CHECKING:
    from steradian.graph.batches import BatchSampler, GraphDataset

__all__ = ["Batch", "GraphBatches", "TrainingData"]

SHOWN_FRAMES = 8


@dataclass(frozen=True)
class Batch:
    """A graph and the index of each of its systems in their set; ``counts`` is off for a batch that only keeps step.

    The graph is None where the data are on the device, and the batch is gathered there from its frames.
    """

    graph: Graph | None
    frames: tuple[int, ...]
    counts: bool = True


class GraphBatches:
    """The batches that one process sees, in order.

    Args:
        graphs: the set. plan: frame indices of each batch. start: number of batches to leave out.
        counts: passed on to the batches.
        on_device: where the data are: None, batches are made here; ``named``, they are on the device, and batches are
            their frames; a device, batches are made ahead and copied there.
    """

    def __init__(
        self,
        graphs: GraphDataset,
        plan: Sequence[Sequence[int]],
        start: int = 0,
        counts: bool = True,
        on_device: torch.device | Literal["named"] | None = None,
    ) -> None:
        self.graphs = graphs
        self.plan = plan[start:]
        self.counts = counts
        self.on_device = on_device

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        place = self.on_device
        if place == "named":
            yield from (Batch(None, tuple(frames), self.counts) for frames in self.plan)
        elif place is None:
            yield from (self._made(frames) for frames in self.plan)
        else:
            stream = torch.cuda.Stream(place) if place.type == "cuda" else None

            def make(number: int) -> Batch:
                batch = self._made(self.plan[number])
                assert batch.graph is not None
                return replace(batch, graph=to_device(batch.graph, place, stream))

            yield from prefetched(make, len(self.plan))

    def _made(self, frames: Sequence[int]) -> Batch:
        return Batch(batch_graphs([self.graphs[index] for index in frames]), tuple(frames), self.counts)


class TrainingData(pl.LightningDataModule):
    """Gives Lightning the batches of the epoch at hand, from the position at hand.

    Lightning asks for the training batches anew at every epoch, so a resumed epoch is simply a shorter one.

    Args:
        train, validation: graphs.
        train_sampler, validation_sampler: the batches of this process.
        position: where the run stands; read when an epoch starts.

    Attributes:
        frame_names: name of each training frame, for messages; empty: its index.
        on_device: see :class:`GraphBatches`.
    """

    def __init__(
        self,
        train: GraphDataset,
        validation: GraphDataset,
        train_sampler: BatchSampler,
        validation_sampler: BatchSampler,
        position: Position,
    ) -> None:
        super().__init__()
        self.train = train
        self.validation = validation
        self.train_sampler = train_sampler
        self.validation_sampler = validation_sampler
        self.position = position
        self.frame_names: list[str] = []
        self.on_device: torch.device | Literal["named"] | None = None
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def name_frames(self, batch: Batch) -> str:
        """Words for the training frames of a batch."""
        known = len(self.frame_names)
        names = [self.frame_names[index] if index < known else str(index) for index in batch.frames]
        more = f" and {len(names) - SHOWN_FRAMES} more" if len(names) > SHOWN_FRAMES else ""
        kinds = sorted({kind for kind in (self.train.structures[frame].config_type for frame in batch.frames) if kind})
        kind = f" (config_type {', '.join(kinds[:SHOWN_FRAMES])})" if kinds else ""
        return f"training frames {', '.join(names[:SHOWN_FRAMES])}{more}{kind}"

    def train_dataloader(self) -> Any:
        plan = self.train_sampler.batches(self.position.epoch)
        return GraphBatches(self.train, plan, start=self.position.batch, on_device=self.on_device)

    def val_dataloader(self) -> Any:
        plan = self.validation_sampler.batches(0)
        if plan:
            return GraphBatches(self.validation, plan, on_device=self.on_device)
        # Lightning leaves out the whole validation of a process without batches, and the others would wait for it.
        return GraphBatches(self.validation, [[0]], counts=False, on_device=self.on_device)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        if batch.graph is None or batch.graph.positions.device == device:
            return batch
        return replace(batch, graph=batch.graph.to(device))
