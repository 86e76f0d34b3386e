"""Rotary attention over all atoms of every system, at linear cost or pair by pair, whichever is less work.

:mod:`steradian.operators.efa.paper` says what is computed. Here sums over atoms are formed once per system, direction
and frequency: with the phase ``p_i = ω u . x_i`` of atom i,

.. math:: \\cos(p_i - p_j) = \\cos p_i \\cos p_j + \\sin p_i \\sin p_j , \\quad
          \\sin(p_i - p_j) = \\sin p_i \\cos p_j - \\cos p_i \\sin p_j ,

so turned queries and keys meet in two sums of products (waves of i times waves of j) that need no pair of atoms. Of two
opposite directions one is enough: what is even in the direction keeps the cosine of the difference (with the scalar
product of query and key), what is odd its sine (with their cross product, :func:`_crossed`).

Systems of similar size are arranged in blocks, so that sums over systems are batched products of matrices. Machine code
on a CPU, Triton on a GPU and plain PyTorch give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from steradian.graph.share import Share
from steradian.operators.efa.cpu import attend_isolated
from steradian.operators.efa.paper import QKV
from steradian.operators.efa.rules import DirectionRule
from steradian.operators.efa.sums import (
    PLAIN,
    PlainSums,
    apply_moments,
    attend_pairs,
    moments,
    pairs_are_cheaper,
    plane_waves,
)
from steradian.polynomials.backend import backend_for, may_serve

if TYPE_CHECKING:
    from steradian.operators.efa.triton import TritonSums

__all__ = ["SystemBlock", "Waves", "arranged", "attend_block", "join_blocks", "rotary_attention"]

NUMBERS_OF_MOMENTS = 1 << 18
"""Moments of so many numbers exist at a time (and for the derivative of the attention all of them)."""
WORTH_PADDING = 1.2
"""Systems share a block while the padded block has at most this many times the atoms."""


@dataclass(frozen=True)
class Waves:
    """Plane waves and how their products are summed. Of two opposite wave vectors one is listed, and counts for both.

    Attributes:
        vectors: ``[m, 3]`` directions, or wave vectors [1/Å].
        frequencies: ``[n]`` factor on them for each pair of channels [1/Å], or ``[1]`` for all pairs.
        even, odd: ``[L, m, n]`` (or ``[L, m, 1]``) weights for L results, even or odd in the wave vector.
        rule: where the only result is the mean over the directions of a rule.
        share: sum keys and values over processes too. Keys of atoms that do not count are zero, positions centred.
        low: format that factors of the sums are rounded to on a GPU, if not theirs; sums are float32.
    """

    vectors: Tensor
    frequencies: Tensor
    even: Tensor
    odd: Tensor | None = None
    rule: DirectionRule | None = None
    share: Share | None = None
    low: torch.dtype | None = None

    @classmethod
    def of_rule(
        cls,
        rule: DirectionRule,
        frequencies: Tensor,
        functions: tuple[Tensor, Tensor] | None = None,
        share: Share | None = None,
        low: torch.dtype | None = None,
    ) -> Waves:
        """The mean over a rule's directions of the attention itself, or of its products with functions of the
        direction: their values ``[A, m]`` for those that are even in u, ``[O, m]`` for those that are odd."""
        if functions is None:
            even = rule.weights[None, :, None]
            return cls(rule.directions, frequencies, even, rule=rule, share=share, low=low)
        even, odd = ((values * rule.weights).unsqueeze(-1) for values in functions)
        return cls(rule.directions, frequencies, even, odd, share=share, low=low)

    @property
    def num_results(self) -> int:
        """L, even and odd ones."""
        return len(self.even) + (0 if self.odd is None else len(self.odd))


def rotary_attention(atoms: QKV, waves: Waves, sizes: Sequence[int]) -> Tensor:
    """Attention of every atom to all atoms of its system (itself included), averaged over directions.

    ``y_i = sum_u w_u sum_j <q_i(u), k_j(u)> v_j`` as in :mod:`steradian.operators.efa.paper`.

    Args:
        atoms: queries, keys, values and positions.
        waves: directions, frequencies and weights.
        sizes: number of atoms of every system, in the order of the atoms.

    Returns:
        ``[N, L, D_v, F_v]``, even results first.

    Raises:
        ValueError: shapes that do not fit.
    """
    queries, keys, values, positions = atoms
    if queries.shape[-1] % 2:
        raise ValueError(f"channels rotate in pairs; there are {queries.shape[-1]}, an odd number")
    if queries.shape != keys.shape or len(waves.frequencies) * 2 != queries.shape[-1]:
        shapes = f"queries {list(queries.shape)}, keys {list(keys.shape)}"
        raise ValueError(f"{shapes} and {len(waves.frequencies)} frequencies do not fit")
    blocks, place = arranged(tuple(sizes), values.device)
    parts = []
    for block in blocks:
        q, k, v, x = (block.take(tensor) for tensor in (queries, keys, values.flatten(1), positions))
        x = block.centred(x) if waves.share is None else x
        if waves.rule is not None and waves.share is None and _has_machine_code(atoms, waves.rule):
            parts.append(attend_isolated(q, k, v, x, waves.frequencies, waves.rule))
        else:
            parts.append(attend_block(q, k, v, x, waves))
    shape = len(values), waves.num_results, *values.shape[1:]
    return join_blocks(parts, place).view(shape) if parts else values.new_zeros(shape)


def _has_machine_code(atoms: QKV, rule: DirectionRule) -> bool:
    queries, _, values, positions = atoms
    one_type = queries.dtype == values.dtype == positions.dtype == rule.directions.dtype
    if not (one_type and values.numel() and queries.numel()):
        return False
    return backend_for(queries, values, positions) == "cpu" and rule.waves is not None


# -------------------------------------------------------------------------------------------------- one block, plainly


def attend_block(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, waves: Waves) -> Tensor:
    """``[B, N, L e]`` in B systems of N atoms.

    Args:
        queries, keys: ``[B, N, D, F]``.
        values: ``[B, N, e]``.
        positions: ``[B, N, 3]``.
        waves: as in :func:`rotary_attention`.
    """
    queries, keys = _channel_pairs(queries), _channel_pairs(keys)
    values, positions = values.transpose(1, 2).contiguous(), positions.transpose(1, 2)
    shape = positions.shape[-1], 2 * len(waves.vectors), queries.shape[1], queries.shape[2], values.shape[1]
    in_pairs = waves.share is None and pairs_are_cheaper(*shape)
    return (_pairwise if in_pairs else _linear)(queries, keys, values, positions, waves).transpose(1, 2)


def _linear(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, waves: Waves) -> Tensor:
    """``[B, L e, N]`` from ``[B, n, a, N]``, ``[B, e, N]`` and ``[B, 3, N]``; even results first, then odd ones."""
    crossed, num_pairs, num_atoms = _crossed(queries), queries.shape[1], positions.shape[-1]
    if len(waves.frequencies) == 1:  # one phase for all pairs
        queries, keys, crossed = (tensor.flatten(1, 2).unsqueeze(1) for tensor in (queries, keys, crossed))
    way, out = _sums_for(keys, values.shape[1], waves.low), None
    if num_atoms % way.aligned:
        padding = 0, -num_atoms % way.aligned
        queries, crossed, keys, values, positions = (
            pad(tensor, padding) for tensor in (queries, crossed, keys, values, positions)
        )
    for chunk in _chunks(len(waves.vectors), keys, values):
        turning = plane_waves(torch.matmul(waves.vectors[chunk], positions), waves.frequencies)
        sums = moments(turning, keys, values, way=way)
        if waves.share is not None:
            sums = waves.share.sum(sums)
        sums = sums.view(sums.shape[0], turning.shape[1], 2, num_pairs, -1, sums.shape[-1])  # [B, m, 2, n, a, e]
        parts = []
        if len(waves.even):
            parts.append(apply_moments(_weighted(sums, waves.even[:, chunk]), turning, queries, way=way))
        if waves.odd is not None and len(waves.odd):
            odd = _weighted(_quarter_turn(sums), waves.odd[:, chunk])
            parts.append(apply_moments(odd, turning, crossed, way=way))
        part = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        out = part if out is None else out + part
    assert out is not None
    return out[..., :num_atoms]


def _pairwise(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, waves: Waves) -> Tensor:
    """As :func:`_linear`, pair by pair."""
    num_pairs = queries.shape[1]
    turning = plane_waves(torch.matmul(waves.vectors, positions), waves.frequencies)
    turning = turning.permute(0, 3, 2, 1, 4)  # [B, n or 1, 2, m, N]
    quarter = torch.stack([turning[:, :, 1], -turning[:, :, 0]], dim=2)
    joined = [tensor.flatten(0, 1) for tensor in (queries, _crossed(queries), keys)]
    parts = []
    for weights, left, query in ((waves.even, turning, joined[0]), (waves.odd, quarter, joined[1])):
        if weights is None:
            continue
        both = left.expand(-1, num_pairs, -1, -1, -1).flatten(2, 3).flatten(0, 1)
        for function in weights:  # [m, n or 1]
            right = (turning * function.T[:, None, :, None]).flatten(2, 3)
            right = right.expand(-1, num_pairs, -1, -1).flatten(0, 1)
            parts.append(attend_pairs(both, right, query, joined[2], values))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _sums_for(keys: Tensor, num_values: int, low: torch.dtype | None) -> PlainSums | TritonSums:
    """How sums of keys ``[B, n, a, N]`` with so many values are formed: by Triton on a GPU in up to 32 bits where it is
    installed and agrees with the plain way, else plainly."""
    if not may_serve(keys):
        return PLAIN
    from steradian.operators.efa.triton import triton_sums

    return triton_sums(keys, num_values, low) or PLAIN


def _weighted(sums: Tensor, weights: Tensor) -> Tensor:
    """Moments ``[B, m, 2, n, a, e]`` times each of L weights ``[L, m, n]``: ``[B, m 2 n a, L e]``."""
    by_row = weights.permute(1, 2, 0)[:, None, :, None, :, None]  # [m, 1, n, 1, L, 1]
    return (sums.unsqueeze(5) * by_row).flatten(5).flatten(1, 4)


def _quarter_turn(sums: Tensor) -> Tensor:
    """Moments that make sin(a - b) = sin a cos b - cos a sin b out of the cosine and sine of a."""
    return torch.stack([-sums[:, :, 1], sums[:, :, 0]], dim=2)


def _crossed(queries: Tensor) -> Tensor:
    """Pairs ``(-q1, q0)``; the second half of the axis a holds the second channels of the pairs."""
    first, second = queries.chunk(2, dim=2)
    return torch.cat([-second, first], dim=2)


def _channel_pairs(features: Tensor) -> Tensor:
    """``[B, N, D, F] -> [B, F / 2, 2 D, N]``."""
    batch, num_atoms, num_components, num_channels = features.shape
    pairs = features.view(batch, num_atoms, num_components, num_channels // 2, 2)
    return pairs.permute(0, 3, 4, 2, 1).reshape(batch, num_channels // 2, 2 * num_components, num_atoms)


def _chunks(num_points: int, keys: Tensor, values: Tensor) -> Iterator[slice]:
    per_point = 2 * keys[..., 0].numel() * values.shape[1]
    allowed = NUMBERS_OF_MOMENTS << (6 if keys.is_cuda else 0)  # a GPU has more to fill
    size = max(1, allowed // max(1, per_point))
    number = -(-num_points // size)
    size = -(-num_points // number)  # chunks of equal size
    for start in range(0, num_points, size):
        yield slice(start, min(start + size, num_points))


# ---------------------------------------------------------------------------------------------------- blocks of systems


@dataclass(frozen=True)
class SystemBlock:
    """Some systems of similar size.

    Attributes:
        systems: which systems, in order.
        num_atoms: atoms of the largest one.
        atoms: ``[B * num_atoms]`` atom of every place, N (beyond the last atom) for padding; None where the block is
            the whole batch in order.
        counts: ``[B]`` atoms of each system; None where nothing is padded.
    """

    systems: tuple[int, ...]
    num_atoms: int
    atoms: Tensor | None = None
    counts: Tensor | None = None

    def centred(self, positions: Tensor) -> Tensor:
        """``[B, num_atoms, 3]`` positions about the mean of their system, zero for padding.

        Only differences matter to the attention, and small phases have more digits. Sums have a fixed order.
        """
        with torch.no_grad():
            counts = self.num_atoms if self.counts is None else self.counts.to(positions)[:, None, None]
            mean = positions.sum(1, keepdim=True) / counts
        moved = positions - mean
        if self.counts is None:
            return moved
        places = torch.arange(self.num_atoms, device=positions.device)
        return torch.where((places < self.counts[:, None]).unsqueeze(2), moved, 0.0)

    def take(self, values: Tensor) -> Tensor:
        """``[N, ...]`` to ``[B, num_atoms, ...]``, zeros for padding."""
        if self.atoms is not None:
            if self.counts is not None:
                values = torch.cat([values, values.new_zeros((1, *values.shape[1:]))])
            values = values.index_select(0, self.atoms)
        return values.unflatten(0, (len(self.systems), self.num_atoms))


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is kept must serve a gradient too
def arranged(sizes: tuple[int, ...], device: torch.device) -> tuple[list[SystemBlock], Tensor | None]:
    """Blocks that hold every system with atoms once, and for :func:`join_blocks` the place of every atom.

    Args:
        sizes: number of atoms of every system.
        device: where index tensors shall lie.
    """
    present = [number for number, size in enumerate(sizes) if size]
    if len({sizes[number] for number in present}) <= 1:
        return ([SystemBlock(tuple(present), sizes[present[0]])] if present else []), None
    groups: list[list[int]] = []
    for number in sorted(present, key=lambda number: sizes[number]):
        if groups and len(groups[-1] + [number]) * sizes[number] <= WORTH_PADDING * (
            sum(sizes[member] for member in groups[-1]) + sizes[number]
        ):
            groups[-1].append(number)
        else:
            groups.append([number])
    starts, total = torch.tensor(sizes).cumsum(0) - torch.tensor(sizes), sum(sizes)
    blocks, place, offset = [], torch.empty(total, dtype=torch.int64), 0
    for group in groups:
        counts, places = torch.tensor([sizes[number] for number in group]), torch.arange(sizes[group[-1]])
        known = places < counts.unsqueeze(1)
        atoms = torch.where(known, starts[group].unsqueeze(1) + places, total)
        place[atoms[known]] = offset + torch.nonzero(known.flatten()).squeeze(1)
        offset += atoms.numel()
        padded = None if bool(known.all()) else counts.to(device)
        blocks.append(SystemBlock(tuple(group), len(places), atoms.flatten().to(device), padded))
    return blocks, place.to(device)


def join_blocks(parts: Sequence[Tensor], place: Tensor | None) -> Tensor:
    """Values of every block ``[B, num_atoms, ...]`` back to ``[N, ...]``."""
    flat = [part.flatten(0, 1) for part in parts]
    return flat[0] if place is None else torch.cat(flat).index_select(0, place)
