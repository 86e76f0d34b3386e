"""What MARA costs in a live model of another package, attached to every layer.

    PYTHONPATH=src PYTHON benchmarks/attach_overhead.py --package mace-torch [--data ../shared/data/3bpa/train_300K.xyz]

PYTHON has mace-torch, nequip or torch_geometric, and what steradian needs to attach. Two models with the same weights
stand in one process, one with MARA (4 x 8 grid, 32 dimensions), and are called in turn; five 3BPA molecules, float32,
one thread. The overhead is the median of the ratios of neighbours in time, minus one; quartiles stand beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 loads its constants with torch.load

import numpy as np
from cpu_hosts import NEQUIP, VISNET
from cpu_mace import structures
from settings import RESULTS, ROOT, interleaved, machine, median_ms, write
from sides import SIDES, Side

TASKS = ("energy + forces", "training step")
CASES: dict[str, dict[str, Any]] = {
    "mace-torch": {"channels": 128, "hidden_l": 1, "l_max": 3, "correlation": 3},
    "nequip": {"model": NEQUIP},
    "torch_geometric": {"model": VISNET},
}


def prepared(package: str, folder: Path, case: dict[str, Any]) -> tuple[Side, dict[str, Any]]:
    side = SIDES[package](folder)
    return side, side.prepare(case)


def measure(package: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Times without and with MARA, and the overhead, for every task."""
    from steradian.config import MARAConfig
    from steradian.interfaces.attach import attach

    case = CASES[package] | {"cutoff": 5.0, "threads": 1, "elements": [1, 6, 7, 8]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "structures.npz", **structures("3bpa", 5, arguments.data))
        case |= {"avg_num_neighbors": 2242 / 135}
        (bare, about), (gated, _) = prepared(package, folder, case), prepared(package, folder, case)
    attachment = attach(gated.model, MARAConfig(form="published", frame="lab"))
    result: dict[str, Any] = {"about": about, "layers": len(attachment.layers)}
    for task in TASKS:
        for side in (bare, gated):
            side.select(task)
        runs = {"bare": lambda: bare.run(task), "MARA": lambda: gated.run(task)}  # noqa: B023 (called at once)
        times = interleaved(runs, arguments.repeats, arguments.warmup)
        ratios = [with_it / without for with_it, without in zip(times["MARA"], times["bare"])]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[task] = {
            "bare_ms": median_ms(times["bare"]),
            "mara_ms": median_ms(times["MARA"]),
            "overhead_percent": round(100 * (middle - 1), 1),
            "quartiles_percent": [round(100 * (low - 1), 1), round(100 * (high - 1), 1)],
        }
        print(package, task, result[task], flush=True)
    return result


def main() -> None:
    import sides_hosts  # noqa: F401 (adds its sides)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", choices=CASES, default="mace-torch")
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data/3bpa/train_300K.xyz")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=4)
    arguments = parser.parse_args()
    path = RESULTS / "attach_overhead.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    result = measure(arguments.package, arguments)
    settings = machine() | {"repeats": arguments.repeats, "warmup": arguments.warmup}
    content.setdefault("results", {})[arguments.package] = {"settings": settings, **result}
    write("attach_overhead", content)


if __name__ == "__main__":
    main()
