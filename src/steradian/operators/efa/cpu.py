"""Euclidean fast attention over isolated systems by machine code.

The same numbers as :mod:`steradian.operators.efa.attention` makes in plain PyTorch, which remains the truth: waves,
combined where fewer span them (:mod:`steradian.operators.efa.rules`), then their sums or products pair by pair. W atoms
(16 in float32, 8 in float64) are a block, an even number K of blocks is a system.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from steradian.compiler.lanes import lanes_of
from steradian.operators.efa.cpu_pairs import PairShape, attend_pairs
from steradian.operators.efa.cpu_sums import CpuSums
from steradian.operators.efa.cpu_waves import CombinedWaves
from steradian.operators.efa.rules import DirectionRule, WaveRows, step_of_phase
from steradian.operators.efa.sums import apply_moments, moments

__all__ = ["attend_isolated"]

PAIRS_ARE_SLOWER = 0.9
"""Measured: speed of multiply-adds pair by pair over that of the sums."""
BYTES_OF_WAVES = 1 << 29
"""Waves of so many bytes are summed at a time, and so many derivatives by them exist at a time."""


def attend_isolated(
    queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, frequencies: Tensor, rule: DirectionRule
) -> Tensor:
    """Attention ``[B, N, e]`` in B systems of N atoms.

    Args:
        queries, keys: ``[B, N, D, F]``, F even, queries scaled; zero where there is no atom.
        values: ``[B, N, e]``, zero where there is no atom.
        positions: ``[B, N, 3]`` about the centre of each system [Å].
        frequencies: ``[F / 2]`` [1/Å].
        rule: directions and their weights, none of them negative.
    """
    batch, num_atoms, num_values = values.shape
    frequencies = frequencies.to(values)
    lanes = lanes_of(values.element_size())
    padding = -num_atoms % (2 * lanes)
    x = _blocks(positions, padding, lanes).flatten(0, 1).contiguous()
    q, k = (_blocks_of_pairs(features, padding, lanes) for features in (queries, keys))
    assert rule.waves is not None, "a rule with negative weights has no roots of them"
    steps = _steps(positions, frequencies)
    rows, width = rule.waves.rows(steps), 2 * queries.shape[2]
    if pairs_are_cheaper(num_atoms, rows.starts[-1], len(frequencies) * width, width, num_values):
        waves = CombinedWaves.apply(x, frequencies, rows).unflatten(0, (batch, -1))
        by_pairs = attend_pairs(waves, q, k, _blocks(values, padding, lanes), PairShape(rows.starts[::2], num_atoms))
        return by_pairs.transpose(2, 3).flatten(1, 2)[:, :num_atoms]
    v = _panels(values, padding, lanes)
    out: Tensor | None = None
    for group in _groups(x, rows):
        rows, own = rule.waves.rows(steps[group]), slice(group.start * width, group.stop * width)
        waves = CombinedWaves.apply(x, frequencies[group], rows).unflatten(0, (batch, -1))
        way = _sums(rows.starts, rows.padded, width)
        part = apply_moments(moments(waves, k[:, :, own], v, way=way), waves, q[:, :, own], way=way)
        out = part if out is None else out + part
    assert out is not None
    return out.transpose(1, 2).flatten(2)[:, :num_atoms, :num_values]


def _groups(positions: Tensor, rows: WaveRows) -> list[slice]:
    """Neighbouring frequencies whose waves (and their derivatives) exist at a time."""
    count = len(rows.starts) // 2
    size = positions.numel() // 3 * rows.padded * positions.element_size()
    number = min(count, -(-size // BYTES_OF_WAVES))
    cuts = [count * part // number for part in range(number + 1)]
    return [slice(first, last) for first, last in pairwise(cuts)]


def pairs_are_cheaper(num_atoms: int, num_rows: int, num_features: int, width: int, num_values: int) -> bool:
    """Whether all pairs are less work than the sums.

    Args:
        num_atoms: N of a system.
        num_rows: R of the waves.
        num_features: n a of queries and keys.
        width: a.
        num_values: e.
    """
    return num_atoms * (num_rows + num_features + num_values) < PAIRS_ARE_SLOWER * 2 * num_rows * width * num_values


def _padded(values: Tensor, by: tuple[int, ...]) -> Tensor:
    return pad(values, by) if any(by) else values


def _blocks(values: Tensor, padding: int, lanes: int) -> Tensor:
    """``[B, N, e]`` to ``[B, K, e, W]``."""
    return _padded(values, (0, 0, 0, padding)).unflatten(1, (-1, lanes)).transpose(2, 3)


def _blocks_of_pairs(features: Tensor, padding: int, lanes: int) -> Tensor:
    """``[B, N, D, F]`` to ``[B, K, F D, W]``, rows ordered by the channels' pair, channel and component."""
    features = _padded(features, (0, 0, 0, 0, 0, padding))
    blocks = features.unflatten(3, (-1, 2)).unflatten(1, (-1, lanes))  # [B, K, W, D, n, 2]
    return blocks.permute(0, 1, 4, 5, 3, 2).reshape(*blocks.shape[:2], -1, lanes)


def _panels(values: Tensor, padding: int, lanes: int) -> Tensor:
    """``[B, N, e]`` to ``[B, C, K W, P]``."""
    vectors = -(-values.shape[2] // lanes)
    width = lanes * (2 if vectors % 2 == 0 else 1)
    values = _padded(values, (0, vectors * lanes - values.shape[2], 0, padding))
    return values.unflatten(2, (-1, width)).transpose(1, 2).contiguous()


def _steps(positions: Tensor, frequencies: Tensor) -> tuple[int | None, ...]:
    """Sizes that the basis has to be made for, one per frequency."""
    radius = float(positions.detach().square().sum(-1).max()) ** 0.5 if positions.numel() else 0.0
    sizes = [abs(frequency) * radius for frequency in frequencies.detach().tolist()]
    if frequencies.requires_grad:  # a frequency of zero has a curvature
        sizes = [max(size, 1e-30) for size in sizes]
    return tuple(step_of_phase(size) for size in sizes)


@lru_cache(maxsize=256)
def _sums(starts: tuple[int, ...], padded: int, width: int) -> CpuSums:
    """Sums over rows of waves (two groups per frequency, :class:`WaveRows`) times features of their frequency; rows of
    zeros meet those of the first."""
    pairs = [group // 2 for group, (first, last) in enumerate(pairwise(starts)) for _ in range(first, last)]
    pair = torch.tensor(pairs + [0] * (padded - len(pairs)), dtype=torch.int64)
    wave_of = torch.arange(padded).repeat_interleave(width)
    feature_of = (pair.unsqueeze(1) * width + torch.arange(width)).flatten()
    return CpuSums(wave_of, feature_of, width % 8 == 0)
