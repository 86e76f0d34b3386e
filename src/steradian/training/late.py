"""Numbers of a GPU that are looked at when they have arrived, so that nothing waits for them."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["LateValues"]

T = TypeVar("T")


class LateValues(Generic[T]):
    """Scalars in order, each with something that belongs to it.

    A scalar on a GPU is copied to the host behind the work that makes it, and is handed out once the copy is done; on a
    CPU it is handed out at once.

    Args:
        most: so many may be on their way; then the oldest is waited for.
    """

    def __init__(self, most: int = 64) -> None:
        self.most = most
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None, T]] = deque()

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, value: Tensor, belongs: T) -> None:
        """Note a scalar ``[]``."""
        if value.device.type != "cuda":
            self._pending.append((value.detach().clone(), None, belongs))
            return
        host = torch.empty((), dtype=value.dtype, pin_memory=True)
        host.copy_(value.detach(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((host, event, belongs))

    def arrived(self, wait: bool = False) -> list[tuple[float, T]]:
        """Values that have not been handed out, oldest first; with ``wait`` all of them."""
        found: list[tuple[float, T]] = []
        while self._pending:
            value, event, belongs = self._pending[0]
            if event is not None and not event.query():
                if not wait and len(self._pending) <= self.most:
                    break
                event.synchronize()
            self._pending.popleft()
            found.append((float(value), belongs))
        return found

    def clear(self) -> None:
        """Forget what has not arrived."""
        self._pending.clear()
