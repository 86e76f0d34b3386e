"""Where the layers of other packages' models are, and what an operator sees of them.

Only classes of packages that are imported already are looked at; nothing here imports one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steradian.interfaces.attach_base import (
    MOLECULES_ONLY,
    AttachError,
    ForeignAtoms,
    ForeignEdges,
    Given,
    MixingSlot,
    Package,
    Seen,
    Slot,
    Watcher,
    channels_last,
    degrees_of,
    entries_of,
    flat,
    found,
    known_class,
    last_linear,
    leaving,
    widths_out,
)
from steradian.operators.base import SlotSpec
from steradian.radial import cosine_envelope, polynomial_envelope

__all__ = ["package_of"]


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


class MaceTorch(Package):
    """mace-torch: every subclass of ``InteractionBlock`` makes the weights of its product in ``conv_tp_weights``.

    Edge vectors run from sender to receiver there. Blocks do not get them, so they are taken from what enters the
    spherical harmonics.
    """

    name = "mace-torch"

    def serves(self, model: nn.Module) -> bool:
        return bool(found(model, "mace.modules.blocks", "InteractionBlock"))

    def slots(self, model: nn.Module) -> list[Slot]:
        blocks = found(model, "mace.modules.blocks", "InteractionBlock")
        for needed in ("spherical_harmonics", "radial_embedding", "r_max"):
            if not hasattr(model, needed):
                raise AttachError(f"give the whole model: {type(model).__name__} has no {needed}")
        slots = []
        for index, block in enumerate(blocks):
            if not isinstance(getattr(block, "conv_tp_weights", None), nn.Module):
                raise AttachError(f"{type(block).__name__} has no conv_tp_weights, whose output a gate would multiply")
            degrees, channels = degrees_of(block.node_feats_irreps)
            spec = SlotSpec(
                host=self.name,
                layer=index,
                num_layers=len(blocks),
                degrees=degrees,
                num_channels=channels,
                cutoff=float(model.r_max),  # type: ignore[arg-type]
                num_radial=int(model.radial_embedding.out_dim),  # type: ignore[union-attr, arg-type]
            )
            weights: Any = block.conv_tp_weights
            slots.append(Slot(block, weights, spec, last_linear(weights, spec.num_radial)))
        return slots

    def mixing_slots(self, model: nn.Module) -> list[MixingSlot]:
        products = found(model, "mace.modules.blocks", "EquivariantProductBasisBlock")
        slots = self.slots(model)
        if len(products) != len(slots):
            raise AttachError(f"{len(slots)} interaction blocks and {len(products)} product blocks do not make layers")
        return [
            MixingSlot(slot.layer, product, widths_out(_product_irreps(product), slot.spec))
            for slot, product in zip(slots, products)
        ]

    def watch(self, model: nn.Module, seen: Seen) -> list[RemovableHandle]:
        cutoff = getattr(model.radial_embedding, "cutoff_fn", None)
        seen.facts["power"] = int(getattr(cutoff, "p", 6))
        harmonics: Any = model.spherical_harmonics
        return [
            # the model puts strained positions into the batch that it is given
            model.register_forward_pre_hook(Watcher(seen, "data").before, with_kwargs=True),
            harmonics.register_forward_pre_hook(Watcher(seen, "x").before, with_kwargs=True),
        ]

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
        given = dict(zip(("node_attrs", "node_feats", "edge_attrs", "edge_feats", "edge_index"), args)) | kwargs
        if given.get("lammps_class") is not None:
            raise AttachError("ghost atoms of LAMMPS (ML-IAP) are not served: an operator needs all features of a step")
        return given

    def features(self, layer: nn.Module, given: Given, spec: SlotSpec) -> Tensor:
        return channels_last(given["node_feats"], spec, _layout(layer) != "ir_mul")

    def edges(self, given: Given, spec: SlotSpec, seen: Seen) -> ForeignEdges:
        senders, receivers = given["edge_index"]
        vectors = -seen.values["x"].to(given["node_feats"].dtype)
        lengths = torch.linalg.vector_norm(vectors, dim=1)
        return ForeignEdges(
            senders=senders,
            receivers=receivers,
            vectors=vectors,
            lengths=lengths,
            radial=given["edge_feats"],
            envelope=polynomial_envelope(lengths, spec.cutoff, seen.facts["power"]),
            num_atoms=len(given["node_feats"]),
        )

    def atoms(self, given: Given, seen: Seen) -> ForeignAtoms:
        data = seen.values["data"]
        if "unit_shifts" in data and bool(data["unit_shifts"].any()):
            raise AttachError(MOLECULES_ONLY)
        return ForeignAtoms.of(data["positions"], data["batch"], len(data["ptr"]) - 1)

    def update(self, output: Any, end: nn.Module, spec: SlotSpec) -> Tensor:
        return channels_last(output, leaving(spec), _layout(end) != "ir_mul")

    def added(self, output: Any, addition: Tensor, end: nn.Module, spec: SlotSpec) -> Any:
        return output + flat(addition, output.shape[1], leaving(spec), _layout(end) != "ir_mul")


def _product_irreps(product: nn.Module) -> Any:
    """Irreps that a product block returns; where cuequivariance runs its linear map, those are of its class."""
    return product.linear.irreps_out  # type: ignore[union-attr]


def _layout(block: nn.Module) -> str:
    """``mul_ir`` (e3nn) or ``ir_mul``, where cuequivariance runs the block."""
    config = getattr(block, "cueq_config", None)
    return str(getattr(config, "layout_str", "mul_ir")) if getattr(config, "enabled", False) else "mul_ir"


class Nequip(Package):
    """nequip: every ``InteractionBlock`` makes the weights of its product in ``edge_mlp``; vectors run as here."""

    name = "nequip"

    def serves(self, model: nn.Module) -> bool:
        if not found(model, "nequip.nn.interaction_block", "InteractionBlock"):
            return False
        compiled = known_class("nequip.nn.compile", "CompileGraphModel")
        if compiled is not None and any(isinstance(part, compiled) for part in model.modules()):
            raise AttachError("the model is built with compile_mode='compile' and calls no hooks; build it as 'eager'")
        return True

    def slots(self, model: nn.Module) -> list[Slot]:
        blocks = found(model, "nequip.nn.interaction_block", "InteractionBlock")
        (normalizer,) = found(model, "nequip.nn.embedding._edge", "EdgeLengthNormalizer")[:1] or (None,)
        if normalizer is None:
            raise AttachError("give the whole model: it has no EdgeLengthNormalizer")
        slots = []
        for index, block in enumerate(blocks):
            degrees, channels = degrees_of(block.irreps_in["node_features"])  # type: ignore[index]
            radial = sum(entry[0] for entry in entries_of(block.irreps_in["edge_embedding"]))  # type: ignore[index, misc]
            spec = SlotSpec(
                host=self.name,
                layer=index,
                num_layers=len(blocks),
                degrees=degrees,
                num_channels=channels,
                cutoff=float(normalizer.r_max),  # type: ignore[arg-type]
                num_radial=radial,
            )
            weights: Any = block.edge_mlp
            slots.append(Slot(block, weights, spec, last_linear(weights, radial)))
        return slots

    def mixing_slots(self, model: nn.Module) -> list[MixingSlot]:
        layers = found(model, "nequip.nn.convnetlayer", "ConvNetLayer")
        slots = self.slots(model)
        if [layer.conv for layer in layers] != [slot.layer for slot in slots]:
            raise AttachError("the model's interaction blocks are not those of its ConvNetLayers")
        outs = [layer.irreps_out["node_features"] for layer in layers]  # type: ignore[index]
        return [MixingSlot(layer, layer, widths_out(out, slot.spec)) for layer, slot, out in zip(layers, slots, outs)]

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
        data = args[0] if args else kwargs["data"]
        if "lmp_mliap_data" in data:
            raise AttachError("ghost atoms of LAMMPS (ML-IAP) are not served: an operator needs all features of a step")
        return data

    def features(self, layer: nn.Module, given: Given, spec: SlotSpec) -> Tensor:
        return channels_last(given["node_features"], spec)

    def edges(self, given: Given, spec: SlotSpec, seen: Seen) -> ForeignEdges:
        receivers, senders = given["edge_index"]
        features = given["node_features"]
        return ForeignEdges(
            senders=senders,
            receivers=receivers,
            vectors=given["edge_vectors"].to(features.dtype),
            lengths=given["edge_lengths"].view(-1).to(features.dtype),
            radial=given["edge_embedding"],
            envelope=given["edge_cutoff"].view(-1),
            num_atoms=len(features),
        )

    def atoms(self, given: Given, seen: Seen) -> ForeignAtoms:
        if "edge_cell_shift" in given and bool(given["edge_cell_shift"].any()):
            raise AttachError(MOLECULES_ONLY)
        positions, num_atoms = given["pos"].to(given["node_features"].dtype), len(given["pos"])
        system = given.get("batch", torch.zeros(num_atoms, dtype=torch.long, device=positions.device))
        return ForeignAtoms.of(positions, system, len(given["num_atoms"]) if "batch" in given else 1)

    def update(self, output: Any, end: nn.Module, spec: SlotSpec) -> Tensor:
        return channels_last(output["node_features"], leaving(spec))

    def added(self, output: Any, addition: Tensor, end: nn.Module, spec: SlotSpec) -> Any:
        features = output["node_features"]
        return output | {"node_features": features + flat(addition, features.shape[1], leaving(spec))}


class PygViSNet(Package):
    """torch_geometric's ViSNet: alpha multiplies the cutoff that weighs the attention of a ``ViS_MP`` layer.

    The rows of an atom with itself are not edges: no operator sees them, and their alpha is 1.
    """

    name = "torch_geometric ViSNet"

    def serves(self, model: nn.Module) -> bool:
        return bool(found(model, "torch_geometric.nn.models.visnet", "ViS_MP"))

    def slots(self, model: nn.Module) -> list[Slot]:
        layers = found(model, "torch_geometric.nn.models.visnet", "ViS_MP")
        blocks = found(model, "torch_geometric.nn.models.visnet", "ViSNetBlock")
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

    def mixing_slots(self, model: nn.Module) -> list[MixingSlot]:
        slots = self.slots(model)
        out = slots[-1].spec.degrees if len(slots) > 1 else ((0, 1), (1, -1), (2, 1))[: 1 + self._l_max(model)]
        return [
            MixingSlot(slot.layer, slot.layer, replace(slot.spec, degrees_out=out, unit_weights=False))
            for slot in slots
        ]

    @staticmethod
    def _l_max(model: nn.Module) -> int:
        (block,) = found(model, "torch_geometric.nn.models.visnet", "ViSNetBlock")
        return int(block.lmax)  # type: ignore[arg-type]

    def watch(self, model: nn.Module, seen: Seen) -> list[RemovableHandle]:
        (block,) = found(model, "torch_geometric.nn.models.visnet", "ViSNetBlock")
        atoms, radial = Watcher(seen, "z", "pos", "batch"), Watcher(seen, "radial")
        return [
            block.register_forward_pre_hook(atoms.before, with_kwargs=True),
            block.distance_expansion.register_forward_hook(radial.after),  # type: ignore[union-attr]
        ]

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
        return dict(zip(("x", "vec", "edge_index", "r_ij", "f_ij", "d_ij"), args)) | kwargs

    def features(self, layer: nn.Module, given: Given, spec: SlotSpec) -> Tensor:
        scalars = given["x"].unsqueeze(1)
        return scalars if len(spec.degrees) == 1 else torch.cat([scalars, given["vec"]], dim=1)

    def edges(self, given: Given, spec: SlotSpec, seen: Seen) -> ForeignEdges:
        between = given["edge_index"][0] != given["edge_index"][1]
        senders, receivers = given["edge_index"][:, between]
        lengths = given["r_ij"][between]
        return ForeignEdges(
            senders=senders,
            receivers=receivers,
            vectors=lengths.unsqueeze(1) * given["d_ij"][between, :3],
            lengths=lengths,
            radial=seen.values["radial"][between],
            envelope=cosine_envelope(lengths, spec.cutoff),
            num_atoms=len(given["x"]),
        )

    def atoms(self, given: Given, seen: Seen) -> ForeignAtoms:
        positions, system = seen.values["pos"], seen.values["batch"]
        return ForeignAtoms.of(positions, system, int(system.max()) + 1 if len(system) else 0)

    def update(self, output: Any, end: nn.Module, spec: SlotSpec) -> Tensor:
        return torch.cat([output[0].unsqueeze(1), output[1]], dim=1)

    def added(self, output: Any, addition: Tensor, end: nn.Module, spec: SlotSpec) -> Any:
        scalars, vectors, *others = output
        return (scalars + addition[:, 0], vectors + addition[:, 1:], *others)

    def on_all_rows(self, alpha: Tensor, given: Given) -> Tensor:
        edge_index = given["edge_index"]
        between = edge_index[0] != edge_index[1]
        return alpha.new_ones(len(between)).index_put((between.nonzero().squeeze(1),), alpha)
