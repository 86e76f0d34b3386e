"""Are these eV and Å? Labels against what atoms do, and the unit that they are likely in instead."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase.data import chemical_symbols, covalent_radii

from steradian.data.labels import is_isolated_atom
from steradian.data.statistics import fitted_energies, interaction_energies
from steradian.graph.neighbors import neighbor_pairs
from steradian.graph.structures import DataError, Structure
from steradian.units import KCAL_PER_MOL, energy_factor, length_factor, stress_factor

__all__ = ["Plausibility", "plausibility", "shortest_distance"]

SAMPLE = 200  # frames whose distances are looked at

# Values that labels in eV and Å have (geometric middle, smallest, largest), from molecules and crystals between 50 and
# 2000 K; a label outside is compared with the middle in every other unit.
FORCE = (1.0, 0.02, 8.0)  # median over frames of the RMS of the components [eV/Å]
STRESS = (0.02, 1e-5, 0.6)  # RMS of the components [eV/Å^3]
SPREAD = (0.03, 0.0, 5.0)  # standard deviation of the interaction energy per atom [eV]
BOND = (1.0, 0.6, 1.45)  # median over frames of the shortest distance over the sum of covalent radii
BINDING = (-12.0, 4.0)  # mean interaction energy per atom [eV]; diamond, the most strongly bound, has -7.4

HARTREE = energy_factor("Hartree")
UNITS_OF_FORCE = {"kcal/mol/Å": KCAL_PER_MOL, "kJ/mol/Å": energy_factor("kJ/mol"), "meV/Å": 1e-3,
                  "Hartree/Bohr": HARTREE / length_factor("Bohr"), "Hartree/Å": HARTREE}  # fmt: skip
UNITS_OF_ENERGY = {name: energy_factor(name) for name in ("kcal/mol", "kJ/mol", "meV", "Hartree", "Rydberg")}
UNITS_OF_LENGTH = {name: length_factor(name) for name in ("Bohr", "nm")}
UNITS_OF_STRESS = {name: stress_factor(name) for name in ("GPa", "kbar", "bar")}
NOBLE = {2, 10, 18, 36, 54}


@dataclass
class Plausibility:
    """Rows (name, value) for a table, and what looks wrong, one line each."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    declared: bool = False

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {"rows": dict(self.rows), "warnings": self.warnings}


def plausibility(
    structures: Sequence[Structure], references: Mapping[int, float] | None = None, *, declared: bool = False
) -> Plausibility:
    """Compare every label with what it usually is in eV and Å.

    Args:
        structures: frames, converted as the settings say. Isolated atoms are left out.
        references: E0 of the elements [eV] that training will take off; compared with a fit.
        declared: the units were declared, so another one is not guessed: what is unusual is told all the same.
    """
    found = Plausibility(declared=declared)
    frames = [frame for frame in structures if not is_isolated_atom(frame)]
    if frames:
        _forces(frames, found)
        _distances(frames, found)
        _energies(frames, references, found)
        _stress(frames, found)
    return found


def shortest_distance(frame: Structure, cutoff: float) -> tuple[float, float, int, int] | None:
    """Shortest pair of a frame in units of the sum of covalent radii: length [Å], that ratio, both atoms.

    Raises:
        DataError: two atoms at one place.
    """
    receivers, senders, shifts = neighbor_pairs(frame.positions, frame.cell, frame.pbc, cutoff)
    if not len(receivers):
        return None
    vectors = frame.positions[senders] + shifts @ frame.cell - frame.positions[receivers]
    lengths = np.linalg.norm(vectors, axis=1)
    radii = covalent_radii[frame.numbers]
    ratios = lengths / (radii[senders] + radii[receivers])
    worst = int(np.argmin(ratios))
    return float(lengths[worst]), float(ratios[worst]), int(receivers[worst]), int(senders[worst])


def _likely(value: float, usual: tuple[float, float, float], candidates: Mapping[str, float]) -> str | None:
    """The unit that brings a value nearest to what is usual (on a logarithmic scale), where that is within range."""
    middle, low, high = usual
    distances = {unit: abs(math.log(value * factor / middle)) for unit, factor in candidates.items()}
    best = min(distances, key=distances.__getitem__)
    return best if low <= value * candidates[best] <= high else None


def _warn(
    found: Plausibility, what: str, value: float, usual: tuple[float, ...], candidates: Mapping[str, float], key: str
) -> None:
    if value <= 0 or usual[1] <= value <= usual[2]:
        return
    unit = None if found.declared else _likely(value, usual, candidates)  # type: ignore[arg-type]
    size = "large" if value > usual[2] else "small"
    hint = f": are they in {unit}? Then set data.units.{key}={setting(unit)}" if unit else f": check data.units.{key}"
    found.warnings.append(f"{what} is unusually {size} for eV and Å{hint}")


def setting(unit: str) -> str:
    """A unit as the settings spell it."""
    return unit.replace("Å", "Angstrom")


def _forces(frames: Sequence[Structure], found: Plausibility) -> None:
    labelled = [frame for frame in frames if frame.forces is not None]
    if not labelled:
        return
    forces = np.concatenate([frame.forces for frame in labelled])
    numbers = np.concatenate([frame.numbers for frame in labelled])
    parts = [
        f"{chemical_symbols[z]} {np.sqrt(np.mean(forces[numbers == z] ** 2)):.4g}" for z in np.unique(numbers).tolist()
    ]
    largest = float(np.linalg.norm(forces, axis=1).max())
    found.rows.append(("RMS force [eV/Å]", f"{', '.join(parts)}; largest {largest:.4g}"))
    sizes = [np.linalg.norm(frame.forces) / frame.forces.size**0.5 for frame in labelled if frame.forces is not None]
    typical = float(np.median(sizes))
    _warn(found, f"the RMS force of {typical:.3g}", typical, FORCE, UNITS_OF_FORCE, "forces")


def _distances(frames: Sequence[Structure], found: Plausibility) -> None:
    chosen = frames[:: max(1, len(frames) // SAMPLE)]
    pairs = []
    for frame in chosen:
        try:
            pairs.append(shortest_distance(frame, 6.0))
        except DataError:  # told with its frame elsewhere
            continue
    near = [pair for pair in pairs if pair is not None]
    if not near:
        if any(len(frame) > 1 for frame in chosen):
            found.rows.append(("shortest distance", "none below 6 Å"))
            found.warnings.append("no two atoms are within 6 Å of each other: check data.units.length")
        return
    ratio = float(np.median([pair[1] for pair in near]))
    found.rows.append(
        ("shortest distance [Å]", f"{min(pair[0] for pair in near):.4g} ({ratio:.2f} of the covalent radii, median)")
    )
    noble = {int(z) for frame in chosen for z in frame.numbers} <= NOBLE
    if not (noble and ratio < 2.5):
        _warn(found, f"the shortest distance ({ratio:.2f} of the sum of covalent radii)", ratio, BOND, UNITS_OF_LENGTH,
              "length")  # fmt: skip


def _energies(frames: Sequence[Structure], references: Mapping[int, float] | None, found: Plausibility) -> None:
    frames = [frame for frame in frames if frame.energy is not None]
    if not frames:
        return
    elements = sorted({int(z) for frame in frames for z in np.unique(frame.numbers)})
    fitted, report = fitted_energies(frames, elements)
    spread = float(np.std(interaction_energies(frames, fitted)))
    found.rows.append(("energy spread [eV/atom]", f"{spread:.4g} after fitted reference energies"))
    unit = _all_electron_unit(frames)
    if unit is not None and not found.declared:
        found.warnings.append(
            f"the energies equal total energies of all electrons in {unit}, not in eV: set data.units.energy={unit}"
        )
    else:
        _warn(
            found, f"the spread of the energies, {spread:.3g} eV per atom,", spread, SPREAD, UNITS_OF_ENERGY, "energy"
        )
    if references is None:
        return
    mean = float(np.mean(interaction_energies(frames, references)))
    found.rows.append(("interaction energy [eV/atom]", f"{mean:.4g}, mean of energy minus reference energies"))
    if "under-determined" not in report:
        parts = [f"{chemical_symbols[z]} {references[z] - fitted[z]:+.4g}" for z in elements]
        found.rows.append(("E0 given minus fitted [eV]", ", ".join(parts)))
    if not BINDING[0] <= mean <= BINDING[1]:
        found.warnings.append(
            f"atoms are bound by {-mean:.4g} eV each on average, which no matter is: the reference energies are of "
            "another level of theory (all-electron against pseudopotential?) or in another unit, or the energies are "
            "interaction energies (then set data.reference_energies.kind=zero)"
        )


def _all_electron_unit(frames: Sequence[Structure]) -> str | None:
    """The unit in which energies are all-electron total energies, where it is not eV.

    Thomas-Fermi with the corrections of Scott and Schwinger, E = -0.7687 Z^(7/3) + Z^2/2 - 0.2699 Z^(5/3) Hartree,
    gives atoms to a few percent (Schwinger 1981), much better than units differ.
    """
    z = np.arange(0, 119, dtype=float)
    atoms = HARTREE * (-0.7687 * z ** (7 / 3) + z**2 / 2 - 0.2699 * z ** (5 / 3))
    ratio = float(np.median([frame.energy / atoms[frame.numbers].sum() for frame in frames]))
    for unit, factor in UNITS_OF_ENERGY.items():
        # A file in this unit that was read as eV has 1/factor times as many of them.
        if abs(ratio * factor - 1) < 0.06:
            return unit
    return None


def _stress(frames: Sequence[Structure], found: Plausibility) -> None:
    stresses = [frame.stress for frame in frames if frame.stress is not None and frame.periodic]
    if not stresses:
        return
    values = np.array(stresses)
    pressure = -np.trace(values, axis1=1, axis2=2) / 3
    unit = stress_factor("GPa")
    found.rows.append(
        (
            "stress [eV/Å^3]",
            f"{values.min():.4g} to {values.max():.4g}; pressure {pressure.min() / unit:.4g} to "
            f"{pressure.max() / unit:.4g} GPa",
        )
    )
    typical = float(np.sqrt(np.mean(values**2)))
    _warn(found, f"the RMS stress of {typical:.3g}", typical, (STRESS[0], 0.0, STRESS[2]), UNITS_OF_STRESS, "stress")
