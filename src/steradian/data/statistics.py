"""Statistics of a training set: reference energies of the atoms, scales, number of neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from scipy.spatial.distance import pdist

from steradian.config import KeysConfig, ReferenceEnergiesConfig, UnitsConfig
from steradian.data.files import read_structures
from steradian.data.labels import is_isolated_atom
from steradian.graph.neighbors import neighbor_pairs
from steradian.graph.structures import DataError, Structure

__all__ = [
    "DatasetStatistics",
    "compute_statistics",
    "fitted_energies",
    "interaction_energies",
    "reference_energies",
    "split_isolated_atoms",
]


@dataclass(frozen=True)
class DatasetStatistics:
    """What a potential needs to know of its training set; units eV, Å.

    Attributes:
        elements: atomic numbers, ascending.
        atom_references: atomic number to reference energy E0 [eV].
        avg_num_neighbors: edges per atom at the cutoff, mean over all atoms of the training set (an atom without
            neighbours counts as zero).
        energy_shift: mean over frames of the interaction energy per atom (total minus sum of E0, over N) [eV].
        force_rms: root mean square of the force components [eV/Å]; 1 where no forces are known or all are zero.
        energy_std: standard deviation over frames of the interaction energy per atom [eV].
        num_frames: frames of the training set.
        reference_report: where E0 come from, the residual of the fit and what it left undetermined.
    """

    elements: tuple[int, ...]
    atom_references: dict[int, float]
    avg_num_neighbors: float
    energy_shift: float = 0.0
    force_rms: float = 1.0
    energy_std: float = 0.0
    num_frames: int = 0
    reference_report: str = ""

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        values = asdict(self)
        values["elements"] = list(self.elements)
        values["atom_references"] = {chemical_symbols[z]: energy for z, energy in sorted(self.atom_references.items())}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DatasetStatistics:
        """Inverse of :meth:`to_dict`."""
        content = dict(values)
        content["elements"] = tuple(int(z) for z in content["elements"])
        content["atom_references"] = {
            atomic_numbers[symbol]: float(energy) for symbol, energy in content["atom_references"].items()
        }
        return cls(**content)


def split_isolated_atoms(structures: Sequence[Structure]) -> tuple[dict[int, float], list[Structure]]:
    """Energies of the isolated atoms of a list, atomic number to energy [eV], and the other frames.

    Raises:
        DataError: an isolated atom without energy, or two different energies of one element.
    """
    references: dict[int, float] = {}
    rest = []
    for structure in structures:
        if not is_isolated_atom(structure):
            rest.append(structure)
            continue
        number = int(structure.numbers[0])
        symbol = chemical_symbols[number]
        if structure.energy is None:
            raise DataError(f"the isolated atom {symbol} has no energy")
        if abs(references.setdefault(number, structure.energy) - structure.energy) > 1e-6:
            raise DataError(
                f"two energies of the isolated atom {symbol}: {references[number]:.6f} and {structure.energy:.6f} eV; "
                "keep one, or set data.reference_energies.kind: least_squares"
            )
    return references, rest


def reference_energies(
    structures: Sequence[Structure],
    config: ReferenceEnergiesConfig,
    keys: KeysConfig | None = None,
    units: UnitsConfig | None = None,
) -> tuple[dict[int, float], str, list[Structure]]:
    """Reference energies E0 of the atoms, one line about them, and the frames left for training.

    Kinds: ``isolated_atoms`` reads them from ``config.file`` or from the frames of one atom in the data (which then
    leave the training set); ``least_squares`` fits energy/N = sum of fractions x E0 (minimum norm where compositions do
    not determine every element); ``auto`` takes isolated atoms where the data have them and fits the other elements;
    ``average`` gives every element the mean energy per atom; ``given`` takes ``config.values``; ``zero`` takes nothing
    off. An element that occurs in isolated atoms only is none of the model's: it has seen no neighbour of it.

    Raises:
        DataError: no frames, energies missing, or an element without E0.
    """
    if not structures:
        raise DataError("no frames to take reference energies from")
    frames = list(structures)
    references: dict[int, float] = {}
    report = {"given": "given in the configuration", "zero": "zero"}.get(config.kind, "")
    atoms_known = config.file is not None or any(map(is_isolated_atom, frames))
    if config.kind == "isolated_atoms" or (config.kind == "auto" and atoms_known):
        references, report, frames = _from_isolated_atoms(frames, config, keys, units)
    elements = sorted({int(z) for structure in frames for z in np.unique(structure.numbers)})
    unseen = [chemical_symbols[z] for z in sorted(references) if z not in elements]
    if unseen and config.file is None:
        report += f"; {', '.join(unseen)} in no other frame, so not an element of the model"
    if config.kind == "given":
        references = _given(config)
    elif config.kind == "zero":
        references = dict.fromkeys(elements, 0.0)
    elif config.kind != "isolated_atoms" and not references.keys() >= set(elements):
        references, fit = fitted_energies(frames, elements, references, average=config.kind == "average")
        report = f"{report}; the others: {fit}" if report else fit
    missing = [chemical_symbols[z] for z in elements if z not in references]
    if missing:
        known = ", ".join(chemical_symbols[z] for z in sorted(references)) or "none"
        way_out = {
            "isolated_atoms": "add a frame of one such atom, or set data.reference_energies.kind to least_squares",
            "given": "add it to data.reference_energies.values",
        }[config.kind]
        raise DataError(f"no reference energy for {', '.join(missing)} (known: {known}): {way_out}")
    return {z: float(references[z]) for z in elements}, report, frames


def _from_isolated_atoms(
    frames: list[Structure], config: ReferenceEnergiesConfig, keys: KeysConfig | None, units: UnitsConfig | None
) -> tuple[dict[int, float], str, list[Structure]]:
    if config.file is None:
        references, rest = split_isolated_atoms(frames)
        if not references:
            raise DataError(
                "no isolated atoms in the training data: set data.reference_energies.file, or kind: least_squares"
            )
        if not rest:
            raise DataError("the training data hold nothing but isolated atoms: add frames with neighbours")
        symbols = ", ".join(chemical_symbols[z] for z in sorted(references))
        return references, f"isolated atoms in the training data: {symbols}", rest
    read = read_structures(config.file, keys or KeysConfig(), units or UnitsConfig(), require=("energy",))
    references, others = split_isolated_atoms([_without_cell(frame) if len(frame) == 1 else frame for frame in read])
    if others:
        raise DataError(f"{config.file}: expected frames of one atom, found one of {len(others[0])} atoms")
    _, rest = split_isolated_atoms(frames)
    removed = len(frames) - len(rest)
    note = f"; {removed} frames of one atom left out of training" if removed else ""
    return references, f"isolated atoms, file {config.file.name}{note}", rest


def _without_cell(frame: Structure) -> Structure:
    """An atom in a file of isolated atoms is isolated even where its writer put it into a periodic box."""
    return Structure(frame.numbers, frame.positions, energy=frame.energy, config_type=frame.config_type)


def _given(config: ReferenceEnergiesConfig) -> dict[int, float]:
    references = {}
    for symbol, energy in config.values.items():
        if symbol not in atomic_numbers or atomic_numbers[symbol] == 0:
            raise DataError(f"data.reference_energies.values: unknown element '{symbol}'")
        references[atomic_numbers[symbol]] = energy
    return references


def fitted_energies(
    frames: Sequence[Structure],
    elements: Sequence[int],
    known: Mapping[int, float] | None = None,
    *,
    average: bool = False,
) -> tuple[dict[int, float], str]:
    """Least squares of energy/N = sum of fractions x E0 over the elements not ``known``, and a line about the fit.

    Raises:
        DataError: a frame without energy.
    """
    known = known or {}
    energies = _energies(frames)
    counts = np.array([[np.count_nonzero(frame.numbers == z) for z in elements] for frame in frames], dtype=np.float64)
    sizes = counts.sum(axis=1)
    fractions = counts / sizes[:, None]
    is_free = np.array([z not in known for z in elements])
    per_atom = energies / sizes - fractions[:, ~is_free] @ np.array([known[z] for z in elements if z in known])
    if average:
        mean = float(per_atom.mean())
        rms = float(np.sqrt(np.mean((per_atom - mean) ** 2)))
        return dict.fromkeys(elements, mean), f"average energy per atom; residual {1000 * rms:.3f} meV/atom (RMS)"
    solution, _, rank, _ = np.linalg.lstsq(fractions[:, is_free], per_atom, rcond=1e-10)
    rms = float(np.sqrt(np.mean((per_atom - fractions[:, is_free] @ solution) ** 2)))
    report = f"least squares over {len(frames)} frames; residual {1000 * rms:.3f} meV/atom (RMS)"
    if rank < len(solution):
        report += (
            f"; under-determined (the compositions fix {rank} of {len(solution)} elements, minimum norm taken): "
            "energies are meaningful for mixtures of the training compositions only"
        )
    free = [z for z in elements if z not in known]
    return {**known, **dict(zip(free, (float(value) for value in solution)))}, report


def _energies(frames: Sequence[Structure]) -> np.ndarray:
    missing = sum(frame.energy is None for frame in frames)
    if missing:
        raise DataError(f"{missing} of {len(frames)} training frames have no energy; reference energies need all")
    return np.array([frame.energy for frame in frames], dtype=np.float64)


def interaction_energies(frames: Sequence[Structure], references: Mapping[int, float]) -> list[float]:
    """Energy per atom after the reference energies [eV], of every frame that has an energy."""
    return [
        (frame.energy - sum(references[int(z)] for z in frame.numbers)) / len(frame)
        for frame in frames
        if frame.energy is not None
    ]


def _num_edges(frame: Structure, cutoff: float) -> int:
    try:
        return len(neighbor_pairs(frame.positions, frame.cell, frame.pbc, cutoff)[0])
    except DataError as error:
        raise DataError(f"{frame.where}: {error}" if frame.where else str(error)) from None


def compute_statistics(
    structures: Sequence[Structure],
    cutoff: float,
    config: ReferenceEnergiesConfig | None = None,
    *,
    keys: KeysConfig | None = None,
    units: UnitsConfig | None = None,
    num_edges: Iterable[int] | None = None,
) -> tuple[DatasetStatistics, list[Structure]]:
    """Statistics of a training set and the frames to train on (isolated atoms taken out where they give E0).

    Args:
        cutoff: [Å], for the number of neighbours.
        config: how to get reference energies.
        keys, units: how to read ``config.file``.
        num_edges: edges of every frame returned, where they are known already; else neighbour lists are made here.

    Raises:
        DataError: see :func:`reference_energies`; no atom with a neighbour.
    """
    references, report, frames = reference_energies(structures, config or ReferenceEnergiesConfig(), keys, units)
    atoms = sum(len(frame) for frame in frames)
    total_edges = sum(_num_edges(frame, cutoff) for frame in frames) if num_edges is None else sum(num_edges)
    if total_edges == 0:
        lengths = [pdist(frame.positions).min() for frame in frames if len(frame) > 1]
        found = f"the two closest are {min(lengths):.4g} Å apart" if lengths else "every frame is a single atom"
        raise DataError(
            f"no atom of the training frames has a neighbour within {cutoff:g} Å ({found}): raise"
            " model.host.cutoff_A, or set data.units.length to the unit of the file"
        )
    interaction = interaction_energies(frames, references)
    squares = [np.square(frame.forces).ravel() for frame in frames if frame.forces is not None]
    force_rms = float(np.sqrt(np.concatenate(squares).mean())) if squares else 0.0
    statistics = DatasetStatistics(
        elements=tuple(sorted(references)),
        atom_references=references,
        avg_num_neighbors=float(total_edges) / atoms,
        energy_shift=float(np.mean(interaction)) if interaction else 0.0,
        force_rms=force_rms or 1.0,
        energy_std=float(np.std(interaction)) if interaction else 0.0,
        num_frames=len(frames),
        reference_report=report,
    )
    return statistics, frames
