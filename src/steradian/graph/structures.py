"""One labelled frame, before neighbour lists: what readers produce and writers take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.data import chemical_symbols

from steradian.config.text import printable

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["LABELS", "DataError", "Structure", "checked_label", "formula", "real_numbers", "stress_matrix"]

MAX_NUMBER = 118
LABELS = ("energy", "forces", "stress")


class DataError(ValueError):
    """Data that cannot be used; one line that names the file, the frame and the way out."""

    def __init__(self, message: object = "") -> None:
        super().__init__(" ".join(printable(message).splitlines()))


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
        where: file and frame it was read from, for messages.

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
    where: str = ""

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
        for label in LABELS:
            if getattr(self, label) is not None:
                put(label, checked_label(label, getattr(self, label), count))
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

        Raises:
            DataError: also where the results belong to other atoms: one calculator for a list of Atoms holds the
                results of the last one only.
        """
        results = getattr(atoms.calc, "results", None) or {}
        values: dict[str, Any] = {name: results[name] for name in LABELS if results.get(name) is not None}
        if set(values) - set(labels or {}):
            _check_owner(atoms)
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
    array = real_numbers(values, "stress")
    if array.size == 9:
        return array.reshape(3, 3)
    if array.size == 6:
        xx, yy, zz, yz, xz, xy = array.reshape(6)
        return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    raise DataError(f"a stress of shape {array.shape}; expected 6 (Voigt), 9 or 3 x 3 numbers")


def checked_label(label: str, value: object, count: int) -> Any:
    """A label of a frame of ``count`` atoms in its right shape: a float, ``[N, 3]`` or ``[3, 3]``.

    Raises:
        DataError: another shape, something that is no number, NaN or infinity.
    """
    array = _array(value, label)
    if label == "energy":
        if array.size != 1:
            raise DataError(f"an energy of shape {array.shape}; expected one number per frame")
        return float(array.reshape(()))
    if label == "forces" and array.shape != (count, 3):
        raise DataError(f"forces of shape {array.shape} for {count} atoms; expected ({count}, 3)")
    if label == "stress" and array.shape != (3, 3):
        raise DataError(f"a stress of shape {array.shape}; expected (3, 3)")
    return array


def _check_owner(atoms: Atoms) -> None:
    """Raise where the stored results were computed for other atoms; some calculators do not remember for which."""
    owner = getattr(atoms.calc, "atoms", None)
    if owner is None:
        return
    for name in ("numbers", "positions", "cell", "pbc"):
        if not np.array_equal(np.asarray(getattr(owner, name)), np.asarray(getattr(atoms, name))):
            raise DataError(
                f"the calculator's results belong to other atoms (other {name}: one calculator for several Atoms, or "
                "atoms moved since): call get_forces() on each just before, or give labels="
            )


def formula(numbers: np.ndarray) -> str:
    """Chemical formula in alphabetical order, such as ``C3H4O2``."""
    symbols = sorted((chemical_symbols[z], int(count)) for z, count in zip(*np.unique(numbers, return_counts=True)))
    return "".join(symbol + (str(count) if count > 1 else "") for symbol, count in symbols)


def real_numbers(value: object, name: str) -> np.ndarray:
    """A float64 array of a value. Raises DataError for text, truth values, complex numbers, dates and objects."""
    try:
        array = np.asarray(value)
        entries = np.asarray(value, dtype=object).ravel() if isinstance(value, list | tuple) else ()
    except (TypeError, ValueError, OverflowError):  # rows of different lengths
        raise DataError(f"'{name}' does not hold numbers in one shape") from None
    if array.dtype.kind not in "iuf" or any(isinstance(entry, bool | np.bool_) for entry in entries):
        kind = {"b": "truth values", "c": "complex numbers", "M": "dates", "m": "times", "U": "text", "S": "text"}
        raise DataError(f"'{name}' does not hold numbers but {kind.get(array.dtype.kind, 'something else')}")
    return np.array(array, dtype=np.float64)


def _array(value: object, name: str) -> np.ndarray:
    array = real_numbers(value, name)
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
