"""Frozen numbers of torch_geometric 2.8.1's ViSNet: energies and forces of models with made-up weights.

Runs in an environment of its own with torch_geometric, never in steradian's (see remake.sh):

    python make_pyg_visnet.py data             write the files
    python make_pyg_visnet.py data --check     make the numbers again and compare them with the files

Every configuration is one npz: ``hyperparameters`` (JSON, the constructor's arguments), ``entries`` (JSON, names,
shapes and scales of the state dict, whose numbers are those of :func:`frozen.weight`), and per structure inputs and
results. The neighbours come from here: torch_geometric's own search needs a package that is not published.
"""

from __future__ import annotations

import json
import math

import frozen
import numpy as np
import torch
from torch_geometric.nn.models import visnet

DEFAULTS = {"lmax": 2, "num_heads": 4, "num_layers": 4, "hidden_channels": 16, "num_rbf": 8, "cutoff": 4.5, "max_z": 20}
REFERENCES = {1: -13.5, 6: -1029.25, 7: -1484.5, 8: -2042.0}
# name: changes to the defaults, structures
CONFIGURATIONS: dict[str, tuple[dict, list[str]]] = {
    "published": (
        {"num_heads": 8, "num_layers": 5, "hidden_channels": 256, "num_rbf": 32, "cutoff": 5.0, "max_z": 100},
        ["molecule", "water"],
    ),
    "vertex": ({"vertex": True}, ["molecule", "isolated"]),
    "vectors": ({"lmax": 1}, ["molecule", "isolated"]),
    "vectors_vertex": ({"lmax": 1, "vertex": True}, ["molecule", "water"]),
    "rescaled": ({"vecnorm_type": "max_min", "trainable_vecnorm": True, "vertex": True}, ["molecule"]),
    "rescaled_vectors": ({"vecnorm_type": "max_min", "lmax": 1}, ["molecule", "isolated"]),
    "trainable": ({"trainable_rbf": True, "trainable_vecnorm": True, "num_heads": 1}, ["molecule"]),
    "one_layer": ({"num_layers": 1}, ["molecule"]),
    "two_layers": ({"num_layers": 2, "lmax": 1}, ["molecule"]),
    "references": ({"std": 1.75, "atomref": REFERENCES, "num_layers": 3}, ["molecule", "water"]),
}


def all_neighbors(
    pos: torch.Tensor, r: float, batch: torch.Tensor, loop: bool = False, max_num_neighbors: int = 32
) -> torch.Tensor:
    """``[2, E]`` neighbour and centre of every pair closer than r in one structure, an atom itself with ``loop``."""
    near = torch.cdist(pos.detach(), pos.detach()) <= r
    near.fill_diagonal_(loop)
    centre, neighbor = near.nonzero().T
    return torch.stack([neighbor, centre])


def build(name: str) -> tuple[torch.nn.Module, dict, dict]:
    """The model of one configuration, its arguments, and shape and scale of every made-up entry."""
    hyper = {**DEFAULTS, **CONFIGURATIONS[name][0]}
    arguments = dict(hyper)
    if "atomref" in hyper:
        arguments["atomref"] = torch.zeros(hyper["max_z"])
        for number, energy in hyper.pop("atomref").items():
            arguments["atomref"][number] = energy
    model = visnet.ViSNet(**arguments, derivative=True)
    entries = {}
    for key, value in model.state_dict().items():
        scale = scale_of(key, value, hyper)
        if scale:
            entries[key] = [list(value.shape), scale]
            value.copy_(torch.as_tensor(frozen.weight(name, key, tuple(value.shape), scale)))
    if hyper.get("trainable_rbf"):
        for part in ("means", "betas"):
            value = model.state_dict()[f"representation_model.distance_expansion.{part}"]
            value.mul_(torch.as_tensor(1 + frozen.weight(name, part, tuple(value.shape), 1 / 16)))
    return model.eval(), hyper, entries


def scale_of(key: str, value: torch.Tensor, hyper: dict) -> float:
    """Size of the made-up numbers of one entry, a power of two; zero for what is left as it is."""
    if "atomref" in key or not key.endswith(("weight", "bias")):
        return 0.0
    if "vec_layernorm" in key or "vec_out_norm" in key:
        return 1.0 if hyper.get("trainable_vecnorm") else 0.0
    if key.endswith("bias"):
        return 0.25
    if value.ndim == 1 or "embedding.weight" in key:
        return 1.0
    # vectors enter products: without this the numbers of five layers overflow
    vectors = any(part in key for part in ("s_proj", "vec_proj", "src_proj", "trg_proj"))
    damped = 0.25 if vectors else 1.0
    return damped * 2.0 ** round(-0.5 * math.log2(value.shape[1]))


def evaluate(model: torch.nn.Module, structure: dict) -> dict[str, np.ndarray]:
    """Energy, energies per atom and forces of one structure."""
    numbers = torch.tensor(structure["numbers"])
    positions = torch.tensor(structure["positions"])
    batch = torch.zeros_like(numbers)
    energy, forces = model(numbers, positions, batch)
    scalars, vectors = model.representation_model(numbers, positions, batch)
    atoms = model.prior_model(model.output_model.pre_reduce(scalars, vectors) * model.std, numbers)
    edges = all_neighbors(positions, model.representation_model.cutoff, batch).shape[1]
    results = {"energy": energy.reshape(-1), "atom_energies": atoms.reshape(-1), "forces": forces}
    return {key: value.detach().numpy() for key, value in results.items()} | {"num_edges": np.array(edges)}


def make() -> dict[str, dict[str, np.ndarray]]:
    """Content of every file."""
    frames = frozen.structures()
    files: dict[str, dict[str, np.ndarray]] = {}
    for name, (_, wanted) in CONFIGURATIONS.items():
        model, hyper, entries = build(name)
        content = {"hyperparameters": np.array(json.dumps(hyper)), "entries": np.array(json.dumps(entries))}
        for key, value in model.state_dict().items():
            if key not in entries:
                content[f"weights/{key}"] = value.numpy()
        for frame in wanted:
            content |= {f"{frame}/{key}": value for key, value in frames[frame].items()}
            for key, value in evaluate(model, frames[frame]).items():
                content[f"{frame}/{key}"] = value
                print(f"{name:20} {frame} {key} {np.abs(value).max():.6g}")
        files[name] = content
    return files


def main() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    visnet.radius_graph = all_neighbors
    frozen.write_or_check(__doc__, "pyg_visnet", make)


if __name__ == "__main__":
    main()
