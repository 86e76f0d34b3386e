"""MARA, attention on the sphere around every atom (Leonardi, Bonev, Riesen 2026).

In the order in which to read: :mod:`.channel` (the gate per channel, the default); :mod:`.paper` (the published
equations), :mod:`.factorised` (the same at a fraction of the work), :mod:`.gate` (the module in the published frame),
:mod:`.intrinsic` (the one that turns with the atom); then
:mod:`.cpu` and :mod:`.cpu_code` (machine code), :mod:`.triton`, :mod:`.triton_kernels`, :mod:`.triton_sums` (GPUs).
"""

from __future__ import annotations

from typing import Any

from steradian.config import MARAConfig
from steradian.equivariant.sphere import make_grid
from steradian.operators.base import GateFactory, SlotSpec, in_layer
from steradian.operators.mara.channel import ChannelGate
from steradian.operators.mara.gate import MARA, SEAttention, SphereGate
from steradian.operators.mara.intrinsic import IntrinsicMARA

__all__ = ["MARA", "ChannelGate", "IntrinsicMARA", "SEAttention", "SphereGate", "gate_of", "mara_factory"]


def gate_of(config: MARAConfig, spec: SlotSpec) -> SphereGate | ChannelGate:
    """The gate that a configuration section asks for, in a slot of a host layer.

    Raises:
        ValueError: options that do not fit each other, or a grid that the form cannot use.
    """
    if config.form == "channel":
        return ChannelGate(
            spec,
            spec.num_channels if config.heads == "C" else config.heads,
            config.inputs,
            config.hidden_dim,
            config.activation,
            config.where,
            resolution=config.resolution,
            frozen_projections=config.frozen_projections,
            sphere=_intrinsic(config, spec, where="edge") if config.attends else None,
        )
    if config.frame == "intrinsic":
        if config.dropout:
            raise ValueError("dropout belongs to frame 'lab'; set model.edge_gate.dropout to 0")
        return _intrinsic(config, spec, gate=config.gate, where=config.where)
    names = ("gate", "where", "dropout", "normalize", "residual")
    own: dict[str, Any] = {name: getattr(config, name) for name in names}
    return MARA(spec.num_channels, field=config.field or "distance", **own, **_shared(config))


def _shared(config: MARAConfig) -> dict[str, Any]:
    names = ("hidden_dim", "num_heads", "positional", "frozen_projections")
    shared: dict[str, Any] = {name: getattr(config, name) for name in names}
    return shared | {"grid": None if config.grid is None else make_grid(config.grid)}


def _intrinsic(config: MARAConfig, spec: SlotSpec, **options: Any) -> IntrinsicMARA:
    own: dict[str, Any] = {"kernel": config.kernel, "signal_l_max": config.signal_l_max}
    return IntrinsicMARA(spec.num_channels, spec.degrees, spec.num_radial, **own, **options, **_shared(config))


def mara_factory(config: MARAConfig) -> GateFactory:
    """The factory that fills the edge gates of a model's layers as a configuration section says.

    It raises ValueError where ``config.layers`` lists a layer that the model does not have.
    """

    def make(spec: SlotSpec) -> SphereGate | ChannelGate | None:
        return gate_of(config, spec) if in_layer(config.layers, spec, "model.edge_gate") else None

    return make
