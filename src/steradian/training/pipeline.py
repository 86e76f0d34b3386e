"""How the steps of a run are done where they are prepared: data on the device, one recorded or compiled step a bucket.

Without a GPU, and with ``training.execution`` left at ``auto``, nothing of this is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steradian.config import TrainingConfig
from steradian.execution.backend_benchmark import prepare_backend
from steradian.execution.batches import Buckets, DeviceData, Sizes, room_for
from steradian.execution.recording import CudaRecorder, Recorder, say
from steradian.execution.steps import GradientStep, PredictionStep, Steps, resolve_mode, with_gradients
from steradian.graph import Graph, Prediction, batch_graphs
from steradian.potential import Potential
from steradian.training.losses import Loss, labels_in_use

if TYPE_CHECKING:
    from steradian.graph.batches import BatchSampler, GraphDataset
    from steradian.training.feeding import Batch, TrainingData

__all__ = ["Pipeline", "make_pipeline", "uses_pipeline"]

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
