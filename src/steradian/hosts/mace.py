"""MACE: higher-order equivariant message passing (Batatia et al. 2022, arXiv:2206.07697).

Follows the published implementation number for number (mace-torch 0.3.16: ``RealAgnosticInteractionBlock``,
``RealAgnosticResidualInteractionBlock``, the ``Density`` variants of both, ``EquivariantProductBasisBlock``) on
features ``[N, D, C]``. Edge vectors run from receiver to sender here, so the odd harmonics have the opposite sign.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from steradian.config import MACEConfig
from steradian.config.precision import ElementTablesConfig
from steradian.equivariant.irreps import Degrees, natural_degrees
from steradian.equivariant.linear import ElementLinear, IrrepsLinear, PathLinear
from steradian.equivariant.symmetric_contraction import SymmetricContraction
from steradian.equivariant.tensor_product import ChannelwiseTensorProduct, num_paths
from steradian.graph import Edges, Graph
from steradian.graph.share import from_owners
from steradian.graph.topology import Rows
from steradian.hosts.base import ConvolutionHost, HostOutput, TrainingFacts, message_divisor
from steradian.operators.base import EdgeGate, GateFactory, GlobalMixer, MixerFactory, SlotSpec, empty_slot
from steradian.precision import WithRole
from steradian.radial import SILU_SECOND_MOMENT, RadialBasis, RadialNetwork, polynomial_envelope

__all__ = [
    "AgnesiTransform",
    "LowRank",
    "MACE",
    "MACELayer",
    "NuclearRepulsion",
    "RoundedRows",
    "SoftTransform",
    "compress_element_tables",
    "make_repulsion",
    "make_transform",
]


@dataclass(frozen=True)
class LayerDims:
    """Sizes of one layer: irreps that enter, that are gathered from neighbours (A), and that leave."""

    degrees_in: Degrees
    degrees_message: Degrees
    degrees_out: Degrees
    num_channels: int
    num_elements: int
    correlation: int
    block: str

    @property
    def residual(self) -> bool:
        return self.block.endswith("residual")


class MACELayer(nn.Module):
    """One interaction and one product basis (Batatia et al. 2022, equations 8-11).

    1. mix channels of the features; 2. gather, multiply with harmonics and radial weights, sum over neighbours (A);
    3. mix paths; 4. symmetric contraction (B); 5. mix channels and add the skip connection by element.

    The *residual* block takes the skip connection from the layer's input; the other one applies the element-dependent
    map to A and has no skip connection. A *density* block divides A by one plus a learned density of neighbours instead
    of the average number of them.
    """

    def __init__(
        self,
        dims: LayerDims,
        config: MACEConfig,
        avg_num_neighbors: float,
        gate: EdgeGate | None,
        mixer: GlobalMixer | None,
    ) -> None:
        super().__init__()
        channels = dims.num_channels
        self.linear_up = IrrepsLinear(dims.degrees_in, channels, channels)
        self.product = ChannelwiseTensorProduct(dims.degrees_in, config.l_max, dims.degrees_message)
        self.radial_network = RadialNetwork(config.radial.num, config.radial_mlp, self.product.num_paths, channels)
        dense = dims.block.startswith("density")
        divisor = 1.0 if dense else message_divisor(config.message_scale, avg_num_neighbors)
        self.linear_message = PathLinear(self.product.table, channels, dims.degrees_message, divisor=divisor)
        self.density = nn.Parameter(torch.randn(config.radial.num, 1)) if dense else None
        self.message_gain = nn.Parameter(torch.ones(())) if config.message_scale == "learned" and not dense else None
        self.residual = dims.residual
        skip_degrees = _shared(dims.degrees_in, dims.degrees_out) if dims.residual else dims.degrees_message
        self.skip = ElementLinear(skip_degrees, dims.num_elements, channels, channels)
        self.contraction = SymmetricContraction(
            dims.degrees_message, dims.degrees_out, dims.correlation, dims.num_elements, channels
        )
        self.linear_out = IrrepsLinear(dims.degrees_out, channels, channels)
        self.dim_out = sum(2 * degree + 1 for degree, _ in dims.degrees_out)
        self.gate = gate
        self.mixer = mixer

    def forward(self, features: Tensor, species: Rows, positions: Tensor, edges: Edges) -> tuple[Tensor, Tensor | None]:
        """Features ``[N, D_out, C]`` and alpha (None without a gate) from features ``[N, D_in, C]``."""
        alpha = None if self.gate is None else self.gate(features, edges)
        weights = self.radial_network(edges.pair_radial, lengths=edges.pair_lengths)  # [Q, P, C]
        messages = self.product(self.linear_up(features), edges, weights, alpha)  # [N, D_paths, C]
        messages = self.linear_message(messages)  # [N, D_message, C]
        if self.density is not None:
            messages = messages / self._density_of(self.density, edges)
        if self.message_gain is not None:
            messages = messages * self.message_gain
        if not self.residual:
            messages = self.skip(messages, species)
        update = self.linear_out(self.contraction(messages, species))  # [N, D_out, C]
        if self.residual:
            update = _add(update, self.skip(features[:, : _dim(self.skip.degrees)], species))
        if self.mixer is not None:
            update = self.mixer(features, update, positions, edges)
        return update, alpha

    def _density_of(self, density: Tensor, edges: Edges) -> Tensor:
        """One plus the learned density of neighbours of every atom ``[N, 1, 1]``."""
        per_edge = torch.tanh((edges.radial @ density * density.shape[0] ** -0.5).square())
        summed = per_edge.new_zeros((edges.num_atoms, 1)).index_add(0, edges.receivers, per_edge)
        return (summed + 1.0).unsqueeze(2)


def _shared(degrees_in: Degrees, degrees_out: Degrees) -> Degrees:
    """Irreps of the input that can be skipped to the output; both lists start alike, so these are the first ones."""
    count = min(len(degrees_in), len(degrees_out))
    return degrees_out[:count]


def _dim(degrees: Degrees) -> int:
    return sum(2 * degree + 1 for degree, _ in degrees)


def _add(update: Tensor, skipped: Tensor) -> Tensor:
    """Sum where the skip connection may have fewer irreps (the first layer's input has scalars only)."""
    missing = update.shape[1] - skipped.shape[1]
    return update + (nn.functional.pad(skipped, (0, 0, 0, missing)) if missing else skipped)


class Readout(WithRole):
    """Energy of every atom from its scalars ``[N, C]``: a linear map or, with ``hidden``, one hidden SiLU layer."""

    role = "readout"
    takes_int8 = True

    def __init__(self, num_channels: int, hidden: int | None) -> None:
        super().__init__()
        widths = [num_channels, 1] if hidden is None else [num_channels, hidden, 1]
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(a, b)) for a, b in itertools.pairwise(widths))

    def forward(self, scalars: Tensor) -> Tensor:
        first, *others = self.weights  # a slice of a ParameterList would make new parameters of traced weights
        x = self.multiply(scalars, first) * first.shape[0] ** -0.5
        for place, weight in enumerate(others, 1):
            active = nn.functional.silu(x) * SILU_SECOND_MOMENT
            x = self.multiply(active, weight, place=place) * weight.shape[0] ** -0.5
        return x.squeeze(-1).to(scalars.dtype)


class MACE(ConvolutionHost):
    """MACE with two slots per layer.

    Args:
        config: hyper-parameters.
        facts: of the training set. The number of neighbours divides the messages; ``config.avg_num_neighbors`` wins
            where it is set.
        make_gate, make_mixer: factories of the operators in the slots; return None for an empty slot.

    Reference: Batatia et al. 2022; scale and shift as in ``ScaleShiftMACE``.
    """

    def __init__(
        self,
        config: MACEConfig,
        facts: TrainingFacts,
        make_gate: GateFactory = empty_slot,
        make_mixer: MixerFactory = empty_slot,
    ) -> None:
        super().__init__()
        self.cutoff = config.cutoff_A
        self.l_max = config.l_max
        self.envelope_p = config.radial.envelope_p
        self.embedding = nn.Parameter(torch.randn(facts.num_elements, config.num_channels))
        self.radial_basis = RadialBasis(config.radial, config.cutoff_A)
        self.distance_transform = make_transform(config.distance_transform, facts.elements)
        self.repulsion = make_repulsion(config.pair_repulsion, facts.elements, config.radial.envelope_p)
        hidden = natural_degrees(config.hidden_l)
        scalars = natural_degrees(0)
        neighbors = config.avg_num_neighbors or facts.avg_num_neighbors
        layers, readouts = [], []
        for index in range(config.num_layers):
            first, last = index == 0, index == config.num_layers - 1
            block = config.first_interaction if first else config.interaction
            dims = LayerDims(
                degrees_in=scalars if first else hidden,
                degrees_message=natural_degrees(config.l_max),
                degrees_out=scalars if last else hidden,
                num_channels=config.num_channels,
                num_elements=facts.num_elements,
                correlation=config.correlations[index],
                block=block,
            )
            spec = SlotSpec(
                host="mace",
                layer=index,
                num_layers=config.num_layers,
                degrees=dims.degrees_in,
                num_channels=config.num_channels,
                cutoff=config.cutoff_A,
                num_radial=config.radial.num,
                degrees_out=dims.degrees_out,
                avg_num_neighbors=neighbors,
                l_max=config.l_max,
                num_weights=num_paths(dims.degrees_in, config.l_max, dims.degrees_message),
            )
            layers.append(MACELayer(dims, config, neighbors, make_gate(spec), make_mixer(spec)))
            readouts.append(Readout(config.num_channels, config.readout.mlp if last else None))
        self.layers = nn.ModuleList(layers)
        self.readouts = nn.ModuleList(readouts)
        self.place_scale(facts)

    def tabulate_radial(self, num_intervals: int) -> float | None:
        # with a transform the weights depend on the elements, too
        return None if self.distance_transform is not None else super().tabulate_radial(num_intervals)

    def forward(self, graph: Graph, species: Rows, positions: Tensor, vectors: Tensor) -> HostOutput:
        pairs = {"species": species.index, "senders": graph.senders, "receivers": graph.receivers}
        transform = None if self.distance_transform is None else partial(self.distance_transform, **pairs)
        edges = self.edges(graph, vectors, transform)
        features = (self.embedding * self.embedding.shape[0] ** -0.5).index_select(0, species.index).unsqueeze(1)
        energies = torch.zeros_like(features[:, 0, 0])
        if self.repulsion is not None:
            energies = energies + self.repulsion(edges.lengths, **pairs, pick=not edges.topology.is_static)
        gates = []
        for index, (layer, readout) in enumerate(zip(self.layers, self.readouts)):
            if index:
                features = from_owners(features, edges.share)
            features, alpha = layer(features, species, positions, edges)
            energies = energies + readout(features[:, 0])
            if alpha is not None:
                gates.append(alpha)
        return HostOutput(self.scale * energies + self.shift, tuple(gates))


# ------------------------------------------------------------------------------------------------------------ elements


BOHR = 0.529
"""Bohr radius [Å] with the digits of the published models."""
COULOMB = 14.3996
"""e^2 / (4 pi epsilon_0) [eV Å]."""
SCREENING = ((0.1818, 3.2), (0.5099, 0.9423), (0.2802, 0.4028), (0.02817, 0.2016))
"""Weights and decay rates of the universal screening function (Ziegler, Biersack, Littmark 1985)."""


def covalent_radii(elements: Sequence[int]) -> Tensor:
    """``[Z]`` radii [Å] of the elements, in their order."""
    from ase.data import covalent_radii as table

    return torch.tensor([float(table[number]) for number in elements], dtype=torch.float64)


class _PairModule(nn.Module):
    """Holds the radii of the model's elements."""

    radii: Tensor

    def __init__(self, elements: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("radii", covalent_radii(elements))

    def sum_of_radii(self, species: Tensor, senders: Tensor, receivers: Tensor) -> Tensor:
        """``[E]`` [Å]."""
        radii = self.radii.index_select(0, species)
        return radii.index_select(0, senders) + radii.index_select(0, receivers)


class AgnesiTransform(_PairModule):
    """``1 / (1 + a x^q / (1 + x^(q - p)))`` with ``x = r / r_0``, r_0 the mean of the two covalent radii.

    1 at distance zero, and falling to 0 (Witt et al. 2023, J. Chem. Phys. 159, 164101, section on transforms).
    """

    a: Tensor
    q: Tensor
    p: Tensor

    def __init__(self, elements: Sequence[int]) -> None:
        super().__init__(elements)
        for name, value in (("a", 1.0805), ("q", 0.9183), ("p", 4.5791)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))

    def forward(self, lengths: Tensor, species: Tensor, senders: Tensor, receivers: Tensor) -> Tensor:
        """``[E]`` numbers between 0 and 1 from distances ``[E]`` [Å]; species are indices ``[N]``."""
        x = lengths / (0.5 * self.sum_of_radii(species, senders, receivers))
        # x^q / (1 + x^(q - p)), without a negative power
        return 1.0 / (1.0 + self.a * x.pow(self.p) / (1.0 + x.pow(self.p - self.q)))


class SoftTransform(_PairModule):
    """A distance that stops falling near three quarters of the sum r_0 of the covalent radii.

    ``p_0 + (r - p_0) (1 + tanh(alpha (r - m) / (p_1 - p_0))) / 2`` with p_0 = 3/4 r_0, p_1 = 4/3 r_0, m between them.
    """

    alpha: Tensor

    def __init__(self, elements: Sequence[int]) -> None:
        super().__init__(elements)
        self.register_buffer("alpha", torch.tensor(4.0, dtype=torch.float64))

    def forward(self, lengths: Tensor, species: Tensor, senders: Tensor, receivers: Tensor) -> Tensor:
        """``[E]`` [Å] from distances ``[E]`` [Å]; species are indices ``[N]``."""
        touching = self.sum_of_radii(species, senders, receivers)
        low, high = 0.75 * touching, touching * (4.0 / 3.0)
        steepness = self.alpha / (high - low)
        step = 0.5 * (1.0 + torch.tanh(steepness * (lengths - 0.5 * (low + high))))
        return low + (lengths - low) * step


class NuclearRepulsion(_PairModule):
    """Screened Coulomb energy of the nuclei (Ziegler, Biersack, Littmark 1985), ended at the sum of covalent radii.

    Args:
        elements: atomic numbers in the order of the species.
        envelope_p: order of the polynomial that ends it.
    """

    numbers: Tensor
    coefficients: Tensor
    exponent: Tensor
    prefactor: Tensor

    def __init__(self, elements: Sequence[int], envelope_p: int) -> None:
        super().__init__(elements)
        self.envelope_p = envelope_p
        self.register_buffer("numbers", torch.tensor([float(number) for number in elements], dtype=torch.float64))
        self.register_buffer("coefficients", torch.tensor([weight for weight, _ in SCREENING], dtype=torch.float64))
        self.register_buffer("exponent", torch.tensor(0.300, dtype=torch.float64))
        self.register_buffer("prefactor", torch.tensor(0.4543, dtype=torch.float64))

    def forward(
        self, lengths: Tensor, species: Tensor, senders: Tensor, receivers: Tensor, *, pick: bool = True
    ) -> Tensor:
        """``[N]`` [eV]: half of every pair's energy goes to each of its atoms. Arguments as for the transforms.

        Args:
            pick: on a CPU, work on the few pairs that overlap alone; off where shapes must not depend on distances.
        """
        end = self.sum_of_radii(species, senders, receivers)
        if lengths.device.type == "cpu" and pick:
            (near,) = (lengths < end).nonzero(as_tuple=True)  # few: the others are beyond the end
            lengths, end = lengths.index_select(0, near), end.index_select(0, near)
            senders, receivers = senders.index_select(0, near), receivers.index_select(0, near)
        charges = self.numbers.index_select(0, species)
        sizes = charges.pow(self.exponent)
        screening_length = self.prefactor * BOHR / (sizes.index_select(0, senders) + sizes.index_select(0, receivers))
        ratio = lengths / screening_length
        rates = [rate for _, rate in SCREENING]
        screening = sum(weight * torch.exp(-rate * ratio) for weight, rate in zip(self.coefficients.unbind(), rates))
        product = charges.index_select(0, senders) * charges.index_select(0, receivers)
        energies = 0.5 * COULOMB * product / lengths * screening * polynomial_envelope(lengths, end, self.envelope_p)
        return energies.new_zeros(len(species)).index_add(0, receivers, energies)


def make_transform(kind: str | None, elements: Sequence[int]) -> AgnesiTransform | SoftTransform | None:
    """The transform of a configuration; None leaves distances as they are."""
    if kind is None:
        return None
    return AgnesiTransform(elements) if kind == "agnesi" else SoftTransform(elements)


def make_repulsion(kind: str | None, elements: Sequence[int], envelope_p: int) -> NuclearRepulsion | None:
    """The repulsion of a configuration."""
    return None if kind is None else NuclearRepulsion(elements, envelope_p)


# ------------------------------------------------------------------------------------------------------ smaller tables


class LowRank(nn.Module):
    """``[Z, ...]`` from ``[Z, rank]`` and ``[rank, ...]``; a whole table is put in as its best such approximation."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, codes: Tensor, basis: Tensor) -> Tensor:
        return (codes @ basis.flatten(1)).view(len(codes), *basis.shape[1:])

    def right_inverse(self, table: Tensor) -> tuple[Tensor, Tensor]:
        left, sizes, right = torch.linalg.svd(table.flatten(1).double(), full_matrices=False)
        root = sizes[: self.rank].sqrt()
        codes, basis = left[:, : self.rank] * root, root[:, None] * right[: self.rank]
        return codes.to(table.dtype), basis.view(self.rank, *table.shape[1:]).to(table.dtype)


class RoundedRows(nn.Module):
    """Every element's row rounded to ``bits`` bits; gradients pass as if it were not."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.levels = 2 ** (bits - 1) - 1

    def forward(self, table: Tensor) -> Tensor:
        rows = table.detach().flatten(1)
        scale = (rows.abs().amax(1, keepdim=True) / self.levels).clamp(min=1e-30)
        rounded = (torch.round(rows / scale) * scale).view_as(table)
        return table + (rounded - table.detach())

    def right_inverse(self, table: Tensor) -> Tensor:
        return table


def compress_element_tables(host: nn.Module, config: ElementTablesConfig, num_elements: int) -> None:
    """Put the tables of a MACE host into the configured form.

    A random table of low rank is scaled back to the size of its entries, so that the network starts as it would.

    Raises:
        ValueError: another host, or a rank that saves nothing.
    """
    if config.rank is None and config.bits is None:
        return
    tables: list[tuple[nn.Module, str]] = [(host, "embedding")]
    for module in host.modules():
        if isinstance(module, ElementLinear | SymmetricContraction):
            tables.append((module, "weight"))
    if len(tables) == 1:
        raise ValueError("model.element_tables belongs to the host 'mace'")
    if config.rank is not None and config.rank >= num_elements:
        raise ValueError(
            f"model.element_tables.rank ({config.rank}) must be below the number of elements ({num_elements})"
        )
    for module, name in tables:
        if config.rank is not None:
            size = getattr(module, name).detach().square().mean().sqrt()
            parametrize.register_parametrization(module, name, LowRank(config.rank))
            with torch.no_grad():
                left = getattr(module, name).square().mean().sqrt()
                getattr(module.parametrizations, name).original1.mul_(size / left)  # type: ignore[union-attr]
        if config.bits is not None:
            parametrize.register_parametrization(module, name, RoundedRows(config.bits))
