"""Small systems and gates for the tests of MARA."""

import torch
from torch import nn

from steradian.graph import Edges
from steradian.graph.topology import Topology
from steradian.operators.mara import paper
from steradian.operators.mara.gate import MARA

DOUBLE = torch.float64


def edges_of(positions, cutoff=4.0):
    """All pairs within the cutoff, sorted by receiver, with a smooth envelope."""
    count = len(positions)
    receivers, senders = (index.flatten() for index in torch.meshgrid(*[torch.arange(count)] * 2, indexing="ij"))
    vectors = positions[senders] - positions[receivers]
    near = (receivers != senders) & (vectors.detach().norm(dim=1) < cutoff)
    senders, receivers, vectors = senders[near], receivers[near], vectors[near]
    lengths = vectors.norm(dim=1)
    envelope = (1 - (lengths / cutoff) ** 2) ** 3
    topology = Topology(senders, receivers, count)
    return Edges(topology, vectors, lengths, envelope[:, None], envelope, vectors.new_ones(len(vectors), 1))


def system(num_atoms=6, num_features=5, seed=0, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(seed)
    positions = 1.5 * torch.randn(num_atoms, 3, generator=generator, dtype=dtype)
    features = torch.randn(num_atoms, num_features, generator=generator, dtype=dtype)
    return features, positions


def random_mara(*arguments, seed=0, dtype=DOUBLE, **options):
    torch.manual_seed(seed)
    mara = MARA(*arguments, **options).to(dtype)
    nn.init.normal_(mara.W_gate)
    return mara


def written_alpha(gate, features, edges):
    """alpha as the paper's equations stand, every tensor formed."""
    written = gate.as_written(features, edges)
    return paper.of_senders(written.alpha, edges, len(features)) if gate.where == "node" else written.alpha
