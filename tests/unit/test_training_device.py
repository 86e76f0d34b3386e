"""Training from data on the device: the same batches, losses and gradients as from graphs on the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from steradian.config import LossConfig
from steradian.execution.batches import Buckets, DeviceData, Sizes, pad_graph
from steradian.execution.recording import Repeater, tensors_of
from steradian.execution.steps import GradientStep, PredictionStep, Steps, with_gradients
from steradian.graph import Graph, batch_graphs
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure
from steradian.polynomials import use_backend
from steradian.potential import Potential
from steradian.training.optimisation import Loss
from tests import cases


def frames(periodic: bool = True) -> list[Graph]:
    structures = [cases.ethanol(0), cases.crystal(0), cases.ethanol(1), cases.crystal(1), cases.ethanol(2)]
    if not periodic:
        structures = structures[::2]
    alone = Structure(numbers=np.array([8]), positions=np.zeros((1, 3)))  # no neighbours at all
    found = []
    for index, structure in enumerate([*structures, alone]):
        generator = np.random.default_rng(index)
        labelled = replace(
            structure,
            energy=float(generator.normal()),
            forces=generator.normal(size=structure.positions.shape),
            stress=generator.normal(size=(3, 3)),
            weight=1.0 + index,
        )
        found.append(make_graph(labelled, cases.CUTOFF))
    return found


@pytest.mark.parametrize("chosen", [[0], [3, 1], [4, 0, 2], [5], [0, 5, 1], [5, 4, 3, 2, 1, 0]])
@pytest.mark.parametrize("pairs", [True, False])
def test_gathered_batches_are_the_padded_ones(chosen: list[int], pairs: bool) -> None:
    graphs = frames()
    data = DeviceData(graphs, "cpu", number=6, cutoff=cases.CUTOFF, pairs=pairs)
    expected = batch_graphs([graphs[index] for index in chosen])
    sizes = Buckets().choose(data.sizes(chosen))
    assert data.sizes(chosen) == Sizes.of(expected)
    found = data.batch(data.indices(chosen, sizes), sizes, data.layout(chosen, sizes))
    expected = pad_graph(replace(expected, config_type=()), sizes, number=6, cutoff=cases.CUTOFF)
    listed = found.topology.pairs
    assert listed is not None or not pairs
    for name, value in tensors_of(cases.without_pairs(found)).items():
        assert torch.equal(value, tensors_of(expected)[name]), name
        assert value.dtype == tensors_of(expected)[name].dtype, name
    assert found.topology.sizes == tuple(found.atoms_per_system.tolist())
    if listed is not None:
        lengths = found.positions[found.senders] - found.positions[found.receivers]
        same = listed.first.index_select(0, listed.of_edge)
        if not found.shifts.any():
            assert torch.allclose(lengths.norm(dim=1), lengths.norm(dim=1)[same])
        assert (torch.bincount(listed.of_edge, minlength=sizes.edges // 2) == 2).all()
        assert torch.equal(listed.of_edge[listed.first], torch.arange(sizes.edges // 2))


def test_pairs_of_gathered_crystals_give_the_same_energies() -> None:
    data = DeviceData(frames(), "cpu", number=6, cutoff=cases.CUTOFF)
    potential = cases.potential()
    sizes = Buckets().choose(data.sizes([1, 3, 0]))
    with use_backend("reference"):
        graph = data.batch(data.indices([1, 3, 0], sizes), sizes)
        shared, plain = (potential(each) for each in (graph, cases.without_pairs(graph)))
    assert torch.allclose(shared.forces, plain.forces, rtol=0, atol=1e-11)


def test_labels_of_some_frames_are_refused() -> None:
    graphs = frames()
    graphs[2] = replace(graphs[2], forces=None)
    with pytest.raises(ValueError, match="forces is known for 5 of 6"):
        DeviceData(graphs, "cpu", number=6, cutoff=cases.CUTOFF)


# ------------------------------------------------------------------------------------------------------------- steps


def training_steps(potential: Potential, data: DeviceData | None, mode: str = "cuda_graph", **options: Any) -> Steps:
    loss = Loss(LossConfig())
    step = GradientStep(potential, lambda found, graph: loss(found, graph).total, forces=True, stress=False)
    return Steps(step, mode, data=data, **options)


def plain(potential: Potential, graph: Graph) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    loss = Loss(LossConfig())(potential(graph), graph).total
    weights = [weight for weight in potential.parameters() if weight.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss, weights, allow_unused=True))


def assert_gradients(found: Any, expected: tuple[torch.Tensor, list[torch.Tensor | None]], scale: float = 1.0) -> None:
    assert torch.allclose(found.loss, expected[0], rtol=1e-10)
    largest = max(float(value.abs().max()) for value in expected[1] if value is not None)
    for gradient, truth in zip(found.gradients, expected[1], strict=True):
        assert (gradient is None) == (truth is None)
        if truth is not None:
            assert float((gradient - scale * truth).abs().max()) <= 1e-10 * scale * largest


BATCHES = [[0, 3], [2, 1], [4, 0, 2], [1, 3], [0]]


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize(
    ("host", "operator"),
    [("mace", "none"), ("mace", "mara"), ("mace", "mara-channel-all"), ("nequip", "none"), ("visnet", "none")],
)
def test_recorded_steps_give_the_plain_gradients(host: str, operator: str, on_device: bool) -> None:
    graphs = frames()
    potential = cases.potential(host, operator).train()
    data = DeviceData(graphs, "cpu", number=6, cutoff=cases.CUTOFF) if on_device else None
    steps = training_steps(potential, data, recorder=Repeater())
    optimizer = torch.optim.Adam(potential.parameters(), lr=1e-3)
    for chosen in BATCHES:
        graph = batch_graphs([graphs[index] for index in chosen])
        found = steps(chosen if on_device else graph)
        expected = plain(potential, graph)
        assert_gradients(found, expected)
        weights = [weight for weight in potential.parameters() if weight.requires_grad]
        with_gradients(found, weights).backward()  # the weights change between replays
        optimizer.step()
        optimizer.zero_grad()
    assert steps.reason is None
    assert steps.made <= 4


def test_attention_between_all_atoms_has_a_step_per_list_of_systems() -> None:
    graphs = [*frames(periodic=False), frames(periodic=False)[0]]
    potential = cases.potential("mace", "both").train()
    data = DeviceData(graphs, "cpu", number=6, cutoff=cases.CUTOFF)
    steps = training_steps(potential, data, recorder=Repeater(), buckets=Buckets(exact=(Sizes(25, 400, 4),)))
    for chosen in ([0, 1], [1, 2], [0, 3], [2, 4]):
        assert_gradients(steps(chosen), plain(potential, batch_graphs([graphs[index] for index in chosen])))
    assert steps.made == 2
    assert steps.reason is None


def test_scaled_loss_scales_the_gradients_inside_the_step() -> None:
    graphs = frames()
    potential = cases.potential().train()
    steps = training_steps(potential, DeviceData(graphs, "cpu", number=6, cutoff=3.5), recorder=Repeater())
    expected = plain(potential, batch_graphs(graphs[:2]))
    for factor in (1024.0, 16.0):
        assert_gradients(steps([0, 1], torch.tensor(factor)), expected, scale=factor)


def test_ready_gradients_add_up_and_survive_the_next_replay() -> None:
    graphs = frames()
    potential = cases.potential().train()
    steps = training_steps(potential, DeviceData(graphs, "cpu", number=6, cutoff=3.5), recorder=Repeater())
    weights = [weight for weight in potential.parameters() if weight.requires_grad]
    for chosen in ([0], [2]):
        (with_gradients(steps(chosen), weights) / 2).backward()
    parts = [plain(potential, graphs[index])[1] for index in (0, 2)]
    for weight, first, second in zip(weights, *parts, strict=True):
        assert torch.allclose(weight.grad, 0.5 * (first + second), rtol=1e-9, atol=1e-12)


def test_step_that_cannot_be_recorded_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    class Refuses(Repeater):
        def record(self, function: Any, generators: Any) -> Any:
            raise RuntimeError("stream is capturing")

    graphs = frames()
    potential = cases.potential().train()
    steps = training_steps(potential, DeviceData(graphs, "cpu", number=6, cutoff=3.5), recorder=Refuses())
    for chosen in BATCHES:
        assert_gradients(steps(chosen), plain(potential, batch_graphs([graphs[index] for index in chosen])))
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "the training step cannot be recorded" in lines[0]


def test_dropout_is_recorded() -> None:
    graphs = frames()
    potential = cases.potential("mace", "mara").train()
    for layer in potential.host.layers:
        layer.gate.dropout = 0.2
    data = DeviceData(graphs, "cpu", number=6, cutoff=3.5)
    recorded = training_steps(potential, data, recorder=Repeater())
    first, second = (recorded([0, 1]).loss.clone() for _ in range(2))
    assert recorded.reason is None
    assert not torch.equal(first, second)


def test_validation_step_gives_predictions_and_labels() -> None:
    graphs = frames()
    potential = cases.potential().eval()
    data = DeviceData(graphs, "cpu", number=6, cutoff=3.5)
    steps = Steps(PredictionStep(potential, forces=True, stress=True), data=data, recorder=Repeater())
    for chosen in BATCHES:
        graph = batch_graphs([graphs[index] for index in chosen])
        expected = potential(graph, stress=True)
        prediction, labels = steps(chosen)
        assert torch.allclose(prediction.energy[: len(chosen)], expected.energy, rtol=0, atol=1e-9)
        assert torch.allclose(prediction.forces[: graph.num_atoms], expected.forces, rtol=0, atol=1e-10)
        assert torch.equal(labels["forces"][: graph.num_atoms], graph.forces)
        assert torch.equal(labels["energy"][: len(chosen)], graph.energy)
