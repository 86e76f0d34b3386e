"""How large a system a rule of directions resolves.

Euclidean fast attention replaces ``sin(b) / b``, b = frequency times distance, by a sum over the directions of a rule.
For small b that is exact to rounding; beyond some b the sum depends on the orientation of the pair, and so does the
energy. The paper's rule of thumb is a table of the largest b for every number of points; here b is found by measuring.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from steradian.sphere.grids import LEBEDEV_DEGREES, SphereGrid, lebedev

__all__ = ["RESOLVED", "SizeWatch", "graded_points", "plane_wave_error", "resolved_phase", "spiral"]

RESOLVED = 2e-5
"""Error of a plane wave's mean up to which a rule counts as sufficient; the largest in the paper's table."""


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

    def look(self, positions: Tensor, system: Tensor, num_systems: int, frequency: Callable[[], float]) -> None:
        """Check systems of atoms at ``[N, 3]`` [Å] against the largest frequency [1/Å]; looking waits for a GPU."""
        self.calls += 1
        if self.warned or (self.calls > self.FIRST and self.calls % self.EVERY) or not len(positions):
            return
        largest_frequency = frequency()
        size = _extent(positions.detach(), system, num_systems)
        limit = resolved_phase(self.num_points)
        if size * largest_frequency > limit:
            self.warned = True
            warnings.warn(
                f"a system is about {size:.0f} Å across, but {self.num_points} directions resolve the attention's "
                f"frequencies (up to {largest_frequency:.3g}/Å) only to {limit / largest_frequency:.0f} Å: energies "
                "depend on the orientation; take more num_points or a smaller max_frequency / max_length_A",
                stacklevel=3,
            )


def _extent(positions: Tensor, system: Tensor, num_systems: int) -> float:
    """The largest extent of a system along the axes and diagonals; at least 0.8 of its diameter."""
    axes = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 3)[:13].to(positions)
    along = positions @ (axes / axes.norm(dim=1, keepdim=True)).T
    index = system.unsqueeze(1).expand_as(along)
    ends = [
        torch.zeros((num_systems, len(axes))).to(along).scatter_reduce(0, index, along, kind, include_self=False)
        for kind in ("amax", "amin")
    ]
    return float((ends[0] - ends[1]).max())
