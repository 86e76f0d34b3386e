"""From a frame as a file holds it to a :class:`Structure`: which key is which label, units, signs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from steradian.config import KeysConfig, UnitsConfig
from steradian.config.text import printable
from steradian.graph.structures import LABELS, DataError, Structure, checked_label, real_numbers, stress_matrix
from steradian.units import UNITS, force_factor

__all__ = [
    "USUAL_KEYS",
    "Factors",
    "RawFrame",
    "is_isolated_atom",
    "keep_uniform_labels",
    "nearest",
    "to_structures",
]

# Tried in this order where data.keys does not name a key. No gradients: their sign is the opposite.
USUAL_KEYS: dict[str, tuple[str, ...]] = {
    "energy": ("energy", "energies", "E", "REF_energy", "dft_energy", "total_energy", "Energy", "TotEnergy"),
    "forces": ("forces", "force", "F", "REF_forces", "dft_forces", "Forces"),
    "stress": ("stress", "REF_stress", "dft_stress", "virial", "virials", "REF_virial", "REF_virials", "dft_virial"),
    "positions": ("positions", "coords", "R", "pos", "coord", "coordinates", "xyz"),
    "numbers": ("atomic_numbers", "nuclear_charges", "z", "Z", "numbers"),
    "cell": ("cell", "box", "lattice", "unit_cell"),
}


@dataclass(frozen=True)
class RawFrame:
    """A frame in the units and under the names of its file.

    Attributes:
        where: file and frame number, for messages.
        numbers, positions, cell, pbc: as in :class:`Structure`.
        labels: everything else the file says about the frame, by its own names.
        units: units that the file names, by ``energy``, ``length``, ``forces``, ``stress``.
    """

    where: str
    numbers: Any
    positions: Any
    cell: Any
    pbc: Any
    labels: Mapping[str, Any] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)


MAX_NOTES = 10

# Names under which files say their units: sGDML's npz and comment lines.
UNIT_KEYS = {
    "energy": ("e_unit", "energy_unit", "energy_units"),
    "length": ("r_unit", "length_unit", "length_units", "distance_unit"),
    "forces": ("f_unit", "force_unit", "forces_unit", "force_units", "forces_units"),
    "stress": ("stress_unit", "stress_units"),
}


def units_named(content: Mapping[str, Any]) -> dict[str, str]:
    """Units that a file names among its keys."""
    found = {}
    for quantity, names in UNIT_KEYS.items():
        for name in names:
            if name in content and np.ndim(content[name]) == 0:
                value = np.asarray(content[name]).item()
                found[quantity] = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return found


@dataclass(frozen=True)
class Factors:
    """Factors from the units of a file to eV and Å."""

    energy: float
    length: float
    forces: float
    stress: float

    @classmethod
    def of(cls, units: UnitsConfig, named: Mapping[str, str] | None = None, where: str = "") -> Factors:
        """What the settings say, else what the file says, else eV and Å.

        Raises:
            DataError: an unknown unit, with the nearest known one, or a file that contradicts the settings.
        """
        named = named or {}
        factors: dict[str, float] = {}
        for quantity in ("energy", "length", "forces", "stress"):
            given, said = getattr(units, quantity), named.get(quantity)
            lookup = force_factor if quantity == "forces" else UNITS[quantity][1]
            try:
                wanted = None if given is None else lookup(given)
            except ValueError as error:
                raise DataError(f"data.units.{quantity}: {error}") from None
            try:
                found = None if said is None else lookup(said)
            except ValueError as error:
                if wanted is None:
                    raise DataError(f"{where}: the file says so: {error}; set data.units.{quantity}") from None
                found = None
            if wanted is not None and found is not None and abs(wanted / found - 1) > 1e-6:
                raise DataError(
                    f"{where}: the file says that its {quantity} is in {said}, data.units.{quantity} says {given}: "
                    "leave the setting out, or correct the file"
                )
            default = factors["energy"] / factors["length"] if quantity == "forces" else 1.0
            factors[quantity] = next((value for value in (wanted, found) if value is not None), default)
        return cls(**factors)


def nearest(wanted: Iterable[str], found: Sequence[str]) -> str | None:
    """The name among ``found`` that looks most like one of the wanted ones, or None."""
    lowered = {name.lower(): name for name in found}
    best, best_score = None, 0.6
    for name in wanted:
        for candidate, original in lowered.items():
            score = difflib.SequenceMatcher(None, name.lower(), candidate).ratio()
            if name.lower() in candidate.split("_") or candidate in name.lower().split("_"):
                score = max(score, 0.9)
            if score > best_score:
                best, best_score = original, score
    return best


def is_virial(key: str) -> bool:
    """Whether a key of the stress means a virial, minus stress times volume, by its name."""
    return "virial" in key.lower()


def missing_label(label: str, key: str | None, labels: Iterable[str], where: str, count: str = "") -> DataError:
    """The error for a label that is not there: what was looked for, what was found, what is nearest."""
    found = sorted(map(str, labels))
    near = nearest([key] if key else USUAL_KEYS[label], found)
    looked = f"'{key}'" if key else f"'{label}'"
    shown = (
        ", ".join(f"'{name}'" for name in found[:12]) + (" ..." if len(found) > 12 else "") if found else "no labels"
    )
    hint = f"; did you mean data.keys.{label}: {near}?" if near else f"; set data.keys.{label} to the right one"
    return DataError(f"{where}: no {label} under {looked}{count}; found {shown}{hint if found else ''}")


def is_isolated_atom(structure: Structure) -> bool:
    """One atom that is not periodic, or whose config_type says so (writers often put it into a large periodic box).

    Any other single atom in a periodic cell is a crystal.
    """
    named = structure.config_type.replace("_", "").lower() in ("isolatedatom", "isolatedatoms")
    return len(structure) == 1 and (named or not structure.periodic)


def to_structures(
    frames: Sequence[RawFrame],
    keys: KeysConfig,
    units: UnitsConfig,
    *,
    require: Sequence[str] = (),
    ignore_cell: bool = False,
    notes: list[str] | None = None,
) -> list[Structure]:
    """Label, convert and check frames.

    Forces of one atom and the stress of a frame that is not periodic (or an isolated atom in a box) are zero by
    symmetry; they are filled in where they are required and not given. No other label is ever filled in. A label that
    is wrong (not finite, of another shape, two different ones) is an error where it is required or named by ``keys``,
    else it is left out.

    Args:
        require: labels every frame must have: ``energy``, ``forces``, ``stress``.
        ignore_cell: treat every frame as not periodic (its stress is dropped).
        notes: gets a line for everything that was left out or decided.

    Raises:
        DataError: one line with file, frame and way out.
    """
    conversion = _Conversion(keys, units, tuple(require), ignore_cell)
    structures = [conversion.structure(frame) for frame in frames]
    for label in require:
        lacking = [frame for frame, structure in zip(frames, structures) if getattr(structure, label) is None]
        if lacking:
            count = f" ({len(lacking)} of {len(frames)} frames lack it)" if len(frames) > 1 else ""
            raise missing_label(label, getattr(keys, label), lacking[0].labels, lacking[0].where, count)
    if notes is not None:
        notes += conversion.remarks()
    return structures


class _Conversion:
    """Turns frames into structures and counts what it leaves out."""

    def __init__(self, keys: KeysConfig, units: UnitsConfig, require: tuple[str, ...], ignore_cell: bool) -> None:
        self.keys, self.units, self.require, self.ignore_cell = keys, units, require, ignore_cell
        self.factors: dict[tuple[tuple[str, str], ...], Factors] = {}
        self.counts: dict[str, tuple[str, int]] = {}

    def structure(self, frame: RawFrame) -> Structure:
        try:
            return self._structure(frame)
        except DataError as error:
            message = str(error)
            raise DataError(message if message.startswith(frame.where) else f"{frame.where}: {message}") from None

    def remarks(self) -> list[str]:
        lines = [
            f"{where}: {text}" + (f" (and {count - 1} more frames)" if count > 1 else "")
            for text, (where, count) in self.counts.items()
        ]
        return lines[:MAX_NOTES] + ([f"... and {len(lines) - MAX_NOTES} more notes"] if len(lines) > MAX_NOTES else [])

    def _note(self, frame: RawFrame, text: str) -> None:
        where, count = self.counts.get(text, (frame.where, 0))
        self.counts[text] = (where, count + 1)

    def _structure(self, frame: RawFrame) -> Structure:
        named = tuple(sorted(frame.units.items()))
        if named not in self.factors:
            self.factors[named] = Factors.of(self.units, frame.units, frame.where)
            if named:
                said = ", ".join(f"{quantity} {unit}" for quantity, unit in named)
                self._note(frame, f"units as the file names them: {said}")
        factors = self.factors[named]
        structure = Structure(
            numbers=frame.numbers,
            positions=real_numbers(frame.positions, "positions") * factors.length,
            cell=real_numbers(frame.cell, "cell") * factors.length,
            pbc=np.zeros(3, dtype=bool) if self.ignore_cell else frame.pbc,
            config_type=printable(frame.labels.get(self.keys.config_type, "")),
            weight=self._weight(frame),
            where=frame.where,
        )
        labels: dict[str, Any] = {}
        for label in LABELS:
            if label == "stress" and not structure.periodic:
                continue
            try:
                labels[label] = self._label(label, frame, structure, factors)
            except DataError as error:
                if label in self.require or getattr(self.keys, label) is not None:
                    raise
                self._note(frame, f"{label} left out: {error}")
        if "forces" in self.require and len(structure) == 1 and labels.get("forces") is None:
            labels["forces"] = np.zeros((1, 3))
        if "stress" in self.require and labels.get("stress") is None:
            alone = not structure.periodic or is_isolated_atom(structure)
            labels["stress"] = np.zeros((3, 3)) if alone else None
        return replace(structure, **labels)

    def _label(self, label: str, frame: RawFrame, structure: Structure, factors: Factors) -> Any:
        """Value of a label in eV and Å, or None.

        Raises:
            DataError: wrong shape, not finite, or two usual names with different values and no key that decides.
        """
        key = getattr(self.keys, label)
        names = [name for name in ((key,) if key is not None else USUAL_KEYS[label]) if name in frame.labels]
        if label == "energy" and key is None and "free_energy" in frame.labels and "energy" in names:
            names[names.index("energy")] = self._energy_of_forces(frame)
        good: dict[str, Any] = {}
        problems: list[DataError] = []
        for name in names:
            try:
                good[name] = _converted(label, name, frame.labels[name], structure, factors)
            except DataError as error:
                problems.append(error)
        if not good:
            if problems:
                raise problems[0]
            return None
        first, *others = good
        for other in others:
            if not np.allclose(good[first], good[other], rtol=1e-6, atol=1e-6):
                raise DataError(
                    f"'{first}' and '{other}' both look like {label} and differ: set data.keys.{label} to one of them"
                )
        return good[first]

    def _energy_of_forces(self, frame: RawFrame) -> str:
        """VASP and kin give the energy extrapolated to no smearing; forces are derivatives of the free energy."""
        energy, free = (frame.labels[name] for name in ("energy", "free_energy"))
        if np.size(energy) != 1 or np.size(free) != 1 or np.allclose(energy, free, rtol=0, atol=1e-6):
            return "energy"
        self._note(
            frame,
            "energy read from 'free_energy', which forces and stress belong to ('energy' is the one extrapolated to "
            "no smearing; data.keys.energy=energy takes that)",
        )
        return "free_energy"

    def _weight(self, frame: RawFrame) -> float:
        name = self.keys.weight or next((name for name in ("config_weight", "weight") if name in frame.labels), None)
        if name is None:
            return 1.0
        if name not in frame.labels:
            raise missing_label("weight", name, frame.labels, frame.where)
        try:
            weight = real_numbers(frame.labels[name], name)
        except DataError as error:
            raise DataError(f"{error}: a weight is one number per frame (or set data.keys.weight)") from None
        if weight.size != 1:
            raise DataError(
                f"'{name}' holds {weight.size} numbers, a frame has one weight; rename it, or set data.keys.weight"
            )
        return float(weight.reshape(()))


def _converted(label: str, name: str, value: Any, structure: Structure, factors: Factors) -> Any:
    """One candidate for a label in eV and Å, checked."""
    count = len(structure)
    if label == "energy":
        if np.size(value) != 1:
            raise DataError(f"no energy under 'energy': '{name}' holds {np.size(value)} values, a frame has one energy")
        return checked_label(label, real_numbers(value, name) * factors.energy, count)
    if label == "forces":
        return checked_label(label, real_numbers(value, name) * factors.forces, count)
    if not is_virial(name):
        return checked_label(label, stress_matrix(real_numbers(value, name)) * factors.stress, count)
    if structure.volume == 0:
        raise DataError(f"'{name}' cannot become a stress: the cell has no volume")
    return checked_label(label, -stress_matrix(real_numbers(value, name)) * factors.energy / structure.volume, count)


def keep_uniform_labels(structures: Sequence[Structure], require: Sequence[str] = ()) -> list[Structure]:
    """Drop labels that are not required and that only some frames have: a batch has a label for all or for none."""
    changes: dict[str, Any] = {}
    for label in LABELS:
        present = [getattr(structure, label) is not None for structure in structures]
        if label not in require and any(present) and not all(present):
            changes[label] = None
    return [replace(structure, **changes) for structure in structures] if changes else list(structures)
