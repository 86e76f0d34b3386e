"""The sides of ``cpu_hosts.py``: nequip, torch_geometric's ViSNet, and steradian."""

from __future__ import annotations

import argparse
import copy
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from sides import SIDES, Side, read_atoms, serve

sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))  # the exporter, in environments of the peers


def export(model: Any, folder: Path) -> None:
    from steradian.interfaces.foreign_export import export as write

    write(model, str(folder / "foreign.npz"))


class Nequip(Side):
    """nequip, eager, weights frozen for energy and forces."""

    mode = "eager"

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        import nequip
        import torch
        from nequip.data import AtomicDataDict, compute_neighborlist_, from_dict
        from nequip.model import NequIPGNNModel
        from nequip.utils.global_state import set_global_state

        set_global_state()
        torch.set_num_threads(case["threads"])
        names = ["H", "C", "N", "O"]
        self.model = NequIPGNNModel(
            seed=0,
            model_dtype="float32",
            compile_mode=self.mode,
            type_names=names,
            r_max=case["cutoff"],
            avg_num_neighbors=case["avg_num_neighbors"],
            per_type_energy_scales=1.0,
            per_type_energy_shifts=0.0,
            **case["model"],
        )
        if self.mode == "eager":
            export(self.model, self.folder)
        frames = []
        for atoms in read_atoms(self.folder):
            types = torch.tensor([names.index(symbol) for symbol in atoms.get_chemical_symbols()])
            data = {"pos": torch.tensor(atoms.positions), "atom_types": types, "pbc": torch.zeros(3, dtype=torch.bool)}
            frames.append(compute_neighborlist_(from_dict(data), r_max=case["cutoff"]))
        self.batch = AtomicDataDict.batched_from_list(frames)
        self.num_edges = self.batch["edge_index"].shape[1]
        return {"nequip": nequip.__version__, "torch": torch.__version__, "edges": self.num_edges}

    def call(self, training: bool, stress: bool = False) -> tuple[Any, Any]:
        out = self.model(dict(self.batch))
        return out["total_energy"].view(-1), out["forces"]


class NequipCompiled(Nequip):
    """nequip with ``compile_mode='compile'``; the first calls compile."""

    mode = "compile"


class Pyg(Side):
    """torch_geometric's ViSNet; its neighbour search, which needs an unpublished package, is replaced by all pairs."""

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        import torch
        import torch_geometric
        from torch_geometric.nn.models import visnet

        torch.set_num_threads(case["threads"])
        torch.manual_seed(0)
        self.model = visnet.ViSNet(cutoff=case["cutoff"], derivative=True, **case["model"])
        export(self.model, self.folder)
        frames = read_atoms(self.folder)
        self.numbers = torch.tensor(np.concatenate([atoms.numbers for atoms in frames]))
        positions = np.concatenate([atoms.positions for atoms in frames])
        self.positions = torch.tensor(positions, dtype=torch.float32)
        self.system = torch.arange(len(frames)).repeat_interleave(len(frames[0]))
        near = torch.cdist(self.positions, self.positions) <= case["cutoff"]
        pairs = (near & (self.system[:, None] == self.system)).nonzero().T.flip(0)  # an atom itself among them
        visnet.radius_graph = lambda *args, **kwargs: pairs
        self.num_edges = pairs.shape[1] - len(self.numbers)
        return {"torch_geometric": torch_geometric.__version__, "torch": torch.__version__, "edges": self.num_edges}

    def call(self, training: bool, stress: bool = False) -> tuple[Any, Any]:
        energy, forces = self.model(self.numbers, self.positions.clone(), self.system)
        return energy.view(-1), forces


class PygUnfrozen(Pyg):
    """As it comes: derivatives of the weights are prepared for, whether or not they are asked for."""

    def select(self, task: str) -> None:
        self.model.train(task == "training step")


class Converted(Side):
    """steradian with the peer's weights."""

    table = False

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        import torch

        from steradian.graph import batch_graphs
        from steradian.graph.neighbors import make_graph
        from steradian.interfaces.ase import _structure
        from steradian.interfaces.convert import convert_file

        torch.set_num_threads(case["threads"])
        elements = case["elements"] if case["peer"] == "torch_geometric" else None
        self.model = convert_file(self.folder / "foreign.npz", elements=elements)
        frames = read_atoms(self.folder)
        self.graph = batch_graphs([make_graph(_structure(atoms), case["cutoff"]) for atoms in frames])
        self.num_edges = self.graph.num_edges
        return {"torch": torch.__version__, "parameters": self.model.num_parameters, "edges": self.num_edges}

    def select(self, task: str) -> None:
        self.model = copy.deepcopy(self.model).train()
        if task != "training step":
            self.model.for_inference(radial_table=self.table)

    def call(self, training: bool, stress: bool = False) -> tuple[Any, Any]:
        prediction = self.model(self.graph, forces=True, stress=stress)
        return prediction.interaction_energy, prediction.forces


class ConvertedTable(Converted):
    table = True


SIDES |= {
    "nequip": Nequip,
    "nequip, compiled": NequipCompiled,
    "torch_geometric": Pyg,
    "torch_geometric, weights not frozen": PygUnfrozen,
    "steradian": Converted,
    "steradian, radial table": ConvertedTable,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", choices=SIDES, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 loads its constants with torch.load
    serve(arguments.serve, arguments.folder)
