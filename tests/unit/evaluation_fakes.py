"""Simple potentials and structures for the tests of the evaluation."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from steradian.graph import Graph, Prediction
from steradian.graph.structures import Structure


class PairPotential(nn.Module):
    """E = sum over pairs of strength * (1 - r / cutoff)^3; where ``tilt`` is not 0, it also feels the z axis."""

    cutoff = 3.0

    def __init__(self, strength: float = 1.0, tilt: float = 0.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.tensor(strength, dtype=dtype))
        self.tilt = nn.Parameter(torch.tensor(tilt, dtype=dtype))

    def forward(self, graph: Graph, *, forces: bool = True, stress: bool = False) -> Prediction:
        positions = graph.positions.detach().to(self.strength.dtype).requires_grad_(True)
        vectors = positions[graph.senders] - positions[graph.receivers]
        lengths = vectors.norm(dim=1)
        pair = 0.5 * self.strength * (1 - lengths / self.cutoff) ** 3 * (1 + self.tilt * (vectors[:, 2] / lengths) ** 2)
        atoms = pair.new_zeros(graph.num_atoms).index_add(0, graph.receivers, pair)
        (gradient,) = torch.autograd.grad(atoms.sum(), positions)
        atoms = atoms.detach().double()
        energy = atoms.new_zeros(graph.num_systems).index_add(0, graph.system, atoms)
        return Prediction(energy, atoms, energy, forces=-gradient)


def molecules(count: int, seed: int = 0, *, strength: float = 1.1, noise: float = 0.01) -> list[Structure]:
    """Random molecules of C, H and O labelled by a pair potential of another strength plus noise."""
    from steradian.graph.neighbors import make_graph

    generator = np.random.default_rng(seed)
    found = []
    for index in range(count):
        number = int(generator.integers(3, 9))
        numbers = generator.choice([1, 6, 8], size=number)
        positions = np.array(np.unravel_index(np.arange(number), (2, 2, 3)), dtype=float).T * 1.3
        positions = positions + generator.normal(0, 0.15, size=(number, 3))
        bare = Structure(numbers=numbers, positions=positions)
        truth = PairPotential(strength)(make_graph(bare, PairPotential.cutoff))
        forces = truth.forces.numpy() + generator.normal(0, noise * (1 + index / count), size=(number, 3))
        energy = float(truth.energy[0]) + generator.normal(0, noise)
        label = ("cold", "warm", "hot")[index % 3]
        found.append(Structure(numbers=numbers, positions=positions, energy=energy, forces=forces, config_type=label))
    return found
