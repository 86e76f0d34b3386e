"""Picture of a simulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from steradian.evaluation.plots import COLORS, FAINT

__all__ = ["simulation_picture"]


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
