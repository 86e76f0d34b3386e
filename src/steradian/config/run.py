"""Configuration sections of data (files, labels, units, splits, batches) and of training."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from steradian.config.section import Section

__all__ = [
    "BatchConfig",
    "DataConfig",
    "KeysConfig",
    "LossConfig",
    "OptimizerConfig",
    "ReferenceEnergiesConfig",
    "ScheduleConfig",
    "SplitConfig",
    "TrainingConfig",
    "UnitsConfig",
]


class KeysConfig(Section):
    """Names of the labels in the files; null: the usual names are tried."""

    energy: str | None = None
    forces: str | None = None
    stress: str | None = None
    positions: str | None = None
    numbers: str | None = None
    cell: str | None = None
    config_type: str = "config_type"
    weight: str | None = Field(None, description="weight of a frame in the loss; null: config_weight or weight")


class UnitsConfig(Section):
    """Units of the files. Everything is converted to eV and Å on read."""

    energy: str | None = Field(None, description="such as kcal/mol; null: what the file says, else eV")
    length: str | None = Field(None, description="such as Bohr; null: what the file says, else Angstrom")
    forces: str | None = Field(None, description="ENERGY/LENGTH; null: from energy and length")
    stress: str | None = Field(None, description="such as GPa; null: what the file says, else eV/Angstrom^3")


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

    kind: Literal["auto", "least_squares", "isolated_atoms", "given", "average", "zero"] = Field(
        "auto", description="auto: frames of isolated atoms where the data have them, the other elements fitted"
    )
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


# ------------------------------------------------------------------------------------------------------------ training


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
    execution: Literal["auto", "eager", "cuda_graph"] = Field(
        "auto", description="steps are called or recorded; auto: recorded on a GPU, called on a CPU"
    )
