"""What a trajectory says: drift, radial distribution function, statistics of the forces, a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from steradian.evaluation.plots import COLORS, FAINT

__all__ = ["energy_drift", "force_statistics", "radial_distribution", "simulation_picture"]


def energy_drift(times_fs: np.ndarray, total_energies: np.ndarray, num_atoms: int) -> float:
    """Slope of the total energy per atom and picosecond [eV/ps], by least squares over the whole run."""
    times_ps = np.asarray(times_fs, dtype=float) / 1000
    if len(times_ps) < 2 or np.ptp(times_ps) == 0:
        return 0.0
    return float(np.polyfit(times_ps, np.asarray(total_energies, dtype=float), 1)[0] / num_atoms)


def radial_distribution(
    frames: list[np.ndarray], num_bins: int = 200, maximum: float = 6.0, cell: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Histogram of the distances between atoms.

    Args:
        frames: positions ``[N, 3]`` [Å] of each frame.
        num_bins: of the histogram.
        maximum: largest distance [Å].
        cell: ``[3, 3]`` lattice vectors of a periodic system: normalised by the density, so that g goes to 1. Without
            it the histogram is normalised to unit area (a molecule has no density). Distances to the nearest image are
            used, which holds up to half of the cell's smallest height.

    Returns:
        Distances at the middle of the bins [Å] and g.

    Raises:
        ValueError: ``maximum`` is too large for the cell.
    """
    edges = np.linspace(0.0, maximum, num_bins + 1)
    counts = np.zeros(num_bins)
    if cell is not None:
        heights = 1.0 / np.linalg.norm(np.linalg.inv(cell), axis=0)
        if maximum > heights.min() / 2:
            raise ValueError(
                f"maximum {maximum} Å is above half of the cell's smallest height ({heights.min() / 2:.2f} Å)"
            )
    for positions in frames:
        difference = positions[:, None] - positions
        if cell is not None:
            fractional = difference @ np.linalg.inv(cell)
            shifts = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3, indexing="ij"), -1).reshape(-1, 3)
            images = (fractional - np.round(fractional))[:, :, None] + shifts
            distances = np.linalg.norm(images @ cell, axis=-1).min(-1)
        else:
            distances = np.linalg.norm(difference, axis=-1)
        upper = distances[np.triu_indices(len(positions), 1)]
        counts += np.histogram(upper, edges)[0]
    middle = 0.5 * (edges[1:] + edges[:-1])
    width = edges[1] - edges[0]
    if cell is None:
        return middle, counts / max(counts.sum() * width, 1e-300)
    num_atoms = len(frames[0])
    ideal = 0.5 * num_atoms * (num_atoms - 1) / abs(np.linalg.det(cell)) * 4 * np.pi * middle**2 * width
    return middle, counts / (len(frames) * ideal)


def force_statistics(forces: np.ndarray, window: int = 1) -> dict[str, np.ndarray]:
    """Mean, Q95 and largest norm of the force on an atom, frame by frame [eV/Å] (MARA paper, appendix E).

    Args:
        forces: ``[T, N, 3]``.
        window: frames of the moving average; the ends use what there is.
    """
    norms = np.linalg.norm(forces, axis=-1)
    figures = {"mean": norms.mean(1), "q95": np.quantile(norms, 0.95, axis=1), "max": norms.max(1)}
    weights = np.ones(min(window, len(norms)))
    share = np.convolve(np.ones(len(norms)), weights, mode="same")
    return {name: np.convolve(values, weights, mode="same") / share for name, values in figures.items()}


def simulation_picture(log: Path, num_atoms: int, target: float | None) -> Figure:
    """Temperature, and total energy per atom relative to the start, against time; from ``md.csv``."""
    table = np.genfromtxt(log, delimiter=",", names=True, ndmin=1)
    time_ps = table["time_fs"] / 1000
    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot(time_ps, table["temperature_K"], color=COLORS[0], linewidth=1.0)
    if target is not None:
        top.axhline(target, color=FAINT, linestyle="--", linewidth=0.9)
    top.set_ylabel("temperature [K]")
    bottom.plot(time_ps, 1000 * (table["total_eV"] - table["total_eV"][0]) / num_atoms, color=COLORS[1], linewidth=1.0)
    bottom.set_ylabel("total energy − start\n[meV/atom]")
    bottom.set_xlabel("time [ps]")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
