"""From a frame as a file holds it to a :class:`Structure`: which key is which label, units, signs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from steradian.config import KeysConfig, UnitsConfig
from steradian.graph.structures import DataError, Structure, stress_matrix
from steradian.units import energy_factor, force_factor, length_factor, stress_factor

__all__ = ["USUAL_KEYS", "Factors", "RawFrame", "keep_uniform_labels", "nearest", "to_structures"]

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
    """

    where: str
    numbers: Any
    positions: Any
    cell: Any
    pbc: Any
    labels: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Factors:
    """Factors from the units of a file to eV and Å."""

    energy: float
    length: float
    forces: float
    stress: float

    @classmethod
    def of(cls, units: UnitsConfig) -> Factors:
        """Look the units up. Raises DataError that names the setting and the nearest known unit."""

        def looked_up(name: str, function: Any, unit: str) -> float:
            try:
                return function(unit)
            except ValueError as error:
                raise DataError(f"data.units.{name}: {error}") from None

        energy = looked_up("energy", energy_factor, units.energy)
        length = looked_up("length", length_factor, units.length)
        forces = energy / length if units.forces is None else looked_up("forces", force_factor, units.forces)
        return cls(energy, length, forces, looked_up("stress", stress_factor, units.stress))


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


def find_label(label: str, key: str | None, labels: Mapping[str, Any], where: str) -> str | None:
    """Name under which a frame holds a label, or None.

    Raises:
        DataError: two usual names hold different values, and data.keys does not choose.
    """
    if key is not None:
        return key if key in labels else None
    present = [name for name in USUAL_KEYS[label] if name in labels and _fits(label, labels[name])]
    same_kind = [name for name in present if is_virial(name) == is_virial(present[0])]
    for other in same_kind[1:]:
        if not np.array_equal(np.ravel(labels[same_kind[0]]), np.ravel(labels[other])):
            raise DataError(
                f"{where}: '{same_kind[0]}' and '{other}' both look like {label} and differ: "
                f"set data.keys.{label} to one of them"
            )
    return present[0] if present else None


def is_virial(key: str) -> bool:
    """Whether a key of the stress means a virial, minus stress times volume, by its name."""
    return "virial" in key.lower()


def _fits(label: str, value: Any) -> bool:
    """A total energy is one number; 'energies' of several numbers are energies per atom (ASE's name for them)."""
    return label != "energy" or np.size(value) == 1


def missing_label(label: str, key: str | None, labels: Iterable[str], where: str, count: str = "") -> DataError:
    """The error for a label that is not there: what was looked for, what was found, what is nearest."""
    found = sorted(labels)
    near = nearest([key] if key else USUAL_KEYS[label], found)
    looked = f"'{key}'" if key else f"'{label}'"
    shown = (
        ", ".join(f"'{name}'" for name in found[:12]) + (" ..." if len(found) > 12 else "") if found else "no labels"
    )
    hint = f"; did you mean data.keys.{label}: {near}?" if near else f"; set data.keys.{label} to the right one"
    return DataError(f"{where}: no {label} under {looked}{count}; found {shown}{hint if found else ''}")


def to_structures(
    frames: Sequence[RawFrame],
    keys: KeysConfig,
    units: UnitsConfig,
    *,
    require: Sequence[str] = (),
    ignore_cell: bool = False,
) -> list[Structure]:
    """Label, convert and check frames.

    Forces of one isolated atom and the stress of a frame that is not periodic are zero by symmetry; they are filled in
    where they are required and not given. No other label is ever filled in.

    Args:
        require: labels every frame must have: ``energy``, ``forces``, ``stress``.
        ignore_cell: treat every frame as not periodic (its stress is dropped).

    Raises:
        DataError: one line with file, frame and way out.
    """
    factors = Factors.of(units)
    structures = []
    missing: dict[str, list[RawFrame]] = {}
    for frame in frames:
        structure = _to_structure(frame, keys, factors, require, ignore_cell)
        for label in require:
            if getattr(structure, label) is None:
                missing.setdefault(label, []).append(frame)
        structures.append(structure)
    for label, where in missing.items():
        count = f" ({len(where)} of {len(frames)} frames lack it)" if len(frames) > 1 else ""
        raise missing_label(label, getattr(keys, label), where[0].labels, where[0].where, count)
    return structures


def _to_structure(
    frame: RawFrame, keys: KeysConfig, factors: Factors, require: Sequence[str], ignore_cell: bool
) -> Structure:
    names = {
        label: find_label(label, getattr(keys, label), frame.labels, frame.where)
        for label in ("energy", "forces", "stress")
    }

    def value(label: str, factor: float) -> np.ndarray | None:
        name = names[label]
        return None if name is None else _numbers(frame.labels[name], name, frame.where) * factor

    try:
        structure = Structure(
            numbers=frame.numbers,
            positions=_numbers(frame.positions, "positions", frame.where) * factors.length,
            cell=_numbers(frame.cell, "cell", frame.where) * factors.length,
            pbc=np.zeros(3, dtype=bool) if ignore_cell else frame.pbc,
            energy=value("energy", factors.energy),  # type: ignore[arg-type]
            forces=value("forces", factors.forces),
            config_type=str(frame.labels.get(keys.config_type, "")),
            weight=float(frame.labels.get("config_weight", frame.labels.get("weight", 1.0))),
        )
        return replace(structure, **_filled(structure, names, value, factors, require))
    except DataError as error:
        message = str(error)
        raise DataError(message if message.startswith(frame.where) else f"{frame.where}: {message}") from None


def _filled(
    structure: Structure, names: Mapping[str, str | None], value: Any, factors: Factors, require: Sequence[str]
) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if structure.periodic and names["stress"] is not None:
        name = names["stress"]
        if is_virial(name):
            if structure.volume == 0:
                raise DataError(f"'{name}' cannot become a stress: the cell has no volume")
            changes["stress"] = -stress_matrix(value("stress", factors.energy)) / structure.volume
        else:
            changes["stress"] = stress_matrix(value("stress", factors.stress))
    if not structure.periodic:
        if structure.forces is None and "forces" in require and len(structure) == 1:
            changes["forces"] = np.zeros((1, 3))
        if "stress" in require:
            changes["stress"] = np.zeros((3, 3))
    return changes


def _numbers(value: Any, name: str, where: str) -> np.ndarray:
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{where}: '{name}' does not hold numbers") from None


def keep_uniform_labels(structures: Sequence[Structure], require: Sequence[str] = ()) -> list[Structure]:
    """Drop labels that are not required and that only some frames have: a batch has a label for all or for none."""
    changes: dict[str, Any] = {}
    for label in ("energy", "forces", "stress"):
        present = [getattr(structure, label) is not None for structure in structures]
        if label not in require and any(present) and not all(present):
            changes[label] = None
    return [replace(structure, **changes) for structure in structures] if changes else list(structures)
