"""Operators in live models of other packages: mace-torch, nequip and torch_geometric's ViSNet.

    from steradian.interfaces.attach import attach, detach
    attach(model, MARAConfig(hidden_dim=32))     # every layer is gated; with gate="neutral" nothing changes yet
    detach(model)                                # the model is what it was

Layers are found by the types of the package's own modules. Two hooks per layer do the work: one computes alpha before
the layer, the other multiplies the layer's radial weights (ViSNet: the cutoff that weighs the attention) by it before
they enter the package's convolution, whatever that is. No class is replaced and no code of the package is repeated. The
operators are one more submodule, ``model.steradian``, so that they train, move and are copied with the model.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steradian.checkpoint import ModelFileError, write_atomically
from steradian.config import MARAConfig
from steradian.interfaces.attach_packages import AttachError, Package, Seen, Slot, package_of
from steradian.operators.base import EdgeGate, GateFactory, SlotSpec
from steradian.operators.mara import mara_factory

__all__ = ["AttachError", "Attachment", "attach", "detach", "load_attached", "save_attached"]

NAME = "steradian"
"""Name of the submodule in the other package's model."""


class GatedLayer(nn.Module):
    """The operator of one layer of another package's model, and the two hooks that put it to work.

    Attributes:
        gate: the operator.
        alpha: ``[E]`` of the last call, detached; None before the first one.
    """

    def __init__(self, gate: EdgeGate, slot: Slot, package: Package, seen: Seen) -> None:
        super().__init__()
        self.gate = gate
        self.spec, self.package, self.seen = slot.spec, package, seen
        self.alpha: Tensor | None = None
        self._pending: Tensor | None = None

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook in front of the layer: computes alpha."""
        features, edges = self.package.inputs(layer, args, kwargs, self.spec, self.seen)
        alpha = self.gate(features, edges)
        self.alpha = alpha.detach()
        self._pending = self.package.on_all_rows(alpha, args, kwargs)

    def weigh(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Hook behind the radial weights (or the cutoff): multiplies them by alpha."""
        if self._pending is None:
            return output
        alpha, self._pending = self._pending, None
        return output * alpha.to(output.dtype).view(-1, *[1] * (output.dim() - 1))


class Attachment(nn.Module):
    """The operators of one model, in the order of its layers; they stand at ``model.steradian``.

    Attributes:
        layers: one :class:`GatedLayer` for every layer that has an operator.
        config: the section that the operators were built from, or None.
    """

    def __init__(self, layers: Sequence[GatedLayer], package: Package, config: MARAConfig | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.package, self.config = package, config
        self.handles: list[RemovableHandle] = []

    @property
    def gates(self) -> list[Tensor | None]:
        """alpha ``[E]`` of the last call, layer by layer."""
        return [layer.alpha for layer in self.layers]  # type: ignore[misc]


def attach(
    model: nn.Module, operator: MARAConfig | EdgeGate | GateFactory, layers: Sequence[int] | None = None
) -> Attachment:
    """Put an edge gate into every layer of a live model.

    Args:
        model: of mace-torch (``MACE`` and its relatives, any interaction block), nequip (eager) or torch_geometric
            (``ViSNet``).
        operator: a configuration section; a factory from :class:`SlotSpec` to a gate or None; or a gate, of which every
            layer gets a copy (all layers must then be as wide as it expects).
        layers: indices of the layers; None for all.

    Returns:
        The new submodule ``model.steradian``; its parameters are among ``model.parameters()``, so make (or extend) the
        optimiser after this call.

    Raises:
        AttachError: a model that cannot be served, with the reason; one that has operators already; unknown layers.
    """
    if isinstance(getattr(model, NAME, None), Attachment):
        raise AttachError("the model has operators already; detach(model) first")
    package = package_of(model)
    slots = package.slots(model)
    wanted = range(len(slots)) if layers is None else layers
    outside = [index for index in wanted if not 0 <= index < len(slots)]
    if outside:
        raise AttachError(f"layers {outside} do not exist; the model's layers are 0..{len(slots) - 1}")
    make = _factory(operator)
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    seen = Seen()
    gated: list[tuple[GatedLayer, Slot]] = []
    for index, slot in enumerate(slots):
        gate = make(slot.spec) if index in wanted else None
        if gate is not None:
            gated.append((GatedLayer(gate.to(like), slot, package, seen), slot))
    if not gated:
        raise AttachError("no layer gets an operator; check the choice of layers")
    attachment = Attachment(
        [layer for layer, _ in gated], package, operator if isinstance(operator, MARAConfig) else None
    )
    model.add_module(NAME, attachment)
    attachment.handles = package.watch(model, seen)
    for layer, slot in gated:
        attachment.handles.append(slot.layer.register_forward_pre_hook(layer.before, with_kwargs=True))
        attachment.handles.append(slot.weights.register_forward_hook(layer.weigh))
    attachment.handles.append(model.register_forward_hook(seen.forget, always_call=True))
    attachment.train(model.training)
    return attachment


def detach(model: nn.Module) -> Attachment:
    """Take the operators out again; the model is what it was before. Returns what was taken out.

    Raises:
        AttachError: there is nothing to take out.
    """
    attachment = getattr(model, NAME, None)
    if not isinstance(attachment, Attachment):
        raise AttachError("the model has no operators of steradian")
    for handle in attachment.handles:
        handle.remove()
    attachment.handles = []
    delattr(model, NAME)
    return attachment


def _factory(operator: MARAConfig | EdgeGate | GateFactory) -> GateFactory:
    if isinstance(operator, MARAConfig):
        return mara_factory(operator)
    if isinstance(operator, EdgeGate):
        original = operator

        def make(spec: SlotSpec) -> EdgeGate:
            width = getattr(original, "num_features", spec.num_channels)
            if width != spec.num_channels:
                raise AttachError(
                    f"the gate expects {width} features per atom, but layer {spec.layer} has {spec.num_channels}; give "
                    "a MARAConfig, which makes one for every layer"
                )
            return copy.deepcopy(original)

        return make
    if callable(operator):
        return operator
    raise AttachError(f"cannot attach {type(operator).__name__}; give a MARAConfig, an EdgeGate or a factory of gates")


# ------------------------------------------------------------------------------------------------------ beside a model


def save_attached(path: Path | str, model: nn.Module) -> None:
    """Write the operators of a model to a safetensors file of their own; the model itself is not written.

    Raises:
        AttachError: the model has none.
    """
    attachment = getattr(model, NAME, None)
    if not isinstance(attachment, Attachment):
        raise AttachError("the model has no operators of steradian")
    config = attachment.config
    header = {
        "package": attachment.package.name,
        "operator": None if config is None else config.model_dump(mode="json"),
        "layers": [layer.spec.layer for layer in attachment.layers],  # type: ignore[union-attr]
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in attachment.state_dict().items()}
    write_atomically(path, save(tensors, metadata={"steradian_attached": json.dumps(header)}))


def load_attached(path: Path | str, model: nn.Module, operator: EdgeGate | GateFactory | None = None) -> Attachment:
    """Attach the operators of a file to a model of the same kind.

    Args:
        path: written by :func:`save_attached`.
        model: the other package's model, without operators.
        operator: what was attached, where that was not a configuration section.

    Raises:
        ModelFileError: missing, damaged, or of another kind of model.
        AttachError: see :func:`attach`.
    """
    path = Path(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            weights: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path}: cannot be read ({error})") from None
    if "steradian_attached" not in metadata:
        raise ModelFileError(f"{path}: holds no attached operators")
    header = json.loads(metadata["steradian_attached"])
    name = package_of(model).name
    if header["package"] != name:
        raise ModelFileError(f"{path}: written for a model of {header['package']}, this one is of {name}")
    if header["operator"] is not None:
        operator_given: Any = MARAConfig.model_validate(header["operator"])
    elif operator is not None:
        operator_given = operator
    else:
        raise ModelFileError(f"{path}: its operators were not made from a configuration; give `operator`")
    attachment = attach(model, operator_given, header["layers"])
    try:
        attachment.load_state_dict(weights)
    except RuntimeError as error:
        detach(model)
        raise ModelFileError(f"{path}: does not fit this model ({str(error).splitlines()[-1].strip()})") from None
    return attachment
