"""Lightning's trainer, set up to do the loop and nothing else."""

from __future__ import annotations

import logging
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy

from steradian.config import ConfigError, TrainingConfig
from steradian.execution.steps import resolve_mode

__all__ = ["Process", "device_line", "make_trainer", "own_threads", "quiet_lightning", "training_device"]


@dataclass(frozen=True)
class Process:
    """This process among those of a run, as ``torchrun`` tells it."""

    rank: int = 0
    count: int = 1
    local_count: int = 1

    @classmethod
    def present(cls) -> Process:
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls()
        return cls(
            int(os.environ["RANK"]),
            int(os.environ["WORLD_SIZE"]),
            int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])),
        )


def make_trainer(
    config: TrainingConfig, process: Process, callbacks: list[pl.Callback], *, idle: bool = False, **options: Any
) -> pl.Trainer:
    """Lightning's loop with everything switched off that this package does itself.

    Args:
        config: the training section. process: this one. callbacks: for Lightning.
        idle: some parameters have no gradient; several processes must then look for them at every step.
        options: replace the trainer's arguments.
    """
    on_gpu = training_device(config).type == "cuda"
    strategy: Any = "auto"
    if process.count > 1:
        backend = "nccl" if on_gpu else "gloo"
        strategy = DDPStrategy(
            process_group_backend=backend, find_unused_parameters=idle, broadcast_buffers=False, start_method="popen"
        )
    settings: dict[str, Any] = {
        "accelerator": "gpu" if on_gpu else "cpu",
        "devices": process.local_count,
        "num_nodes": process.count // process.local_count,
        "strategy": strategy,
        "max_epochs": config.max_epochs,
        "accumulate_grad_batches": config.optimizer.accumulate,
        "callbacks": callbacks,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "inference_mode": False,
        "reload_dataloaders_every_n_epochs": 1,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(**{**settings, **options})


def training_device(config: TrainingConfig) -> torch.device:
    """Where a run computes.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError(
            "training.device is 'cuda', but PyTorch finds no GPU: install a CUDA build of it or set training.device=cpu"
        )
    return torch.device("cuda" if available and config.device != "cpu" else "cpu")


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's advice off the screen inside a ``with`` block; its errors still come through."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


@contextmanager
def own_threads(count: int | None) -> Iterator[None]:
    """Use this many CPU threads inside a ``with`` block; None leaves PyTorch's number."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_line(process: Process, config: TrainingConfig) -> str:
    """Where a run computes and how, in words."""
    count = f"{process.count} processes, " if process.count > 1 else ""
    device = training_device(config)
    mode = resolve_mode(config.execution, device)
    how = {"cuda_graph": ", steps recorded as CUDA graphs", "compile": ", steps compiled"}.get(mode, "")
    if device.type == "cuda":
        return f"{count}GPU {torch.cuda.get_device_name()}{how}"
    return f"{count}CPU ({platform.machine()}), {torch.get_num_threads()} threads{how}"


def end_processes() -> None:
    """Leave the group of processes in order; one that dies with its threads running aborts the others' launcher."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
