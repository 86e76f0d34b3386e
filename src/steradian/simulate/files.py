"""Settings of a simulation, and its folder: trajectory, log, restart point."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import ase.io
import numpy as np
from ase import Atoms

from steradian.checkpoint import FolderInUseError, explained, held, read_json, write_json
from steradian.graph.structures import DataError, Structure

__all__ = [
    "ENSEMBLES",
    "LOG_COLUMNS",
    "MDSettings",
    "RunFiles",
    "SimulationError",
    "check_start",
]

LOG_COLUMNS = ("step", "time_fs", "potential_eV", "kinetic_eV", "total_eV", "temperature_K")
PIECE = 1 << 22  # bytes of a trajectory that are hashed at once


class RunFiles:
    """``trajectory.extxyz``, ``md.csv``, ``restart.json`` and ``settings.json`` in a folder.

    Frames and lines are appended and flushed to the disk; a restart point remembers how long both files were and their
    hashes. A run that goes on from there cuts away what was written after it, and refuses what is not as it was.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trajectory = folder / "trajectory.extxyz"
        self.log = folder / "md.csv"
        self.restart = folder / "restart.json"
        self.settings = folder / "settings.json"
        self.picture = folder / "md.png"
        self._hashes = {"trajectory": hashlib.sha256(), "log": hashlib.sha256()}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from simulating in the folder, which goes again if no run begins.

        Raises:
            SimulationError: another process does.
            OSError: the folder cannot be made or written to.
        """
        try:
            with held(self.folder, "simulating"):
                yield
        except FolderInUseError as error:
            raise SimulationError(f"{error}, or choose another folder with --out") from None

    def check_free(self, overwrite: bool) -> None:
        """Refuse a folder that holds a run.

        Raises:
            SimulationError: with the ways out.
        """
        if self.restart.exists() and not overwrite:
            raise SimulationError(f"{self.folder} holds a run already: add --resume to go on with it, or --overwrite")

    def stored_engine(self) -> str | None:
        """Which engine ran here, or None where no run is."""
        return str(self._read(self.settings).get("engine", "ase")) if self.settings.exists() else None

    def restart_step(self) -> int | None:
        """The step from which the run goes on, or None where no run is."""
        return int(self._read(self.restart)["step"]) if self.restart.exists() else None

    def begin(self, settings: MDSettings, engine: str) -> None:
        """An empty run; a run that was there is gone."""
        for file in (self.restart, self.settings, self.trajectory, self.log, self.picture):
            file.unlink(missing_ok=True)  # without its restart point it is no run any more, whatever interrupts
        write_json(self.settings, asdict(settings) | {"engine": engine})
        self._append("log", ",".join(LOG_COLUMNS) + "\n")

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
        self._append("trajectory", text.getvalue())
        self._append("log", ",".join(map(repr, map(float, row))) + "\n")

    def _append(self, name: str, text: str) -> None:
        path, content = getattr(self, name), text.encode()
        with explained(path), open(path, "ab") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        self._hashes[name].update(content)

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
        }
        for name, found in self._hashes.items():
            content[f"{name}_bytes"] = getattr(self, name).stat().st_size
            content[f"{name}_sha256"] = found.hexdigest()
        write_json(self.restart, content)

    def restore(self, atoms: Atoms, settings: MDSettings, engine: str) -> dict[str, Any]:
        """Put the atoms back to the restart point, cut what was written after it; returns all that it holds.

        Raises:
            SimulationError: no run, one with other settings, atoms or engine, or files that are not as they were.
        """
        if not self.restart.exists() or not self.settings.exists():
            raise SimulationError(f"{self.folder}: no run to resume there (it has no restart.json)")
        stored = {"engine": "ase"} | self._read(self.settings)
        present = asdict(settings) | {"engine": engine}
        del present["timestep_reason"]
        changed = [name for name, value in present.items() if stored.get(name) != value]
        if changed:
            raise SimulationError(
                f"{self.folder} was run with another {', '.join(changed)}; resume with the same settings"
            )
        state = self._read(self.restart)
        try:
            if state["numbers"] != atoms.numbers.tolist():
                raise SimulationError(f"{self.folder} was run with other atoms; give the structure it started from")
            atoms.set_cell(state["cell"])
            atoms.set_pbc(state["pbc"])
            atoms.set_positions(state["positions"])
            atoms.set_momenta(state["momenta"])
            for name in self._hashes:
                self._check(name, int(state[f"{name}_bytes"]), state.get(f"{name}_sha256"), int(state["step"]))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, SimulationError):
                raise
            raise SimulationError(f"{self.restart}: damaged, it cannot be used ({error})") from None
        for name in self._hashes:
            os.truncate(getattr(self, name), state[f"{name}_bytes"])
        return state

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            return read_json(path)
        except ValueError as error:
            raise SimulationError(f"{error}; restore it from a copy, or start anew with --overwrite") from None

    def _check(self, name: str, size: int, digest: str | None, step: int) -> None:
        """Hash a file up to the restart point and compare.

        Raises:
            SimulationError: it is shorter, or not what was written.
        """
        path: Path = getattr(self, name)
        found, last = hashlib.sha256(), b""
        present = path.stat().st_size if path.exists() else 0
        with open(path if present else os.devnull, "rb") as stream:
            while piece := stream.read(min(PIECE, size - stream.tell())) if stream.tell() < size else b"":
                found.update(piece)
                if steps := re.findall(rb"step=(\d+)" if name == "trajectory" else rb"(?m)^(\d+)\.0,", piece):
                    last = steps[-1]
        way_out = "restore it from a copy, or start anew with --overwrite"
        if present < size:
            left = f"what is left goes up to step {last.decode()}" if last else "nothing of it is left"
            raise SimulationError(
                f"{path} was cut: {present} of the {size} bytes that it had at the restart point (step {step}), "
                f"{left}; {way_out}"
            )
        if digest is not None and found.hexdigest() != digest:
            raise SimulationError(
                f"{path}: damaged or changed, its content up to the restart point (step {step}) is not what was "
                f"written; {way_out}"
            )
        self._hashes[name] = found

    def read_log(self) -> dict[str, np.ndarray]:
        """Columns of the log."""
        with open(self.log, encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        return {name: np.array([float(row[name]) for row in rows]) for name in LOG_COLUMNS}


# ------------------------------------------------------------------------------------------------------------ settings


ENSEMBLES = ("nve", "langevin", "bussi")
#: [fs] above it no bond of a molecule is followed any more, so a longer time step is nearly always a mistake of units
LONGEST_TIMESTEP = 10.0


class SimulationError(ValueError):
    """A simulation that cannot start or go on; one line that says why and what to do."""


@dataclass(frozen=True)
class MDSettings:
    """What defines a run; stored with it, and compared when it is resumed.

    Attributes:
        ensemble: ``nve`` (velocity Verlet), ``langevin`` or ``bussi`` (velocities scaled at random, canonical).
        temperature: of the start, and of the thermostat [K].
        timestep: [fs].
        friction: of the thermostat [1/ps]; for ``bussi`` the inverse of its relaxation time.
        seed: of the velocities and of the thermostat.
        save_every: steps between frames of the trajectory and lines of the log.
        restart_every: steps between restart points.
        skin: of the neighbour list [Å].
        rotation_average: rotations that energies are averaged over (see
            :meth:`steradian.potential.Potential.average_rotations`), or None.
        timestep_reason: why the time step is longer than :data:`LONGEST_TIMESTEP`; not compared.

    Raises:
        SimulationError: a value that cannot be.
    """

    ensemble: Literal["nve", "langevin", "bussi"] = "langevin"
    temperature: float = 300.0
    timestep: float = 0.5
    friction: float = 10.0
    seed: int = 0
    save_every: int = 10
    restart_every: int = 100
    skin: float = 0.5
    timestep_reason: str = ""
    rotation_average: int | None = None

    def __post_init__(self) -> None:
        if self.ensemble not in ENSEMBLES:
            raise SimulationError(f"ensemble must be nve, langevin or bussi, not '{self.ensemble}'")
        for name in ("timestep", "temperature", "friction", "skin"):
            if not math.isfinite(getattr(self, name)):
                raise SimulationError(f"{name} must be a finite number, not {getattr(self, name)}")
        for name in ("timestep", "save_every", "restart_every"):
            if getattr(self, name) <= 0:
                raise SimulationError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("temperature", "friction", "skin"):
            if getattr(self, name) < 0:
                raise SimulationError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.ensemble == "bussi" and not self.friction:
            raise SimulationError("bussi needs a positive friction, the inverse of its relaxation time")
        if self.timestep > LONGEST_TIMESTEP and not self.timestep_reason:
            raise SimulationError(
                f"a time step of {self.timestep:g} fs is longer than the vibrations of atoms (usual: 0.5 to 2 fs); if "
                "it is meant, say why with --timestep-reason TEXT"
            )


def check_start(atoms: Atoms) -> None:
    """Refuse a start that no simulation can begin with.

    Raises:
        SimulationError: there are no atoms, a position, velocity or lattice vector is not finite, or the cell has no
            height along a periodic direction.
    """
    if not len(atoms):
        raise SimulationError("no atoms to simulate")
    for name, values in (("position", atoms.get_positions()), ("velocity", atoms.get_velocities())):
        if not np.isfinite(values).all():
            atom = int(np.argmax(~np.isfinite(values).all(axis=1)))
            raise SimulationError(f"the {name} of atom {atom} is not finite (NaN or infinity): mend the structure")
    if not np.isfinite(atoms.cell[:]).all():
        raise SimulationError("the cell is not finite (NaN or infinity): mend the structure")
    try:
        Structure(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc)
    except DataError as error:
        raise SimulationError(f"the start cannot be simulated: {error}") from None
