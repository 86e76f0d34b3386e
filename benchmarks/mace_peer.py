"""MACE here and in mace-torch, side by side: the same weights, the same atoms, turn by turn in one run.

    python benchmarks/mace_peer.py --peer-python .venv-parity-mace/bin/python [--data 3bpa/train_300K.xyz]

The case is the first five frames of 3BPA (135 atoms, 2242 edges at 5 Å); 128 channels, L = 1, l_max = 3, correlation 3,
two residual layers, float32, one thread. Each side runs in its own interpreter and answers one request at a time, so
that nothing else runs while it is timed and drifts of the machine hit both alike. Before the timing both sides must
agree on energies and forces. Times are medians of wall-clock time; processor times stand beside them. The weights of
both are frozen for energy + forces, as in either package's ASE calculator, and trained in the training step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CUTOFF, CHANNELS, L_MAX, CORRELATION, NUM_FRAMES = 5.0, 128, 3, 3, 5
BLOCK = "RealAgnosticResidualInteractionBlock"
HYPERPARAMETERS = {
    "r_max": CUTOFF,
    "num_bessel": 8,
    "num_polynomial_cutoff": 5,
    "max_ell": L_MAX,
    "interaction_cls_first": BLOCK,
    "interaction_cls": BLOCK,
    "num_interactions": 2,
    "hidden_irreps": f"{CHANNELS}x0e + {CHANNELS}x1o",
    "MLP_irreps": "16x0e",
    "atomic_numbers": [1, 6, 7, 8],
    "correlation": CORRELATION,
    "gate": "silu",
    "radial_MLP": [64, 64, 64],
    "avg_num_neighbors": 2242 / 135,
}
TASKS = ("energy + forces", "training step")


# ------------------------------------------------------------------------------------------- the two sides (children)


class Side:
    """One side: a network, and what one call of it does. Tensors stay in its own process."""

    model: Any
    settings: dict[str, Any]

    def call(self, training: bool) -> tuple[Any, Any]:
        """Interaction energies and forces."""
        raise NotImplementedError

    def run(self, task: str) -> None:
        if task == "energy + forces":
            self.call(training=False)
            return
        energy, forces = self.call(training=True)
        (energy.sum() + forces.square().sum()).backward()
        self.model.zero_grad()

    def select(self, task: str) -> None:
        self.model.train(task == "training step")
        for parameter in self.model.parameters():
            parameter.requires_grad_(task == "training step")


class Peer(Side):
    """mace-torch, and the file of weights for the other side."""

    def __init__(self, data: Path, weights: Path) -> None:
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # e3nn 0.4.4 loads its own constants with torch.load
        import ase.io
        import e3nn
        import mace
        import torch
        from e3nn import o3
        from mace import modules
        from mace.data import AtomicData, config_from_atoms
        from mace.tools import AtomicNumberTable, torch_geometric

        torch.set_default_dtype(torch.float32)
        torch.manual_seed(0)
        arguments = dict(HYPERPARAMETERS)
        for key in ("interaction_cls", "interaction_cls_first"):
            arguments[key] = getattr(modules, BLOCK)
        for key in ("hidden_irreps", "MLP_irreps"):
            arguments[key] = o3.Irreps(arguments[key])
        self.model = modules.ScaleShiftMACE(
            **arguments | {"gate": torch.nn.functional.silu},
            num_elements=4,
            atomic_energies=np.zeros(4),
            atomic_inter_scale=1.0,
            atomic_inter_shift=0.0,
        )
        np.savez(weights, **{name: value.numpy() for name, value in self.model.state_dict().items()})
        table = AtomicNumberTable(HYPERPARAMETERS["atomic_numbers"])
        graphs = []
        for atoms in ase.io.read(data, f":{NUM_FRAMES}"):
            atoms.pbc = False
            graphs.append(AtomicData.from_config(config_from_atoms(atoms), z_table=table, cutoff=CUTOFF))
        loader = torch_geometric.dataloader.DataLoader(graphs, batch_size=NUM_FRAMES)
        self.batch = next(iter(loader)).to_dict()
        self.settings = {"mace-torch": mace.__version__, "e3nn": e3nn.__version__}
        self.edges = self.batch["edge_index"].shape[1]

    def call(self, training: bool) -> tuple[Any, Any]:
        out = self.model(self.batch, training=training, compute_force=True)
        return out["interaction_energy"], out["forces"]


class Ours(Side):
    """steradian with the peer's weights."""

    def __init__(self, data: Path, weights: Path) -> None:
        import dataclasses

        from steradian.build import build_potential
        from steradian.config import KeysConfig, UnitsConfig
        from steradian.data.read import read_structures
        from steradian.graph import batch_graphs
        from steradian.interfaces.mace_torch import config_and_weights_from_mace_torch
        from steradian.neighbors import make_graph

        with np.load(weights) as file:
            config, numbers, state = config_and_weights_from_mace_torch(dict(file), HYPERPARAMETERS)
        self.model = build_potential(config, numbers, seed=0)
        self.model.host.load_state_dict(state)
        frames = read_structures(data, KeysConfig(), UnitsConfig(), ignore_cell=True)[:NUM_FRAMES]
        graph = batch_graphs([make_graph(frame, CUTOFF) for frame in frames])
        self.graph = dataclasses.replace(graph, energy=None, forces=None, stress=None)
        self.settings = {"precision": config.precision, "parameters": self.model.num_parameters}
        self.edges = graph.num_edges

    def call(self, training: bool) -> tuple[Any, Any]:
        prediction = self.model(self.graph)
        return prediction.interaction_energy, prediction.forces


def serve(side: str, data: Path, weights: Path) -> None:
    """Answer requests, one JSON line each: a description, results, or the time of one call."""
    warnings.filterwarnings("ignore")
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not mix with the replies
    import torch

    torch.set_num_threads(1)
    network = {"peer": Peer, "ours": Ours}[side](data, weights)

    def answer(content: Any) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    answer(network.settings | {"torch": torch.__version__, "threads": torch.get_num_threads(), "edges": network.edges})
    for line in sys.stdin:
        request, task = json.loads(line)
        if request == "select":
            network.select(task)
            answer(None)
        elif request == "results":
            energy, forces = network.call(training=False)
            answer([energy.detach().double().tolist(), forces.detach().double().tolist()])
        else:
            start, start_cpu = time.perf_counter(), time.process_time()
            network.run(task)
            answer([time.perf_counter() - start, time.process_time() - start_cpu])


# --------------------------------------------------------------------------------------------------------- the driver


def start(python: str, side: str, data: Path, weights: Path) -> tuple[Callable[[str, str], Any], dict[str, Any]]:
    """A child, as a function from request to answer, and what it says about itself."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the child lives)
    child = subprocess.Popen(
        [python, __file__, "--serve", side, "--data", str(data), "--weights", str(weights)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env=environment,
    )
    assert child.stdin is not None
    assert child.stdout is not None

    def answer() -> Any:
        line = child.stdout.readline()
        if not line:
            child.wait()
            errors.seek(0)
            raise SystemExit(f"{side} ({python}) stopped:\n{errors.read()}")
        return json.loads(line)

    def ask(request: str, task: str = "") -> Any:
        child.stdin.write(json.dumps([request, task]) + "\n")
        child.stdin.flush()
        return answer()

    return ask, answer()


def largest_difference(ours: list[Any], peer: list[Any]) -> float:
    """Of energies and forces, relative to the largest of each."""
    pairs = [(np.array(a), np.array(b)) for a, b in zip(ours, peer)]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def compare(sides: dict[str, Callable[[str, str], Any]], task: str, repeats: int, warmup: int) -> dict[str, Any]:
    """Times of both sides, taken in turn."""
    times: dict[str, list[list[float]]] = {name: [] for name in sides}
    for ask in sides.values():
        ask("select", task)
    for repeat in range(warmup + repeats):
        for name, ask in sides.items():
            seconds = ask("run", task)
            if repeat >= warmup:
                times[name].append(seconds)
    rows = {
        name: {
            "median_ms": round(1e3 * statistics.median(wall for wall, _ in values), 1),
            "fastest_ms": round(1e3 * min(wall for wall, _ in values), 1),
            "median_processor_ms": round(1e3 * statistics.median(cpu for _, cpu in values), 1),
        }
        for name, values in times.items()
    }
    ratios = {
        kind: round(statistics.median(a[index] / b[index] for a, b in zip(times["steradian"], times["mace-torch"])), 4)
        for index, kind in enumerate(("steradian_over_mace_torch", "steradian_over_mace_torch_processor"))
    }
    return rows | ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=".venv-parity-mace/bin/python", help="interpreter that has mace-torch")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/3bpa/train_300K.xyz"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--warmup", type=int, default=4, help="calls not timed; TorchScript optimises in the first ones"
    )
    parser.add_argument("--serve", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.data, arguments.weights)
        return
    from settings import machine, write

    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.npz"
        peer, about_peer = start(arguments.peer_python, "peer", arguments.data, weights)
        ours, about_ours = start(sys.executable, "ours", arguments.data, weights)
    for ask in (peer, ours):
        ask("select", TASKS[0])
    difference = largest_difference(ours("results", ""), peer("results", ""))
    print(f"largest difference of energies and forces, relative: {difference:.1e}")
    if not difference < 1e-4 or about_ours["edges"] != about_peer["edges"]:
        raise SystemExit("the two sides do not compute the same; nothing to compare")
    results = {}
    for task in TASKS:
        results[task] = compare({"steradian": ours, "mace-torch": peer}, task, arguments.repeats, arguments.warmup)
        for name in ("steradian", "mace-torch"):
            row = results[task][name]
            print(f"{task:16} {name:11} {row['median_ms']:8.1f} ms, processor {row['median_processor_ms']:8.1f} ms")
        print(f"{task:16} ratio {results[task]['steradian_over_mace_torch']:.3f}")
    content = {
        "settings": machine()
        | {"threads": 1, "atoms": 135, "repeats": arguments.repeats, "warmup": arguments.warmup}
        | {"model": HYPERPARAMETERS, "steradian": about_ours, "mace-torch": about_peer},
        "largest_relative_difference": difference,
        "results": results,
    }
    print(write("mace_peer", content))


if __name__ == "__main__":
    main()
