"""Steps that are recorded: buckets, buffers, checks and ways out, on a CPU with stand-ins for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from steradian.execution.batches import Buckets, Sizes, pad_graph
from steradian.execution.recording import (
    GraphBuffers,
    MismatchError,
    Repeater,
    StepCache,
    check_prediction,
    record,
    tensors_in,
    weights_state,
)
from steradian.execution.steps import Runner, resolve_mode
from steradian.graph import Graph
from tests import cases


class Refuses(Repeater):
    """A recorder that fails in the middle of a recording, as a GPU does when a step asks it for a number."""

    def record(self, function: Callable[[], Any], generators: Sequence[torch.Generator]) -> Callable[[], Any]:
        function()
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")


class Wrong(Repeater):
    """A recorder whose replays give other numbers."""

    def record(self, function: Callable[[], Any], generators: Sequence[torch.Generator]) -> Callable[[], Any]:
        run = super().record(function, generators)

        def replay() -> Any:
            outputs = run()
            for value in tensors_in(outputs):
                if value.is_floating_point():
                    value.mul_(1.01)
            return outputs

        return replay


def graphs(count: int = 3) -> list[Graph]:
    return [cases.batch(*(cases.ethanol(seed + 10 * place) for seed in range(place + 1))) for place in range(count)]


def assert_same(found: Any, expected: Any) -> None:
    assert torch.allclose(found.energy, expected.energy, rtol=0, atol=1e-9)
    assert found.forces.shape == expected.forces.shape
    assert torch.allclose(found.forces, expected.forces, rtol=0, atol=1e-10)


# --------------------------------------------------------------------------------------------------------- recording


def test_replays_follow_their_inputs_and_keep_their_outputs() -> None:
    value = torch.zeros(3)
    run = record(lambda: (value * 2, {"sum": value.sum()}), device="cpu", recorder=Repeater())
    first, more = run()
    value.fill_(2.0)
    again, _ = run()
    assert first is again
    assert first.tolist() == [4.0] * 3
    assert float(more["sum"]) == 6.0
    assert not run.eager


def test_state_and_random_numbers_are_put_back_after_the_warm_up() -> None:
    position, generator = torch.zeros(2), torch.Generator().manual_seed(3)
    expected = 1.0 + torch.randn(2, generator=torch.Generator().manual_seed(3))

    def step() -> torch.Tensor:
        position.add_(1.0 + torch.randn(2, generator=generator))
        return position

    run = record(step, device="cpu", state=[position], generators=[generator], recorder=Repeater())
    assert position.tolist() == [0.0, 0.0]
    assert torch.equal(run(), expected)


def test_failed_recording_is_told_in_one_line_and_the_function_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    count = torch.zeros(())

    def step() -> torch.Tensor:
        return count.add_(1)

    run = record(step, device="cpu", state=[count], recorder=Refuses(), what="the step of dynamics")
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "the step of dynamics cannot be recorded" in lines[0]
    assert "stream is capturing" in lines[0]
    assert "eager" in lines[0]
    assert run.eager
    assert float(run()) == 1.0


def test_without_a_gpu_a_step_is_called() -> None:
    run = record(lambda: torch.ones(1), device="cpu")
    assert run.eager
    assert run.reason is None


def test_cache_forgets_the_oldest_and_warns_once(capsys: pytest.CaptureFixture[str]) -> None:
    cache: StepCache[int] = StepCache(2, "training steps")
    made: list[int] = []

    def step(key: int) -> int:
        return cache.get(key, lambda: made.append(key) or key)

    for key in (1, 2, 1, 3, 1, 2):
        assert step(key) == key
    assert made == [1, 2, 3, 2]
    for key in range(10, 20):
        step(key)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "different sizes" in lines[0]
    with pytest.raises(ValueError, match="at least one"):
        StepCache(0, "none")


def test_buffers_refuse_other_shapes() -> None:
    one, two, _ = graphs()
    buffers = GraphBuffers(one)
    with pytest.raises(ValueError, match="does not fit"):
        buffers.write(two)
    with pytest.raises(ValueError, match="differs in"):
        buffers.write(cases.without_pairs(one))


def test_buffers_follow_changes_in_place_and_do_nothing_else() -> None:
    graph = graphs(1)[0]
    buffers, copies = GraphBuffers(graph), []

    def padded() -> Graph:
        copies.append(1)
        return graph

    for _ in range(3):
        buffers.follow(graph, padded)
    assert len(copies) == 1
    graph.positions[0, 0] += 1.0
    buffers.follow(graph, padded)
    assert len(copies) == 2
    assert torch.equal(buffers.graph.positions, graph.positions)
    buffers.follow(replace(graph, positions=graph.positions.clone()), padded)
    assert len(copies) == 3


# ------------------------------------------------------------------------------------------------------------ runner


@pytest.mark.parametrize(
    ("host", "operator"),
    [("mace", "none"), ("mace", "both"), ("nequip", "mara"), ("visnet", "none"), ("visnet", "mara-channel-all")],
)
def test_runner_gives_what_the_potential_gives(host: str, operator: str) -> None:
    potential = cases.potential(host, operator)
    runner = Runner(potential, "cuda_graph", recorder=Repeater())
    for graph in [*graphs(), *graphs()]:
        assert_same(runner(graph), potential(graph))
    assert runner.reason is None
    assert 0 < runner._steps.made <= 3


def test_buckets_are_used_again_for_other_molecules() -> None:
    potential = cases.potential()
    runner = Runner(potential, recorder=Repeater(), stress=True)
    found = [runner(cases.batch(cases.ethanol(seed), cases.crystal(seed))) for seed in range(6)]
    assert runner._steps.made < 4
    for seed, prediction in enumerate(found):  # an earlier result is not overwritten by a later one
        expected = potential(cases.batch(cases.ethanol(seed), cases.crystal(seed)), stress=True)
        assert_same(prediction, expected)
        assert torch.allclose(prediction.stress, expected.stress, rtol=0, atol=1e-11)


def test_runner_sees_new_weights_and_other_formats() -> None:
    potential = cases.potential()
    runner = Runner(potential, recorder=Repeater())
    graph = graphs(1)[0]
    runner(graph)
    with torch.no_grad():
        for weight in potential.parameters():
            weight.mul_(1.1)
    assert_same(runner(graph), potential(graph))
    assert runner._steps.made == 1  # weights that are trained change in place
    potential.for_inference()
    assert_same(runner(graph), potential(graph))
    with torch.no_grad():
        potential.host.embedding.mul_(1.1)  # frozen weights may have been folded into constants
    assert_same(runner(graph), potential(graph))
    potential.to(torch.float32)
    assert torch.allclose(runner(graph).forces, potential(graph).forces, atol=1e-4)


def test_state_of_the_weights_tells_training_from_folding() -> None:
    potential = cases.potential()
    before = weights_state(potential)
    with torch.no_grad():
        potential.host.embedding.mul_(1.1)
    assert weights_state(potential) == before
    potential.host.embedding.requires_grad_(False)
    frozen = weights_state(potential)
    with torch.no_grad():
        potential.host.embedding.mul_(1.1)
    assert weights_state(potential) != frozen


@pytest.mark.parametrize(("recorder", "words"), [(Refuses(), "cannot be recorded"), (Wrong(), "gives other results")])
def test_runner_falls_back_with_one_line(recorder: Repeater, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    potential = cases.potential()
    runner = Runner(potential, recorder=recorder)
    for graph in graphs():
        assert_same(runner(graph), potential(graph))
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert runner.reason is not None


def test_graph_that_is_changed_in_place_is_read_again() -> None:
    potential = cases.potential()
    runner = Runner(potential, recorder=Repeater())
    graph = graphs(1)[0]
    before = runner(graph).forces
    assert torch.equal(runner(graph).forces, before)
    graph.positions[0] += 0.1
    assert_same(runner(graph), potential(graph))
    assert not torch.equal(runner(graph).forces, before)


def test_crystals_with_attention_between_all_atoms_are_called() -> None:
    potential = cases.potential("mace", "efa")
    runner = Runner(potential, recorder=Repeater(), stress=True)
    graph = cases.graph(cases.crystal())
    assert_same(runner(graph), potential(graph, stress=True))
    assert runner._steps.made == 0


def test_static_step_follows_its_tensors() -> None:
    potential = cases.potential()
    runner = Runner(potential, recorder=Repeater())
    graph = graphs(1)[0]
    sizes = Buckets().choose(Sizes.of(graph))
    graph = pad_graph(graph, sizes, number=6, cutoff=potential.cutoff)
    step = runner.static(graph)
    before = step().forces.clone()
    graph.positions[:9] += 0.05 * torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert not torch.allclose(step().forces, before)
    assert_same(step(), potential(graph))


def test_unknown_modes_and_elements_are_refused() -> None:
    with pytest.raises(ValueError, match="choose auto, eager, cuda_graph"):
        resolve_mode("fast", torch.device("cpu"))
    with pytest.raises(ValueError, match="needs a GPU"):
        Runner(cases.potential(), "cuda-graph")
    assert resolve_mode("auto", torch.device("cpu")) == "eager"
    assert resolve_mode("auto", torch.device("cuda")) == "cuda_graph"
    graph = graphs(1)[0]
    graph.numbers[0] = 7
    with pytest.raises(ValueError, match="does not know N"):
        Runner(cases.potential(), recorder=Repeater())(graph)


def test_check_names_what_differs() -> None:
    potential = cases.potential()
    found, expected = (potential(graph) for graph in graphs(1) * 2)
    check_prediction(found, expected, potential.policy)
    expected.forces[0, 0] += 1e-5
    with pytest.raises(MismatchError, match="forces differ by 1e-05"):
        check_prediction(found, expected, potential.policy)
