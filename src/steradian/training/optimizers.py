"""Optimisers and which parameters decay."""

from __future__ import annotations

import torch
from torch import nn

from steradian.config import OptimizerConfig

__all__ = ["make_optimizer", "parameter_groups"]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: what decays and what does not.

    Weights of linear maps, tensor products and contractions decay: parameters with two or more dimensions. Vectors and
    scalars (biases, norms, radial frequencies, temperatures) do not, nor do parameters that their module lists in
    ``no_weight_decay`` (a tuple of names), such as embeddings of points.
    """
    decays: dict[nn.Parameter, bool] = {}  # a shared parameter counts where it is met first
    for module in model.modules():
        exempt = tuple(getattr(module, "no_weight_decay", ()))
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                decays.setdefault(parameter, parameter.ndim >= 2 and name not in exempt)
    decaying = [parameter for parameter, decay in decays.items() if decay]
    free = [parameter for parameter, decay in decays.items() if not decay]
    groups: list[dict[str, object]] = []
    if decaying:
        groups.append({"params": decaying, "weight_decay": weight_decay})
    if free:
        groups.append({"params": free, "weight_decay": 0.0})
    return groups


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Adam (Kingma and Ba 2015) or AdamW (Loshchilov and Hutter 2019), one fused kernel per step where there is one."""
    kind = torch.optim.AdamW if config.kind == "adamw" else torch.optim.Adam
    groups = parameter_groups(model, config.weight_decay)
    devices = {parameter.device.type for parameter in model.parameters()}
    fused = devices <= {"cpu", "cuda"}
    return kind(groups, lr=config.learning_rate, amsgrad=config.amsgrad, fused=fused)
