"""Fewer functions than waves: what the waves of one frequency span over a system of limited size.

Along m directions u with weights w, half of a symmetric rule, atoms within radius r of the centre have the 2 m waves
``sqrt(w) cos(ω u . x)`` and ``sqrt(w) sin(ω u . x)``; attention needs their scalar products

.. math:: K(x, y) = \\sum_m w_m \\cos(ω u_m \\cdot (x - y)) .

Plane waves within a ball of ``ω r = z`` are, to rounding, combinations of some (l + 1)^2 functions with l a little
above z: 16 for z = 0.3 where a rule of 50 points has 50 waves. Projecting the waves on that space changes K(x, y) by
the product of what is left of the waves of x and of y (the projection is orthogonal), so waves may be left out until
that square is at the rounding of the numbers. Cosines and sines, even and odd in x, are combined apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from steradian.operators.efa.limits import spiral

__all__ = ["RuleWaves", "WaveRows", "step_of_phase"]

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

    @property
    def pair_of_row(self) -> list[int]:
        """Which frequency every row belongs to; rows of zeros to the first."""
        numbers = []
        for group, (first, last) in enumerate(zip(self.starts, self.starts[1:])):
            numbers += [group // 2] * (last - first)
        return numbers + [0] * (self.padded - len(numbers))

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

    def rows(self, steps: tuple[int | None, ...]) -> WaveRows:
        """Rows for frequencies of these steps (:func:`step_of_phase`)."""
        if steps not in self._rows:
            matrices = tuple(matrix for step in steps for matrix in self._matrices(step))
            starts = [0]
            for matrix in matrices:
                starts.append(starts[-1] + (len(self.weights) if matrix is None else len(matrix)))
            padded = -(-starts[-1] // 4) * 4
            self._rows[steps] = WaveRows(matrices, tuple(starts), padded, self.weights.sqrt(), self.directions)
        return self._rows[steps]

    def _matrices(self, step: int | None) -> tuple[Tensor | None, Tensor | None]:
        if step not in self._known:
            self._known[step] = self._make(step)
        return self._known[step]

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
