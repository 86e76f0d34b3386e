"""Data sets made on the spot: Langevin dynamics of one molecule with energies and forces from xTB (tblite)."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms, units

from steradian.checkpoint import read_arrays, write_atomically
from steradian.data.files import WRITABLE, read_structures, write_structures
from steradian.graph.structures import DataError, Structure

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator

__all__ = ["Recipe", "autocorrelation_time", "make_dataset", "starting_geometry"]

# Frames between two states on disk. Every such segment starts with a fresh electronic guess, interrupted or not, so
# that a run which was killed continues to the very same frames.
SEGMENT = 5

# Enol form, roughly planar (C3H4O2, intramolecular hydrogen bond); relaxed with the chosen method before use.
MALONALDEHYDE = (
    "OCCCOHHHH",
    [
        (-1.27, 1.02, 0.0),
        (-1.24, -0.24, 0.0),
        (0.0, -0.95, 0.0),
        (1.18, -0.27, 0.0),
        (1.27, 1.05, 0.0),
        (0.36, 1.41, 0.0),
        (0.0, -2.03, 0.0),
        (2.13, -0.81, 0.0),
        (-2.16, -0.83, 0.0),
    ],
)


@dataclass(frozen=True)
class Recipe:
    """How a data set is made; what is here decides every digit of it (on one machine, with one thread).

    Attributes:
        molecule: ``malonaldehyde`` (enol form), a name known to :func:`ase.build.molecule` (G2 set), or a file whose
            first frame is taken.
        method: ``GFN2-xTB``, ``GFN1-xTB`` or ``IPEA1-xTB``.
        temperature: of the Langevin thermostat [K].
        frames: frames to keep.
        seed: of velocities and random forces.
        timestep: [fs].
        friction: of the thermostat [1/fs].
        stride: time between frames that are kept [fs].
        equilibration: time dropped at the start [fs].
        charge: total charge [e]. multiplicity: spin multiplicity; None for the lowest.
    """

    molecule: str = "malonaldehyde"
    method: str = "GFN2-xTB"
    temperature: float = 500.0
    frames: int = 2000
    seed: int = 0
    timestep: float = 0.5
    friction: float = 0.02
    stride: float = 40.0
    equilibration: float = 2000.0
    charge: int = 0
    multiplicity: int | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "frames", "timestep", "friction", "stride"):
            if not getattr(self, name) > 0:
                raise DataError(f"{name} must be positive, not {getattr(self, name)}")
        if self.multiplicity is not None and self.multiplicity < 1:
            raise DataError(f"multiplicity must be 1 (singlet) or more, not {self.multiplicity}")
        if self.equilibration < 0:
            raise DataError(f"equilibration must not be negative, not {self.equilibration}")

    @property
    def steps_per_frame(self) -> int:
        return max(1, round(self.stride / self.timestep))


def starting_geometry(molecule: str) -> Atoms:
    """Atoms of a recipe's molecule, not yet relaxed.

    Raises:
        DataError: neither a known name nor a readable file, or a periodic structure.
    """
    from ase.build import molecule as build_molecule
    from ase.collections import g2

    if molecule.lower() == "malonaldehyde":
        return Atoms(MALONALDEHYDE[0], positions=MALONALDEHYDE[1])
    if molecule in g2.names:
        atoms = build_molecule(molecule)
        return Atoms(numbers=atoms.numbers, positions=atoms.positions)
    if not Path(molecule).exists():
        raise DataError(
            f"molecule '{molecule}': neither malonaldehyde, nor a name that ase.build.molecule knows (CH3CH2OH, C6H6, "
            "...), nor a file"
        )
    structure = read_structures(molecule, require=())[0]
    if structure.periodic:
        raise DataError(f"{molecule}: periodic; only molecules can be made")
    return Atoms(numbers=structure.numbers, positions=structure.positions)


def make_dataset(recipe: Recipe, out: Path | str, *, progress: bool = True, overwrite: bool = False) -> dict[str, Any]:
    """Run the dynamics and write the frames; continue where an earlier run of the same recipe was stopped or killed.

    Beside ``out`` stand, while it runs, ``out.state`` (everything finished so far, replaced as a whole every
    few frames) and, at the end, ``out.recipe.json`` (the recipe and the report). Positions are centred on the centre of
    mass. Energies are total energies of the method [eV], forces are their negative gradient [eV/Å].

    Returns:
        The report: frames, mean kinetic temperature [K], mean and standard deviation of the energy [eV],
        autocorrelation time of the energy [fs], effective number of independent frames, seconds, frames resumed.

    Raises:
        DataError: tblite is missing, ``out`` exists or has an unknown suffix, a state of another recipe lies there, or
            the dynamics went wrong.
    """
    out = Path(out)
    if out.suffix.lower() not in WRITABLE:
        raise DataError(f"{out}: cannot write this format; end the name with one of {', '.join(WRITABLE)}")
    if not out.parent.is_dir():
        raise DataError(f"{out}: there is no folder '{out.parent}'")
    # A state beside it means that this command was killed while it wrote OUT: finish it.
    if out.exists() and not overwrite and not _state_file(out).exists():
        raise DataError(f"{out} exists; choose another name, or pass --overwrite to replace it")
    with _one_thread():
        _new_calculator(recipe)  # tells at once where tblite is missing or the method is unknown
        return _make(recipe, out, progress)


def _make(recipe: Recipe, out: Path, progress: bool) -> dict[str, Any]:
    state_file = _state_file(out)
    run = _State.load(state_file, recipe) if state_file.exists() else None
    resumed = 0 if run is None else len(run.energies)
    started = time.monotonic()
    if run is None:
        run = _start(recipe)
        run.save(state_file, recipe)
    with _progress_bar(recipe.frames, min(resumed, recipe.frames), progress) as show:
        while len(run.energies) < recipe.frames:
            run.extend(recipe)
            run.save(state_file, recipe)
            show(min(len(run.energies), recipe.frames))
    report = _report(run, recipe, time.monotonic() - started, resumed)
    content = {"recipe": asdict(recipe), "report": report, "versions": _versions()}
    write_atomically(out.with_name(out.name + ".recipe.json"), json.dumps(content, indent=2).encode())
    write_structures(out, run.structures(recipe))
    state_file.unlink()
    return report


# ------------------------------------------------------------------------------------------------------- the dynamics


class _State:
    """Everything a run has finished and all it needs to go on."""

    def __init__(self, atoms: Atoms, generator: np.random.Generator) -> None:
        self.atoms = atoms
        self.generator = generator
        self.equilibrated = False
        self.positions: list[np.ndarray] = []
        self.forces: list[np.ndarray] = []
        self.energies: list[float] = []
        self.temperatures: list[float] = []

    def extend(self, recipe: Recipe) -> None:
        """Run the equilibration, where not done yet, and the next segment of frames."""
        if not self.equilibrated:
            # A fresh calculator here, too: one that is warm from the relaxation would move a whole run and one that
            # was killed before its first segment to different frames.
            self.atoms.calc = _new_calculator(recipe)
            _run_dynamics(self, recipe, round(recipe.equilibration / recipe.timestep))
            self.equilibrated = True
        # The fresh calculator is part of the definition of a trajectory, see SEGMENT.
        self.atoms.calc = _new_calculator(recipe)
        for _ in range(SEGMENT):
            _run_dynamics(self, recipe, recipe.steps_per_frame)
            self.positions.append(self.atoms.positions - self.atoms.get_center_of_mass())
            self.forces.append(self.atoms.get_forces().copy())
            self.energies.append(float(self.atoms.get_potential_energy()))
            self.temperatures.append(_temperature(self.atoms))

    def structures(self, recipe: Recipe) -> list[Structure]:
        label = f"{recipe.method} {recipe.temperature:g}K"
        return [
            Structure(self.atoms.numbers, positions, energy=energy, forces=forces, config_type=label)
            for positions, energy, forces in zip(self.positions, self.energies, self.forces)
        ][: recipe.frames]

    def save(self, path: Path, recipe: Recipe) -> None:
        header = {"recipe": _fingerprint(recipe), "generator": self.generator.bit_generator.state}
        content = io.BytesIO()
        size = (-1, len(self.atoms), 3)
        np.savez(
            content,
            header=np.array(json.dumps(header)),
            numbers=self.atoms.numbers,
            last_positions=self.atoms.positions,
            last_momenta=self.atoms.get_momenta(),
            equilibrated=np.array(self.equilibrated),
            positions=np.array(self.positions).reshape(size),
            forces=np.array(self.forces).reshape(size),
            energies=np.array(self.energies),
            temperatures=np.array(self.temperatures),
        )
        write_atomically(path, content.getvalue())

    @classmethod
    def load(cls, path: Path, recipe: Recipe) -> _State:
        try:
            arrays = read_arrays(path)
            header = json.loads(str(arrays["header"]))
        except (ValueError, KeyError, RecursionError):
            raise DataError(f"{path}: not a readable state of a run; delete it to start again") from None
        for name, value in _fingerprint(recipe).items():
            if header["recipe"].get(name) != value:
                raise DataError(
                    f"{path} belongs to another run: {name} was {header['recipe'].get(name)} and is {value} now; "
                    "repeat it with the old settings, choose another --out, or delete it"
                )
        atoms = Atoms(numbers=arrays["numbers"], positions=arrays["last_positions"])
        atoms.set_momenta(arrays["last_momenta"])
        generator = np.random.Generator(np.random.PCG64())
        generator.bit_generator.state = header["generator"]
        state = cls(atoms, generator)
        state.equilibrated = bool(arrays["equilibrated"])
        state.positions, state.forces = list(arrays["positions"]), list(arrays["forces"])
        state.energies, state.temperatures = arrays["energies"].tolist(), arrays["temperatures"].tolist()
        return state


def _start(recipe: Recipe) -> _State:
    """Relax the geometry and draw velocities."""
    from ase.optimize import BFGS

    atoms = starting_geometry(recipe.molecule)
    _check_electrons(atoms, recipe)
    atoms.calc = _new_calculator(recipe)
    with _explained(recipe, "relaxing the geometry"):
        if len(atoms) > 1 and not BFGS(atoms, logfile=None).run(fmax=0.02, steps=500):
            raise DataError(f"{recipe.molecule}: the geometry did not relax in 500 steps; give a better start")
    generator = np.random.Generator(np.random.PCG64(recipe.seed))
    spread = np.sqrt(atoms.get_masses() * units.kB * recipe.temperature)
    atoms.set_momenta(generator.standard_normal((len(atoms), 3)) * spread[:, None])
    return _State(atoms, generator)


def _check_electrons(atoms: Atoms, recipe: Recipe) -> None:
    """Refuse charges and multiplicities that the molecule cannot have; tblite takes any number."""
    electrons = int(atoms.numbers.sum()) - recipe.charge
    if abs(recipe.charge) > max(4, len(atoms)) or electrons < 1:
        raise DataError(f"a charge of {recipe.charge} on {len(atoms)} atoms ({recipe.molecule}); check --charge")
    unpaired = (recipe.multiplicity or 1 + electrons % 2) - 1
    if unpaired > electrons or (electrons - unpaired) % 2:
        raise DataError(
            f"multiplicity {recipe.multiplicity} is impossible with {electrons} electrons: it is "
            f"{'even' if electrons % 2 else 'odd'} (charge {recipe.charge})"
        )


def _run_dynamics(state: _State, recipe: Recipe, steps: int) -> None:
    from ase.md.langevin import Langevin

    dynamics = Langevin(
        state.atoms,
        recipe.timestep * units.fs,
        temperature_K=recipe.temperature,
        friction=recipe.friction / units.fs,
        fixcm=False,
        rng=state.generator,
    )
    with _explained(recipe, f"frame {len(state.energies)}"):
        dynamics.run(steps)
        temperature = _temperature(state.atoms)
        if not np.isfinite(temperature) or temperature > 20 * recipe.temperature + 3000:
            raise DataError(
                f"frame {len(state.energies)}: the dynamics is unstable ({temperature:.0f} K): use a smaller --timestep"
            )


@contextmanager
def _explained(recipe: Recipe, where: str) -> Iterator[None]:
    """Turn the failures of a calculator into one line."""
    from ase.calculators.calculator import CalculatorError

    try:
        yield
    except (CalculatorError, RuntimeError, TypeError) as error:
        message = " ".join(str(error).split())[:160]
        raise DataError(
            f"{where}: {recipe.method} failed ({message}): try another geometry, a lower temperature or a smaller "
            "timestep"
        ) from None


def _temperature(atoms: Atoms) -> float:
    """Kinetic temperature [K], the centre of mass included (the thermostat acts on it too)."""
    return float(2 * atoms.get_kinetic_energy() / (3 * len(atoms) * units.kB))


def _new_calculator(recipe: Recipe) -> Calculator:
    try:
        from tblite.ase import TBLite
    except ImportError:
        raise DataError("making labels needs tblite: pip install 'steradian[xtb]'") from None
    methods = ("GFN2-xTB", "GFN1-xTB", "IPEA1-xTB")
    if recipe.method not in methods:
        raise DataError(f"unknown method '{recipe.method}'; known: {', '.join(methods)}")
    return TBLite(
        method=recipe.method, charge=float(recipe.charge), multiplicity=recipe.multiplicity, accuracy=0.1, verbosity=0
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run tblite on one thread, unless OMP_NUM_THREADS says otherwise.

    For molecules a second thread makes it slower (many times slower on a busy machine), and one thread keeps sums, and
    so trajectories, the same every time. tblite's OpenMP reads the variable when it is loaded; where PyTorch came first
    they share one OpenMP, which PyTorch sets.
    """
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    torch = sys.modules.get("torch")
    threads = None if torch is None else torch.get_num_threads()
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        if torch is not None:
            torch.set_num_threads(1)
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if torch is not None:
            torch.set_num_threads(threads)


# --------------------------------------------------------------------------------------------------------- the report


def autocorrelation_time(series: np.ndarray) -> float:
    """Integrated autocorrelation time in samples: 1/2 + sum of the autocorrelation, window of five times itself.

    Independent samples give 1/2; n samples are worth n / (2 tau) independent ones (Sokal 1997).
    """
    values = np.asarray(series, dtype=np.float64)
    deviations = values - values.mean()
    variance = float(np.mean(deviations**2))
    if len(values) < 4 or variance == 0:
        return 0.5
    tau = 0.5
    for lag in range(1, len(values) // 2):
        tau += float(np.mean(deviations[:-lag] * deviations[lag:])) / variance
        if lag >= 5 * tau:
            break
    return max(tau, 0.5)


def _report(run: _State, recipe: Recipe, seconds: float, resumed: int) -> dict[str, Any]:
    energies = np.array(run.energies[: recipe.frames])
    tau = autocorrelation_time(energies)
    return {
        "frames": len(energies),
        "atoms": len(run.atoms),
        "temperature_K": round(float(np.mean(run.temperatures[: recipe.frames])), 1),
        "energy_mean_eV": float(energies.mean()),
        "energy_std_eV": float(energies.std()),
        "stride_fs": recipe.steps_per_frame * recipe.timestep,
        "energy_autocorrelation_fs": round(tau * recipe.steps_per_frame * recipe.timestep, 1),
        "independent_frames": round(len(energies) / (2 * tau)),
        "seconds": round(seconds, 1),
        "frames_resumed": resumed,
    }


def _state_file(out: Path) -> Path:
    return out.with_name(out.name + ".state")


def _fingerprint(recipe: Recipe) -> dict[str, Any]:
    """What must agree for a run to go on; the number of frames may change."""
    values = asdict(recipe)
    del values["frames"]
    return values


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("tblite", "ase", "numpy", "steradian")}


@contextmanager
def _progress_bar(total: int, done: int, show: bool) -> Iterator[Callable[[int], None]]:
    """A bar with the time left; it also shows equilibration, as a bar that has not begun to move."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("frames"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not show) as bar:
        task = bar.add_task("frames", total=total, completed=done)
        yield lambda completed: bar.update(task, completed=completed)
