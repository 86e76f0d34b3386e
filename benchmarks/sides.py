"""The sides of ``cpu_mace.py``: each runs in an interpreter of its own and answers one JSON request at a time."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = "RealAgnosticResidualInteractionBlock"
#: What a side can be asked to do.
TASKS = ("energy + forces", "energy + forces + stress", "training step", "calculator step")


def hyperparameters(case: dict[str, Any]) -> dict[str, Any]:
    """mace-torch's arguments for a case."""
    channels = case["channels"]
    parts = (f"{channels}x{degree}{'eo'[degree % 2]}" for degree in range(case["hidden_l"] + 1))
    return {
        "r_max": case["cutoff"],
        "num_bessel": 8,
        "num_polynomial_cutoff": 5,
        "max_ell": case["l_max"],
        "interaction_cls_first": BLOCK,
        "interaction_cls": BLOCK,
        "num_interactions": 2,
        "hidden_irreps": " + ".join(parts),
        "MLP_irreps": "16x0e",
        "atomic_numbers": case["elements"],
        "correlation": case["correlation"],
        "gate": "silu",
        "radial_MLP": [64, 64, 64],
        "avg_num_neighbors": case["avg_num_neighbors"],
    }


def read_atoms(folder: Path) -> list[Any]:
    """The structures of the case, as ASE's."""
    import ase

    with np.load(folder / "structures.npz") as file:
        return [
            ase.Atoms(numbers=file["numbers"], positions=positions, cell=file["cell"], pbc=bool(file["periodic"]))
            for positions in file["positions"]
        ]


class Side:
    """A network and what one call of it does; tensors stay in its own process."""

    model: Any
    num_edges: int
    atoms: Any

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        """Build everything for a case; returns what is worth knowing."""
        raise NotImplementedError

    def call(self, training: bool, stress: bool = False) -> tuple[Any, Any]:
        """Interaction energies and forces."""
        raise NotImplementedError

    def select(self, task: str) -> None:
        """Weights are frozen for everything but training, as in either package's ASE calculator."""
        training = task == "training step"
        self.model.train(training)
        for parameter in self.model.parameters():
            parameter.requires_grad_(training)

    def run(self, task: str) -> None:
        if task == "training step":
            energy, forces = self.call(training=True)
            (energy.sum() + forces.square().sum()).backward()
            self.model.zero_grad()
        elif task == "calculator step":
            # an atom moves a little, as in a simulation, so nothing is answered from memory
            self.atoms.positions[0, 0] += 1e-4
            self.atoms.get_forces()
        else:
            self.call(training=False, stress=task.endswith("stress"))

    def per_edge(self, added_kib: int) -> dict[str, float]:
        return {"added_KiB_per_edge": round(added_kib / self.num_edges, 1)}

    def results(self) -> list[Any]:
        energy, forces = self.call(training=False)
        return [energy.detach().double().tolist(), forces.detach().double().tolist()]


class MaceTorch(Side):
    """mace-torch; writes the weights that steradian reads."""

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # e3nn 0.4.4 loads its own constants with torch.load
        import e3nn
        import mace
        import torch
        from e3nn import o3
        from mace import modules
        from mace.calculators import MACECalculator
        from mace.data import AtomicData, config_from_atoms
        from mace.tools import AtomicNumberTable, torch_geometric

        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(case["threads"])
        torch.manual_seed(0)
        arguments = hyperparameters(case)
        for key in ("interaction_cls", "interaction_cls_first"):
            arguments[key] = getattr(modules, BLOCK)
        for key in ("hidden_irreps", "MLP_irreps"):
            arguments[key] = o3.Irreps(arguments[key])
        count = len(case["elements"])
        self.model = modules.ScaleShiftMACE(
            **arguments | {"gate": torch.nn.functional.silu},
            num_elements=count,
            atomic_energies=np.zeros(count),
            atomic_inter_scale=1.0,
            atomic_inter_shift=0.0,
        )
        weights = {name: value.numpy() for name, value in self.model.state_dict().items()}
        np.savez(self.folder / "weights.npz", **weights)
        table = AtomicNumberTable(case["elements"])
        frames = read_atoms(self.folder)
        graphs = [AtomicData.from_config(config_from_atoms(a), z_table=table, cutoff=case["cutoff"]) for a in frames]
        loader = torch_geometric.dataloader.DataLoader(graphs, batch_size=len(graphs))
        self.batch = next(iter(loader)).to_dict()
        self.atoms = frames[0]
        self.atoms.calc = MACECalculator(models=[self.model], device="cpu", default_dtype="float32")
        self.num_edges = self.batch["edge_index"].shape[1]
        versions = {"mace-torch": mace.__version__, "e3nn": e3nn.__version__, "torch": torch.__version__}
        return versions | {"edges": self.num_edges, "threads": torch.get_num_threads()}

    def call(self, training: bool, stress: bool = False) -> tuple[Any, Any]:
        out = self.model(self.batch, training=training, compute_force=True, compute_stress=stress)
        return out["interaction_energy"], out["forces"]


class Steradian(Side):
    """steradian with mace-torch's weights. ``table``: radial weights from a table, as its ASE calculator does."""

    table = False

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        import dataclasses

        import torch

        from steradian import SteradianCalculator
        from steradian.build import build_potential
        from steradian.config import MARAConfig
        from steradian.graph import batch_graphs
        from steradian.graph.neighbors import make_graph
        from steradian.interfaces.ase import _structure
        from steradian.interfaces.mace_torch import config_and_weights_from_mace_torch

        torch.set_num_threads(case["threads"])
        with np.load(self.folder / "weights.npz") as file:
            config, numbers, state = config_and_weights_from_mace_torch(dict(file), hyperparameters(case))
        self.gated = case.get("mara", False)
        if self.gated:
            config = config.model_copy(update={"edge_gate": MARAConfig(form="published", frame="lab")})
        self.model = build_potential(config, numbers, seed=0)
        self.model.host.load_state_dict(state, strict=not self.gated)
        frames = read_atoms(self.folder)
        graph = batch_graphs([make_graph(_structure(atoms), case["cutoff"]) for atoms in frames])
        self.graph = dataclasses.replace(graph, energy=None, forces=None, stress=None)
        self.atoms = frames[0]
        self.calculator = lambda: SteradianCalculator(self.model, skin=0.5)
        self.num_edges = graph.num_edges
        about = {"torch": torch.__version__, "parameters": self.model.num_parameters, "edges": graph.num_edges}
        return about | {"threads": torch.get_num_threads()}

    def select(self, task: str) -> None:
        if task == "training step":
            self.model.train()
            self.model.requires_grad_(True)
            return
        self.model.for_inference(radial_table=self.table or task == "calculator step")
        if task == "calculator step":
            self.atoms.calc = self.calculator()

    def call(self, training: bool, stress: bool = False) -> tuple[Any, Any]:
        prediction = self.model(self.graph, forces=True, stress=stress)
        return prediction.interaction_energy, prediction.forces


class SteradianTable(Steradian):
    table = True


class Mlip(Side):
    """mlip's MACE (JAX, compiled) of the same shape and size, with weights of its own."""

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        flags = f"--xla_cpu_multi_thread_eigen={'true' if case['threads'] > 1 else 'false'}"
        os.environ["XLA_FLAGS"] = f"{flags} intra_op_parallelism_threads={case['threads']}"
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: case["threads"]])
        from importlib.metadata import version

        import jax
        import jax.numpy as jnp
        from mlip.data import ChemicalSystem, DatasetInfo
        from mlip.graph import Graph
        from mlip.graph.batching_helpers import batch_graphs
        from mlip.models import ForceField, Mace

        config = Mace.Config(
            num_layers=2,
            num_channels=case["channels"],
            l_max=case["l_max"],
            node_symmetry=case["hidden_l"],
            correlation=case["correlation"],
        )
        info = DatasetInfo(
            atomic_energies_map=dict.fromkeys(case["elements"], 0.0),
            graph_cutoff_angstrom=case["cutoff"],
            avg_num_neighbors=case["avg_num_neighbors"],
        )
        self.field = ForceField.from_mlip_network(Mace(config, info))
        graphs = [
            Graph.from_chemical_system(
                ChemicalSystem(atomic_numbers=atoms.numbers, positions=atoms.positions, energy=0.0),
                graph_cutoff_angstrom=case["cutoff"],
            )
            for atoms in read_atoms(self.folder)
        ]
        self.graph = jax.tree.map(jnp.asarray, batch_graphs(graphs, jittable=True))
        self.forward = jax.jit(self.field.predictor.apply)

        def loss(params: Any, graph: Any) -> Any:
            prediction = self.field.predictor.apply(params, graph).to_prediction()
            return prediction.energy.sum() + jnp.square(prediction.forces).sum()

        self.step = jax.jit(jax.grad(loss))
        self.wait = jax.block_until_ready
        # mlip pads a batch with nothing here; edges are counted as its graph holds them
        return {
            "mlip": version("mlip"),
            "jax": jax.__version__,
            "edges": len(self.graph.senders),
            "parameters": int(sum(leaf.size for leaf in jax.tree.leaves(self.field.params))),
            "threads": case["threads"],
        }

    def select(self, task: str) -> None:
        pass

    def run(self, task: str) -> None:
        function = self.step if task == "training step" else self.forward
        self.wait(function(self.field.params, self.graph))


SIDES = {"mlip": Mlip, "mace-torch": MaceTorch, "steradian": Steradian, "steradian, radial table": SteradianTable}


def status_kib(field: str) -> int:
    """A figure of this process as Linux gives it [KiB]."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise KeyError(field)


def peak_memory(side: Side, task: str) -> dict[str, float]:
    """MiB: resident before the task, and the most that running it twice adds to that."""
    before = status_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts here
    side.run(task)
    side.run(task)
    added = status_kib("VmHWM") - before
    return {"before_MiB": round(before / 1024, 1), "added_MiB": round(added / 1024, 1)} | side.per_edge(added)


def serve(name: str, folder: Path) -> None:
    """Answer ``[request, argument]`` lines: prepare, select, run, results, memory."""
    warnings.filterwarnings("ignore")
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not mix with the replies
    side = SIDES[name](folder)
    for line in sys.stdin:
        request, argument = json.loads(line)
        answer: Any = None
        if request == "run":
            start, start_cpu = time.perf_counter(), time.process_time()
            side.run(argument)
            answer = [time.perf_counter() - start, time.process_time() - start_cpu]
        elif request == "memory":
            answer = peak_memory(side, argument)
        elif request == "results":
            answer = side.results()
        else:
            answer = getattr(side, request)(argument)
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", choices=SIDES, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    serve(arguments.serve, arguments.folder)
