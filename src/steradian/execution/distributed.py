"""One large system on several processes: every process evaluates a slab of it and its surroundings.

Messages of neighbours need the atoms within reach of a slab (layers times cutoff), which are evaluated twice. Global
attention needs only the sums of keys and values, which are added up over the processes, and so are their derivatives.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ase.geometry import complete_cell

from steradian.graph import Prediction
from steradian.graph.neighbors import make_graph
from steradian.graph.share import Share
from steradian.graph.structures import Structure
from steradian.potential import Potential

__all__ = ["predict_distributed", "slab"]


def slab(structure: Structure, part: int, num_parts: int, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """Atoms of one of several slabs with equally many atoms, and which of them belong to it.

    Args:
        structure: the whole system.
        part: which slab.
        num_parts: how many there are, along the lattice vector (or axis) of largest extent.
        reach: [Å] surroundings that are listed too.

    Returns:
        ``[n]`` indices of the slab and its surroundings, ascending, and ``[n]`` whether an atom is in the slab.

    Raises:
        ValueError: fewer atoms than slabs.
    """
    if len(structure) < num_parts:
        raise ValueError(f"{len(structure)} atoms cannot be spread over {num_parts} processes")
    box = np.array(complete_cell(structure.cell), dtype=float)
    heights = 1.0 / np.linalg.norm(np.linalg.inv(box), axis=0)  # distances of opposite faces
    along = structure.positions @ np.linalg.inv(box) * heights
    axis = int(np.argmax(np.where(structure.pbc, heights, np.ptp(along, axis=0))))
    height, periodic, along = heights[axis], bool(structure.pbc[axis]), along[:, axis]
    if periodic:
        along = along % height
    # equal numbers of atoms are equal work; every process cuts for itself and must find the same cuts, ties included
    order = np.argsort(along, kind="stable")
    bounds = [len(order) * number // num_parts for number in (part, part + 1)]
    own = np.zeros(len(order), dtype=bool)
    own[order[slice(*bounds)]] = True
    low, high = along[own].min(), along[own].max()
    near = own.copy()
    # the surroundings go on beyond the cell's faces
    for shift in (-height, 0.0, height) if periodic else (0.0,):
        near |= (along + shift >= low - reach) & (along + shift <= high + reach)
    chosen = np.flatnonzero(near)
    return chosen, own[chosen]


def predict_distributed(
    potential: Potential, structure: Structure, *, stress: bool = False, group: Any = None
) -> Prediction:
    """Energy and forces of one system, evaluated by all processes of a group together.

    Every process calls this with the same potential and structure and gets the same whole result.

    Args:
        potential: in evaluation mode; all hosts and operators.
        structure: one system.
        stress: give the stress too.
        group: of ``torch.distributed``, which must be initialised; None for all processes.

    Returns:
        A prediction with energies per atom and forces of all atoms.

    Raises:
        ValueError: fewer atoms than processes, or a potential in training mode.
    """
    if potential.training:
        raise ValueError("predict_distributed gives no gradients for training; call potential.eval() first")
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    chosen, own = slab(structure, rank, size, potential.host.reach)
    # about the mean of all atoms, so that phases are the same numbers everywhere
    centred = structure.positions[chosen] - structure.positions.mean(axis=0)
    local = Structure(structure.numbers[chosen], centred, cell=structure.cell, pbc=structure.pbc)
    graph = make_graph(local, potential.cutoff, dtype=potential.dtype).to(potential.device)
    share = Share(torch.as_tensor(own, device=potential.device), group)
    found = potential(replace(graph, share=share), stress=stress)
    assert found.forces is not None
    index = torch.as_tensor(chosen, device=potential.device)
    count = len(structure)
    # an atom near a cut pulls on copies of its neighbours: their forces here are parts of those that their owners find
    forces = found.forces.new_zeros((count, 3)).index_add(0, index, found.forces)
    atom_energies = found.atom_energies.new_zeros(count).index_add(0, index, found.atom_energies)
    # energies are those of own atoms alone, so nothing counts twice
    totals = torch.cat([found.energy, found.interaction_energy])
    for tensor in (forces, atom_energies, totals, *([found.stress] if found.stress is not None else [])):
        dist.all_reduce(tensor, group=group)
    return Prediction(
        energy=totals[:1],
        atom_energies=atom_energies,
        interaction_energy=totals[1:],
        forces=forces,
        stress=found.stress,
    )
