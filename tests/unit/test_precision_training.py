"""Training in every preset: it learns, master weights stay float32, float16 scales its loss, a resume is exact."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from steradian.build import build_potential, load_potential
from steradian.config import ConfigError
from steradian.training import optimisation
from steradian.training.loop import DivergenceError, Loop
from steradian.training.optimisation import order_at, set_order, start_progressive
from steradian.training.record import RunDirectory, read_state
from steradian.training.run import fit
from tests.unit.precision_cases import STATISTICS, graph, potential
from tests.unit.training_cases import toy_config, toy_file

EPOCHS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("training")
    toy_file(path)
    return path


def rows(directory: RunDirectory) -> list[dict[str, str]]:
    with open(directory.metrics, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def train(folder: Path, name: str, *overrides: str) -> RunDirectory:
    config = toy_config(folder, name, "model.edge_gate={kind: none}", *overrides)
    return RunDirectory(fit(config, progress=False).run_dir)


def start_at(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start from another scale of the loss."""
    made = torch.amp.GradScaler
    monkeypatch.setattr(optimisation.torch.amp, "GradScaler", lambda device, init_scale: made(device, init_scale=scale))


@pytest.mark.parametrize("preset", ["float32", "mixed", "half", "tf32", "float64"])
def test_every_preset_learns(folder, preset):
    directory = train(folder, preset, f"model.precision={preset}")
    table = rows(directory)
    first, last = (float(row["train/loss"]) for row in (table[0], table[-1]))
    assert last < 0.8 * first
    weights = torch.float64 if preset == "float64" else torch.float32
    assert all(value.dtype in (weights, torch.float64) for value in read_state(directory.state)["weights"].values())
    assert load_potential(directory.path).config.precision == preset
    assert ("train/loss_scale" in table[0]) == (preset == "half")
    if preset == "half":
        assert float(table[-1]["train/underflow"]) < 1e-3
        assert 1 <= float(table[-1]["train/loss_scale"]) <= 4096
        assert int(table[-1]["train/skipped"]) < int(table[-1]["step"])


def test_steps_that_overflow_are_left_out_and_counted(folder, monkeypatch):
    start_at(2.0**30, monkeypatch)
    directory = train(folder, "overflow", "model.precision=half", "training.max_epochs=8")
    table = rows(directory)
    assert int(table[0]["train/skipped"]) > 0
    assert int(table[-1]["train/skipped"]) < int(table[-1]["step"])  # the scale came down to where steps are taken
    assert float(table[-1]["train/loss_scale"]) < 2.0**30
    assert torch.isfinite(
        torch.cat([value.flatten() for value in read_state(directory.state)["weights"].values()])
    ).all()


def test_gradients_that_always_overflow_are_an_error(folder, monkeypatch):
    monkeypatch.setattr(optimisation, "SMALLEST", 2.0**39)
    start_at(2.0**40, monkeypatch)
    with pytest.raises(DivergenceError, match="overflow in float16 whatever the scale"):
        train(folder, "diverged", "model.precision=half")


@pytest.mark.parametrize(
    "extra", [["model.precision=half"], ["model.precision=mixed", "training.progressive_correlation=[2]"]]
)
def test_resumed_runs_end_with_the_same_bits(folder, extra, monkeypatch):
    name = "resumed_" + str(len(extra))
    whole = train(folder, name + "_whole", *extra)
    save = Loop.save

    def save_and_stop(self):
        save(self)
        if self.position.step == 9:
            self.request.receive(15, None)

    monkeypatch.setattr(Loop, "save", save_and_stop)
    part = train(folder, name, *extra)
    assert read_state(part.state)["position"]["step"] < read_state(whole.state)["position"]["step"]
    monkeypatch.setattr(Loop, "save", save)
    config = toy_config(folder, name, "model.edge_gate={kind: none}", *extra)
    fit(config, resume=part.path, progress=False)
    one, other = (read_state(directory.state) for directory in (whole, part))
    assert all(torch.equal(one["weights"][key], other["weights"][key]) for key in one["weights"])
    assert one["scale"] == other["scale"]


# ------------------------------------------------------------------------------------------- progressive correlation


def test_orders_come_in_on_the_schedule():
    assert [order_at(epoch, [2, 4]) for epoch in range(6)] == [1, 1, 2, 2, 3, 3]


def test_raising_the_order_leaves_the_function_and_then_it_learns(folder):
    model = potential("mace", "float64")
    full = model(graph()).forces
    start_progressive(model.host)
    found = []
    for order in (1, 2, 3):
        set_order(model.host, order)
        found.append(model(graph()).forces)
    assert torch.allclose(found[0], found[2], rtol=0, atol=1e-12)
    assert not torch.allclose(found[0], full, rtol=1e-2)
    contraction = model.host.layers[0].contraction
    norms = []
    for order in (1, 3):
        set_order(model.host, order)
        model.zero_grad()
        model.train()(graph()).forces.square().sum().backward()
        norms.append(float(contraction.weight.grad[contraction.weight == 0].norm()))
    assert norms[0] == 0  # not there yet
    assert norms[1] > 0
    assert build_potential(model.config, STATISTICS, seed=0).host.layers[0].contraction.order == 3


def test_progressive_runs_start_with_order_one_and_carry_weights_over(folder):
    directory = train(folder, "progressive", "training.progressive_correlation=[2]", "training.max_epochs=2")
    contraction = load_potential(directory.path).host.layers[0].contraction
    above = {int(i) for group in contraction.polynomial.terms if len(group.factors) > 2 for i in group.indices[:, 0]}
    assert torch.count_nonzero(contraction.weight[:, sorted(above)]) == 0
    assert contraction.order == contraction.correlation == 2
    later = train(folder, "progressive_longer", "training.progressive_correlation=[2]")
    contraction = load_potential(later.path).host.layers[0].contraction
    assert torch.count_nonzero(contraction.weight[:, sorted(above)]) > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.progressive_correlation=[1, 2]"], "needs 1 epochs in ascending order"),
        (["training.progressive_correlation=[-1]"], "needs 1 epochs in ascending order"),
        (["model.host={kind: nequip}", "training.progressive_correlation=[1]"], "belongs to the host 'mace'"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(folder, overrides, message):
    with pytest.raises(ConfigError, match=message):
        toy_config(folder, "refused", *overrides)
