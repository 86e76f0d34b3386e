"""Configuration sections of training: loss, optimiser, schedule, stopping and logging."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from steradian.config.section import Section

__all__ = ["LossConfig", "OptimizerConfig", "ScheduleConfig", "TrainingConfig"]


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
