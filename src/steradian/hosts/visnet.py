"""ViSNet: vector-scalar interactive message passing (Wang et al. 2024, Nature Communications 15, 313).

Follows the published implementation number for number (``ViSNet`` of torch_geometric 2.8.1) on features ``[N, D, C]``
whose first component are the scalars and whose others are the vectors of degree 1 and 2. Left out is what cannot have
an effect: the vectors that enter the first layer are zero, and those that leave the last block of the readout are not
used, so the weights that act on them are dead in the published model.

Published, every atom is its own neighbour too, at distance zero and in no direction. These rows stand behind those of
the edges here, and no gate acts on them. They are rows of the sums over neighbours like all others, so it is one more
than the average number of neighbours that ``message_scale`` counts in a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steradian.compiler.activations import silu
from steradian.compiler.folding import constant
from steradian.config import ViSNetConfig
from steradian.equivariant.harmonics import spherical_harmonics, unit_vectors
from steradian.equivariant.irreps import dim, natural_degrees
from steradian.equivariant.tensor_product import of_channels
from steradian.graph import Edges, Graph
from steradian.graph.share import from_owners
from steradian.graph.topology import Rows, Topology
from steradian.hosts.base import Host, HostOutput, TrainingFacts
from steradian.hosts.visnet_parts import ExpNormalBasis, Rescale, VectorNorm
from steradian.hosts.visnet_tables import product_polynomial, rejected_product, vector_message
from steradian.operators.base import EdgeGate, GateFactory, GlobalMixer, MixerFactory, SlotSpec, empty_slot
from steradian.polynomials import evaluate
from steradian.precision import WithRole, cast
from steradian.radial import cosine_envelope, safe_norm

__all__ = ["ViSNet", "ViSNetLayer"]


class BlockLinear(WithRole, nn.Linear):
    """Several linear maps of the same input as one; each starts as the published ones do (Glorot uniform, no bias)."""

    def __init__(self, size_in: int, sizes_out: list[int], bias: bool = True) -> None:
        self.sizes_out = sizes_out
        super().__init__(size_in, sum(sizes_out), bias=bias)

    def reset_parameters(self) -> None:
        for block in self.weight.split(self.sizes_out):
            nn.init.xavier_uniform_(block)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        # one product of matrices; PyTorch would make many small ones of [N, size, C]
        if self.low is None:
            return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        bias = None if self.bias is None else cast(self.bias, self.low)
        rows = cast(x.flatten(0, -2), self.low)
        return nn.functional.linear(rows, cast(self.weight, self.low), bias).to(x.dtype).unflatten(0, x.shape[:-1])

    def blocks(self, x: Tensor) -> list[Tensor]:
        """The maps one by one, for results that go on separate ways: each is contiguous."""
        rows = cast(x.flatten(0, -2), self.low)
        biases = [None] * len(self.sizes_out) if self.bias is None else cast(self.bias, self.low).split(self.sizes_out)
        parts = zip(cast(self.weight, self.low).split(self.sizes_out), biases)
        maps = (nn.functional.linear(rows, weight, bias) for weight, bias in parts)
        return [out.to(x.dtype).unflatten(0, x.shape[:-1]) for out in maps]


@dataclass(frozen=True)
class Links:
    """Which atoms the edges and, behind them, every atom as its own neighbour connect; E + N of them.

    Attributes:
        senders, receivers: ``[E + N]``, for gathers and sums.
        of_pair: ``[E + N]`` the row of a pair of opposite edges, and behind those ``[Q]`` pairs of an atom; None where
            pairs are not known.
        behind: ``[Q + N]`` a link of each of these rows; None likewise.
    """

    senders: Rows
    receivers: Rows
    of_pair: Rows | None
    behind: Tensor | None

    @classmethod
    def of(cls, topology: Topology) -> Links:
        """Made once, unless the contents of the topology change."""
        return (
            cls._made(topology)
            if topology.is_static
            else topology.prepared("visnet links", lambda: cls._made(topology))
        )

    @classmethod
    def _made(cls, topology: Topology) -> Links:
        count, pairs, static = topology.num_atoms, topology.pairs, topology.is_static
        atoms = torch.arange(count, device=topology.senders.device)

        def rows(index: Tensor, behind: Tensor, num_rows: int) -> Rows:
            return Rows(torch.cat([index, behind]), num_rows, static=static)

        return cls(
            senders=rows(topology.senders, atoms, count),
            receivers=rows(topology.receivers, atoms, count),
            of_pair=None if pairs is None else rows(pairs.of_edge, pairs.count + atoms, pairs.count + count),
            behind=None if pairs is None else torch.cat([pairs.first, topology.num_edges + atoms]),
        )


@dataclass(frozen=True)
class LinkGeometry:
    """Links with what they carry.

    Attributes:
        links: which atoms they connect.
        envelope: ``[E + N]`` cutoff, 1 for an atom itself.
        directions: ``[E + N, size]`` harmonics without the scalar, zero for an atom itself.
        geometry: ``[E + N, 1 + size]`` scale and scaled directions of vector messages.
        num_atoms, num_edges: N, E.
    """

    links: Links
    envelope: Tensor
    directions: Tensor
    geometry: Tensor
    num_atoms: int
    num_edges: int


class ViSNetLayer(nn.Module):
    """One layer of vector-scalar interactive message passing (Wang et al. 2024, equations 5-10).

    1. queries, keys and values from normalised scalars, filters from the edges; 2. attention, cut off, weighs the
    values (and a gate weighs the attention); 3. their sums and the vectors give the update of the scalars; 4. weighted
    values make the messages to the vectors; 5. vectors at both ends of an edge give the update of its filter.

    Args:
        config: hyper-parameters.
        avg_num_neighbors: edges per atom.
        first, last: the first layer sees no vectors, the last one has no edges to update.
        gate, mixer: operators in the slots.
    """

    def __init__(
        self,
        config: ViSNetConfig,
        avg_num_neighbors: float,
        first: bool,
        last: bool,
        gate: EdgeGate | None,
        mixer: GlobalMixer | None,
    ) -> None:
        super().__init__()
        channels = config.num_channels
        self.num_channels, self.num_heads, self.l_max = channels, config.num_heads, config.l_max
        self.size = (config.l_max + 1) ** 2 - 1
        self.has_vectors = not first
        self.updates_edges = not first and not last
        self.vertex = config.vertex and self.updates_edges
        self.rescale = Rescale(config, avg_num_neighbors + 1)
        filters = [channels, channels]
        vectors = [channels] * 3
        if self.updates_edges:
            filters += [channels] * (2 if self.vertex else 1)
            vectors += [channels] * (4 if self.vertex else 2)
        self.norm = nn.LayerNorm(channels)
        self.query_key_value = BlockLinear(channels, [channels] * 3)
        self.filters = BlockLinear(channels, filters)
        self.vector_weights = BlockLinear(channels, [2 * channels if self.has_vectors else channels])
        self.update = BlockLinear(channels, [3 * channels if self.has_vectors else channels])
        self.vector_norm = self.vectors = None
        if self.has_vectors:
            self.vector_norm = VectorNorm(channels, config.l_max, config.vector_norm, config.trainable_vector_norm)
            self.vectors = BlockLinear(channels, vectors, bias=False)
        self.gate = gate
        self.mixer = mixer

    def forward(
        self,
        features: Tensor,
        filters: Tensor,
        positions: Tensor,
        edges: Edges,
        rows: LinkGeometry,
        shared: Rows | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Updates of features ``[N, 1 + size, C]`` and of filters ``[E + N, C]`` (None), and alpha (None).

        Args:
            features: ``[N, 1 + size, C]``, in the first layer ``[N, 1, C]``.
            filters: ``[E + N, C]`` scalar features of edges and atoms.
            positions: ``[N, 3]`` [Å].
            edges, rows: geometry.
            shared: ``rows.links.of_pair`` where both edges of a pair still have the same filters, which then are
                ``[Q + N, C]``; else None.
        """
        alpha = None if self.gate is None else self.gate(features, edges)
        scalars, vectors = features[:, 0], None
        if self.has_vectors:
            scalars, vectors = features.split([1, self.size], dim=1)
            scalars = scalars.squeeze(1)
        channels = self.num_channels
        key_filter, value_filter, *edge_filters = (silu(shape).unsqueeze(1) for shape in self.filters.blocks(filters))
        attended = (key_filter, value_filter)
        messages = self._messages(self.norm(scalars), attended, alpha, rows, shared)  # [E + N, C]
        summed = messages.new_zeros((rows.num_atoms, channels)).index_add(0, rows.links.receivers.index, messages)
        summed = self.rescale(summed)
        weights = silu(self.vector_weights(messages)).unflatten(1, (-1, channels))
        if vectors is None or self.vectors is None or self.vector_norm is None:
            scalar_update = self.update(summed)
            vector_update = self._carried(None, weights, rows)
            edge_update = None
        else:
            normed = self.vector_norm(vectors)
            first, second, third, *ends = self.vectors.blocks(normed)
            o1, o2, o3 = self.update(summed).split(channels, dim=1)
            scalar_update = (first * second).sum(1) * o2 + o3
            vector_update = third * o1.unsqueeze(1) + self._carried(normed, weights, rows)
            edge_update = self._edge_update(ends, edge_filters, rows, shared)
        update = torch.cat([scalar_update.unsqueeze(1), vector_update], dim=1)
        if self.mixer is not None:
            update = self.mixer(features, update, positions, edges)
        return update, edge_update, alpha

    def _messages(
        self,
        scalars: Tensor,
        filters: tuple[Tensor, Tensor],
        alpha: Tensor | None,
        rows: LinkGeometry,
        shared: Rows | None,
    ) -> Tensor:
        """Values times attention (equations 5-6), ``[E + N, C]``."""
        key_filter, value_filter = filters
        query, key, value = (part.unsqueeze(1) for part in self.query_key_value.blocks(scalars))
        products = evaluate(
            product_polynomial(3), [query, key, key_filter], gathers=[rows.links.receivers, rows.links.senders, shared]
        )
        attention = silu(products.view(-1, self.num_heads, self.num_channels // self.num_heads).sum(2))
        weight, factors, gathers = rows.envelope, [value, value_filter], [rows.links.senders, shared]
        if alpha is not None and alpha.dim() == 2 and alpha.shape[1] == 1:
            alpha = alpha.squeeze(1)  # one number for all channels is less work on the attention
        # no gate on what an atom tells itself
        if alpha is not None and alpha.dim() == 1:
            weight = torch.cat([weight[: rows.num_edges] * alpha, weight[rows.num_edges :]])
        elif alpha is not None:
            of_links = torch.cat([alpha, alpha.new_ones((rows.num_atoms, alpha.shape[1]))])
            factors = [of_channels(of_links, self.num_channels).unsqueeze(1), *factors]
            gathers = [None, *gathers]
        attention = attention * weight.unsqueeze(1)
        values = evaluate(product_polynomial(len(factors)), factors, gathers=gathers)
        per_head = values.view(-1, self.num_heads, self.num_channels // self.num_heads)
        return (per_head * attention.unsqueeze(2)).view(-1, self.num_channels)

    def _carried(self, vectors: Tensor | None, weights: Tensor, rows: LinkGeometry) -> Tensor:
        """Vector messages summed at the receivers, ``[N, size, C]``."""
        inputs = [weights, rows.geometry] if vectors is None else [vectors, weights, rows.geometry]
        gathers = [None, None] if vectors is None else [rows.links.senders, None, None]
        carried = evaluate(
            vector_message(self.size, vectors is not None),
            inputs,
            gathers=gathers,
            scatter=rows.links.receivers,
        )
        return self.rescale(carried)

    def _edge_update(
        self, ends: list[Tensor], filters: list[Tensor], rows: LinkGeometry, shared: Rows | None
    ) -> Tensor | None:
        """Equation 10, and with ``vertex`` the second product, of two vectors at the receiver: ``[E + N, C]``."""
        if not ends:
            return None
        target, source, *same = ends
        polynomial = rejected_product(self.l_max)
        update = evaluate(
            polynomial,
            [target, source, filters[0], rows.directions],
            gathers=[rows.links.receivers, rows.links.senders, shared, None],
        )
        if same:
            update = update + evaluate(
                polynomial,
                [same[0], same[1], filters[1], rows.directions],
                gathers=[rows.links.receivers, rows.links.receivers, shared, None],
            )
        return update.squeeze(1)


class Readout(nn.Module):
    """Energy of every atom from scalars and lengths of vectors: two gated equivariant blocks (Schütt et al. 2021)."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        half = num_channels // 2
        self.width = half
        self.vectors = BlockLinear(num_channels, [num_channels, half], bias=False)
        self.hidden = BlockLinear(2 * num_channels, [num_channels])
        self.out = BlockLinear(num_channels, [2 * half])
        self.last_vectors = BlockLinear(half, [half], bias=False)
        self.last_hidden = BlockLinear(2 * half, [half])
        self.last_out = BlockLinear(half, [1])

    def forward(self, scalars: Tensor, vectors: Tensor) -> Tensor:
        """``[N]`` from scalars ``[N, C]`` and vectors ``[N, size, C]``."""
        lengths_of, carried = self.vectors(vectors).split([scalars.shape[1], self.width], dim=2)
        hidden = silu(self.hidden(torch.cat([scalars, _lengths(lengths_of)], dim=1)))
        scalars, weights = self.out(hidden).split(self.width, dim=1)
        lengths = _lengths(self.last_vectors(weights.unsqueeze(1) * carried))
        hidden = silu(self.last_hidden(torch.cat([silu(scalars), lengths], dim=1)))
        return self.last_out(hidden).squeeze(1)


def _lengths(vectors: Tensor) -> Tensor:
    """``[N, C]`` lengths over all components; zero, with zero derivatives, for a zero vector."""
    return safe_norm(vectors.transpose(1, 2))


class ViSNet(Host):
    """ViSNet with two slots per layer.

    The published vector messages do not vanish at the cutoff: their weights are ``silu(W m + b)`` of a message m that
    does, and with a bias the energy jumps by a little when a neighbour leaves. ``config.smooth`` multiplies them by the
    cutoff function; ``smooth=False`` is the published model.

    Args:
        config: hyper-parameters.
        facts: of the training set; ``config.avg_num_neighbors`` wins where it is set, and is used where
            ``config.message_scale`` asks for it. Sums over neighbours are all rescaled alike: that of the embedding,
            and those of the scalar and vector messages of every layer.
        make_gate, make_mixer: factories of the operators in the slots; return None for an empty slot. A gate weighs the
            attention.
    """

    def __init__(
        self,
        config: ViSNetConfig,
        facts: TrainingFacts,
        make_gate: GateFactory = empty_slot,
        make_mixer: MixerFactory = empty_slot,
    ) -> None:
        super().__init__()
        channels = config.num_channels
        self.cutoff, self.l_max, self.smooth = config.cutoff_A, config.l_max, config.smooth
        self.embedding = nn.Parameter(torch.randn(facts.num_elements, channels))
        self.radial_basis = ExpNormalBasis(config.radial.num, config.cutoff_A, config.radial.trainable)
        self.neighbor_embedding = nn.Parameter(torch.randn(facts.num_elements, channels))
        self.neighbor_filter = BlockLinear(config.radial.num, [channels])
        self.combine = BlockLinear(2 * channels, [channels])
        self.edge_filter = BlockLinear(config.radial.num, [channels])
        neighbors = config.avg_num_neighbors or facts.avg_num_neighbors
        self.rescale = Rescale(config, neighbors)
        layers = []
        for index in range(config.num_layers):
            first = index == 0
            spec = SlotSpec(
                host="visnet",
                layer=index,
                num_layers=config.num_layers,
                degrees=natural_degrees(0 if first else config.l_max),
                num_channels=channels,
                cutoff=config.cutoff_A,
                num_radial=config.radial.num,
                degrees_out=natural_degrees(config.l_max),
                unit_weights=False,
                avg_num_neighbors=neighbors,
                l_max=config.l_max,
            )
            last = index == config.num_layers - 1
            layers.append(ViSNetLayer(config, neighbors, first, last, make_gate(spec), make_mixer(spec)))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(channels)
        self.vector_norm = VectorNorm(channels, config.l_max, config.vector_norm, config.trainable_vector_norm)
        self.readout = Readout(channels)
        self.place_scale(facts)

    @property
    def reach(self) -> float:
        return super().reach + self.cutoff  # neighbours enter the embedding too

    def edges(self, graph: Graph, vectors: Tensor) -> Edges:
        """Lengths, radial basis (cut off), cosine cutoff and harmonics of the edges."""
        lengths = safe_norm(vectors)
        envelope = cosine_envelope(lengths, self.cutoff)
        return Edges(
            topology=graph.prepared(),
            vectors=vectors,
            lengths=lengths,
            radial=self.radial_basis(lengths, envelope),
            envelope=envelope,
            harmonics=spherical_harmonics(unit_vectors(vectors, lengths), self.l_max),
            cell=graph.cell,
            share=graph.share,
        )

    def rows(self, edges: Edges) -> LinkGeometry:
        """The edges and, behind them, every atom as its own neighbour."""
        per_degree = [(2 * degree + 1) ** -0.5 for degree in range(1, self.l_max + 1) for _ in range(2 * degree + 1)]
        factors = constant(tuple(per_degree), edges.harmonics.dtype, edges.harmonics.device)
        directions = edges.harmonics[:, 1:] * factors
        directions = torch.cat([directions, directions.new_zeros((edges.num_atoms, directions.shape[1]))])
        envelope = torch.cat([edges.envelope, edges.envelope.new_ones(edges.num_atoms)])
        scale = envelope.unsqueeze(1) if self.smooth else torch.ones_like(envelope).unsqueeze(1)
        return LinkGeometry(
            links=Links.of(edges.topology),
            envelope=envelope,
            directions=directions,
            geometry=torch.cat([scale, scale * directions], dim=1),
            num_atoms=edges.num_atoms,
            num_edges=edges.topology.num_edges,
        )

    def _embedded(self, species: Tensor, edges: Edges, rows: LinkGeometry) -> tuple[Tensor, Tensor]:
        """Scalars ``[N, C]`` of atoms and neighbours, filters (Wang et al. 2024, equations 1-4).

        The filters are ``[Q + N, C]`` of pairs and atoms, or ``[E + N, C]`` where pairs are not known.
        """
        pairs, radial, envelope = edges.pairs, edges.pair_radial, edges.envelope
        links = rows.links
        senders, receivers = links.senders.index, links.receivers.index
        if pairs is not None and links.behind is not None:
            envelope = envelope.index_select(0, pairs.first)
            senders, receivers = senders.index_select(0, links.behind), receivers.index_select(0, links.behind)
        weights = self.neighbor_filter(radial) * envelope.unsqueeze(1)
        neighbors = evaluate(
            product_polynomial(2),
            [self.neighbor_embedding.index_select(0, species).unsqueeze(1), weights.unsqueeze(1)],
            gathers=[edges.topology.by_sender, None if pairs is None else pairs.rows],
            scatter=edges.topology.by_receiver,
        )
        own = self.embedding.index_select(0, species)
        scalars = self.combine(torch.cat([own, self.rescale(neighbors.squeeze(1))], dim=1))
        scalars = from_owners(scalars, edges.share)
        at_zero = self.radial_basis(edges.lengths.new_zeros(1), edges.lengths.new_ones(1))
        shapes = self.edge_filter(torch.cat([radial, at_zero]))
        shapes = torch.cat([shapes[:-1], shapes[-1:].expand(edges.num_atoms, -1)])
        ends = scalars.index_select(0, receivers) + scalars.index_select(0, senders)
        return scalars, ends * shapes

    def forward(self, graph: Graph, species: Rows, positions: Tensor, vectors: Tensor) -> HostOutput:
        edges = self.edges(graph, vectors)
        rows = self.rows(edges)
        scalars, filters = self._embedded(species.index, edges, rows)
        features, shared = scalars.unsqueeze(1), rows.links.of_pair
        size = dim(natural_degrees(self.l_max))
        gates = []
        for index, layer in enumerate(self.layers):
            if index:
                features = from_owners(features, edges.share)
            update, edge_update, alpha = layer(features, filters, positions, edges, rows, shared)
            if features.shape[1] < size:
                features = nn.functional.pad(features, (0, 0, 0, size - features.shape[1]))
            features = features + update
            if edge_update is not None:  # the two edges of a pair differ from here on
                filters = (filters if shared is None else filters.index_select(0, shared.index)) + edge_update
                shared = None
            if alpha is not None:
                gates.append(alpha)
        out, vector_out = features.split([1, size - 1], dim=1)
        energies = self.readout(self.norm(out.squeeze(1)), self.vector_norm(vector_out))
        return HostOutput(self.scale * energies + self.shift, tuple(gates))
