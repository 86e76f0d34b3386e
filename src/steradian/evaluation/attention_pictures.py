"""Pictures of what a model with MARA attends to: the molecule, a sphere, alpha against distance.

A figure has one scale for all its panels, and every panel says in its title which range alpha has. Where alpha varies
by less than 1 % a sentence says so, and colours stay pale. A gate per channel is shown as its mean over the channels,
and its spread over them has a row of panels of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase.data import chemical_symbols, covalent_radii
from ase.data.colors import jmol_colors
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.patheffects import withStroke

from steradian.evaluation.attention import AttentionResult, LayerAttention, bonds_of
from steradian.evaluation.plots import COLORS, FAINT, INK
from steradian.graph.structures import Structure

__all__ = ["distance_picture", "molecule_picture", "sphere_picture"]

ALIKE = 0.01  # messages whose alpha varies by less, relative to its mean, count as alike
VIEWS = 200  # directions that a molecule is looked at from, to find the one where fewest atoms cover each other
MOST_MAXIMA = 3  # maxima of the attention on a sphere that are named
OUTLINE = (withStroke(linewidth=2.0, foreground="white"),)


def _name(structure: Structure, atom: int) -> str:
    return f"{chemical_symbols[structure.numbers[atom]]}{atom}"


def _around_one(values: Sequence[np.ndarray]) -> Normalize:
    """One scale for all panels, neutral at 1 and at least as wide as what counts as alike."""
    reach = max(ALIKE, *(float(np.abs(value - 1).max()) for value in values))
    return Normalize(1 - reach, 1 + reach)


def _alpha_scale(result: AttentionResult) -> Normalize:
    """Neutral at alpha = 1 where the values lie on both sides of it."""
    values = [entry.alpha for entry in result.layers]
    low, high = min(value.min() for value in values), max(value.max() for value in values)
    if low < 1 < high or high - low < ALIKE * high:
        return _around_one(values)
    return Normalize(low, high)


def _range(entry: LayerAttention) -> str:
    layer = f"layer {entry.layer + 1}:"
    if entry.channels.shape[1] == 1:
        return f"{layer} α from {_from_to(entry.alpha)}"
    return f"{layer} mean α from {_from_to(entry.alpha)}\nsingle channels from {_from_to(entry.channels)}"


def _from_to(values: np.ndarray) -> str:
    low, high = values.min(), values.max()
    digits = 2 if high - low > 0.05 else 3 if high - low > 0.005 else 4
    return " to ".join(f"{round(float(value), digits) + 0.0:.{digits}f}" for value in (low, high)).replace("-", "−")


def _alike(result: AttentionResult) -> list[str]:
    """The sentence about layers whose gate does next to nothing."""
    layers = [
        str(entry.layer + 1)
        for entry in result.layers
        if (np.ptp(entry.channels, axis=0) < ALIKE * np.abs(entry.channels).mean(0)).all()
    ]
    if not layers:
        return []
    where = "" if len(layers) == len(result.layers) else f" in layer {', '.join(layers)}"
    return [f"α varies by less than 1 %{where}: the gate weighs all messages alike"]


def _tell(figure: Figure, sentences: list[str]) -> None:
    if sentences:
        figure.supxlabel("\n".join(sentences), color=FAINT, fontsize=9)


# ------------------------------------------------------------------------------------------------------- the molecule


def molecule_picture(result: AttentionResult) -> Figure:
    """Every message as a line from sender to receiver, coloured by alpha, one panel per layer.

    The half of a line next to an atom is the message that this atom receives. Where alpha is per channel, lines have
    the colour of its mean, and a second row shows its spread (standard deviation) over the channels.
    """
    count, rows = len(result.layers), 1 + result.per_channel
    figure = Figure(figsize=(5.4 * count, 4.9 * rows), layout="constrained")
    panels = figure.subplots(rows, count, squeeze=False)
    radii = 0.18 + 0.18 * covalent_radii[result.structure.numbers]
    flat = _view(result.structure.positions, radii)
    points = _apart(flat, radii)
    norm = _alpha_scale(result)
    for axes, entry in zip(panels[0], result.layers):
        _molecule(axes, result, points, radii, entry.alpha, norm, "coolwarm")
        axes.set_title(_range(entry), color=INK)
    label = "weight of the message, α" + (", mean over channels" if result.per_channel else "")
    figure.colorbar(ScalarMappable(norm, "coolwarm"), ax=list(panels[0]), shrink=0.75, label=label)
    if result.per_channel:
        spreads = [entry.spread for entry in result.layers]
        norm = Normalize(0.0, max(ALIKE, *(float(spread.max()) for spread in spreads)))
        for axes, entry in zip(panels[1], result.layers):
            _molecule(axes, result, points, radii, entry.spread, norm, "viridis_r")
            axes.set_title(f"layer {entry.layer + 1}: spread over channels\nfrom {_from_to(entry.spread)}", color=INK)
        mappable = ScalarMappable(norm, "viridis_r")
        figure.colorbar(mappable, ax=list(panels[1]), shrink=0.75, label="standard deviation of α over channels")
    notes = ["the half of a line next to an atom is the message that it receives", *_alike(result)]
    if np.abs(points - flat).max(initial=0.0) > 0.05:
        notes.append("atoms that would cover each other are moved apart")
    _tell(figure, notes)
    return figure


def _molecule(
    axes: Axes,
    result: AttentionResult,
    points: np.ndarray,
    radii: np.ndarray,
    values: np.ndarray,
    norm: Normalize,
    colors: str,
) -> None:
    start = points[result.receivers]
    middle = 0.5 * (start + points[result.senders])
    order = np.argsort(np.abs(values - np.median(values)))  # the telling ones on top
    lines = LineCollection(
        list(np.stack([start, middle], 1)[order]), array=values[order], cmap=colors, norm=norm, linewidths=1.8, zorder=1
    )
    axes.add_collection(lines)
    _atoms(axes, result.structure, points, radii)
    axes.set_aspect("equal")
    axes.axis("off")


def _view(positions: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """``[N, 2]`` projection on the plane in which the atoms spread most, or the one where they cover each other least.

    The view is left for another one only where that is clearly better.
    """
    centred = positions - positions.mean(0)
    *_, axes = np.linalg.svd(centred, full_matrices=True)
    best = centred @ axes[:2].T
    least = _covered(best, radii)
    turns = np.pi * (3 - 5**0.5) * np.arange(VIEWS)
    heights = (np.arange(VIEWS) + 0.5) / VIEWS  # a view from behind shows the same
    flat = np.sqrt(1 - heights**2)
    for normal in np.stack([flat * np.cos(turns), flat * np.sin(turns), heights], 1) @ axes:
        *_, plane = np.linalg.svd(centred - np.outer(centred @ normal, normal), full_matrices=True)
        seen = centred @ plane[:2].T
        covered = _covered(seen, radii)
        if covered < 0.8 * least - 1e-3:
            best, least = seen, covered
    return best


def _covered(points: np.ndarray, radii: np.ndarray) -> float:
    """How deep discs lie in each other: sum over pairs, relative to their radii."""
    first, second = np.triu_indices(len(points), 1)
    touching = radii[first] + radii[second]
    distance = np.linalg.norm(points[second] - points[first], axis=1)
    return float((np.clip(touching - distance, 0, None) / touching).sum())


def _apart(points: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """``[N, 2]`` with discs of these radii pushed away from each other until none covers another."""
    points = points.copy()
    first, second = np.triu_indices(len(points), 1)
    # which way two atoms go that lie exactly behind each other
    turn = 2.4 * first
    aside = np.stack([np.cos(turn), np.sin(turn)], 1)
    for _ in range(500):
        difference = points[second] - points[first]
        distance = np.linalg.norm(difference, axis=1)
        missing = 1.05 * (radii[first] + radii[second]) - distance
        if (missing < 1e-3).all():
            break
        way = np.where(distance[:, None] > 1e-6, difference / np.maximum(distance, 1e-6)[:, None], aside)
        push = 0.25 * np.clip(missing, 0, None)[:, None] * way
        np.add.at(points, first, -push)
        np.add.at(points, second, push)
    return points


def _atoms(axes: Axes, structure: Structure, points: np.ndarray, radii: np.ndarray) -> None:
    for bond in bonds_of(structure):
        axes.plot(*points[bond].T, color="#555555", linewidth=5, alpha=0.35, zorder=2, solid_capstyle="round")
    for atom, (number, point, radius) in enumerate(zip(structure.numbers, points, radii)):
        color = jmol_colors[number]
        axes.add_patch(Circle(tuple(point), radius, facecolor=color, edgecolor=INK, linewidth=0.8, zorder=3))
        ink = "white" if color.mean() < 0.5 else INK
        axes.text(point[0], point[1], _name(structure, atom), ha="center", va="center", fontsize=8, color=ink, zorder=4)
    axes.autoscale_view()
    axes.margins(0.05)


# --------------------------------------------------------------------------------------------------------- the sphere


def sphere_picture(result: AttentionResult, atom: int) -> Figure:
    """How much each direction around one atom is attended to (mean over its neighbours), one map per layer on a sphere.

    Circles are neighbours, numbered stars the maxima; below the map stands which neighbour each maximum lies at.

    Raises:
        ValueError: no gate attends on a sphere, there is no such atom, or it has no neighbours.
    """
    layers = [
        (entry, entry.profile, entry.points)
        for entry in result.layers
        if entry.profile is not None and entry.points is not None
    ]
    if not layers:
        raise ValueError("the gates of this model attend on no sphere, so there are no directions to show")
    if not 0 <= atom < len(result.structure.numbers):
        raise ValueError(f"there is no atom {atom}; the structure has atoms 0 to {len(result.structure.numbers) - 1}")
    mine = np.flatnonzero(result.receivers == atom)
    if not len(mine):
        raise ValueError(f"atom {atom} has no neighbours within the cutoff; choose another with --atom")
    count = len(layers)
    figure = Figure(figsize=(6.4 * count, 5.0), layout="constrained")
    values = [_shared(points, profile[mine].mean(0)) for _, profile, points in layers]
    norm, panels = _around_one(values), []
    for panel, ((entry, _, points), value) in enumerate(zip(layers, values)):
        axes = figure.add_subplot(1, count, panel + 1, projection="mollweide")
        colors = _sphere_map(axes, points, value, norm)
        _neighbours(axes, result, mine)
        axes.set_xlabel(_maxima(axes, result, mine, points, value), color=INK, fontsize=9)
        axes.set_xticklabels([])
        axes.set_yticklabels([])
        axes.grid(alpha=0.3)
        axes.set_title(
            f"layer {entry.layer + 1}, around {_name(result.structure, atom)}: {value.min():.3g} to {value.max():.3g}\n"
            f"{'mean ' if entry.channels.shape[1] > 1 else ''}α of its messages from {_from_to(entry.alpha[mine])}",
            color=INK,
        )
        panels.append(axes)
    label = "attention received / equal share"
    bar = figure.colorbar(colors, ax=panels, shrink=0.6, orientation="horizontal", label=label, pad=0.04)
    bar.ax.set_xlim(left=max(0.0, float(norm.vmin or 0.0)))  # a share is never negative
    _tell(figure, _alike(result))
    return figure


def _angles(directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.arctan2(directions[:, 1], directions[:, 0]), np.arcsin(np.clip(directions[:, 2], -1, 1))


def _shared(points: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Several points of an equiangular grid lie on a pole: they share its cell."""
    return np.array([values[(points @ point) > 1 - 1e-9].mean() for point in points])


def _sphere_map(axes: Axes, points: np.ndarray, values: np.ndarray, norm: Normalize) -> QuadMesh:
    """The value of the nearest grid point, everywhere on the sphere."""
    longitude = np.linspace(-np.pi, np.pi, 361)
    latitude = np.linspace(-np.pi / 2, np.pi / 2, 181)
    lon, lat = np.meshgrid(0.5 * (longitude[1:] + longitude[:-1]), 0.5 * (latitude[1:] + latitude[:-1]))
    directions = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], -1)
    nearest = np.argmax(directions @ points.T, axis=-1)
    return axes.pcolormesh(longitude, latitude, values[nearest], cmap="PuOr_r", norm=norm, rasterized=True)


def _neighbours(axes: Axes, result: AttentionResult, mine: np.ndarray) -> None:
    longitude, latitude = _angles(result.vectors[mine] / result.lengths[mine, None])
    axes.scatter(longitude, latitude, s=46, c="white", edgecolors="black", linewidths=1.2, zorder=3)
    nearest = np.argsort(result.lengths[mine])[:8]  # more would overlap
    before, below = None, False
    for index in nearest[np.argsort(longitude[nearest])]:
        close = before is not None and longitude[index] - longitude[before] < 0.3
        below = bool(close and abs(latitude[index] - latitude[before]) < 0.2 and not below)  # names side by side
        before = index
        axes.annotate(
            _name(result.structure, result.senders[mine[index]]),
            (longitude[index], latitude[index]),
            xytext=(5, -13 if below else 5),
            textcoords="offset points",
            fontsize=8,
            zorder=4,
            path_effects=OUTLINE,
        )


def _maxima(axes: Axes, result: AttentionResult, mine: np.ndarray, points: np.ndarray, values: np.ndarray) -> str:
    """Stars at the largest local maxima, and a line that says which neighbour each of them lies at."""
    if np.ptp(values) < ALIKE:
        return "all directions are attended to alike, within 1 %"
    cosines = np.clip(points @ points.T, -1, 1)
    closest = np.where(cosines > 1 - 1e-9, -1, cosines).max(1)
    # the neighbours of a point: those not much further than its nearest one
    around = np.arccos(cosines) < 1.6 * np.arccos(closest)[:, None]
    tops = [k for k in np.argsort(-values) if values[k] > 1 and values[k] >= values[around[k]].max() - 1e-12]
    kept: list[int] = []
    for k in tops:
        if all(cosines[k, other] < 1 - 1e-9 for other in kept):  # one star for the points of a pole
            kept.append(int(k))
    kept = kept[:MOST_MAXIMA]
    directions = result.vectors[mine] / result.lengths[mine, None]
    said = []
    for number, k in enumerate(kept, 1):
        longitude, latitude = _angles(points[k : k + 1])
        axes.scatter(
            longitude,
            latitude,
            s=150,
            marker="*",
            c="gold",
            edgecolors="black",
            linewidths=0.8,
            zorder=5,
            clip_on=False,
        )
        axes.annotate(
            str(number), (longitude[0], latitude[0]), xytext=(-11, -11), textcoords="offset points", fontsize=9,
            fontweight="bold", zorder=6, path_effects=OUTLINE,
        )  # fmt: skip
        toward = directions @ points[k]
        best = int(np.argmax(toward))
        angle = np.degrees(np.arccos(np.clip(toward[best], -1, 1)))
        name = _name(result.structure, result.senders[mine[best]])
        said.append(f"★{number} {values[k]:.3g}, {angle:.0f}° from {name}")
    return "; ".join(said)


# --------------------------------------------------------------------------------------------------------- distances


def distance_picture(result: AttentionResult) -> Figure:
    """Alpha of every message against distance, coloured by the element that sends.

    Where alpha is per channel, points are its mean, bars reach one standard deviation over the channels to either side,
    and a second row has the spread itself.
    """
    count, rows = len(result.layers), 1 + result.per_channel
    figure = Figure(figsize=(4.6 * count, 3.8 * rows), layout="constrained")
    panels = figure.subplots(rows, count, squeeze=False, sharey="row")
    for axes, entry in zip(panels[0], result.layers):
        _scatter(axes, result, entry.alpha, entry.spread if result.per_channel else None)
        axes.axhline(1.0, color=FAINT, linewidth=0.8, linestyle="--")
        axes.set_title(_range(entry), color=INK)
    norm = _alpha_scale(result)
    low, high = float(norm.vmin or 0.0), float(norm.vmax or 1.0)
    if result.per_channel:
        low = min(low, *(float((entry.alpha - entry.spread).min()) for entry in result.layers))
        high = max(high, *(float((entry.alpha + entry.spread).max()) for entry in result.layers))
        for axes, entry in zip(panels[1], result.layers):
            _scatter(axes, result, entry.spread)
            axes.set_title(f"layer {entry.layer + 1}: spread over channels\nfrom {_from_to(entry.spread)}", color=INK)
        top = max(ALIKE, *(float(entry.spread.max()) for entry in result.layers))
        panels[1, 0].set_ylim(0.0, 1.05 * top)
        panels[1, 0].set_ylabel("standard deviation of α\nover channels")
    panels[0, 0].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    panels[0, 0].set_ylabel("weight of the message, α" + ("\n(mean over channels)" if result.per_channel else ""))
    panels[0, 0].ticklabel_format(axis="y", useOffset=False)
    for axes in panels[-1]:
        axes.set_xlabel("distance [Å]")
    panels[0, -1].legend(title="sender", frameon=False)
    _tell(figure, _alike(result))
    return figure


def _scatter(axes: Axes, result: AttentionResult, values: np.ndarray, bars: np.ndarray | None = None) -> None:
    elements = sorted(set(result.structure.numbers.tolist()))
    for index, number in enumerate(elements):
        sent = result.structure.numbers[result.senders] == number
        color, lengths = COLORS[index % len(COLORS)], result.lengths[sent]
        if bars is not None:
            low, high = values[sent] - bars[sent], values[sent] + bars[sent]
            axes.vlines(lengths, low, high, color=color, alpha=0.25, linewidth=1.5)
        axes.scatter(lengths, values[sent], s=22, alpha=0.75, color=color, label=chemical_symbols[number])
    axes.spines[["top", "right"]].set_visible(False)
