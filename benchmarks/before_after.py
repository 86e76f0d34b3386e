"""Two versions of steradian in one run: is anything slower after a change?

    git worktree add ../before COMMIT
    python benchmarks/before_after.py ../before/src [--after src] [--only "MACE, ASE step, ethanol"]
                                      [--repeats 15] [--out benchmarks/results/before_after.json]

Each version runs in an interpreter of its own and answers one request at a time, by turns (A B A B ...). Times are
processor times, so that other work on the machine counts little; ratios are medians of ratios of neighbours in time,
after over before. One thread, random weights of one seed, structures made here. Before the timing both versions must
agree on energies and forces.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from settings import ROOT, machine, text

MACE = {"kind": "mace", "num_channels": 128, "hidden_l": 1, "l_max": 3, "correlation": 3, "cutoff_A": 5.0}
SMALL = MACE | {"num_channels": 32, "l_max": 2, "correlation": 2}
#: In versions that had no other form these are the defaults, and the first key is not known.
PUBLISHED = {"form": "published", "kind": "mara", "frame": "lab"}
#: Name: host, operators, structures, what is timed.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "MACE, 135 atoms, energy + forces": (MACE, {}, "molecules", "call"),
    "MACE, 135 atoms, training step": (MACE, {}, "molecules", "training"),
    "MACE, ASE step, ethanol": (MACE, {}, "ethanol", "calculator"),
    "MACE-MARA, 135 atoms, energy + forces": (MACE, {"edge_gate": PUBLISHED}, "molecules", "call"),
    "MACE-MARA, 135 atoms, training step": (MACE, {"edge_gate": PUBLISHED}, "molecules", "training"),
    "small MACE, training step of five ethanol": (SMALL, {}, "five", "training"),
    "NequIP, 135 atoms, energy + forces": ({"kind": "nequip", "num_channels": 64}, {}, "molecules", "call"),
    "ViSNet, 135 atoms, energy + forces": ({"kind": "visnet", "num_channels": 128}, {}, "molecules", "call"),
    "O(3) network with EFA, 135 atoms, energy + forces": (
        {"kind": "o3mpnn"}, {"global_mixer": {"kind": "efa"}}, "molecules", "call"
    ),
    "O(3) network with EFA, 135 atoms, training step": (
        {"kind": "o3mpnn"}, {"global_mixer": {"kind": "efa"}}, "molecules", "training"
    ),
    "water box, 192 atoms, energy + forces + stress": (SMALL, {}, "water", "stress"),
}  # fmt: skip


def structures(kind: str) -> list[Any]:
    """Atoms of a case."""
    from ase import Atoms
    from ase.build import molecule

    if kind == "water":
        places = 3.1 * np.array(list(np.ndindex(4, 4, 4)), dtype=float)
        box = Atoms(cell=[12.4] * 3, pbc=True)
        for number, place in enumerate(places):
            one = molecule("H2O")
            one.rotate(37 * number, (1, 2, 3), center="COM")
            one.translate(place - one.get_center_of_mass())
            box += one
        return [box]
    names = {"ethanol": ["CH3CH2OH"], "five": ["CH3CH2OH"] * 5}.get(kind, ["C6H6", "CH3CH2OCH3", "C5H5N"] * 4)
    found = [molecule(name) for name in names]
    for number, atoms in enumerate(found):
        atoms.rattle(0.05, seed=number)
    return found


def prepare(case: str) -> tuple[Callable[[], Any], list[list[float]]]:
    """What is timed, and energies and forces to compare."""
    import torch

    import steradian
    from steradian.config import MARAConfig
    from steradian.data.statistics import DatasetStatistics

    torch.set_num_threads(1)
    host, operators, kind, task = CASES[case]
    elements = (1, 6, 7, 8)
    statistics_ = DatasetStatistics(elements, dict.fromkeys(elements, 0.0), avg_num_neighbors=15.0)
    fields = MARAConfig.model_fields
    operators = {slot: {key: value for key, value in section.items() if slot != "edge_gate" or key in fields}
                 for slot, section in operators.items()}  # fmt: skip
    config = steradian.parse_config({"model": {"host": host, **operators, "precision": "float32"}})
    potential = steradian.build_potential(config.model, statistics_, seed=1)
    systems = structures(kind)
    frames = [
        steradian.Structure(numbers=atoms.numbers, positions=atoms.positions, cell=np.asarray(atoms.cell),
                            pbc=atoms.pbc)
        for atoms in systems
    ]  # fmt: skip
    graph = steradian.batch_graphs([steradian.make_graph(frame, potential.cutoff) for frame in frames])
    if task == "calculator":
        atoms = systems[0]
        atoms.calc = steradian.SteradianCalculator(potential, skin=0.5)
        moves = np.random.default_rng(0).normal(scale=1e-3, size=(50, len(atoms), 3))
        state = {"step": 0}

        def step() -> Any:
            for _ in range(10):
                atoms.positions += moves[state["step"] % 50] * (-1) ** (state["step"] // 50)
                state["step"] += 1
                atoms.get_forces()

        return step, [[atoms.get_potential_energy()], atoms.get_forces().ravel().tolist()]
    if task == "training":
        potential.train()
        parameters = list(potential.parameters())

        def train() -> Any:
            found = potential(graph)
            loss = found.interaction_energy.square().sum() + found.forces.square().sum()
            torch.autograd.grad(loss, parameters, allow_unused=True)

        found = potential(graph)
        return train, [found.energy.tolist(), found.forces.flatten().tolist()]
    potential.eval()
    with_stress = task == "stress"
    found = potential(graph, stress=with_stress)
    return lambda: potential(graph, stress=with_stress), [found.energy.tolist(), found.forces.flatten().tolist()]


def serve() -> None:
    """Answer requests on standard input: ``prepare CASE``, ``time``, ``end``."""
    run: Callable[[], Any] = lambda: None  # noqa: E731
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        if word == "prepare":
            run, numbers = prepare(rest)
            for _ in range(3):
                run()
            answer: Any = numbers
        elif word == "time":
            start = time.process_time()
            run()
            answer = time.process_time() - start
        else:
            return
        print(json.dumps(answer), flush=True)


class Side:
    """One version in its own process."""

    def __init__(self, source: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )

    def ask(self, request: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(request, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process ended at '{request}'")
        return json.loads(line)


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("before", nargs="?", type=Path, help="folder that holds the older steradian/")
    options.add_argument("--after", type=Path, default=ROOT / "src")
    options.add_argument("--only", nargs="*", default=list(CASES))
    options.add_argument("--repeats", type=int, default=15)
    options.add_argument("--out", type=Path)
    options.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.serve:
        serve()
        return
    if arguments.before is None:
        options.error("give the folder of the older version")
    rows = {}
    for case in arguments.only:
        sides = [Side(path.resolve()) for path in (arguments.before, arguments.after)]
        truth, found = (side.ask(f"prepare {case}") for side in sides)
        worst = max(float(np.abs(np.subtract(a, b)).max() / max(1.0, np.abs(a).max())) for a, b in zip(truth, found))
        if worst > 1e-4:
            raise SystemExit(f"{case}: energies and forces differ by {worst:.1e}")
        times = [[side.ask("time") for side in sides] for _ in range(arguments.repeats)]
        for side in sides:
            print("end", file=side.process.stdin, flush=True)
            side.process.wait()
        before, after = (1e3 * statistics.median(column) for column in zip(*times))
        ratio = statistics.median(b / a for a, b in times)
        rows[case] = {"before_ms": round(before, 3), "after_ms": round(after, 3), "ratio": round(ratio, 4)}
        print(
            f"{case:52s} {before:9.2f} {after:9.2f} ms   after / before {ratio:.3f}   equal to {worst:.0e}", flush=True
        )
    if arguments.out is not None:
        arguments.out.write_text(text({"machine": machine(), "repeats": arguments.repeats, "cases": rows}))


if __name__ == "__main__":
    main()
