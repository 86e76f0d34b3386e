"""Euclidean Fast Attention as a block of a host's layer."""

from __future__ import annotations

from torch import Tensor

from steradian.config import EFAConfig
from steradian.equivariant.irreps import all_degrees, max_degree, natural_degrees
from steradian.equivariant.linear import MLP, Dense, add_features, change_degrees, union
from steradian.graph import Edges
from steradian.operators.base import GlobalMixer, MixerFactory, Rotation, SlotSpec, in_layer
from steradian.operators.efa.operator import EuclideanFastAttention, Systems

__all__ = ["EFAMixer", "efa_factory"]


class EFAMixer(GlobalMixer):
    """``MLP(Dense(EFA(x')) + x)`` with x' the irreps of x that may enter (Frank et al. 2024, figure 2).

    Args:
        config: the options.
        spec: the slot. In a host that adds updates of any irreps x is the layer's input, else its local update, so that
            the last layer attends with what the atoms know of their surroundings.

    Attributes:
        degrees_out: irreps of the update.

    Raises:
        ValueError: options that do not fit the slot's irreps.
    """

    rotation: Rotation = "quadrature"

    def __init__(self, config: EFAConfig, spec: SlotSpec) -> None:
        super().__init__()
        self.supports_pbc = config.periodic
        unit, channels = spec.unit_weights, spec.channels_out or spec.num_channels
        self.source = config.source or ("input" if spec.degrees_out is None else "update")
        degrees = spec.degrees if self.source == "input" or spec.degrees_out is None else spec.degrees_out
        if self.source == "input" and channels != spec.num_channels:
            raise ValueError(
                f"layer {spec.layer} of {spec.host} turns {spec.num_channels} channels into {channels}: "
                "set model.global_mixer.source=update"
            )
        present = max_degree(degrees)
        highest, both = present if config.max_degree is None else config.max_degree, config.include_pseudotensors
        if spec.scalars_only:
            highest, both = 0, False
        elif present == 0:
            highest = 0
        allowed = all_degrees(highest) if both else natural_degrees(highest)
        self.degrees, self.degrees_in = degrees, tuple(irrep for irrep in degrees if irrep in allowed)
        self.attention: EuclideanFastAttention | Dense
        if config.emulate:
            self.attention, self.degrees_h, width = Dense(degrees, channels, channels, unit=unit), degrees, channels
        else:
            self.attention = EuclideanFastAttention(config, self.degrees_in, channels, nominal=allowed, unit=unit)
            self.degrees_h, width = self.attention.degrees_out, self.attention.channels_out
        self.dense = Dense(self.degrees_h, width, channels, unit=unit)
        self.degrees_sum = union(self.degrees_h, degrees)
        self.degrees_out = spec.degrees_out or self.degrees_sum
        self.mlp = MLP(self.degrees_sum, channels, zero=config.zero_init, unit=unit)

    def summary(self) -> str:
        if not isinstance(self.attention, EuclideanFastAttention):
            return "EFA emulated by a linear map"
        return f"EFA on the {'layer input' if self.source == 'input' else 'local update'}; {self.attention.summary()}"

    def global_update(self, features: Tensor, local_update: Tensor, positions: Tensor, edges: Edges) -> Tensor:
        x = features if self.source == "input" else local_update
        if isinstance(self.attention, EuclideanFastAttention):
            entering = change_degrees(x, self.degrees, self.degrees_in)
            systems = Systems(edges.topology.sizes, edges.topology.is_static)
            h = self.attention(entering, positions, systems, edges.cell, edges.pbc, edges.share)
        else:
            h = self.attention(x)
        total, _ = add_features(self.dense(h), self.degrees_h, x, self.degrees)
        return change_degrees(self.mlp(total), self.degrees_sum, self.degrees_out)


def efa_factory(config: EFAConfig) -> MixerFactory:
    """The factory that fills the slots of global mixers as a configuration section says.

    It raises ValueError where ``config.layers`` lists a layer that the model does not have.
    """

    def make(spec: SlotSpec) -> GlobalMixer | None:
        return EFAMixer(config, spec) if in_layer(config.layers, spec, "model.global_mixer") else None

    return make
