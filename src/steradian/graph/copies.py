"""Several copies of a graph's systems in one graph: what is known of its list of neighbours holds for every copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steradian.graph.graph import Graph
from steradian.graph.topology import Pairs, Topology

__all__ = ["copies_of"]


def copies_of(graph: Graph, count: int) -> Graph:
    """The systems ``count`` times over, copy after copy; labels are dropped.

    The topology of the copies is kept with that of the graph, unless its contents change in place (it is static): then
    it is made anew, in operations of fixed shape that may be part of a recorded step.

    Raises:
        ValueError: one process's part of a system.
    """
    if graph.share is not None:
        raise ValueError("a system that is spread over processes cannot be copied: use one process")
    known = graph.prepared()
    if known.is_static:
        topology = _copied(known, count)
    else:
        topology = known.prepared(("copies", count), lambda: _copied(known, count))
    assert topology.numbers is not None
    assert topology.shifts is not None
    assert topology.pbc is not None
    dipoles = None if graph.dipoles is None else graph.dipoles.repeat(count, 1)
    return Graph(
        positions=graph.positions.repeat(count, 1),
        numbers=topology.numbers,
        system=topology.system,
        senders=topology.senders,
        receivers=topology.receivers,
        shifts=topology.shifts,
        cell=graph.cell.repeat(count, 1, 1),
        pbc=topology.pbc,
        num_systems=topology.num_systems,
        dipoles=dipoles,
        topology=topology,
    )


def _copied(known: Topology, count: int) -> Topology:
    def behind(index: Tensor, size: int) -> Tensor:
        """The index in every copy, each of which has ``size`` rows."""
        offsets = size * torch.arange(count, dtype=index.dtype, device=index.device)
        return (offsets.unsqueeze(1) + index).flatten()

    assert known.numbers is not None  # that of a graph knows all of them
    assert known.shifts is not None
    assert known.pbc is not None
    pairs = known.pairs
    facts: dict[str, Any] = {
        "numbers": known.numbers.repeat(count),
        "system": behind(known.system, known.num_systems),
        "shifts": known.shifts.repeat(count, 1),
        "pbc": known.pbc.repeat(count, 1),
    }
    return Topology(
        behind(known.senders, known.num_atoms),
        behind(known.receivers, known.num_atoms),
        count * known.num_atoms,
        num_systems=count * known.num_systems,
        is_static=known.is_static,
        sizes=count * known.sizes if known.knows_sizes else None,
        periodic=known.is_periodic,
        composition=known.composition and tuple((number, count * atoms) for number, atoms in known.composition),
        pairs=pairs and Pairs(behind(pairs.first, known.num_edges), behind(pairs.of_edge, pairs.count)),
        real=None if known.real is None else known.real.repeat(count),
        **facts,
    )
