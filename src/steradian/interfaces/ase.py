"""A trained potential as an ASE calculator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from steradian.build import load_potential
from steradian.config import PrecisionConfig
from steradian.execution.backend_benchmark import prepare_backend
from steradian.execution.frame_notice import tell_of_frame
from steradian.execution.steps import Runner
from steradian.graph import Graph, Prediction
from steradian.graph.neighbors import make_graph
from steradian.graph.skin import Capacity, DeviceList, HostList
from steradian.graph.structures import Structure
from steradian.potential import Potential

__all__ = ["SteradianCalculator"]


class SteradianCalculator(Calculator):
    """ASE calculator: energy and free energy [eV], forces [eV/Å], stress [eV/Å^3, Voigt], energies per atom [eV].

    The stress is given for structures periodic in all directions; ``stresses`` of atoms [eV/Å^3, Voigt], which sum to
    it, are worked out where they are asked for (``atoms.get_stresses()``) and where the model has no attention between
    all atoms. With ``skin > 0`` the list of neighbours is made once with a longer cutoff and reused until an atom has
    moved by half the skin or the cell, the periodicity or the atoms have changed; edges beyond the cutoff
    are dropped at every step, so results do not depend on it.

    On a GPU lists are made there, in tensors of fixed shape (:class:`~steradian.graph.skin.DeviceList`), and the
    part of the model is recorded: a call sends positions up and brings everything down in one transfer. While the
    cell changes from call to call lists are made on the host.

    Args:
        potential: a :class:`~steradian.potential.Potential`, a model file or the folder of a run.
        device: where to compute.
        dtype, precision: override the precision of a model that is read from a file, as in ``load_potential``.
        skin: [Å].
        radial_table: interpolate the radial networks, which depend on the distance alone, from a table of 512
            intervals; ``calculator.potential.radial_table_error`` is the largest relative error of a weight (about
            1e-7). The weights of the potential are frozen until its ``train()`` is called.
        rotation_average: average over 4, 12, 24 or 60 rotations
            (:meth:`~steradian.potential.Potential.average_rotations`), for models tied to the laboratory axes, whose
            energy otherwise turns with the atoms; at the first use of such a model one line says so.

    Raises:
        ValueError: an element the model was not trained on, a negative skin, or rotations that cannot be averaged over.
    """

    implemented_properties = [  # noqa: RUF012 (ASE declares it so)
        "energy",
        "free_energy",
        "forces",
        "stress",
        "stresses",
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
        rotation_average: int | None = None,
        **ase_arguments: Any,
    ) -> None:
        super().__init__(**ase_arguments)
        if skin < 0:
            raise ValueError(f"skin must not be negative, got {skin} Å")
        if not isinstance(potential, Potential):
            potential = load_potential(potential, device=device, dtype=dtype, precision=precision)
        self.potential = potential.to(device).for_inference(radial_table, rotation_average=rotation_average)
        self.skin = skin
        self.num_lists = 0
        self.on_device = self.potential.device.type == "cuda"
        self._listed: tuple[HostList, Atoms] | None = None
        self._rows: tuple[DeviceList, Atoms] | None = None
        self._capacity: Capacity | None = None
        self._step: tuple[DeviceList, Callable[[], Prediction]] | None = None
        self._before: Atoms | None = None

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Compute all properties of the atoms at once."""
        super().calculate(atoms, properties, system_changes)
        tell_of_frame(self.potential)
        present: Atoms = self.atoms  # type: ignore[assignment]
        periodic = bool(present.pbc.all())
        per_atom = "stresses" in (properties or ())
        if per_atom and not periodic:
            raise PropertyNotImplementedError("stresses of atoms need a cell that is periodic in all directions")
        steady, self._before = self._before is None or _same_system(present, self._before), present.copy()
        if self.on_device and steady and not per_atom:
            self.results = self._on_device(present, periodic)
            return
        graph = self._graph(present).to(self.potential.device)
        prediction = self.potential(graph, forces=True, stress=periodic, virials=per_atom)
        energy = float(prediction.energy[0])
        self.results = {
            "energy": energy,
            "free_energy": energy,
            "energies": prediction.atom_energies.cpu().numpy(),
            "forces": prediction.forces.double().cpu().numpy(),
        }
        if periodic:
            self.results["stress"] = full_3x3_to_voigt_6_stress(prediction.stress[0].double().cpu().numpy())
        if prediction.virials is not None:
            virials = prediction.virials.double().cpu().numpy()
            self.results["stresses"] = full_3x3_to_voigt_6_stress(-virials / present.get_volume())

    def get_hessian(self, atoms: Atoms | None = None, *, chunk: int | None = None) -> np.ndarray:
        """Second derivatives of the energy ``[3 N, 3 N]`` [eV/Å^2]; ``chunk`` rows at a time bound the memory.

        Raises:
            ValueError: no atoms at all.
        """
        present = self.atoms if atoms is None else atoms
        if present is None:
            raise ValueError("a Hessian of which atoms? give some, or compute something of them first")
        graph = make_graph(_structure(present), self.potential.cutoff)
        return self.potential.hessian(graph, chunk=chunk).cpu().numpy()

    def _on_device(self, atoms: Atoms, periodic: bool) -> dict[str, Any]:
        """All properties from a list that is kept on the device."""
        count = len(atoms)
        while True:
            positions = torch.as_tensor(atoms.positions).to(self.potential.device, non_blocking=True)
            if self._rows is None or not self._still_valid(atoms, self._rows[1]):
                self._rows = (self._device_list(atoms), atoms.copy())
                self._rows[0].build(positions)
                self.num_lists += 1
            rows = self._rows[0]
            rows.refresh(positions)
            prediction = self._step_of(rows, periodic)()
            assert prediction.forces is not None
            parts = [rows.flags, prediction.energy[:1], prediction.atom_energies[:count], prediction.forces[:count]]
            parts += [prediction.stress[:1]] if prediction.stress is not None else []
            values = torch.cat([part.double().flatten() for part in parts]).cpu().numpy()
            needs = rows.needs(values[:4].tolist())
            if needs.fit(rows.capacity):
                break
            self._rows, self._capacity = None, needs.grown(rows.capacity)
        energy, forces = float(values[4]), values[5 + count : 5 + 4 * count].reshape(count, 3)
        results: dict[str, Any] = {"energy": energy, "free_energy": energy, "forces": forces.copy()}
        results["energies"] = values[5 : 5 + count].copy()
        if periodic:
            results["stress"] = full_3x3_to_voigt_6_stress(values[5 + 4 * count :].reshape(3, 3))
        return results

    def _step_of(self, rows: DeviceList, periodic: bool) -> Callable[[], Prediction]:
        """The model on the graph of a list, recorded on a GPU; the graph has its edges when this is called first."""
        if self._step is None or self._step[0] is not rows:
            prepare_backend(self.potential, rows.graph)
            run = Runner(self.potential, stress=periodic).static(rows.graph)
            self._step = (rows, run)
        return self._step[1]

    def _device_list(self, atoms: Atoms) -> DeviceList:
        """The list in use where only positions have changed since it was made, else a new one."""
        if self._rows is not None:
            rows, listed = self._rows
            if _same_system(atoms, listed):
                rows.flags.zero_()
                return rows
            self._capacity = None
        made = DeviceList(
            [atoms], self.potential.cutoff, self.skin, device=self.potential.device, capacity=self._capacity
        )
        self.potential.check_elements(torch.as_tensor(atoms.numbers))
        return made

    def forget_list(self) -> None:
        """Make the list of neighbours anew at the next call."""
        self._listed = self._rows = self._step = None

    def _graph(self, atoms: Atoms) -> Graph:
        if not self.skin:
            self.num_lists += 1
            return make_graph(_structure(atoms), self.potential.cutoff)
        if self._listed is None or not _same_system(atoms, self._listed[1]):
            self._listed = (HostList([atoms], self.potential.cutoff, self.skin), atoms.copy())
        rows = self._listed[0]
        before = rows.num_lists
        graph = rows.refresh(torch.from_numpy(atoms.get_positions()))
        self.num_lists += rows.num_lists - before
        return graph

    def _still_valid(self, atoms: Atoms, listed: Atoms) -> bool:
        moved = np.inf if not _same_system(atoms, listed) else _farthest(atoms, listed)
        return bool(moved < 0.5 * self.skin)


def _same_system(atoms: Atoms, listed: Atoms) -> bool:
    """Whether nothing but positions (and momenta) differs."""
    return (
        len(atoms) == len(listed)
        and np.array_equal(atoms.numbers, listed.numbers)
        and np.array_equal(atoms.pbc, listed.pbc)
        and np.array_equal(np.asarray(atoms.cell), np.asarray(listed.cell))
    )


def _farthest(atoms: Atoms, listed: Atoms) -> float:
    return float(np.linalg.norm(atoms.positions - listed.positions, axis=1).max(initial=0.0))


def _structure(atoms: Atoms) -> Structure:
    return Structure(
        numbers=atoms.numbers,
        positions=atoms.positions,
        cell=np.asarray(atoms.cell) if atoms.pbc.any() else np.zeros((3, 3)),
        pbc=atoms.pbc,
    )
