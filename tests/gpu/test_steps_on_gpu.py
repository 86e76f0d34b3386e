"""Recorded steps where they are meant to run. Skipped without a GPU; never run on one so far."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU: what runs without one is in the other folders", allow_module_level=True)

from steradian.config import LossConfig
from steradian.execution.batches import DeviceData
from steradian.execution.steps import GradientStep, Runner, Steps
from steradian.graph import batch_graphs
from steradian.training.optimisation import Loss
from steradian.training.run import fit
from tests import cases
from tests.unit.training_cases import toy_config, toy_file

COMBINATIONS = [
    *((host, "none") for host in cases.HOSTS),
    *(("mace", operator) for operator in cases.OPERATORS if operator != "none"),
    *((host, "both") for host in ("nequip", "visnet", "o3mpnn")),
]


def on_gpu(host: str, operator: str, dtype: torch.dtype = torch.float64):
    return cases.potential(host, operator, dtype).to("cuda")


@pytest.mark.parametrize(("host", "operator"), COMBINATIONS)
def test_runner(host, operator):
    potential = on_gpu(host, operator)
    runner = Runner(potential, "cuda_graph")
    for seed in range(3):
        graph = cases.batch(cases.ethanol(seed), cases.ethanol(seed + 1))
        found, expected = runner(graph), potential(graph.to("cuda"))
        assert float((found.forces - expected.forces).abs().max()) < 1e-8
        assert float((found.energy - expected.energy).abs().max()) < 1e-8
    assert runner.reason is None


@pytest.mark.parametrize("operator", ["none", "mara"])
def test_training_step_follows_the_weights(operator):
    potential = on_gpu("mace", operator).train()
    graphs = [cases.graph(cases.ethanol(seed)) for seed in range(6)]
    labels = {"energy": torch.zeros(1).double(), "forces": torch.ones(9, 3).double()}
    graphs = [replace(graph, **labels) for graph in graphs]
    data = DeviceData(graphs, "cpu", number=6, cutoff=potential.cutoff).to("cuda")
    loss = Loss(LossConfig())
    step = GradientStep(potential, lambda found, graph: loss(found, graph).total, forces=True, stress=False)
    steps = Steps(step, "cuda_graph", data=data)
    for chosen in ([0, 1, 2], [3, 4, 5], [1, 0, 4]):
        found = steps(chosen)
        graph = batch_graphs([graphs[index] for index in chosen]).to("cuda")
        total = loss(potential(graph), graph).total
        expected = torch.autograd.grad(total, list(potential.parameters()), allow_unused=True)
        largest = max(float(value.abs().max()) for value in expected if value is not None)
        for gradient, truth in zip(found.gradients, expected):
            assert truth is None or float((gradient - truth).abs().max()) < 1e-8 * largest
        with torch.no_grad():
            for weight in potential.parameters():
                weight.mul_(1.02)
    assert steps.reason is None


def test_replayed_steps_do_not_wait():
    potential = on_gpu("mace", "mara", torch.float32)
    graph = cases.batch(cases.ethanol(0), cases.ethanol(1)).to("cuda")
    runner = Runner(potential)
    runner(graph)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            runner(graph)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["float32", "mixed", "half"])
@pytest.mark.parametrize("execution", ["eager", "cuda_graph"])
def test_training_run(tmp_path, execution, precision, capsys):
    toy_file(tmp_path)
    settings = ("model.edge_gate.dropout=0.0", f"model.precision={precision}", f"training.execution={execution}")
    result = fit(toy_config(tmp_path, "run", *settings), progress=False)
    assert result.steps == 16
    assert "cannot be recorded" not in capsys.readouterr().err
    plain = fit(toy_config(tmp_path, "plain", *settings[:2], "training.device=cpu"), progress=False)
    assert result.metrics["validation/forces_mae"] == pytest.approx(plain.metrics["validation/forces_mae"], rel=0.3)
