"""Euclidean Fast Attention: global, equivariant, at linear cost.

Frank, Chmiela, Müller, Unke, "Euclidean Fast Attention: Machine Learning Global Atomic Representations at Linear Cost"
(2024, arXiv:2412.08541; Nature Machine Intelligence 2026).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steradian.compiler.capture import capturing
from steradian.config import EFAConfig
from steradian.config.efa import TensorIntegrationConfig
from steradian.equivariant.dense import Dense, change_degrees, gated
from steradian.equivariant.harmonics import spherical_harmonics
from steradian.equivariant.irreps import (
    Degrees,
    all_degrees,
    dim,
    has_pseudotensors,
    max_degree,
    natural_degrees,
)
from steradian.equivariant.paths import CoupledProduct, coupled_degrees
from steradian.graph.sharing import Share
from steradian.operators.efa.attention import DirectionRule, rotary_attention
from steradian.operators.efa.limits import RESOLVED, SizeWatch, graded_points, resolved_phase
from steradian.operators.efa.periodic import reciprocal_attention, waves_of_cells
from steradian.operators.efa.systems import RunOfSystems, runs_of_systems
from steradian.precision import WithRole
from steradian.sphere.grids import lebedev

__all__ = ["EuclideanFastAttention", "TensorIntegration", "frequencies_up_to"]


def frequencies_up_to(max_frequency: float, max_length: float, count: int) -> Tensor:
    """``[count]`` equally spaced frequencies from 0 to ``max_frequency / max_length`` [1/Å]; one alone is the largest.

    Args:
        max_frequency: dimensionless: the largest phase that atoms ``max_length`` apart differ by.
        max_length: [Å].
        count: one per pair of channels.
    """
    largest = max_frequency / max_length
    if count == 1:
        return torch.tensor([largest], dtype=torch.float64)
    return torch.linspace(0.0, largest, count, dtype=torch.float64)


def _nominal(degrees: Degrees, highest: int | None, pseudotensors: bool | None, what: str) -> Degrees:
    """The complete list of irreps up to ``highest`` with or without pseudotensors; None: as in ``degrees``."""
    present = max_degree(degrees)
    if highest is not None and highest > present:
        raise ValueError(f"{what} {highest} is asked for, but the features end at degree {present}")
    top = present if highest is None else highest
    both = has_pseudotensors(degrees) if pseudotensors is None else pseudotensors
    return all_degrees(top) if both else natural_degrees(top)


class TensorIntegration(nn.Module):
    """Integral over the sphere of the product of two equivariant functions.

    ``z = sum_m w_m C(f(u_m), g(u_m))`` with the coupled product C of :mod:`steradian.equivariant.paths`.

    Args:
        first, second: irreps of f and g.
        num_channels: C.
        highest, pseudotensors: of the result; see :func:`steradian.equivariant.paths.coupled_degrees`.
        learned: a learned number per path and channel instead of one.
    """

    def __init__(
        self,
        first: Degrees,
        second: Degrees,
        num_channels: int,
        highest: int | None = None,
        pseudotensors: bool = True,
        learned: bool = False,
    ) -> None:
        super().__init__()
        out = coupled_degrees(first, second, highest, pseudotensors)
        self.product = CoupledProduct(first, second, out, num_channels, learned=learned)
        self.degrees_out = self.product.degrees_out

    def forward(self, first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
        """``[N, D, C]`` from ``[m, D1, C]`` or ``[N, m, D1, C]``, ``[N, m, D2, C]`` and weights ``[m]``.

        Raises:
            ValueError: the numbers of points differ.
        """
        if not first.shape[-3] == second.shape[-3] == len(weights):
            raise ValueError(f"{first.shape[-3]}, {second.shape[-3]} and {len(weights)} points do not fit")
        first = first * weights[:, None, None]
        return self.of_pairs(
            torch.einsum("...mxc,nmyc->nxyc", first, second)
            if first.ndim == 3
            else torch.einsum("nmxc,nmyc->nxyc", first, second)
        )

    def of_pairs(self, pairs: Tensor) -> Tensor:
        """The same from the integrals of all products of components, ``[N, D1, D2, C]``."""
        return self.product.of_pairs(pairs)


@dataclass(frozen=True)
class Band:
    """Pairs of channels with one rule, and for tensor integration harmonics, even and odd, at its directions."""

    pairs: slice
    rule: DirectionRule
    functions: tuple[Tensor, Tensor] | None

    def to(self, like: Tensor) -> Band:
        functions = None if self.functions is None else (self.functions[0].to(like), self.functions[1].to(like))
        return Band(self.pairs, self.rule.to(like), functions)


def _odd_components(l_max: int) -> Tensor:
    return torch.tensor([degree % 2 for degree in range(l_max + 1) for _ in range(2 * degree + 1)], dtype=torch.bool)


def _harmonics(directions: Tensor, degree_scaling: list[float] | None) -> tuple[Tensor, Tensor] | None:
    """``[A, m]`` and ``[O, m]`` harmonics whose squares sum to the squared factor of their degree."""
    if degree_scaling is None:
        return None
    l_max = len(degree_scaling) - 1
    values = spherical_harmonics(directions, l_max).T.clone()  # [(l + 1)^2, m]
    for degree, factor in enumerate(degree_scaling):
        values[degree**2 : (degree + 1) ** 2] *= factor / math.sqrt(2 * degree + 1)
    odd = _odd_components(l_max)
    return values[~odd], values[odd]


class EuclideanFastAttention(WithRole):
    """Every atom attends to all atoms of its system: ``[N, D, C] -> [N, D', C_v]``.

    Queries, keys and values are linear maps of the features. Rotating them by their positions along the directions of a
    Lebedev rule makes attention depend on distances; integrating over the directions makes it equivariant. With tensor
    integration, the attention along u is coupled with harmonics of u first, so directions between atoms count too.

    Args:
        config: the options, except those of the block around it (``max_degree``, ``include_pseudotensors``,
            ``emulate``, ``zero_init``, ``layers``).
        degrees: irreps of the features, 0e first.
        num_channels: C.
        nominal: the irreps that the features are said to have, where some of them are missing because they would be
            zero; highest degrees and the scale of the scores go by these.
        unit: keep weights of unit variance; see :class:`steradian.equivariant.dense.Dense`.

    Attributes:
        degrees_out, channels_out: of the result.
        frequencies: ``[n]`` [1/Å], one per pair of channels of queries and keys.

    Rotation invariance holds as far as the rule integrates plane waves: see
    :func:`steradian.operators.efa.limits.resolved_phase`.

    Raises:
        ValueError: options that do not fit the features; the message names them.
    """

    role = "attention"

    def __init__(
        self,
        config: EFAConfig,
        degrees: Degrees,
        num_channels: int,
        *,
        nominal: Degrees | None = None,
        unit: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.degrees, self.num_channels = config, degrees, num_channels
        self.nominal = nominal or degrees
        self.grid = lebedev(config.num_points)
        nominal_qk = _nominal(self.nominal, config.max_degree_qk, config.include_pseudotensors_qk, "max_degree_qk")
        nominal_v = _nominal(self.nominal, config.max_degree_v, config.include_pseudotensors_v, "max_degree_v")
        # irreps that are asked for but not there would be zeros; only the scale of the scores knows of them
        self.degrees_qk = tuple(irrep for irrep in degrees if irrep in nominal_qk)
        self.degrees_v = tuple(irrep for irrep in degrees if irrep in nominal_v)
        channels_qk, self.channels_out = config.num_features_qk or num_channels, config.num_features_v or num_channels
        if channels_qk % 2:
            raise ValueError(
                f"queries and keys need an even number of channels, not {channels_qk}: set num_features_qk"
            )
        self.size = dim(nominal_qk) * channels_qk
        self.query = self.key = self.value = None
        if config.parametrized:
            self.query, self.key = (Dense(self.degrees_qk, num_channels, channels_qk, unit=unit) for _ in range(2))
            self.value = Dense(self.degrees_v, num_channels, self.channels_out, unit=unit)
        start = frequencies_up_to(config.max_frequency, config.max_length_A, channels_qk // 2)
        self.frequencies: Tensor
        if config.trainable_frequencies:
            self.frequencies = nn.Parameter(start.to(torch.get_default_dtype()))
        else:
            self.register_buffer("frequencies", start, persistent=False)
        self._start = start
        self.shell_width = config.shell_width_per_A or float(start[-1]) / max(1, len(start) - 1)
        self._degree_scaling: list[float] | None = None
        self.integration: TensorIntegration | None = None
        if config.tensor_integration is not None:
            self.integration = self._make_integration(config.tensor_integration, nominal_v)
        self._bands = self._make_bands()
        self.watch = SizeWatch(config.num_points)
        self.degrees_out = self.degrees_v if self.integration is None else self.integration.degrees_out
        self._place()

    def _make_integration(self, config: TensorIntegrationConfig, nominal_v: Degrees) -> TensorIntegration:
        present, pseudotensors = max_degree(self.nominal), has_pseudotensors(self.nominal)
        l_sph = present if config.max_degree_sph is None else config.max_degree_sph
        if config.degree_scaling is not None and len(config.degree_scaling) != l_sph + 1:
            raise ValueError(f"degree_scaling lists {len(config.degree_scaling)} factors for degrees 0..{l_sph}")
        highest = present if config.max_degree is None else config.max_degree
        wanted = pseudotensors if config.include_pseudotensors is None else config.include_pseudotensors
        out = coupled_degrees(natural_degrees(l_sph), nominal_v, highest, wanted)
        integration = TensorIntegration(
            natural_degrees(l_sph),
            self.degrees_v,
            self.channels_out,
            highest,
            has_pseudotensors(out),
            config.learned_paths,
        )
        self._degree_scaling = config.degree_scaling or [1.0] * (l_sph + 1)
        odd = _odd_components(l_sph)
        self._order = torch.cat([torch.nonzero(~odd), torch.nonzero(odd)]).squeeze(1).argsort()
        return integration

    def _make_bands(self) -> list[Band]:
        """Neighbouring pairs of channels that share a rule; one band unless the rules are graded."""
        count, points = len(self._start), self.config.num_points
        chosen = [points] * count
        if self.config.graded:
            phases = self._start * self.config.max_length_A
            extra = 0 if self._degree_scaling is None else len(self._degree_scaling) - 1
            chosen = graded_points(points, self.config.max_frequency, phases, extra)
        bands, start = [], 0
        for stop in range(1, count + 1):
            if stop == count or chosen[stop] != chosen[start]:
                grid = lebedev(chosen[start])
                rule = DirectionRule.from_grid(grid.points, grid.weights)
                bands.append(Band(slice(start, stop), rule, _harmonics(rule.directions, self._degree_scaling)))
                start = stop
        return bands

    # ------------------------------------------------------------------------------------------- constants of the grid

    def _place(self) -> None:
        """Grid and fixed frequencies in the dtype and on the device of the parameters, always from float64."""
        like = next((p.detach() for p in self.parameters()), self.frequencies.detach())
        self.bands = [band.to(like) for band in self._bands]
        if not self.config.trainable_frequencies:
            self.frequencies = self._start.to(like)
        if self.integration is not None:
            self.order = self._order.to(like.device)

    def _apply(self, fn: Any, recurse: bool = True) -> EuclideanFastAttention:
        super()._apply(fn, recurse)
        self._place()
        return self

    @property
    def largest_frequency(self) -> float:
        """[1/Å]"""
        if self.config.trainable_frequencies:
            return float(self.frequencies.detach().abs().max())
        return float(self._start.max())

    def summary(self) -> str:
        """What the attention resolves, in words."""
        largest = self.largest_frequency
        reach = resolved_phase(self.config.num_points) / largest
        points = [band.rule for band in self.bands]
        graded = f" ({2 * len(points[0].weights)} to {2 * len(points[-1].weights)} points)" if len(points) > 1 else ""
        parts = [
            f"{len(self.frequencies)} frequencies up to {largest:.3g}/Å",
            f"{self.grid.name}{graded} resolves systems up to {reach:.0f} Å (error of a plane wave {RESOLVED:.0e})",
        ]
        if self.config.periodic:
            parts.append(f"crystals: shells of wave numbers of half width {self.shell_width:.3g}/Å")
        return "; ".join(parts)

    # -------------------------------------------------------------------------------------------------------- forward

    def forward(
        self,
        features: Tensor,
        positions: Tensor,
        system: Tensor,
        num_systems: int = 1,
        cell: Tensor | None = None,
        pbc: Tensor | None = None,
        share: Share | None = None,
    ) -> Tensor:
        """Attention of every atom, ``[N, D', C_v]``.

        Args:
            features: ``[N, D, C]``.
            positions: ``[N, 3]`` [Å], differentiable.
            system: ``[N]`` ascending index of each atom's system; atoms of different systems do not see each other.
            num_systems: S.
            cell: ``[S, 3, 3]`` lattice vectors as rows [Å], differentiable; used where the system is periodic.
            pbc: ``[S, 3]`` periodicity; None where nothing is.
            share: atoms that count where a single system is spread over processes; positions are centred then.

        Raises:
            ValueError: a periodic system without ``periodic`` in the options, or one that is not periodic in all
                directions.
        """
        queries, keys, values = self.projections(features)
        if share is not None:
            keys = torch.where(share.owned[:, None, None], keys, 0.0)
        runs = None if pbc is None or cell is None else runs_of_systems(system, pbc)
        if runs is None or cell is None:
            out = self._isolated(queries, keys, values, positions, system, num_systems, share)
        elif not self.config.periodic:
            raise ValueError(
                "this attention was built for molecules; for periodic systems set global_mixer.periodic=true"
            )
        else:
            out = self._mixed(queries, keys, values, positions, system, cell, runs, share)
        if self.integration is not None:
            out = self.integration.of_pairs(out.index_select(1, self.order))
        return out if self.config.divide_by == 1.0 else out / self.config.divide_by

    def _isolated(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        system: Tensor,
        num_systems: int,
        share: Share | None,
    ) -> Tensor:
        if not capturing():
            self.watch.look(positions, system, num_systems, lambda: self.largest_frequency)
        out: Tensor | None = None
        for band in self.bands:
            channels = slice(2 * band.pairs.start, 2 * band.pairs.stop)
            part = rotary_attention(
                queries[..., channels],
                keys[..., channels],
                values,
                positions,
                self.frequencies[band.pairs],
                band.rule,
                system,
                num_systems,
                size=self.size,
                functions=band.functions,
                share=share,
                low=self.low,
            )
            out = part if out is None else out + part
        assert out is not None
        return out

    def _mixed(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        system: Tensor,
        cell: Tensor,
        runs: list[RunOfSystems],
        share: Share | None,
    ) -> Tensor:
        """Crystals one by one, everything else together."""
        longest = self._largest() + self.shell_width
        waves = waves_of_cells(cell, [run.first for run in runs if run.periodic], longest)
        scaling, parts = None if self.integration is None else self._degree_scaling, []
        for run in runs:
            given = queries[run.atoms], keys[run.atoms], values[run.atoms], positions[run.atoms]
            if not run.periodic:
                parts.append(self._isolated(*given, run.system, run.count, share))
                continue
            out = reciprocal_attention(
                *given,
                cell[run.first],
                self.frequencies,
                self.shell_width,
                size=self.size,
                degree_scaling=scaling,
                share=share,
                low=self.low,
                integers=waves[run.first],
            )
            parts.append(out)
        return torch.cat(parts) if parts else self._isolated(queries, keys, values, positions, system, 1, share)

    def _largest(self) -> float:
        """The largest frequency, not its absolute value [1/Å]."""
        return float((self.frequencies.detach() if self.config.trainable_frequencies else self._start).max())

    def projections(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys ``[N, D_qk, C_qk]``, activated, and values ``[N, D_v, C_v]``."""
        for_qk = change_degrees(features, self.degrees, self.degrees_qk)
        for_v = change_degrees(features, self.degrees, self.degrees_v)
        if self.query is None or self.key is None or self.value is None:
            activated = gated(for_qk, self.config.activation)
            return activated, activated, for_v
        queries, keys = (gated(layer(for_qk), self.config.activation) for layer in (self.query, self.key))
        return queries, keys, self.value(for_v)
