"""What MARA's factorised form costs, and how exactly it equals the dense form of the paper.

The edges of five 3BPA molecules (2242 edges, 135 atoms, 128 features, hidden width 32, 4 x 8 points), random geometry.
Timed: the gate alone, without its host. Its value without gradients; value and gradients by positions and features, as
forces need; a training step, gradients by all parameters of a loss on those gradients. Times are processor times of one
thread (the machine may be shared); memory is that of the largest single tensor formed.

    OMP_NUM_THREADS=1 python benchmarks/mara_dense.py
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from steradian.equivariant.sphere import lebedev
from steradian.operators.base import BareEdges
from steradian.operators.mara.gate import MARA
from steradian.operators.mara.intrinsic import IntrinsicMARA

NUM_ATOMS, NUM_EDGES, NUM_FEATURES, HIDDEN_DIM = 135, 2242, 128, 32
DEGREES = ((0, 1), (1, -1))


def random_case(dtype: torch.dtype) -> tuple[Tensor, BareEdges]:
    """Features ``[N, 4, F]`` and edges of 1 to 5 Å, sorted by receiver."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(NUM_ATOMS, 4, NUM_FEATURES, generator=generator, dtype=torch.float64)
    vectors = nn.functional.normalize(torch.randn(NUM_EDGES, 3, generator=generator, dtype=torch.float64), dim=1)
    vectors = vectors * (1 + 4 * torch.rand(NUM_EDGES, 1, generator=generator, dtype=torch.float64) ** 0.5)
    receivers = torch.randint(NUM_ATOMS, (NUM_EDGES,), generator=generator).sort().values
    senders = torch.randint(NUM_ATOMS, (NUM_EDGES,), generator=generator)
    return features.to(dtype), BareEdges(senders, receivers, vectors.to(dtype))


def forward(gate: Callable[..., Tensor], features: Tensor, edges: BareEdges) -> Tensor:
    with torch.no_grad():
        return gate(features, edges)


def gradients(gate: Callable[..., Tensor], features: Tensor, edges: BareEdges) -> tuple[Tensor, ...]:
    features = features.detach().requires_grad_()
    vectors = edges.vectors.detach().requires_grad_()
    alpha = gate(features, edges._replace(vectors=vectors))
    return torch.autograd.grad(alpha.sum(), (vectors, features))


def training_step(
    gate: Callable[..., Tensor], features: Tensor, edges: BareEdges, parameters: list[Tensor]
) -> tuple[Tensor, ...]:
    features = features.detach().requires_grad_()
    vectors = edges.vectors.detach().requires_grad_()
    alpha = gate(features, edges._replace(vectors=vectors))
    first = torch.autograd.grad(alpha.sum(), (vectors, features), create_graph=True)
    loss = alpha.square().sum() + sum(gradient.square().sum() for gradient in first)
    return torch.autograd.grad(loss, (features, *parameters), allow_unused=True)


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def measure(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    with LargestTensor() as largest:
        call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(1e3 * (time.process_time() - start))
    return {
        "milliseconds_median": round(statistics.median(times), 2),
        "milliseconds_fastest": round(min(times), 2),
        "largest_tensor_megabytes": round(largest.bytes / 1e6, 2),
    }


def largest_difference(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> float:
    """Largest difference relative to the largest entry of each tensor."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(left, right) if b is not None)


def compare(dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    features, edges = random_case(dtype)
    torch.manual_seed(0)
    mara = MARA(NUM_FEATURES, hidden_dim=HIDDEN_DIM, gate="published").to(dtype)
    parameters = list(mara.parameters())

    def dense(features: Tensor, edges: BareEdges) -> Tensor:
        return mara.as_written(features, edges).alpha

    report: dict[str, Any] = {}
    for name, gate in {"factorised": mara, "dense": dense}.items():
        report[name] = {
            "value": measure(lambda gate=gate: forward(gate, features, edges), repeats),
            "value_and_gradients": measure(lambda gate=gate: gradients(gate, features, edges), repeats),
            "training_step": measure(lambda gate=gate: training_step(gate, features, edges, parameters), repeats),
        }
    report["largest_relative_difference"] = {
        "alpha": largest_difference((mara(features, edges),), (dense(features, edges),)),
        "gradients": largest_difference(gradients(mara, features, edges), gradients(dense, features, edges)),
        "training_step": largest_difference(
            training_step(mara, features, edges, parameters), training_step(dense, features, edges, parameters)
        ),
    }
    for kernel, points in (("polynomial", 26), ("exp", 50), ("exp", 86)):
        gate = IntrinsicMARA(NUM_FEATURES, DEGREES, grid=lebedev(points), hidden_dim=HIDDEN_DIM, kernel=kernel).to(
            dtype
        )
        nn.init.ones_(gate.W_gate)
        report[f"intrinsic {kernel} {points} points"] = {
            "value": measure(lambda gate=gate: forward(gate, features, edges), repeats),
            "value_and_gradients": measure(lambda gate=gate: gradients(gate, features, edges), repeats),
        }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mara_dense.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    result: dict[str, Any] = {
        "settings": {
            "atoms": NUM_ATOMS,
            "edges": NUM_EDGES,
            "features": NUM_FEATURES,
            "hidden_dim": HIDDEN_DIM,
            "heads": 1,
            "grid": "equiangular 4 x 8",
            "threads": 1,
            "repeats": arguments.repeats,
            "torch": torch.__version__,
            "processor": platform.processor() or platform.machine(),
            "commit": commit.strip(),
        }
    }
    for dtype in (torch.float32, torch.float64):
        result[str(dtype).removeprefix("torch.")] = compare(dtype, arguments.repeats)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
