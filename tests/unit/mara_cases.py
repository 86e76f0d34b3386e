"""Small systems and gates for the tests of MARA."""

import torch
from torch import nn

from steradian.equivariant.harmonics import spherical_harmonics
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


def random_turn(seed, improper=False):
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=DOUBLE, generator=generator)).Q
    return turn * torch.linalg.det(turn).round() * (-1 if improper else 1)


def turn_features(features, degrees, turn):
    """Act on ``[N, D, C]`` with a rotation or reflection, from the harmonics' own transformation."""
    improper = bool(torch.linalg.det(turn) < 0)
    generator = torch.Generator().manual_seed(0)
    directions = nn.functional.normalize(torch.randn(40, 3, dtype=DOUBLE, generator=generator), dim=1)
    blocks, start = [], 0
    for degree, parity in degrees:
        part = slice(degree**2, (degree + 1) ** 2)
        before = spherical_harmonics(directions, degree)[:, part]
        after = spherical_harmonics(directions @ turn.T, degree)[:, part]
        matrix = torch.linalg.lstsq(before, after).solution.T
        if improper:
            matrix = matrix * parity * (-1) ** degree
        size = 2 * degree + 1
        blocks.append(torch.einsum("ab,nbc->nac", matrix, features[:, start : start + size]))
        start += size
    return torch.cat(blocks, dim=1)
