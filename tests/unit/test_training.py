"""Losses, moving average, schedules, optimiser, and runs on toy data."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

from steradian.build import build_potential, load_potential
from steradian.config import ConfigError, LossConfig, OptimizerConfig, RunConfig, ScheduleConfig, load_config
from steradian.data.load import load_dataset
from steradian.evaluation.metrics import METRICS, ErrorAccumulator
from steradian.graph import Graph, Prediction, batch_graphs
from steradian.graph.batches import GraphDataset
from steradian.graph.structures import Structure
from steradian.potential import Potential
from steradian.training.loop import DivergenceError, Steps
from steradian.training.optimisation import (
    LearningRate,
    Loss,
    MissingLabelError,
    MovingAverage,
    labels_in_use,
    make_optimizer,
    parameter_groups,
)
from steradian.training.prepare import check_monitor
from steradian.training.record import RunDirectory, random_state, read_state, restore_random_state, write_state
from steradian.training.run import fit
from tests.unit.training_cases import toy_config, toy_file, toy_frames


def two_systems(**labels: Any) -> Graph:
    """Systems of one and two atoms."""
    empty = torch.zeros(0, dtype=torch.int64)
    return Graph(
        positions=torch.zeros(3, 3),
        numbers=torch.tensor([1, 8, 1]),
        system=torch.tensor([0, 1, 1]),
        senders=empty,
        receivers=empty,
        shifts=torch.zeros(0, 3),
        cell=torch.zeros(2, 3, 3),
        pbc=torch.zeros(2, 3, dtype=torch.bool),
        num_systems=2,
        **labels,
    )


def predicted(
    energy: list[float], forces: torch.Tensor | None = None, stress: torch.Tensor | None = None
) -> Prediction:
    total = torch.tensor(energy, dtype=torch.float64)
    return Prediction(energy=total, atom_energies=total, interaction_energy=total, forces=forces, stress=stress)


# ------------------------------------------------------------------------------------------------------------- losses


def test_mse_by_hand() -> None:
    graph = two_systems(
        energy=torch.tensor([1.0, 2.0], dtype=torch.float64),
        forces=torch.zeros(3, 3),
        stress=torch.zeros(2, 3, 3),
        weight=torch.tensor([1.0, 3.0]),
    )
    forces = torch.zeros(3, 3)
    forces[0, 0], forces[2, 1] = 0.3, 0.6
    stress = torch.zeros(2, 3, 3)
    stress[1, 0, 0] = 0.9
    loss = Loss(LossConfig(energy_weight=2, forces_weight=9, stress_weight=18))
    terms = loss(predicted([1.5, 3.0], forces, stress), graph)
    energy = 2 * (1 * 0.5**2 + 3 * (1.0 / 2) ** 2) / 2
    force = 9 * (1 * 0.3**2 + 3 * 0.6**2) / 9
    assert float(terms.energy) == pytest.approx(energy)
    assert float(terms.forces) == pytest.approx(force)
    assert float(terms.stress) == pytest.approx(18 * 3 * 0.9**2 / 18)
    assert float(terms.total) == pytest.approx(energy + force + 3 * 0.9**2)


@pytest.mark.parametrize(
    ("kind", "small", "large"), [("l1", 0.1, 4.0), ("huber", 0.1**2 / 2, 0.5 * (4 - 0.25)), ("mse", 0.01, 16.0)]
)
def test_kinds(kind: Any, small: float, large: float) -> None:
    loss = Loss(LossConfig(kind=kind, energy_weight=1, forces_weight=0, energy_per_atom=False, huber_delta=0.5))
    for error, expected in ((0.1, small), (4.0, large)):
        graph = two_systems(energy=torch.zeros(2, dtype=torch.float64))
        assert float(loss(predicted([error, -error]), graph).total) == pytest.approx(expected)


def test_large_totals_keep_their_digits() -> None:
    """A tenth of a meV on a total of a million eV: float32 would see nothing or 60 meV."""
    graph = two_systems(energy=torch.tensor([-1e6, -1e6], dtype=torch.float64))
    loss = Loss(LossConfig(kind="l1", energy_weight=1, forces_weight=0, energy_per_atom=False))
    assert float(loss(predicted([-1e6 + 1e-4, -1e6 - 1e-4]), graph).total) == pytest.approx(1e-4, rel=1e-4)


def test_missing_label() -> None:
    loss = Loss(LossConfig())
    with pytest.raises(MissingLabelError, match=r"forces.*training\.loss\.forces_weight"):
        loss(predicted([0, 0], torch.zeros(3, 3)), two_systems(energy=torch.zeros(2, dtype=torch.float64)))
    with pytest.raises(MissingLabelError, match="every weight is zero"):
        labels_in_use(LossConfig(energy_weight=0, forces_weight=0))


# ------------------------------------------------------------------------- moving average, schedules, optimiser, state


def test_moving_average_by_hand() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    average = MovingAverage([weight], 0.5)
    expected = 1.0
    for step, value in enumerate((2.0, 4.0, 8.0), start=1):
        weight.data.fill_(value)
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert float(average.averages[0]) == pytest.approx(expected)
    with average.averaged_weights():
        assert float(weight.detach()) == pytest.approx(expected)
    assert float(weight.detach()) == 8.0


def test_cosine_with_warmup() -> None:
    rate = LearningRate(ScheduleConfig(kind="cosine", warmup_steps=4, min_learning_rate=0.01), 1.0, 104)
    assert [rate.at(step) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rate.at(4) == pytest.approx(1.0)
    assert rate.at(54) == pytest.approx(0.505)
    assert rate.at(104) == rate.at(500) == pytest.approx(0.01)


def test_plateau() -> None:
    rate = LearningRate(ScheduleConfig(kind="plateau", patience=2, factor=0.5, min_learning_rate=0.2), 1.0, 100)
    values = [5.0, 4.0, 4.0, 4.5, 3.9, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]
    assert [rate.after_validation(value, 1) for value in values].count(True) == 3
    assert rate.at(50) == pytest.approx(0.2), "1, 0.5, 0.25, then the lowest rate"
    again = LearningRate(rate.config, 1.0, 100)
    again.load_state_dict(rate.state_dict())
    assert again.at(50) == rate.at(50)


def test_only_matrices_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Embedding(5, 4))
    model[2].no_weight_decay = ("weight",)
    decaying, free = parameter_groups(model, 0.1)
    assert decaying["params"] == [model[0].weight]
    assert decaying["weight_decay"] == 0.1
    assert len(free["params"]) == 4
    assert free["weight_decay"] == 0.0
    assert isinstance(make_optimizer(model, OptimizerConfig(kind="adam")), torch.optim.Adam)


def test_state_file_holds_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_state(path, {"random": random_state(), "weights": {"a": torch.ones(2)}})
    first = [torch.rand(3)]
    state = read_state(path)  # weights_only
    torch.rand(7)
    restore_random_state(read_state(path)["random"])
    assert torch.equal(torch.rand(3), first[0])
    assert state["weights"]["a"].sum() == 2


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("training")
    toy_file(path)
    return path


def rows_of(directory: RunDirectory) -> list[dict[str, str]]:
    with open(directory.metrics, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def errors_of(potential: Potential, frames: list[Structure]) -> dict[str, float]:
    graphs = GraphDataset(frames, potential.cutoff)
    graph = batch_graphs([graphs[index] for index in range(len(graphs))])
    errors = ErrorAccumulator()
    errors.update(potential.eval()(graph), graph)
    return errors.compute()


def test_run_learns_and_records(folder: Path) -> None:
    """One of the twenty training frames, with two atoms that nearly touch (34 eV/Å), carries most of the squared loss.

    The loss of a single epoch therefore goes up and down by a factor of ten while the step is large; what the run has
    learned is seen in the errors of its model against those before training, and in the middle one of the last losses.
    Over five seeds the force errors fall to 0.03-0.08 (validation) and 0.03-0.14 (training) of the start.
    """
    config = toy_config(
        folder, "learns", "training.max_epochs=25", "model.edge_gate.dropout=0.0", "training.validate_every=4"
    )
    result = fit(config, progress=False)
    directory = RunDirectory(result.run_dir)
    rows = rows_of(directory)
    assert [int(row["epoch"]) for row in rows] == [4, 8, 12, 16, 20, 24, 25], "the last epoch is always validated"
    losses = [float(row["train/loss"]) for row in rows]
    assert sorted(losses[-3:])[1] < 0.2 * losses[0]
    dataset = load_dataset(config.data)
    trained = load_potential(directory.model)
    start = build_potential(config.model, trained.statistics, seed=config.training.seed)
    for frames, share in ((dataset.validation, 0.15), (dataset.train, 0.25)):
        before, after = errors_of(start, frames), errors_of(trained, frames)
        assert after["forces_mae"] < share * before["forces_mae"]
        assert after["energy_mae"] < share * before["energy_mae"]
    assert {name for name in rows[0] if name.startswith("validation/")} == {
        f"validation/{name}" for name in METRICS if not name.startswith("stress")
    }
    assert load_config(directory.config) == config
    for file in directory.files:
        assert file.is_file(), file


def test_best_model_has_averaged_weights_and_the_reported_figures(folder: Path) -> None:
    config = toy_config(folder, "best", "training.optimizer.learning_rate=0.05", "training.max_epochs=6")
    result = fit(config, progress=False)
    directory = RunDirectory(result.run_dir)
    values = [float(row[config.training.monitor]) for row in rows_of(directory)]
    assert result.metrics[config.training.monitor] == pytest.approx(min(values), rel=1e-6)
    potential = load_potential(directory.model)
    found = errors_of(potential, load_dataset(config.data).validation)
    for name, value in found.items():
        assert result.metrics[f"validation/{name}"] == pytest.approx(value, rel=1e-4), name
    state = read_state(directory.state)
    raw = [state["weights"][name] for name, _ in potential.named_parameters()]
    assert any(not torch.equal(one, other) for one, other in zip(raw, state["average"]["averages"]))


def test_early_stopping_on_a_tail(folder: Path) -> None:
    config = toy_config(
        folder,
        "early",
        "training.max_epochs=50",
        "training.monitor=validation/forces_q99",
        "training.early_stopping_patience=2",
        "training.optimizer.learning_rate=1e-12",
        "training.schedule.warmup_steps=0",
    )
    result = fit(config, progress=False)
    assert result.reason == "early_stopping"
    assert result.epochs < 10
    assert fit(config, resume=result.run_dir, progress=False).epochs == result.epochs


def test_divergence_names_frames_and_keeps_the_last_good_state(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy_config(folder, "diverges")
    accumulate = Steps.accumulate

    def broken(self: Steps, batch: Any, first: bool = True) -> None:
        if self.step == 5:
            batch = replace(batch, graph=replace(batch.graph, energy=batch.graph.energy * math.nan))
        accumulate(self, batch, first)

    monkeypatch.setattr(Steps, "accumulate", broken)
    with pytest.raises(
        DivergenceError, match=r"the loss is nan at step 6, in training frames .*toy\.xyz:\d+"
    ) as caught:
        fit(config, progress=False)
    assert len(str(caught.value).splitlines()) == 1
    directory = RunDirectory(config.output / config.name)
    state = read_state(directory.state)
    assert state["position"]["step"] == 5
    assert all(torch.isfinite(weight).all() for weight in state["weights"].values() if weight.is_floating_point())
    monkeypatch.undo()
    assert fit(config, resume=directory.path, progress=False).reason == "finished"


def test_dry_run_writes_nothing(folder: Path) -> None:
    config = toy_config(folder, "dry")
    rows: list[tuple[str, str]] = []
    result = fit(config, dry_run=True, show_plan=rows.extend)
    assert result.steps == 2
    assert "validation/forces_mae" in result.metrics
    assert not (config.output / config.name).exists()
    plan = dict(rows)
    assert plan["training data"] == "20 frames, 4 atoms each (H O)"
    assert plan["stress labels"].endswith("not used")


def test_frames_without_label_are_refused(tmp_path: Path) -> None:
    frames = toy_frames()
    del frames[3].calc.results["forces"]
    write(tmp_path / "toy.xyz", frames, format="extxyz")
    with pytest.raises(ValueError, match="forces"):
        fit(toy_config(tmp_path), progress=False)
    energies = toy_config(
        tmp_path, "energies", "training.loss.forces_weight=0", "training.monitor=validation/energy_mae"
    )
    assert fit(energies, progress=False).reason == "finished"
    with pytest.raises(ConfigError, match="needs forces"):
        fit(toy_config(tmp_path, "wrong", "training.loss.forces_weight=0"), progress=False)
    assert len(read(tmp_path / "toy.xyz", ":")) == len(frames)


def test_unknown_metric_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'validation/forces_q95'") as caught:
        check_monitor("validation/force_q95", ("energy", "forces"))
    assert "validation/energy_mae" in str(caught.value)
    config = RunConfig.model_validate({"data": {"train": "nowhere.xyz"}, "training": {"monitor": "loss"}})
    with pytest.raises(ConfigError, match="monitor"):
        fit(config)


def test_missing_logger_is_one_line(folder: Path) -> None:
    try:
        import wandb  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(ConfigError, match=r"pip install 'steradian\[wandb\]'"):
            fit(toy_config(folder, "wandb", "training.loggers=[csv, wandb]"), progress=False)


def test_stress_is_learned(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    frames = []
    for _ in range(12):
        atoms = bulk("Cu", cubic=True)
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.05 * generator.standard_normal((3, 3))), scale_atoms=True)
        atoms.rattle(0.05, rng=generator)
        atoms.calc = EMT()
        stress = atoms.get_stress()
        atoms.calc = SinglePointCalculator(
            atoms, energy=atoms.get_potential_energy(), forces=atoms.get_forces(), stress=stress
        )
        frames.append(atoms)
    write(tmp_path / "toy.xyz", frames, format="extxyz")
    settings = (
        "training.loss={energy_weight: 10, forces_weight: 10, stress_weight: 1000}",
        "training.monitor=validation/stress_mae",
        "training.max_epochs=40",
        "training.optimizer={learning_rate: 0.02}",
        "training.schedule={kind: constant}",
        "model.host.num_channels=8",
        "model.edge_gate={kind: none}",
        "data.split={train: 9, validation: 3}",
    )
    result = fit(toy_config(tmp_path, "stress", *settings), progress=False)
    rows = rows_of(RunDirectory(result.run_dir))
    assert result.metrics["validation/stress_mae"] < 0.5 * float(rows[0]["validation/stress_mae"])
