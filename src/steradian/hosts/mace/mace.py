"""MACE: higher-order equivariant message passing (Batatia et al. 2022, arXiv:2206.07697).

Follows the published implementation number for number (mace-torch 0.3.16: ``RealAgnosticInteractionBlock``,
``RealAgnosticResidualInteractionBlock``, the ``Density`` variants of both, ``EquivariantProductBasisBlock``) on
features ``[N, D, C]``. Edge vectors run from receiver to sender here, so the odd harmonics have the opposite sign.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from steradian.config import MACEConfig
from steradian.equivariant.irreps import Degrees, natural_degrees
from steradian.equivariant.linear import ElementLinear, IrrepsLinear, PathLinear
from steradian.equivariant.symmetric_contraction import SymmetricContraction
from steradian.equivariant.tensor_product import ChannelwiseTensorProduct
from steradian.graph import Edges, Graph
from steradian.graph.topology import Rows
from steradian.hosts.base import ConvolutionHost, HostOutput, TrainingFacts
from steradian.hosts.mace.elements import make_repulsion, make_transform
from steradian.operators.base import EdgeGate, GateFactory, GlobalMixer, MixerFactory, SlotSpec, empty_slot
from steradian.precision import WithRole
from steradian.radial import SILU_SECOND_MOMENT, RadialBasis, RadialNetwork

__all__ = ["MACE", "MACELayer"]


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
        divisor = 1.0 if dense else avg_num_neighbors
        self.linear_message = PathLinear(self.product.table, channels, dims.degrees_message, divisor=divisor)
        self.density = nn.Parameter(torch.randn(config.radial.num, 1)) if dense else None
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
        """Features ``[N, D_out, C]`` and alpha ``[E]`` (None without a gate) from features ``[N, D_in, C]``."""
        alpha = None if self.gate is None else self.gate(features, edges)
        weights = self.radial_network(edges.pair_radial, lengths=edges.pair_lengths)  # [Q, P, C]
        messages = self.product(self.linear_up(features), edges, weights, alpha)  # [N, D_paths, C]
        messages = self.linear_message(messages)  # [N, D_message, C]
        if self.density is not None:
            messages = messages / self._density_of(self.density, edges)
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
            )
            layers.append(
                MACELayer(
                    dims, config, config.avg_num_neighbors or facts.avg_num_neighbors, make_gate(spec), make_mixer(spec)
                )
            )
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
        for layer, readout in zip(self.layers, self.readouts):
            features, alpha = layer(features, species, positions, edges)
            energies = energies + readout(features[:, 0])
            if alpha is not None:
                gates.append(alpha)
        return HostOutput(self.scale * energies + self.shift, tuple(gates))
