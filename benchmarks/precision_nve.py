"""Energy conservation in every preset: 20 ps of NVE of ethanol with a trained model.

    python benchmarks/precision_nve.py MODEL [--data ../shared/data] [--presets float64 float32 mixed half] [--ps 20]

Velocity Verlet, 0.5 fs, 300 K at the start, the same start and velocities in every preset, radial networks not
tabulated (a table is float32 in every preset). Writes drift and fluctuation of the total energy per atom to
``benchmarks/results/precision_nve.json`` and the curves to ``precision_nve.png``. Presets that the file holds for the
same model are not run again (``--again`` does).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from settings import RESULTS, ROOT, machine, write

TIMESTEP, KEEP_EVERY = 0.5, 40  # [fs], steps


def simulate(model: Path, preset: str, data: Path, picoseconds: float) -> dict[str, Any]:
    from ase import Atoms, units
    from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary, ZeroRotation
    from ase.md.verlet import VelocityVerlet

    from steradian.interfaces.ase import SteradianCalculator
    from steradian.simulate.analysis import energy_drift

    with np.load(data / "rmd17/rmd17_ethanol_test_01.npz") as file:
        atoms = Atoms(file["nuclear_charges"], file["coords"][0])
    atoms.calc = SteradianCalculator(model, precision=preset, skin=0.5, radial_table=False)
    MaxwellBoltzmannDistribution(atoms, temperature_K=300.0, rng=np.random.RandomState(0))
    Stationary(atoms)
    ZeroRotation(atoms)
    dynamics = VelocityVerlet(atoms, TIMESTEP * units.fs)
    times, energies = [0.0], [atoms.get_total_energy()]
    started = time.perf_counter()
    for step in range(round(1000 * picoseconds / TIMESTEP)):
        dynamics.run(1)
        if (step + 1) % KEEP_EVERY == 0:
            times.append((step + 1) * TIMESTEP)
            energies.append(atoms.get_total_energy())
    line = np.polyfit(times, energies, 1)
    return {
        "picoseconds": picoseconds,
        "drift_meV_per_atom_ps": 1000 * energy_drift(np.array(times), np.array(energies), len(atoms)),
        "fluctuation_meV_per_atom": float(1000 * np.std(energies - np.polyval(line, times)) / len(atoms)),
        "seconds_wall_on_a_shared_machine": round(time.perf_counter() - started, 1),
        "times_fs": times,
        "energy_change_meV_per_atom": [round(1000 * (energy - energies[0]) / len(atoms), 5) for energy in energies],
    }


def picture(results: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.2))
    for preset, run in results.items():
        times = [time / 1000 for time in run["times_fs"]]
        axis.plot(times, run["energy_change_meV_per_atom"], label=preset, linewidth=0.8)
    axis.set(xlabel="time [ps]", ylabel="total energy, change [meV/atom]", title="NVE of ethanol, MACE")
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(RESULTS / "precision_nve.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data")
    parser.add_argument("--presets", nargs="+", default=["float64", "float32", "mixed", "half"])
    parser.add_argument("--ps", type=float, default=20.0)
    parser.add_argument("--again", action="store_true")
    arguments = parser.parse_args()
    file = arguments.model / "model.safetensors" if arguments.model.is_dir() else arguments.model
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    path = RESULTS / "precision_nve.json"
    results: dict[str, Any] = {}
    if path.exists() and not arguments.again:
        known = json.loads(path.read_text(encoding="utf-8"))
        results = known["results"] if known["model_sha256"] == digest else {}
    for preset in arguments.presets:
        if results.get(preset, {}).get("picoseconds") != arguments.ps:
            results[preset] = simulate(arguments.model, preset, arguments.data, arguments.ps)
            write("precision_nve", {"settings": machine(), "model_sha256": digest, "results": results})
            shown = {key: value for key, value in results[preset].items() if not isinstance(value, list)}
            print(preset, json.dumps(shown), flush=True)
    picture(results)


if __name__ == "__main__":
    main()
