"""Ghosts: atoms and edges that fill up tensors of fixed shape and change nothing.

They belong to systems of their own behind the real ones. They stand at two places that are farther apart than the
cutoff, and every added edge runs from one place to the other. So the envelope of an added edge is exactly zero, and
with it its message and all its derivatives; real atoms have no edge to a ghost. Receivers stay in ascending order.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["APART", "ghost_edges", "ghost_places"]

APART = 1.5
"""Distance of the two places of ghosts, in cutoffs."""


def ghost_places(own: Tensor, cutoff: float) -> Tensor:
    """``[M, 3]`` float64 positions [Å] of ghosts numbered ``own [M]`` from zero: by turns here and there."""
    places = torch.zeros((len(own), 3), dtype=torch.float64, device=own.device)
    places[:, 0] = (own % 2).double() * (APART * cutoff)
    return places


def ghost_edges(rank: Tensor, num_edges: Tensor | int, num_ghosts: Tensor | int) -> tuple[Tensor, Tensor]:
    """The ghosts that added edges end at and start from, spread evenly and ascending.

    Args:
        rank: number of each added edge, from zero; numbers below zero and from ``num_edges`` on give some ghost.
        num_edges: how many are added.
        num_ghosts: at least two.

    Returns:
        Receiver and sender of each, numbered from zero among the ghosts. 0 and 1 face each other, 2 and 3, ...; an odd
        last one faces the one before it.
    """
    most = torch.as_tensor(num_edges, device=rank.device).clamp(min=1)
    receiver = torch.div(rank.clamp(min=0) * num_ghosts, most, rounding_mode="floor")
    receiver = torch.minimum(receiver, torch.as_tensor(num_ghosts, device=rank.device) - 1)
    sender = receiver + 1 - 2 * (receiver % 2)
    return receiver, torch.where(sender < num_ghosts, sender, receiver - 1)
