"""Normal modes: frequencies and displacements from the Hessian."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms
from ase import units as ase_units

from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure
from steradian.potential import Potential

__all__ = ["Modes", "normal_modes"]

#: sqrt(eV / (Å^2 amu)) as an energy [eV]
ENERGY = ase_units._hbar * 1e10 / (ase_units._e * ase_units._amu) ** 0.5


@dataclass(frozen=True)
class Modes:
    """Harmonic vibrations about a structure.

    Attributes:
        energies: ``[3 N]`` [eV] ascending, negative where the curvature is.
        displacements: ``[3 N, N, 3]`` [1/sqrt(amu)], mass-weighted ones are orthonormal.
        largest_force: [eV/Å] of the structure; modes are meant where it is zero.
    """

    energies: np.ndarray
    displacements: np.ndarray
    largest_force: float

    @property
    def wavenumbers(self) -> np.ndarray:
        """``[3 N]`` [1/cm], negative where the curvature is."""
        return self.energies / ase_units.invcm

    @property
    def zero_point_energy(self) -> float:
        """[eV] of the modes of positive curvature."""
        return float(0.5 * self.energies[self.energies > 0].sum())


def normal_modes(potential: Potential, atoms: Atoms, *, chunk: int | None = None) -> Modes:
    """Modes of a molecule, or of a crystal at the centre of the Brillouin zone.

    Args:
        potential: in evaluation mode.
        atoms: best relaxed.
        chunk: rows of the Hessian at a time, as in :meth:`~steradian.potential.Potential.hessian`.
    """
    cell = np.asarray(atoms.cell) if atoms.pbc.any() else np.zeros((3, 3))
    graph = make_graph(Structure(atoms.numbers, atoms.positions, cell=cell, pbc=atoms.pbc), potential.cutoff)
    graph = graph.to(potential.device)
    forces = potential(graph).forces
    hessian = potential.hessian(graph, chunk=chunk).cpu().numpy()
    weights = np.repeat(atoms.get_masses() ** -0.5, 3)
    values, vectors = np.linalg.eigh(0.5 * (hessian + hessian.T) * weights[:, None] * weights)
    energies = ENERGY * np.sign(values) * np.sqrt(np.abs(values))
    largest = float(torch.linalg.vector_norm(forces, dim=1).max()) if len(atoms) else 0.0
    return Modes(energies, (vectors * weights[:, None]).T.reshape(-1, len(atoms), 3), largest)
