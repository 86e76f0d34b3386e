"""What the benchmarks on a GPU share: systems, models, clocks, and results that are kept as they come."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from settings import RESULTS, machine

#: Å^3 per atom: water; a protein is near it
VOLUME = 10.0


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """The options of every script."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda", help="cuda, or cpu for a trial")
    options.add_argument("--smoke", action="store_true", help="tiny sizes, a few calls: whether it runs, not how fast")
    options.add_argument("--results", type=Path, help="folder of the JSON file; default: benchmarks/results")
    options.add_argument("--out", default=name, help="name of the JSON file")
    options.add_argument("--again", action="store_true", help="measure again what the file holds already")
    options.add_argument("--minutes", type=float, default=9.0, help="start nothing new after this time")
    return options


class Results:
    """A JSON file that grows: what it holds is not measured again, and what fails is written down too.

    Args:
        arguments: of :func:`parser`. Results of a trial go to a temporary folder unless one is given.
    """

    def __init__(self, arguments: argparse.Namespace, **settings: Any) -> None:
        folder = arguments.results or (Path(tempfile.mkdtemp()) if arguments.smoke else RESULTS)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{arguments.out}.json"
        self.started, self.minutes = time.monotonic(), arguments.minutes
        self.content: dict[str, Any] = {}
        if self.path.exists() and not arguments.again:
            self.content = json.loads(self.path.read_text(encoding="utf-8"))
        self.content["settings"] = gpu_machine(arguments.device) | settings | {"smoke": arguments.smoke}
        self.content.setdefault("results", {})

    @property
    def rows(self) -> dict[str, Any]:
        rows: dict[str, Any] = self.content["results"]
        return rows

    def measure(self, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """A row of the table: measured unless it is known or time is up."""
        known = self.rows.get(name)
        if known is not None and "error" not in known:
            print(f"{name:58} known: {short(known)}", flush=True)
            return known
        if time.monotonic() - self.started > 60 * self.minutes:
            print(f"{name:58} left out: {self.minutes:g} minutes are over; start again to go on", flush=True)
            return None
        try:
            row = run()
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:300]}
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.rows[name] = row
        self.save()
        print(f"{name:58} {short(row)}", flush=True)
        return row if "error" not in row else None

    def save(self) -> None:
        self.path.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")


def short(row: dict[str, Any]) -> str:
    """Figures of a row in one line."""
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
        if isinstance(value, int | float | str)
    )


def gpu_machine(device: str) -> dict[str, Any]:
    """Machine, GPU and versions of what runs on it."""
    from importlib import metadata

    about = machine() | {"device": device}
    if device != "cpu" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.device(device))
        about |= {"gpu": properties.name, "gpu_GiB": round(properties.total_memory / 2**30, 1)}
        about["cuda"] = torch.version.cuda
    packages = ("triton", "cuequivariance-torch", "cuequivariance-ops-torch-cu12", "cuequivariance-ops-torch-cu13")
    for package in (*packages, "nvalchemi-toolkit-ops"):
        try:
            about[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            about[package] = None
    return about


def synchronise(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def times_ms(run: Callable[[], object], device: str, least_s: float = 1.0, warmup: int = 5) -> dict[str, Any]:
    """Median and fastest time of a call; on a GPU between events, so launches run ahead as they do in use."""
    for _ in range(warmup):
        run()
    synchronise(device)
    times: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < least_s or len(times) < 5:
        if torch.device(device).type == "cuda":
            events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(10)]
            for start, end in events:
                start.record()
                run()
                end.record()
            synchronise(device)
            times += [start.elapsed_time(end) for start, end in events]
        else:
            start_s = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start_s))
    return {"median_ms": round(statistics.median(times), 4), "fastest_ms": round(min(times), 4), "calls": len(times)}


def system(count: int, periodic: bool = False, seed: int = 0) -> Atoms:
    """Exactly so many atoms at the density of water: water, and one or two molecules of formaldehyde to make it fit.

    Molecules stand on a cubic lattice, turned at random; without periodicity those next to the centre are taken.

    Raises:
        ValueError: less than eight atoms.
    """
    others = count % 3
    waters = (count - 4 * others) // 3
    if waters < 1:
        raise ValueError(f"{count} atoms are too few")
    generator = np.random.default_rng(seed)
    total = waters + others
    side = int(np.ceil(total ** (1 / 3) - 1e-9))
    places = np.array(list(np.ndindex(side, side, side)), dtype=float) - (side - 1) / 2
    if not periodic:
        places = places[np.argsort(np.linalg.norm(places, axis=1), kind="stable")]
    edge = (VOLUME * (count if periodic else 3 * side**3)) ** (1 / 3)  # all of it in the box, or the lattice of water
    kinds = [molecule("H2CO")] * others + [molecule("H2O")] * waters
    positions, numbers = [], []
    for place, kind in zip(places, kinds):
        turn, _ = np.linalg.qr(generator.normal(size=(3, 3)))
        positions.append((kind.positions - kind.positions.mean(axis=0)) @ turn + place * edge / side)
        numbers.append(kind.numbers)
    atoms = Atoms(np.concatenate(numbers), np.concatenate(positions), pbc=periodic)
    if periodic:
        atoms.set_cell(edge * np.eye(3))
    return atoms


def model_config(kind: str, smoke: bool = False, gate: bool = False, correlation: int = 3) -> Any:
    """The models of the tables; the architecture is printed with its number of weights."""
    from steradian.config import MACEConfig, MARAConfig, ModelConfig, NequIPConfig, ViSNetConfig

    few = {"num_channels": 8} if smoke else {}
    layers = {"num_layers": 2} if smoke else {}
    hosts: dict[str, Any] = {
        "MACE": lambda: MACEConfig(
            **{"num_channels": 128, "hidden_l": 1, "l_max": 3, "correlation": correlation, "num_layers": 2} | few
        ),
        "MACE L=2": lambda: MACEConfig(
            **{"num_channels": 256, "hidden_l": 2, "l_max": 3, "correlation": correlation, "num_layers": 2} | few
        ),
        "ViSNet": lambda: ViSNetConfig(
            **{"num_channels": 128, "num_layers": 4, "l_max": 2, "num_heads": 8} | few | layers
        ),
        "NequIP": lambda: NequIPConfig(
            **{"num_channels": 32, "num_layers": 5, "l_max": 2, "parity": True} | few | layers
        ),
    }
    extra = {"edge_gate": MARAConfig(form="published", frame="lab")} if gate else {}
    return ModelConfig(host=hosts[kind](), **extra)


def build(config: Any, device: str, neighbors: float = 40.0, force_scale: float = 1.0) -> Any:
    """A potential with random weights for H, C and O."""
    from steradian.build import build_potential
    from steradian.data.statistics import DatasetStatistics

    statistics = DatasetStatistics(
        elements=(1, 6, 8),
        atom_references={1: 0.0, 6: 0.0, 8: 0.0},
        avg_num_neighbors=neighbors,
        energy_shift=0.0,
        force_rms=force_scale,
        energy_std=1.0,
        num_frames=1,
        reference_report="none",
    )
    return build_potential(config, statistics, seed=0).to(device)


def graph_of(atoms: Atoms, cutoff: float = 5.0) -> Any:
    """The graph on the host, without labels."""
    from steradian.graph.neighbors import make_graph
    from steradian.interfaces.ase import _structure

    return make_graph(_structure(atoms), cutoff)


def training_steps(model: Any, graphs: list[Any], mode: str) -> tuple[Callable[[], object], Any]:
    """A call that makes loss and gradients of one batch of frames that are kept on the device, as training does.

    Args:
        model: in training mode.
        graphs: of the frames, on the host.
        mode: ``eager`` or ``cuda_graph``.

    Returns:
        The call, and the steps, whose ``reason`` says why they are called where they were to be recorded.
    """
    from steradian.execution.batches import Buckets, DeviceData, Sizes
    from steradian.execution.steps import GradientStep, Steps
    from steradian.graph import batch_graphs

    def loss(prediction: Any, graph: Any) -> Any:
        return prediction.interaction_energy.sum() + prediction.forces.square().sum()

    data = DeviceData(graphs, model.device, number=model.elements[0], cutoff=model.cutoff)
    gradient = GradientStep(model, loss, forces=True, stress=False)
    buckets = Buckets.for_batches([Sizes.of(batch_graphs(graphs))])
    steps = Steps(gradient, mode, data=data, buckets=buckets)
    frames = list(range(len(graphs)))
    return lambda: steps(frames), steps


def gpu_backends(device: str) -> list[str]:
    """Backends of polynomials to list; the best that each has to offer is found by trying."""
    if torch.device(device).type == "cpu":
        return ["reference"]
    from steradian.execution.backend_benchmark import available_backends

    return available_backends()
