"""One labelled frame, before neighbour lists: what readers produce and writers take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.data import chemical_symbols

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["DataError", "Structure", "formula"]

MAX_NUMBER = 118


class DataError(ValueError):
    """Data that cannot be used; one line that names the file, the frame and the way out."""


@dataclass(frozen=True, eq=False)
class Structure:
    """Atoms of one frame with their labels; units eV, Å.

    Attributes:
        numbers: ``[N]`` atomic numbers, int64.
        positions: ``[N, 3]`` positions [Å], float64.
        cell: ``[3, 3]`` lattice vectors as rows [Å]; zeros where the frame is not periodic.
        pbc: ``[3]`` periodicity along each lattice vector.
        energy: total energy [eV] or None.
        forces: ``[N, 3]`` forces [eV/Å] or None.
        stress: ``[3, 3]`` Cauchy stress [eV/Å^3], positive under tension (ASE's sign), or None.
        config_type: label for tables of errors per kind of frame.
        weight: weight of the frame in the loss.

    Raises:
        DataError: wrong shapes, an unknown element, numbers that are not finite, a periodic direction without a
            lattice vector.
    """

    numbers: np.ndarray
    positions: np.ndarray
    cell: np.ndarray = field(default_factory=lambda: np.zeros((3, 3)))
    pbc: np.ndarray = field(default_factory=lambda: np.zeros(3, dtype=bool))
    energy: float | None = None
    forces: np.ndarray | None = None
    stress: np.ndarray | None = None
    config_type: str = ""
    weight: float = 1.0

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("numbers", _whole_numbers(self.numbers))
        put("positions", _array(self.positions, "positions"))
        count = len(self.numbers)
        if count == 0:
            raise DataError("a frame without atoms")
        if self.positions.shape != (count, 3):
            raise DataError(f"positions of shape {self.positions.shape} for {count} atomic numbers")
        pbc = np.array(self.pbc, dtype=bool)
        if pbc.shape not in ((), (3,)):
            raise DataError(f"pbc of shape {pbc.shape}; expected one or three truth values")
        put("pbc", np.broadcast_to(pbc, 3).copy())
        cell = _array(self.cell, "cell")
        if cell.shape != (3, 3):
            raise DataError(f"a cell of shape {cell.shape}; expected three lattice vectors, (3, 3)")
        put("cell", cell if self.pbc.any() else np.zeros((3, 3)))
        self._check_cell()
        if self.energy is not None:
            energy = _array(self.energy, "energy")
            if energy.size != 1:
                raise DataError(f"an energy of shape {energy.shape}; expected one number per frame")
            put("energy", float(energy.reshape(())))
        if self.forces is not None:
            put("forces", _array(self.forces, "forces"))
            if self.forces.shape != (count, 3):
                raise DataError(f"forces of shape {self.forces.shape} for {count} atoms; expected ({count}, 3)")
        if self.stress is not None:
            put("stress", _array(self.stress, "stress"))
            if self.stress.shape != (3, 3):
                raise DataError(f"a stress of shape {self.stress.shape}; expected (3, 3)")
        if not np.isfinite(self.weight) or self.weight < 0:
            raise DataError(f"a weight of {self.weight}; weights are finite and not negative")

    def _check_cell(self) -> None:
        lattice = self.cell[self.pbc]
        if len(lattice) and np.linalg.matrix_rank(lattice, tol=1e-6) < len(lattice):
            raise DataError("the cell has no volume along its periodic directions; give lattice vectors or pbc='F F F'")

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def periodic(self) -> bool:
        """Whether any direction is periodic."""
        return bool(np.any(self.pbc))

    @property
    def volume(self) -> float:
        """Volume of the cell [Å^3]; zero unless all three lattice vectors are given."""
        return float(abs(np.linalg.det(self.cell)))

    @classmethod
    def from_ase(cls, atoms: Atoms, labels: Mapping[str, object] | None = None) -> Structure:
        """A frame from ASE's Atoms; energy, forces and stress are taken from its calculator's stored results.

        Args:
            labels: values that replace what the calculator holds (``energy``, ``forces``, ``stress`` in ASE's
                Voigt order or as 3 x 3, ``config_type``, ``weight``).
        """
        values: dict[str, Any] = {}
        if atoms.calc is not None:
            results = getattr(atoms.calc, "results", {})
            values = {name: results[name] for name in ("energy", "forces", "stress") if results.get(name) is not None}
        values["config_type"] = str(atoms.info.get("config_type", ""))
        values.update(labels or {})
        if values.get("stress") is not None:
            values["stress"] = stress_matrix(values["stress"])
        return cls(
            numbers=atoms.get_atomic_numbers(),
            positions=atoms.get_positions(),
            cell=atoms.cell.array,
            pbc=atoms.pbc,
            **values,
        )  # type: ignore[arg-type]

    def to_ase(self) -> Atoms:
        """ASE's Atoms with the labels in a SinglePointCalculator."""
        from ase import Atoms
        from ase.calculators.singlepoint import SinglePointCalculator
        from ase.stress import full_3x3_to_voigt_6_stress

        atoms = Atoms(numbers=self.numbers, positions=self.positions, cell=self.cell, pbc=self.pbc)
        if self.config_type:
            atoms.info["config_type"] = self.config_type
        if self.weight != 1.0:
            atoms.info["weight"] = self.weight
        results = {
            "energy": self.energy,
            "forces": self.forces,
            "stress": None if self.stress is None else full_3x3_to_voigt_6_stress(self.stress),
        }
        atoms.calc = SinglePointCalculator(atoms, **{key: value for key, value in results.items() if value is not None})
        return atoms


def stress_matrix(values: object) -> np.ndarray:
    """``[3, 3]`` from a 3 x 3 matrix, nine numbers or six in Voigt order (xx, yy, zz, yz, xz, xy), as ASE writes it.

    Raises:
        DataError: another count of numbers.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 9:
        return array.reshape(3, 3)
    if array.size == 6:
        xx, yy, zz, yz, xz, xy = array.reshape(6)
        return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    raise DataError(f"a stress of shape {array.shape}; expected 6 (Voigt), 9 or 3 x 3 numbers")


def formula(numbers: np.ndarray) -> str:
    """Chemical formula in alphabetical order, such as ``C3H4O2``."""
    symbols = sorted((chemical_symbols[z], int(count)) for z, count in zip(*np.unique(numbers, return_counts=True)))
    return "".join(symbol + (str(count) if count > 1 else "") for symbol, count in symbols)


def _array(value: object, name: str) -> np.ndarray:
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{name} that are not numbers") from None
    if not np.isfinite(array).all():
        first = np.argwhere(~np.isfinite(array))[0]
        place = f" of atom {first[0]}" if array.ndim == 2 and name in ("positions", "forces") else ""
        raise DataError(f"{name}{place}: not finite (NaN or infinity)")
    return array


def _whole_numbers(value: object) -> np.ndarray:
    array = np.asarray(value)
    if array.ndim != 1 or array.dtype.kind not in "iuf":
        raise DataError(f"atomic numbers of shape {array.shape} and type {array.dtype}; expected [N] whole numbers")
    if not np.isfinite(array).all() or (array != np.round(array)).any():
        raise DataError("atomic numbers that are not whole")
    numbers = array.astype(np.int64)
    wrong = (numbers < 1) | (numbers > MAX_NUMBER)
    if wrong.any():
        raise DataError(f"unknown element: atomic number {numbers[wrong][0]} of atom {int(np.argmax(wrong))}")
    return numbers
