"""Frozen numbers of nequip 0.19.1: energies, forces and stresses of models with made-up weights.

Runs in an environment of its own with nequip, never in steradian's (see remake.sh):

    python make_nequip.py data             write the files
    python make_nequip.py data --check     make the numbers again and compare them with the files

Every configuration is one npz: ``hyperparameters`` (JSON, the builder's arguments), ``entries`` (JSON, names, shapes
and scales of the state dict, whose numbers are those of :func:`frozen.weight`), and per structure inputs and results.
All Wigner 3j symbols up to degree 3 stand in ``nequip_wigner_3j.npz``.
"""

# ruff: noqa: E402

from __future__ import annotations

import json
import warnings

warnings.filterwarnings("ignore")

import ase
import frozen
import numpy as np
import torch
from e3nn import o3
from nequip.data import AtomicDataDict, compute_neighborlist_, from_dict
from nequip.model import NequIPGNNModel
from nequip.utils.global_state import set_global_state

DEFAULTS = {
    "type_names": ["H", "C", "N", "O"],
    "r_max": 4.5,
    "num_layers": 3,
    "l_max": 1,
    "parity": True,
    "num_features": 6,
    "radial_mlp_depth": 2,
    "radial_mlp_width": 8,
    "num_bessels": 8,
    "polynomial_cutoff_p": 6,
    "avg_num_neighbors": 1.5,
    "per_type_energy_scales": 0.8125,
    "per_type_energy_shifts": {"H": -13.5, "C": -1029.25, "N": -1484.5, "O": -2042.0},
}
PER_TYPE = {"H": 0.5, "C": 1.25, "N": 0.75, "O": 1.5}
# name: changes to the defaults, structures
CONFIGURATIONS: dict[str, tuple[dict, list[str]]] = {
    "published": (
        {"r_max": 5.0, "avg_num_neighbors": 6.5, "num_features": 32, "radial_mlp_width": 64},
        ["molecule", "triclinic"],
    ),
    "natural_parity": ({"l_max": 2, "parity": False, "num_layers": 4}, ["molecule", "triclinic"]),
    "degree_two": ({"l_max": 2, "radial_mlp_depth": 1}, ["molecule", "slab"]),
    "degree_three": ({"l_max": 3, "num_features": 4}, ["molecule", "triclinic"]),
    "degree_three_natural": ({"l_max": 3, "num_features": 4, "parity": False}, ["molecule"]),
    "scalars_only": ({"l_max": 0, "num_layers": 2}, ["molecule", "isolated"]),
    "every_parity": ({"num_layers": 4, "num_features": 4, "avg_num_neighbors": 0.5}, ["molecule", "isolated"]),
    "one_layer": ({"num_layers": 1, "l_max": 2, "polynomial_cutoff_p": 4}, ["molecule", "slab"]),
    "embedding": (
        {"type_embed_num_features": 9, "num_bessels": 5, "bessel_trainable": True, "radial_mlp_depth": 3},
        ["molecule"],
    ),
    "deep_readout": (
        {"readout_mlp_hidden_layers_depth": 2, "readout_mlp_hidden_layers_width": 7, "radial_mlp_depth": 0},
        ["molecule"],
    ),
    "per_type": (
        {
            "type_names": ["O", "C", "H", "N"],
            "per_type_energy_scales": PER_TYPE,
            "per_type_energy_scales_trainable": True,
            "per_type_energy_shifts_trainable": True,
        },
        ["molecule", "slab", "isolated"],
    ),
    "unscaled": ({"per_type_energy_scales": None, "per_type_energy_shifts": None}, ["molecule"]),
}


def build(name: str) -> tuple[torch.nn.Module, dict]:
    """The model of one configuration and its arguments."""
    hyper = {**DEFAULTS, **CONFIGURATIONS[name][0]}
    model = NequIPGNNModel(seed=1, model_dtype="float64", **hyper)
    for key, value in model.state_dict().items():
        if is_weight(key) and value.numel():
            new = frozen.weight(name, key, tuple(value.shape))
            value.copy_(torch.as_tensor(value.numpy() + 0.05 * new if "bessel_weights" in key else new))
    return model.eval(), hyper


def is_weight(key: str) -> bool:
    """Whether an entry is made up: weights of the network, not scales and shifts, nor frequencies that do not learn."""
    return key.endswith("weight") or key.endswith("bessel_weights")


def evaluate(model: torch.nn.Module, hyper: dict, structure: dict) -> dict[str, np.ndarray]:
    """Energy, energies per atom, forces and, in a cell, the virial dE/d(strain) of one structure."""
    symbols = ase.Atoms(numbers=structure["numbers"]).get_chemical_symbols()
    data = {
        AtomicDataDict.POSITIONS_KEY: torch.tensor(structure["positions"]),
        AtomicDataDict.ATOM_TYPE_KEY: torch.tensor([hyper["type_names"].index(symbol) for symbol in symbols]),
        AtomicDataDict.PBC_KEY: torch.tensor(structure["pbc"]),
    }
    periodic = bool(structure["pbc"].any())
    if periodic:
        data[AtomicDataDict.CELL_KEY] = torch.tensor(structure["cell"])
    data = compute_neighborlist_(from_dict(data), r_max=hyper["r_max"])
    out = model(data)
    result = {
        "energy": out[AtomicDataDict.TOTAL_ENERGY_KEY].reshape(-1),
        "atom_energies": out[AtomicDataDict.PER_ATOM_ENERGY_KEY].reshape(-1),
        "forces": out[AtomicDataDict.FORCE_KEY],
    }
    if periodic:
        result["virial"] = -out[AtomicDataDict.VIRIAL_KEY].reshape(3, 3)
    result = {key: value.detach().numpy() for key, value in result.items()}
    return result | {"num_edges": np.array(data[AtomicDataDict.EDGE_INDEX_KEY].shape[1])}


def make() -> dict[str, dict[str, np.ndarray]]:
    """Content of every file."""
    frames = frozen.structures()
    files: dict[str, dict[str, np.ndarray]] = {}
    for name, (_, wanted) in CONFIGURATIONS.items():
        model, hyper = build(name)
        content = {"hyperparameters": np.array(json.dumps(hyper))}
        entries = {}
        for key, value in model.state_dict().items():
            if is_weight(key) and "bessel" not in key:
                entries[key] = [list(value.shape), 1.0]
            elif (value.numel() and "output_mask" not in key and "_w3j_" not in key) or "per_type" in key:
                content[f"weights/{key}"] = value.numpy()
        content["entries"] = np.array(json.dumps(entries))
        for frame in wanted:
            content |= {f"{frame}/{key}": value for key, value in frames[frame].items()}
            for key, value in evaluate(model, hyper, frames[frame]).items():
                content[f"{frame}/{key}"] = value
                print(f"{name:20} {frame} {key} {np.abs(value).max():.6g}")
        files[name] = content
    files["wigner_3j"] = {
        f"{a}_{b}_{c}": o3.wigner_3j(a, b, c).numpy()
        for a in range(1, 4) for b in range(1, 4) for c in range(max(1, abs(a - b)), min(a + b, 3) + 1)
    }  # fmt: skip
    return files


def main() -> None:
    set_global_state()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    frozen.write_or_check(__doc__, "nequip", make)


if __name__ == "__main__":
    main()
