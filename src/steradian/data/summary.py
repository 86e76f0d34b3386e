"""What a data set holds, what looks wrong in it, and whether its units are plausible."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from ase.data import chemical_symbols, covalent_radii

from steradian.config import ReferenceEnergiesConfig
from steradian.data.labels import is_isolated_atom
from steradian.data.load import frame_key
from steradian.data.statistics import fitted_energies, interaction_energies, reference_energies, split_isolated_atoms
from steradian.graph.neighbors import neighbor_pairs
from steradian.graph.structures import DataError, Structure, formula
from steradian.units import KCAL_PER_MOL, energy_factor, length_factor, stress_factor

__all__ = [
    "Plausibility",
    "Summary",
    "plausibility",
    "shortest_distance",
    "summarize",
]

MAX_NOTES = 10
FITTED = ReferenceEnergiesConfig(kind="least_squares")


@dataclass(frozen=True)
class Summary:
    """Facts about a list of frames; energies eV, forces eV/Å, lengths Å.

    Attributes:
        frames, atoms: counts; ``atoms_min`` and ``atoms_max`` per frame.
        elements: symbol to number of atoms.
        formulas: formula to number of frames.
        config_types: label to number of frames.
        periodic: frames with a periodic direction.
        coverage: label to number of frames that have it.
        energy_per_atom: smallest and largest energy after least-squares reference energies, per atom, or None.
        force_norm: median and largest norm of a force, or None.
        force_rms: root mean square of the force components, or None.
        shortest_distance: between two atoms of any frame, or None.
        duplicates: frames that are exact copies of earlier ones (to 1e-6 Å).
        plausibility: labels against what is usual in eV and Å; its warnings are among the notes.
        notes: suspicious frames and labels, one line each.
    """

    frames: int
    atoms: int
    atoms_min: int
    atoms_max: int
    elements: dict[str, int]
    formulas: dict[str, int]
    config_types: dict[str, int]
    periodic: int
    coverage: dict[str, int]
    energy_per_atom: tuple[float, float] | None
    force_norm: tuple[float, float] | None
    force_rms: float | None
    shortest_distance: float | None
    duplicates: int
    plausibility: dict[str, Any]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return asdict(self)


def summarize(structures: Sequence[Structure], *, declared: bool = False) -> Summary:
    """Look at every frame once; ``declared``: the units were declared, so no other ones are guessed.

    Suspicious are: energies per atom or largest forces far outside the others (more than ten robust standard
    deviations from the median), forces that are all exactly zero, forces that do not sum to zero, atoms closer than
    half the sum of their covalent radii.

    Raises:
        DataError: no frames.
    """
    if not structures:
        raise DataError("no frames")
    sizes = [len(structure) for structure in structures]
    numbers = np.concatenate([structure.numbers for structure in structures])
    elements = Counter(chemical_symbols[int(z)] for z in numbers)
    usual = plausibility(structures, _isolated_references(structures), declared=declared)
    notes = list(usual.warnings)
    energies = _interaction_energies(structures)
    if energies is not None:
        notes += _outliers("energy per atom", energies, "eV, after reference energies")
    norms = [None if frame.forces is None else np.linalg.norm(frame.forces, axis=1) for frame in structures]
    largest = {index: float(norm.max()) for index, norm in enumerate(norms) if norm is not None}
    notes += _outliers("largest force", largest, "eV/Å") + _force_notes(structures)
    shortest = _distances(structures, notes)
    known = [frame.forces for frame in structures if frame.forces is not None]
    all_norms = np.concatenate([norm for norm in norms if norm is not None]) if known else None
    return Summary(
        frames=len(structures),
        atoms=len(numbers),
        atoms_min=min(sizes),
        atoms_max=max(sizes),
        elements=dict(sorted(elements.items())),
        formulas=dict(Counter(formula(frame.numbers) for frame in structures).most_common()),
        config_types=dict(Counter(frame.config_type for frame in structures if frame.config_type).most_common()),
        periodic=sum(frame.periodic for frame in structures),
        coverage={
            label: sum(getattr(frame, label) is not None for frame in structures)
            for label in ("energy", "forces", "stress")
        },
        energy_per_atom=None if energies is None else (min(energies.values()), max(energies.values())),
        force_norm=None if all_norms is None else (float(np.median(all_norms)), float(all_norms.max())),
        force_rms=float(np.sqrt(np.mean(np.concatenate(known) ** 2))) if known else None,
        shortest_distance=shortest,
        duplicates=_duplicates(structures, notes),
        plausibility=usual.to_dict(),
        notes=notes,
    )


def _isolated_references(structures: Sequence[Structure]) -> dict[int, float] | None:
    """Reference energies of the isolated atoms among the frames, where they are there for every element."""
    references, rest = split_isolated_atoms([frame for frame in structures if frame.energy is not None])
    elements = {int(z) for frame in rest for z in frame.numbers}
    return references if references.keys() >= elements else None


def _interaction_energies(structures: Sequence[Structure]) -> dict[int, float] | None:
    """Energy per atom after least-squares reference energies, by frame; the scale on which frames compare."""
    labelled = [index for index, frame in enumerate(structures) if frame.energy is not None]
    if not labelled:
        return None
    references, _, _ = reference_energies([structures[index] for index in labelled], FITTED)
    return dict(zip(labelled, interaction_energies(structures, references)))


def _outliers(name: str, values: dict[int, float], unit: str) -> list[str]:
    if len(values) < 10:
        return []
    array = np.array(list(values.values()))
    median = float(np.median(array))
    spread = 1.4826 * float(np.median(np.abs(array - median)))
    if spread == 0:
        return []
    far = sorted(
        (index for index in values if abs(values[index] - median) > 10 * spread), key=lambda i: -abs(values[i] - median)
    )
    notes = [
        f"frame {index}: {name} {values[index]:.4g} {unit} (median {median:.4g}, robust deviation {spread:.2g})"
        for index in far[:MAX_NOTES]
    ]
    return notes + (
        [f"... and {len(far) - MAX_NOTES} more frames with an unusual {name}"] if len(far) > MAX_NOTES else []
    )


def _force_notes(structures: Sequence[Structure]) -> list[str]:
    zero, pushed = [], []
    for index, frame in enumerate(structures):
        if frame.forces is None or len(frame) == 1:
            continue
        if not frame.forces.any():
            zero.append(index)
        elif np.abs(frame.forces.sum(axis=0)).max() > 0.01 * len(frame) ** 0.5 + 1e-3 * np.abs(frame.forces).sum():
            pushed.append(index)
    notes = []
    if zero:
        notes.append(
            f"{len(zero)} frames (first: {zero[0]}) have forces that are all exactly zero: "
            "labels missing, or perfect crystals?"
        )
    if pushed:
        notes.append(f"{len(pushed)} frames (first: {pushed[0]}) have forces that do not sum to zero")
    return notes


def _duplicates(structures: Sequence[Structure], notes: list[str]) -> int:
    """Frames whose atoms repeat an earlier frame; notes those whose energy differs from it."""
    seen: dict[bytes, Structure] = {}
    repeated, contradicting = 0, []
    for index, frame in enumerate(structures):
        first = seen.setdefault(frame_key(frame), frame)
        if first is frame:
            continue
        repeated += 1
        if frame.energy is not None and first.energy is not None and abs(frame.energy - first.energy) > 1e-4:
            contradicting.append(index)
    if contradicting:
        notes.append(
            f"{len(contradicting)} frames (first: {contradicting[0]}) repeat the atoms of another frame with a "
            "different energy (another charge or spin?): no model can learn both from positions alone"
        )
    return repeated


def _distances(structures: Sequence[Structure], notes: list[str]) -> float | None:
    """Shortest distance in the set; notes frames with atoms that nearly lie on each other."""
    shortest, close = np.inf, []
    for index, frame in enumerate(structures):
        try:
            pair = shortest_distance(frame, 3.0)
        except DataError as error:
            close.append(f"frame {index}: {error}")
            continue
        if pair is None:
            continue
        length, ratio, i, j = pair
        shortest = min(shortest, length)
        if ratio < 0.5:
            symbols = f"{chemical_symbols[frame.numbers[i]]}-{chemical_symbols[frame.numbers[j]]}"
            close.append(f"frame {index}: atoms {i} and {j} ({symbols}) are {length:.3f} Å apart")
    notes += close[:MAX_NOTES]
    if len(close) > MAX_NOTES:
        notes.append(f"... and {len(close) - MAX_NOTES} more frames with atoms too close")
    return None if np.isinf(shortest) else shortest


# -------------------------------------------------------------------------------------------------------- plausibility


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
        _shortest_distances(frames, found)
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


def _shortest_distances(frames: Sequence[Structure], found: Plausibility) -> None:
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
