"""Configuration sections of Euclidean Fast Attention and of the O(3) network of its paper."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from steradian.config.section import Section

__all__ = ["EFAConfig", "O3MPNNConfig", "TensorIntegrationConfig"]


class TensorIntegrationConfig(Section):
    """Attention per direction, coupled with harmonics of the direction before the integral."""

    max_degree_sph: int | None = Field(None, ge=0, le=4, description="highest degree of the harmonics; null: as input")
    max_degree: int | None = Field(None, ge=0, le=4, description="highest degree of the result; null: as input")
    include_pseudotensors: bool | None = Field(None, description="null: where the input has some")
    learned_paths: bool = Field(False, description="learn a number per coupling path and channel")
    degree_scaling: list[float] | None = Field(None, description="factor per degree of the harmonics; null: ones")


class EFAConfig(Section):
    """Euclidean Fast Attention (Frank, Chmiela, Müller, Unke 2024)."""

    kind: Literal["efa"] = "efa"
    num_points: int = Field(50, ge=6, description="points of the Lebedev rule")
    max_frequency: float = Field(math.pi, gt=0, description="largest frequency times max_length_A (dimensionless)")
    max_length_A: float = Field(15.0, gt=0, description="largest distance that the frequencies are made for")
    trainable_frequencies: bool = False
    graded: bool = Field(False, description="fewer points for lower frequencies, at the error of the largest one")
    parametrized: bool = Field(True, description="learned maps to queries, keys and values; false: the features")
    num_features_qk: int | None = Field(None, ge=2, description="even; null: as the input")
    num_features_v: int | None = Field(None, ge=1, description="null: as the input")
    max_degree: int | None = Field(None, ge=0, description="highest degree that enters; null: all")
    include_pseudotensors: bool = Field(False, description="pseudotensors enter")
    max_degree_qk: int | None = Field(None, ge=0, description="of queries and keys; null: as the input")
    max_degree_v: int | None = Field(None, ge=0, description="of values; null: as the input")
    include_pseudotensors_qk: bool | None = Field(None, description="null: where the input has some")
    include_pseudotensors_v: bool | None = Field(None, description="null: where the input has some")
    activation: Literal["identity", "silu", "gelu"] = Field("gelu", description="of queries and keys")
    tensor_integration: TensorIntegrationConfig | None = None
    periodic: bool = Field(False, description="periodic systems: sum over the reciprocal lattice")
    shell_width_per_A: float | None = Field(
        None, gt=0, description="periodic: half width of each frequency's shell of wave numbers; null: their spacing"
    )
    source: Literal["input", "update"] | None = Field(
        None, description="attend with the layer's input or its local update; null: input (o3mpnn) or update (others)"
    )
    emulate: bool = Field(False, description="ablation: a linear map of the atom itself in place of the attention")
    divide_by: float = Field(1.0, gt=0, description="divides the attention, a sum over all atoms")
    zero_init: bool = Field(True, description="the block adds nothing before training")
    layers: list[int] | None = Field(None, description="layers of the host with a block; null for all")

    @model_validator(mode="after")
    def _check(self) -> EFAConfig:
        if self.num_features_qk is not None and self.num_features_qk % 2:
            raise ValueError(f"num_features_qk must be even (channels rotate in pairs), not {self.num_features_qk}")
        if not self.parametrized and (self.num_features_qk or self.num_features_v):
            raise ValueError("num_features_qk and num_features_v need parametrized: true")
        if self.graded and self.trainable_frequencies:
            raise ValueError("graded rules need fixed frequencies")
        return self


class O3MPNNConfig(Section):
    """The O(3)-equivariant message-passing network of the EFA paper."""

    kind: Literal["o3mpnn"] = "o3mpnn"
    num_layers: int = Field(2, ge=1, le=1000)
    num_channels: int = Field(32, ge=1, le=65536)
    l_max: int = Field(2, ge=0, le=4, description="highest degree of the filters and of the features")
    num_radial: int = Field(32, ge=1, description="Bernstein polynomials of r / (1 + r)")
    cutoff_A: float = Field(5.0, gt=0)
    cutoff_function: Literal["smooth", "cosine"] = "smooth"
    num_post_residual_mlps: int = Field(0, ge=0)
    self_interaction: bool = Field(False, description="couple the features of an atom with themselves")
    dipole_embedding: bool = Field(False, description="atoms come with dipoles, which enter as vectors")
    use_switch: bool = Field(True, description="learned balance of local and global update per layer")
    zero_init: bool = Field(True, description="updates and energy start from zero")
    avg_num_neighbors: float | None = Field(None, gt=0, description="not used: messages are plain sums")

    @property
    def hidden_l(self) -> int:
        return self.l_max

    def summary(self) -> dict[str, str]:
        """What ``steradian inspect`` says of the host."""
        extras = [
            name
            for name, used in (
                ("self-interaction", self.self_interaction),
                ("dipoles", self.dipole_embedding),
                ("switch", self.use_switch),
                (f"{self.num_post_residual_mlps} residual layers", self.num_post_residual_mlps > 0),
            )
            if used
        ]
        return {
            "features": f"{self.num_channels} channels, degrees up to {self.l_max}",
            "radial basis": f"{self.num_radial} Bernstein polynomials, {self.cutoff_function} cutoff",
            "options": ", ".join(extras) or "none",
        }
