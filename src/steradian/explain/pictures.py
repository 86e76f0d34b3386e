"""Pictures of attention: the molecule with its messages, the sphere around one atom, alpha against distance."""

from __future__ import annotations

import numpy as np
from ase.data import chemical_symbols, covalent_radii
from ase.data.colors import jmol_colors
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from steradian.evaluation.plots import COLORS, FAINT, INK
from steradian.explain.attention import AttentionResult, LayerAttention
from steradian.graph.structures import Structure

__all__ = ["central_atom", "distance_picture", "molecule_picture", "sphere_picture"]

BOND = 1.25  # two atoms are drawn as bonded within this multiple of the sum of their covalent radii


def central_atom(structure: Structure) -> int:
    """The atom with most bonds; the first of the heaviest among equals."""
    bonds = _bonds(structure)
    counts = np.bincount(bonds.reshape(-1), minlength=len(structure.numbers))
    return int(np.lexsort((-structure.numbers, -counts))[0])


def _bonds(structure: Structure) -> np.ndarray:
    radii = covalent_radii[structure.numbers]
    difference = structure.positions[:, None] - structure.positions
    near = np.linalg.norm(difference, axis=-1) < BOND * (radii[:, None] + radii)
    first, second = np.nonzero(np.triu(near, 1))
    return np.stack([first, second], 1)


def _plane(positions: np.ndarray) -> np.ndarray:
    """``[N, 2]`` projection on the plane in which the atoms spread most."""
    centred = positions - positions.mean(0)
    *_, axes = np.linalg.svd(centred, full_matrices=False)
    return centred @ axes[:2].T if len(axes) > 1 else np.pad(centred @ axes[:1].T, ((0, 0), (0, 1)))


def _range(alpha: np.ndarray) -> Normalize:
    """Colours that are neutral at alpha = 1 where the values lie on both sides of it."""
    low, high = alpha.min(), alpha.max()
    if low < 1 < high:
        return TwoSlopeNorm(1.0, low, high)
    return Normalize(low, high if high > low else low + 1e-6)


def molecule_picture(result: AttentionResult) -> Figure:
    """Every message as a line from sender to receiver, coloured by alpha, one panel per layer.

    The half of a line next to an atom is the message that this atom receives.
    """
    count = len(result.layers)
    figure = Figure(figsize=(5.4 * count, 4.6), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    points = _plane(result.structure.positions)
    for axes, entry in zip(panels, result.layers):
        norm = _range(entry.alpha)
        _messages(axes, result, entry, points, norm)
        _atoms(axes, result.structure, points)
        axes.set_title(f"layer {entry.layer + 1}", color=INK)
        axes.set_aspect("equal")
        axes.axis("off")
        figure.colorbar(ScalarMappable(norm, "coolwarm"), ax=axes, shrink=0.75, label="weight of the message, α")
    figure.supxlabel("the half of a line next to an atom is the message that it receives", color=FAINT, fontsize=9)
    return figure


def _messages(axes: Axes, result: AttentionResult, entry: LayerAttention, points: np.ndarray, norm: Normalize) -> None:
    start = points[result.receivers]
    middle = 0.5 * (start + points[result.senders])
    order = np.argsort(np.abs(entry.alpha - np.median(entry.alpha)))  # the telling ones on top
    lines = LineCollection(
        list(np.stack([start, middle], 1)[order]),
        array=entry.alpha[order],
        cmap="coolwarm",
        norm=norm,
        linewidths=1.8,
        zorder=1,
    )
    axes.add_collection(lines)


def _atoms(axes: Axes, structure: Structure, points: np.ndarray) -> None:
    for first, second in _bonds(structure):
        axes.plot(
            *points[[first, second]].T, color="#555555", linewidth=5, alpha=0.35, zorder=2, solid_capstyle="round"
        )
    sizes = 900 * covalent_radii[structure.numbers]
    axes.scatter(
        points[:, 0], points[:, 1], s=sizes, c=jmol_colors[structure.numbers], edgecolors=INK, linewidths=0.8, zorder=3
    )
    for index, (number, point) in enumerate(zip(structure.numbers, points)):
        dark = jmol_colors[number].mean() < 0.5
        text = f"{chemical_symbols[number]}{index}"
        axes.text(
            point[0], point[1], text, ha="center", va="center", fontsize=8, color="white" if dark else INK, zorder=4
        )
    axes.margins(0.12)


def sphere_picture(result: AttentionResult, atom: int) -> Figure:
    """How much each direction around one atom is attended to (mean over its neighbours), one map per layer."""
    if not 0 <= atom < len(result.structure.numbers):
        raise ValueError(f"there is no atom {atom}; the structure has atoms 0 to {len(result.structure.numbers) - 1}")
    mine = np.flatnonzero(result.receivers == atom)
    if not len(mine):
        raise ValueError(f"atom {atom} has no neighbours within the cutoff; choose another with --atom")
    count = len(result.layers)
    figure = Figure(figsize=(6.4 * count, 4.9), layout="constrained")
    symbol = chemical_symbols[result.structure.numbers[atom]]
    for panel, entry in enumerate(result.layers):
        axes = figure.add_subplot(1, count, panel + 1, projection="mollweide")
        colors = _sphere_map(axes, entry.points, entry.profile[mine].mean(0))
        directions = result.vectors[mine] / result.lengths[mine, None]
        longitude, latitude = _angles(directions)
        axes.scatter(longitude, latitude, s=46, c="white", edgecolors="black", linewidths=1.2, zorder=3)
        order = np.argsort(result.lengths[mine])
        for index in order[:8]:  # the nearest ones: more would overlap
            sender = result.senders[mine[index]]
            label = f"{chemical_symbols[result.structure.numbers[sender]]}{sender}"
            axes.annotate(
                label,
                (longitude[index], latitude[index]),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=8,
                zorder=4,
                path_effects=[withStroke(linewidth=2.0, foreground="white")],
            )
        axes.set_xticklabels([])
        axes.set_yticklabels([])
        axes.grid(alpha=0.3)
        axes.set_title(f"layer {entry.layer + 1}, around {symbol}{atom}", color=INK)
        figure.colorbar(
            colors, ax=axes, shrink=0.75, orientation="horizontal", label="attention received / equal share"
        )
    return figure


def _angles(directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.arctan2(directions[:, 1], directions[:, 0]), np.arcsin(np.clip(directions[:, 2], -1, 1))


def _sphere_map(axes: Axes, points: np.ndarray, values: np.ndarray) -> QuadMesh:
    """The value of the nearest grid point, everywhere on the sphere."""
    longitude = np.linspace(-np.pi, np.pi, 361)
    latitude = np.linspace(-np.pi / 2, np.pi / 2, 181)
    lon, lat = np.meshgrid(0.5 * (longitude[1:] + longitude[:-1]), 0.5 * (latitude[1:] + latitude[:-1]))
    directions = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], -1)
    nearest = np.argmax(directions @ points.T, axis=-1)
    # several points of an equiangular grid lie on a pole: they share its cell
    shared = np.array([values[(points @ point) > 1 - 1e-9].mean() for point in points])
    norm = TwoSlopeNorm(1.0, min(shared.min(), 0.999), max(shared.max(), 1.001))
    return axes.pcolormesh(longitude, latitude, shared[nearest], cmap="PuOr_r", norm=norm, rasterized=True)


def distance_picture(result: AttentionResult) -> Figure:
    """Alpha of every message against distance, coloured by the element that sends."""
    count = len(result.layers)
    figure = Figure(figsize=(4.6 * count, 3.6), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False, sharey=True)[0]
    elements = sorted(set(result.structure.numbers.tolist()))
    for axes, entry in zip(panels, result.layers):
        for index, number in enumerate(elements):
            sent = result.structure.numbers[result.senders] == number
            color = COLORS[index % len(COLORS)]
            axes.scatter(
                result.lengths[sent], entry.alpha[sent], s=22, alpha=0.75, color=color, label=chemical_symbols[number]
            )
        axes.axhline(1.0, color=FAINT, linewidth=0.8, linestyle="--")
        axes.set_xlabel("distance [Å]")
        axes.set_title(f"layer {entry.layer + 1}", color=INK)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("weight of the message, α")
    panels[-1].legend(title="sender", frameon=False)
    return figure
