"""A converted mace-torch model in steradian's ASE calculator against itself in mace-torch's calculator.

    python benchmarks/converted_mace.py --peer-python .venv-parity-mace/bin/python
                                        [--data ../shared/data/3bpa/train_300K.xyz] [--only NAME ...] [--repeats 5]

mace-torch makes a model with random weights, writes it as arrays (``steradian convert --exporter``) and runs molecular
dynamics with it (velocity Verlet, 0.5 fs, 300 K); steradian converts the arrays and runs the same dynamics from the
same state. Each side has an interpreter of its own and runs a few steps at a time, in turn; the time of a step contains
everything ASE, the neighbour list and the calculator do. One thread; steradian uses a skin of 0.5 Å and the radial
table, its defaults otherwise.

Energies, forces and stress are compared on the first side's trajectory, in the precision of the models. The
foundation-style model has 89 elements, 128x0e + 128x1o, density blocks, Agnesi transform and ZBL repulsion.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from cpu_mace import Child, structures
from settings import RESULTS, ROOT, machine, write
from sides import SIDES, Side, read_atoms, serve

DENSITY = "RealAgnosticDensityInteractionBlock"
RESIDUAL = "RealAgnosticResidualInteractionBlock"
PLAIN = {"interaction_cls_first": RESIDUAL, "interaction_cls": RESIDUAL, "num_bessel": 8}
FOUNDATION = {
    "interaction_cls_first": DENSITY,
    "interaction_cls": DENSITY.replace("Density", "DensityResidual"),
    "num_bessel": 10,
    "distance_transform": "Agnesi",
    "pair_repulsion": True,
    "elements": list(range(1, 90)),
}
#: model, structures, precision, steps per turn
CASES: dict[str, dict[str, Any]] = {
    "ethanol": {"model": PLAIN, "structures": "ethanol", "dtype": "float32", "steps": 10},
    "3bpa": {"model": PLAIN, "structures": "3bpa", "dtype": "float32", "steps": 5},
    "3bpa, double": {"model": PLAIN, "structures": "3bpa", "dtype": "float64", "steps": 3},
    "water": {"model": PLAIN, "structures": "water", "dtype": "float32", "steps": 1},
    "foundation, ethanol": {"model": FOUNDATION, "structures": "ethanol", "dtype": "float32", "steps": 5},
    "foundation, 3bpa, double": {"model": FOUNDATION, "structures": "3bpa", "dtype": "float64", "steps": 2},
    "foundation, water": {"model": FOUNDATION, "structures": "water", "dtype": "float32", "steps": 1},
}


class Dynamics(Side):
    """Molecular dynamics with the calculator that a subclass makes."""

    def calculator(self, case: dict[str, Any]) -> Any:
        raise NotImplementedError

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        import ase.units
        import torch
        from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
        from ase.md.verlet import VelocityVerlet

        torch.set_num_threads(1)
        (self.atoms,) = read_atoms(self.folder)
        self.atoms.calc = self.calculator(case)
        MaxwellBoltzmannDistribution(self.atoms, temperature_K=300, rng=np.random.default_rng(3))
        self.dynamics = VelocityVerlet(self.atoms, 0.5 * ase.units.fs)
        self.atoms.get_forces()
        return {"torch": torch.__version__}

    def run(self, task: str) -> None:
        self.dynamics.run(int(task))

    def positions(self, argument: None) -> list[Any]:
        return self.atoms.positions.tolist()

    def at(self, positions: list[Any]) -> list[Any]:
        """Energy, forces and, where it is periodic, stress at given positions."""
        self.atoms.positions[:] = positions
        found = [self.atoms.get_potential_energy(), self.atoms.get_forces()]
        found += [self.atoms.get_stress()] if self.atoms.pbc.all() else []
        return [np.asarray(value, dtype=np.float64).tolist() for value in found]


class Peer(Dynamics):
    """mace-torch; makes the model and writes it."""

    def calculator(self, case: dict[str, Any]) -> Any:
        import torch
        from e3nn import o3
        from mace import modules
        from mace.calculators import MACECalculator

        sys.path.append(str(ROOT / "src"))
        from steradian.interfaces.foreign_export import export

        torch.set_default_dtype(getattr(torch, case["dtype"]))
        torch.manual_seed(0)
        hyper = dict(case["model"])
        elements = hyper.pop("elements", case["elements"])
        blocks = {key: getattr(modules, hyper.pop(key)) for key in ("interaction_cls", "interaction_cls_first")}
        model = modules.ScaleShiftMACE(
            **hyper,
            **blocks,
            r_max=5.0,
            num_polynomial_cutoff=5,
            max_ell=3,
            num_interactions=2,
            hidden_irreps=o3.Irreps("128x0e + 128x1o"),
            MLP_irreps=o3.Irreps("16x0e"),
            radial_MLP=[64, 64, 64],
            correlation=3,
            gate=torch.nn.functional.silu,
            atomic_numbers=elements,
            num_elements=len(elements),
            atomic_energies=np.zeros(len(elements)),
            avg_num_neighbors=16.6,
            atomic_inter_scale=0.8,
            atomic_inter_shift=0.1,
        )
        export(model, str(self.folder / "foreign.npz"))
        return MACECalculator(models=[model], device="cpu", default_dtype=case["dtype"])


class Ours(Dynamics):
    """steradian with the same weights, converted, its self-test passed."""

    def calculator(self, case: dict[str, Any]) -> Any:
        from steradian.build import load_potential, save_potential
        from steradian.interfaces.ase import SteradianCalculator
        from steradian.interfaces.convert import convert_file

        save_potential(self.folder / "model.safetensors", convert_file(self.folder / "foreign.npz"))
        potential = load_potential(self.folder / "model.safetensors")  # checks the self-test again
        return SteradianCalculator(potential, skin=0.5)


SIDES |= {"mace-torch": Peer, "steradian": Ours}


def compared(children: list[Child], frames: list[Any]) -> dict[str, float]:
    """Largest differences of energies [eV], forces [eV/Å] and stress [eV/Å^3], and the largest force."""
    worst = {"energy_eV": 0.0, "forces_eV_A": 0.0, "stress_eV_A3": 0.0, "largest_force_eV_A": 0.0}
    for positions in frames:
        peer, ours = ([np.array(value) for value in child.ask("at", positions)] for child in children)
        for name, mine, theirs in zip(list(worst)[:3], ours, peer):
            worst[name] = max(worst[name], float(np.abs(mine - theirs).max()))
        worst["largest_force_eV_A"] = max(worst["largest_force_eV_A"], float(np.abs(peer[1]).max()))
    return worst


def run_case(case: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    content = structures(case["structures"], 1, arguments.data)
    case = case | {"elements": sorted({int(number) for number in content["numbers"]})}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "structures.npz", **content)
        children = []
        for side, python in (("mace-torch", arguments.peer_python), ("steradian", sys.executable)):
            children.append(Child(python, side, folder, Path(__file__).name))
            children[-1].ask("prepare", case)
        times: dict[str, list[list[float]]] = {child.name: [] for child in children}
        frames = []
        for repeat in range(arguments.warmup + arguments.repeats):
            for child in children:
                seconds = child.ask("run", str(case["steps"]))
                if repeat >= arguments.warmup:
                    times[child.name].append([value / case["steps"] for value in seconds])
            frames.append(children[0].ask("positions"))
        result: dict[str, Any] = {"case": case, "atoms": len(content["numbers"])}
        for kind, name in enumerate(("ms_per_step", "processor_ms_per_step")):
            result[name] = {side: round(1e3 * statistics.median(v[kind] for v in t), 2) for side, t in times.items()}
        ratios = [theirs[0] / ours[0] for theirs, ours in zip(times["mace-torch"], times["steradian"])]
        result["times_faster"] = round(statistics.median(ratios), 2)
        result["largest_differences"] = compared(children, frames)
        for child in children:
            child.stop()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=".venv-parity-mace/bin/python", help="interpreter that has mace-torch")
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data/3bpa/train_300K.xyz")
    parser.add_argument("--only", nargs="*", choices=CASES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 loads its constants with torch.load
        serve(arguments.serve, arguments.folder)
        return
    path = RESULTS / "converted_mace.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in arguments.only or CASES:
        result = run_case(CASES[name], arguments)
        content.setdefault("results", {})[name] = {"settings": machine(), **result}
        print(name, result["ms_per_step"], result["times_faster"], result["largest_differences"], flush=True)
        write("converted_mace", content)


if __name__ == "__main__":
    main()
