"""Energy + forces and training step of MACE on a GPU: steradian against mace-torch with and without cuEquivariance.

    python benchmarks/gpu_mace.py --peer-python .venv-mace-gpu/bin/python [--sizes 135 3000] [--modes eager cuda_graph]
    python benchmarks/gpu_mace.py --device cpu --smoke [--peer-python PYTHON]

128 channels, L = 1, l_max = 3, correlation 3, two residual layers, float32, cutoff 5 Å; one periodic box of water (and
a little formaldehyde) of 135 or 3000 atoms, or with ``--batch 5`` five of them. Every side runs in an interpreter of
its own (``sides_gpu.py``), with the same weights (the peer's), and must agree with mace-torch on energies and forces
before it is timed; sides are timed in turn in the same run. steradian is listed with each backend of polynomials
(reference, Triton, cuEquivariance) and each way of running (called, recorded as a CUDA graph).

Bar: 1.5 times faster than mace-torch + cuEquivariance, for the best of ours.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from cpu_mace import MAIN, Child, largest_difference
from gpu_settings import Results, gpu_backends, parser, system

PEERS = ("mace-torch", "mace-torch + cuEquivariance")
BAR = 1.5
TASKS = ("energy + forces", "training step")


def contents(size: int, batch: int) -> dict[str, Any]:
    """The structures as ``sides.py`` reads them; each of a batch is turned otherwise."""
    boxes = [system(size, periodic=True, seed=seed) for seed in range(batch)]
    positions = np.stack([atoms.positions for atoms in boxes])
    return {"numbers": boxes[0].numbers, "positions": positions, "cell": np.asarray(boxes[0].cell), "periodic": True}


def sides_of(mode: str, arguments: Any) -> list[str]:
    """Peers first: the first one writes the weights."""
    backends = arguments.backends or gpu_backends(arguments.device)
    ours = [f"steradian {backend}/{mode}" for backend in backends]
    peers = [peer for peer in PEERS if not (arguments.device == "cpu" and "cuEquivariance" in peer)]
    return [*peers, *ours]


def start(side: str, folder: Path, case: dict[str, Any], arguments: Any) -> Child | str:
    """A side that is ready and agrees with the first, or why it is not."""
    python = arguments.peer_python if side in PEERS else sys.executable
    child = Child(python, side, folder, "sides_gpu.py")
    try:
        child.ask("prepare", case | {"way": side.removeprefix("steradian ")})
    except SystemExit as error:
        return str(error).strip().splitlines()[-1][:300]
    return child


def compare(size: int, task: str, mode: str, arguments: Any) -> dict[str, Any]:
    """A row: all sides, in turn, for one size and task."""
    case = MAIN | {"device": arguments.device, "batch": arguments.batch, "threads": arguments.threads}
    case |= {"elements": [1, 6, 8] if size % 3 else [1, 8], "avg_num_neighbors": 52.0}
    case |= {"channels": 8} if arguments.smoke else {}
    refused: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "structures.npz", **contents(size, arguments.batch))
        children: list[Child] = []
        differences: dict[str, float] = {}
        truth: list[Any] | None = None
        for side in sides_of(mode, arguments):
            child = start(side, folder, case, arguments)
            if isinstance(child, str):
                refused[side] = child
                continue
            try:
                child.ask("select", TASKS[0])
                found = child.ask("results")
                truth = truth or found
                differences[side] = largest_difference(found, truth)
                if not differences[side] < arguments.tolerance:
                    refused[side] = f"differs from {PEERS[0]} by {differences[side]:.1e} of the largest"
                    child.stop()
                    continue
                child.ask("select", task)
                child.ask("run", task)
            except SystemExit as error:
                refused[side] = str(error).strip().splitlines()[-1][:300]
                continue
            children.append(child)
        times = timed(children, task, 3 if arguments.smoke else arguments.repeats)
        fell_back = {child.name: child.ask("fell_back") for child in children if child.name.startswith("steradian")}
        memory = {child.name: child.ask("peak") for child in children}
        for child in children:
            child.stop()
    row = table(times)
    row |= {"memory_MiB": memory, "refused": refused, "fell_back": {k: v for k, v in fell_back.items() if v}}
    return row | {"largest_relative_difference": differences, "case": case}


def timed(children: list[Child], task: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of every side, in turn; each side waits for its device before a time is taken."""
    times: dict[str, list[float]] = {child.name: [] for child in children}
    for repeat in range(repeats + 3):
        for child in children:
            seconds = child.ask("run", task)[0]
            if repeat >= 3:
                times[child.name].append(seconds)
    return times


def table(times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and the best of ours against either peer."""
    medians = {name: round(1e3 * statistics.median(values), 3) for name, values in times.items()}
    ours = {name: value for name, value in medians.items() if name.startswith("steradian")}
    row: dict[str, Any] = {"ms": medians}
    if ours:
        best = min(ours, key=lambda name: ours[name])
        row |= {"best": best, "best_ms": ours[best]}
        for peer in PEERS:
            if peer in times:
                ratios = [theirs / own for own, theirs in zip(times[best], times[peer])]
                row[f"times_faster_than_{peer}"] = round(statistics.median(ratios), 3)
        row["bar"] = BAR
    return row


def show(row: dict[str, Any]) -> None:
    for name, value in row["ms"].items():
        print(f"    {name:36} {value:10.3f} ms   {row['memory_MiB'].get(name, 0):8.0f} MiB")
    for name, why in (row["refused"] | row["fell_back"]).items():
        print(f"    {name:36} {why}")


def main() -> None:
    options = parser(__doc__, "gpu_mace")
    options.add_argument("--peer-python", required=True, help="interpreter that has mace-torch (and cuequivariance)")
    options.add_argument("--sizes", type=int, nargs="*")
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    options.add_argument("--modes", nargs="*", default=["cuda_graph", "eager"])
    options.add_argument("--backends", nargs="*")
    options.add_argument("--repeats", type=int, default=15)
    options.add_argument("--threads", type=int, default=4)
    options.add_argument("--tolerance", type=float, default=1e-4, help="largest difference, relative to the largest")
    arguments = options.parse_args()
    if arguments.device == "cpu":
        arguments.modes = ["eager"]
    sizes = arguments.sizes or ([17] if arguments.smoke else [135, 3000])
    results = Results(arguments, batch=arguments.batch, bar=BAR)
    for size in sizes:
        for mode, task in itertools.product(arguments.modes, arguments.tasks):
            name = f"{task}, {size} atoms x {arguments.batch}, {mode}"
            row = results.measure(name, lambda s=size, t=task, m=mode: compare(s, t, m, arguments))
            if row is not None:
                show(row)
    print(results.path)


if __name__ == "__main__":
    main()
