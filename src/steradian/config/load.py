"""A whole run: read from a file, overridden, validated; and what a mistake in it is told."""

from __future__ import annotations

import difflib
import json
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from steradian.config.earlier import complete_run
from steradian.config.hosts import MACEConfig, NequIPConfig, ViSNetConfig
from steradian.config.operators import EFAConfig, MARAConfig, NoGate, O3MPNNConfig
from steradian.config.precision import PRESETS, ElementTablesConfig, PrecisionConfig, Preset
from steradian.config.run import DataConfig, TrainingConfig
from steradian.config.section import Section
from steradian.config.text import parse_yaml, printable, read_text

__all__ = [
    "ConfigError",
    "HostConfig",
    "ModelConfig",
    "NoMixer",
    "RunConfig",
    "dump_config",
    "json_schema",
    "load_config",
    "parse_config",
]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists every mistake, one line each, with the way out."""


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


class RunConfig(Section):
    """A whole training run."""

    name: str = "run"
    output: Path = Path("runs")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
            raise ValueError(
                "the folder of a run lies inside 'output': choose a name such as 'ethanol' or 'set1/ethanol'"
            )
        return name

    @model_validator(mode="after")
    def _check_orders(self) -> RunConfig:
        epochs = self.training.progressive_correlation
        if epochs is None:
            return self
        host = self.model.host
        if not isinstance(host, MACEConfig):
            raise ValueError("training.progressive_correlation belongs to the host 'mace'")
        wanted = max(host.correlations) - 1
        if len(epochs) != wanted or epochs != sorted(epochs) or min(epochs, default=0) < 0:
            raise ValueError(f"training.progressive_correlation needs {wanted} epochs in ascending order")
        return self


def load_config(path: Path | str, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``a.b=c`` overrides and validate.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds mistakes (all of them are listed).
    """
    path = Path(path)
    try:
        text = read_text(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if content is None:
        raise ConfigError(f"{path}: the file is empty; start from one of the examples in configs/")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected sections such as 'model:' and 'data:', found a {type(content).__name__}")
    return parse_config(content, overrides, source=str(path))


def parse_config(content: dict[str, Any], overrides: typing.Sequence[str] = (), source: str = "config") -> RunConfig:
    """Validate a nested dictionary; see :func:`load_config`.

    One in which an earlier version wrote out every default means what it meant then (:mod:`.earlier`).
    """
    try:
        content = json.loads(json.dumps(content, default=str))
    except (TypeError, ValueError, RecursionError) as error:  # keys that are no text, a dictionary within itself
        raise ConfigError(f"{source}: {error}") from None
    content = complete_run(content)
    given: dict[str, str] = {}
    for override in overrides:
        key = override.partition("=")[0].strip()
        if given.setdefault(key, override) != override:
            raise ConfigError(f"--set {key} is given twice: {given[key]} and {override}")
        _apply_override(content, override)
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(_explain(error, source)) from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply") from None


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: write KEY=VALUE, such as model.host.num_channels=32")
    *parents, last = key.strip().split(".")
    node = content
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: '{parent}' is not a section")
        node = child
    try:
        node[last] = json.loads(json.dumps(parse_yaml(value), default=str))
    except ValueError as error:
        raise ConfigError(f"--set {override}: '{value}' is not a YAML value ({error})") from None


def _explain(error: ValidationError, source: str) -> str:
    lines = []
    for mistake in error.errors():
        location = tuple(part for part in mistake["loc"])
        name = ".".join(_walk(RunConfig, location)[1])
        if mistake["type"] == "extra_forbidden":
            known = _keys_at(RunConfig, location[:-1])
            last = str(location[-1])
            near = [place for place in _places(RunConfig, last) if place != name]
            near = near or difflib.get_close_matches(last, known, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"
            lines.append(f"  {name}: unknown key; {hint}")
        else:
            message = mistake["msg"].removeprefix("Value error, ")
            given = mistake.get("input")
            shown = f" (got {given!r})" if isinstance(given, int | float | str | bool | None) else ""
            lines.append(f"  {name}: {message[0].lower()}{message[1:]}{shown}")
    lines = [printable(line) if len(line) < 400 else f"{printable(line)[:400]} ..." for line in lines]
    count = len(lines)
    return f"{source}: {count} mistake{'s' if count > 1 else ''}\n" + "\n".join(lines)


def _keys_at(model: Any, location: tuple[Any, ...]) -> list[str]:
    """Field names of the section that a validation error's location points to."""
    candidates, _ = _walk(model, location)
    return sorted({name for candidate in candidates for name in candidate.model_fields})


def _places(model: Any, name: str, prefix: str = "") -> list[str]:
    """Full names of the keys called ``name`` in the whole tree of sections: a right key in a wrong section."""
    found = []
    for section in _sections_in(model):
        for key, entry in section.model_fields.items():
            if key == name and prefix:
                found.append(f"{prefix}{key}")
            found += _places(entry.annotation, name, f"{prefix}{key}.")
    return list(dict.fromkeys(found))


def _walk(model: Any, location: tuple[Any, ...]) -> tuple[list[type[BaseModel]], list[str]]:
    """Sections that a validation error's location leads to, and the keys on the way as they stand in the file."""
    candidates, keys = _sections_in(model), []
    for part in location:
        found: list[type[BaseModel]] = []
        is_tag = False  # pydantic puts the tag of a union into the location; the file has no such key
        for candidate in candidates:
            if part in candidate.model_fields:
                found += _sections_in(candidate.model_fields[part].annotation)
            elif candidate.model_fields.get("kind") is not None and candidate.model_fields["kind"].default == part:
                found.append(candidate)
                is_tag = True
        candidates = found or candidates
        if not is_tag:
            keys.append(str(part))
    return candidates, keys


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (Union, types.UnionType, Annotated):
        return [section for part in typing.get_args(annotation) for section in _sections_in(part)]
    return []


def dump_config(config: BaseModel) -> str:
    """The resolved configuration as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """JSON schema of a configuration file, for editors."""
    return RunConfig.model_json_schema()
