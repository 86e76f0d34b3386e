"""Pictures of errors: parity, violins, cumulative errors, bars per element, learning curves.

Every function returns a :class:`matplotlib.figure.Figure` that belongs to nobody else (no pyplot, no global state);
:func:`png` and :func:`save` draw it with Agg. Colours are those of Okabe and Ito (2008), which colour-blind readers
tell apart; a model keeps its colour, by its place in the list, in every picture.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from steradian.checkpoint import write_atomically
from steradian.evaluation.errors import ErrorReport
from steradian.evaluation.metrics import METRICS
from steradian.evaluation.tables import format_number, plain

__all__ = [
    "COLORS",
    "cumulative_errors",
    "element_bars",
    "learning_curves",
    "parity",
    "png",
    "read_metrics",
    "save",
    "violins",
]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK = "#222222"
FAINT = "#8a8a8a"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#5a5a5a",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "text.color": INK,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
SMALLEST = 1e-9  # [eV/Å] errors below are drawn there on logarithmic axes
VIOLIN_POINTS = 4000
MARKS = {"median": ("o", 5.0), "Q95": ("|", 13.0), "Q99": ("d", 5.5), "MAX": ("x", 5.5)}
DENSE = 3000  # points above which a scatter becomes a density


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw with the package's style, leaving matplotlib's settings as they were."""

    @wraps(draw)
    def wrapped(*args: Any, **kwargs: Any) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapped


def png(figure: Figure, dpi: int = 160) -> bytes:
    """The figure as a PNG file."""
    content = io.BytesIO()
    with mpl.rc_context(STYLE):
        FigureCanvasAgg(figure)
        figure.savefig(content, format="png", dpi=dpi)
    return content.getvalue()


def save(figure: Figure, path: Path | str, dpi: int = 160) -> None:
    """Write the figure; the suffix (``.png``, ``.pdf``, ``.svg``) chooses the format. Whole or not at all."""
    content = io.BytesIO()
    with mpl.rc_context(STYLE):
        FigureCanvasAgg(figure)
        figure.savefig(content, format=Path(path).suffix.lstrip(".") or "png", dpi=dpi)
    write_atomically(path, content.getvalue())


def color_of(index: int) -> str:
    """Colour of the model at this place."""
    return COLORS[index % len(COLORS)]


def shown_name(name: str) -> str:
    """The name of a model in a picture, where dollars would be formulas."""
    return plain(name).replace("$", r"\$")


# --------------------------------------------------------------------------------------------------------------- parity


@styled
def parity(reports: Sequence[ErrorReport]) -> Figure:
    """Predicted against reference energies and force components, one row per model.

    Energies are per atom and relative to a fit of one energy per element to the reference energies, so that sets of
    several compositions can be read; for one composition this takes off the mean.
    """
    figure = Figure(figsize=(7.2, 3.4 * len(reports)), layout="constrained")
    axes = figure.subplots(len(reports), 2, squeeze=False)
    for row, report in enumerate(reports):
        arrays, color = report.arrays, color_of(row)
        known = arrays.has_energy
        reference, error = _relative_energies(report)
        _parity_panel(axes[row, 0], reference[known], (reference + error)[known], color, "relative energy", "meV/atom")
        labelled = arrays.has_forces[arrays.structure_of_atom]
        forces = 1e3 * arrays.force_reference[labelled].ravel()
        errors = 1e3 * arrays.force_error[labelled].ravel()
        _parity_panel(axes[row, 1], forces / 1e3, (forces + errors) / 1e3, color, "force component", "eV/Å")
        axes[row, 0].set_title(shown_name(report.name), fontweight="bold")
    return figure


def _relative_energies(report: ErrorReport) -> tuple[np.ndarray, np.ndarray]:
    """Reference energies per atom minus a fit of element energies, and errors per atom ``[S]`` [meV/atom]."""
    arrays = report.arrays
    elements = np.unique(arrays.numbers)
    counts = np.zeros((arrays.num_structures, len(elements)))
    np.add.at(counts, (arrays.structure_of_atom, np.searchsorted(elements, arrays.numbers)), 1)
    known = arrays.has_energy
    if not known.any():
        return np.zeros(arrays.num_structures), np.zeros(arrays.num_structures)
    fit, *_ = np.linalg.lstsq(counts[known], arrays.energy_reference[known], rcond=None)
    scale = 1e3 / np.maximum(arrays.atom_counts, 1)
    return (arrays.energy_reference - counts @ fit) * scale, arrays.energy_error * scale


def _parity_panel(axes: Axes, x: np.ndarray, y: np.ndarray, color: str, what: str, unit: str) -> None:
    axes.set_xlabel(f"reference {what} [{unit}]")
    axes.set_ylabel(f"predicted {what} [{unit}]")
    if x.size == 0:
        axes.text(0.5, 0.5, "no labels", transform=axes.transAxes, ha="center", color=FAINT)
        return
    low, high = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
    margin = 0.04 * (high - low) or 1.0
    limits = (low - margin, high + margin)
    axes.plot(limits, limits, color=FAINT, linewidth=0.8, zorder=1)
    if x.size > DENSE:
        shades = LinearSegmentedColormap.from_list("density", [_lighter(color, 0.75), color, _darker(color, 0.45)])
        axes.hexbin(x, y, gridsize=90, extent=(*limits, *limits), cmap=shades, norm=LogNorm(), mincnt=1, linewidths=0.1)
    else:
        axes.scatter(x, y, s=9, color=color, alpha=0.55, linewidths=0, zorder=2, rasterized=True)
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    ticks = [tick for tick in MaxNLocator(5).tick_values(*limits) if limits[0] <= tick <= limits[1]]
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    error = 1e3 * (y - x) if unit.startswith("eV") else y - x
    shown = f"MAE {format_number(np.abs(error).mean())} m{unit.removeprefix('m')}"
    rmse = f"RMSE {format_number(float(np.sqrt((error**2).mean())))}"
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    axes.text(0.04, 0.96, f"{shown}\n{rmse}", transform=axes.transAxes, va="top", linespacing=1.5, bbox=paper)


def _lighter(color: str, share: float) -> str:
    rgb = np.array(mpl.colors.to_rgb(color))
    return mpl.colors.to_hex((rgb + (1 - rgb) * share).tolist())


def _darker(color: str, share: float) -> str:
    return mpl.colors.to_hex((np.array(mpl.colors.to_rgb(color)) * (1 - share)).tolist())


# ------------------------------------------------------------------------------------------------------- distributions


def _force_norms(report: ErrorReport) -> np.ndarray:
    """Sorted norms of the force errors [meV/Å]."""
    return 1e3 * np.maximum(report.arrays.sample("forces_vector").values, SMALLEST)


def _log_axis(axes: Axes, which: str) -> None:
    """Plain numbers (10, 100) instead of powers, also between the decades where there are few of them."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = sorted(axes.get_xlim() if which == "x" else axes.get_ylim())
    decades = np.log10(high / max(low, 1e-30))
    between = (1.0,) if decades > 3 else ((1.0, 3.0) if decades > 1.5 else (1.0, 2.0, 5.0))
    axis.set_major_locator(LogLocator(base=10, subs=between, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value, 1)))
    axis.set_minor_formatter(NullFormatter())


@styled
def violins(reports: Sequence[ErrorReport]) -> Figure:
    """Distribution of the norms of the force errors of every model, with Q95, Q99 and MAX marked."""
    figure = Figure(figsize=(7.2, 1.2 + 0.85 * len(reports)), layout="constrained")
    axes = figure.subplots()
    places = list(range(len(reports), 0, -1))
    for index, (place, report) in enumerate(zip(places, reports)):
        norms = _force_norms(report)
        if norms.size == 0:
            continue
        color = color_of(index)
        spread = norms[np.linspace(0, norms.size - 1, min(norms.size, VIOLIN_POINTS)).astype(int)]
        if np.ptp(spread) > 0:
            drawn = axes.violinplot(np.log10(spread), [place], orientation="horizontal", widths=0.8, showextrema=False)
            for body in drawn["bodies"]:  # type: ignore[union-attr,attr-defined]
                body.set(facecolor=color, alpha=0.35, edgecolor=color, linewidth=1)
        for (marker, size), value in zip(MARKS.values(), (*np.quantile(norms, [0.5, 0.95, 0.99]), norms[-1])):
            axes.plot(np.log10(value), place, marker, color=_darker(color, 0.25), ms=size, mew=1.6)
    _decade_ticks(axes)
    axes.set_yticks(places, [shown_name(report.name) for report in reports])
    axes.set_ylim(0.45, len(reports) + 0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("norm of the force error of an atom [meV/Å]")
    grey = [
        mpl.lines.Line2D([], [], color="#444444", ls="", marker=marker, ms=6, mew=1.5) for marker, _ in MARKS.values()
    ]
    labels = list(MARKS)
    figure.legend(grey, labels, loc="outside upper right", ncols=4, handletextpad=0.3, columnspacing=1.4)
    return figure


def _decade_ticks(axes: Axes) -> None:
    """Ticks at plain numbers on an axis that holds logarithms."""
    low, high = axes.get_xlim()
    steps = (1,) if high - low > 3.5 else ((1, 3) if high - low > 1.6 else (1, 2, 5))
    values = [s * 10.0**d for d in range(int(np.floor(low)), int(np.ceil(high)) + 1) for s in steps]
    shown = [value for value in values if low <= np.log10(value) <= high]
    axes.set_xticks([float(np.log10(value)) for value in shown], [format_number(value, 1) for value in shown])


@styled
def cumulative_errors(reports: Sequence[ErrorReport]) -> Figure:
    """Share of atoms whose force error exceeds a value, on logarithmic axes, with Q95 and Q99 marked."""
    figure = Figure(figsize=(7.2, 3.9), layout="constrained")
    axes = figure.subplots()
    smallest, edges = 1.0, []
    for index, report in enumerate(reports):
        norms = _force_norms(report)
        if norms.size == 0:
            continue
        share = 1 - np.arange(norms.size) / norms.size
        smallest = min(smallest, 1 / norms.size)
        edges.append((norms[int(0.02 * norms.size)], norms[-1]))
        keep = _thinned(norms.size)
        axes.plot(norms[keep], share[keep], color=color_of(index), label=shown_name(report.name))
        quantiles = np.quantile(norms, [0.95, 0.99])
        axes.plot(quantiles, [0.05, 0.01], "o", color=color_of(index), ms=5, mec="white", mew=0.8, zorder=4)
        axes.plot(norms[-1], share[-1], "x", color=color_of(index), ms=5.5, mew=1.6, zorder=4)
    axes.set(xscale="log", yscale="log", ylim=(smallest / 1.6, 1.3))
    if edges:
        axes.set_xlim(min(low for low, _ in edges), max(high for _, high in edges) * 1.25)
    axes.grid(False, axis="y")
    for level, label in ((0.05, "Q95"), (0.01, "Q99")):
        axes.axhline(level, color="#c8c8c8", linewidth=0.8, zorder=1)
        axes.annotate(
            label, (0, level), (4, 3), xycoords=("axes fraction", "data"), textcoords="offset points", color="#666666"
        )
    _log_axis(axes, "x")
    axes.yaxis.set_major_locator(LogLocator(base=10, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{format_number(100 * value, 1)} %"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("norm of the force error of an atom [meV/Å]")
    axes.set_ylabel("share of atoms with a larger error")
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 0.0))
    return figure


def _thinned(count: int, points: int = 1500) -> np.ndarray:
    """Indices evenly spaced from the front and, in logarithms, from the end, where the tail is."""
    tail = count - 1 - np.unique(np.geomspace(1, count, min(points, count)).astype(int) - 1)
    return np.unique(np.concatenate([np.linspace(0, count - 1, min(points, count)).astype(int), tail]))


# ------------------------------------------------------------------------------------------------------- bars and lines


@styled
def element_bars(reports: Sequence[ErrorReport]) -> Figure:
    """Mean (bar) and Q95 (line above it) of the norm of the force error per element and model."""
    elements = list(dict.fromkeys(symbol for report in reports for symbol in report.per_element))
    figure = Figure(figsize=(min(9.0, max(4.8, 1.4 + 0.34 * len(elements) * (1 + len(reports)))), 3.3))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    width = min(0.4, 0.8 / max(len(reports), 1))
    handles: list[Any] = []
    for index, report in enumerate(reports):
        places = np.arange(len(elements)) + (index - (len(reports) - 1) / 2) * width
        found = [report.per_element.get(symbol, {}) for symbol in elements]
        mean = np.array([1e3 * values.get("forces_vector_mae", np.nan) for values in found])
        q95 = np.array([1e3 * values.get("forces_q95", np.nan) for values in found])
        handles.append(axes.bar(places, mean, width * 0.88, color=color_of(index), label=shown_name(report.name)))
        half = 0.44 * width
        axes.vlines(places, mean, q95, color=color_of(index), linewidth=0.9)
        axes.hlines(q95, places - half, places + half, color=color_of(index), linewidth=2.2)
    axes.set_xticks(range(len(elements)), elements)
    axes.set_xlim(-0.6, len(elements) - 0.4)
    axes.tick_params(axis="x", length=0)
    axes.grid(False, axis="x")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("norm of the force error [meV/Å]")
    axes.set_title("bar: mean, line: Q95", fontsize=8.5, color="#555555")
    figure.legend(handles=handles, loc="outside upper left", ncols=3, handlelength=1.2, columnspacing=1.6)
    return figure


Metrics = Mapping[str, tuple[np.ndarray, np.ndarray]]


def read_metrics(path: Path | str, over: str = "epoch") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read a training log: name of a metric -> (x, value), rows without that metric left out.

    Args:
        path: ``metrics.csv`` of a run; cells may be empty.
        over: column of x; where the file has none of that name, rows are counted.

    Raises:
        ValueError: the file cannot be read or holds no numbers.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    found: dict[str, list[tuple[float, float]]] = {}
    for index, row in enumerate(rows):
        x = _number(row.get(over))
        for name, cell in row.items():
            value = _number(cell) if name and name != over else None
            if value is not None:
                found.setdefault(name, []).append((float(index) if x is None else x, value))
    if not found:
        raise ValueError(f"{path}: holds no metrics")
    return {name: (np.array([x for x, _ in pairs]), np.array([y for _, y in pairs])) for name, pairs in found.items()}


def _number(cell: str | None) -> float | None:
    try:
        return float(cell) if cell not in (None, "") else None
    except (TypeError, ValueError):
        return None


CURVES = (
    ("validation/forces_mae", "force MAE [meV/Å]"),
    ("validation/forces_q99", "force Q99 [meV/Å]"),
    ("validation/energy_per_atom_mae", "energy MAE [meV/atom]"),
)


@styled
def learning_curves(logs: Mapping[str, Metrics], over: str = "epoch") -> Figure:
    """Validation errors during training, one panel per figure and one line per model.

    Args:
        logs: name of a model -> what :func:`read_metrics` gave, in the order of the other pictures (a model without a
            log keeps its place with an empty mapping).
        over: what the x axis counts.
    """
    panels = [(name, label) for name, label in CURVES if any(name in metrics for metrics in logs.values())]
    if not panels:  # another program's log: whatever it validates
        names = sorted({name for metrics in logs.values() for name in metrics if "loss" in name or "val" in name})
        panels = [(name, name) for name in names[:3]]
    figure = Figure(figsize=(2.6 * max(len(panels), 2) + 0.2, 3.0), layout="constrained")
    axes = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
    for panel, (name, label) in zip(axes, panels):
        factor = 1e3 if METRICS.get(name.partition("/")[2], "").startswith("eV") else 1.0
        for index, (model, metrics) in enumerate(logs.items()):
            if name in metrics:
                x, y = metrics[name]
                few = {"marker": "o", "ms": 3} if len(x) < 15 else {}
                panel.plot(x, factor * y, color=color_of(index), label=shown_name(model), linewidth=1.3, **few)
        panel.set(yscale="log", title=label, xlabel=over)
        _log_axis(panel, "y")
    handles, names = axes[0].get_legend_handles_labels()
    if len(logs) > 1:
        figure.legend(handles, names, loc="outside upper left", ncols=4)
    return figure
