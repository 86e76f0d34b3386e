"""Progressive correlation: training starts with MACE's terms of first order, higher ones come in on a schedule.

The weights of all orders are there from the start. Those of the orders that have not come in yet are zero and unused,
so raising the order leaves the function as it is, and a model saved at any time is a model of the full order.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from steradian.equivariant.symmetric_contraction import SymmetricContraction

__all__ = ["order_at", "set_order", "start_progressive"]


def order_at(epoch: int, schedule: Sequence[int]) -> int:
    """The order in an epoch (finished epochs before it); ``schedule[k]``: epoch from which the order is k + 2."""
    return 1 + sum(epoch >= begins for begins in schedule)


def set_order(host: nn.Module, order: int) -> None:
    """Terms up to this order take part in all contractions of a host."""
    for module in host.modules():
        if isinstance(module, SymmetricContraction):
            module.order = min(order, module.correlation)


def start_progressive(host: nn.Module) -> None:
    """Put the weights of second and higher order to zero."""
    for module in host.modules():
        if isinstance(module, SymmetricContraction):
            module.clear_orders_above(1)
