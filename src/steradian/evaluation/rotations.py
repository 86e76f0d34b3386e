"""Rotation audit: how much a potential's energy and forces change when the whole structure is turned or mirrored.

An exact potential gives the same energy and turned forces. MARA in its published form ties the attention to the
laboratory frame (lab-fixed grid, one learned vector per grid point) and does not; the audit puts a number on it, next
to the force error, so that one can say whether the change matters.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steradian.evaluation.tables import Table, format_number
from steradian.graph import Graph, Prediction, batch_graphs
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure

__all__ = ["RotationAudit", "RotationFigures", "random_orthogonal", "rotation_audit"]

EXACT = 1e-8
"""Largest change in float64, relative to the RMS force [and 1 eV for energies], that still counts as rounding."""


@dataclass(frozen=True)
class RotationFigures:
    """Changes under one kind of operation in one precision.

    Attributes:
        operation: "rotations" or "reflections" (rotations combined with the inversion).
        dtype: precision of the weights and positions.
        count: number of turned copies.
        energy_mean, energy_max: absolute change of the energy per atom [eV/atom].
        force_mean, force_max: norm of the change of an atom's force vector, turned back [eV/Å].
    """

    operation: str
    dtype: str
    count: int
    energy_mean: float
    energy_max: float
    force_mean: float
    force_max: float


@dataclass(frozen=True)
class RotationAudit:
    """Result of :func:`rotation_audit`.

    Attributes:
        figures: one entry per operation and precision; the same weights, float64 first.
        num_structures, num_rotations, seed: what was turned, and how often each.
        force_rms: root mean square norm of the predicted force vectors [eV/Å].
        force_error: mean norm of the force error of the unturned structures [eV/Å], or None without labels.
    """

    figures: tuple[RotationFigures, ...]
    num_structures: int
    num_rotations: int
    seed: int
    force_rms: float
    force_error: float | None

    @property
    def exact(self) -> bool:
        """Whether every change in float64 is rounding."""
        scale = max(self.force_rms, 1e-3)
        checked = [found for found in self.figures if found.dtype == "float64"]
        return all(found.energy_max <= EXACT and found.force_max <= EXACT * scale for found in checked)

    @property
    def force_ratio(self) -> float | None:
        """Mean force change over mean force error, the worse of rotations and reflections; None without labels."""
        if not self.force_error:
            return None
        return max(found.force_mean for found in self.figures if found.dtype == "float64") / self.force_error

    def summary(self) -> str:
        """One sentence."""
        if self.exact:
            return "Invariant: energies and forces change under rotation and reflection by rounding only."
        worst = max((f for f in self.figures if f.dtype == "float64"), key=lambda found: found.force_mean)
        text = (
            f"Not invariant: {worst.operation} change the force on an atom by {format_number(1e3 * worst.force_mean)} "
            f"meV/Å on average and {format_number(1e3 * worst.force_max)} meV/Å at most"
        )
        if self.force_ratio is None:
            return text + "."
        return text + f"; the average is {format_number(100 * self.force_ratio)} % of the mean force error."

    def table(self) -> Table:
        """Changes in meV/atom and meV/Å, and as a share of the mean force error."""
        rows = []
        for found in self.figures:
            values = [found.energy_mean, found.energy_max, found.force_mean, found.force_max]
            share = format_number(100 * found.force_mean / self.force_error) if self.force_error else "–"
            rows.append([found.operation, found.dtype, *[format_number(1e3 * value) for value in values], share])
        heads = [
            "",
            "precision",
            "energy change, mean [meV/atom]",
            "largest",
            "force change, mean [meV/Å]",
            "largest",
            "mean, in % of force error",
        ]
        title = f"Rotation audit: {self.num_structures} structures, {self.num_rotations} operations of each kind"
        error = f"; mean force error {format_number(1e3 * self.force_error)} meV/Å" if self.force_error else ""
        note = f"norms of the change of an atom's force vector, turned back{error}"
        return Table(title, heads, rows, num_labels=2, note=note)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "exact": self.exact, "force_ratio": self.force_ratio, "summary": self.summary()}


def random_orthogonal(count: int, *, reflections: bool = False, seed: int = 0) -> Tensor:
    """Haar-random rotations, or improper rotations, ``[count, 3, 3]`` in float64.

    The Q of the QR decomposition of a Gaussian matrix with the signs of R's diagonal moved into it (Mezzadri 2007),
    then multiplied by its determinant (and by -1 for reflections), which keeps the measure.
    """
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(count, 3, 3, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    q = q * torch.diagonal(r, dim1=-2, dim2=-1).sign().unsqueeze(-2)
    proper = q * torch.linalg.det(q).sign()[:, None, None]
    return -proper if reflections else proper


def rotated(graph: Graph, matrix: Tensor) -> Graph:
    """The graph with positions and lattice vectors turned; neighbours are unchanged, labels are dropped."""
    matrix = matrix.to(graph.positions)
    return replace(
        graph,
        positions=graph.positions @ matrix.T,
        cell=graph.cell @ matrix.T,
        energy=None,
        forces=None,
        stress=None,
    )


def rotation_audit(
    potential: torch.nn.Module,
    structures: Sequence[Structure],
    *,
    num_rotations: int = 16,
    reflections: bool = True,
    seed: int = 0,
    max_structures: int = 20,
    batch: int = 32,
) -> RotationAudit:
    """Turn structures at random and measure how the prediction changes against the given orientation.

    Done with the same weights in float64, where only a real dependence on the orientation is left, and in the
    potential's own precision.

    Args:
        potential: a :class:`~steradian.potential.Potential`; a copy is taken, it is not changed.
        structures: at most ``max_structures`` of them, evenly spaced, are used.
        num_rotations: turned copies per structure, fresh operations for every structure.
        reflections: also combine rotations with the inversion.
        seed: of the operations.
        batch: copies predicted at once.

    Raises:
        ValueError: there are no structures or no rotations.
    """
    if not structures or num_rotations < 1:
        raise ValueError("the rotation audit needs at least one structure and one rotation")
    chosen = np.unique(np.linspace(0, len(structures) - 1, min(len(structures), max_structures)).round().astype(int))
    graphs = [make_graph(structures[index], potential.cutoff) for index in chosen]  # type: ignore[arg-type]
    own = next((p.dtype for p in potential.parameters() if p.is_floating_point()), torch.float64)
    found: list[RotationFigures] = []
    rms = error = float("nan")
    for dtype in dict.fromkeys((torch.float64, own)):
        model = copy.deepcopy(potential).to(dtype).eval()
        references = [_predict(model, [graph], dtype) for graph in graphs]
        if dtype == torch.float64:
            rms, error = _force_scale(references, graphs)
        for operation in ("rotations", "reflections") if reflections else ("rotations",):
            changes = [
                _changes(model, graph, reference, operation, num_rotations, seed + index, batch, dtype)
                for index, (graph, reference) in enumerate(zip(graphs, references))
            ]
            energies = torch.cat([energy for energy, _ in changes])
            forces = torch.cat([force for _, force in changes])
            found.append(
                RotationFigures(
                    operation,
                    str(dtype).removeprefix("torch."),
                    len(energies),
                    float(energies.mean()),
                    float(energies.max()),
                    float(forces.mean()),
                    float(forces.max()),
                )
            )
    return RotationAudit(
        tuple(found), len(graphs), num_rotations, seed, rms, error if np.isfinite(error) and error > 0 else None
    )


def _predict(model: torch.nn.Module, graphs: list[Graph], dtype: torch.dtype) -> Prediction:
    first = next(model.parameters(), None)
    graph = batch_graphs(graphs).to(first.device if first is not None else None, dtype)
    found = model(graph, forces=True)
    return replace(
        found,
        interaction_energy=found.interaction_energy.detach().double().cpu(),
        forces=found.forces.detach().double().cpu(),
    )


def _changes(
    model: torch.nn.Module,
    graph: Graph,
    reference: Prediction,
    operation: str,
    count: int,
    seed: int,
    batch: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Absolute energy changes per atom ``[count]`` and norms of force changes ``[count * N]``."""
    assert reference.forces is not None
    reflections = operation == "reflections"
    matrices = random_orthogonal(count, reflections=reflections, seed=2 * seed + reflections)
    energies, forces = [], []
    for part in matrices.split(batch):
        found = _predict(model, [rotated(graph, matrix) for matrix in part], dtype)
        assert found.forces is not None
        # without the constant energies of the atoms, which would bury small changes under rounding
        energies.append((found.interaction_energy - reference.interaction_energy).abs() / max(graph.num_atoms, 1))
        turned_back = torch.einsum("bni,bij->bnj", found.forces.view(len(part), -1, 3), part)
        forces.append((turned_back - reference.forces).norm(dim=-1).flatten())
    return torch.cat(energies), torch.cat(forces)


def _force_scale(references: list[Prediction], graphs: list[Graph]) -> tuple[float, float]:
    """RMS norm of the predicted forces, and mean norm of their errors (NaN where no structure is labelled)."""
    predicted = [reference.forces for reference in references if reference.forces is not None]
    errors = [
        (forces - graph.forces.double()).norm(dim=-1)
        for forces, graph in zip(predicted, graphs)
        if graph.forces is not None
    ]
    rms = float(torch.cat(predicted).square().sum(dim=-1).mean().sqrt())
    return rms, float(torch.cat(errors).mean()) if errors else float("nan")
