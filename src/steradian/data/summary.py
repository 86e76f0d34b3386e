"""What a data set holds and what looks wrong in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from steradian.config import ReferenceEnergiesConfig
from steradian.data.load import frame_key
from steradian.data.plausibility import plausibility, shortest_distance
from steradian.data.statistics import interaction_energies, reference_energies, split_isolated_atoms
from steradian.graph.structures import DataError, Structure, formula

__all__ = ["Summary", "summarize"]

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
