"""Precision in a configuration file: presets, roles and formats. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from steradian.config.section import Section

__all__ = [
    "FORMATS",
    "LAYER_ROLES",
    "PRESETS",
    "ROLES",
    "WIDE_ROLES",
    "ElementTablesConfig",
    "Format",
    "Int8Kind",
    "Int8Role",
    "PrecisionConfig",
    "Preset",
    "Role",
]

Preset = Literal["float64", "float32", "mixed", "half", "tf32"]
Format = Literal["float64", "float32", "bfloat16", "float16"]
Role = Literal[
    "geometry",
    "harmonics",
    "tables",
    "radial",
    "messages",
    "accumulate",
    "paths",
    "contraction",
    "node",
    "attention",
    "readout",
    "energy",
    "forces",
]
Int8Role = Literal["radial", "readout"]
Int8Kind = Literal["weights", "dynamic"]
PRESETS: tuple[str, ...] = get_args(Preset)
FORMATS: tuple[str, ...] = get_args(Format)
ROLES: tuple[str, ...] = get_args(Role)
#: Roles that take no format of 16 bits: their rounding is not averaged out by anything that follows.
WIDE_ROLES = ("geometry", "harmonics", "tables", "accumulate", "energy", "forces")
#: Roles that a layer may have of its own.
LAYER_ROLES = ("radial", "messages", "accumulate", "paths", "contraction", "node", "attention")


def check_roles(roles: Mapping[Role, Format], where: str) -> None:
    for role, name in roles.items():
        if role in WIDE_ROLES and name in ("bfloat16", "float16"):
            raise ValueError(f"{where}: {role} needs at least float32, got {name}")


class PrecisionConfig(Section):
    """A preset with other formats for some roles, in all layers or in one."""

    preset: Preset = "float32"
    roles: dict[Role, Format] = Field({}, description="role to format, instead of the preset's")
    layers: dict[int, dict[Role, Format]] = Field({}, description="number of a layer to roles, for this layer alone")
    int8: dict[Int8Role, Int8Kind] = Field(
        {},
        description="MACE, NequIP, inference: int8 weights, or with 'dynamic' int8 products",
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _whole_numbers(cls, layers: Any) -> Any:
        return {int(key): value for key, value in layers.items()} if isinstance(layers, dict) else layers

    @model_validator(mode="after")
    def _check(self) -> PrecisionConfig:
        check_roles(self.roles, "roles")
        for layer, roles in self.layers.items():
            check_roles(roles, f"layers.{layer}")
            outside = sorted(set(roles) - set(LAYER_ROLES))
            if outside:
                raise ValueError(
                    f"layers.{layer}: {', '.join(outside)} belongs to no layer; layers have {', '.join(LAYER_ROLES)}"
                )
        return self


class ElementTablesConfig(Section):
    """What MACE learns per chemical element (embedding, skip connections, contractions), in a smaller form."""

    rank: int | None = Field(None, ge=1, description="rows are combinations of so many shared ones; null: free rows")
    bits: int | None = Field(None, ge=2, le=8, description="rows are rounded to so many bits; null: not rounded")
