"""The O(3)-equivariant message-passing network of the EFA paper (Frank, Chmiela, Müller, Unke 2024, arXiv:2412.08541).

Follows the published JAX implementation number for number; the layers it is made of are those of Unke and Maennel 2024
(arXiv:2401.07595). Features have the parity of the harmonics until a product of two vectors brings pseudotensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steradian.config import O3MPNNConfig
from steradian.equivariant.harmonics import spherical_harmonics, unit_vectors
from steradian.equivariant.irreps import Degrees, natural_degrees
from steradian.equivariant.linear import MLP, Dense, add_features, change_degrees, union
from steradian.equivariant.paths import MessagePassing, SelfCoupling
from steradian.graph import Edges, Graph
from steradian.graph.share import from_owners
from steradian.graph.topology import Rows
from steradian.hosts.base import Host, HostOutput, TrainingFacts, message_divisor
from steradian.operators.base import EdgeGate, GateFactory, GlobalMixer, MixerFactory, SlotSpec, empty_slot
from steradian.radial import bernstein_basis, cosine_envelope, safe_norm, smooth_envelope

__all__ = ["O3MPNN", "O3Layer"]

SCALARS: Degrees = natural_degrees(0)


@dataclass(frozen=True)
class LayerPlace:
    """Which layer of the network, the irreps that enter it, and edges per atom."""

    index: int
    last: bool
    degrees: Degrees
    avg_num_neighbors: float


class O3Layer(nn.Module):
    """Message passing, a local and a global update, residual layers and self-interaction.

    1. ``y = MLP(x + sum over neighbours)``; 2. ``n`` from the mixer in the slot; 3. ``x + silu(c) y + silu(1 - c) n``
    with one learned c, or ``x + y + n``; 4. self-coupling, to which only the scalars of x are added, so it replaces
    all other irreps; 5. ``x + MLP(x)`` as often as asked for.

    The last layer's messages are scalars, and so is all that follows unless atoms have dipoles.
    """

    def __init__(
        self, config: O3MPNNConfig, place: LayerPlace, gate: EdgeGate | None, make_mixer: MixerFactory
    ) -> None:
        super().__init__()
        channels, last = config.num_channels, place.last
        self.gate = gate
        self.message = MessagePassing(
            place.degrees,
            config.l_max,
            config.num_radial,
            channels,
            0 if last else None,
            pseudotensors=not last,
            divisor=message_divisor(config.message_scale, place.avg_num_neighbors),
            learned_gain=config.message_scale == "learned",
        )
        self.degrees_message = self.message.degrees_out
        self.degrees_in = place.degrees
        self.degrees_x = SCALARS if last and not config.dipole_embedding else place.degrees
        self.degrees_y = union(self.degrees_x, self.degrees_message)
        self.mlp = MLP(self.degrees_y, channels, zero=config.zero_init)
        self.switch = nn.Parameter(torch.full((1,), 0.5)) if config.use_switch else None
        spec = SlotSpec(
            host="o3mpnn",
            layer=place.index,
            num_layers=config.num_layers,
            degrees=self.degrees_x,
            num_channels=channels,
            cutoff=config.cutoff_A,
            num_radial=config.num_radial,
            scalars_only=last,
            unit_weights=False,
            avg_num_neighbors=place.avg_num_neighbors,
            l_max=config.l_max,
        )
        self.mixer: GlobalMixer | None = make_mixer(spec)
        degrees = union(self.degrees_x, self.degrees_y)
        if self.mixer is not None:
            self.degrees_n: Degrees = getattr(self.mixer, "degrees_out", self.degrees_x)
            degrees = union(degrees, self.degrees_n)
        self.degrees_mixed = degrees
        self.coupling: SelfCoupling | None = None
        if config.self_interaction or config.dipole_embedding:
            self.coupling = SelfCoupling(degrees, channels, 0 if last else None, pseudotensors=not last)
            degrees = union(SCALARS, self.coupling.degrees_out)
        post = [MLP(degrees, channels, zero=config.zero_init) for _ in range(config.num_post_residual_mlps)]
        self.post = nn.ModuleList(post)
        self.degrees_out = degrees

    def forward(self, features: Tensor, positions: Tensor, edges: Edges) -> tuple[Tensor, Tensor | None]:
        """Features ``[N, D', C]`` and alpha (None without a gate) from features ``[N, D, C]``."""
        alpha = None if self.gate is None else self.gate(features, edges)
        messages = self.message(features, edges, alpha)
        x = change_degrees(features, self.degrees_in, self.degrees_x)
        y = self.mlp(add_features(x, self.degrees_x, messages, self.degrees_message)[0])
        weight: Any = 1.0 if self.switch is None else nn.functional.silu(self.switch)
        out, degrees = add_features(x, self.degrees_x, weight * y, self.degrees_y)
        if self.mixer is not None:
            weight = 1.0 if self.switch is None else nn.functional.silu(1 - self.switch)
            update = weight * self.mixer.global_update(x, y, positions, edges)
            out, degrees = add_features(out, degrees, update, self.degrees_n)
        if self.coupling is not None:
            coupled = self.coupling(out)
            out, _ = add_features(out[:, :1], SCALARS, coupled, self.coupling.degrees_out)
        for mlp in self.post:
            out = out + mlp(out)
        return out, alpha


class O3MPNN(Host):
    """The network with two slots per layer.

    Args:
        config: hyper-parameters.
        facts: of the training set; ``config.avg_num_neighbors`` wins where it is set, and is used where
            ``config.message_scale`` asks for it. Scale 1 and shift 0 are the published form.
        make_gate, make_mixer: factories of the operators in the slots; return None for an empty slot.
    """

    def __init__(
        self,
        config: O3MPNNConfig,
        facts: TrainingFacts,
        make_gate: GateFactory = empty_slot,
        make_mixer: MixerFactory = empty_slot,
    ) -> None:
        super().__init__()
        self.takes_exact_vectors = True
        self.config, self.cutoff, self.l_max = config, config.cutoff_A, config.l_max
        channels = config.num_channels
        self.embedding = nn.Parameter(torch.randn(facts.num_elements, channels) * channels**-0.5)
        degrees = SCALARS
        self.dipole: Dense | None = None
        if config.dipole_embedding:
            self.dipole = Dense(((1, -1),), 1, channels, bias=False)
            degrees = natural_degrees(1)
        layers: list[O3Layer] = []
        neighbors = config.avg_num_neighbors or facts.avg_num_neighbors
        for index in range(config.num_layers):
            spec = SlotSpec(
                host="o3mpnn",
                layer=index,
                num_layers=config.num_layers,
                degrees=degrees,
                num_channels=channels,
                cutoff=config.cutoff_A,
                num_radial=config.num_radial,
                unit_weights=False,
                avg_num_neighbors=neighbors,
                l_max=config.l_max,
                num_weights=config.l_max + 1,
            )
            place = LayerPlace(index, index == config.num_layers - 1, degrees, neighbors)
            layers.append(O3Layer(config, place, make_gate(spec), make_mixer))
            degrees = layers[-1].degrees_out
        self.layers = nn.ModuleList(layers)
        zero = config.zero_init
        self.readout = Dense(SCALARS, channels, 1, bias=False, zero=zero)
        self.readout.role = "readout"
        self.element_bias = nn.Parameter(torch.zeros(facts.num_elements))
        self.place_scale(facts)

    def edges(self, graph: Graph, vectors: Tensor) -> Edges:
        """Lengths, radial basis, envelope and harmonics of the edges.

        Worked out in float64: stiff bonds times the rounding of a polynomial of order 31 is the largest error of forces
        in float32, and this is a small part of the work.
        """
        exact, dtype = vectors.double(), self.embedding.dtype
        lengths = safe_norm(exact)
        cut = smooth_envelope if self.config.cutoff_function == "smooth" else cosine_envelope
        envelope = cut(lengths, self.cutoff)
        radial = bernstein_basis(lengths / (1 + lengths), self.config.num_radial) * envelope.unsqueeze(-1)
        return Edges(
            topology=graph.prepared(),
            vectors=vectors.to(dtype),
            lengths=lengths.to(dtype),
            radial=radial.to(dtype),
            envelope=envelope.to(dtype),
            harmonics=spherical_harmonics(unit_vectors(exact, lengths), self.l_max).to(dtype),
            cell=graph.cell,
            share=graph.share,
        )

    def forward(self, graph: Graph, species: Rows, positions: Tensor, vectors: Tensor) -> HostOutput:
        edges = self.edges(graph, vectors)
        features = self.embedding.index_select(0, species.index).unsqueeze(1)
        if self.dipole is not None:
            if graph.dipoles is None:
                raise ValueError("this model embeds atomic dipoles, but the structures have none")
            features = torch.cat([features, self.dipole(graph.dipoles.to(features).unsqueeze(-1))], dim=1)
        gates = []
        for index, layer in enumerate(self.layers):
            if index:
                features = from_owners(features, edges.share)
            features, alpha = layer(features, positions, edges)
            if alpha is not None:
                gates.append(alpha)
        energies = self.readout(features[:, :1]).flatten() + self.element_bias.index_select(0, species.index)
        return HostOutput(self.scale * energies + self.shift, tuple(gates))
