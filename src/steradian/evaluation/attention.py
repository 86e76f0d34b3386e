"""What a model with MARA attends to: numbers, and pictures of the molecule, of a sphere, of alpha against distance.

A figure has one scale for all its panels, and every panel says in its title which range alpha has. Where alpha varies
by less than 1 % a sentence says so, and colours stay pale.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from torch import Tensor

from steradian.checkpoint import write_atomically
from steradian.evaluation.plots import COLORS, FAINT, INK
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure
from steradian.operators.base import EdgeGate
from steradian.potential import Potential

__all__ = [
    "AttentionResult",
    "LayerAttention",
    "attention_of",
    "central_atom",
    "distance_picture",
    "molecule_picture",
    "sphere_picture",
]

BOND = 1.25  # two atoms are drawn as bonded within this multiple of the sum of their covalent radii
ALIKE = 0.01  # messages whose alpha varies by less, relative to its mean, count as alike
MOST_MAXIMA = 3  # maxima of the attention on a sphere that are named
OUTLINE = (withStroke(linewidth=2.0, foreground="white"),)


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
    low, high = entry.alpha.min(), entry.alpha.max()
    digits = 2 if high - low > 0.05 else 3 if high - low > 0.005 else 4
    return f"layer {entry.layer + 1}: α from {low:.{digits}f} to {high:.{digits}f}"


def _alike(result: AttentionResult) -> list[str]:
    """The sentence about layers whose gate does next to nothing."""
    layers = [
        str(entry.layer + 1) for entry in result.layers if np.ptp(entry.alpha) < ALIKE * np.abs(entry.alpha).mean()
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

    The half of a line next to an atom is the message that this atom receives.
    """
    count = len(result.layers)
    figure = Figure(figsize=(5.4 * count, 4.9), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    flat, radii = _plane(result.structure.positions), 0.18 + 0.18 * covalent_radii[result.structure.numbers]
    points = _apart(flat, radii)
    norm = _alpha_scale(result)
    for axes, entry in zip(panels, result.layers):
        _messages(axes, result, entry, points, norm)
        _atoms(axes, result.structure, points, radii)
        axes.set_title(_range(entry), color=INK)
        axes.set_aspect("equal")
        axes.axis("off")
    figure.colorbar(ScalarMappable(norm, "coolwarm"), ax=list(panels), shrink=0.75, label="weight of the message, α")
    notes = ["the half of a line next to an atom is the message that it receives", *_alike(result)]
    if np.abs(points - flat).max() > 0.05:
        notes.append("atoms that would cover each other are moved apart")
    _tell(figure, notes)
    return figure


def _plane(positions: np.ndarray) -> np.ndarray:
    """``[N, 2]`` projection on the plane in which the atoms spread most."""
    centred = positions - positions.mean(0)
    *_, axes = np.linalg.svd(centred, full_matrices=False)
    return centred @ axes[:2].T if len(axes) > 1 else np.pad(centred @ axes[:1].T, ((0, 0), (0, 1)))


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


def _atoms(axes: Axes, structure: Structure, points: np.ndarray, radii: np.ndarray) -> None:
    for bond in _bonds(structure):
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
    """How much each direction around one atom is attended to (mean over its neighbours), one map per layer.

    Circles are neighbours, numbered stars the maxima; below the map stands which neighbour each maximum lies at.

    Raises:
        ValueError: there is no such atom, or it has no neighbours.
    """
    if not 0 <= atom < len(result.structure.numbers):
        raise ValueError(f"there is no atom {atom}; the structure has atoms 0 to {len(result.structure.numbers) - 1}")
    mine = np.flatnonzero(result.receivers == atom)
    if not len(mine):
        raise ValueError(f"atom {atom} has no neighbours within the cutoff; choose another with --atom")
    count = len(result.layers)
    figure = Figure(figsize=(6.4 * count, 5.0), layout="constrained")
    values = [_shared(entry.points, entry.profile[mine].mean(0)) for entry in result.layers]
    norm, panels = _around_one(values), []
    for panel, (entry, value) in enumerate(zip(result.layers, values)):
        axes = figure.add_subplot(1, count, panel + 1, projection="mollweide")
        colors = _sphere_map(axes, entry.points, value, norm)
        _neighbours(axes, result, mine)
        axes.set_xlabel(_maxima(axes, result, mine, entry.points, value), color=INK, fontsize=9)
        axes.set_xticklabels([])
        axes.set_yticklabels([])
        axes.grid(alpha=0.3)
        axes.set_title(
            f"layer {entry.layer + 1}, around {_name(result.structure, atom)}: {value.min():.3g} to {value.max():.3g}",
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
    for index in nearest:
        axes.annotate(
            _name(result.structure, result.senders[mine[index]]),
            (longitude[index], latitude[index]),
            xytext=(5, 5),
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
    """Alpha of every message against distance, coloured by the element that sends."""
    count = len(result.layers)
    figure = Figure(figsize=(4.6 * count, 3.8), layout="constrained")
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
        axes.set_title(_range(entry), color=INK)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("weight of the message, α")
    panels[-1].legend(title="sender", frameon=False)
    norm = _alpha_scale(result)
    low, high = float(norm.vmin or 0.0), float(norm.vmax or 1.0)
    panels[0].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    panels[0].ticklabel_format(axis="y", useOffset=False)
    _tell(figure, _alike(result))
    return figure


# ------------------------------------------------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class LayerAttention:
    """One gated layer.

    Attributes:
        layer: index of the host's layer.
        alpha: ``[E]`` weight of every message.
        profile: ``[E, K]`` attention that each grid direction receives, relative to equal attention (1 everywhere).
        points: ``[K, 3]`` grid directions.
    """

    layer: int
    alpha: np.ndarray
    profile: np.ndarray
    points: np.ndarray


@dataclass(frozen=True)
class AttentionResult:
    """Attention of a potential on one structure; edges run from receiver to sender as everywhere.

    Attributes:
        structure: what was looked at.
        senders, receivers: ``[E]``.
        vectors: ``[E, 3]`` [Å].
        layers: the gated layers.
    """

    structure: Structure
    senders: np.ndarray
    receivers: np.ndarray
    vectors: np.ndarray
    layers: tuple[LayerAttention, ...]

    @property
    def lengths(self) -> np.ndarray:
        """``[E]`` [Å]."""
        return np.linalg.norm(self.vectors, axis=1)

    def save(self, path: Path) -> None:
        """Write all numbers to an npz file."""
        arrays: dict[str, Any] = {
            "numbers": self.structure.numbers,
            "positions": self.structure.positions,
            "senders": self.senders,
            "receivers": self.receivers,
            "vectors": self.vectors,
        }
        for entry in self.layers:
            arrays[f"alpha_{entry.layer}"] = entry.alpha
            arrays[f"profile_{entry.layer}"] = entry.profile
            arrays[f"points_{entry.layer}"] = entry.points
        stream = io.BytesIO()
        np.savez_compressed(stream, **arrays)
        write_atomically(path, stream.getvalue())


def attention_of(potential: Potential, structure: Structure) -> AttentionResult:
    """Alpha of every message and the attention on the sphere, layer by layer.

    Raises:
        ValueError: the model has no attention, or the structure has no two atoms within the cutoff.
    """
    layers_of_host: Any = potential.host.get_submodule("layers")
    gates: list[EdgeGate | None] = [layer.gate for layer in layers_of_host.children()]
    gated = {index: gate for index, gate in enumerate(gates) if gate is not None and gate.grid is not None}
    if not gated:
        raise ValueError("the model has no attention to show; train one with --set model.edge_gate.kind=mara")
    graph = make_graph(structure, potential.cutoff)
    if graph.num_edges == 0:
        raise ValueError(f"no two atoms are within the cutoff of {potential.cutoff} Å, so there are no messages")
    seen: dict[int, tuple[Any, Any]] = {}
    handles = [
        gate.register_forward_pre_hook(lambda module, given, index=index: seen.__setitem__(index, given))
        for index, gate in gated.items()
    ]
    try:
        potential.eval()(graph, forces=False)
    finally:
        for handle in handles:
            handle.remove()
    layers = []
    vectors = np.zeros((0, 3))
    for index, gate in gated.items():
        features, edges = seen[index]
        maps = gate.attention_maps(features.detach(), edges)
        equal_share = _numbers(maps.grid.weights) / (4 * np.pi)
        profile = _numbers(maps.profile) / equal_share
        layers.append(LayerAttention(index, _numbers(maps.alpha), profile, _numbers(maps.grid.points)))
        vectors = _numbers(edges.vectors)
    return AttentionResult(structure, graph.senders.numpy(), graph.receivers.numpy(), vectors, tuple(layers))


def _numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()
