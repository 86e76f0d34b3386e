"""Runs whose steps are prepared, with a stand-in for CUDA graphs: the same training, resumed to the last bit."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steradian.build import load_potential
from steradian.config import ConfigError, RunConfig, TrainingConfig
from steradian.evaluation.metrics import ErrorAccumulator
from steradian.execution.recording import Repeater
from steradian.graph import Prediction
from steradian.training import feeding as pipeline
from steradian.training import loop
from steradian.training.feeding import prefetched, to_device
from steradian.training.loop import DivergenceError, Loop
from steradian.training.machine import AsynchronousValues, training_device
from steradian.training.record import RunDirectory, read_state
from steradian.training.run import fit
from tests.unit.training_cases import toy_config, toy_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline")
    toy_file(path)
    return path


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[pipeline.Pipeline]:
    """Every run prepares its steps, with a stand-in that repeats them; the pipelines that were made."""
    made: list[pipeline.Pipeline] = []

    def make(*arguments: Any) -> pipeline.Pipeline:
        made.append(pipeline.make_pipeline(*arguments, recorder=Repeater()))
        return made[-1]

    monkeypatch.setattr(loop, "uses_pipeline", lambda config, device: True)
    monkeypatch.setattr(loop, "make_pipeline", make)
    return made


def config(folder: Path, name: str, *more: str) -> RunConfig:
    options = ("model.edge_gate.dropout=0.0", "model.precision=float64", "training.max_epochs=3")
    return toy_config(folder, name, *options, *more)


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_potential(run).state_dict()


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    return fit(config(folder, "plain"), progress=False).run_dir


@pytest.mark.parametrize("fits", [True, False])
def test_prepared_run_trains_as_the_plain_one(
    folder: Path, plain: Path, recorded: list[Any], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "room_for", lambda size, device: fits)
    result = fit(config(folder, f"prepared{fits}"), progress=False)
    assert recorded[0].on_device is fits
    for steps in (recorded[0]._train, recorded[0]._validation):
        assert steps.reason is None
        assert 0 < steps.made <= 3
    expected, found = weights_of(plain), weights_of(result.run_dir)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-7, atol=1e-9), name
    whole = read_state(RunDirectory(plain).state)["best_metrics"]
    assert result.metrics == pytest.approx(whole, rel=1e-6)


def test_prepared_run_resumes_to_the_last_bit(
    folder: Path, recorded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(config(folder, "whole"), progress=False)
    config_of_part = config(folder, "part")
    stops = iter((2, 5))
    stop = next(stops)
    original = Loop._due

    def due(self: Loop, *arguments: Any) -> int:
        return loop.SIGNAL if self.position.step >= stop else original(self, *arguments)

    monkeypatch.setattr(Loop, "_due", due)
    part = fit(config_of_part, progress=False)
    assert part.reason == "interrupted"
    stop = 10**9
    part = fit(config_of_part, resume=part.run_dir, progress=False)
    assert part.steps == whole.steps
    for name, value in weights_of(whole.run_dir).items():
        assert torch.equal(weights_of(part.run_dir)[name], value), name


def test_half_precision_scales_the_loss_of_prepared_steps(folder: Path, recorded: list[Any]) -> None:
    options = ("model.precision=half", "training.max_epochs=2", "model.edge_gate.dropout=0.0")
    result = fit(toy_config(folder, "half", *options), progress=False)
    assert recorded[0]._train.reason is None
    assert result.steps == 8
    assert all(np.isfinite(value) for value in result.metrics.values())


def test_frames_that_diverge_are_named(folder: Path, recorded: list[Any]) -> None:
    with pytest.raises(DivergenceError, match=r"training frames .*toy\.xyz:\d+"):
        fit(config(folder, "diverges", "training.optimizer.learning_rate=1e200"), progress=False)


def test_device_of_a_run() -> None:
    assert training_device(TrainingConfig(device="cpu")).type == "cpu"
    if not torch.cuda.is_available():
        assert training_device(TrainingConfig()).type == "cpu"
        with pytest.raises(ConfigError, match="finds no GPU"):
            training_device(TrainingConfig(device="cuda"))
        with pytest.raises(ValueError, match="needs a GPU"):
            pipeline.uses_pipeline(TrainingConfig(execution="cuda_graph"), torch.device("cpu"))
    assert not pipeline.uses_pipeline(TrainingConfig(), torch.device("cpu"))
    assert pipeline.uses_pipeline(TrainingConfig(execution="eager"), torch.device("cuda"))


def test_errors_of_padded_batches_are_those_of_the_real_atoms() -> None:
    prediction = Prediction(torch.tensor([1.0, 2.0, 9.0]), torch.zeros(4), torch.zeros(3), torch.ones(4, 3))
    labels = {"energy": torch.tensor([0.5, 2.0, 0.0]), "forces": torch.zeros(4, 3), "numbers": torch.ones(4).long()}
    errors = ErrorAccumulator()
    errors.add(prediction, labels, np.array([2, 1]), ["a", "b"])
    for value in (prediction.forces, *labels.values()):
        value.fill_(7)  # the tensors are those of a recorded step, which the next batch overwrites
    figures = errors.compute()
    assert figures["energy_mae"] == pytest.approx(0.25)
    assert figures["forces_mae"] == pytest.approx(1.0)
    assert errors.arrays().num_structures == 2
    assert errors.arrays().energy_reference.tolist() == [0.5, 2.0]
    assert errors.arrays().numbers.tolist() == [1, 1, 1]
    assert errors.arrays().force_error.shape == (3, 3)


def test_asynchronous_values_arrive_in_order() -> None:
    values: AsynchronousValues[str] = AsynchronousValues()
    loss = torch.tensor(1.0)
    values.add(loss, "first")
    loss.fill_(2.0)
    values.add(loss, "second")
    assert values.arrived() == [(1.0, "first"), (2.0, "second")]
    assert not len(values)


def test_prefetched_batches_come_in_order_and_errors_in_their_place() -> None:
    assert list(prefetched(lambda index: index * index, 5)) == [0, 1, 4, 9, 16]

    def make(index: int) -> int:
        if index == 2:
            raise ValueError("the third")
        return index

    found: list[int] = []
    with pytest.raises(ValueError, match="the third"):
        found.extend(prefetched(make, 5))
    assert found == [0, 1]


def test_leaving_early_ends_the_thread() -> None:
    before = threading.active_count()
    for value in prefetched(lambda index: index, 100):
        if value == 3:
            break
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_moved_graphs_know_pairs_and_periodicity() -> None:
    from tests import cases

    graph = to_device(cases.batch(cases.ethanol(), cases.crystal()), torch.device("cpu"))
    assert graph.topology.is_periodic
    assert graph.topology.pairs is not None
