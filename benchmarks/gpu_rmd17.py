"""rMD17 aspirin on a GPU: MACE and MACE-MARA with 256 channels, L = 2, for as many steps as a budget of time allows.

    python benchmarks/gpu_rmd17.py --data ../shared/data/rmd17 --runs runs/gpu_rmd17 [--minutes 9] [--set KEY=VALUE ...]
    python benchmarks/gpu_rmd17.py --data ../shared/data/rmd17 --device cpu --smoke

Each call trains both models in turn, half of the time each, and goes on with what it finds in the folder, so it can be
started again until the budget (20 minutes each in the table) is used. 950 + 50 frames of the training file; the
learning rate follows the number of epochs in ``--epochs``. Writes steps per second and the validation errors over time
of either model (JSON), and a picture of them.
"""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_settings import Results, parser
from settings import ROOT

MODELS = {"MACE": "rmd17_aspirin_mace.yaml", "MACE-MARA": "rmd17_aspirin_mace_mara.yaml"}
SHAPE = {"model.host.num_channels": 256, "model.host.hidden_l": 2, "model.host.l_max": 3}
TRIAL = {"model.host.num_channels": 8, "data.split": "{train: 10, validation: 5, seed: 1}", "data.batch": "{graphs: 5}"}


def command(name: str, folder: Path, arguments: Any) -> list[str]:
    """Training from the start, or on from where it stopped."""
    call = [sys.executable, "-m", "steradian", "train"]
    extra = [part for override in arguments.set for part in ("--set", override)]
    if (folder / "last.ckpt").exists():
        return [*call, "--resume", str(folder), *extra]
    settings = {
        "name": folder.name,
        "output": folder.parent,
        "data.train": arguments.data.resolve() / "rmd17_aspirin_train_01.npz",
        "training.max_epochs": arguments.epochs,
        **(TRIAL if arguments.smoke else SHAPE),
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return [*call, str(ROOT / "configs" / MODELS[name]), *overrides, *extra, "--overwrite"]


def train(name: str, folder: Path, seconds: float, arguments: Any) -> float:
    """Train for so long and stop as by Ctrl-C, which saves everything; returns the seconds used."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with open(folder.parent / f"{folder.name}.out", "a", encoding="utf-8") as log:
        process = subprocess.Popen(command(name, folder, arguments), stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait(120)
    return time.monotonic() - start


def curve(folder: Path) -> dict[str, Any]:
    """What ``metrics.csv`` of a run says.

    Raises:
        FileNotFoundError: no epoch was finished; the log says why.
    """
    with open(folder / "metrics.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))

    def column(key: str, factor: float = 1.0) -> list[float]:
        return [round(factor * float(row[key]), 6) for row in rows]

    steps, seconds = column("step"), column("time_s")
    # the first epoch compiles and measures kernels
    later = [(s, t) for s, t in zip(steps, seconds)][1:] if len(steps) > 2 else [(0.0, 0.0), (steps[-1], seconds[-1])]
    (s0, t0), (s1, t1) = later[0], later[-1]
    forces, energy = column("validation/forces_mae", 1000.0), column("validation/energy_mae", 1000.0)
    return {
        "epochs": len(rows),
        "steps": int(steps[-1]),
        "training_s": seconds[-1],
        "steps_per_s": round((s1 - s0) / max(t1 - t0, 1e-9), 3),
        "best_forces_mae_meV_per_A": min(forces),
        "best_energy_mae_meV": min(energy),
        "curve": {"time_s": seconds, "step": steps, "forces_mae_meV_per_A": forces, "energy_mae_meV": energy},
    }


def picture(rows: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for name, row in rows.items():
        if "curve" not in row:
            continue
        for panel, key in zip(axes, ("forces_mae_meV_per_A", "energy_mae_meV")):
            panel.plot([t / 60 for t in row["curve"]["time_s"]], row["curve"][key], label=name)
    for panel, label in zip(axes, ("MAE of forces [meV/Å]", "MAE of energies [meV]")):
        panel.set(xlabel="training time [min]", ylabel=label, yscale="log")
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    options = parser(__doc__, "gpu_rmd17")
    options.add_argument("--data", type=Path, default=ROOT / "../shared/data/rmd17")
    options.add_argument("--runs", type=Path, default=Path("runs/gpu_rmd17"))
    options.add_argument("--epochs", type=int, default=400)
    options.add_argument("--set", action="append", default=[], help="override of the configuration, KEY=VALUE")
    arguments = options.parse_args()
    if arguments.smoke:
        arguments.runs, arguments.epochs = Path(tempfile.mkdtemp()), 1
    results = Results(arguments, shape=TRIAL if arguments.smoke else SHAPE, epochs=arguments.epochs)
    seconds = max(30.0, 60 * arguments.minutes / len(MODELS) - 20)
    for name in MODELS:
        folder = arguments.runs.resolve() / name.lower().replace("-", "_")
        used = train(name, folder, seconds, arguments)
        results.rows.pop(name, None)  # a run that went on has more to say
        results.measure(name, lambda f=folder, s=used: curve(f) | {"wall_s_of_this_call": round(s, 1)})
    picture(results.rows, results.path.with_suffix(".png"))
    print(results.path)


if __name__ == "__main__":
    main()
