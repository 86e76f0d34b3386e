"""steradian's defaults against mace-torch's own, each with its own trainer, for the same processor time.

    python benchmarks/mace_defaults.py --peer PYTHON_WITH_MACE_TORCH [--epochs 12] [--molecules ethanol 3bpa]

A small model on both sides: 2 layers, 32 channels, L = 1, l_max 2, correlation 2, cutoff 5 Å. All else is what each
package does when told nothing but the data: mace-torch's ``mace_run_train`` (float64, batches of 10, Adam at 0.01, its
weights of the loss, its schedule) and ``steradian train --data`` (batches of 5, AdamW at 0.01, moving average, the
channel gate). mace-torch is asked for the mean energies of the elements too (``--E0s average``), which it does not take
by itself. Both run on one thread on the same frames (950 + 50 of rMD17 ethanol, 450 + 50 of 3BPA at 300 K).

mace-torch trains for a number of epochs; steradian gets the same processor time, start and reading included, as
``training.max_time_s`` on one thread. Errors are those of 1000 test frames (3BPA: 834): mace-torch's own table, and
``evaluate`` here. Results go to ``benchmarks/results/mace_defaults.json``.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from gate_study import DATA, test_sets
from settings import ROOT, machine, write

from steradian.config import parse_config
from steradian.data.load import load_dataset

SMALL = {"num_channels": 32, "hidden_l": 1, "l_max": 2, "correlation": 2, "num_layers": 2, "cutoff_A": 5.0}


def timed(call: list[str], log: Path, folder: Path) -> tuple[float, str]:
    """Processor seconds of a command, and what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(log, "w") as stream:
        code = subprocess.run(call, stdout=stream, stderr=stream, cwd=folder, env=environment, check=False).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code:
        sys.exit(f"{call[0]} failed; see {log}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, log.read_text()


def written(frames: list, path: Path) -> Path:
    """Frames as the extended xyz that both packages read."""
    images = []
    for frame in frames:
        atoms = Atoms(numbers=frame.numbers, positions=frame.positions)
        atoms.info["REF_energy"] = float(frame.energy)
        atoms.arrays["REF_forces"] = np.asarray(frame.forces)
        images.append(atoms)
    ase.io.write(path, images, format="extxyz")
    return path


def frames_of(molecule: str, data: Path, folder: Path) -> dict[str, Path]:
    split = load_dataset(parse_config({"data": DATA[molecule](data)}).data)
    test = next(iter(test_sets(molecule, data).values()))
    return {
        "train": written(split.train, folder / "train.xyz"),
        "valid": written(split.validation, folder / "valid.xyz"),
        "test": written(test, folder / "test.xyz"),
    }


def peer(python: Path, files: dict[str, Path], folder: Path, epochs: int) -> dict[str, Any]:
    call = [
        str(python.parent / "mace_run_train"), "--name=small", "--num_interactions=2", "--num_channels=32", "--max_L=1",
        "--max_ell=2", "--correlation=2", "--r_max=5.0", f"--train_file={files['train']}",
        f"--valid_file={files['valid']}", f"--test_file={files['test']}", "--E0s=average", "--energy_key=REF_energy",
        "--forces_key=REF_forces", "--device=cpu", f"--max_num_epochs={epochs}", "--error_table=TotalMAE",
        f"--work_dir={folder}", "--seed=0",
    ]  # fmt: skip
    seconds, out = timed(call, folder / "mace.log", folder)
    rows = re.findall(r"\|\s*\S*[Dd]efault\S*\s*\|\s*([\d.]+)\s*\|\s*([\d.]+)", out)
    energy, forces = (float(number) for number in rows[-1])
    return {"processor_s": round(seconds, 1), "epochs": epochs, "forces_mae_meV_A": forces, "energy_mae_meV": energy}


def ours(files: dict[str, Path], folder: Path, seconds: float) -> dict[str, Any]:
    from steradian.build import load_potential
    from steradian.config import KeysConfig, UnitsConfig
    from steradian.data.files import read_structures
    from steradian.evaluation.errors import evaluate

    keys = KeysConfig(energy="REF_energy", forces="REF_forces")
    settings = {
        "name": "ours", "output": folder, "data.validation": files["valid"], "data.keys.energy": keys.energy,
        "data.keys.forces": keys.forces, "training.threads": 1, "training.max_epochs": 100000,
        "training.max_time_s": seconds,
    } | {f"model.host.{name}": value for name, value in SMALL.items()}  # fmt: skip
    chosen = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    call = [sys.executable, "-m", "steradian", "train", "--data", str(files["train"]), "--overwrite", *chosen]
    spent, _ = timed(call, folder / "ours.log", ROOT)
    frames = read_structures(files["test"], keys, UnitsConfig(), ignore_cell=True)
    total = evaluate(load_potential(folder / "ours"), frames, progress=False).total
    epochs = len((folder / "ours" / "metrics.csv").read_text().splitlines()) - 1
    return {
        "processor_s": round(spent, 1), "epochs": epochs,
        "forces_mae_meV_A": round(1e3 * total["forces_mae"], 2), "energy_mae_meV": round(1e3 * total["energy_mae"], 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="interpreter that has mace-torch")
    parser.add_argument("--epochs", type=int, default=12, help="of mace-torch")
    parser.add_argument("--molecules", nargs="+", default=["ethanol", "3bpa"])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "mace_defaults")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    arguments = parser.parse_args()
    results = {}
    for molecule in arguments.molecules:
        folder = (arguments.runs / molecule).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        files = frames_of(molecule, arguments.data.resolve(), folder)
        theirs = peer(arguments.peer, files, folder, arguments.epochs)
        mine = ours(files, folder, theirs["processor_s"])
        change = 100 * (mine["forces_mae_meV_A"] / theirs["forces_mae_meV_A"] - 1)
        results[molecule] = {"mace-torch": theirs, "steradian": mine, "forces_change_percent": round(change, 1)}
        print(molecule, results[molecule], flush=True)
        write("mace_defaults", {"settings": machine() | {"model": SMALL}, "results": results})


if __name__ == "__main__":
    main()
