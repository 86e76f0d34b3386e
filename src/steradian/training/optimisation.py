"""How the weights follow the loss: losses, optimiser, learning rate, scaling, average, order of MACE's terms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steradian.config import LossConfig, OptimizerConfig, ScheduleConfig
from steradian.equivariant.symmetric_contraction import SymmetricContraction
from steradian.graph import Graph, Prediction
from steradian.potential import Potential
from steradian.precision import WithRole

if TYPE_CHECKING:
    from steradian.graph.structures import Structure

__all__ = [
    "LABELS",
    "LearningRate",
    "Loss",
    "LossScale",
    "LossTerms",
    "MissingLabelError",
    "MovingAverage",
    "check_labels",
    "labels_in_use",
    "make_optimizer",
    "order_at",
    "parameter_groups",
    "set_order",
    "start_progressive",
]

#: A scale of the loss below this means that gradients overflow whatever the scale: the run has diverged.
SMALLEST = 2.0**-14


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: what decays and what does not.

    Weights of linear maps, tensor products and contractions decay: parameters with two or more dimensions. Vectors and
    scalars (biases, norms, radial frequencies, temperatures) do not, nor do parameters that their module lists in
    ``no_weight_decay`` (a tuple of names), such as embeddings of points.
    """
    decays: dict[nn.Parameter, bool] = {}  # a shared parameter counts where it is met first
    for module in model.modules():
        exempt = tuple(getattr(module, "no_weight_decay", ()))
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                decays.setdefault(parameter, parameter.ndim >= 2 and name not in exempt)
    decaying = [parameter for parameter, decay in decays.items() if decay]
    free = [parameter for parameter, decay in decays.items() if not decay]
    groups: list[dict[str, object]] = []
    if decaying:
        groups.append({"params": decaying, "weight_decay": weight_decay})
    if free:
        groups.append({"params": free, "weight_decay": 0.0})
    return groups


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Adam (Kingma and Ba 2015) or AdamW (Loshchilov and Hutter 2019), one fused kernel per step where there is one."""
    kind = torch.optim.AdamW if config.kind == "adamw" else torch.optim.Adam
    groups = parameter_groups(model, config.weight_decay)
    devices = {parameter.device.type for parameter in model.parameters()}
    fused = devices <= {"cpu", "cuda"}
    return kind(groups, lr=config.learning_rate, amsgrad=config.amsgrad, fused=fused)


class LearningRate:
    """The learning rate of every optimiser step: warm-up, then constant, lowered on a plateau, or a cosine.

    It is a function of counters that are saved, not of calls that were made, so a resumed run has exactly the rates of
    an uninterrupted one.

    * Warm-up: linear from ``base / warmup_steps`` to ``base`` over the first ``warmup_steps`` steps.
    * plateau: times ``factor`` after ``patience`` epochs without a better monitored metric, down to
      ``min_learning_rate``.
    * cosine: ``min + (base - min) (1 + cos(pi t)) / 2``, t from 0 after the warm-up to 1 at the last step
      (Loshchilov and Hutter 2017, equation 5, without restarts).

    Args:
        config: the schedule.
        base: learning rate of the optimiser.
        total_steps: optimiser steps of the whole run (for the cosine).
    """

    def __init__(self, config: ScheduleConfig, base: float, total_steps: int) -> None:
        self.config = config
        self.base = base
        self.total_steps = max(total_steps, 1)
        self.factor = 1.0
        self.best = math.inf
        self.stale_epochs = 0

    def at(self, step: int) -> float:
        """Learning rate of optimiser step ``step``, counted from 0."""
        warmup = self.config.warmup_steps
        if step < warmup:
            return self.base * (step + 1) / warmup
        lowest = min(self.config.min_learning_rate, self.base)
        if self.config.kind == "cosine":
            t = min(1.0, (step - warmup) / max(1, self.total_steps - warmup))
            return lowest + (self.base - lowest) * 0.5 * (1.0 + math.cos(math.pi * t))
        return max(self.base * self.factor, lowest)

    def after_validation(self, value: float, epochs: int) -> bool:
        """Take in the monitored metric after a validation.

        Args:
            value: the metric, smaller is better.
            epochs: epochs since the last validation.

        Returns:
            Whether the learning rate went down.
        """
        if self.config.kind != "plateau":
            return False
        if value < self.best:
            self.best, self.stale_epochs = value, 0
            return False
        self.stale_epochs += epochs
        if self.stale_epochs < self.config.patience or self.base * self.factor <= self.config.min_learning_rate:
            return False
        self.factor *= self.config.factor
        self.stale_epochs = 0
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor, "best": self.best, "stale_epochs": self.stale_epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factor = float(state["factor"])
        self.best = float(state["best"])
        self.stale_epochs = int(state["stale_epochs"])


class MovingAverage:
    """Moving average of parameters, ``a <- d a + (1 - d) p`` after every optimiser step.

    The decay starts low, ``d = min(decay, (1 + n) / (10 + n))`` at update n, so that the random weights of the start
    are soon forgotten.

    Args:
        parameters: the parameters to follow, on the device of the run.
        decay: d, between 0 and 1.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.num_updates = 0
        self.averages = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self.averages, [parameter.detach() for parameter in self.parameters], 1.0 - decay)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Put the averages into the model inside a ``with`` block; the weights come back to the last bit."""
        weights = [parameter.detach().clone() for parameter in self.parameters]
        self._write(self.averages)
        try:
            yield
        finally:
            self._write(weights)

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates, "averages": [average.clone() for average in self.averages]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: the state belongs to another model.
        """
        shapes = [tuple(average.shape) for average in self.averages]
        if [tuple(average.shape) for average in state["averages"]] != shapes:
            raise ValueError("the moving average belongs to a model of another shape")
        self.num_updates = int(state["num_updates"])
        for average, saved in zip(self.averages, state["averages"]):
            average.copy_(saved)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values):
            parameter.copy_(value)


class LossScale:
    """A scaled loss for products in float16, whose gradients would otherwise vanish below 6e-8.

    Only products are float16 (:mod:`steradian.precision`), weights and their gradients are float32 throughout.
    PyTorch's ``GradScaler`` does the scaling: a step whose gradient overflows is left out and the scale halved; the
    scale is doubled after 2000 good steps. Gradients that vanish all the same are counted. Nothing is done where no
    role is float16.

    Args:
        potential: on the device of the run.

    Attributes:
        active: whether the loss is scaled.
        skipped: steps left out so far, all sessions together.
    """

    def __init__(self, potential: Potential) -> None:
        self.potential = potential
        self.active = potential.policy.uses_float16
        self.skipped = 0
        # made only where it is needed: it is an object of the device
        self._scaler = torch.amp.GradScaler(potential.device.type, init_scale=2.0**12) if self.active else None
        self._zeros: Tensor | int = 0  # on the device
        self._counted: Tensor | int = 0

    def scaled(self, loss: Tensor) -> Tensor:
        return loss if self._scaler is None else self._scaler.scale(loss)

    def take_back(self, optimizer: torch.optim.Optimizer) -> bool:
        """Divide the gradients by the scale and adapt it; False: they overflowed, and were removed.

        Raises:
            FloatingPointError: they overflow at the smallest scale too.
        """
        if self._scaler is None:
            return True
        self._count_underflow()
        self._scaler.unscale_(optimizer)
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        norms = torch.stack(torch._foreach_norm([gradient for gradient in gradients if gradient is not None]))
        finite = bool(torch.isfinite(norms).all())
        self._scaler.update()
        if not finite:
            self.skipped += 1
            optimizer.zero_grad(set_to_none=True)  # the optimiser then leaves all weights as they are
            if self._scaler.get_scale() < SMALLEST:
                raise FloatingPointError("gradients overflow in float16 whatever the scale of the loss")
        return finite

    def _count_underflow(self) -> None:
        """Gradients of the weights that multiply in float16, in rows that are not zero as a whole."""
        for module in self.potential.host.modules():
            if not isinstance(module, WithRole) or module.low != torch.float16:
                continue
            for parameter in module.parameters():
                if parameter.grad is not None:
                    rows = parameter.grad.flatten(0, -2)
                    used = rows.ne(0).any(dim=1)
                    counted = used.sum() * rows.shape[1]
                    self._zeros = self._zeros + counted - rows.ne(0).sum()
                    self._counted = self._counted + counted

    def figures(self) -> dict[str, float | int]:
        """Of the steps since the last call: scale, steps left out, share of gradients that vanished."""
        if self._scaler is None:
            return {}
        counted = int(self._counted)
        share = int(self._zeros) / counted if counted else 0.0
        self._zeros = self._counted = 0
        return {"train/loss_scale": self._scaler.get_scale(), "train/skipped": self.skipped, "train/underflow": share}

    def state_dict(self) -> dict[str, Any]:
        return {} if self._scaler is None else {"skipped": self.skipped, "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._scaler is not None and state:
            self.skipped = int(state["skipped"])
            self._scaler.load_state_dict(state["scaler"])


# ------------------------------------------------------------------------------------------- progressive correlation
#
# Training starts with MACE's terms of first order, higher ones come in on a schedule. The weights of all orders are
# there from the start. Those of the orders that have not come in yet are zero and unused, so raising the order leaves
# the function as it is, and a model saved at any time is a model of the full order.


def order_at(epoch: int, schedule: Sequence[int]) -> int:
    """The order in an epoch (finished epochs before it); ``schedule[k]``: epoch from which the order is k + 2."""
    return 1 + sum(epoch >= begins for begins in schedule)


def set_order(host: nn.Module, order: int) -> None:
    """Terms up to this order take part in all contractions of a host."""
    for module in host.modules():
        if isinstance(module, SymmetricContraction):
            module.order = min(order, module.correlation)


def start_progressive(host: nn.Module) -> None:
    """Put the weights of second and higher order to zero."""
    for module in host.modules():
        if isinstance(module, SymmetricContraction):
            module.clear_orders_above(1)


# -------------------------------------------------------------------------------------------------------------- losses


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
