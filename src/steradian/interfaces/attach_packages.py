"""Where the layers of other packages' models are, and what an operator sees of them.

Only classes of packages that are imported already are looked at; nothing here imports one.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steradian.operators.base import SlotSpec
from steradian.radial import cosine_envelope, polynomial_envelope

__all__ = ["AttachError", "ForeignEdges", "Package", "Seen", "Slot", "package_of"]


class AttachError(ValueError):
    """A model that operators cannot be attached to; the message says why."""


@dataclass(frozen=True)
class Slot:
    """A layer, the module whose output its messages are linear in, and what an operator may count on."""

    layer: nn.Module
    weights: nn.Module
    spec: SlotSpec


@dataclass
class Seen:
    """What hooks on the whole model have seen in the present call."""

    values: dict[str, Tensor] = field(default_factory=dict)

    def forget(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hook behind the whole model: tensors with a history would keep it alive, and cannot be copied."""
        self.values = {}


@dataclass(frozen=True)
class ForeignEdges:
    """What an operator sees of edges; see :class:`steradian.graph.Edges`."""

    senders: Tensor
    receivers: Tensor
    vectors: Tensor
    lengths: Tensor
    radial: Tensor
    envelope: Tensor
    num_atoms: int


class Package(ABC):
    """How one package's models are read."""

    name: str

    @abstractmethod
    def serves(self, model: nn.Module) -> bool:
        """Whether a model is of this package.

        Raises:
            AttachError: it is, but in a form that cannot be served.
        """

    @abstractmethod
    def slots(self, model: nn.Module) -> list[Slot]:
        """The layers in order."""

    def watch(self, model: nn.Module, seen: Seen) -> list[RemovableHandle]:
        """Hooks for what the layers are not given."""
        return []

    @abstractmethod
    def inputs(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], spec: SlotSpec, seen: Seen
    ) -> tuple[Tensor, ForeignEdges]:
        """Node features ``[N, D, C]`` and edges, from a layer's arguments."""

    def on_all_rows(self, alpha: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """alpha for every row of the weights, where there are more rows than edges."""
        return alpha


def package_of(model: nn.Module) -> Package:
    """The package that a model is of.

    Raises:
        AttachError: none that is known, or a form of model that cannot be served.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise AttachError("the model is compiled (TorchScript) and calls no hooks; attach before compiling")
    if type(model).__name__ == "OptimizedModule":
        raise AttachError("the model is wrapped by torch.compile; attach to the model inside it, before compiling")
    for package in (MaceTorch(), Nequip(), PygViSNet()):
        if package.serves(model):
            return package
    if type(model).__module__.split(".")[0] == "steradian":
        raise AttachError("this is a model of steradian: fill its slots with model.edge_gate in the configuration")
    raise AttachError(
        f"{type(model).__module__}.{type(model).__name__} cannot be served; known: models of mace-torch with "
        "interaction blocks, of nequip with InteractionBlock, and ViSNet of torch_geometric"
    )


def _known_class(module: str, name: str) -> type | None:
    return getattr(sys.modules.get(module), name, None)


def _found(model: nn.Module, module: str, name: str) -> list[nn.Module]:
    """Submodules of a class, in the order of registration."""
    known = _known_class(module, name)
    return [] if known is None else [part for part in model.modules() if isinstance(part, known)]


def _entries(irreps: Any) -> list[tuple[int, int, int]]:
    """Multiplicity, degree and parity of e3nn's irreps, whatever their class."""
    return [(int(mul), int(irrep.l), int(irrep.p)) for mul, irrep in irreps]


def _degrees(irreps: Any) -> tuple[tuple[tuple[int, int], ...], int]:
    """Irreps and channels of a slot: all of them where they are equally wide, otherwise the scalars alone.

    Raises:
        AttachError: the features do not begin with even scalars.
    """
    entries = _entries(irreps)
    if not entries or entries[0][1:] != (0, 1):
        raise AttachError(f"features {irreps} do not begin with even scalars, which an operator needs")
    channels = entries[0][0]
    equal = all(mul == channels for mul, _, _ in entries)
    return (tuple(entry[1:] for entry in entries) if equal else ((0, 1),)), channels


def _channels_last(features: Tensor, spec: SlotSpec, channels_first: bool = True) -> Tensor:
    """``[N, D, C]`` from features in e3nn's order, channel by channel (or component by component) in each irrep."""
    parts, start = [], 0
    for degree, _ in spec.degrees:
        size = (2 * degree + 1) * spec.num_channels
        block = features[:, start : start + size]
        shape = (-1, spec.num_channels, 2 * degree + 1) if channels_first else (-1, 2 * degree + 1, spec.num_channels)
        block = block.reshape(shape)
        parts.append(block.transpose(1, 2) if channels_first else block)
        start += size
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


# ------------------------------------------------------------------------------------------------------------ packages


class MaceTorch(Package):
    """mace-torch: every subclass of ``InteractionBlock`` makes the weights of its product in ``conv_tp_weights``.

    Edge vectors run from sender to receiver there. Blocks do not get them, so they are taken from what enters the
    spherical harmonics.
    """

    name = "mace-torch"

    def serves(self, model: nn.Module) -> bool:
        return bool(_found(model, "mace.modules.blocks", "InteractionBlock"))

    def slots(self, model: nn.Module) -> list[Slot]:
        blocks = _found(model, "mace.modules.blocks", "InteractionBlock")
        for needed in ("spherical_harmonics", "radial_embedding", "r_max"):
            if not hasattr(model, needed):
                raise AttachError(f"give the whole model: {type(model).__name__} has no {needed}")
        slots = []
        for index, block in enumerate(blocks):
            if not isinstance(getattr(block, "conv_tp_weights", None), nn.Module):
                raise AttachError(f"{type(block).__name__} has no conv_tp_weights, whose output a gate would multiply")
            degrees, channels = _degrees(block.node_feats_irreps)
            spec = SlotSpec(
                host=self.name,
                layer=index,
                num_layers=len(blocks),
                degrees=degrees,
                num_channels=channels,
                cutoff=float(model.r_max),  # type: ignore[arg-type]
                num_radial=int(model.radial_embedding.out_dim),  # type: ignore[union-attr, arg-type]
            )
            slots.append(Slot(block, block.conv_tp_weights, spec))  # type: ignore[arg-type]
        return slots

    def watch(self, model: nn.Module, seen: Seen) -> list[RemovableHandle]:
        cutoff = getattr(model.radial_embedding, "cutoff_fn", None)
        power = torch.as_tensor(float(getattr(cutoff, "p", 6)))
        watcher = _VectorWatcher(seen, power)
        return [model.spherical_harmonics.register_forward_pre_hook(watcher)]  # type: ignore[union-attr]

    def inputs(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], spec: SlotSpec, seen: Seen
    ) -> tuple[Tensor, ForeignEdges]:
        names = ("node_attrs", "node_feats", "edge_attrs", "edge_feats", "edge_index")
        given = dict(zip(names, args)) | kwargs
        if given.get("lammps_class") is not None:
            raise AttachError("ghost atoms of LAMMPS (ML-IAP) are not served: an operator needs all features of a step")
        senders, receivers = given["edge_index"]
        features = given["node_feats"]
        vectors = -seen.values["vectors"].to(features.dtype)
        lengths = torch.linalg.vector_norm(vectors, dim=1)
        edges = ForeignEdges(
            senders=senders,
            receivers=receivers,
            vectors=vectors,
            lengths=lengths,
            radial=given["edge_feats"],
            envelope=polynomial_envelope(lengths, spec.cutoff, int(seen.values["power"])),
            num_atoms=len(features),
        )
        return _channels_last(features, spec, _layout(layer) != "ir_mul"), edges


class _VectorWatcher:
    """Keeps the vectors of the present call (a class, so that a model with hooks can be copied and pickled)."""

    def __init__(self, seen: Seen, power: Tensor) -> None:
        self.seen, self.power = seen, power

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.seen.values = {"vectors": args[0], "power": self.power}


def _layout(block: nn.Module) -> str:
    """``mul_ir`` (e3nn) or ``ir_mul``, where cuequivariance runs the block."""
    config = getattr(block, "cueq_config", None)
    return str(getattr(config, "layout_str", "mul_ir")) if getattr(config, "enabled", False) else "mul_ir"


class Nequip(Package):
    """nequip: every ``InteractionBlock`` makes the weights of its product in ``edge_mlp``; vectors run as here."""

    name = "nequip"

    def serves(self, model: nn.Module) -> bool:
        if not _found(model, "nequip.nn.interaction_block", "InteractionBlock"):
            return False
        compiled = _known_class("nequip.nn.compile", "CompileGraphModel")
        if compiled is not None and any(isinstance(part, compiled) for part in model.modules()):
            raise AttachError("the model is built with compile_mode='compile' and calls no hooks; build it as 'eager'")
        return True

    def slots(self, model: nn.Module) -> list[Slot]:
        blocks = _found(model, "nequip.nn.interaction_block", "InteractionBlock")
        (normalizer,) = _found(model, "nequip.nn.embedding._edge", "EdgeLengthNormalizer")[:1] or (None,)
        if normalizer is None:
            raise AttachError("give the whole model: it has no EdgeLengthNormalizer")
        slots = []
        for index, block in enumerate(blocks):
            degrees, channels = _degrees(block.irreps_in["node_features"])  # type: ignore[index]
            radial = sum(entry[0] for entry in _entries(block.irreps_in["edge_embedding"]))  # type: ignore[index, misc]
            spec = SlotSpec(
                host=self.name,
                layer=index,
                num_layers=len(blocks),
                degrees=degrees,
                num_channels=channels,
                cutoff=float(normalizer.r_max),  # type: ignore[arg-type]
                num_radial=radial,
            )
            slots.append(Slot(block, block.edge_mlp, spec))  # type: ignore[arg-type]
        return slots

    def inputs(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], spec: SlotSpec, seen: Seen
    ) -> tuple[Tensor, ForeignEdges]:
        data = args[0] if args else kwargs["data"]
        if "lmp_mliap_data" in data:
            raise AttachError("ghost atoms of LAMMPS (ML-IAP) are not served: an operator needs all features of a step")
        receivers, senders = data["edge_index"]
        features = data["node_features"]
        vectors = data["edge_vectors"].to(features.dtype)
        edges = ForeignEdges(
            senders=senders,
            receivers=receivers,
            vectors=vectors,
            lengths=data["edge_lengths"].view(-1).to(features.dtype),
            radial=data["edge_embedding"],
            envelope=data["edge_cutoff"].view(-1),
            num_atoms=len(features),
        )
        return _channels_last(features, spec), edges


class PygViSNet(Package):
    """torch_geometric's ViSNet: alpha multiplies the cutoff that weighs the attention of a ``ViS_MP`` layer.

    The rows of an atom with itself are not edges: no operator sees them, and their alpha is 1.
    """

    name = "torch_geometric ViSNet"

    def serves(self, model: nn.Module) -> bool:
        return bool(_found(model, "torch_geometric.nn.models.visnet", "ViS_MP"))

    def slots(self, model: nn.Module) -> list[Slot]:
        layers = _found(model, "torch_geometric.nn.models.visnet", "ViS_MP")
        blocks = _found(model, "torch_geometric.nn.models.visnet", "ViSNetBlock")
        if len(blocks) != 1:
            raise AttachError(f"{type(model).__name__} has {len(blocks)} ViSNetBlocks; give a model with one")
        (block,) = blocks
        slots = []
        for index, layer in enumerate(layers):
            degrees = [(degree, (-1) ** degree) for degree in range(1, int(block.lmax) + 1)]  # type: ignore[arg-type]
            spec = SlotSpec(
                host=self.name,
                layer=index,
                num_layers=len(layers),
                # the vectors that enter the first layer are zero
                degrees=((0, 1), *(degrees if index else [])),
                num_channels=int(layer.hidden_channels),  # type: ignore[arg-type]
                cutoff=float(block.cutoff),  # type: ignore[arg-type]
                num_radial=int(block.num_rbf),  # type: ignore[arg-type]
            )
            slots.append(Slot(layer, layer.cutoff, spec))  # type: ignore[arg-type]
        return slots

    def watch(self, model: nn.Module, seen: Seen) -> list[RemovableHandle]:
        (block,) = _found(model, "torch_geometric.nn.models.visnet", "ViSNetBlock")
        return [block.distance_expansion.register_forward_hook(_RadialWatcher(seen))]  # type: ignore[union-attr]

    def inputs(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], spec: SlotSpec, seen: Seen
    ) -> tuple[Tensor, ForeignEdges]:
        names = ("x", "vec", "edge_index", "r_ij", "f_ij", "d_ij")
        given = dict(zip(names, args)) | kwargs
        scalars = given["x"].unsqueeze(1)
        features = scalars if len(spec.degrees) == 1 else torch.cat([scalars, given["vec"]], dim=1)
        between = given["edge_index"][0] != given["edge_index"][1]
        senders, receivers = given["edge_index"][:, between]
        lengths = given["r_ij"][between]
        edges = ForeignEdges(
            senders=senders,
            receivers=receivers,
            vectors=lengths.unsqueeze(1) * given["d_ij"][between, :3],
            lengths=lengths,
            radial=seen.values["radial"][between],
            envelope=cosine_envelope(lengths, spec.cutoff),
            num_atoms=len(scalars),
        )
        return features, edges

    def on_all_rows(self, alpha: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        edge_index = args[2] if len(args) > 2 else kwargs["edge_index"]
        between = edge_index[0] != edge_index[1]
        return alpha.new_ones(len(between)).index_put((between.nonzero().squeeze(1),), alpha)


class _RadialWatcher:
    """Keeps the radial basis of the present call."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.seen.values = {"radial": output}
