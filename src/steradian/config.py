"""Every section of a configuration file: what may stand in it, its defaults, and what a mistake is told.

A file is YAML and holds data, never code. Unknown keys are errors that name the nearest known one. This module imports
neither torch nor any other heavy package, so that the command line answers at once.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from steradian.config_base import Section
from steradian.config_efa import EFAConfig, O3MPNNConfig
from steradian.config_hosts import ExpNormalConfig, MACEConfig, NequIPConfig, RadialConfig, ReadoutConfig, ViSNetConfig
from steradian.config_precision import PRESETS, ElementTablesConfig, PrecisionConfig, Preset

__all__ = [
    "ConfigError",
    "DataConfig",
    "EFAConfig",
    "ExpNormalConfig",
    "MACEConfig",
    "MARAConfig",
    "ModelConfig",
    "NequIPConfig",
    "O3MPNNConfig",
    "RadialConfig",
    "ReadoutConfig",
    "RunConfig",
    "TrainingConfig",
    "PrecisionConfig",
    "ViSNetConfig",
    "dump_config",
    "json_schema",
    "load_config",
    "parse_config",
]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists every mistake, one line each, with the way out."""


# ------------------------------------------------------------------------------------------------------------- model


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


# -------------------------------------------------------------------------------------------------------------- data


class KeysConfig(Section):
    """Names of the labels in the files; null: the usual names are tried."""

    energy: str | None = None
    forces: str | None = None
    stress: str | None = None
    positions: str | None = None
    numbers: str | None = None
    cell: str | None = None
    config_type: str = "config_type"


class UnitsConfig(Section):
    """Units of the files. Everything is converted to eV and Å on read."""

    energy: str = "eV"
    length: str = "Angstrom"
    forces: str | None = Field(None, description="ENERGY/LENGTH; null: from energy and length")
    stress: str = "eV/Angstrom^3"


class SplitConfig(Section):
    """How one file becomes training and validation frames; counts, fractions or an index file."""

    train: int | float | None = Field(None, description="count (integer) or fraction (below 1); null: the rest")
    validation: int | float = Field(0.05, description="count (integer) or fraction (below 1)")
    test: int | float = Field(0, description="count (integer) or fraction (below 1)")
    seed: int = 0
    shuffle: bool = True
    index_file: Path | None = Field(None, description="npz or JSON with arrays train, validation and, if wanted, test")


class ReferenceEnergiesConfig(Section):
    """Energies of the isolated atoms, taken off before learning."""

    kind: Literal["least_squares", "isolated_atoms", "given", "average", "zero"] = "least_squares"
    values: dict[str, float] = Field({}, description="element symbol to energy [eV], for kind 'given'")
    file: Path | None = Field(None, description="file with the isolated atoms; null: frames of one atom in the data")


class BatchConfig(Section):
    """Systems per batch, or a budget of atoms and edges."""

    graphs: int | None = Field(5, ge=1)
    max_atoms: int | None = Field(None, ge=1)
    max_edges: int | None = Field(None, ge=1)
    balanced: bool = Field(False, description="batches of nearly equal numbers of atoms and edges")

    @model_validator(mode="after")
    def _check_one(self) -> BatchConfig:
        if self.graphs is None and self.max_atoms is None and self.max_edges is None:
            raise ValueError("give graphs, max_atoms or max_edges")
        return self


class DataConfig(Section):
    """Files, labels, units, splits and batches."""

    train: Path | list[Path] | Literal["bundled:malonaldehyde"] = "bundled:malonaldehyde"
    validation: Path | list[Path] | None = Field(None, description="null: split off the training files")
    test: Path | list[Path] | Literal["bundled:malonaldehyde"] | None = None
    keys: KeysConfig = KeysConfig()
    units: UnitsConfig = UnitsConfig()
    split: SplitConfig = SplitConfig()
    reference_energies: ReferenceEnergiesConfig = ReferenceEnergiesConfig()
    batch: BatchConfig = BatchConfig()
    validation_batch: BatchConfig = BatchConfig(graphs=32)
    ignore_cell: bool = Field(False, description="treat every system as not periodic")


# ---------------------------------------------------------------------------------------------------------- training


class LossConfig(Section):
    kind: Literal["mse", "huber", "l1"] = "mse"
    energy_weight: float = Field(10.0, ge=0)
    forces_weight: float = Field(100.0, ge=0)
    stress_weight: float = Field(0.0, ge=0)
    huber_delta: float = Field(0.01, gt=0, description="[eV], [eV/Å], [eV/Å^3]")
    energy_per_atom: bool = Field(True, description="divide energy errors by the number of atoms")


class OptimizerConfig(Section):
    kind: Literal["adamw", "adam"] = "adamw"
    learning_rate: float = Field(0.01, gt=0)
    weight_decay: float = Field(1e-7, ge=0, description="of matrices of linear maps and contractions only")
    amsgrad: bool = True
    clip_norm: float | None = Field(10.0, gt=0)
    accumulate: int = Field(1, ge=1, description="batches per optimiser step")


class ScheduleConfig(Section):
    kind: Literal["constant", "plateau", "cosine"] = "plateau"
    warmup_steps: int = Field(0, ge=0)
    factor: float = Field(0.5, gt=0, lt=1, description="plateau: factor on the learning rate")
    patience: int = Field(20, ge=1, description="plateau: epochs without a better monitored metric")
    min_learning_rate: float = Field(1e-6, ge=0)


class TrainingConfig(Section):
    """Loss, optimiser, schedule, stopping and logging."""

    max_epochs: int = Field(200, ge=1)
    max_time_s: float | None = Field(None, gt=0, description="stop cleanly after so many seconds of training")
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ema_decay: float | None = Field(0.99, gt=0, lt=1, description="null: no moving average of the weights")
    monitor: str = Field("validation/forces_mae", description="metric that chooses the best model and drives plateau")
    early_stopping_patience: int | None = Field(None, ge=1, description="validations without a better monitored metric")
    validate_every: int = Field(1, ge=1, description="epochs")
    checkpoint_every_s: float = Field(300.0, gt=0, description="seconds between checkpoints inside an epoch")
    progressive_correlation: list[int] | None = Field(
        None,
        description="MACE: start with terms of order 1; epochs from which order 2, 3, ... take part, such as [20, 40]",
    )
    seed: int = 0
    loggers: list[Literal["csv", "tensorboard", "wandb"]] = Field(["csv"])
    threads: int | None = Field(None, ge=1, description="CPU threads; null: PyTorch's default")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    execution: Literal["auto", "eager", "compile", "cuda_graph"] = Field(
        "auto", description="steps are called, compiled or recorded; auto: recorded on a GPU, called on a CPU"
    )


class RunConfig(Section):
    """A whole training run."""

    name: str = "run"
    output: Path = Path("runs")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()

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


# ------------------------------------------------------------------------------------------- reading and explaining


def load_config(path: Path | str, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``a.b=c`` overrides and validate.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds mistakes (all of them are listed).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        raise ConfigError(f"{path}: the file is empty; start from one of the examples in configs/")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected sections such as 'model:' and 'data:', found a {type(content).__name__}")
    return parse_config(content, overrides, source=str(path))


def parse_config(content: dict[str, Any], overrides: typing.Sequence[str] = (), source: str = "config") -> RunConfig:
    """Validate a nested dictionary; see :func:`load_config`."""
    content = json.loads(json.dumps(content, default=str))
    for override in overrides:
        _apply_override(content, override)
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(_explain(error, source)) from None


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
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: '{value}' is not a YAML value") from None


def _explain(error: ValidationError, source: str) -> str:
    lines = []
    for mistake in error.errors():
        location = tuple(part for part in mistake["loc"])
        name = ".".join(_walk(RunConfig, location)[1])
        if mistake["type"] == "extra_forbidden":
            known = _keys_at(RunConfig, location[:-1])
            near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"
            lines.append(f"  {name}: unknown key; {hint}")
        else:
            message = mistake["msg"].removeprefix("Value error, ")
            given = mistake.get("input")
            shown = f" (got {given!r})" if isinstance(given, int | float | str | bool | None) else ""
            lines.append(f"  {name}: {message[0].lower()}{message[1:]}{shown}")
    count = len(lines)
    return f"{source}: {count} mistake{'s' if count > 1 else ''}\n" + "\n".join(lines)


def _keys_at(model: Any, location: tuple[Any, ...]) -> list[str]:
    """Field names of the section that a validation error's location points to."""
    candidates, _ = _walk(model, location)
    return sorted({name for candidate in candidates for name in candidate.model_fields})


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
