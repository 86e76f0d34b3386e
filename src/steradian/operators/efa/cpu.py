"""Euclidean fast attention over isolated systems through machine code.

The same numbers as :mod:`steradian.operators.efa.attention` makes in plain PyTorch, which remains the truth: waves in a
basis that spans them (:mod:`steradian.operators.efa.basis`), then their sums (:mod:`steradian.operators.efa.sums`) or
products pair by pair. W atoms (16 in float32, 8 in float64) are a block, an even number K of blocks is a system.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakIdKeyDictionary

from steradian.compiler.lanes import lanes_of
from steradian.compiler.native import function_of
from steradian.operators.efa.basis import RuleWaves, WaveRows, step_of_phase
from steradian.operators.efa.cpu_code_waves import ARGUMENTS, num_scratch, waves_module
from steradian.operators.efa.cpu_pairs import PairShape, attend_pairs
from steradian.operators.efa.cpu_sums import CpuSums, Task, aligned, run_kernel
from steradian.operators.efa.sums import apply_moments, moments

__all__ = ["attend_isolated"]

PAIRS_ARE_SLOWER = 0.9
"""Measured: speed of multiply-adds pair by pair over that of the sums."""
BYTES_OF_WAVES = 1 << 29
"""Waves of so many bytes are summed at a time, and so many derivatives by them exist at a time."""
MOST_SUMS = 256
_RULES: WeakIdKeyDictionary = WeakIdKeyDictionary()
_SUMS: dict[tuple[tuple[int, ...], int, int], CpuSums] = {}


def attend_isolated(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    directions: Tensor,
    weights: Tensor,
) -> Tensor:
    """Attention ``[B, N, e]`` in B systems of N atoms.

    Args:
        queries, keys: ``[B, N, D, F]``, F even, queries scaled; zero where there is no atom.
        values: ``[B, N, e]``, zero where there is no atom.
        positions: ``[B, N, 3]`` about the centre of each system [Å].
        frequencies: ``[F / 2]`` [1/Å].
        directions: ``[m, 3]``, of a rule to which the opposite directions belong.
        weights: ``[m]`` of both together, not negative.
    """
    batch, num_atoms, num_values = values.shape
    frequencies = frequencies.to(values)
    lanes = lanes_of(values.element_size())
    padding = -num_atoms % (2 * lanes)
    x = _padded(positions, (0, 0, 0, padding)).unflatten(1, (-1, lanes)).transpose(2, 3)
    x = x.flatten(0, 1).contiguous()
    q, k = (_blocks_of_pairs(features, padding, lanes) for features in (queries, keys))
    basis, steps = _basis(directions, weights), _steps(positions, frequencies)
    rows, width = basis.rows(steps), 2 * queries.shape[2]
    if pairs_are_cheaper(num_atoms, rows.starts[-1], len(frequencies) * width, width, num_values):
        waves = _Waves.apply(x, frequencies, rows).unflatten(0, (batch, -1))
        v = _padded(values, (0, 0, 0, padding)).unflatten(1, (-1, lanes)).transpose(2, 3)
        by_pairs = attend_pairs(waves, q, k, v, PairShape(rows.starts[::2], num_atoms))
        return by_pairs.transpose(2, 3).flatten(1, 2)[:, :num_atoms]
    v = _panels(values, padding, lanes)
    out: Tensor | None = None
    for group in _groups(x, rows):
        rows, own = basis.rows(steps[group]), slice(group.start * width, group.stop * width)
        waves = _Waves.apply(x, frequencies[group], rows).unflatten(0, (batch, -1))
        way = _sums(rows, group.stop - group.start, width)
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


def _basis(directions: Tensor, weights: Tensor) -> RuleWaves:
    known = _RULES.get(directions)
    if known is None or known[0] is not weights:
        known = _RULES[directions] = weights, RuleWaves(directions, weights)
    return known[1]


def _steps(positions: Tensor, frequencies: Tensor) -> tuple[int | None, ...]:
    """Sizes that the basis has to be made for, one per frequency."""
    radius = float(positions.detach().square().sum(-1).max()) ** 0.5 if positions.numel() else 0.0
    sizes = [abs(frequency) * radius for frequency in frequencies.detach().tolist()]
    if frequencies.requires_grad:  # a frequency of zero has a curvature
        sizes = [max(size, 1e-30) for size in sizes]
    return tuple(step_of_phase(size) for size in sizes)


def _sums(rows: WaveRows, num_pairs: int, width: int) -> CpuSums:
    key = (*rows.starts, rows.padded), num_pairs, width
    if key not in _SUMS:
        if len(_SUMS) >= MOST_SUMS:
            _SUMS.clear()
        pair = torch.tensor(rows.pair_of_row, dtype=torch.int64)
        wave_of = torch.arange(rows.padded).repeat_interleave(width)
        feature_of = (pair.unsqueeze(1) * width + torch.arange(width)).flatten()
        _SUMS[key] = CpuSums(wave_of, feature_of, width % 8 == 0)
    return _SUMS[key]


class _Waves(torch.autograd.Function):
    """``[G, R, W]`` waves at ``[G, 3, W]``; where a second derivative is wanted the first one is plain PyTorch."""

    @staticmethod
    def forward(ctx: Any, positions: Tensor, frequencies: Tensor, rows: WaveRows) -> Tensor:  # type: ignore[override]
        ctx.rows = rows
        ctx.save_for_backward(positions, frequencies)
        waves = positions.new_empty((positions.shape[0], rows.padded, positions.shape[2]))
        waves[:, rows.starts[-1] :] = 0.0
        _run("value", rows, positions, frequencies, waves)
        return waves

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        positions, frequencies = ctx.saved_tensors
        rows, wanted = ctx.rows, ctx.needs_input_grad
        if torch.is_grad_enabled():
            inputs = [tensor.view_as(tensor) for tensor in (positions, frequencies)]
            asked = [tensor for tensor, ask in zip(inputs, wanted) if ask]
            found = iter(torch.autograd.grad(rows.waves(*inputs), asked, gradient, create_graph=True))
            return next(found) if wanted[0] else None, next(found) if wanted[1] else None, None
        by_positions = torch.empty_like(positions)
        count = len(frequencies) if wanted[1] else 0
        by_frequencies = positions.new_empty((positions.shape[0], count, positions.shape[2]))
        _run("slope", rows, positions, frequencies, aligned(gradient), by_positions, by_frequencies)
        return by_positions if wanted[0] else None, by_frequencies.sum((0, 2)) if wanted[1] else None, None


@cache
def _function(kind: str, itemsize: int) -> Callable:
    return function_of(f"waves of attention, {kind}", waves_module, (kind, itemsize), 4)


def _run(
    kind: str,
    rows: WaveRows,
    positions: Tensor,
    frequencies: Tensor,
    waves: Tensor,
    by_positions: Tensor | None = None,
    by_frequencies: Tensor | None = None,
) -> None:
    num_directions, blocks = len(rows.roots), positions.shape[0]
    starts = np.array(rows.starts, dtype=np.int64)
    # a matrix without rows has no address; 0 means the diagonal one
    matrices = np.array([0 if matrix is None else matrix.data_ptr() or -1 for matrix in rows.matrices], dtype=np.int64)
    frequencies = frequencies.detach().contiguous()
    directions, positions = rows.directions.contiguous(), aligned(positions)
    numbers = {
        "num_directions": num_directions, "num_frequencies": len(frequencies), "num_waves": rows.padded,
        "directions": directions.data_ptr(), "frequencies": frequencies.data_ptr(),
        "positions": positions.data_ptr(), "starts": starts.ctypes.data, "matrices": matrices.ctypes.data,
        "roots": rows.roots.data_ptr(), "waves": waves.data_ptr(),
    }  # fmt: skip
    if by_positions is not None:
        numbers["by_positions"] = by_positions.data_ptr()
    if by_frequencies is not None and by_frequencies.numel():
        numbers["by_frequencies"] = by_frequencies.data_ptr()
    work = positions.numel() // 3 * num_directions * (rows.padded + 20 * len(frequencies))
    function = _function(kind, positions.element_size())
    run_kernel(Task(function, ARGUMENTS, numbers, num_scratch(num_directions), blocks // 2, work))
