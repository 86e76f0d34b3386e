"""Rotary encoding and rotary attention over all atoms of a system at linear cost.

Frank, Chmiela, Müller, Unke, "Euclidean Fast Attention" (2024, arXiv:2412.08541). Channels come in pairs (2n, 2n + 1),
each with a frequency; along a direction u the pair of atom i is turned by the angle ``frequency * u . x_i``. The dot
product of a turned query and a turned key depends on the difference of the positions only, and its mean over all
directions on their distance: ``sin(w r) / (w r)`` for scalars. Sums over atoms are formed once per system, direction
and frequency, so the cost is linear.

A rule with the opposite of every direction needs half of them: cosines and sines of one direction are those of the
other, up to a sign.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from steradian.graph.sharing import Share
from steradian.operators.efa.pairs import attend_pairs, pairs_are_cheaper
from steradian.operators.efa.sums import PLAIN, apply_moments, moments, plane_waves, way_for
from steradian.operators.efa.systems import blocks_of_systems, join_blocks
from steradian.operators.efa.triton import ALIGNED
from steradian.polynomials.backend import backend_for

__all__ = [
    "DirectionRule",
    "Waves",
    "attend_one_system",
    "attention_per_direction",
    "rotary_attention",
    "rotary_encoding",
]

NUMBERS_OF_MOMENTS = 1 << 18
"""Moments of so many numbers exist at a time (and for the derivative of the attention all of them)."""


@dataclass(frozen=True)
class DirectionRule:
    """Directions to average over.

    Attributes:
        directions: ``[m, 3]`` unit vectors.
        weights: ``[m]``; those of all directions together sum to one.
        symmetric: the opposite of every direction belongs to the rule too, is not listed, and its weight is counted in.
    """

    directions: Tensor
    weights: Tensor
    symmetric: bool

    @classmethod
    def from_grid(cls, points: Tensor, weights: Tensor) -> DirectionRule:
        """The rule of a grid ``[K, 3]`` with weights ``[K]`` of any sum; half of it where it has inversion symmetry."""
        weights = weights / weights.sum()
        apart = torch.cdist(points.double(), -points.double(), compute_mode="donot_use_mm_for_euclid_dist")
        distance, opposite = apart.min(1)
        own = torch.arange(len(points), device=points.device)
        same_weight = (weights - weights[opposite]).abs() <= 1e-10 * weights.abs().max()
        if bool((distance < 1e-10).all() and same_weight.all() and (opposite[opposite] == own).all()):
            first = own < opposite
            return cls(points[first], 2 * weights[first], True)
        return cls(points, weights, False)

    def to(self, like: Tensor) -> DirectionRule:
        """Cast and move."""
        return DirectionRule(self.directions.to(like), self.weights.to(like), self.symmetric)


def rotary_encoding(features: Tensor, phases: Tensor) -> Tensor:
    """Turn the channel pairs (2n, 2n + 1) by an angle each.

    Args:
        features: ``[..., D, F]`` with an even number of channels F.
        phases: ``[..., F / 2]`` angles; leading axes broadcast with those of the features.

    Returns:
        ``x'[2n] = x[2n] cos - x[2n + 1] sin`` and ``x'[2n + 1] = x[2n + 1] cos + x[2n] sin``.

    Raises:
        ValueError: an odd number of channels.
    """
    _check_even(features)
    cosine, sine = phases.cos().unsqueeze(-2), phases.sin().unsqueeze(-2)
    first, second = features[..., ::2], features[..., 1::2]
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.stack(turned, dim=-1).flatten(-2)


def rotary_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    rule: DirectionRule,
    system: Tensor,
    num_systems: int = 1,
    *,
    size: int | None = None,
    functions: tuple[Tensor, Tensor] | None = None,
    share: Share | None = None,
    low: torch.dtype | None = None,
) -> Tensor:
    """Attention of every atom to all atoms of its system (itself included), averaged over directions.

    ``y_i = sum_u w_u sum_j <q_i(u), k_j(u)> v_j / sqrt(size)`` with queries and keys turned by :func:`rotary_encoding`.
    There is no softmax and no division by the number of atoms.

    Args:
        queries, keys: ``[N, D, F]``, F even.
        values: ``[N, D_v, F_v]``.
        positions: ``[N, 3]`` [Å].
        frequencies: ``[F / 2]`` [1/Å].
        rule: directions u with weights w.
        system: ``[N]`` ascending index of each atom's system.
        num_systems: S.
        size: numbers per query that the square root is taken of; None for D F.
        functions: average the product with functions of the direction in place of the attention alone: their values
            ``[A, m]`` for those that are even in u, ``[O, m]`` for those that are odd.
        share: sum keys and values over processes; keys of atoms that do not count are zero, positions are centred.
        low: format that factors of the sums are rounded to on a GPU, if not theirs; sums are float32.

    Returns:
        ``[N, D_v, F_v]``, or ``[N, A + O, D_v, F_v]`` with functions.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_even(queries)
    if queries.shape != keys.shape or frequencies.shape[-1] * 2 != queries.shape[-1]:
        raise ValueError(
            f"queries {list(queries.shape)}, keys {list(keys.shape)} and {frequencies.shape[-1]} frequencies do not fit"
        )
    scale = (size or queries.shape[1] * queries.shape[2]) ** -0.5
    waves = _waves_of_rule(rule, frequencies, functions, share, low)
    blocks, place = blocks_of_systems(system, num_systems)
    compiled = functions is None and share is None and _has_machine_code(queries, values, positions, rule)
    parts = []
    for block in blocks:
        q, k, v, x = (block.take(given) for given in (queries * scale, keys, values.flatten(1), positions))
        x = x if share is not None else block.centred(x)
        run = _attend_compiled(q, k, v, x, frequencies, rule) if compiled else _attend_block(q, k, v, x, waves)
        parts.append(run)
    rows = 1 if functions is None else len(functions[0]) + len(functions[1])
    if not parts:
        return values.new_zeros((0, *([] if functions is None else [rows]), *values.shape[1:]))
    out = join_blocks(parts, place)
    return out.view(values.shape) if functions is None else out.view(len(values), rows, *values.shape[1:])


def _attend_compiled(q: Tensor, k: Tensor, v: Tensor, x: Tensor, frequencies: Tensor, rule: DirectionRule) -> Tensor:
    from steradian.operators.efa.cpu import attend_isolated

    return attend_isolated(q, k, v, x, frequencies, rule.directions, rule.weights)


def _attend_block(q: Tensor, k: Tensor, v: Tensor, x: Tensor, waves: Waves) -> Tensor:
    """``[B, N, L e]`` from ``[B, N, D, F]``, ``[B, N, e]`` and ``[B, N, 3]``."""
    v, x = v.transpose(1, 2).contiguous(), x.transpose(1, 2)
    return _attend(_channel_pairs(q), _channel_pairs(k), v, x, waves).transpose(1, 2)


def _has_machine_code(queries: Tensor, values: Tensor, positions: Tensor, rule: DirectionRule) -> bool:
    one_type = queries.dtype == values.dtype == positions.dtype == rule.directions.dtype
    if not (one_type and rule.symmetric and values.numel() and queries.numel()):
        return False
    return backend_for(queries, values, positions) == "cpu" and bool((rule.weights >= 0).all())


@dataclass(frozen=True)
class Waves:
    """Plane waves and how their products are summed.

    Attributes:
        vectors: ``[m, 3]`` directions, or wave vectors [1/Å].
        frequencies: ``[n]`` factor on them for each pair of channels, or ``[1]`` for all pairs.
        even, odd: ``[L, m, n]`` (or ``[L, m, 1]``) weights for L results, even or odd in the wave vector.
        symmetric: the opposite of every vector belongs to the sum, is not listed, and is counted in the weights.
        share: sum over processes too.
        low: format that factors are rounded to on a GPU, if not theirs.
    """

    vectors: Tensor
    frequencies: Tensor
    even: Tensor
    odd: Tensor | None
    symmetric: bool
    share: Share | None = None
    low: torch.dtype | None = None


def _waves_of_rule(
    rule: DirectionRule,
    frequencies: Tensor,
    functions: tuple[Tensor, Tensor] | None,
    share: Share | None,
    low: torch.dtype | None,
) -> Waves:
    if functions is None:
        return Waves(rule.directions, frequencies, rule.weights[None, :, None], None, rule.symmetric, share, low)
    even, odd = ((values * rule.weights).unsqueeze(-1) for values in functions)
    return Waves(rule.directions, frequencies, even, odd, rule.symmetric, share, low)


def attend_one_system(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, waves: Waves) -> Tensor:
    """``[N, A, D_v, F_v]`` for atoms of one system; shapes as in :func:`rotary_attention`, queries scaled."""
    q, k = (_channel_pairs(features.unsqueeze(0)) for features in (queries, keys))
    v = values.flatten(1).T.unsqueeze(0).contiguous()
    out = _attend(q, k, v, positions.T.unsqueeze(0), waves)
    return out[0].T.reshape(len(values), -1, *values.shape[1:])


def _attend(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, waves: Waves) -> Tensor:
    """``[B, L e, N]`` from ``[B, n, a, N]``, ``[B, e, N]`` and ``[B, 3, N]``; even results first, then odd ones."""
    crossed, num_pairs = _crossed(queries), queries.shape[1]
    num_points = len(waves.vectors)
    if waves.symmetric and waves.share is None:
        shape = positions.shape[-1], 2 * num_points, num_pairs, queries.shape[2], values.shape[1]
        if pairs_are_cheaper(*shape):
            return _attend_pairs(queries, crossed, keys, values, positions, waves)
    if len(waves.frequencies) == 1:  # one phase for all pairs
        queries, keys, crossed = (tensor.flatten(1, 2).unsqueeze(1) for tensor in (queries, keys, crossed))
    way, out = way_for(keys, values.shape[1], waves.low), None
    num_atoms = positions.shape[-1]
    if way is not PLAIN and num_atoms % ALIGNED:
        padding = 0, -num_atoms % ALIGNED
        queries, crossed, keys, values, positions = (
            pad(tensor, padding) for tensor in (queries, crossed, keys, values, positions)
        )
    for chunk in _chunks(num_points, keys, values):
        turning = plane_waves(torch.matmul(waves.vectors[chunk], positions), waves.frequencies)
        sums = moments(turning, keys, values, way=way)
        if waves.share is not None:
            sums = waves.share.sum(sums)
        sums = sums.view(sums.shape[0], turning.shape[1], 2, num_pairs, -1, sums.shape[-1])  # [B, m, 2, n, a, e]
        even, odd = waves.even[:, chunk], None if waves.odd is None else waves.odd[:, chunk]
        if waves.symmetric:
            parts = [apply_moments(_weighted(sums, even), turning, queries, way=way)] if len(even) else []
            if odd is not None and len(odd):
                parts.append(apply_moments(_weighted(_quarter_turn(sums), odd), turning, crossed, way=way))
        else:
            both = even if odd is None else torch.cat([even, odd])
            part = apply_moments(_weighted(sums, both), turning, queries, way=way)
            parts = [part + apply_moments(_weighted(_quarter_turn(sums), both), turning, crossed, way=way)]
        part = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        out = part if out is None else out + part
    assert out is not None
    return out[..., :num_atoms]


def _attend_pairs(
    queries: Tensor, crossed: Tensor, keys: Tensor, values: Tensor, positions: Tensor, waves: Waves
) -> Tensor:
    """As :func:`_attend` for a symmetric rule, pair by pair."""
    turning = plane_waves(torch.matmul(waves.vectors, positions), waves.frequencies)
    num_pairs = queries.shape[1]
    turning = turning.permute(0, 3, 2, 1, 4)  # [B, n or 1, 2, m, N]
    quarter = torch.stack([turning[:, :, 1], -turning[:, :, 0]], dim=2)
    joined = [tensor.flatten(0, 1) for tensor in (queries, crossed, keys)]
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


def _check_even(features: Tensor) -> None:
    if features.shape[-1] % 2:
        raise ValueError(f"channels rotate in pairs; there are {features.shape[-1]}, an odd number")


def attention_per_direction(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    directions: Tensor,
    system: Tensor,
    num_systems: int = 1,
    *,
    size: int | None = None,
) -> Tensor:
    """What :func:`rotary_attention` averages: ``[N, m, D_v, F_v]`` for directions ``[m, 3]``, without weights.

    Plain and not fast: for inspection, and to integrate it with other functions of the direction.
    """
    scale = (size or queries.shape[1] * queries.shape[2]) ** -0.5
    blocks, place = blocks_of_systems(system, num_systems)
    parts = []
    for block in blocks:
        q, k, x = block.take(queries * scale), block.take(keys), block.centred(block.take(positions))
        v, found = block.take(values).flatten(2), []
        for direction in directions:
            phases = (x @ direction).unsqueeze(-1) * frequencies
            turned_q, turned_k = rotary_encoding(q, phases).flatten(2), rotary_encoding(k, phases).flatten(2)
            found.append(turned_q @ (turned_k.transpose(1, 2) @ v))
        parts.append(torch.stack(found, dim=2))
    return join_blocks(parts, place).unflatten(2, values.shape[1:])
