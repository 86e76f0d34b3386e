"""Where the metrics of a run go besides its own table."""

from __future__ import annotations

from typing import Any

from steradian.config import ConfigError, RunConfig
from steradian.training.record import RunDirectory

__all__ = ["make_loggers"]


def make_loggers(config: RunConfig, directory: RunDirectory) -> list[Any]:
    """Lightning's loggers for TensorBoard and Weights & Biases; the CSV table is always written, without them.

    Raises:
        ConfigError: the package of a logger is not installed; with the command that installs it.
    """
    loggers: list[Any] = []
    for name in config.training.loggers:
        try:
            if name == "tensorboard":
                from lightning.pytorch.loggers import TensorBoardLogger

                loggers.append(TensorBoardLogger(directory.path, name="tensorboard", version=""))
            elif name == "wandb":
                from lightning.pytorch.loggers import WandbLogger

                loggers.append(WandbLogger(project="steradian", name=config.name, save_dir=directory.path))
        except ModuleNotFoundError:
            raise ConfigError(
                f"training.loggers: {name} is not installed; pip install 'steradian[{name}]' or leave it out"
            ) from None
    return loggers
