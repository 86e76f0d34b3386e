"""What the message scale and the channel gate of MARA bring: many short trainings, one JSON file per run.

    python benchmarks/gate_study.py list                          # the runs, and which are done
    python benchmarks/gate_study.py run [--part screen] [--minutes 100] [--runs runs/gate]
    python benchmarks/gate_study.py table                         # tables and pictures from what is done

``run`` goes through the runs in order, on one thread, skips those that are done, and goes on with one that was
interrupted. A finished run is evaluated on the test frames as they are and turned at random (every frame by its own
rotation), and written to ``benchmarks/results/gate_study/NAME.json`` with commit, settings, seeds and processor time.
``table`` writes ``benchmarks/results/gate_study.json``, ``.txt`` and ``.png``.

The model is a small MACE (32 channels, L = 1, l_max 2, correlation 2) unless a variant says otherwise; batches of 10,
cosine from 0.01, average 0.99, 950 + 50 frames (3BPA: 450 + 50). Seeds are those of the weights and of the order of
the batches; the split is the same for all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from settings import RESULTS, ROOT, machine, text

FOLDER = RESULTS / "gate_study"
ROOTED = {"model.host.message_scale": "root"}
CHANNEL: dict[str, Any] = {"kind": "mara", "form": "channel"}
PUBLISHED = {
    "kind": "mara", "form": "published", "frame": "lab",
    "grid": {"kind": "equiangular", "num_lat": 4, "num_lon": 8}, "hidden_dim": 32,
}  # fmt: skip
INTRINSIC = {"kind": "mara", "form": "published", "frame": "intrinsic", "grid": {"kind": "lebedev", "num_points": 50}}
INPUTS = ["scalars", "radial", "projections"]
SPHERE: dict[str, Any] = {"kernel": "polynomial", "grid": {"kind": "lebedev", "num_points": 26}, "num_heads": 4}


def gate(**options: Any) -> dict[str, Any]:
    return {"model.edge_gate": CHANNEL | options}


#: What a run sets beside the shared settings, by name; "bare" is the tuned host without a gate.
VARIANTS: dict[str, dict[str, Any]] = {
    "mean": {"model.host.message_scale": "mean"},
    "bare": {},
    "scale-1.5": {"model.host.message_scale": 1.5},
    "learned": {"model.host.message_scale": "learned"},
    "wider": {"model.host.num_channels": 40},
    "published": {"model.edge_gate": PUBLISHED},
    "published-intrinsic": {"model.edge_gate": INTRINSIC},
    "channel": gate(),
    "channel-all-heads": gate(heads="C"),
    "channel-8-heads": gate(heads=8),
    "channel-message": gate(resolution="message", heads="C"),
    "channel-scalar": gate(resolution="message", heads=1),
    "channel-no-density": gate(inputs=INPUTS),
    "channel-no-density-message": gate(inputs=INPUTS, resolution="message", heads="C"),
    "channel-undirected": gate(inputs=["scalars", "radial"]),
    "channel-sigmoid": gate(activation="sigmoid"),
    "channel-exp": gate(activation="exp"),
    "channel-64": gate(hidden_dim=64),
    "channel-node": gate(where="node"),
    "channel-sphere": gate(inputs=[*INPUTS, "density", "sphere"], **SPHERE),
    "channel-only-sphere": gate(inputs=["scalars", "radial", "sphere"], **SPHERE),
}
#: Hosts other than the small MACE.
HOSTS: dict[str, dict[str, Any]] = {
    "mace": {},
    "mace-correlation-3": {"model.host.correlation": 3},
    "mace-64": {"model.host.num_channels": 64},
    "nequip": {
        "model.host": {
            "kind": "nequip", "num_layers": 3, "num_channels": 32, "l_max": 1, "parity": True, "cutoff_A": 5.0,
            "radial": {"kind": "bessel", "num": 8, "envelope_p": 6}, "radial_mlp": [64, 64],
        }
    },
    "visnet": {
        "model.host": {
            "kind": "visnet", "num_layers": 3, "num_channels": 64, "num_heads": 8, "l_max": 2, "cutoff_A": 5.0,
            "radial": {"num": 32},
        },
        "training.optimizer.learning_rate": 0.001,
    },
}  # fmt: skip
BASE: dict[str, Any] = {
    "model": {
        "host": {
            "kind": "mace", "num_layers": 2, "num_channels": 32, "hidden_l": 1, "l_max": 2, "correlation": 2,
            "cutoff_A": 5.0, "radial": {"kind": "bessel", "num": 8, "envelope_p": 5}, "radial_mlp": [64, 64],
            "message_scale": "root",
        },
        "edge_gate": {"kind": "none"},
    },
    "training": {
        "loss": {"kind": "mse", "energy_weight": 1.0, "forces_weight": 100.0},
        "optimizer": {"kind": "adamw", "learning_rate": 0.01, "amsgrad": True, "clip_norm": 10.0},
        "schedule": {"kind": "cosine", "warmup_steps": 50, "min_learning_rate": 1.0e-5},
        "ema_decay": 0.99, "threads": 1, "loggers": ["csv"],
    },
}  # fmt: skip
FIGURES = ("forces_mae", "forces_rmse", "forces_q95", "forces_q99", "forces_max", "energy_mae", "energy_rmse")
TURNS = 12345  # seed of the rotations of the test frames


@dataclass(frozen=True)
class Run:
    """One training; its name says all of it."""

    part: str
    molecule: str
    host: str
    variant: str
    epochs: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.molecule}_{self.host}_{self.variant}_e{self.epochs}_s{self.seed}"

    @property
    def result(self) -> Path:
        return FOLDER / f"{self.name}.json"

    def config(self, data: Path, runs: Path) -> dict[str, Any]:
        config = json.loads(json.dumps(BASE))
        for key, value in (HOSTS[self.host] | VARIANTS[self.variant]).items():
            *parents, last = key.split(".")
            place = config
            for parent in parents:
                place = place[parent]
            place[last] = value
        if config["model"]["host"]["kind"] == "visnet":  # whose published scale is a plain sum
            config["model"]["host"].pop("message_scale", None)
        config["training"] |= {"max_epochs": self.epochs, "seed": self.seed}
        config["data"] = DATA[self.molecule](data)
        return config | {"name": self.name, "output": str(runs)}


def rmd17(molecule: str) -> Any:
    def section(data: Path) -> dict[str, Any]:
        return {
            "train": str(data / "rmd17" / f"rmd17_{molecule}_train_01.npz"),
            "keys": {"energy": "energies", "forces": "forces", "positions": "coords", "numbers": "nuclear_charges"},
            "units": {"energy": "kcal/mol", "length": "Angstrom"},
            "split": {"train": 950, "validation": 50, "seed": 1},
            "reference_energies": {"kind": "average"},
            "batch": {"graphs": 10},
        }

    return section


def three_bpa(data: Path) -> dict[str, Any]:
    return {
        "train": str(data / "3bpa" / "train_300K.xyz"),
        "split": {"train": 450, "validation": 50, "seed": 1},
        "reference_energies": {"kind": "average"},
        "batch": {"graphs": 10},
        "ignore_cell": True,
    }


DATA: dict[str, Any] = {name: rmd17(name) for name in ("ethanol", "uracil", "aspirin")} | {"3bpa": three_bpa}


#: Epochs of the main part: the small molecules longer, as an epoch of the large ones takes several times as long.
EPOCHS = {"ethanol": 100, "uracil": 60, "aspirin": 30, "3bpa": 60}


def plan() -> Iterator[Run]:
    """The runs in the order in which they tell most."""
    for seed, molecule in itertools.product((0, 1, 2), EPOCHS):
        for variant in ("bare", "channel"):
            yield Run("main", molecule, "mace", variant, EPOCHS[molecule], seed)
    for seed, molecule in itertools.product((0, 1, 2), EPOCHS):
        yield Run("main", molecule, "mace", "published", EPOCHS[molecule], seed)
    for seed, variant in itertools.product((0, 1, 2), ("mean", "bare", "scale-1.5", "learned")):
        yield Run("scale", "ethanol", "mace", variant, 50, seed)
        yield Run("scale", "aspirin", "mace", variant, 20, seed)
    for seed, molecule in itertools.product((0, 1), ("ethanol", "uracil")):
        for variant in VARIANTS:
            if variant not in ("mean", "scale-1.5", "learned"):
                yield Run("screen", molecule, "mace", variant, 100, seed)
    for seed, host in itertools.product((0, 1), ("nequip", "visnet", "mace-correlation-3", "mace-64")):
        for variant in ("bare", "channel"):
            yield Run("hosts", "aspirin", host, variant, 25, seed)
    for seed, host, variant in itertools.product((0, 1), ("mace-correlation-3", "nequip", "visnet"), ("mean", "bare")):
        if (host, variant) != ("visnet", "mean"):
            yield Run("scale", "aspirin", host, variant, 25, seed)


# ------------------------------------------------------------------------------------------------------------- running


def finished() -> list[Run]:
    return [run for run in plan() if run.result.exists()]


def train(run: Run, arguments: argparse.Namespace, deadline: float) -> bool:
    """Train until done; False when the time is up."""
    import yaml

    runs = arguments.runs.resolve()
    folder, times = runs / run.name, runs / f"{run.name}.times.json"
    runs.mkdir(parents=True, exist_ok=True)
    sessions = json.loads(times.read_text()) if times.exists() else []
    if not (sessions and sessions[-1]["finished"]):
        file = runs / f"{run.name}.yaml"
        file.write_text(yaml.safe_dump(run.config(arguments.data.resolve(), runs)))
        goes_on = (folder / "last.ckpt").exists()
        call = ["--resume", str(folder)] if goes_on else ["--overwrite", str(file)]
        left = max(1.0, deadline - time.time())
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with open(runs / f"{run.name}.out", "a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "steradian", "train", *call], stdout=log, stderr=log, cwd=ROOT
            )
            try:
                code = process.wait(timeout=left)
            except subprocess.TimeoutExpired:
                process.terminate()
                code = process.wait() or 1
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        sessions.append({"processor_s": round(seconds, 1), "finished": code == 0})
        times.write_text(json.dumps(sessions))
        if code:
            if time.time() < deadline:
                sys.exit(f"{run.name} failed; see {runs / (run.name + '.out')}")
            return False
    record(run, folder, sum(entry["processor_s"] for entry in sessions), arguments.data)
    if not arguments.keep:
        shutil.rmtree(folder)
    return True


def test_sets(molecule: str, data: Path) -> dict[str, list]:
    from steradian.config import KeysConfig, UnitsConfig
    from steradian.data.files import read_structures

    if molecule == "3bpa":
        # of the training set at all temperatures nothing is trained on here: its hot frames are further test frames
        hot = read_structures(data / "3bpa" / "train_mixedT.xyz", KeysConfig(), UnitsConfig(), ignore_cell=True)
        test = KeysConfig(positions="pos", numbers="atomic_numbers")
        sets = {
            "300 K": read_structures(data / "3bpa" / "test_300K.npz", test, UnitsConfig(), ignore_cell=True)[::2],
            "600 K": hot[167:334],
            "1200 K": hot[334:],
        }
    else:
        path = data / "rmd17" / f"rmd17_{molecule}_test_01.npz"
        sets = {"test": read_structures(path, KeysConfig(), UnitsConfig(energy="kcal/mol"), ignore_cell=True)}
    return sets | {f"{name}, turned": turned(frames) for name, frames in sets.items()}


def turned(frames: list) -> list:
    """Every frame by a rotation of its own (Haar measure)."""
    from dataclasses import replace

    from scipy.spatial.transform import Rotation

    matrices = Rotation.random(len(frames), random_state=TURNS).as_matrix()
    return [
        replace(frame, positions=frame.positions @ matrix.T, forces=frame.forces @ matrix.T)
        for frame, matrix in zip(frames, matrices)
    ]


def record(run: Run, folder: Path, seconds: float, data: Path) -> None:
    """Errors on the test frames, statistics of alpha, settings."""
    from steradian.build import load_potential
    from steradian.evaluation.errors import evaluate

    potential = load_potential(folder)
    errors: dict[str, Any] = {}
    for name, frames in test_sets(run.molecule, data).items():
        total = evaluate(potential, frames, progress=False).total
        errors[name] = {figure: float(f"{total[figure]:.6g}") for figure in FIGURES}
    config = run.config(Path(), Path())
    entry = {
        **{name: getattr(run, name) for name in ("part", "molecule", "host", "variant", "epochs", "seed")},
        "processor_s": round(seconds, 1),
        "parameters": sum(parameter.numel() for parameter in potential.parameters()),
        "errors": errors,
        "alpha": alpha_statistics(potential, run.molecule, data),
        "model": config["model"],
        "training": config["training"],
        "machine": machine(),
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    run.result.write_text(text(entry))
    test = errors[next(iter(errors))]
    print(f"{run.name}: forces {1e3 * test['forces_mae']:.2f} meV/Å, energy {1e3 * test['energy_mae']:.2f} meV, "
          f"{seconds:.0f} s", flush=True)  # fmt: skip


def alpha_statistics(potential: Any, molecule: str, data: Path) -> list[dict[str, float]]:
    """Of every gated layer over ten frames: mean, spread over edges and channels, extremes."""
    from steradian.graph import batch_graphs
    from steradian.graph.neighbors import make_graph

    frames = next(iter(test_sets(molecule, data).values()))[::100]
    gates = potential(batch_graphs([make_graph(frame, potential.cutoff) for frame in frames])).gates
    return [
        {name: round(float(getattr(alpha, name)()), 4) for name in ("mean", "std", "min", "max")} for alpha in gates
    ]


# -------------------------------------------------------------------------------------------------------------- tables


def compared(runs: list[dict[str, Any]], reference: str) -> list[dict[str, Any]]:
    """Every variant against the reference, pair by pair of seeds, for equal molecule, host and epochs."""
    found = []
    key = lambda run: (run["molecule"], run["host"], run["epochs"])  # noqa: E731
    for group, members in itertools.groupby(sorted(runs, key=key), key):
        by_variant: dict[str, dict[int, dict]] = {}
        for run in members:
            by_variant.setdefault(run["variant"], {})[run["seed"]] = run
        base = by_variant.get(reference, {})
        for variant, by_seed in by_variant.items():
            for test in next(iter(by_seed.values()))["errors"]:
                row: dict[str, Any] = dict(zip(("molecule", "host", "epochs"), group)) | {
                    "variant": variant, "frames": test, "seeds": sorted(by_seed),
                }  # fmt: skip
                for figure in ("forces_mae", "forces_q99", "forces_max", "energy_mae"):
                    values = [1e3 * run["errors"][test][figure] for run in by_seed.values()]
                    row[figure] = round(float(np.mean(values)), 3)
                    shared = sorted(set(by_seed) & set(base))
                    changes = [
                        100 * (by_seed[seed]["errors"][test][figure] / base[seed]["errors"][test][figure] - 1)
                        for seed in shared
                    ]
                    row[f"{figure}_change"] = [round(change, 1) for change in changes]
                row["processor_s_per_epoch"] = round(
                    float(np.mean([run["processor_s"] / run["epochs"] for run in by_seed.values()])), 2
                )
                found.append(row)
    return found


def claims(changes: list[float]) -> str:
    """``-12 %`` where all seeds agree and the mean exceeds their spread, else in brackets."""
    if not changes:
        return ""
    mean = float(np.mean(changes))
    spread = float(np.std(changes, ddof=1)) if len(changes) > 1 else math.inf
    sure = len(changes) > 1 and len({change > 0 for change in changes}) == 1 and abs(mean) > spread
    shown = f"{mean:+.1f} %"
    return shown if sure else f"({shown})"


def table(arguments: argparse.Namespace) -> None:
    runs = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    rows = compared(runs, "bare")
    (RESULTS / "gate_study.json").write_text(text({"runs": len(runs), "rows": rows}))
    lines = [
        "Changes are against 'bare' of the same molecule, host, epochs and seeds; in brackets where seeds disagree in "
        "sign, the change is within their spread, or there is one seed. Forces meV/Å, energies meV.",
        "",
        f"{'molecule':9}{'host':20}{'epochs':>7} {'variant':22}{'frames':16}{'seeds':>6}{'forces':>8}{'':>11}"
        f"{'Q99':>8}{'':>11}{'MAX':>9}{'':>11}{'energy':>8}{'':>11}{'s/epoch':>9}",
    ]
    for row in rows:
        cells = "".join(
            f"{row[figure]:>{width}.2f}{claims(row[figure + '_change']):>11}"
            for figure, width in (("forces_mae", 8), ("forces_q99", 8), ("forces_max", 9), ("energy_mae", 8))
        )
        lines.append(
            f"{row['molecule']:9}{row['host']:20}{row['epochs']:>7} {row['variant']:22}{row['frames']:16}"
            f"{len(row['seeds']):>6}{cells}{row['processor_s_per_epoch']:>9.2f}"
        )
    (RESULTS / "gate_study.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["list", "run", "table"])
    parser.add_argument("--part", nargs="+", help="of the study; all if left out")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these, so that two processes can share the work")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop cleanly after so many")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "gate")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--keep", action="store_true", help="keep the folders of finished runs")
    arguments = parser.parse_args()
    if arguments.action == "table":
        table(arguments)
        return
    chosen = [
        run
        for run in plan()
        if (not arguments.part or run.part in arguments.part) and (not arguments.seeds or run.seed in arguments.seeds)
    ]
    if arguments.action == "list":
        print("\n".join(f"{'done' if run.result.exists() else '    '} {run.part:8} {run.name}" for run in chosen))
        return
    deadline = time.time() + 60 * arguments.minutes
    for run in chosen:
        if not run.result.exists() and not (time.time() < deadline and train(run, arguments, deadline)):
            break


if __name__ == "__main__":
    main()
