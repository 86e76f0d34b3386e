"""Several potentials compared on the same structures, and one HTML file about them: pictures inside, no network."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from steradian.checkpoint import package_version, write_atomically
from steradian.evaluation import plots
from steradian.evaluation.errors import SHOWN, ErrorReport
from steradian.evaluation.metrics import METRICS, ErrorSample, bootstrap_counts, interval, metric_name
from steradian.evaluation.rotations import RotationAudit
from steradian.evaluation.tables import Table, format_number, format_percent

__all__ = [
    "Comparison",
    "Difference",
    "Evaluated",
    "FIGURES",
    "compare",
    "render_report",
    "write_report",
]

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
html { font-size: 16px; }
body { font: 1rem/1.5 -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif;
  color: #1c1c1c; background: #fff; max-width: 62rem; margin: 2.5rem auto 4rem; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; padding-top: .9rem; border-top: 1px solid #d9d9d9; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p { max-width: 44rem; margin: .5rem 0; }
.meta { max-width: none; color: #666; font-size: .9rem; margin-bottom: 1.2rem; }
.swatch { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .45em; }
figure { margin: 1.2rem 0; }
figcaption { font-weight: 600; margin-bottom: .4rem; }
figure.picture figcaption { font-weight: 400; color: #444; font-size: .9rem; margin: .4rem 0 0; max-width: 44rem; }
figure.picture img { max-width: 100%; height: auto; display: block; }
figure.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; line-height: 1.35; }
th, td { padding: .28rem .9rem .28rem 0; text-align: left; vertical-align: baseline; }
th.n, td.n { text-align: right; padding: .28rem 0 .28rem .9rem; white-space: nowrap; }
thead th { border-bottom: 1px solid #444; font-weight: 600; vertical-align: bottom; }
thead th.n { white-space: normal; max-width: 8.5em; }
td:first-child { white-space: nowrap; }
tr.head td { font-weight: 600; padding-top: .7rem; }
tbody tr:last-child td { border-bottom: 1px solid #bbb; }
tr.faint td { color: #777; font-size: .8rem; }
.note { color: #666; font-size: .82rem; max-width: 48rem; margin: .4rem 0 0; }
pre { font: .8rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; background: #f6f6f4;
  padding: .8rem 1rem; overflow-x: auto; border-radius: 4px; white-space: pre-wrap; }
details summary { cursor: pointer; color: #333; }
@page { size: A4; margin: 16mm 14mm; }
@media print {
  html { font-size: 12.5px; }
  body { font-size: 1rem; margin: 0; padding: 0; max-width: none; }
  h2, h3 { break-after: avoid; }
  figure { break-inside: avoid; }
  figure.picture img { max-height: 225mm; object-fit: contain; object-position: left; }
  th.n, td.n { padding-left: .55rem; }
  pre { font-size: .72rem; background: none; border: 1px solid #ccc; }
}
"""
PAGE_WIDTH = 9.0  # [inch] of the pictures' own scale


@dataclass(frozen=True)
class Evaluated:
    """Everything a report may say about one potential.

    Attributes:
        report: its errors.
        audit: its rotation audit, or None.
        metrics: its training log as :func:`steradian.evaluation.plots.read_metrics` gives it; empty where unknown.
        settings: facts for the table of settings, such as the number of parameters.
        config: its configuration as YAML; empty where unknown.
    """

    report: ErrorReport
    audit: RotationAudit | None = None
    metrics: plots.Metrics = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    config: str = ""


def write_report(path: Path | str, models: Sequence[Evaluated], **kwargs: str) -> None:
    """Write :func:`render_report` to a file, whole or not at all."""
    write_atomically(path, render_report(models, **kwargs).encode())


def render_report(models: Sequence[Evaluated], *, title: str = "", data: str = "") -> str:
    """The page as HTML text.

    Args:
        models: one or several potentials evaluated on the same structures; the first is the one compared with.
        title: heading. data: what the structures are, in words.

    Raises:
        ValueError: no models, or models evaluated on different structures.
    """
    if not models:
        raise ValueError("a report needs at least one model")
    reports = [model.report for model in models]
    names = " and ".join(filter(None, [", ".join(r.name for r in reports[:-1]), reports[-1].name]))
    title = title or f"Errors of {names}"
    arrays = reports[0].arrays
    facts = [data, f"{arrays.num_structures} structures, {len(arrays.numbers)} atoms", f"steradian {package_version()}"]
    facts.append(datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"))
    sections = [
        _section("Result", _result(reports)),
        _section("Force errors", _force_pictures(reports)),
        _section("Parity", _parity(reports)),
        _section("Rotation audit", _rotations(models)),
        _section("Training", _training(models)),
        _section("Details", _details(reports)),
        _section("Settings", _settings(models)),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>\n'
        f'<h1>{html.escape(title)}</h1><p class="meta">{html.escape(" · ".join(filter(None, facts)))}</p>\n'
        f"{''.join(sections)}</body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n{content}\n</section>\n" if content else ""


def _picture(figure: Figure, caption: str) -> str:
    """The figure as an image inside the page; the caption is also its alternative text."""
    encoded = base64.b64encode(plots.png(figure)).decode()
    width = min(
        100, round(100 * figure.get_figwidth() / PAGE_WIDTH)
    )  # one scale: letters are as large in every picture
    text = html.escape(caption)
    return (
        f'<figure class="picture"><img alt="{text}" style="width:{width}%" src="data:image/png;base64,{encoded}">'
        f"<figcaption>{text}</figcaption></figure>\n"
    )


def _name(index: int, name: str) -> str:
    return f'<span class="swatch" style="background:{plots.color_of(index)}"></span>{html.escape(name)}'


def _result(reports: Sequence[ErrorReport]) -> str:
    if len(reports) == 1:
        return reports[0].total_table().html()
    comparison = compare(*reports)
    lines = "".join(f"<p>{html.escape(line).replace(' %', '&nbsp;%')}</p>" for line in comparison.summary())
    return lines + comparison.table().html()


def _force_pictures(reports: Sequence[ErrorReport]) -> str:
    if not all(report.arrays.has_forces.any() for report in reports):
        return ""
    pictures = [
        _picture(
            plots.cumulative_errors(reports),
            "Share of atoms whose force error exceeds a value. Dots: Q95 and Q99; cross: largest error.",
        ),
        _picture(plots.violins(reports), "Distribution of the force errors (logarithmic axis)."),
        _picture(plots.element_bars(reports), "Force errors by element."),
    ]
    return "".join(pictures)


def _parity(reports: Sequence[ErrorReport]) -> str:
    caption = (
        "Predicted against reference values. Energies are per atom, relative to a fit of one energy per element to the "
        "reference energies. Darker: more points."
    )
    return _picture(plots.parity(reports), caption)


def _rotations(models: Sequence[Evaluated]) -> str:
    parts = []
    for index, model in enumerate(models):
        if model.audit is not None:
            parts.append(f"<h3>{_name(index, model.report.name)}</h3><p>{html.escape(model.audit.summary())}</p>")
            parts.append(model.audit.table().html())
    return "".join(parts)


def _training(models: Sequence[Evaluated]) -> str:
    if not any(model.metrics for model in models):
        return ""
    logs = {model.report.name: model.metrics for model in models}
    return _picture(plots.learning_curves(logs), "Errors on the validation set during training.")


def _details(reports: Sequence[ErrorReport]) -> str:
    parts = []
    for index, report in enumerate(reports):
        tables = report.tables() if len(reports) > 1 else report.tables()[1:]
        parts.append(f"<h3>{_name(index, report.name)}</h3>" if len(reports) > 1 else "")
        parts.extend(table.html() for table in tables)
    return "".join(parts)


def _settings(models: Sequence[Evaluated]) -> str:
    keys = list(dict.fromkeys(key for model in models for key in model.settings))
    rows = [[key, *[model.settings.get(key, "–") for model in models]] for key in keys]
    timings = [model.report.seconds_per_structure for model in models]
    rows.append(["time per structure", *[f"{format_number(1e3 * seconds)} ms" for seconds in timings]])
    rows.append(["predicted in", *[model.report.batch or "–" for model in models]])
    columns = ["", *[model.report.name for model in models]]
    parts = [Table("Models", columns, rows, num_labels=len(columns)).html()]
    for index, model in enumerate(models):
        if model.config:
            summary = f"Configuration of {_name(index, model.report.name)}"
            parts.append(f"<details open><summary>{summary}</summary><pre>{html.escape(model.config)}</pre></details>")
    return "".join(parts)


# ---------------------------------------------------------------------------------------------------------- comparison


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
