"""A trained potential as an ASE calculator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from steradian.build import load_potential
from steradian.config_precision import PrecisionConfig
from steradian.data.structures import Structure
from steradian.graph import Graph
from steradian.neighbors import make_graph
from steradian.potential import Potential

__all__ = ["SteradianCalculator"]


class SteradianCalculator(Calculator):
    """ASE calculator: energy and free energy [eV], forces [eV/Å], stress [eV/Å^3, Voigt], energies per atom [eV].

    The stress is given for structures periodic in all directions. With ``skin > 0`` the list of neighbours is made once
    with a longer cutoff and reused until an atom has moved by half the skin or the cell, the periodicity or the atoms
    have changed; edges beyond the cutoff are dropped at every step, so results do not depend on it.

    Args:
        potential: a :class:`~steradian.potential.Potential`, a model file or the folder of a run.
        device: where to compute.
        dtype, precision: override the precision of a model that is read from a file, as in ``load_potential``.
        skin: [Å].
        radial_table: interpolate the radial networks, which depend on the distance alone, from a table of 512
            intervals; ``calculator.potential.radial_table_error`` is the largest relative error of a weight (about
            1e-7). The weights of the potential are frozen until its ``train()`` is called.

    Raises:
        ValueError: an element the model was not trained on, or a negative skin.
    """

    implemented_properties = [  # noqa: RUF012 (ASE declares it so)
        "energy",
        "free_energy",
        "forces",
        "stress",
        "energies",
    ]

    def __init__(
        self,
        potential: Potential | Path | str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        precision: str | PrecisionConfig | None = None,
        skin: float = 0.0,
        radial_table: bool = True,
        **ase_arguments: Any,
    ) -> None:
        super().__init__(**ase_arguments)
        if skin < 0:
            raise ValueError(f"skin must not be negative, got {skin} Å")
        if not isinstance(potential, Potential):
            potential = load_potential(potential, device=device, dtype=dtype, precision=precision)
        self.potential = potential.to(device).for_inference(radial_table)
        self.skin = skin
        self.num_lists = 0
        self._listed: tuple[Graph, Atoms] | None = None
        self._near: tuple[Graph, torch.Tensor, Graph] | None = None

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Compute all properties of the atoms at once."""
        super().calculate(atoms, properties, system_changes)
        present: Atoms = self.atoms  # type: ignore[assignment]
        periodic = bool(present.pbc.all())
        graph = self._graph(present).to(self.potential.device)
        prediction = self.potential(graph, forces=True, stress=periodic)
        energy = float(prediction.energy[0])
        self.results = {
            "energy": energy,
            "free_energy": energy,
            "energies": prediction.atom_energies.cpu().numpy(),
            "forces": prediction.forces.double().cpu().numpy(),
        }
        if periodic:
            self.results["stress"] = full_3x3_to_voigt_6_stress(prediction.stress[0].double().cpu().numpy())

    def forget_list(self) -> None:
        """Make the list of neighbours anew at the next call."""
        self._listed = None

    def _graph(self, atoms: Atoms) -> Graph:
        if not self.skin:
            self.num_lists += 1
            return make_graph(_structure(atoms), self.potential.cutoff)
        if self._listed is None or not self._still_valid(atoms, self._listed[1]):
            self._listed = (make_graph(_structure(atoms), self.potential.cutoff + self.skin), atoms.copy())
            self.num_lists += 1
        return self._within_cutoff(self._listed[0], atoms)

    def _still_valid(self, atoms: Atoms, listed: Atoms) -> bool:
        same = (
            len(atoms) == len(listed)
            and np.array_equal(atoms.numbers, listed.numbers)
            and np.array_equal(atoms.pbc, listed.pbc)
            and np.array_equal(np.asarray(atoms.cell), np.asarray(listed.cell))
        )
        if not same:
            return False
        moved = np.linalg.norm(atoms.positions - listed.positions, axis=1).max(initial=0.0)
        return bool(moved < 0.5 * self.skin)

    def _within_cutoff(self, graph: Graph, atoms: Atoms) -> Graph:
        """The listed graph at the present positions, without the edges that are beyond the cutoff now."""
        positions = torch.as_tensor(atoms.positions)
        vectors = positions[graph.senders] - positions[graph.receivers]
        if atoms.pbc.any():
            vectors = vectors + graph.shifts.to(positions.dtype) @ torch.as_tensor(np.asarray(atoms.cell))
        near = vectors.square().sum(1) < self.potential.cutoff**2
        if self._near is None or self._near[0] is not graph or not torch.equal(self._near[1], near):
            # the same tensors from step to step: what is prepared for them (sorted rows) is prepared once
            kept = replace(
                graph, senders=graph.senders[near], receivers=graph.receivers[near], shifts=graph.shifts[near]
            )
            self._near = (graph, near, kept)
        return replace(self._near[2], positions=positions)


def _structure(atoms: Atoms) -> Structure:
    return Structure(
        numbers=atoms.numbers,
        positions=atoms.positions,
        cell=np.asarray(atoms.cell) if atoms.pbc.any() else np.zeros((3, 3)),
        pbc=atoms.pbc,
    )
