"""Whole models on Triton's kernels under the interpreter: energies, forces and gradients of the weights."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="kernels for GPUs need triton, which PyTorch brings with CUDA only")

from steradian.build import build_potential
from steradian.config import MACEConfig, MARAConfig, ModelConfig
from steradian.execution.backend_benchmark import benchmark_backends
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure
from steradian.polynomials import triton as polynomial_ops
from steradian.polynomials import use_backend
from tests.systems import NO_REFERENCES as STATISTICS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOST = MACEConfig(num_channels=2, l_max=1, hidden_l=1, correlation=2, radial_mlp=[4])


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch):
    """The check of every polynomial has tests of its own."""
    monkeypatch.setattr("steradian.polynomials.passes", lambda *_: True)


def model(precision="float64", gated=False):
    gates = (
        {
            "edge_gate": MARAConfig(
                form="published",
                frame="lab",
                hidden_dim=4,
                gate="published",
                grid={"kind": "equiangular", "num_lat": 2, "num_lon": 3},
            )
        }
        if gated
        else {}
    )
    return build_potential(ModelConfig(host=HOST, precision=precision, **gates), STATISTICS, seed=2).to(DEVICE).train()


def batch():
    """Four atoms, one of them without neighbours."""
    positions = np.array([[0.0, 0.0, 0.0], [1.1, 0.2, 0.1], [-0.4, 0.9, 0.3], [30.0, 0.0, 0.0]])
    return make_graph(Structure(np.array([6, 1, 8, 1]), positions), 5.0).to(DEVICE)


@pytest.mark.parametrize("gated", [False, True], ids=["mace", "mace-mara"])
def test_training_step_equals_the_reference(gated, monkeypatch):
    ran = []
    run = polynomial_ops.run_program
    monkeypatch.setattr(polynomial_ops, "run_program", lambda *given: ran.append(1) or run(*given))
    potential, graph = model(gated=gated), batch()
    found = benchmark_backends(potential, graph, training=True, candidates=["triton"], timer=lambda *_: 1.0)
    assert not found.refused
    assert found.errors["triton"] < 1e-12
    assert len(ran) > 10


def test_mixed_precision_equals_the_reference():
    potential, graph = model("mixed").eval(), batch()
    results = []
    for name in ("reference", "triton"):
        with use_backend(name):
            results.append(potential(graph))
    # bfloat16 is cut off by the interpreter and rounded by a GPU: one unit of its eight bits
    scale = float(results[0].forces.abs().max())
    assert float((results[1].forces - results[0].forces).abs().max()) < 2e-2 * scale


def test_programs_of_a_model_have_names_that_do_not_depend_on_the_process():
    potential, graph = model().eval(), batch()
    with use_backend("triton"):
        potential(graph)
        names = {name for name in polynomial_ops._PROGRAMS if "|" not in name}
        for name in names:
            assert polynomial_ops.name_of(polynomial_ops.program_named(name)) == name
    derived = next(name for name in polynomial_ops._PROGRAMS if "|" in name)
    program = polynomial_ops._PROGRAMS.pop(derived)
    again = polynomial_ops.program_named(derived)  # as in a process that loads a compiled graph
    assert again.nodes == program.nodes
