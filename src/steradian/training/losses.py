"""Losses on energies, forces and stresses.

With ``f`` one of ``e^2`` (mse), ``|e|`` (l1) or the Huber function (Huber 1964, ``e^2 / 2`` below delta and
``delta (|e| - delta / 2)`` above), the loss of a batch is::

    w_E mean_s[w_s f(dE_s / n_s)] + w_F mean_{a,x}[w_s f(dF_ax)] + w_S mean_{s,xy}[w_s f(dS_xy)]

s runs over structures, a over atoms and x over Cartesian components; ``w_s`` is the weight of the structure, ``n_s``
its number of atoms (1 where ``energy_per_atom`` is off).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steradian.config import LossConfig
from steradian.graph import Graph, Prediction

if TYPE_CHECKING:
    from steradian.graph.structures import Structure

__all__ = ["LABELS", "Loss", "LossTerms", "MissingLabelError", "check_labels", "labels_in_use"]

LABELS = ("energy", "forces", "stress")


class MissingLabelError(ValueError):
    """A label has a weight in the loss and is missing in the data."""


@dataclass(frozen=True)
class LossTerms:
    """The loss of a batch and its weighted parts, scalars; a part whose weight is zero is None."""

    total: Tensor
    energy: Tensor | None = None
    forces: Tensor | None = None
    stress: Tensor | None = None


class Loss:
    """The loss of a batch; see the module's formula.

    Args:
        config: kind and weights. Energies are compared in float64 (totals need the digits); the other labels are cast
            to the dtype of the prediction.
    """

    def __init__(self, config: LossConfig) -> None:
        self.config = config
        self.weights = {label: float(getattr(config, f"{label}_weight")) for label in LABELS}

    def __call__(self, prediction: Prediction, graph: Graph) -> LossTerms:
        """Loss of a batch.

        Raises:
            MissingLabelError: the graph or the prediction lacks a label whose weight is not zero.
        """
        parts = {label: self._part(label, prediction, graph) for label, weight in self.weights.items() if weight}
        total = torch.stack([part.double() for part in parts.values()]).sum()
        return LossTerms(total=total, **parts)

    def _part(self, label: str, prediction: Prediction, graph: Graph) -> Tensor:
        predicted, reference = getattr(prediction, label), getattr(graph, label)
        if reference is None:
            raise MissingLabelError(f"{label}: the batch has no {label} labels; {_way_out(label)}")
        if predicted is None:
            raise MissingLabelError(f"{label}: the prediction has none; call the potential with {label}=True")
        error = predicted - reference.to(predicted.dtype)
        if label == "energy" and self.config.energy_per_atom:
            error = error / graph.atoms_per_system.clamp(min=1).to(error.dtype)
        counts = None
        if graph.real is not None:  # systems that fill up a bucket do not count
            counts = graph.real.index_select(0, graph.system) if label == "forces" else graph.real
            error = torch.where(counts.reshape(-1, *[1] * (error.ndim - 1)), error, 0.0)
        cost = self._cost(error)
        if graph.weight is not None:
            weight = graph.weight.to(cost.dtype)
            weight = weight.index_select(0, graph.system) if label == "forces" else weight
            cost = cost * weight.reshape(-1, *[1] * (cost.ndim - 1))
        if counts is None:
            return self.weights[label] * cost.mean()
        numbers = counts.sum() * (cost.numel() // len(cost))
        return self.weights[label] * (cost.sum() / numbers.to(cost.dtype))

    def _cost(self, error: Tensor) -> Tensor:
        if self.config.kind == "mse":
            return error.square()
        if self.config.kind == "l1":
            return error.abs()
        return torch.nn.functional.huber_loss(
            error, torch.zeros_like(error), reduction="none", delta=self.config.huber_delta
        )


def labels_in_use(config: LossConfig) -> tuple[str, ...]:
    """Labels whose weight is not zero.

    Raises:
        MissingLabelError: no label has a weight.
    """
    used = tuple(label for label in LABELS if getattr(config, f"{label}_weight"))
    if not used:
        raise MissingLabelError("training.loss: every weight is zero; set energy_weight or forces_weight above zero")
    return used


def check_labels(structures: Sequence[Structure], used: Sequence[str], name: str) -> None:
    """Refuse data that lack a label in use.

    Args:
        structures: the frames. used: labels in use. name: of the set, for the message ("training", "validation").

    Raises:
        MissingLabelError: one line per label, with the number of frames and the first of them.
    """
    lines = []
    for label in used:
        missing = [index for index, structure in enumerate(structures) if getattr(structure, label) is None]
        if missing:
            lines.append(
                f"{label}: {len(missing)} of {len(structures)} {name} frames have no {label} label"
                f" (first: frame {missing[0]}); {_way_out(label)}"
            )
    if lines:
        raise MissingLabelError("\n".join(lines))


def _way_out(label: str) -> str:
    return (
        f"label or remove the frames, name the key with data.keys.{label}, or set training.loss.{label}_weight to 0"
        " to train without it"
    )
