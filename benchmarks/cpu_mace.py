"""MACE on the CPU here, in mace-torch and in mlip: the same weights, the same atoms, turn by turn in one run.

    python benchmarks/cpu_mace.py --peer-python .venv-parity-mace/bin/python [--mlip-python PYTHON]
                                  [--data ../shared/data/3bpa/train_300K.xyz]
                                  [--only main two_threads calculator water table memory mara] [--repeats 9]

Every side runs in an interpreter of its own (``sides.py``) and answers one request at a time, so nothing else runs
while it is timed and drifts of the machine hit all alike. Before the timing all sides must agree on energies and
forces (mlip has weights of its own). Times are medians of wall-clock time; processor times stand beside them; ratios
are medians of ratios of neighbours in time.

The main case is the first five frames of 3BPA (135 atoms, 2242 edges at 5 Å), 128 channels, L = 1, l_max = 3,
correlation 3, two residual layers, float32, one thread. ``steradian, radial table`` is steradian with its radial
networks interpolated from a table (relative error 1e-7), as its ASE calculator does by default.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from settings import RESULTS, ROOT, machine, write

PEER = "mace-torch"
MAIN = {
    "structures": "3bpa",
    "batch": 5,
    "channels": 128,
    "hidden_l": 1,
    "l_max": 3,
    "correlation": 3,
    "cutoff": 5.0,
    "threads": 1,
    "tasks": ["energy + forces", "training step"],
}


def cases() -> dict[str, dict[str, Any]]:
    """Name to case; the names before the colon are those of ``--only``."""
    known = {"main": MAIN, "two_threads": MAIN | {"threads": 2}}
    known["calculator: ethanol, 9 atoms"] = MAIN | {"structures": "ethanol", "batch": 1, "tasks": ["calculator step"]}
    water = MAIN | {"structures": "water", "batch": 1, "tasks": ["energy + forces + stress"]}
    known["water: 64 molecules, periodic"] = water
    for hidden_l in (0, 1, 2):
        for correlation in (2, 3):
            for batch in (1, 20):
                name = f"table: L = {hidden_l}, correlation {correlation}, batch {batch}"
                shape = {"hidden_l": hidden_l, "correlation": correlation, "batch": batch}
                known[name] = MAIN | shape | {"tasks": ["energy + forces"]}
    known["memory: training step"] = MAIN | {"tasks": [], "memory": "training step"}
    known["mara: 4 x 8 grid in both layers"] = MAIN | {"mara": True}
    return known


def structures(kind: str, batch: int, data: Path) -> dict[str, Any]:
    """Numbers, positions ``[batch, N, 3]``, cell, periodicity."""
    import ase.io
    from ase.build import molecule

    if kind == "3bpa":
        frames = ase.io.read(data, f":{batch}")
        positions = np.stack([atoms.positions for atoms in frames])
        return {"numbers": frames[0].numbers, "positions": positions, "cell": np.zeros((3, 3)), "periodic": False}
    if kind == "ethanol":
        atoms = molecule("CH3CH2OH")
        cell = np.zeros((3, 3))
        return {"numbers": atoms.numbers, "positions": atoms.positions[None], "cell": cell, "periodic": False}
    # 64 molecules at the density of water, on a lattice and turned at random
    generator = np.random.default_rng(0)
    side, water = 12.42, molecule("H2O")
    places = [np.array(place) for place in np.ndindex(4, 4, 4)]
    turned = []
    for place in places:
        turn, _ = np.linalg.qr(generator.normal(size=(3, 3)))
        turned.append((water.positions - water.positions[0]) @ turn + (place + 0.5) * side / 4)
    positions = np.concatenate(turned)[None]
    return {
        "numbers": np.tile(water.numbers, 64),
        "positions": positions,
        "cell": side * np.eye(3),
        "periodic": True,
    }


class Child:
    """A side in its own interpreter."""

    def __init__(self, python: str, side: str, folder: Path, sides: str = "sides.py") -> None:
        self.name = side
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the child lives)
        script = Path(__file__).with_name(sides)
        self.process = subprocess.Popen(
            [python, str(script), "--serve", side, "--folder", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
        )

    def ask(self, request: str, argument: Any = None) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([request, argument]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            raise SystemExit(f"{self.name} stopped:\n{self.errors.read()}")
        return json.loads(line)

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def largest_difference(ours: list[Any], peer: list[Any]) -> float:
    """Of energies and forces, relative to the largest of each."""
    pairs = [(np.array(a), np.array(b)) for a, b in zip(ours, peer)]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def timed(children: list[Child], task: str, repeats: int, warmup: int, turns: int) -> dict[str, Any]:
    """Times of all sides, taken in turn; ``turns`` calls at a time where one is short."""
    times: dict[str, list[list[float]]] = {child.name: [] for child in children}
    for child in children:
        child.ask("select", task)
    for repeat in range(warmup + repeats):
        for child in children:
            both = [child.ask("run", task) for _ in range(turns)]
            if repeat >= warmup:
                times[child.name].append([statistics.median(column) for column in zip(*both)])
    rows: dict[str, Any] = {}
    for name, values in times.items():
        rows[name] = {
            "median_ms": round(1e3 * statistics.median(wall for wall, _ in values), 2),
            "fastest_ms": round(1e3 * min(wall for wall, _ in values), 2),
            "median_processor_ms": round(1e3 * statistics.median(cpu for _, cpu in values), 2),
        }
        for peer in (PEER, "mlip"):
            if peer in times and name.startswith("steradian"):
                ratios = [theirs[0] / ours[0] for ours, theirs in zip(values, times[peer])]
                rows[name][f"times_faster_than_{peer}"] = round(statistics.median(ratios), 2)
    return rows


def run_case(case: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """All tasks of a case, with fresh interpreters."""
    content = structures(case["structures"], case["batch"], arguments.data)
    elements = sorted({int(number) for number in content["numbers"]})
    case = case | {"elements": elements, "avg_num_neighbors": 16.6}
    sides = [PEER, "steradian", "steradian, radial table"]
    if arguments.mlip_python and case["structures"] == "3bpa" and case["tasks"] == MAIN["tasks"]:
        sides.append("mlip")
    pythons = {PEER: arguments.peer_python, "mlip": arguments.mlip_python}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "structures.npz", **content)
        children, result = [], {"case": {k: v for k, v in case.items() if k != "tasks"}}
        for side in sides:  # the peer first: it writes the weights
            if side.startswith("steradian, ") and (case["tasks"] == ["calculator step"] or "memory" in case):
                continue
            if case.get("mara") and side != "steradian":
                if side == PEER:
                    child = Child(arguments.peer_python, side, folder)
                    child.ask("prepare", case)
                    child.stop()
                continue
            children.append(Child(pythons.get(side, sys.executable), side, folder))
            result.setdefault("sides", {})[side] = children[-1].ask("prepare", case)
        if case.get("mara"):
            children.append(Child(sys.executable, "steradian", folder))
            children[-1].ask("prepare", case | {"mara": False})
            children[0].name, children[1].name = "MACE-MARA", "MACE"
        else:
            check(children, result)
        for task in case["tasks"]:
            turns = 10 if task == "calculator step" else 1
            names = [c for c in children if "table" not in c.name or task.startswith("energy")]
            result[task] = timed(names, task, arguments.repeats, arguments.warmup, turns)
        if "memory" in case:
            for child in children:
                child.ask("select", case["memory"])
                result.setdefault("memory", {})[child.name] = child.ask("memory", case["memory"])
        for child in children:
            child.stop()
    # above one: something else ran too, and times (less so ratios) are longer than on an idle machine
    result["load_average"] = round(os.getloadavg()[0], 1)
    return result


def check(children: list[Child], result: dict[str, Any]) -> None:
    """All sides that share weights have the same edges and the same results."""
    children = [child for child in children if child.name != "mlip"]
    for child in children:
        child.ask("select", "energy + forces")
    truth = children[0].ask("results")
    differences = {child.name: largest_difference(child.ask("results"), truth) for child in children[1:]}
    result["largest_relative_difference"] = differences
    edges = {about["edges"] for about in result["sides"].values()}
    if len(edges) > 1 or not max(differences.values()) < 1e-4:
        raise SystemExit(f"the sides do not compute the same ({differences}, edges {edges}): nothing to compare")


def show(name: str, result: dict[str, Any]) -> None:
    for task, rows in result.items():
        if task in ("case", "sides", "largest_relative_difference", "load_average"):
            continue
        for side, row in rows.items():
            figures = "   ".join(f"{key} {value:g}" for key, value in row.items())
            print(f"{name:40} {task:24} {side:24} {figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=".venv-parity-mace/bin/python", help="interpreter that has mace-torch")
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data/3bpa/train_300K.xyz")
    parser.add_argument("--mlip-python", help="interpreter that has mlip, for the first two cases")
    parser.add_argument("--only", nargs="*", help="names of cases before their colon")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=4, help="calls not timed; TorchScript optimises in the first")
    parser.add_argument("--out", default="cpu_mace", help="name of the JSON file")
    arguments = parser.parse_args()
    path = RESULTS / f"{arguments.out}.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content["settings"] = machine() | {"repeats": arguments.repeats, "warmup": arguments.warmup}
    for name, case in cases().items():
        if arguments.only and name.split(":")[0] not in arguments.only:
            continue
        result = run_case(case, arguments)
        show(name, result)
        content.setdefault("results", {})[name] = result
        write(arguments.out, content)  # a later case that fails loses nothing


if __name__ == "__main__":
    main()
