"""Rules of directions: what they average over, how large a system they resolve, and which waves they need.

Euclidean fast attention replaces ``sin(b) / b``, b = frequency times distance, by a sum over the directions of a rule.
For small b that is exact to rounding; beyond some b the sum depends on the orientation of the pair, and so does the
energy. The paper's rule of thumb is a table of the largest b for every number of points; here b is found by measuring.

For small b a rule has more waves than needed, too. Atoms within radius r of the centre have the waves
``sqrt(w) cos(ω u . x)`` and ``sqrt(w) sin(ω u . x)`` for every direction u with weight w, and attention needs their
scalar products

.. math:: K(x, y) = \\sum_m w_m \\cos(ω u_m \\cdot (x - y)) .

Plane waves within a ball of ``ω r = z`` are, to rounding, combinations of some (l + 1)^2 functions with l a little
above z: 16 for z = 0.3 where a rule of 50 points has 50 waves. Projecting the waves on that space changes K(x, y) by
the product of what is left of the waves of x and of y (the projection is orthogonal), so waves may be left out until
that square is at the rounding of the numbers. Cosines and sines, even and odd in x, are combined apart.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from steradian.equivariant.sphere import LEBEDEV_DEGREES, SphereGrid, lebedev

__all__ = ["RESOLVED", "DirectionRule", "SizeWatch", "graded_points", "plane_wave_error", "resolved_phase"]

RESOLVED = 2e-5
"""Error of a plane wave's mean up to which a rule counts as sufficient; the largest in the paper's table."""


@dataclass(frozen=True)
class DirectionRule:
    """Half of a rule that has the opposite of every direction.

    Cosines of opposite directions are the same and sines differ by their sign, so one of the two is enough.

    Attributes:
        directions: ``[m, 3]`` unit vectors, of two opposite ones the first.
        weights: ``[m]`` of both together; their sum is one.
    """

    directions: Tensor
    weights: Tensor

    @classmethod
    def from_grid(cls, grid: SphereGrid) -> DirectionRule:
        """The rule of a grid, whose weights may have any sum.

        Raises:
            ValueError: the opposite of a direction is missing or has another weight.
        """
        points, weights = grid.points, grid.weights / grid.weights.sum()
        apart = torch.cdist(points.double(), -points.double(), compute_mode="donot_use_mm_for_euclid_dist")
        distance, opposite = apart.min(1)
        own = torch.arange(len(points), device=points.device)
        same_weight = (weights - weights[opposite]).abs() <= 1e-10 * weights.abs().max()
        if not bool((distance < 1e-10).all() and same_weight.all() and (opposite[opposite] == own).all()):
            raise ValueError(f"the grid {grid.name} has no inversion symmetry: take a Lebedev rule")
        first = own < opposite
        return cls(points[first], 2 * weights[first])

    def to(self, like: Tensor) -> DirectionRule:
        """Cast and move."""
        return DirectionRule(self.directions.to(like), self.weights.to(like))

    @cached_property
    def waves(self) -> RuleWaves | None:
        """Combinations of its waves, made as they are needed; None where a weight is negative and has no root."""
        return RuleWaves(self.directions, self.weights) if bool((self.weights >= 0).all()) else None


# --------------------------------------------------------------------------------------------- what a rule resolves


def spiral(num_directions: int) -> Tensor:
    """Evenly spread directions ``[K, 3]`` (float64), the same every time."""
    index = torch.arange(num_directions, dtype=torch.float64) + 0.5
    z, turn = 1 - 2 * index / num_directions, math.pi * (1 + 5**0.5) * index
    radius = (1 - z * z).sqrt()
    return torch.stack([radius * turn.cos(), radius * turn.sin(), z], dim=1)


def plane_wave_error(grid: SphereGrid, phase: float, num_directions: int = 500) -> float:
    """Largest error of the rule's ``sum_m w_m cos(b u_m . d)`` against ``sin(b) / b`` over directions d.

    Args:
        grid: directions u with weights w.
        phase: b, largest frequency times distance.
        num_directions: how many d are tried; evenly spread (a spiral), the same every time.
    """
    directions = spiral(num_directions)
    mean = torch.cos(phase * directions @ grid.points.T) @ (grid.weights / grid.weights.sum())
    return float((mean - math.sin(phase) / phase).abs().max()) if phase > 0 else 0.0


@cache
def resolved_phase(num_points: int, tolerance: float = RESOLVED) -> float:
    """The largest phase b up to which a Lebedev rule errs by less than the tolerance."""
    grid = lebedev(num_points)
    low, high = 0.0, grid.degree + 2.0  # where the first degree that the rule misses is at its largest
    for _ in range(16):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if plane_wave_error(grid, middle) < tolerance else (low, middle)
    return low


def graded_points(num_points: int, largest_phase: float, phases: Tensor, extra_degree: int = 0) -> list[int]:
    """The smallest Lebedev rule for each phase that errs no more than the given one does at the largest phase.

    Args:
        num_points: of the rule for the largest phase.
        largest_phase: largest frequency times distance.
        phases: ``[n]`` the same for every frequency.
        extra_degree: of a polynomial of the direction that is integrated together with the waves.
    """
    known = [points for points in LEBEDEV_DEGREES if points <= num_points and not lebedev(points).has_negative_weights]
    allowed = max(plane_wave_error(lebedev(num_points), largest_phase), 1e-12)
    chosen = []
    for phase in phases.tolist():
        degree = next(
            (lebedev(points).degree for points in known if plane_wave_error(lebedev(points), phase) <= allowed),
            LEBEDEV_DEGREES[num_points],
        )
        fits = [points for points in known if LEBEDEV_DEGREES[points] >= degree + (extra_degree if phase else 0)]
        chosen.append(fits[0] if fits else num_points)
    return chosen


class SizeWatch:
    """Warns once when a system is larger than a rule resolves; looks at the first systems and then now and then.

    Args:
        num_points: of the Lebedev rule.
    """

    FIRST, EVERY = 20, 100

    def __init__(self, num_points: int) -> None:
        self.num_points = num_points
        self.calls = 0
        self.warned = False

    def look(self, positions: Tensor, sizes: Sequence[int], frequency: Callable[[], float]) -> None:
        """Check systems of so many atoms at ``[N, 3]`` [Å] against the largest frequency [1/Å]; it waits for a GPU."""
        self.calls += 1
        if self.warned or (self.calls > self.FIRST and self.calls % self.EVERY) or not len(positions):
            return
        largest_frequency = frequency()
        size = _extent(positions.detach(), sizes)
        limit = resolved_phase(self.num_points)
        if size * largest_frequency > limit:
            self.warned = True
            warnings.warn(
                f"a system is about {size:.0f} Å across, but {self.num_points} directions resolve the attention's "
                f"frequencies (up to {largest_frequency:.3g}/Å) only to {limit / largest_frequency:.0f} Å: energies "
                "depend on the orientation; take more num_points or a smaller max_frequency / max_length_A",
                stacklevel=3,
            )


def _extent(positions: Tensor, sizes: Sequence[int]) -> float:
    """The largest extent of a system along the axes and diagonals; at least 0.8 of its diameter."""
    axes = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 3)[:13].to(positions)
    along = (positions @ (axes / axes.norm(dim=1, keepdim=True)).T).split(list(sizes))
    return float(torch.stack([part.amax(0) - part.amin(0) for part in along if len(part)]).max())


# ------------------------------------------------------------------------------------------- fewer functions than waves

STEPS = 8
"""Sizes z = 2^(k / STEPS) are told apart."""
SMALLEST = -10 * STEPS
"""Step of the smallest size above zero."""
LARGEST = 10 * STEPS
"""Step beyond which no smaller basis is looked for."""
DIRECTIONS, SHELLS = 400, (1.0, 0.9, 0.75, 0.55, 0.3)
"""Points x that the space is made for: directions, and radii over z."""
RESOLVABLE = 1e-10
"""Squares that the method tells from zero in float64; for a smaller tolerance all waves are kept."""


def step_of_phase(phase: float) -> int | None:
    """The step for atoms with ``ω r = phase``; None for 0."""
    return min(max(SMALLEST, math.ceil(STEPS * math.log2(min(phase, 2.0**30)))), LARGEST) if phase > 0 else None


@dataclass(frozen=True)
class WaveRows:
    """Rows of combined waves: for every frequency those of the cosines, then those of the sines.

    Attributes:
        matrices: ``[rows, m]`` for the cosines and the sines of every frequency in turn; None for the diagonal matrix
            of the roots.
        starts: first row of each of them, and the number of all rows.
        padded: the number of rows with those that are zero, a multiple of four.
        roots: ``[m]`` square roots of the weights.
        directions: ``[m, 3]``.
    """

    matrices: tuple[Tensor | None, ...]
    starts: tuple[int, ...]
    padded: int
    roots: Tensor
    directions: Tensor

    def waves(self, positions: Tensor, frequencies: Tensor) -> Tensor:
        """``[G, rows, W]`` from ``[G, 3, W]`` and ``[n]`` in plain PyTorch; the truth for the machine code."""
        along = torch.matmul(self.directions, positions)
        phases = along.unsqueeze(1) * frequencies[:, None, None]  # [G, n, m, W]
        turned = torch.stack([phases.cos(), phases.sin()], dim=2).flatten(1, 2)
        parts = []
        for number, matrix in enumerate(self.matrices):
            wave = turned[:, number]
            parts.append(wave * self.roots.unsqueeze(-1) if matrix is None else torch.matmul(matrix, wave))
        zeros = positions.new_zeros((len(positions), self.padded - self.starts[-1], positions.shape[2]))
        return torch.cat([*parts, zeros], dim=1)


class RuleWaves:
    """Combinations for one rule of directions, made when they are first needed.

    Args:
        directions: ``[m, 3]``; of their dtype is what is made.
        weights: ``[m]``, not negative, together one; the opposite directions are counted in.
        tolerance: largest error of K, where K(x, x) is one; None for four times the spacing of numbers at one, which
            leaves errors of the attention and of its derivatives at or below those of rounding (1e-8 and 4e-7).
    """

    def __init__(self, directions: Tensor, weights: Tensor, tolerance: float | None = None) -> None:
        self.directions, self.weights = directions.detach(), weights.detach()
        self.tolerance = 4 * torch.finfo(directions.dtype).eps if tolerance is None else tolerance
        self._known: dict[int | None, tuple[Tensor | None, Tensor | None]] = {}
        self._rows: dict[tuple[int | None, ...], WaveRows] = {}

    @torch.inference_mode(False)  # what is kept must serve a gradient too
    def rows(self, steps: tuple[int | None, ...]) -> WaveRows:
        """Rows for frequencies of these steps (:func:`step_of_phase`)."""
        if steps not in self._rows:
            for step in set(steps) - self._known.keys():
                self._known[step] = self._make(step)
            matrices = tuple(matrix for step in steps for matrix in self._known[step])
            starts = [0]
            for matrix in matrices:
                starts.append(starts[-1] + (len(self.weights) if matrix is None else len(matrix)))
            padded = -(-starts[-1] // 4) * 4
            self._rows[steps] = WaveRows(matrices, tuple(starts), padded, self.weights.sqrt(), self.directions)
        return self._rows[steps]

    def _make(self, step: int | None) -> tuple[Tensor | None, Tensor | None]:
        if step is None:  # cosines are one, sines are zero
            return self.weights[None].clone(), self.weights.new_zeros((0, len(self.weights)))
        if self.tolerance < RESOLVABLE or step >= LARGEST:
            return None, None
        weights = self.weights.double()
        points = torch.cat([2.0 ** (step / STEPS) * shell * spiral(DIRECTIONS) for shell in SHELLS])
        phases, roots = points.to(weights.device) @ self.directions.double().T, weights.sqrt()
        # sines are small for small phases, where all of the derivative is theirs: three rows at least
        spans = (
            _span(wave * roots, self.tolerance / 2, least) for wave, least in ((phases.cos(), 1), (phases.sin(), 3))
        )
        cosines, sines = (None if span is None else (span * roots).to(self.weights) for span in spans)
        return cosines, sines


def _span(waves: Tensor, tolerance: float, least: int) -> Tensor | None:
    """Orthonormal rows ``[rows, m]`` that leave of none of the ``[points, m]`` waves more than the tolerance, squared;
    None where that takes all of them."""
    vectors = torch.linalg.eigh(waves.T @ waves).eigenvectors.flip(1)
    left = (waves @ vectors).square().flip(1).cumsum(1).flip(1).amax(0)  # without the first 0, 1, ... vectors
    rows = max(least, int((left > tolerance).sum()))
    return None if rows >= waves.shape[1] else vectors[:, :rows].T.contiguous()
