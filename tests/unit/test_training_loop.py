"""The training loop against the same training written out by hand with PyTorch alone."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steradian import fit
from steradian.build import build_potential, load_potential
from steradian.config import RunConfig
from steradian.data.load import load_dataset
from steradian.data.statistics import compute_statistics
from steradian.graph import batch_graphs
from steradian.graph.batches import BatchSampler, GraphDataset
from steradian.training.optimisation import LearningRate, Loss, LossScale
from steradian.training.record import RunDirectory, random_state, read_state
from tests.unit.training_cases import toy_config, toy_file

PLAIN = (
    "model.edge_gate={kind: none}",
    "model.precision=float64",
    "training.max_epochs=3",
    "training.schedule={kind: constant}",
    "training.optimizer.clip_norm=1e9",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loop")
    toy_file(path)
    return path


def plain_config(folder: Path, name: str, *settings: str) -> RunConfig:
    """A run without gate in float64, with a norm that clips nothing; later settings replace earlier ones."""
    chosen = {setting.partition("=")[0]: setting for setting in (*PLAIN, *settings)}
    return toy_config(folder, name, *chosen.values())


def by_hand(config: RunConfig) -> tuple[dict[str, torch.Tensor], list[torch.Tensor], int]:
    """Weights, average and number of clipped steps after training without the loop."""
    dataset = load_dataset(config.data)
    statistics, frames = compute_statistics(dataset.train, config.model.host.cutoff_A)
    potential = build_potential(config.model, statistics, seed=config.training.seed).train()
    graphs = GraphDataset(frames, config.model.host.cutoff_A)
    sampler = BatchSampler(graphs, config.data.batch, seed=config.training.seed)
    training, clipped, step = config.training, 0, 0
    weights = list(potential.parameters())
    matrices = [weight for weight in weights if weight.ndim >= 2]
    groups = [
        {"params": matrices, "weight_decay": training.optimizer.weight_decay},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, amsgrad=True, fused=True)
    averages = [weight.detach().clone() for weight in weights]
    accumulate = training.optimizer.accumulate
    per_epoch = -(-len(sampler.batches(0)) // accumulate)
    rate = LearningRate(training.schedule, training.optimizer.learning_rate, per_epoch * training.max_epochs)
    for epoch in range(training.max_epochs):
        batches = sampler.batches(epoch)
        for start in range(0, len(batches), accumulate):
            optimizer.zero_grad()
            for frames_of in batches[start : start + accumulate]:
                graph = batch_graphs([graphs[frame] for frame in frames_of])
                (Loss(training.loss)(potential(graph), graph).total / accumulate).backward()
            with_gradient = [weight for weight in weights if weight.grad is not None]
            norm = torch.nn.utils.clip_grad_norm_(with_gradient, training.optimizer.clip_norm)
            clipped += bool(norm > training.optimizer.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = rate.at(step)
            optimizer.step()
            step += 1
            decay = min(training.ema_decay, (1 + step) / (10 + step))
            for average, weight in zip(averages, weights):
                average.mul_(decay).add_(weight.detach(), alpha=1 - decay)
    return potential.state_dict(), averages, clipped


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("single", ("training.optimizer.accumulate=1", "training.schedule={kind: cosine, warmup_steps: 3}")),
        ("three", ("training.optimizer.accumulate=3", "training.schedule={kind: constant}", "training.ema_decay=0.5")),
        ("clipped", ("training.optimizer.clip_norm=0.5", "training.optimizer.weight_decay=0.1")),
    ],
)
def test_loop_is_the_training_written_by_hand(folder: Path, name: str, settings: tuple[str, ...]) -> None:
    config = plain_config(folder, name, *settings)
    weights, averages, clipped = by_hand(config)
    state = read_state(RunDirectory(fit(config, progress=False).run_dir).state)
    assert state["position"]["step"] == 3 * -(-7 // config.training.optimizer.accumulate)
    assert clipped == (state["position"]["step"] if name == "clipped" else 0)
    for key, value in weights.items():
        torch.testing.assert_close(state["weights"][key], value, rtol=1e-9, atol=1e-12)
    for average, value in zip(state["average"]["averages"], averages, strict=True):
        torch.testing.assert_close(average, value, rtol=1e-9, atol=1e-12)


def test_model_is_validated_and_saved_with_averaged_weights(folder: Path) -> None:
    config = plain_config(folder, "averaged", "training.max_epochs=1")
    result = fit(config, progress=False)
    state, saved = read_state(RunDirectory(result.run_dir).state), load_potential(result.run_dir)
    assert len(state["average"]["averages"]) == len(list(saved.parameters()))
    for (name, weight), average in zip(saved.named_parameters(), state["average"]["averages"]):
        assert torch.equal(weight, average), name
    assert any(not torch.equal(weight, state["weights"][name]) for name, weight in saved.named_parameters())
    dataset = load_dataset(config.data)
    graphs = GraphDataset(dataset.validation, saved.cutoff)
    graph = batch_graphs([graphs[index] for index in range(len(graphs))])
    error = float((saved(graph).forces - graph.forces).abs().mean())
    assert result.metrics["validation/forces_mae"] == pytest.approx(error, rel=1e-9)


def test_scaled_loss_is_taken_back_before_gradients_are_clipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale is a power of two: it must leave no bit of a float64 run, however tight the norm."""
    tight = "training.optimizer.clip_norm=0.5"
    plain = read_state(RunDirectory(fit(plain_config(folder, "unscaled", tight), progress=False).run_dir).state)
    made: list[LossScale] = []
    original = LossScale.__init__

    def always(self: LossScale, potential: Any) -> None:
        original(self, potential)
        self.active, self._scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**12)
        made.append(self)

    monkeypatch.setattr(LossScale, "__init__", always)
    scaled = read_state(RunDirectory(fit(plain_config(folder, "scaled", tight), progress=False).run_dir).state)
    assert made[0].skipped == 0
    assert scaled["scale"]["scaler"]["scale"] == 2.0**12
    for name, weight in plain["weights"].items():
        assert torch.equal(scaled["weights"][name], weight), name


# --------------------------------------------------------------------------------------------------- the caller's state


def test_fit_leaves_the_caller_as_it_was(folder: Path) -> None:
    """Generators, default dtype, threads, signal handlers, gradient mode; also after a run that fails."""

    def handler(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, handler)
    threads = torch.get_num_threads()
    torch.manual_seed(3)
    np.random.seed(4)  # noqa: NPY002
    random.seed(5)
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    try:
        state = random_state()
        for name, extra in (("caller", ()), ("fails", ("training.optimizer.learning_rate=1e30",))):
            config = toy_config(folder, name, "training.threads=1", "training.max_epochs=2", *extra)
            if extra:
                with pytest.raises(ValueError, match="training frames"):
                    fit(config, progress=False)
            else:
                fit(config, progress=False)
            after = random_state()
            assert torch.equal(after["torch"], state["torch"])
            assert torch.equal(after["numpy"][1], state["numpy"][1])
            assert after["numpy"][2:] == state["numpy"][2:]
            assert after["python"] == state["python"]
            assert torch.get_default_dtype() == torch.float64
            assert torch.get_num_threads() == 2
            assert signal.getsignal(signal.SIGTERM) is handler
            assert torch.is_grad_enabled()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)
        signal.signal(signal.SIGTERM, before)


def test_callers_settings_do_not_change_a_run(folder: Path) -> None:
    config = toy_config(folder, "alone", "training.max_epochs=2")
    alone = read_state(RunDirectory(fit(config, progress=False).run_dir).state)
    torch.manual_seed(77)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            config = toy_config(folder, "inside", "training.max_epochs=2")
            inside = read_state(RunDirectory(fit(config, progress=False).run_dir).state)
            assert torch.is_inference_mode_enabled()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, weight in alone["weights"].items():
        assert torch.equal(inside["weights"][name], weight), name
