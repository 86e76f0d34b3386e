"""NequIP: equivariant convolutions with gated nonlinearities (Batzner et al. 2022, Nature Communications 13, 2453).

Follows the published implementation number for number (nequip 0.19.1: ``NequIPGNNModel``) on features ``[N, D, C]``.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from steradian.compiler.activations import silu
from steradian.config import NequIPConfig
from steradian.equivariant.irreps import Degrees, dim
from steradian.equivariant.linear import EmbeddedLinear, IrrepsLinear, PathLinear
from steradian.equivariant.tensor_product import ChannelwiseTensorProduct, num_paths
from steradian.graph import Edges, Graph
from steradian.graph.share import from_owners
from steradian.graph.topology import Rows
from steradian.hosts.base import ConvolutionHost, HostOutput, TrainingFacts, message_divisor
from steradian.operators.base import EdgeGate, GateFactory, GlobalMixer, MixerFactory, SlotSpec, empty_slot
from steradian.polynomials import Operand, Polynomial, Terms, evaluate
from steradian.precision import WithRole
from steradian.radial import SILU_SECOND_MOMENT, RadialBasis, RadialNetwork

__all__ = ["NequIP", "NequIPLayer", "layer_degrees"]

TANH_SECOND_MOMENT = 1.5937334472592695
"""1 / sqrt(E[tanh(z)^2]) for a normal z, as sampled by e3nn (the exact value is 1.5927)."""
SILU_GAIN = math.sqrt(2.0)
"""Gain of the radial and readout networks, which do not use the second moment."""

EVEN_SCALAR = (0, 1)


def layer_degrees(config: NequIPConfig) -> list[tuple[Degrees, Degrees]]:
    """Irreps that enter and leave every layer: of the hidden ones, those that some path reaches.

    The order is that of the published features: 0e, 0o, 1e, 1o, ... with parity, 0e, 1o, 2e, ... without.
    """
    parities = [(1, -1) if config.parity else ((-1) ** degree,) for degree in range(config.l_max + 1)]
    hidden = [(degree, parity) for degree, both in enumerate(parities) for parity in both]
    layers = []
    degrees_in: Degrees = (EVEN_SCALAR,)
    for index in range(config.num_layers):
        wanted = [EVEN_SCALAR] if index == config.num_layers - 1 else hidden
        degrees_out = tuple(irrep for irrep in wanted if _reaches(degrees_in, config.l_max, irrep))
        layers.append((degrees_in, degrees_out))
        degrees_in = degrees_out
    return layers


def _reaches(degrees_in: Degrees, l_max: int, irrep: tuple[int, int]) -> bool:
    degree, parity = irrep
    return any(
        abs(degree_in - degree_y) <= degree <= degree_in + degree_y and parity == parity_in * (-1) ** degree_y
        for degree_in, parity_in in degrees_in
        for degree_y in range(l_max + 1)
    )


@cache
def scaling_polynomial(degrees: Degrees) -> Polynomial:
    """``(features [N, D, C], scalars [N, G, C]) -> [N, D, C]``: every irrep times its own scalar per channel."""
    sizes = [2 * degree + 1 for degree, _ in degrees]
    component = np.arange(sum(sizes))
    indices = np.stack([component, np.repeat(np.arange(len(sizes)), sizes)], axis=1)
    return Polynomial(
        (Operand("features", len(component)), Operand("scalars", len(sizes))),
        Operand("scaled", len(component)),
        (Terms((0, 1), indices, component, np.ones(len(component))),),
    )


class Nonlinearity(nn.Module):
    """SiLU of even scalars, tanh of odd ones, every other irrep times SiLU of an even scalar of its own ("gated").

    The activations are rescaled to unit second moment (Batzner et al. 2022, methods; Weiler et al. 2018).

    Args:
        degrees_out: irreps of the result. The even scalars that come in are C of the result's and then C for each irrep
            of degree 1 and higher, in order.
        num_channels: C.
    """

    def __init__(self, degrees_out: Degrees, num_channels: int) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.odd_scalars = (0, -1) in degrees_out
        self.scaled: Degrees = tuple(irrep for irrep in degrees_out if irrep[0] > 0)
        self.polynomial = scaling_polynomial(self.scaled) if self.scaled else None

    def forward(self, blocks: dict[tuple[int, int], Tensor]) -> Tensor:
        """``[N, D, C]`` from one block ``[N, 2 l + 1, channels]`` per irrep."""
        even = (silu(blocks[EVEN_SCALAR]) * SILU_SECOND_MOMENT).unflatten(2, (-1, self.num_channels))
        scalars = even[:, 0]  # [N, 1 + G, C]
        parts = [scalars[:, :1]]
        if self.odd_scalars:
            parts.append(torch.tanh(blocks[0, -1]) * TANH_SECOND_MOMENT)
        if self.polynomial is not None:
            others = [blocks[irrep] for irrep in self.scaled]
            together = others[0] if len(others) == 1 else torch.cat(others, dim=1)
            parts.append(evaluate(self.polynomial, [together, scalars[:, 1:]]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@dataclass(frozen=True)
class LayerDims:
    """Sizes of one layer: irreps and channels that enter, and that leave."""

    degrees_in: Degrees
    degrees_out: Degrees
    channels_in: int
    num_channels: int
    embedding_dim: int
    skip: bool


class NequIPLayer(nn.Module):
    """One interaction block and its nonlinearity (Batzner et al. 2022, figure 1).

    1. mix channels; 2. gather, multiply with harmonics and radial weights, sum over neighbours; 3. mix paths and
    channels; 4. add the skip connection, which depends on the element; 5. gated nonlinearity. The first layer has no
    skip connection, so that an isolated atom has no interaction energy.
    """

    def __init__(
        self,
        dims: LayerDims,
        config: NequIPConfig,
        avg_num_neighbors: float,
        gate: EdgeGate | None,
        mixer: GlobalMixer | None,
    ) -> None:
        super().__init__()
        self.normalization = 1.0 / message_divisor(config.message_scale, avg_num_neighbors)
        self.message_gain = nn.Parameter(torch.ones(())) if config.message_scale == "learned" else None
        self.linear_up = IrrepsLinear(dims.degrees_in, dims.channels_in, dims.channels_in)
        # what leaves the convolution, in e3nn's order: by degree, odd before even
        degrees_message = tuple(sorted(dims.degrees_out))
        self.product = ChannelwiseTensorProduct(dims.degrees_in, config.l_max, degrees_message)
        self.radial_network = RadialNetwork(
            config.radial.num, config.radial_mlp, self.product.num_paths, dims.channels_in, gain=SILU_GAIN
        )
        self.nonlinearity = Nonlinearity(dims.degrees_out, dims.num_channels)
        widths = {irrep: dims.num_channels for irrep in degrees_message}
        widths[EVEN_SCALAR] += len(self.nonlinearity.scaled) * dims.num_channels
        self.linear_message = PathLinear(self.product.table, dims.channels_in, degrees_message, widths)
        self.skip = EmbeddedLinear(dims.degrees_in, dims.channels_in, dims.embedding_dim, widths) if dims.skip else None
        self.dim_out = dim(dims.degrees_out)
        self.gate = gate
        self.mixer = mixer

    def forward(
        self, features: Tensor, species: Rows, embedding: Tensor, positions: Tensor, edges: Edges
    ) -> tuple[Tensor, Tensor | None]:
        """Features ``[N, D_out, C]`` and alpha (None without a gate) from features ``[N, D_in, C_in]``.

        Args:
            features: of the layer before.
            species: ``[N]``.
            embedding: ``[Z, T]`` of the elements.
            positions: ``[N, 3]`` [Å].
            edges: geometry.
        """
        alpha = None if self.gate is None else self.gate(features, edges)
        weights = self.radial_network(edges.pair_radial, lengths=edges.pair_lengths)  # [Q, P, C_in]
        mixed = self.linear_up(features) * self.normalization
        if self.message_gain is not None:
            mixed = mixed * self.message_gain
        blocks = self.linear_message.blocks(self.product(mixed, edges, weights, alpha))
        if self.skip is not None:
            for irrep, block in self.skip(features, species, embedding).items():
                blocks[irrep] = blocks[irrep] + block
        update = self.nonlinearity(blocks)
        if self.mixer is not None:
            update = self.mixer(features, update, positions, edges)
        return update, alpha


class Readout(WithRole):
    """Energy of every atom from its scalars ``[N, C]``: linear, or with hidden SiLU layers."""

    role = "readout"
    takes_int8 = True

    def __init__(self, num_channels: int, hidden: list[int]) -> None:
        super().__init__()
        widths = [num_channels, *hidden, 1]
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(a, b)) for a, b in itertools.pairwise(widths))

    def forward(self, scalars: Tensor) -> Tensor:
        first, *others = self.weights  # a slice of a ParameterList would make new parameters of traced weights
        x = self.multiply(scalars, first) * first.shape[0] ** -0.5
        for place, weight in enumerate(others, 1):
            x = self.multiply(silu(x), weight, place=place) * (SILU_GAIN * weight.shape[0] ** -0.5)
        return x.squeeze(-1).to(scalars.dtype)


class NequIP(ConvolutionHost):
    """NequIP with two slots per layer.

    Args:
        config: hyper-parameters.
        facts: of the training set. Messages are divided by the root of the number of neighbours;
            ``config.avg_num_neighbors`` wins where it is set.
        make_gate, make_mixer: factories of the operators in the slots; return None for an empty slot.

    Scale and shift are one number per element, the same for all at the start.
    """

    def __init__(
        self,
        config: NequIPConfig,
        facts: TrainingFacts,
        make_gate: GateFactory = empty_slot,
        make_mixer: MixerFactory = empty_slot,
    ) -> None:
        super().__init__()
        self.config, self.cutoff = config, config.cutoff_A
        self.l_max = config.l_max
        self.envelope_p = config.radial.envelope_p
        if config.radial.kind == "bessel":  # published: 2 pi n sinc(n r / r_c) / r_c^2
            self.radial_scale = math.sqrt(2.0 / config.cutoff_A)
        channels = config.num_channels
        embedding_dim = config.embedding_dim or channels
        self.embedding = nn.Parameter(torch.randn(facts.num_elements, embedding_dim))
        self.radial_basis = RadialBasis(config.radial, config.cutoff_A)
        layers = []
        neighbors = config.avg_num_neighbors or facts.avg_num_neighbors
        for index, (degrees_in, degrees_out) in enumerate(layer_degrees(config)):
            first = index == 0
            dims = LayerDims(
                degrees_in=degrees_in,
                degrees_out=degrees_out,
                channels_in=embedding_dim if first else channels,
                num_channels=channels,
                embedding_dim=embedding_dim,
                skip=not first,
            )
            spec = SlotSpec(
                host="nequip",
                layer=index,
                num_layers=config.num_layers,
                degrees=degrees_in,
                num_channels=dims.channels_in,
                cutoff=config.cutoff_A,
                num_radial=config.radial.num,
                degrees_out=degrees_out,
                channels_out=channels,
                avg_num_neighbors=neighbors,
                l_max=config.l_max,
                num_weights=num_paths(degrees_in, config.l_max, tuple(sorted(degrees_out))),
            )
            layers.append(NequIPLayer(dims, config, neighbors, make_gate(spec), make_mixer(spec)))
        self.layers = nn.ModuleList(layers)
        self.readout = Readout(channels, config.readout_mlp)
        self._place_scales(config, facts)

    def _place_scales(self, config: NequIPConfig, facts: TrainingFacts) -> None:
        for name, value, trainable in (
            ("scale", facts.scale, config.trainable_scales),
            ("shift", facts.shift, config.trainable_shifts),
        ):
            start = torch.full((facts.num_elements,), float(value), dtype=torch.float64)
            if trainable:
                setattr(self, name, nn.Parameter(start))
            else:
                self.register_buffer(name, start)

    def forward(self, graph: Graph, species: Rows, positions: Tensor, vectors: Tensor) -> HostOutput:
        edges = self.edges(graph, vectors)
        features = self.embedding.index_select(0, species.index).unsqueeze(1)
        gates = []
        for index, layer in enumerate(self.layers):
            if index:
                features = from_owners(features, edges.share)
            features, alpha = layer(features, species, self.embedding, positions, edges)
            if alpha is not None:
                gates.append(alpha)
        scale, shift = self.scale.index_select(0, species.index), self.shift.index_select(0, species.index)
        return HostOutput(scale * self.readout(features[:, 0]) + shift, tuple(gates))
