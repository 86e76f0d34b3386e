"""Figures of merit of a potential: one definition, used by the training log, the monitor, the tables and the reports.

Every figure is one of five statistics of the absolute errors of one quantity, taken over a whole set of structures:

=====  ===================================================================================
mae    mean absolute error
rmse   root of the mean squared error
q95    95th percentile of the absolute errors (linear interpolation, as ``numpy.quantile``)
q99    99th percentile
max    largest absolute error
=====  ===================================================================================

The quantities, and the names of the figures (a configuration writes ``validation/NAME``):

=====================  ==========  =============================================  =================================
quantity               unit        what is counted                                names
=====================  ==========  =============================================  =================================
energy                 eV          one value per structure                        ``energy_mae`` ... ``energy_max``
energy per atom        eV          the same divided by the number of atoms        ``energy_per_atom_mae`` ...
force component        eV/Å        3 N values                                     ``forces_mae``, ``forces_rmse``,
                                                                                  ``forces_component_q95`` (q99, max)
force vector           eV/Å        N norms of the error vector                    ``forces_vector_mae`` (rmse),
                                                                                  ``forces_q95``, ``forces_q99``,
                                                                                  ``forces_max``
stress                 eV/Å^3      9 components per structure with a known cell   ``stress_mae`` ...
=====================  ==========  =============================================  =================================

So the mean errors are those of papers (per component) and the tails are those of atoms (vector norm), unless the name
says otherwise. Errors are kept, not averaged batch by batch, and sorted before they are summed: no figure depends on
how the structures were put into batches, in which order they came, or on how many processes saw them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from steradian.graph import Graph, Prediction

__all__ = [
    "METRICS",
    "STATISTICS",
    "ErrorAccumulator",
    "ErrorArrays",
    "ErrorSample",
    "bootstrap_counts",
    "bootstrap_intervals",
    "error_statistics",
    "figures",
    "force_error_statistics",
]

STATISTICS = ("mae", "rmse", "q95", "q99", "max")
QUANTITIES = ("energy", "energy_per_atom", "forces_component", "forces_vector", "stress")
UNITS = {
    "energy": "eV",
    "energy_per_atom": "eV/atom",
    "forces_component": "eV/Å",
    "forces_vector": "eV/Å",
    "stress": "eV/Å^3",
}
Array = NDArray[np.float64]
PER_ATOM = {"numbers", "force_error", "force_reference"}
SHAPES = {"force_error": (3,), "force_reference": (3,), "stress_error": (3, 3)}
KINDS = {"config_type": "U", "atom_counts": "iu", "numbers": "iu"}
KINDS |= dict.fromkeys(("has_energy", "has_forces", "has_stress"), "b")
"""Arrays with one row per atom (the others: per structure), and shapes of rows that are not numbers,
and kinds of values that are not floating-point numbers (letters of numpy)."""


def metric_name(quantity: str, statistic: str) -> str:
    """Name of a figure: the mean errors of components and the tails of vector norms are plain ``forces_...``."""
    short = {"forces_component": ("mae", "rmse"), "forces_vector": ("q95", "q99", "max")}
    if statistic in short.get(quantity, ()):
        return f"forces_{statistic}"
    return f"{quantity}_{statistic}"


METRICS: dict[str, str] = {
    metric_name(quantity, statistic): UNITS[quantity] for quantity in QUANTITIES for statistic in STATISTICS
}
"""Name of every figure -> its unit."""


class ErrorSample:
    """Absolute errors of one quantity, sorted, each with the structure it belongs to.

    Args:
        errors: ``[M]`` errors (signed or absolute).
        structure: ``[M]`` index of the structure of each error, below ``num_structures``.
        num_structures: number of structures, the unit that the bootstrap draws.
    """

    def __init__(self, errors: ArrayLike, structure: ArrayLike, num_structures: int) -> None:
        values = np.abs(np.asarray(errors, dtype=np.float64))
        order = np.argsort(values, kind="stable")  # NaN goes last, so the maximum shows it
        self.values: Array = values[order]
        self.structure: NDArray[np.int64] = np.asarray(structure, dtype=np.int64)[order]
        self.num_structures = num_structures

    def statistics(self, counts: NDArray[np.int64] | None = None) -> dict[str, float]:
        """The five statistics, each structure taken ``counts[s]`` times (once where None); NaN for an empty set."""
        if counts is None:
            return _statistics_of_sorted(self.values)
        cumulated = np.cumsum(counts[self.structure])
        total = int(cumulated[-1]) if cumulated.size else 0
        if total == 0:
            return dict.fromkeys(STATISTICS, float("nan"))
        weights = counts[self.structure]
        return {
            "mae": float(weights @ self.values / total),
            "rmse": float(np.sqrt(weights @ self.values**2 / total)),
            "q95": self._quantile(cumulated, total, 0.95),
            "q99": self._quantile(cumulated, total, 0.99),
            "max": float(self.values[np.searchsorted(cumulated, total - 1, side="right")]),
        }

    def _quantile(self, cumulated: NDArray[np.int64], total: int, probability: float) -> float:
        """``numpy.quantile`` of the values repeated by their counts, without repeating them."""
        position = (total - 1) * probability
        lower = int(position)
        low, high = self.values[np.searchsorted(cumulated, [lower, min(lower + 1, total - 1)], side="right")]
        return float(low + (high - low) * (position - lower))


def _statistics_of_sorted(values: Array) -> dict[str, float]:
    if values.size == 0:
        return dict.fromkeys(STATISTICS, float("nan"))
    q95, q99 = np.quantile(values, [0.95, 0.99])
    return {
        "mae": float(values.mean()),
        "rmse": float(np.sqrt(np.mean(values**2))),
        "q95": float(q95),
        "q99": float(q99),
        "max": float(values[-1]),
    }


def error_statistics(errors: ArrayLike) -> dict[str, float]:
    """MAE, RMSE, Q95, Q99 and MAX of the absolute values of any array of errors; NaN for an empty one."""
    return _statistics_of_sorted(np.sort(np.abs(np.asarray(errors, dtype=np.float64)), axis=None))


def force_error_statistics(error_vectors: Any) -> dict[str, float]:
    """All figures of the forces.

    Args:
        error_vectors: ``[N, 3]`` predicted minus reference forces [eV/Å]; array or tensor.

    Returns:
        The ten ``forces_...`` figures [eV/Å] under the names of the module's table.

    Raises:
        ValueError: the shape is not ``[N, 3]``.
    """
    vectors = _float64(error_vectors)
    if vectors.ndim != 2 or vectors.shape[1] != 3:
        raise ValueError(f"error vectors of forces have shape [N, 3], not {list(vectors.shape)}")
    components = error_statistics(vectors)
    norms = error_statistics(np.linalg.norm(vectors, axis=1))
    return {
        metric_name(quantity, statistic): value
        for quantity, found in (("forces_component", components), ("forces_vector", norms))
        for statistic, value in found.items()
    }


@dataclass(frozen=True)
class ErrorArrays:
    """Errors (predicted minus reference) of a set of structures; S structures, N atoms of all of them.

    Attributes:
        config_type: ``[S]`` label of each structure.
        atom_counts: ``[S]`` number of atoms.
        numbers: ``[N]`` atomic numbers; atoms of a structure stand together, in order.
        has_energy, has_forces, has_stress: ``[S]`` whether the structure carries that label; errors without are 0.
        energy_error, energy_reference: ``[S]`` [eV].
        force_error, force_reference: ``[N, 3]`` [eV/Å].
        stress_error: ``[S, 3, 3]`` [eV/Å^3].
    """

    config_type: NDArray[np.str_]
    atom_counts: NDArray[np.int64]
    numbers: NDArray[np.int64]
    has_energy: NDArray[np.bool_]
    has_forces: NDArray[np.bool_]
    has_stress: NDArray[np.bool_]
    energy_error: Array
    energy_reference: Array
    force_error: Array
    force_reference: Array
    stress_error: Array

    def check(self) -> None:
        """Refuse arrays that do not belong together.

        Raises:
            ValueError: names the first.
        """
        num_structures = len(self.atom_counts)
        if self.atom_counts.dtype.kind not in KINDS["atom_counts"] or (self.atom_counts < 0).any():
            raise ValueError("atom_counts are no counts")
        num_atoms = int(self.atom_counts.sum())
        for name, values in vars(self).items():
            rows = num_atoms if name in PER_ATOM else num_structures
            shape = (rows, *SHAPES.get(name, ()))
            if values.shape != shape:
                raise ValueError(f"{name} has shape {list(values.shape)}, not {list(shape)}")
            kind = KINDS.get(name, "f")
            if values.dtype.kind not in kind or (kind == "f" and not np.isfinite(values).all()):
                raise ValueError(f"{name} holds other values than it should")
        if ((self.numbers < 1) | (self.numbers > 118)).any():
            raise ValueError("numbers are no atomic numbers")

    @property
    def num_structures(self) -> int:
        return len(self.atom_counts)

    @property
    def structure_of_atom(self) -> NDArray[np.int64]:
        """``[N]`` index of the structure of each atom."""
        return np.repeat(np.arange(self.num_structures), self.atom_counts)

    def select(self, order: ArrayLike) -> ErrorArrays:
        """The structures with these indices (or this mask), in this order."""
        indices = np.arange(self.num_structures)[np.asarray(order)]
        starts = np.cumsum(self.atom_counts) - self.atom_counts
        pieces = [np.arange(starts[i], starts[i] + self.atom_counts[i]) for i in indices]
        atoms = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
        return ErrorArrays(
            **{name: values[atoms if name in PER_ATOM else indices] for name, values in vars(self).items()}
        )

    def sample(self, quantity: str, atoms: NDArray[np.bool_] | None = None) -> ErrorSample:
        """Errors of one quantity of :data:`METRICS`' table; ``atoms`` ``[N]`` restricts those of the forces."""
        structures = np.arange(self.num_structures)
        if quantity in ("energy", "energy_per_atom"):
            errors, known = self.energy_error, self.has_energy
            if quantity == "energy_per_atom":
                errors = errors / self.atom_counts
            return ErrorSample(errors[known], structures[known], self.num_structures)
        if quantity == "stress":
            known = self.has_stress
            return ErrorSample(
                self.stress_error[known].reshape(-1), np.repeat(structures[known], 9), self.num_structures
            )
        owner = self.structure_of_atom
        chosen = self.has_forces[owner] if atoms is None else self.has_forces[owner] & atoms
        vectors, owner = self.force_error[chosen], owner[chosen]
        if quantity == "forces_component":
            return ErrorSample(vectors.reshape(-1), np.repeat(owner, 3), self.num_structures)
        if quantity == "forces_vector":
            return ErrorSample(np.linalg.norm(vectors, axis=1), owner, self.num_structures)
        raise ValueError(f"unknown quantity '{quantity}' (known: {', '.join(QUANTITIES)})")

    def samples(self, atoms: NDArray[np.bool_] | None = None) -> dict[str, ErrorSample]:
        """Samples of every quantity that is labelled somewhere."""
        found = {quantity: self.sample(quantity, atoms) for quantity in QUANTITIES}
        return {quantity: sample for quantity, sample in found.items() if sample.values.size}


def figures(arrays: ErrorArrays, atoms: NDArray[np.bool_] | None = None) -> dict[str, float]:
    """Every figure that the labels allow, by name; ``atoms`` ``[N]`` restricts those of the forces."""
    return {
        metric_name(quantity, statistic): value
        for quantity, sample in arrays.samples(atoms).items()
        for statistic, value in sample.statistics().items()
    }


class ErrorAccumulator:
    """Collects errors batch by batch; figures do not depend on the batches, their order or the number of processes.

    With several processes, gather ``state()`` of each (``torch.distributed.all_gather_object``) and join them with
    ``ErrorAccumulator.from_states``.
    """

    def __init__(self) -> None:
        self._chunks: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return sum(len(chunk["atom_counts"]) for chunk in self._chunks)

    def reset(self) -> None:
        """Forget everything, for instance at the start of an epoch."""
        self._chunks.clear()

    def update(self, prediction: Prediction, graph: Graph) -> None:
        """Add the errors of one batch; labels that the graph lacks, and a stress not predicted, are left out.

        Raises:
            ValueError: the graph has force labels and the prediction holds no forces.
        """
        num_systems, num_atoms = graph.num_systems, graph.num_atoms
        if graph.forces is not None and prediction.forces is None:
            raise ValueError("the batch has force labels but the prediction holds no forces: call with forces=True")
        chunk: dict[str, NDArray[Any]] = {
            "config_type": np.array(graph.config_type or [""] * num_systems, dtype=np.str_),
            "atom_counts": graph.atoms_per_system.detach().cpu().numpy().astype(np.int64),
            "numbers": graph.numbers.detach().cpu().numpy().astype(np.int64),
        }
        labels = (
            ("energy", "energy", (num_systems,)),
            ("forces", "force", (num_atoms, 3)),
            ("stress", "stress", (num_systems, 3, 3)),
        )
        for name, stem, shape in labels:
            label, predicted = getattr(graph, name), getattr(prediction, name)
            known = label is not None and predicted is not None
            reference = _float64(label) if known else np.zeros(shape)
            chunk[f"has_{name}"] = np.full(num_systems, known)
            chunk[f"{stem}_error"] = _float64(predicted) - reference if known else np.zeros(shape)
            if name != "stress":
                chunk[f"{stem}_reference"] = reference
        self._chunks.append(chunk)

    def add(
        self,
        prediction: Prediction,
        labels: Mapping[str, Any],
        atom_counts: NDArray[np.int64],
        config_type: Sequence[str] = (),
    ) -> None:
        """Add the errors of a padded batch on any device, which is not waited for: they are read when asked for.

        Args:
            prediction: ghosts may stand behind the real atoms and systems.
            labels: tensors ``energy``, ``forces``, ``stress`` where they are known, and ``numbers``.
            atom_counts: ``[S]`` atoms of every real system, on the host.
            config_type: one label per system.
        """
        num_systems, num_atoms = len(atom_counts), int(atom_counts.sum())
        chunk: dict[str, Any] = {
            "config_type": np.array(config_type or [""] * num_systems, dtype=np.str_),
            "atom_counts": atom_counts,
            "numbers": labels["numbers"][:num_atoms].clone(),
        }
        for name, stem, shape in (
            ("energy", "energy", (num_systems,)),
            ("forces", "force", (num_atoms, 3)),
            ("stress", "stress", (num_systems, 3, 3)),
        ):
            label, predicted = labels.get(name), getattr(prediction, name)
            known = label is not None and predicted is not None
            chunk[f"has_{name}"] = np.full(num_systems, known)
            reference: Any = np.zeros(shape)
            chunk[f"{stem}_error"] = reference
            if label is not None and predicted is not None:
                reference = label[: shape[0]].detach().double().clone()
                chunk[f"{stem}_error"] = predicted[: shape[0]].detach().double() - reference
            if name != "stress":
                chunk[f"{stem}_reference"] = reference
        self._chunks.append(chunk)

    def merge(self, other: ErrorAccumulator) -> None:
        """Take over everything that another accumulator has collected."""
        self._chunks.extend(other._chunks)

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything collected as plain arrays, to be sent between processes or saved."""
        return dict(vars(self.arrays())) if self._chunks else {}

    @classmethod
    def from_states(cls, states: Iterable[Mapping[str, NDArray[Any]]]) -> ErrorAccumulator:
        """Join the states of several processes; processes that saw nothing are skipped."""
        joined = cls()
        joined._chunks.extend(dict(state) for state in states if state)
        return joined

    def arrays(self) -> ErrorArrays:
        """The errors collected so far.

        Raises:
            ValueError: nothing has been collected.
        """
        if not self._chunks:
            raise ValueError("no structures have been evaluated: the set is empty")
        self._chunks = [{name: _on_host(value) for name, value in chunk.items()} for chunk in self._chunks]
        return ErrorArrays(
            **{name: np.concatenate([chunk[name] for chunk in self._chunks]) for name in self._chunks[0]}
        )

    def compute(self, prefix: str = "") -> dict[str, float]:
        """Every figure that the labels allow; ``prefix="validation/"`` gives the names of configurations."""
        return {prefix + name: value for name, value in figures(self.arrays()).items()}


def bootstrap_counts(num_structures: int, num_samples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield ``num_samples`` times how often each structure is drawn, ``[S]``, drawing S with replacement."""
    generator = np.random.default_rng(seed)
    for _ in range(num_samples):
        drawn = generator.integers(0, num_structures, size=num_structures)
        yield np.bincount(drawn, minlength=num_structures).astype(np.int64)


def bootstrap_intervals(
    samples: Mapping[str, ErrorSample], *, num_samples: int = 500, seed: int = 0, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals of every figure, structures being drawn with replacement (Efron 1979).

    Structures, not atoms, are drawn, because the errors of the atoms of one structure hang together. The interval of a
    maximum never reaches beyond the largest error seen; it only tells how much of it hangs on single structures.

    Args:
        samples: quantity -> sample, as from :meth:`ErrorArrays.samples`.
        num_samples: number of draws. seed: of the draws, the same seed gives the same intervals.
        level: share of the draws inside the interval.

    Returns:
        Name of the figure -> (lower, upper).
    """
    if not samples:
        return {}
    draws: dict[str, list[float]] = {}
    num_structures = next(iter(samples.values())).num_structures
    for counts in bootstrap_counts(num_structures, num_samples, seed):
        for quantity, sample in samples.items():
            for statistic, value in sample.statistics(counts).items():
                draws.setdefault(metric_name(quantity, statistic), []).append(value)
    tail = (1 - level) / 2
    return {name: interval(values, tail) for name, values in draws.items()}


def interval(draws: Sequence[float], tail: float = 0.025) -> tuple[float, float]:
    """Percentiles ``tail`` and ``1 - tail`` of the draws; draws without a labelled structure are left out."""
    finite = np.asarray(draws)[np.isfinite(draws)]
    if finite.size == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [tail, 1 - tail])
    return float(low), float(high)


def _on_host(values: Any) -> NDArray[Any]:
    found: NDArray[Any] = values.cpu().numpy() if hasattr(values, "cpu") else values
    return found


def _float64(values: Any) -> Array:
    """Array or tensor (any device) as a float64 array."""
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)
