"""The folder of a simulation: trajectory, log, restart point, settings."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms

from steradian.checkpoint import write_atomically
from steradian.simulate.settings import MDSettings, SimulationError

__all__ = ["LOG_COLUMNS", "RunFiles"]

LOG_COLUMNS = ("step", "time_fs", "potential_eV", "kinetic_eV", "total_eV", "temperature_K")


class RunFiles:
    """``trajectory.extxyz``, ``md.csv``, ``restart.json`` and ``settings.json`` in a folder.

    Frames and lines are appended and flushed to the disk; a restart point remembers how long both files were, so what
    was written after it is cut away when a run goes on from there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trajectory = folder / "trajectory.extxyz"
        self.log = folder / "md.csv"
        self.restart = folder / "restart.json"
        self.settings = folder / "settings.json"

    def stored_engine(self) -> str | None:
        """Which engine ran here, or None where no run is."""
        if not self.settings.exists():
            return None
        return str(json.loads(self.settings.read_text()).get("engine", "ase"))

    def begin(self, settings: MDSettings, engine: str, overwrite: bool) -> None:
        """An empty run.

        Raises:
            SimulationError: a run is there already.
        """
        if self.settings.exists() and not overwrite:
            raise SimulationError(f"{self.folder} holds a run already: add --resume to go on with it, or --overwrite")
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in (self.trajectory, self.log, self.restart):
            file.unlink(missing_ok=True)
        write_atomically(self.settings, json.dumps(asdict(settings) | {"engine": engine}, indent=1).encode())
        self.log.write_text(",".join(LOG_COLUMNS) + "\n")

    def save_frame(
        self, atoms: Atoms, step: int, settings: MDSettings, *, energy: float, kinetic: float, forces: np.ndarray
    ) -> None:
        """Append a frame to the trajectory and a line to the log; the atoms have their momenta."""
        frame = atoms.copy()
        frame.calc = None
        time = step * settings.timestep
        frame.info = {"step": step, "time_fs": time, "energy": energy}
        frame.arrays["forces"] = forces
        text = io.StringIO()
        ase.io.write(text, frame, format="extxyz")
        row = (step, time, energy, kinetic, energy + kinetic, atoms.get_temperature())
        for path, content in (
            (self.trajectory, text.getvalue()),
            (self.log, ",".join(map(repr, map(float, row))) + "\n"),
        ):
            with open(path, "a", encoding="utf-8") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())

    def save_restart(self, atoms: Atoms, step: int, state: dict[str, Any]) -> None:
        """Replace the restart point; ``state`` is what an engine needs beside positions and momenta."""
        content = {
            "step": step,
            "numbers": atoms.numbers.tolist(),
            "positions": atoms.positions.tolist(),
            "momenta": atoms.get_momenta().tolist(),
            "cell": np.asarray(atoms.cell).tolist(),
            "pbc": atoms.pbc.tolist(),
            **state,
            "trajectory_bytes": self.trajectory.stat().st_size,
            "log_bytes": self.log.stat().st_size,
        }
        write_atomically(self.restart, json.dumps(content).encode())

    def restore(self, atoms: Atoms, settings: MDSettings, engine: str) -> dict[str, Any]:
        """Put the atoms back to the restart point, cut what was written after it; returns all that it holds.

        Raises:
            SimulationError: no run, or one with other settings, atoms or engine.
        """
        if not self.restart.exists() or not self.settings.exists():
            raise SimulationError(f"{self.folder}: no run to resume there (it has no restart.json)")
        stored = {"engine": "ase"} | json.loads(self.settings.read_text())
        present = asdict(settings) | {"engine": engine}
        changed = [name for name, value in present.items() if stored.get(name) != value]
        if changed:
            raise SimulationError(
                f"{self.folder} was run with another {', '.join(changed)}; resume with the same settings"
            )
        state: dict[str, Any] = json.loads(self.restart.read_text())
        if state["numbers"] != atoms.numbers.tolist():
            raise SimulationError(f"{self.folder} was run with other atoms; give the structure it started from")
        atoms.set_cell(state["cell"])
        atoms.set_pbc(state["pbc"])
        atoms.set_positions(state["positions"])
        atoms.set_momenta(state["momenta"])
        for path, size in ((self.trajectory, state["trajectory_bytes"]), (self.log, state["log_bytes"])):
            os.truncate(path, size)
        return state

    def read_log(self) -> dict[str, np.ndarray]:
        """Columns of the log."""
        with open(self.log, encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        return {name: np.array([float(row[name]) for row in rows]) for name in LOG_COLUMNS}
