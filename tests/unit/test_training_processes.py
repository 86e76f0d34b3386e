"""Several processes through torchrun: averaged gradients, exact metrics, uneven shares, one writer."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from steradian.build import build_potential, load_potential
from steradian.config import RunConfig, dump_config
from steradian.data.load import load_dataset
from steradian.data.statistics import DatasetStatistics
from steradian.evaluation.metrics import ErrorAccumulator
from steradian.graph import batch_graphs
from steradian.graph.batches import GraphDataset
from steradian.training.record import RunDirectory, read_state
from steradian.training.run import fit
from tests.unit.training_cases import toy_config, toy_file

EXACT = (
    "model.edge_gate.dropout=0.0",
    "model.precision=float64",
    "training.optimizer.accumulate=1",
    "training.monitor=validation/forces_mae",
    "training.max_epochs=2",
)
SCRIPT = """
import sys
from pathlib import Path
from steradian.config import load_config
from steradian.training.run import fit
from steradian.training.machine import Process, end_processes
import torch
process = Process.present()
process.join(torch.device("cpu"))
transposed, lacking, idle = (torch.nn.Parameter(torch.zeros(3, 2).T if k == 0 else torch.zeros(2)) for k in range(3))
transposed.grad = (process.rank + 1.0) * torch.arange(6.0).reshape(3, 2).T
lacking.grad = None if process.first else torch.tensor([2.0, 4.0])
process.average_gradients([transposed, lacking, idle])
assert torch.equal(transposed.grad, 1.5 * torch.arange(6.0).reshape(3, 2).T)
assert transposed.grad.stride() == transposed.stride()
assert lacking.grad.tolist() == [1.0, 2.0]
assert idle.grad is None
for argument in sys.argv[1:]:
    config = load_config(argument.removeprefix("resume:"))
    fit(config, resume=config.output / config.name if argument.startswith("resume:") else None, progress=True)
end_processes()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("processes")
    toy_file(path)
    return path


def written(folder: Path, config: RunConfig, file: str) -> str:
    path = folder / f"{file}.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    return str(path)


def torchrun(arguments: list[str], timeout: float = 150) -> str:
    """What two processes print; they are ended when they hang."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments]
    launcher = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        out, err = launcher.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        launcher.terminate()  # torchrun then ends its workers
        out, err = launcher.communicate(timeout=60)
        raise AssertionError(f"the processes hang after: {out[-500:]}\n{err[-2000:]}") from None
    assert launcher.returncode == 0, err[-3000:]
    assert "Warning" not in err, err
    return out


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, RunDirectory]:
    """All runs on two processes, in one launch: even shares, uneven shares, a run stopped by time and resumed."""
    even = toy_config(folder, "even", "data.split.train=18", *EXACT)
    uneven = toy_config(
        folder, "uneven", "data.split.train=19", "data.split.validation=1", "data.batch.graphs=3", *EXACT
    )
    stopped = toy_config(folder, "stopped", "training.max_time_s=0.05", "training.max_epochs=20")
    longer = toy_config(folder, "stopped", "training.max_time_s=1000", "training.max_epochs=20")
    whole = toy_config(folder, "whole", "training.max_epochs=20")
    files = [written(folder, even, "even"), written(folder, uneven, "uneven"), written(folder, stopped, "stopped")]
    files += ["resume:" + written(folder, longer, "longer"), written(folder, whole, "whole")]
    script = folder / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    out = torchrun([str(script), *files])
    assert out.count("epoch 2/2 ") == 2, "only one process prints"
    return {config.name: RunDirectory(config.output / config.name) for config in (even, uneven, stopped, whole)}


def rows_of(directory: RunDirectory) -> list[dict[str, str]]:
    with open(directory.metrics, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_gradients_are_averaged(folder: Path, runs: dict[str, RunDirectory]) -> None:
    """Two processes with batches of three make the steps of one process with batches of six."""
    config = toy_config(folder, "single", "data.split.train=18", "data.batch.graphs=6", *EXACT)
    directory = RunDirectory(fit(config, progress=False).run_dir)
    losses = [float(row["train/loss"]) for row in rows_of(directory)]
    assert [float(row["train/loss"]) for row in rows_of(runs["even"])] == pytest.approx(losses, rel=1e-7)
    single, double = read_state(directory.state), read_state(runs["even"].state)
    assert double["position"]["step"] == single["position"]["step"] == 6
    statistics = DatasetStatistics.from_dict(single["statistics"])
    start = dict(build_potential(config.model, statistics, seed=config.training.seed).named_parameters())
    for name, weight in single["weights"].items():
        torch.testing.assert_close(double["weights"][name], weight, rtol=1e-8, atol=1e-10)
    assert max(float((single["weights"][name] - start[name].detach()).abs().max()) for name in start) > 0.01, (
        "it did train"
    )


@pytest.mark.parametrize("name", ["even", "uneven"])
def test_metrics_equal_one_process(runs: dict[str, RunDirectory], name: str) -> None:
    directory = runs[name]
    config = directory.read_config()
    with open(directory.metrics, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    best = read_state(directory.state)["position"]["best_epoch"]
    potential = load_potential(directory.model)
    frames = GraphDataset(load_dataset(config.data).validation, potential.cutoff)
    graph = batch_graphs([frames[index] for index in range(len(frames))])
    errors = ErrorAccumulator()
    errors.update(potential(graph), graph)
    for key, value in errors.compute("validation/").items():
        assert float(rows[best - 1][key]) == pytest.approx(value, rel=1e-6), key


def test_every_frame_is_seen_once(runs: dict[str, RunDirectory]) -> None:
    """Nineteen frames in batches of three: seven batches, one of them cut, four steps for both processes."""
    assert read_state(runs["uneven"].state)["position"]["step"] == 8


def test_resumed_equals_whole(runs: dict[str, RunDirectory]) -> None:
    stopped, whole = read_state(runs["stopped"].state), read_state(runs["whole"].state)
    assert "resumed at" in runs["stopped"].log_file.read_text()
    for name, weight in whole["weights"].items():
        assert torch.equal(stopped["weights"][name], weight)
    for left, right in zip(stopped["average"]["averages"], whole["average"]["averages"]):
        assert torch.equal(left, right)


def test_record_is_written_once(runs: dict[str, RunDirectory]) -> None:
    with open(runs["even"].metrics, encoding="utf-8") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    assert len(read_state(runs["even"].state)["ranks"]) == 2
    assert json.loads(runs["even"].provenance.read_text())["counts"]["train"] == 18
