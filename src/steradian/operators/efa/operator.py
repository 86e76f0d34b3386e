"""Euclidean Fast Attention: global, equivariant, at linear cost; and as a block of a host's layer.

The module with its weights, :class:`EuclideanFastAttention`: queries, keys and values from features, then the attention
over directions of molecules and over wave vectors of crystals, then the coupling with harmonics. What the paper writes
is in :mod:`steradian.operators.efa.paper`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steradian.config import EFAConfig
from steradian.config.operators import TensorIntegrationConfig
from steradian.equivariant.irreps import (
    Degrees,
    all_degrees,
    dim,
    has_pseudotensors,
    max_degree,
    natural_degrees,
)
from steradian.equivariant.linear import MLP, Dense, activate, add_features, change_degrees, union
from steradian.equivariant.paths import CoupledProduct, coupled_degrees
from steradian.equivariant.sphere import lebedev
from steradian.graph import Edges
from steradian.graph.share import Share
from steradian.operators.base import GlobalMixer, MixerFactory, Rotation, SlotSpec, in_layer
from steradian.operators.efa.attention import Waves, rotary_attention
from steradian.operators.efa.paper import QKV, frequencies_up_to
from steradian.operators.efa.periodic import parity_harmonics, reciprocal_attention
from steradian.operators.efa.rules import RESOLVED, DirectionRule, SizeWatch, graded_points, resolved_phase
from steradian.precision import WithRole

__all__ = [
    "EFAMixer",
    "EuclideanFastAttention",
    "Systems",
    "TensorIntegration",
    "efa_factory",
    "nominal_degrees",
]


def nominal_degrees(degrees: Degrees, highest: int | None, pseudotensors: bool | None, what: str) -> Degrees:
    """The complete list of irreps up to ``highest`` with or without pseudotensors; None: as in ``degrees``."""
    present = max_degree(degrees)
    if highest is not None and highest > present:
        raise ValueError(f"{what} {highest} is asked for, but the features end at degree {present}")
    top = present if highest is None else highest
    both = has_pseudotensors(degrees) if pseudotensors is None else pseudotensors
    return all_degrees(top) if both else natural_degrees(top)


class Systems(NamedTuple):
    """Which atoms belong together.

    Attributes:
        sizes: number of atoms of every system, in the order of the atoms; different systems do not see each other.
        is_static: a step of fixed shapes is recorded or traced: nothing may be asked of the device.
    """

    sizes: tuple[int, ...]
    is_static: bool = False


class TensorIntegration(nn.Module):
    """Coupling of harmonics of the direction with the attention along it (Frank et al., equation 14).

    Args:
        product: of the harmonics' irreps with those of the values.
    """

    def __init__(self, product: CoupledProduct) -> None:
        super().__init__()
        self.product, self.degrees_out = product, product.degrees_out

    def forward(self, pairs: Tensor) -> Tensor:
        """``[N, D, C]`` from ``[N, D1, D2, C]``: integrals over the directions of all products of components."""
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
        unit: keep weights of unit variance; see :class:`steradian.equivariant.linear.Dense`.

    Attributes:
        degrees_out, channels_out: of the result.
        frequencies: ``[n]`` [1/Å], one per pair of channels of queries and keys.

    Rotation invariance holds as far as the rule integrates plane waves: see
    :func:`steradian.operators.efa.rules.resolved_phase`.

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
        nominal_qk = nominal_degrees(
            self.nominal, config.max_degree_qk, config.include_pseudotensors_qk, "max_degree_qk"
        )
        nominal_v = nominal_degrees(self.nominal, config.max_degree_v, config.include_pseudotensors_v, "max_degree_v")
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
        harmonics = natural_degrees(l_sph)
        pseudotensors = has_pseudotensors(coupled_degrees(harmonics, nominal_v, highest, wanted))
        out = coupled_degrees(harmonics, self.degrees_v, highest, pseudotensors)
        product = CoupledProduct(harmonics, self.degrees_v, out, self.channels_out, learned=config.learned_paths)
        self._degree_scaling = config.degree_scaling or [1.0] * (l_sph + 1)
        degrees = torch.tensor([degree for degree in range(l_sph + 1) for _ in range(2 * degree + 1)])
        # where each harmonic is among the results, even degrees of which come first
        self._order = torch.cat([torch.nonzero(degrees % 2 == parity) for parity in (0, 1)]).squeeze(1).argsort()
        return TensorIntegration(product)

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
                rule, functions = DirectionRule.from_grid(lebedev(chosen[start])), None
                if self._degree_scaling is not None:
                    even, odd = parity_harmonics(rule.directions, self._degree_scaling)
                    functions = even, odd
                bands.append(Band(slice(start, stop), rule, functions))
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
        systems: Systems,
        cell: Tensor | None = None,
        pbc: Tensor | None = None,
        share: Share | None = None,
    ) -> Tensor:
        """Attention of every atom, ``[N, D', C_v]``.

        Args:
            features: ``[N, D, C]``.
            positions: ``[N, 3]`` [Å], differentiable.
            systems: which atoms see each other.
            cell: ``[S, 3, 3]`` lattice vectors as rows [Å], differentiable; used where the system is periodic.
            pbc: ``[S, 3]`` periodicity; None where nothing is.
            share: atoms that count where a single system is spread over processes; positions are centred then.

        Raises:
            ValueError: a periodic system without ``periodic`` in the options, or one that is not periodic in all
                directions.
            RuntimeError: a step with periodic systems is being recorded on a GPU.
        """
        queries, keys, values = self.projections(features)
        if share is not None:
            keys = torch.where(share.owned[:, None, None], keys, 0.0)
        atoms = QKV(queries * self.size**-0.5, keys, values, positions)
        periodic = [] if pbc is None or cell is None else _periodic(pbc, systems.is_static)
        if not any(periodic) or cell is None:
            out = self._isolated(atoms, systems, share)
        elif not self.config.periodic:
            raise ValueError(
                "this attention was built for molecules; for periodic systems set global_mixer.periodic=true"
            )
        else:
            out = self._mixed(atoms, systems, cell, periodic, share)
        out = out.squeeze(1) if self.integration is None else self.integration(out.index_select(1, self.order))
        return out if self.config.divide_by == 1.0 else out / self.config.divide_by

    def _isolated(self, atoms: QKV, systems: Systems, share: Share | None) -> Tensor:
        """``[N, L, D_v, C_v]`` of molecules, band by band."""
        if not systems.is_static:
            self.watch.look(atoms.positions, systems.sizes, lambda: self.largest_frequency)
        out: Tensor | None = None
        for band in self.bands:
            waves = Waves.of_rule(band.rule, self.frequencies[band.pairs], band.functions, share, self.low)
            part = rotary_attention(atoms.channels(band.pairs), waves, systems.sizes)
            out = part if out is None else out + part
        assert out is not None
        return out

    def _mixed(self, atoms: QKV, systems: Systems, cell: Tensor, periodic: list[bool], share: Share | None) -> Tensor:
        """The same for crystals one by one, and all molecules between two of them together."""
        scaling, parts, first = None if self.integration is None else self._degree_scaling, [], 0
        for _, run in groupby(range(len(periodic)), lambda number: number if periodic[number] else -1):
            numbers = list(run)
            sizes = tuple(systems.sizes[number] for number in numbers)
            own = atoms.of(slice(first, first + sum(sizes)))
            first += sum(sizes)
            if not sum(sizes):
                continue
            if not periodic[numbers[0]]:
                parts.append(self._isolated(own, systems._replace(sizes=sizes), share))
                continue
            part = reciprocal_attention(
                own, cell[numbers[0]], self.frequencies, self.shell_width, longest=self._largest(),
                degree_scaling=scaling, share=share, low=self.low,
            )  # fmt: skip
            parts.append(part)
        return torch.cat(parts) if parts else self._isolated(atoms, systems, share)

    def _largest(self) -> float:
        """The largest frequency, not its absolute value [1/Å]."""
        return float((self.frequencies.detach() if self.config.trainable_frequencies else self._start).max())

    def projections(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys ``[N, D_qk, C_qk]``, activated, and values ``[N, D_v, C_v]``."""
        for_qk = change_degrees(features, self.degrees, self.degrees_qk)
        for_v = change_degrees(features, self.degrees, self.degrees_v)
        if self.query is None or self.key is None or self.value is None:
            activated = activate(for_qk, self.config.activation)
            return activated, activated, for_v
        queries, keys = (activate(layer(for_qk), self.config.activation) for layer in (self.query, self.key))
        return queries, keys, self.value(for_v)


def _periodic(pbc: Tensor, is_static: bool) -> list[bool]:
    """Which systems are periodic, from ``[S, 3]``.

    Raises:
        RuntimeError: a step is being recorded, which must not wait for a GPU.
        ValueError: a system is periodic in some directions only.
    """
    if pbc.is_cuda and (is_static or torch.cuda.is_current_stream_capturing()):
        raise RuntimeError(
            "attention in crystals has as many wave vectors as the cell wants: such a step cannot be recorded; "
            "where no system is periodic, say so by periodic=False in the graph"
        )
    directions = pbc.tolist()
    if any(any(row) != all(row) for row in directions):
        raise ValueError("the attention needs systems that are periodic in all three directions or in none")
    return [all(row) for row in directions]


# ---------------------------------------------------------------------------------------- as a block of a host's layer


class EFAMixer(GlobalMixer):
    """``MLP(Dense(EFA(x')) + x)`` with x' the irreps of x that may enter (Frank et al. 2024, figure 2).

    Args:
        config: the options.
        spec: the slot. In a host that adds updates of any irreps x is the layer's input, else its local update, so that
            the last layer attends with what the atoms know of their surroundings.

    Attributes:
        degrees_out: irreps of the update.

    Raises:
        ValueError: options that do not fit the slot's irreps.
    """

    rotation: Rotation = "quadrature"

    def __init__(self, config: EFAConfig, spec: SlotSpec) -> None:
        super().__init__()
        self.supports_pbc = config.periodic
        unit, channels = spec.unit_weights, spec.channels_out or spec.num_channels
        self.source = config.source or ("input" if spec.degrees_out is None else "update")
        degrees = spec.degrees if self.source == "input" or spec.degrees_out is None else spec.degrees_out
        if self.source == "input" and channels != spec.num_channels:
            raise ValueError(
                f"layer {spec.layer} of {spec.host} turns {spec.num_channels} channels into {channels}: "
                "set model.global_mixer.source=update"
            )
        present = max_degree(degrees)
        highest, both = present if config.max_degree is None else config.max_degree, config.include_pseudotensors
        if spec.scalars_only:
            highest, both = 0, False
        elif present == 0:
            highest = 0
        allowed = all_degrees(highest) if both else natural_degrees(highest)
        self.degrees, self.degrees_in = degrees, tuple(irrep for irrep in degrees if irrep in allowed)
        self.attention: EuclideanFastAttention | Dense
        if config.emulate:
            self.attention, self.degrees_h, width = Dense(degrees, channels, channels, unit=unit), degrees, channels
        else:
            self.attention = EuclideanFastAttention(config, self.degrees_in, channels, nominal=allowed, unit=unit)
            self.degrees_h, width = self.attention.degrees_out, self.attention.channels_out
        self.dense = Dense(self.degrees_h, width, channels, unit=unit)
        self.degrees_sum = union(self.degrees_h, degrees)
        self.degrees_out = spec.degrees_out or self.degrees_sum
        self.mlp = MLP(self.degrees_sum, channels, zero=config.zero_init, unit=unit)

    def summary(self) -> str:
        if not isinstance(self.attention, EuclideanFastAttention):
            return "EFA emulated by a linear map"
        return f"EFA on the {'layer input' if self.source == 'input' else 'local update'}; {self.attention.summary()}"

    def global_update(self, features: Tensor, local_update: Tensor, positions: Tensor, edges: Edges) -> Tensor:
        x = features if self.source == "input" else local_update
        if isinstance(self.attention, EuclideanFastAttention):
            entering = change_degrees(x, self.degrees, self.degrees_in)
            systems = Systems(edges.topology.sizes, edges.topology.is_static)
            h = self.attention(entering, positions, systems, edges.cell, edges.pbc, edges.share)
        else:
            h = self.attention(x)
        total, _ = add_features(self.dense(h), self.degrees_h, x, self.degrees)
        return change_degrees(self.mlp(total), self.degrees_sum, self.degrees_out)


def efa_factory(config: EFAConfig) -> MixerFactory:
    """The factory that fills the slots of global mixers as a configuration section says.

    It raises ValueError where ``config.layers`` lists a layer that the model does not have.
    """

    def make(spec: SlotSpec) -> GlobalMixer | None:
        return EFAMixer(config, spec) if in_layer(config.layers, spec, "model.global_mixer") else None

    return make
