"""Operators in live models of other packages: mace-torch, nequip and torch_geometric's ViSNet.

    from steradian.interfaces.attach import attach, detach
    attach(model, MARAConfig(form="published"))  # every layer is gated; with gate="neutral" nothing changes yet
    attach(model, [MARAConfig(form="published"), EFAConfig()])   # both
    detach(model)                                # the model is what it was

Layers are found by the types of the package's own modules. Two hooks per layer and operator do the work. A gate: one
computes alpha before the layer, the other multiplies the layer's radial weights (the input of the linear map that
gives them; ViSNet: the cutoff that weighs the attention) by it before they enter the package's convolution, whatever
that is. An operator between all atoms: one keeps what enters the layer, the other adds to what leaves it. No class is
replaced and no code of the package is repeated. The operators are one more submodule, ``model.steradian``, so that they
train, move and are copied with the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steradian.checkpoint import ModelFileError, read_tensors, write_tensors
from steradian.config import EFAConfig, MARAConfig
from steradian.config.earlier import FIRST_COMPLETE_FORMAT, complete_gate
from steradian.graph import Edges
from steradian.interfaces.attach_base import AttachError, ForeignAtoms, MixingSlot, Package, Seen, Slot
from steradian.interfaces.attach_packages import package_of
from steradian.operators.base import EdgeGate, GlobalMixer, SlotSpec
from steradian.operators.efa.operator import efa_factory
from steradian.operators.mara import mara_factory

__all__ = ["AttachError", "Attachment", "attach", "detach", "load_attached", "save_attached"]

OperatorFactory = Callable[[SlotSpec], EdgeGate | GlobalMixer | None]
Operator = MARAConfig | EFAConfig | EdgeGate | OperatorFactory

NAME = "steradian"
"""Name of the submodule in the other package's model."""


class GatedLayer(nn.Module):
    """The gate of one layer of another package's model, and the two hooks that put it to work.

    Attributes:
        operator: the gate.
        alpha: ``[E]`` of the last call, detached; None before the first one.
    """

    def __init__(self, operator: EdgeGate, slot: Slot, package: Package, seen: Seen) -> None:
        super().__init__()
        self.operator = operator
        self.spec, self.package, self.seen = slot.spec, package, seen
        self.alpha: Tensor | None = None
        self._pending: Tensor | None = None

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook in front of the layer: computes alpha."""
        given = self.package.given(args, kwargs)
        features = self.package.features(layer, given, self.spec)
        alpha = self.operator(features, self.package.edges(given, self.spec, self.seen))
        self.alpha = alpha.detach()
        self._pending = self.package.on_all_rows(alpha, given)

    def after(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Hook behind the radial weights (or the cutoff): multiplies them by alpha."""
        return self._times_alpha(output)

    def in_front(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Hook in front of the linear map that the radial network ends with: multiplies its input by alpha."""
        return (self._times_alpha(args[0]), *args[1:])

    def _times_alpha(self, rows: Tensor) -> Tensor:
        if self._pending is None:
            return rows
        alpha, self._pending = self._pending, None
        return rows * alpha.to(rows.dtype).view(-1, *[1] * (rows.dim() - 1))


class MixedLayer(nn.Module):
    """The operator between all atoms of one layer of another package's model, and its two hooks.

    Attributes:
        operator: the mixer.
    """

    def __init__(self, operator: GlobalMixer, slot: MixingSlot, package: Package, seen: Seen) -> None:
        super().__init__()
        self.operator = operator
        self.spec, self.package, self.seen = slot.spec, package, seen
        self._pending: tuple[Tensor, ForeignAtoms] | None = None

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook in front of the layer: keeps features and atoms."""
        given = self.package.given(args, kwargs)
        self._pending = (self.package.features(layer, given, self.spec), self.package.atoms(given, self.seen))

    def after(self, end: nn.Module, args: Any, output: Any) -> Any:
        """Hook behind the layer: adds the operator's update to the layer's own."""
        if self._pending is None:
            return output
        (features, atoms), self._pending = self._pending, None
        update = self.package.update(output, end, self.spec)
        addition = self.operator.global_update(features, update, atoms.positions, cast(Edges, atoms))
        return self.package.added(output, addition, end, self.spec)


class Attachment(nn.Module):
    """The operators of one model, in the order of its layers; they stand at ``model.steradian``.

    Attributes:
        layers: one :class:`GatedLayer` for every layer that has a gate.
        mixers: one :class:`MixedLayer` for every layer that has an operator between all atoms.
        configs: the sections that the operators were built from; empty where one was not.
    """

    def __init__(self, package: Package, configs: Sequence[MARAConfig | EFAConfig]) -> None:
        super().__init__()
        self.layers, self.mixers = nn.ModuleList(), nn.ModuleList()
        self.package, self.configs = package, list(configs)
        self.handles: list[RemovableHandle] = []

    @property
    def gates(self) -> list[Tensor | None]:
        """alpha ``[E]`` of the last call, layer by layer."""
        return [layer.alpha for layer in self.layers]  # type: ignore[misc]

    def put(self, made: EdgeGate | GlobalMixer, gated: Slot, mixed: MixingSlot, seen: Seen) -> None:
        """Add one operator of one layer, with its hooks."""
        if isinstance(made, EdgeGate):
            gate = GatedLayer(made, gated, self.package, seen)
            self.layers.append(gate)
            self.handles.append(gated.layer.register_forward_pre_hook(gate.before, with_kwargs=True))
            if gated.last is None:
                self.handles.append(gated.weights.register_forward_hook(gate.after))
            else:
                self.handles.append(gated.last.register_forward_pre_hook(gate.in_front))
        else:
            mixer = MixedLayer(made, mixed, self.package, seen)
            self.mixers.append(mixer)
            self.handles.append(mixed.begin.register_forward_pre_hook(mixer.before, with_kwargs=True))
            self.handles.append(mixed.end.register_forward_hook(mixer.after))


def attach(
    model: nn.Module, operator: Operator | Sequence[Operator], layers: Sequence[int] | None = None
) -> Attachment:
    """Put operators into the layers of a live model.

    Args:
        model: of mace-torch (``MACE`` and its relatives, any interaction block), nequip (eager) or torch_geometric
            (``ViSNet``).
        operator: one or several of: a configuration section of MARA or EFA; a factory from :class:`SlotSpec` to an
            operator or None; a gate, of which every layer gets a copy (all must then be as wide as it expects). EFA is
            attached to models of molecules, not of periodic systems.
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
    operators: list[Operator] = list(operator) if isinstance(operator, list | tuple) else [operator]  # type: ignore[list-item]
    makers = [_factory(one) for one in operators]
    mixing = package.mixing_slots(model)
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    configs = [one for one in operators if isinstance(one, MARAConfig | EFAConfig)]
    attachment = Attachment(package, configs if len(configs) == len(operators) else [])
    seen = Seen()
    attachment.handles = package.watch(model, seen)
    for make in makers:
        for index in wanted:
            made = make(mixing[index].spec)
            if made is not None:
                attachment.put(made.to(like), slots[index], mixing[index], seen)
    attachment.handles.append(model.register_forward_hook(seen.forget, always_call=True))
    if not len(attachment.layers) + len(attachment.mixers):
        _remove(attachment)
        raise AttachError("no layer gets an operator; check the choice of layers")
    model.add_module(NAME, attachment)
    attachment.train(model.training)
    return attachment


def _remove(attachment: Attachment) -> None:
    for handle in attachment.handles:
        handle.remove()
    attachment.handles = []


def detach(model: nn.Module) -> Attachment:
    """Take the operators out again; the model is what it was before. Returns what was taken out.

    Raises:
        AttachError: there is nothing to take out.
    """
    attachment = getattr(model, NAME, None)
    if not isinstance(attachment, Attachment):
        raise AttachError("the model has no operators of steradian")
    _remove(attachment)
    delattr(model, NAME)
    return attachment


def _factory(operator: Operator) -> OperatorFactory:
    if isinstance(operator, MARAConfig):
        if operator.form == "channel":
            raise AttachError(
                "a gate per channel is not attached to models of other packages yet: convert the model and set its "
                "edge_gate, or attach MARAConfig(form='published')"
            )
        return mara_factory(operator)
    if isinstance(operator, EFAConfig):
        return efa_factory(operator)
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
    if callable(operator) and not isinstance(operator, nn.Module):
        return operator
    raise AttachError(
        f"cannot attach {type(operator).__name__}; give a MARAConfig, an EFAConfig, an EdgeGate or a factory"
    )


# ------------------------------------------------------------------------------------------------------ beside a model


def save_attached(path: Path | str, model: nn.Module) -> None:
    """Write the operators of a model to a safetensors file of their own; the model itself is not written.

    Raises:
        AttachError: the model has none.
    """
    attachment = getattr(model, NAME, None)
    if not isinstance(attachment, Attachment):
        raise AttachError("the model has no operators of steradian")
    indices = {layer.spec.layer for layer in (*attachment.layers, *attachment.mixers)}  # type: ignore[union-attr]
    header = {
        "package": attachment.package.name,
        "operators": [config.model_dump(mode="json") for config in attachment.configs],
        "layers": sorted(indices),  # type: ignore[type-var]
    }
    write_tensors(path, attachment.state_dict(), "steradian_attached", header)


def load_attached(
    path: Path | str, model: nn.Module, operator: Operator | Sequence[Operator] | None = None
) -> Attachment:
    """Attach the operators of a file to a model of the same kind.

    Args:
        path: written by :func:`save_attached`.
        model: the other package's model, without operators.
        operator: what was attached, where that was not a configuration section.

    Raises:
        ModelFileError: missing, damaged, or of another kind of model.
        AttachError: see :func:`attach`.
    """
    weights, header = read_tensors(path, "steradian_attached", "one of attached operators")
    name = package_of(model).name
    if header["package"] != name:
        raise ModelFileError(f"{path}: written for a model of {header['package']}, this one is of {name}")
    sections: dict[str, Any] = {"mara": MARAConfig, "efa": EFAConfig}
    entries = header["operators"]
    if int(header["format_version"]) < FIRST_COMPLETE_FORMAT:
        entries = [complete_gate(entry) for entry in entries]
    given: Any = [sections[entry["kind"]].model_validate(entry) for entry in entries] or operator
    if given is None:
        raise ModelFileError(f"{path}: its operators were not made from a configuration; give `operator`")
    attachment = attach(model, given, header["layers"])
    try:
        attachment.load_state_dict(weights)
    except RuntimeError as error:
        detach(model)
        raise ModelFileError(f"{path}: does not fit this model ({str(error).splitlines()[-1].strip()})") from None
    return attachment
