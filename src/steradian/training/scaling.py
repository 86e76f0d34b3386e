"""A scaled loss for products in float16, whose gradients would otherwise vanish below 6e-8; what still does is counted.

Master weights and their gradients are float32 throughout; only products are float16 (:mod:`steradian.precision`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steradian.potential import Potential
from steradian.precision import WithRole

__all__ = ["LossScale"]

#: A scale below this means that gradients overflow whatever the scale: the run has diverged.
SMALLEST = 2.0**-14


class LossScale:
    """PyTorch's ``GradScaler`` with its figures; does nothing where no role is float16.

    A step whose gradient overflows is left out and the scale halved; the scale is doubled after 2000 good steps.

    Attributes:
        active: whether the loss is scaled.
        skipped: steps left out so far, all sessions together.
    """

    def __init__(self, potential: Potential) -> None:
        self.potential = potential
        self.active = potential.policy.uses_float16
        self.skipped = 0
        self._scaler: torch.amp.GradScaler | None = None
        self._zeros: Tensor | int = 0  # on the device
        self._counted: Tensor | int = 0

    @property
    def scaler(self) -> torch.amp.GradScaler:
        if self._scaler is None:
            self._scaler = torch.amp.GradScaler(self.potential.device.type, init_scale=2.0**12)
        return self._scaler

    def scaled(self, loss: Tensor) -> Tensor:
        return self.scaler.scale(loss) if self.active else loss

    def take_back(self, optimizer: torch.optim.Optimizer) -> bool:
        """Divide the gradients by the scale and adapt it; False: they overflowed, and were removed.

        Raises:
            FloatingPointError: they overflow at the smallest scale too.
        """
        if not self.active:
            return True
        self._count_underflow()
        self.scaler.unscale_(optimizer)
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        norms = torch.stack(torch._foreach_norm([gradient for gradient in gradients if gradient is not None]))
        finite = bool(torch.isfinite(norms).all())
        self.scaler.update()
        if not finite:
            self.skipped += 1
            optimizer.zero_grad(set_to_none=True)  # the optimiser then leaves all weights as they are
            if self.scaler.get_scale() < SMALLEST:
                raise FloatingPointError("gradients overflow in float16 whatever the scale of the loss")
        return finite

    def _count_underflow(self) -> None:
        """Gradients of the weights that multiply in float16, in rows that are not zero as a whole."""
        for module in self.potential.host.modules():
            if not isinstance(module, WithRole) or module.low != torch.float16:
                continue
            for parameter in module.parameters():
                if parameter.grad is not None:
                    rows = parameter.grad.flatten(0, -2)
                    used = rows.ne(0).any(dim=1)
                    counted = used.sum() * rows.shape[1]
                    self._zeros = self._zeros + counted - rows.ne(0).sum()
                    self._counted = self._counted + counted

    def figures(self) -> dict[str, float | int]:
        """Of the steps since the last call: scale, steps left out, share of gradients that vanished."""
        if not self.active:
            return {}
        counted = int(self._counted)
        share = int(self._zeros) / counted if counted else 0.0
        self._zeros = self._counted = 0
        return {"train/loss_scale": self.scaler.get_scale(), "train/skipped": self.skipped, "train/underflow": share}

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "scaler": self.scaler.state_dict()} if self.active else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.active and state:
            self.skipped = int(state["skipped"])
            self.scaler.load_state_dict(state["scaler"])
