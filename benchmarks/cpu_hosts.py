"""NequIP and ViSNet on the CPU here and in the packages they come from.

    python benchmarks/cpu_hosts.py --nequip-python PYTHON --pyg-python PYTHON
                                   [--data ../shared/data/3bpa/train_300K.xyz] [--only nequip nequip_two visnet]
                                   [--compiled] [--repeats 9]

Every side runs in an interpreter of its own (``sides_hosts.py``) and answers one request at a time, in turn, so drifts
of the machine hit all alike. steradian has the peer's weights (``steradian convert``), and both must agree on energies
and forces before they are timed. The structures are the first five frames of 3BPA (135 atoms, 2242 edges at 5 Å);
float32, one thread. Times are medians of wall-clock time with processor times beside them; ratios are medians of
ratios of neighbours in time. Weights are frozen for energy + forces; torch_geometric is measured as it comes, too.
``--compiled`` adds nequip's compiled mode, which takes minutes to compile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from cpu_mace import Child, largest_difference, structures
from settings import RESULTS, ROOT, machine, write

TASKS = ["energy + forces", "training step"]
#: the configuration of the MARA paper's appendix F.1
NEQUIP = {
    "num_layers": 3,
    "l_max": 1,
    "parity": True,
    "num_features": 32,
    "radial_mlp_depth": 2,
    "radial_mlp_width": 64,
}
#: F.2
VISNET = {"lmax": 2, "num_layers": 5, "hidden_channels": 256, "num_rbf": 32, "num_heads": 8}
OURS = ["steradian", "steradian, radial table"]
CASES: dict[str, dict[str, Any]] = {
    "nequip": {"peer": "nequip", "model": NEQUIP, "sides": ["nequip", *OURS]},
    "nequip_two": {"peer": "nequip", "model": NEQUIP | {"l_max": 2, "num_features": 64}, "sides": ["nequip", *OURS]},
    "visnet": {
        "peer": "torch_geometric",
        "model": VISNET,
        "sides": ["torch_geometric", "torch_geometric, weights not frozen", "steradian"],
    },
}


def timed(children: list[Child], task: str, repeats: int, warmup: int) -> dict[str, Any]:
    """Times of all sides, taken in turn, and ratios to the last one."""
    times: dict[str, list[list[float]]] = {child.name: [] for child in children}
    for child in children:
        child.ask("select", task)
    for repeat in range(warmup + repeats):
        for child in children:
            seconds = child.ask("run", task)
            if repeat >= warmup:
                times[child.name].append(seconds)
    rows: dict[str, Any] = {}
    for name, values in times.items():
        rows[name] = {
            kind: round(1e3 * statistics.median(value[index] for value in values), 1)
            for index, kind in enumerate(("wall_ms", "processor_ms"))
        }
        for peer in [other for other in times if other != name and not other.startswith("steradian")]:
            for index, kind in enumerate(("", "_processor")):
                ratios = [theirs[index] / ours[index] for ours, theirs in zip(values, times[peer])]
                rows[name][f"times_faster_than {peer}{kind}"] = round(statistics.median(ratios), 2)
    return rows


def run_case(case: dict[str, Any], pythons: dict[str, str], arguments: argparse.Namespace) -> dict[str, Any]:
    """All tasks of a case, with fresh interpreters; the first side writes the weights."""
    content = structures("3bpa", 5, arguments.data)
    case = case | {"cutoff": 5.0, "threads": 1, "avg_num_neighbors": 2242 / 135, "elements": [1, 6, 7, 8]}
    sides = case["sides"] + (["nequip, compiled"] if arguments.compiled and case["peer"] == "nequip" else [])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "structures.npz", **content)
        children, about = [], {}
        for side in sides:
            python = sys.executable if side.startswith("steradian") else pythons[case["peer"]]
            children.append(Child(python, side, folder, "sides_hosts.py"))
            about[side] = children[-1].ask("prepare", case)
        result: dict[str, Any] = {"case": case, "sides": about, "largest_relative_difference": {}}
        for child in children:
            child.ask("select", TASKS[0])
        truth = children[0].ask("results")
        for child in children[1:]:
            if "compiled" not in child.name:  # it has weights of its own
                result["largest_relative_difference"][child.name] = largest_difference(child.ask("results"), truth)
        if not all(value < 1e-4 for value in result["largest_relative_difference"].values()):
            raise SystemExit(f"the sides do not compute the same: {result['largest_relative_difference']}")
        for task in TASKS:
            chosen = [child for child in children if not (task == "training step" and "table" in child.name)]
            result[task] = timed(chosen, task, arguments.repeats, arguments.warmup)
        for child in children:
            child.stop()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for package in ("nequip", "pyg"):
        parser.add_argument(f"--{package}-python", default=f".venv-parity-{package}/bin/python")
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data/3bpa/train_300K.xyz")
    parser.add_argument("--only", nargs="*", choices=CASES)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=4)
    arguments = parser.parse_args()
    pythons = {"nequip": arguments.nequip_python, "torch_geometric": arguments.pyg_python}
    path = RESULTS / "cpu_hosts.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content["settings"] = machine() | {"repeats": arguments.repeats, "warmup": arguments.warmup}
    for name, case in CASES.items():
        if arguments.only and name not in arguments.only:
            continue
        result = run_case(case, pythons, arguments)
        for task in TASKS:
            for side, row in result[task].items():
                print(f"{name:12} {task:16} {side:36} " + "  ".join(f"{key} {value:g}" for key, value in row.items()))
        content.setdefault("results", {})[name] = result
        write("cpu_hosts", content)


if __name__ == "__main__":
    main()
