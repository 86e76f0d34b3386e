"""The EFA block on a GPU from 10^3 to 10^6 atoms: time, growth, and how near to what the GPU can do.

    python benchmarks/gpu_efa.py [--sizes 1000 10000 100000 1000000] [--points 50]
    python benchmarks/gpu_efa.py --device cpu --smoke

One system, degree 1, 32 features, float32 products accumulated in float32 (and tf32 inputs as a second case), sums at
every size. Forward, and forward + gradient by positions. The ceiling is measured in the same run: the rate of a product
of large float32 matrices (with TF32 off and on), and the rate of copying an array. Floating-point operations are those
of the plain form, counted by PyTorch for a small system and proportional to the atoms; what a kernel recomputes to save
memory does not count for it. Bar: 50 % of the ceiling, and a time that grows as the atoms (exponent 1).
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from gpu_settings import Results, parser, times_ms
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from steradian.config import EFAConfig
from steradian.equivariant.irreps import natural_degrees
from steradian.operators.efa import attention as efa_attention
from steradian.operators.efa.operator import EuclideanFastAttention, Systems

BAR_PERCENT = 50.0
COUNTED = 256  # atoms of the system whose operations are counted


class Counter(TorchDispatchMode):
    """Counts the operations of products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        count = flop_registry.get(function.overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


def ceiling(device: str, smoke: bool) -> dict[str, float]:
    """TFLOP/s of a product of matrices and TB/s of a copy."""
    side = 256 if smoke else 8192
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    source = torch.ones(2**18 if smoke else 2**29, device=device)
    target = torch.empty_like(source)
    found = {}
    before = torch.backends.cuda.matmul.allow_tf32
    for name, tf32 in (("float32", False), ("tf32", True)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        ms = times_ms(lambda: a @ b, device, 0.05 if smoke else 1.0)["median_ms"]
        found[f"{name}_TFLOPs"] = round(2 * side**3 / ms / 1e9, 3)
    torch.backends.cuda.matmul.allow_tf32 = before
    ms = times_ms(lambda: target.copy_(source), device, 0.05 if smoke else 1.0)["median_ms"]
    return found | {"copy_TBs": round(2 * source.nbytes / ms / 1e9, 4)}


def problem(size: int, points: int, device: str) -> tuple[Any, ...]:
    """The block, features, positions and a cotangent, in one system; atoms far apart, so all waves count."""
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="a system is about")  # large ones are beyond what the rule resolves
    frequency = math.pi if points == 50 else 2 * math.pi
    config = EFAConfig(num_points=points, max_frequency=frequency, max_length_A=30.0)
    block = EuclideanFastAttention(config, natural_degrees(1), 32).requires_grad_(False).to(device)
    features, cotangent = torch.randn(size, 4, 32), torch.randn(size, 4, 32)
    radius = (3 * size / (4 * math.pi * 0.1)) ** (1 / 3)
    directions = torch.nn.functional.normalize(torch.randn(size, 3), dim=1)
    positions = radius * torch.rand(size, 1) ** (1 / 3) * directions
    return block, Systems((size,)), *(value.to(device) for value in (features, positions, cotangent))


def calls(size: int, points: int, device: str) -> dict[str, Any]:
    block, systems, features, positions, cotangent = problem(size, points, device)

    def forward() -> object:
        with torch.no_grad():
            return block(features, positions, systems)

    def gradient() -> object:
        x = positions.clone().requires_grad_(True)
        return torch.autograd.grad(block(features, x, systems), x, cotangent)

    return {"forward": forward, "gradient": gradient}


def operations(points: int) -> dict[str, float]:
    """Floating-point operations per atom of the plain form, forward and forward + gradient."""
    from steradian.polynomials import use_backend

    found = {}
    with use_backend("reference"):
        for name, run in calls(COUNTED, points, "cpu").items():
            with Counter() as counter:
                run()
            found[name] = counter.flops / COUNTED
    return found


def measure(
    size: int, points: int, tf32: bool, per_atom: dict[str, float], roof: dict[str, float], arguments: Any
) -> dict:
    """A row; the share of the ceiling is that of products in the format used, or of the copy where that is nearer."""
    row: dict[str, Any] = {"atoms": size}
    least_bytes = 4 * size * (2 * 4 * 32 + 2 * 3)  # features in and out, positions and their gradient
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    if torch.device(arguments.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        for name, run in calls(size, points, arguments.device).items():
            least = 0.01 if arguments.smoke else 1.0
            ms = times_ms(run, arguments.device, least, warmup=1 if arguments.smoke else 3)["median_ms"]
            rate = per_atom[name] * size / ms / 1e9
            share = 100 * rate / roof["tf32_TFLOPs" if tf32 else "float32_TFLOPs"]
            row |= {
                f"{name}_ms": ms,
                f"{name}_TFLOPs": round(rate, 3),
                f"{name}_percent_of_products": round(share, 1),
                f"{name}_TBs_at_least": round(least_bytes / ms / 1e9, 5),
            }
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    if torch.device(arguments.device).type == "cuda":
        row["peak_bytes_per_atom"] = round(torch.cuda.max_memory_allocated() / size, 1)
    return row


def main() -> None:
    options = parser(__doc__, "gpu_efa")
    options.add_argument("--sizes", type=int, nargs="*")
    options.add_argument("--points", type=int, default=50, choices=[50, 86])
    arguments = options.parse_args()
    sizes = arguments.sizes or ([64, 128] if arguments.smoke else [1000, 10_000, 100_000, 1_000_000])
    # below some thousand atoms all pairs are less work, and are taken elsewhere
    efa_attention.pairs_are_cheaper = lambda *shape: False  # type: ignore[assignment]
    results = Results(arguments, points=arguments.points, bar_percent=BAR_PERCENT)
    roof = ceiling(arguments.device, arguments.smoke)
    per_atom = operations(arguments.points)
    results.content["ceiling"], results.content["flops_per_atom"] = roof, per_atom
    print(roof, {name: round(value) for name, value in per_atom.items()})
    for tf32 in (False, True):
        rows = []
        for size in sizes:
            name = f"{size} atoms, {'tf32' if tf32 else 'float32'} products"
            rows.append(
                results.measure(name, lambda s=size, t=tf32: measure(s, arguments.points, t, per_atom, roof, arguments))
            )
        for kind in ("forward_ms", "gradient_ms"):
            known = [(row["atoms"], row[kind]) for row in rows if row and row["atoms"] >= sizes[0]]
            if len(known) > 1:
                exponent = float(np.polyfit(*np.log(np.array(known, dtype=float)).T, 1)[0])
                results.content.setdefault("exponents", {})[f"{kind}, tf32 {tf32}"] = round(exponent, 3)
                print(f"{kind}: time grows as atoms to the power {exponent:.3f}")
    results.save()
    print(results.path)


if __name__ == "__main__":
    main()
