"""Configuration of a model: a host, what fills its slots, and the precision of both."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union

from pydantic import Field, field_validator

from steradian.config.efa import EFAConfig, O3MPNNConfig
from steradian.config.hosts import MACEConfig, NequIPConfig, ViSNetConfig
from steradian.config.mara import MARAConfig, NoGate
from steradian.config.precision import PRESETS, ElementTablesConfig, PrecisionConfig, Preset
from steradian.config.section import Section

__all__ = ["HostConfig", "ModelConfig", "NoMixer"]


class NoMixer(Section):
    kind: Literal["none"] = "none"


AnyHost = Union[MACEConfig, NequIPConfig, O3MPNNConfig, ViSNetConfig]  # noqa: UP007
HostConfig = Annotated[AnyHost, Field(discriminator="kind")]
EdgeGateConfig = Annotated[Union[NoGate, MARAConfig], Field(discriminator="kind")]  # noqa: UP007
GlobalMixerConfig = Annotated[Union[NoMixer, EFAConfig], Field(discriminator="kind")]  # noqa: UP007


class ModelConfig(Section):
    """Host, operators and numbers that define a potential."""

    host: HostConfig = MACEConfig()
    edge_gate: EdgeGateConfig = NoGate()
    global_mixer: GlobalMixerConfig = NoMixer()
    element_tables: ElementTablesConfig = ElementTablesConfig()
    precision: Preset | PrecisionConfig = Field(
        "float32", description="a preset, or a section with a preset and other formats for single roles"
    )

    @field_validator("host", mode="before")
    @classmethod
    def _mace_unless_said(cls, host: Any) -> Any:
        return {"kind": "mace", **host} if isinstance(host, dict) else host

    @field_validator("precision", mode="before")
    @classmethod
    def _known_preset(cls, precision: Any) -> Any:
        if isinstance(precision, str) and precision not in PRESETS:
            raise ValueError(f"unknown preset; choose {', '.join(PRESETS)}")
        # one kind of value goes on, so that a mistake is told once
        return PrecisionConfig.model_validate(precision) if isinstance(precision, dict) else precision
