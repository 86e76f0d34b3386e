"""Graphs filled up with ghosts: results of the real atoms stay, ghosts change nothing and stay finite."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from steradian.config import LossConfig
from steradian.execution.batches import Buckets, Sizes, pad_graph, real_part
from steradian.graph import Graph
from steradian.graph.ghosts import ghost_edges
from steradian.polynomials import use_backend
from steradian.training.optimisation import Loss
from tests import cases

SIZES = Sizes(29, 512, 5)  # five ghosts, an odd number
CARBON = 6
COMBINATIONS = [
    *((host, "none") for host in cases.HOSTS),
    *(("mace", operator) for operator in cases.OPERATORS if operator != "none"),
    *((host, "both") for host in ("nequip", "visnet", "o3mpnn")),
    *((host, operator) for host in ("nequip", "visnet") for operator in ("mara", "mara-channel-all")),
    ("visnet", "mara-channel"),
    ("o3mpnn", "mara-channel-all"),
]
#: Sums over atoms and edges run in another order, relative to the largest number.
ROUNDING = 1e-11


def labelled(graph: Graph) -> Graph:
    generator = torch.Generator().manual_seed(1)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return replace(
        graph,
        energy=some(graph.num_systems) - 3000.0,
        forces=some(graph.num_atoms, 3),
        stress=some(graph.num_systems, 3, 3),
        weight=torch.tensor([1.0, 0.5, 2.0][: graph.num_systems], dtype=torch.float64),
    )


def molecules() -> Graph:
    return labelled(cases.batch(cases.ethanol(0), cases.ethanol(1)))


def mixed() -> Graph:
    return labelled(cases.batch(cases.ethanol(0), cases.crystal(), cases.ethanol(2)))


def close(first: torch.Tensor, second: torch.Tensor) -> None:
    scale = float(second.detach().abs().max()) or 1.0
    assert float((first - second).abs().max()) <= ROUNDING * scale


@pytest.mark.parametrize(("host", "operator"), COMBINATIONS)
def test_padded_step_equals_plain_one(host: str, operator: str) -> None:
    """Energies, forces, stress, loss and the gradient of every weight, which holds second derivatives."""
    potential = cases.potential(host, operator)
    periodic = "efa" not in operator and operator != "both"
    graph = mixed() if periodic else molecules()
    sizes = Sizes(29 if periodic else 23, graph.num_edges + 42, 5)
    padded = pad_graph(graph, sizes, number=CARBON, cutoff=potential.cutoff)
    loss = Loss(LossConfig(stress_weight=1.0))
    parameters = [parameter for parameter in potential.train().parameters() if parameter.requires_grad]
    results = []
    for given in (graph, padded):
        with use_backend("reference"):
            prediction = potential(given, forces=True, stress=True)
            total = loss(prediction, given).total
            results.append((prediction, total, torch.autograd.grad(total, parameters, allow_unused=True)))
    (plain, plain_loss, plain_gradients), (whole, padded_loss, padded_gradients) = results
    found = real_part(whole, Sizes.of(graph))
    for name in ("energy", "atom_energies", "forces", "stress"):
        close(getattr(found, name), getattr(plain, name))
        assert torch.isfinite(getattr(whole, name)).all(), name
    for alpha, expected in zip(found.gates, plain.gates, strict=True):
        close(alpha, expected)
    close(padded_loss, plain_loss)
    for gradient, expected in zip(padded_gradients, plain_gradients, strict=True):
        assert (gradient is None) == (expected is None)
        if gradient is not None:
            close(gradient, expected)
    assert torch.equal(whole.forces[graph.num_atoms :], torch.zeros(sizes.atoms - graph.num_atoms, 3).double()) or (
        operator in cases.GLOBAL or operator == "both"
    )


def test_ghosts_do_not_touch_real_atoms_and_receivers_ascend() -> None:
    graph = mixed()
    padded = pad_graph(graph, SIZES, number=CARBON, cutoff=3.5)
    assert Sizes.of(padded) == SIZES
    added = slice(graph.num_edges, None)
    assert int(padded.senders[added].min()) >= graph.num_atoms
    assert int(padded.receivers[added].min()) >= graph.num_atoms
    assert (padded.receivers.diff() >= 0).all()
    assert (padded.system.diff() >= 0).all()
    vectors = padded.positions[padded.senders[added]] - padded.positions[padded.receivers[added]]
    assert float(vectors.norm(dim=1).min()) > 3.5
    assert padded.real is not None
    assert padded.real.tolist() == [True, True, True, False, False]
    assert set(padded.receivers[added].tolist()) == set(range(graph.num_atoms, SIZES.atoms))  # spread over all ghosts


def test_pairs_of_a_padded_graph_are_two_edges_of_one_length() -> None:
    graph = mixed()
    padded = pad_graph(graph, SIZES, number=CARBON, cutoff=3.5)
    assert padded.topology.pairs is not None
    assert len(padded.topology.pairs.first) == SIZES.edges // 2
    counts = torch.bincount(padded.topology.pairs.of_edge, minlength=SIZES.edges // 2)
    assert (counts == 2).all()
    potential = cases.potential()
    with use_backend("reference"):
        shared, plain = (potential(given) for given in (padded, cases.without_pairs(padded)))
    close(shared.energy, plain.energy)
    close(shared.forces, plain.forces)


def test_template_of_full_length_fills_any_list() -> None:
    graph = molecules()
    place = torch.arange(SIZES.edges)
    ghosts = SIZES.atoms - graph.num_atoms
    receivers, senders = ghost_edges(place - graph.num_edges, SIZES.edges - graph.num_edges, ghosts)
    kept = torch.cat([graph.receivers, graph.receivers.new_zeros(SIZES.edges - graph.num_edges)])
    joined = torch.where(place < graph.num_edges, kept, graph.num_atoms + receivers)
    assert (joined.diff() >= 0).all()
    assert set(receivers[graph.num_edges :].tolist()) == set(range(ghosts))
    assert int((senders - receivers).abs().max()) == 1
    assert int(receivers.max()) < ghosts


def test_too_small_sizes_are_refused() -> None:
    graph = molecules()
    with pytest.raises(ValueError, match="do not fit"):
        pad_graph(graph, Sizes(graph.num_atoms + 1, 1000, 5), number=CARBON, cutoff=3.5)
    with pytest.raises(ValueError, match="ratio"):
        Buckets(ratio=1.0)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 100, 1999, 12345])
def test_buckets_hold_what_they_are_chosen_for(count: int) -> None:
    needed = Sizes(count, 10 * count, 1 + count // 9)
    for buckets in (Buckets(), Buckets(largest=Sizes(500, 5000, 60)), Buckets(exact=(Sizes(120, 1100, 20),))):
        sizes = buckets.choose(needed)
        assert sizes.fits(needed.with_ghosts())
        if count > 200:
            assert sizes.edges <= 1.25 * needed.edges + 64
    assert Buckets(exact=(Sizes(120, 1100, 20),)).choose(Sizes(100, 1000, 12)) == Sizes(120, 1100, 20)


def test_largest_batch_of_a_plan_has_no_padding_to_spare() -> None:
    batches = [Sizes(45, 800, 5), Sizes(42, 830, 5), Sizes(18, 300, 2)]
    buckets = Buckets.for_batches(batches)
    assert buckets.choose(Sizes(45, 830, 5)) == Sizes(47, 830, 6)
    assert buckets.choose(batches[0]) == buckets.choose(batches[1])
