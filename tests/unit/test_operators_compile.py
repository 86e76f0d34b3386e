"""The kernels of MARA and EFA go through Triton's compiler for an H200: what the interpreter takes, it may refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="kernels for GPUs need triton, which PyTorch brings with CUDA only")

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_compile_operators.py"


def test_every_kernel_compiles_and_keeps_its_numbers_in_registers(tmp_path):
    # a process of its own: kernels that were imported for the interpreter cannot be compiled
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    out = tmp_path / "facts.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--target", "sm_90", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = json.loads(out.read_text())["kernels"]
    names = {"row_kernel", "column_kernel", "node_kernel", "table_kernel"}
    names |= {"moments_kernel", "apply_kernel", "contract_kernel"}
    assert {kernel["kernel"] for kernel in kernels} == names
    for kernel in kernels:
        assert kernel["local_bytes"] == 0
        allowed = 24 if kernel["kernel"] == "contract_kernel" and TRITON == (3, 8) else 16  # 3.8 keeps two more there
        assert kernel["stack_bytes"] <= allowed, kernel
        assert kernel["shared_bytes"] <= 100_000  # two blocks of threads fit into a multiprocessor


def test_whoever_computes_on_a_cpu_imports_no_triton():
    code = """if True:
    import sys, torch, steradian
    from steradian.operators.mara.gate import MARA
    from steradian.operators.efa.attention import Waves, rotary_attention
    from steradian.operators.efa.paper import QKV
    from steradian.operators.efa.rules import DirectionRule
    from steradian.operators.base import BareEdges
    index, vectors = torch.tensor([0, 1]), torch.randn(2, 3, requires_grad=True)
    edges = BareEdges(index.flip(0), index, vectors)
    loss = MARA(4, gate="published")(torch.randn(2, 4), edges).sum()
    points = torch.eye(3)
    rule, q = DirectionRule(points, torch.full((3,), 1 / 3)), torch.randn(2, 1, 4)
    waves = Waves.of_rule(rule, torch.tensor([0.1, 0.2]))
    loss = loss + rotary_attention(QKV(q, q, q, vectors), waves, (2,)).sum()
    loss.backward()
    sys.exit("triton" in sys.modules)
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
