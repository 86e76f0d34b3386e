"""Configuration sections of MARA and the sphere rules it attends on, of EFA and of the O(3) network of its paper."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Union

from pydantic import Field, model_validator

from steradian.config.section import Section

__all__ = [
    "EFAConfig",
    "EquiangularGrid",
    "GaussLegendreGrid",
    "GridConfig",
    "LebedevGrid",
    "MARAConfig",
    "NoGate",
    "O3MPNNConfig",
    "SphericalDesign",
    "TensorIntegrationConfig",
]


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


# ---------------------------------------------------------------------------------------------------------------- MARA


class EquiangularGrid(Section):
    kind: Literal["equiangular"] = "equiangular"
    num_lat: int = Field(4, ge=1)
    num_lon: int = Field(8, ge=1)
    poles: bool = Field(True, description="with points at the poles (torch-harmonics, the paper) or half a cell off")


class GaussLegendreGrid(Section):
    kind: Literal["gauss_legendre"] = "gauss_legendre"
    num_lat: int = Field(4, ge=1)
    num_lon: int = Field(8, ge=1)


class LebedevGrid(Section):
    kind: Literal["lebedev"] = "lebedev"
    num_points: int = Field(50, ge=6)


class SphericalDesign(Section):
    kind: Literal["design"] = "design"
    degree: int = Field(5, ge=1)


GridConfig = Annotated[
    Union[EquiangularGrid, GaussLegendreGrid, LebedevGrid, SphericalDesign],  # noqa: UP007 (pydantic tags read it)
    Field(discriminator="kind"),
]


class NoGate(Section):
    kind: Literal["none"] = "none"


GateInput = Literal["scalars", "radial", "projections", "density", "first-density", "sphere"]


class MARAConfig(Section):
    """Modular Angular-Radial Attention: a gate per channel, or the form of Leonardi, Bonev, Riesen 2026."""

    kind: Literal["mara"] = "mara"
    form: Literal["channel", "published"] = Field(
        "channel", description="a gate for every channel of a message, or the paper's one for all of them"
    )
    hidden_dim: int = Field(32, ge=1, description="width d of the gate's network, or of the attention of all heads")
    where: Literal["edge", "node"] = Field("edge", description="gate every message (equation 8) or every sender")
    frozen_projections: bool = Field(False, description="ablation: all but the last weights stay at their random start")
    layers: list[int] | None = Field(None, description="layers of the host that are gated; null for all")

    heads: Literal["C"] | Annotated[int, Field(ge=1)] = Field(
        "C", description="form channel: groups of channels with a gate each; C: every channel its own"
    )
    inputs: list[GateInput] = Field(
        ["scalars", "radial", "projections"],
        min_length=1,
        description="form channel: scalars of both atoms, radial basis, their features along the edge, the neighbours' "
        "density along the edge, attention on the sphere",
    )
    activation: Literal["linear", "sigmoid", "exp"] = Field(
        "linear", description="form channel: alpha = 1 + z, 2 sigma(z) or exp(3 tanh(z / 3))"
    )

    grid: GridConfig | None = Field(
        None, description="points of the sphere; null: 50 Lebedev points, in frame lab the paper's 4 x 8"
    )
    num_heads: int = Field(1, ge=1, description="of the attention on the sphere")
    frame: Literal["intrinsic", "lab"] = Field("intrinsic", description="rotation-invariant, or the published axes")
    field: Literal["distance", "squared"] | None = Field(None, description="null: distance (lab), squared (intrinsic)")
    kernel: Literal["exp", "polynomial"] = "exp"
    signal_l_max: int = Field(2, ge=1, le=4, description="frame intrinsic: highest degree of the atom's signal")
    positional: bool = Field(True, description="learnable vector per grid point, or the atom's signal")
    gate: Literal["neutral", "published"] = Field("neutral", description="neutral: alpha = 1 at the start")
    dropout: float = Field(0.0, ge=0, lt=1)
    normalize: bool = Field(False, description="LayerNorm of the embeddings (figure 5)")
    residual: bool = Field(False, description="residual around the attention (figure 5)")

    @property
    def attends(self) -> bool:
        """Whether there is attention on a sphere."""
        return self.form == "published" or "sphere" in self.inputs

    @model_validator(mode="after")
    def _check(self) -> MARAConfig:
        self._check_form()
        if self.attends and self.hidden_dim % self.num_heads:
            raise ValueError(f"hidden_dim ({self.hidden_dim}) must be a multiple of num_heads ({self.num_heads})")
        if self.frame == "intrinsic" and self.field == "distance":
            raise ValueError("frame 'intrinsic' needs the squared field (the distance field spoils the sphere rule)")
        if self.kernel == "polynomial" and self.frame != "intrinsic":
            raise ValueError("kernel 'polynomial' belongs to frame 'intrinsic'")
        if self.frame == "intrinsic" and (self.normalize or self.residual):
            raise ValueError("normalize and residual belong to the published form, frame 'lab'")
        return self

    def _check_form(self) -> None:
        """Settings of a form that is not asked for are mistakes, not to be passed over."""
        changed = {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}
        if self.form == "published":
            if wrong := sorted(changed & {"heads", "inputs", "activation"}):
                raise ValueError(f"{', '.join(wrong)}: of form 'channel'; set form: channel or leave it out")
            return
        only = {"frame", "field", "gate", "dropout", "normalize", "residual"}
        if not self.attends:
            only |= {"grid", "num_heads", "kernel", "signal_l_max", "positional"}
        if wrong := sorted(changed & only):
            others = "" if self.attends else ", or list 'sphere' in inputs where the channel gate may attend on a sphere"
            raise ValueError(f"{', '.join(wrong)}: of form 'published'; set form: published{others}")
        if len(set(self.inputs)) != len(self.inputs):
            raise ValueError(f"inputs lists one twice: {self.inputs}")
