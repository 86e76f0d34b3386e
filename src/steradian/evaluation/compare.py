"""Several potentials on the same structures: one table with relative differences and what chance could have done.

The table is that of the MARA paper (tables 1 and 2): energy MAE, force MAE, and Q95, Q99 and MAX of the norm of the
force error, each with its relative difference to the first potential.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from steradian.evaluation.errors import SHOWN, ErrorReport
from steradian.evaluation.metrics import METRICS, ErrorSample, bootstrap_counts, interval, metric_name
from steradian.evaluation.tables import Table, format_number, format_percent

__all__ = ["FIGURES", "Comparison", "Difference", "compare"]

FIGURES = {
    "energy_mae": ("energy", "mae", "E MAE"),
    "forces_mae": ("forces_component", "mae", "F MAE"),
    "forces_q95": ("forces_vector", "q95", "F Q95"),
    "forces_q99": ("forces_vector", "q99", "F Q99"),
    "forces_max": ("forces_vector", "max", "F MAX"),
}
"""Compared figures: name -> quantity, statistic, head in the table."""


@dataclass(frozen=True)
class Difference:
    """How one figure of a potential differs from that of the first.

    Attributes:
        relative: (value - first) / first; negative is better.
        low, high: 95 % interval of ``relative`` from the paired bootstrap over structures.
        significant: whether the interval leaves out zero; None for the maximum, of which a bootstrap says nothing.
    """

    relative: float
    low: float
    high: float
    significant: bool | None


@dataclass(frozen=True)
class Comparison:
    """Result of :func:`compare`; ``differences[k][figure]`` belongs to ``reports[k + 1]``."""

    reports: tuple[ErrorReport, ...]
    differences: tuple[dict[str, Difference], ...]
    num_samples: int
    seed: int

    @property
    def figures(self) -> list[str]:
        """The compared figures that the labels allow."""
        return [name for name in FIGURES if all(name in report.total for report in self.reports)]

    def table(self) -> Table:
        """Figures in meV, meV/Å and kcal/mol, with the relative differences and their intervals."""
        rows: list[list[str]] = []
        heads: set[int] = set()
        faint: set[int] = set()
        for index, report in enumerate(self.reports):
            heads.add(len(rows))
            rows.append([report.name, *[""] * len(self.figures)])
            for place, unit in enumerate(("meV(/Å)", "kcal/mol(/Å)")):
                factors = [SHOWN[METRICS[name]][place][1] for name in self.figures]
                cells = [format_number(report.total[name] * factor) for name, factor in zip(self.figures, factors)]
                rows.append([f"  {unit}", *cells])
            if index == 0:
                continue
            found = [self.differences[index - 1][name] for name in self.figures]
            marked = [format_percent(each.relative) + (" *" if each.significant else "") for each in found]
            rows.append(["  difference", *marked])
            faint.add(len(rows))
            rows.append(["  95 % interval", *[_interval_cell(each) for each in found]])
        count = self.reports[0].arrays.num_structures
        title = f"Errors on {count} structure{'s' if count != 1 else ''}, and differences to {self.reports[0].name}"
        note = (
            "* the 95 % interval of the paired bootstrap over structures leaves out zero; frames of one trajectory are "
            "not independent, so true intervals are wider. MAE of energies per structure and of force "
            "components; Q95, Q99 and MAX of the norm of the error vector of an atom."
        )
        columns = ["", *[FIGURES[name][2] for name in self.figures]]
        return Table(title, columns, rows, heads=frozenset(heads), faint=frozenset(faint), note=note)

    def summary(self) -> list[str]:
        """One sentence per potential after the first: what is better, what is worse, what cannot be told."""
        first = self.reports[0].name
        lines = []
        for report, found in zip(self.reports[1:], self.differences):
            parts = []
            for name in self.figures:
                difference = found[name]
                if difference.significant:
                    parts.append(f"{FIGURES[name][2]} {format_percent(difference.relative)}")
            told = ", ".join(parts) if parts else "no difference beyond chance"
            lines.append(f"{report.name} against {first}: {told}.")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "bootstrap": {"samples": self.num_samples, "seed": self.seed, "level": 0.95, "paired": True},
            "models": [report.to_dict() for report in self.reports],
            "differences": [
                {"name": report.name, "against": self.reports[0].name, **{k: _plain(d) for k, d in found.items()}}
                for report, found in zip(self.reports[1:], self.differences)
            ],
        }


def _plain(difference: Difference) -> dict[str, float | bool | None]:
    return {
        name: value if isinstance(value, bool) or value is None or np.isfinite(value) else None
        for name, value in vars(difference).items()
    }


def _interval_cell(difference: Difference) -> str:
    if difference.significant is None:
        return ""
    return f"{format_percent(difference.low).removesuffix(' %')} … {format_percent(difference.high)}"


def compare(*reports: ErrorReport, num_samples: int = 1000, seed: int = 0) -> Comparison:
    """Compare potentials with the first one.

    The bootstrap is paired: every draw takes the same structures for all potentials, so what all find hard cancels.

    Args:
        reports: two or more, of the same structures in the same order.
        num_samples: draws of the bootstrap. seed: of the draws.

    Raises:
        ValueError: fewer than two reports, or reports of different structures.
    """
    if len(reports) < 2:
        raise ValueError("a comparison needs at least two models")
    first = reports[0].arrays
    for report in reports[1:]:
        _check_same(reports[0], report)
    wanted = {metric_name(quantity, statistic): quantity for quantity, statistic, _ in FIGURES.values()}
    quantities = sorted(set(wanted.values()))
    samples = [{quantity: report.arrays.sample(quantity) for quantity in quantities} for report in reports]
    draws: list[dict[str, list[float]]] = [{name: [] for name in FIGURES} for _ in reports[1:]]
    for counts in bootstrap_counts(first.num_structures, num_samples, seed):
        drawn = [_figures(found, counts) for found in samples]
        for values, target in zip(drawn[1:], draws):
            for name, value in values.items():
                target[name].append(_relative(value, drawn[0][name]))
    plain = [_figures(found, None) for found in samples]
    differences = tuple(
        {name: _difference(name, _relative(values[name], plain[0][name]), target[name]) for name in FIGURES}
        for values, target in zip(plain[1:], draws)
    )
    return Comparison(tuple(reports), differences, num_samples, seed)


def _figures(samples: dict[str, ErrorSample], counts: np.ndarray | None) -> dict[str, float]:
    found = {quantity: sample.statistics(counts) for quantity, sample in samples.items()}
    return {name: found[quantity][statistic] for name, (quantity, statistic, _) in FIGURES.items()}


def _relative(value: float, first: float) -> float:
    if first == value:
        return 0.0
    return (value - first) / first if first > 0 else float("nan")


def _difference(name: str, relative: float, draws: list[float]) -> Difference:
    low, high = interval(draws)
    significant = None if name == "forces_max" else bool(low > 0 or high < 0)
    return Difference(relative, low, high, significant)


def _check_same(first: ErrorReport, other: ErrorReport) -> None:
    a, b = first.arrays, other.arrays
    same = (
        np.array_equal(a.atom_counts, b.atom_counts)
        and np.array_equal(a.numbers, b.numbers)
        and np.array_equal(a.has_energy, b.has_energy)
        and np.array_equal(a.has_forces, b.has_forces)
        and np.allclose(a.energy_reference, b.energy_reference, rtol=0, atol=1e-6)
        and np.allclose(a.force_reference, b.force_reference, rtol=0, atol=1e-6)
    )
    if not same:
        raise ValueError(
            f"{first.name} and {other.name} were evaluated on different structures or labels: evaluate both on one file"
        )
