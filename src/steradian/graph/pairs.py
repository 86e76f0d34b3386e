"""Edges that are two directions of one pair of atoms: what depends on the distance alone is computed once for both."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from steradian.compiler.capture import capturing
from steradian.graph.graph import Graph

__all__ = ["Pairs", "pairs_of", "with_pairs"]


@dataclass(frozen=True)
class Pairs:
    """Unordered pairs of a neighbour list.

    Attributes:
        first: ``[Q]`` an edge of each pair.
        of_edge: ``[E]`` the pair that an edge belongs to.
    """

    first: Tensor
    of_edge: Tensor


_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def pairs_of(graph: Graph) -> Pairs | None:
    """The pairs of a graph: its own, or on the CPU found, and kept as long as its list of senders lives.

    None where they would save little. An edge whose opposite is not listed is a pair of its own.
    """
    senders = graph.senders
    if graph.pairs is not None and len(graph.pairs.of_edge) == len(senders):
        return graph.pairs
    if senders.device.type != "cpu" or not len(senders) or capturing() or torch.compiler.is_compiling():
        return None
    return _kept(graph)


def _kept(graph: Graph) -> Pairs | None:
    senders, receivers, shifts = graph.senders, graph.receivers, graph.shifts
    known = _KNOWN.get(senders)
    if known is None or known[0] is not receivers or known[1] is not shifts:
        known = (receivers, shifts, _find(senders.numpy(), receivers.numpy(), shifts.numpy(), graph.num_atoms))
        _KNOWN[senders] = known
    return known[2]


def with_pairs(graph: Graph) -> Graph:
    """The graph (on the CPU) with its pairs, which go with it to a GPU; without where some edge has no opposite."""
    if graph.pairs is not None or graph.senders.device.type != "cpu" or not graph.num_edges:
        return graph
    found = _kept(graph)  # another thread may be running a step meanwhile
    if found is None or 2 * len(found.first) != graph.num_edges:
        return graph
    return replace(graph, pairs=found)


def _find(senders: np.ndarray, receivers: np.ndarray, shifts: np.ndarray, num_atoms: int) -> Pairs | None:
    shifts = np.rint(shifts).astype(np.int64)
    low, high = np.minimum(senders, receivers), np.maximum(senders, receivers)
    key = low.astype(np.int64) * num_atoms + high
    if shifts.any():
        most = int(np.abs(shifts).max())
        width = 2 * most + 1
        if num_atoms**2 * width**3 >= 2**62:
            return None
        # one number for a shift, its negative for the opposite one; within the same atom the larger one names the pair
        code = (shifts[:, 0] * width + shifts[:, 1]) * width + shifts[:, 2]
        code = np.where(senders < receivers, -code, code)
        code = np.where(senders == receivers, np.abs(code), code)
        key = key * width**3 + code + width**3 // 2
    _, first, of_edge = np.unique(key, return_index=True, return_inverse=True)
    if len(first) > 0.75 * len(key):
        return None
    return Pairs(torch.from_numpy(first), torch.from_numpy(of_edge.reshape(-1)))
