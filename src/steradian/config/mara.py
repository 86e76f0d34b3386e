"""Configuration section of MARA and of the sphere rules it attends on."""

from __future__ import annotations

from typing import Annotated, Literal, Union

from pydantic import Field, model_validator

from steradian.config.section import Section

__all__ = [
    "EquiangularGrid",
    "GaussLegendreGrid",
    "GridConfig",
    "LebedevGrid",
    "MARAConfig",
    "NoGate",
    "SphericalDesign",
]


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


class MARAConfig(Section):
    """Modular Angular-Radial Attention (Leonardi, Bonev, Riesen 2026)."""

    kind: Literal["mara"] = "mara"
    grid: GridConfig = EquiangularGrid()
    hidden_dim: int = Field(32, ge=1, description="attention channels d, all heads together")
    num_heads: int = Field(1, ge=1)
    where: Literal["edge", "node"] = Field("edge", description="gate every message (equation 8) or every sender")
    frame: Literal["lab", "intrinsic"] = Field("lab", description="published form, or the rotation-invariant one")
    field: Literal["distance", "squared"] | None = Field(None, description="null: distance (lab), squared (intrinsic)")
    kernel: Literal["exp", "polynomial"] = "exp"
    signal_l_max: int = Field(2, ge=1, le=4, description="frame intrinsic: highest degree of the atom's signal")
    gate: Literal["neutral", "published"] = Field("neutral", description="neutral: alpha = 1 at the start")
    positional: bool = Field(True, description="learnable vector per grid point")
    frozen_projections: bool = Field(False, description="ablation: projections stay at their random start")
    dropout: float = Field(0.0, ge=0, lt=1)
    normalize: bool = Field(False, description="LayerNorm of the embeddings (figure 5)")
    residual: bool = Field(False, description="residual around the attention (figure 5)")
    layers: list[int] | None = Field(None, description="layers of the host that are gated; null for all")

    @model_validator(mode="after")
    def _check_heads(self) -> MARAConfig:
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"hidden_dim ({self.hidden_dim}) must be a multiple of num_heads ({self.num_heads})")
        if self.frame == "intrinsic" and self.field == "distance":
            raise ValueError("frame 'intrinsic' needs the squared field (the distance field spoils the sphere rule)")
        if self.kernel == "polynomial" and self.frame != "intrinsic":
            raise ValueError("kernel 'polynomial' belongs to frame 'intrinsic'")
        if self.frame == "intrinsic" and (self.normalize or self.residual):
            raise ValueError("normalize and residual belong to the published form, frame 'lab'")
        return self
