"""Errors of a potential on labelled structures: totals, per element, per configuration type, and the worst cases."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import rich.console
import rich.markup
import torch
from ase.data import chemical_symbols
from rich.progress import track

from steradian.checkpoint import one_line, read_arrays, write_atomically
from steradian.config import BatchConfig
from steradian.evaluation.metrics import (
    METRICS,
    QUANTITIES,
    STATISTICS,
    ErrorAccumulator,
    ErrorArrays,
    bootstrap_intervals,
    figures,
    metric_name,
)
from steradian.evaluation.tables import Table, format_number, plain
from steradian.graph import Graph, Prediction, batch_graphs
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure
from steradian.units import KCAL_PER_MOL, STRESS

__all__ = ["ErrorReport", "WorstStructure", "evaluate"]

NPZ_FORMAT = 1
SHOWN = {
    "eV": (("meV", 1e3), ("kcal/mol", 1 / KCAL_PER_MOL)),
    "eV/atom": (("meV/atom", 1e3), ("kcal/mol/atom", 1 / KCAL_PER_MOL)),
    "eV/Å": (("meV/Å", 1e3), ("kcal/mol/Å", 1 / KCAL_PER_MOL)),
    "eV/Å^3": (("meV/Å^3", 1e3), ("GPa", 1 / STRESS["GPa"])),
}
"""Unit of a figure -> the two units it is shown in, with their factors."""
QUANTITY_NAMES = {
    "energy": "energy",
    "energy_per_atom": "energy per atom",
    "forces_component": "force component",
    "forces_vector": "force vector",
    "stress": "stress component",
}


class PotentialLike(Protocol):
    """What this module needs of a potential."""

    @property
    def cutoff(self) -> float: ...

    def __call__(self, graph: Graph, *, forces: bool = True, stress: bool = False) -> Prediction: ...


@dataclass(frozen=True)
class WorstStructure:
    """A structure with a large error.

    Attributes:
        index: place in the set. config_type: its label.
        energy_error: predicted minus reference [eV], or None without a label.
        force_error: largest norm of the error vector of its atoms [eV/Å], or None without labels.
        atom: index of that atom in the structure. element: its symbol.
    """

    index: int
    config_type: str
    energy_error: float | None
    force_error: float | None
    atom: int | None
    element: str | None


@dataclass(frozen=True)
class ErrorReport:
    """All errors of one potential on one set, and every table made of them.

    Attributes:
        arrays: the errors themselves.
        name: of the potential, for tables and pictures.
        seconds_per_structure: mean time of one prediction (forces included), first batch left out where there are more.
        batch: what was predicted at once, in words.
        num_worst: how many of the worst structures are listed.
        bootstrap_seed, bootstrap_samples: of the intervals.
    """

    arrays: ErrorArrays
    name: str = "model"
    seconds_per_structure: float = float("nan")
    batch: str = ""
    num_worst: int = 10
    bootstrap_seed: int = 0
    bootstrap_samples: int = 500
    info: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def total(self) -> dict[str, float]:
        """Every figure of the whole set, by the names of :mod:`steradian.evaluation.metrics` (eV, Å)."""
        return figures(self.arrays)

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % bootstrap interval over structures of every figure of :attr:`total`; empty for a single structure."""
        if self.arrays.num_structures < 2:
            return {}
        return bootstrap_intervals(self.arrays.samples(), num_samples=self.bootstrap_samples, seed=self.bootstrap_seed)

    @cached_property
    def per_element(self) -> dict[str, dict[str, float]]:
        """Element symbol -> figures of the forces on its atoms, with ``num_atoms``."""
        arrays = self.arrays
        labelled = arrays.has_forces[arrays.structure_of_atom]
        found: dict[str, dict[str, float]] = {}
        for number in np.unique(arrays.numbers[labelled]):
            atoms = arrays.numbers == number
            of_forces = {name: value for name, value in figures(arrays, atoms).items() if name.startswith("forces")}
            found[chemical_symbols[number]] = {"num_atoms": int((atoms & labelled).sum()), **of_forces}
        return found

    @cached_property
    def per_config_type(self) -> dict[str, dict[str, float]]:
        """Configuration type -> all figures, with ``num_structures``."""
        found: dict[str, dict[str, float]] = {}
        for label in np.unique(self.arrays.config_type):
            selected = self.arrays.select(self.arrays.config_type == label)
            found[str(label)] = {"num_structures": selected.num_structures, **figures(selected)}
        return found

    @cached_property
    def worst(self) -> tuple[WorstStructure, ...]:
        """The structures with the largest force error on one atom; without forces, with the largest energy error."""
        arrays = self.arrays
        norms = np.linalg.norm(arrays.force_error, axis=1)
        starts = np.cumsum(arrays.atom_counts) - arrays.atom_counts
        if arrays.has_forces.any():
            ranked = np.array([norms[s : s + n].max(initial=0.0) for s, n in zip(starts, arrays.atom_counts)])
        else:
            ranked = np.abs(arrays.energy_error) / np.maximum(arrays.atom_counts, 1)
        order = np.argsort(-ranked, kind="stable")[: self.num_worst]
        return tuple(self._describe(int(index), int(starts[index]), norms) for index in order)

    def _describe(self, index: int, start: int, norms: np.ndarray) -> WorstStructure:
        arrays = self.arrays
        energy = float(arrays.energy_error[index]) if arrays.has_energy[index] else None
        label = str(arrays.config_type[index])
        if not arrays.has_forces[index] or arrays.atom_counts[index] == 0:
            return WorstStructure(index, label, energy, None, None, None)
        atom = int(norms[start : start + arrays.atom_counts[index]].argmax())
        element = chemical_symbols[arrays.numbers[start + atom]]
        return WorstStructure(index, label, energy, float(norms[start + atom]), atom, element)

    # ----------------------------------------------------------------------------------------------------- tables

    def total_table(self) -> Table:
        """All figures in meV and kcal/mol, with their intervals."""
        rows: list[list[str]] = []
        faint: set[int] = set()
        for quantity in QUANTITIES:
            names = [metric_name(quantity, statistic) for statistic in STATISTICS]
            if names[0] not in self.total:
                continue
            (unit, factor), (other_unit, other_factor) = SHOWN[METRICS[names[0]]]
            rows.append([QUANTITY_NAMES[quantity], unit, *[format_number(self.total[n] * factor) for n in names]])
            if self.intervals:
                faint.add(len(rows))
                ends = [[format_number(end * factor) for end in self.intervals[name]] for name in names]
                rows.append(["", "95 % interval", *[" … ".join(pair) for pair in ends]])
            rows.append(["", other_unit, *[format_number(self.total[name] * other_factor) for name in names]])
        title = f"{self.name}: errors on {_count(self.arrays.num_structures, 'structure')}"
        heads = [statistic.upper() for statistic in STATISTICS]
        return Table(title, ["", "unit", *heads], rows, num_labels=2, faint=frozenset(faint), note=self._timing())

    def _timing(self) -> str:
        if not np.isfinite(self.seconds_per_structure):
            return ""
        milliseconds = format_number(1e3 * self.seconds_per_structure)
        return f"{milliseconds} ms per structure (energy and forces{', ' + self.batch if self.batch else ''})"

    def element_table(self) -> Table:
        """Force errors per element."""
        rows = [
            [symbol, str(int(found["num_atoms"])), *_force_cells(found), _kcal(found["forces_mae"])]
            for symbol, found in self.per_element.items()
        ]
        return Table("Force errors per element", ["element", "atoms", *FORCE_HEADS, KCAL_HEAD], rows, note=FORCE_NOTE)

    def config_type_table(self) -> Table:
        """Errors per configuration type."""
        rows = []
        for label, found in self.per_config_type.items():
            energy = format_number(1e3 * found.get("energy_per_atom_mae", float("nan")))
            force = _kcal(found.get("forces_mae", float("nan")))
            rows.append([label or "(none)", str(int(found["num_structures"])), energy, *_force_cells(found), force])
        heads = ["configuration type", "structures", "E MAE [meV/atom]", *FORCE_HEADS, KCAL_HEAD]
        return Table("Errors per configuration type", heads, rows, note=FORCE_NOTE)

    def worst_table(self) -> Table:
        """The worst structures."""
        rows = []
        for case in self.worst:
            where = f"{case.atom} ({case.element})" if case.atom is not None else "–"
            energy = format_number(1e3 * case.energy_error) if case.energy_error is not None else "–"
            force = format_number(1e3 * case.force_error) if case.force_error is not None else "–"
            rows.append([str(case.index), case.config_type or "–", where, force, energy])
        heads = ["structure", "configuration type", "atom", "force error [meV/Å]", "energy error [meV]"]
        if not any(self.arrays.config_type):
            heads, rows = [heads[0], *heads[2:]], [[row[0], *row[2:]] for row in rows]
        title = f"The {len(rows)} worst structures" if len(rows) > 1 else "The worst structure"
        return Table(title, heads, rows, num_labels=len(heads) - 2, note="structures and atoms are counted from 0")

    def tables(self) -> list[Table]:
        """The tables that say something for this set, most important first."""
        found = [self.total_table()]
        if self.per_element:
            found.append(self.element_table())
        if len(self.per_config_type) > 1:
            found.append(self.config_type_table())
        return [*found, self.worst_table()]

    def table(self) -> rich.console.Group:
        """For ``rich.print``."""
        return rich.console.Group(*[table.rich() for table in self.tables()])

    def text(self) -> str:
        """The tables as plain text."""
        return "\n".join(table.text() for table in self.tables())

    # ------------------------------------------------------------------------------------------------------ files

    def to_dict(self) -> dict[str, Any]:
        """Everything but the single errors, for JSON; NaN becomes null."""

        def shown(found: dict[str, float]) -> dict[str, Any]:
            return {name: _in_units(name, value) if name in METRICS else value for name, value in found.items()}

        total = shown(self.total)
        for name, (low, high) in self.intervals.items():
            total[name]["interval_95"] = [_finite(low), _finite(high)]
        return {
            "name": self.name,
            "num_structures": self.arrays.num_structures,
            "num_atoms": len(self.arrays.numbers),
            "seconds_per_structure": _finite(self.seconds_per_structure),
            "batch": self.batch,
            "bootstrap": {"samples": self.bootstrap_samples, "seed": self.bootstrap_seed, "level": 0.95},
            "total": total,
            "per_element": {symbol: shown(found) for symbol, found in self.per_element.items()},
            "per_config_type": {label: shown(found) for label, found in self.per_config_type.items()},
            "worst": [vars(case) for case in self.worst],
            **({"info": self.info} if self.info else {}),
        }

    def write_json(self, path: Path | str, **more: Any) -> None:
        """Write :meth:`to_dict`, with ``more`` entries, atomically."""
        text = json.dumps({**self.to_dict(), **more}, indent=2, ensure_ascii=False) + "\n"
        write_atomically(path, text.encode())

    def save(self, path: Path | str) -> None:
        """Write the errors of every structure and atom to an npz file (no pickle), atomically."""
        meta = {"format": NPZ_FORMAT, "name": self.name, "seconds": self.seconds_per_structure, "batch": self.batch}
        meta["info"] = self.info
        content = io.BytesIO()
        np.savez_compressed(content, meta=np.array(json.dumps(meta)), **vars(self.arrays))
        write_atomically(path, content.getvalue())

    @classmethod
    def load(cls, path: Path | str) -> ErrorReport:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file cannot be read or holds something else.
        """
        stored = read_arrays(path)
        try:
            meta = json.loads(str(stored.pop("meta")))
            arrays = ErrorArrays(**{name: stored[name] for name in ErrorArrays.__dataclass_fields__})
            arrays.check()
            return cls(
                arrays, str(meta["name"]), float(meta["seconds"]), str(meta["batch"]), info=dict(meta.get("info", {}))
            )
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: not a file of errors written by 'steradian evaluate' ({one_line(error)})"
            ) from None


FORCE_HEADS = ["MAE [meV/Å]", "RMSE", "Q95", "Q99", "MAX"]
KCAL_HEAD = "MAE [kcal/mol/Å]"
FORCE_NOTE = "MAE and RMSE of the components, Q95, Q99 and MAX of the norm of the error vector of an atom"


def _force_cells(found: dict[str, float]) -> list[str]:
    return [format_number(1e3 * found.get(f"forces_{statistic}", float("nan"))) for statistic in STATISTICS]


def _kcal(value: float) -> str:
    return format_number(value / KCAL_PER_MOL)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _in_units(name: str, value: float) -> dict[str, Any]:
    unit = METRICS[name]
    return {"value": _finite(value), "unit": unit, **{other: _finite(value * factor) for other, factor in SHOWN[unit]}}


# ---------------------------------------------------------------------------------------------------------- evaluating


def evaluate(
    potential: PotentialLike,
    structures: Sequence[Structure],
    *,
    batch: int | BatchConfig = 32,
    progress: bool = True,
    require: Sequence[str] = ("energy", "forces"),
    name: str = "model",
    num_worst: int = 10,
) -> ErrorReport:
    """Predict every structure and collect all errors; labels that a structure lacks are left out.

    Args:
        potential: a :class:`~steradian.potential.Potential` or anything that is called like one. It is put into
            evaluation mode for the time being.
        structures: labelled structures.
        batch: structures per batch, or a budget of atoms or edges. It changes the speed, not the figures.
        progress: show a progress bar where standard error is a terminal.
        require: labels of which at least one structure must carry each.
        name: of the potential, for tables and pictures.
        num_worst: how many of the worst structures are listed.

    Raises:
        ValueError: the set is empty, a required label is nowhere to be found, or the potential predicts NaN (the
            message names the first structure).
    """
    structures = list(structures)
    _check_labels(structures, require)
    if not isinstance(batch, BatchConfig):
        batch = BatchConfig(graphs=batch)
    accumulator = ErrorAccumulator()
    durations: list[tuple[float, int]] = []
    console = rich.console.Console(stderr=True)
    training = getattr(potential, "training", False)
    if isinstance(potential, torch.nn.Module):
        potential.eval()
    try:
        shown = track(
            structures,
            description=rich.markup.escape(f"evaluating {plain(name)}"),
            console=console,
            transient=True,
            disable=not (progress and console.is_terminal),
        )
        for chunk, graphs in _batches(iter(shown), potential.cutoff, batch):
            durations.append((_predict(potential, graphs, chunk, accumulator), len(chunk)))
    finally:
        if isinstance(potential, torch.nn.Module):
            potential.train(training)
    arrays = accumulator.arrays()
    _check_finite(arrays)
    counted = durations[1:] or durations  # the first batch pays for compilation and caches
    seconds = sum(seconds for seconds, _ in counted) / sum(number for _, number in counted)
    return ErrorReport(arrays, name, seconds, _batch_in_words(batch, potential), num_worst)


def _check_labels(structures: Sequence[Structure], require: Sequence[str]) -> None:
    if not structures:
        raise ValueError("no structures to evaluate: the set is empty")
    for label in require:
        if all(getattr(structure, label) is None for structure in structures):
            known = [other for other in ("energy", "forces", "stress") if getattr(structures[0], other) is not None]
            found = f"it has {' and '.join(known)}" if known else "it has no labels"
            raise ValueError(
                f"no structure of the set is labelled with {label} ({found}): name the key of the file that holds it"
            )


def _batches(
    structures: Iterator[Structure], cutoff: float, batch: BatchConfig
) -> Iterator[tuple[list[Structure], list[Graph]]]:
    """Consecutive structures within the budget that carry the same labels."""
    chunk: list[Structure] = []
    graphs: list[Graph] = []
    for structure in structures:
        graph = make_graph(structure, cutoff)
        joined = [*graphs, graph]
        full = (
            (batch.graphs is not None and len(joined) > batch.graphs)
            or (batch.max_atoms is not None and sum(g.num_atoms for g in joined) > batch.max_atoms)
            or (batch.max_edges is not None and sum(g.num_edges for g in joined) > batch.max_edges)
        )
        if graphs and (full or _labels(graph) != _labels(graphs[0])):
            yield chunk, graphs
            chunk, graphs = [], []
        chunk.append(structure)
        graphs.append(graph)
    if graphs:
        yield chunk, graphs


def _labels(graph: Graph) -> tuple[bool, bool, bool]:
    return graph.energy is not None, graph.forces is not None, graph.stress is not None


def _predict(
    potential: PotentialLike, graphs: list[Graph], chunk: list[Structure], accumulator: ErrorAccumulator
) -> float:
    """Predict one batch, add its errors, return the time of the prediction [s]."""
    graph = batch_graphs(graphs)
    if not graph.config_type or len(graph.config_type) != graph.num_systems:
        graph = replace(graph, config_type=tuple(structure.config_type for structure in chunk))
    first = next(iter(potential.parameters()), None) if isinstance(potential, torch.nn.Module) else None
    device = first.device if first is not None else torch.device("cpu")
    graph = graph.to(device)
    start = time.perf_counter()
    prediction = potential(graph, forces=True, stress=graph.stress is not None)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    accumulator.update(prediction, graph)
    return seconds


def _check_finite(arrays: ErrorArrays) -> None:
    bad_energy = ~np.isfinite(arrays.energy_error)
    bad_atoms = ~np.isfinite(arrays.force_error).all(axis=1)
    owners = arrays.structure_of_atom[bad_atoms]
    bad = np.union1d(np.flatnonzero(bad_energy), owners)
    if bad.size == 0:
        return
    index = int(bad[0])
    what = "the energy" if bad_energy[index] else "forces"
    where = ""
    if not bad_energy[index]:
        start = int(arrays.atom_counts[:index].sum())
        atom = int(np.flatnonzero(bad_atoms)[0])
        where = f" on atom {atom - start} ({chemical_symbols[arrays.numbers[atom]]})"
    label = f" (configuration type '{arrays.config_type[index]}')" if arrays.config_type[index] else ""
    raise ValueError(
        f"the error of {what}{where} is not a finite number for structure {index}{label}, "
        f"{bad.size} of {arrays.num_structures} structures in all: the model's weights or the labels hold NaN"
    )


def _batch_in_words(batch: BatchConfig, potential: PotentialLike) -> str:
    limits = [
        f"{limit} {noun}"
        for limit, noun in ((batch.graphs, "structures"), (batch.max_atoms, "atoms"), (batch.max_edges, "edges"))
        if limit is not None
    ]
    first = next(iter(potential.parameters()), None) if isinstance(potential, torch.nn.Module) else None
    device = first.device.type if first is not None else "cpu"
    dtype = str(getattr(potential, "dtype", first.dtype if first is not None else "")).removeprefix("torch.")
    threads = f", {_count(torch.get_num_threads(), 'thread')}" if device == "cpu" else ""
    return f"batches of up to {' and '.join(limits)}, {' '.join(filter(None, (dtype, device.upper())))}{threads}"
