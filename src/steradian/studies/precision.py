"""What each role and preset of precision costs and brings, measured on one model: ``steradian precision``.

The truth is the same model in float64. A *role* is measured with everything else in float64, so its error is its own; a
*preset* as it would be used. Errors against labels are not the subject, but the model's own error sets the scale of
what matters.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from ase.md.verlet import VelocityVerlet
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from torch import Tensor

from steradian.config.precision import PRESETS, ROLES, WIDE_ROLES, PrecisionConfig
from steradian.evaluation.plots import COLORS
from steradian.evaluation.rotations import rotation_audit
from steradian.evaluation.tables import Table, format_number
from steradian.graph import Graph, batch_graphs
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure
from steradian.interfaces.ase import SteradianCalculator
from steradian.potential import Potential
from steradian.simulate.analysis import energy_drift

__all__ = ["PrecisionRow", "PrecisionStudy", "StudySettings", "precision_study"]

MEV = 1000.0
#: Presets that are something else on a CPU, which has no units for them; never recommended there.
ON_CPU = {"half": "emulated", "tf32": "= float32"}


@dataclass(frozen=True)
class StudySettings:
    """How much is measured.

    Attributes:
        max_structures: evenly spaced ones of those given.
        batch: structures predicted at once.
        roles: measure single roles.
        presets: names of the presets to measure.
        md_steps: of the NVE run of every preset; 0 for none. timestep [fs], temperature [K].
        role_md_steps: of every role.
        repeats: of the timing.
        force_tolerance: [eV/Å] mean absolute difference to float64; None: 0.1 meV/Å and 5 % of the model's own error.
        seed: of rotations and velocities.
    """

    max_structures: int = 20
    batch: int = 5
    roles: bool = True
    presets: tuple[str, ...] = PRESETS
    md_steps: int = 400
    role_md_steps: int = 0
    timestep: float = 0.5
    temperature: float = 300.0
    repeats: int = 5
    force_tolerance: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class PrecisionRow:
    """One role or preset; NaN where something was not measured.

    Attributes:
        kind: ``role`` or ``preset``. name: which.
        format: of a role; of a preset what a CPU makes of it (:data:`ON_CPU`).
        energy_mae: mean difference of energies to float64 [eV per atom].
        forces_mae, forces_max: of force components [eV/Å].
        rotation: mean norm of the change of a force under rotation [eV/Å].
        drift: of the total energy in NVE [eV per atom and ps].
        seconds: energy and forces of a batch.
        memory: tensors that a call keeps for its forces [bytes].
    """

    kind: str
    name: str
    format: str
    energy_mae: float
    forces_mae: float
    forces_max: float
    rotation: float = math.nan
    drift: float = math.nan
    seconds: float = math.nan
    memory: float = math.nan


@dataclass(frozen=True)
class PrecisionStudy:
    """The result.

    Attributes:
        rows: roles, then presets.
        own_error: MAE of force components against the labels, in float64 [eV/Å]; NaN without labels.
        tolerance: on ``forces_mae`` [eV/Å]. num_structures: used. device: where.
    """

    rows: tuple[PrecisionRow, ...]
    own_error: float
    tolerance: float
    num_structures: int
    device: str

    @property
    def cheapest(self) -> PrecisionRow | None:
        """The fastest preset within the tolerance, of those that the device has units for."""
        presets = [row for row in self.rows if row.kind == "preset" and not row.format]
        within = [row for row in presets if row.forces_mae <= self.tolerance]
        return min(within, key=lambda row: row.seconds, default=None)

    def summary(self) -> str:
        """One line: the recommended preset."""
        limit = f"{format_number(MEV * self.tolerance)} meV/Å"
        row = self.cheapest
        if row is None:
            return f"no preset stays within {limit} of float64"
        return (
            f"cheapest preset within {limit} of float64: {row.name} ({format_number(MEV * row.forces_mae)} meV/Å, "
            f"{format_number(1e3 * row.seconds)} ms per batch)"
        )

    def table(self) -> Table:
        """Errors in meV and meV/Å."""
        columns = ("", "format", "E [meV/atom]", "F MAE [meV/Å]", "F max", "rotation", "drift [meV/atom/ps]",
                   "time [ms]", "kept [MiB]")  # fmt: skip
        rows: list[tuple[str, ...]] = []
        heads = set()
        for kind in ("role", "preset"):
            found = [row for row in self.rows if row.kind == kind]
            if found:
                heads.add(len(rows))
                rows.append((f"{kind}s", *[""] * 8))
            for row in found:
                figures = (MEV * row.energy_mae, MEV * row.forces_mae, MEV * row.forces_max, MEV * row.rotation,
                           MEV * row.drift, 1e3 * row.seconds, row.memory / 2**20)  # fmt: skip
                rows.append((f"  {row.name}", row.format, *map(format_number, figures)))
        own = f"; the model's own force error is {format_number(MEV * self.own_error)} meV/Å"
        note = (
            "Differences to the same model in float64. A role is measured with everything else in float64, so compare "
            "its time and memory with those of that preset. Times are "
            f"medians, taken in turn, of one batch on {self.device}{'' if math.isnan(self.own_error) else own}."
        )
        title = f"Precision by role and preset, {self.num_structures} structures"
        return Table(title, columns, rows, num_labels=2, heads=frozenset(heads), note=note)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; NaN becomes null."""

        def plain(value: Any) -> Any:
            return None if isinstance(value, float) and not math.isfinite(value) else value

        return {
            "units": "eV, Å, ps, s, bytes",
            "structures": self.num_structures,
            "device": self.device,
            "own_forces_mae": plain(self.own_error),
            "force_tolerance": self.tolerance,
            "cheapest": None if self.cheapest is None else self.cheapest.name,
            "rows": [{key: plain(value) for key, value in asdict(row).items()} for row in self.rows],
        }

    def picture(self) -> Figure:
        """Force error of every role and format, and of the presets against their time."""
        figure = Figure(figsize=(9.0, 4.2))
        left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
        formats = list(dict.fromkeys(row.format for row in self.rows if row.kind == "role"))
        names = list(dict.fromkeys(row.name for row in self.rows if row.kind == "role"))
        for place, name in enumerate(formats):
            rows = [row for row in self.rows if row.kind == "role" and row.format == name and row.forces_mae > 0]
            left.plot([MEV * row.forces_mae for row in rows], [names.index(row.name) for row in rows], "o",
                      color=COLORS[place], label=name)  # fmt: skip
        left.set(xscale="log", yticks=range(len(names)), yticklabels=names, xlabel="force error, MAE [meV/Å]")
        left.invert_yaxis()
        left.axvline(MEV * self.tolerance, color="#8a8a8a", linestyle="--", linewidth=1)
        if formats:
            left.legend(frameon=False, fontsize=8)
        left.set_visible(bool(names))
        presets = [row for row in self.rows if row.kind == "preset" and math.isfinite(row.seconds)]
        for row, color, size in zip(presets, COLORS, range(10, 0, -1)):  # those that coincide stay visible
            error = MEV * max(row.forces_mae, 1e-9)
            right.plot(1e3 * row.seconds, error, "o", color=color, markersize=size, label=f"{row.name} {row.format}")
        if presets:
            right.legend(frameon=False, fontsize=8)
        right.axhline(MEV * self.tolerance, color="#8a8a8a", linestyle="--", linewidth=1)
        right.set(yscale="log", xlabel="time of a batch [ms]", ylabel="force error, MAE [meV/Å]")
        right.margins(x=0.25)
        for axis in (left.xaxis, right.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        figure.tight_layout()
        return figure


def precision_study(
    potential: Potential,
    structures: Sequence[Structure],
    settings: StudySettings | None = None,
    report: Callable[[int, int, str], None] | None = None,
) -> PrecisionStudy:
    """Measure roles and presets on some structures.

    Args:
        potential: copies are taken, it is not changed.
        structures: labels are used for the model's own error, where there are any.
        settings: see :class:`StudySettings`.
        report: called before every measurement with its number, how many there are, and what it is.

    Raises:
        ValueError: no structures, or a preset that is not known.
    """
    settings = settings or StudySettings()
    if not structures:
        raise ValueError("the study of precision needs at least one structure")
    unknown = sorted(set(settings.presets) - set(PRESETS))
    if unknown:
        raise ValueError(f"unknown preset {', '.join(unknown)}; choose from {', '.join(PRESETS)}")
    places = np.linspace(0, len(structures) - 1, min(len(structures), settings.max_structures)).round().astype(int)
    chosen = [structures[place] for place in np.unique(places)]
    graphs = [make_graph(structure, potential.cutoff) for structure in chosen]
    batches = [
        batch_graphs(graphs[start : start + settings.batch]).to(potential.device)
        for start in range(0, len(graphs), settings.batch)
    ]
    truth = _predict(_in(potential, "float64"), batches)
    own = _own_error(truth[1], batches)
    tolerance = settings.force_tolerance
    if tolerance is None:
        tolerance = 1e-4 + (0.05 * own if math.isfinite(own) else 0.0)
    roles = _role_cases() if settings.roles else []
    count = len(roles) + len(settings.presets)
    exact = _in(potential, "float64")
    rows: list[PrecisionRow] = []
    for role, name in roles:
        if report is not None:
            report(len(rows), count, f"{role} in {name}")
        model = _in(potential, PrecisionConfig(preset="float64", roles={role: name}))  # type: ignore[dict-item]
        row = PrecisionRow("role", role, name, *_errors(_predict(model, batches), truth))
        seconds = _seconds({"float64": exact, "role": model}, batches[0], settings.repeats)
        row = replace(row, seconds=seconds["role"])
        rows.append(_with_consequences(row, model, chosen, batches, settings, settings.role_md_steps))
    models = {preset: _in(potential, preset) for preset in settings.presets}
    seconds = _seconds(models, batches[0], settings.repeats)
    for preset, model in models.items():
        if report is not None:
            report(len(rows), count, preset)
        note = ON_CPU.get(preset, "") if model.device.type == "cpu" else ""
        row = PrecisionRow("preset", preset, note, *_errors(_predict(model, batches), truth), seconds=seconds[preset])
        rows.append(_with_consequences(row, model, chosen, batches, settings, settings.md_steps))
    return PrecisionStudy(tuple(rows), own, tolerance, len(chosen), _device(potential))


def _seconds(models: dict[str, Potential], batch: Graph, repeats: int) -> dict[str, float]:
    """Median times of energies and forces; taken in turn, so that whatever else runs there slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1 if repeats else 0):
        for name, model in models.items():
            _synchronise(model)
            start = time.perf_counter()
            model(batch)
            _synchronise(model)
            if repeat:  # the first calls make what is kept
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) if found else math.nan for name, found in times.items()}


def _role_cases() -> list[tuple[str, str]]:
    cases = []
    for role in ROLES:
        formats = ("float32",) if role in WIDE_ROLES else ("float32", "bfloat16", "float16")
        cases += [(role, name) for name in formats]
    return cases


def _in(potential: Potential, precision: str | PrecisionConfig) -> Potential:
    """A copy in another precision, with frozen weights and without tables of the radial networks."""
    model = copy.deepcopy(potential).set_precision(precision)
    # tables are dropped by train; they would hide the radial role
    return model.train().for_inference(radial_table=False)


def _predict(model: Potential, batches: list[Graph]) -> tuple[Tensor, Tensor]:
    """Energies per atom ``[S]`` and forces ``[N, 3]`` in float64 on the CPU."""
    found = [(model(batch), batch.atoms_per_system) for batch in batches]
    energies = torch.cat([prediction.interaction_energy.double() / atoms for prediction, atoms in found])
    return energies.cpu(), torch.cat([prediction.forces.double().cpu() for prediction, _ in found])


def _errors(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> tuple[float, float, float]:
    energies, forces = ((one - other).abs() for one, other in zip(found, truth))
    return float(energies.mean()), float(forces.mean()), float(forces.max())


def _own_error(forces: Tensor, batches: list[Graph]) -> float:
    labels = [batch.forces for batch in batches if batch.forces is not None]
    if len(labels) < len(batches):
        return math.nan
    return float((forces - torch.cat(labels).double().cpu()).abs().mean())


def _with_consequences(
    row: PrecisionRow,
    model: Potential,
    structures: list[Structure],
    batches: list[Graph],
    settings: StudySettings,
    md_steps: int,
) -> PrecisionRow:
    """With rotation, memory and (``md_steps`` > 0) drift."""
    audit = rotation_audit(model, structures, num_rotations=4, reflections=False, max_structures=3, seed=settings.seed)
    drift = _drift(model, structures[0], settings, md_steps) if md_steps else math.nan
    memory = _kept_memory(model, batches[0])
    return replace(row, rotation=audit.figures[-1].force_mean, drift=drift, memory=memory)


def _drift(model: Potential, structure: Structure, settings: StudySettings, md_steps: int) -> float:
    """Slope of the total energy of an NVE run [eV per atom and ps]."""
    atoms = Atoms(structure.numbers, structure.positions, cell=structure.cell, pbc=structure.pbc)
    atoms.calc = SteradianCalculator(model, device=model.device, skin=0.5, radial_table=False)
    random = np.random.RandomState(settings.seed)
    MaxwellBoltzmannDistribution(atoms, temperature_K=settings.temperature, rng=random)
    Stationary(atoms)
    dynamics = VelocityVerlet(atoms, settings.timestep * units.fs)
    times, energies = [], []
    for step in range(md_steps):
        dynamics.run(1)
        times.append((step + 1) * settings.timestep)
        energies.append(atoms.get_total_energy())
    return energy_drift(np.array(times), np.array(energies), len(atoms))


def _synchronise(model: Potential) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _kept_memory(model: Potential, batch: Graph) -> float:
    """Tensors that a call keeps for its forces, weights included [bytes]."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch)
    return float(sum(kept.values()))


def _device(potential: Potential) -> str:
    if potential.device.type == "cuda":
        return torch.cuda.get_device_name(potential.device)
    return f"CPU, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
