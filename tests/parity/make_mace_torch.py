"""Frozen numbers of mace-torch 0.3.16: energies, forces and stresses of small models with random weights.

Runs in an environment of its own with mace-torch, never in steradian's (see remake.sh):

    python make_mace_torch.py data             write the files
    python make_mace_torch.py data --check     make the numbers again and compare them with the files

Every configuration is one npz: ``hyperparameters`` (JSON, the constructor's arguments), ``weights/NAME`` (entries of
the state dict), and per structure inputs and results. Weights are multiples of 1/256: float16 holds them exactly.
The coupling matrices (``U_matrix_*``) of all models stand once, sparse, in ``mace_torch_couplings.npz``, and all Wigner
3j symbols up to degree 4 in ``mace_torch_wigner_3j.npz``.
"""

# ruff: noqa: E402

from __future__ import annotations

import json
import os
import warnings
import zlib

# e3nn 0.4.4 loads its own constants with a plain torch.load, which newer versions of torch refuse
os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
warnings.filterwarnings("ignore")

import frozen
import numpy as np
import torch
from e3nn import o3
from mace import modules
from mace.data import AtomicData, Configuration
from mace.tools import AtomicNumberTable, torch_geometric

RESIDUAL = "RealAgnosticResidualInteractionBlock"
AGNOSTIC = "RealAgnosticInteractionBlock"
DENSITY = "RealAgnosticDensityInteractionBlock"
DENSITY_RESIDUAL = "RealAgnosticDensityResidualInteractionBlock"
SMALL = [12, 8]
DEFAULTS = {
    "model": "ScaleShiftMACE",
    "r_max": 4.5,
    "num_bessel": 8,
    "num_polynomial_cutoff": 6,
    "max_ell": 3,
    "interaction_cls_first": RESIDUAL,
    "interaction_cls": RESIDUAL,
    "num_interactions": 2,
    "hidden_irreps": "4x0e + 4x1o",
    "MLP_irreps": "6x0e",
    "avg_num_neighbors": 7.25,
    "atomic_numbers": [1, 6, 7, 8],
    "atomic_energies": [-13.5, -1029.25, -1484.5, -2042.0],
    "correlation": 3,
    "gate": "silu",
    "radial_type": "bessel",
    "radial_MLP": SMALL,
    "atomic_inter_scale": 0.8125,
    "atomic_inter_shift": 0.15625,
}
PLAIN = {"model": "MACE", "atomic_inter_scale": None, "atomic_inter_shift": None}

# name: changes to the defaults, structures
CONFIGURATIONS: dict[str, tuple[dict, list[str]]] = {
    "published_block": (
        {"hidden_irreps": "6x0e + 6x1o", "radial_MLP": [64, 64, 64], "MLP_irreps": "16x0e", "num_polynomial_cutoff": 5},
        ["molecule", "isolated"],
    ),
    "scalars_only": ({"hidden_irreps": "8x0e"}, ["molecule", "triclinic"]),
    "degree_two": ({"hidden_irreps": "4x0e + 4x1o + 4x2e"}, ["molecule", "isolated"]),
    "foundation_style": ({"interaction_cls_first": AGNOSTIC}, ["triclinic", "molecule"]),
    "agnostic_both": (
        {"interaction_cls_first": AGNOSTIC, "interaction_cls": AGNOSTIC, "max_ell": 2, "correlation": 2},
        ["molecule", "slab"],
    ),
    "agnostic_later": ({"interaction_cls": AGNOSTIC, "max_ell": 2}, ["molecule"]),
    "three_layers": (
        {
            "num_interactions": 3,
            "hidden_irreps": "4x0e + 4x1o + 4x2e",
            "max_ell": 2,
            "correlation": [3, 2, 1],
            "interaction_cls_first": AGNOSTIC,
        },
        ["molecule", "triclinic"],
    ),
    "one_layer": ({"num_interactions": 1, **PLAIN}, ["molecule"]),
    "unscaled": ({**PLAIN, "max_ell": 1, "radial_MLP": [16], "avg_num_neighbors": 3.5}, ["molecule", "slab"]),
    "gaussian": ({"radial_type": "gaussian", "num_bessel": 10, "max_ell": 2}, ["molecule", "slab"]),
    "chebyshev": ({"radial_type": "chebyshev", "num_bessel": 4, "max_ell": 2, "correlation": 2}, ["molecule"]),
    "correlation_four": (
        {"correlation": 4, "max_ell": 2, "hidden_irreps": "4x0e + 4x1o", "atomic_numbers": [1, 8],
         "atomic_energies": [-13.5, -2042.0]},
        ["water"],
    ),
    "correlation_one": (
        {"correlation": 1, "max_ell": 4, "hidden_irreps": "4x0e + 4x1o + 4x2e", "num_polynomial_cutoff": 5, "r_max": 4},
        ["molecule"],
    ),
    "every_path": (
        {"correlation": 2, "max_ell": 4, "hidden_irreps": "4x0e + 4x1o + 4x2e + 4x3o", "radial_MLP": [8]},
        ["molecule"],
    ),
    "two_heads": (
        {
            "heads": ["pbe", "coupled_cluster"],
            "atomic_energies": [[-13.5, -1029.25, -1484.5, -2042.0], [-13.0, -1030.5, -1485.0, -2040.75]],
            "atomic_inter_scale": [0.8125, 1.25],
            "atomic_inter_shift": [0.15625, -0.5],
            "max_ell": 2,
            "correlation": 2,
        },
        ["molecule", "triclinic"],
    ),
    # the blocks, transform and repulsion of published foundation models
    "density": (
        {
            "interaction_cls_first": DENSITY,
            "interaction_cls": DENSITY_RESIDUAL,
            "distance_transform": "Agnesi",
            "pair_repulsion": True,
            "max_ell": 2,
            "correlation": 2,
        },
        ["molecule", "triclinic", "slab"],
    ),
    "density_first": (
        {"interaction_cls_first": DENSITY_RESIDUAL, "interaction_cls": DENSITY, "max_ell": 1, "pair_repulsion": True,
         "num_polynomial_cutoff": 5, **PLAIN},
        ["molecule"],
    ),
    "soft": ({"distance_transform": "Soft", "max_ell": 2, "correlation": 2}, ["molecule", "slab"]),
    "shared_contraction": (
        {"use_agnostic_product": True, "use_last_readout_only": True, "max_ell": 2, "correlation": 2},
        ["molecule"],
    ),
}  # fmt: skip


def build(name: str) -> tuple[torch.nn.Module, dict]:
    """The model of one configuration and its hyper-parameters as plain data."""
    hyper = {**DEFAULTS, **CONFIGURATIONS[name][0]}
    arguments = dict(hyper)
    kind = arguments.pop("model")
    if kind == "MACE":
        arguments.pop("atomic_inter_scale"), arguments.pop("atomic_inter_shift")
    arguments["interaction_cls"] = getattr(modules, hyper["interaction_cls"])
    arguments["interaction_cls_first"] = getattr(modules, hyper["interaction_cls_first"])
    arguments["hidden_irreps"] = o3.Irreps(hyper["hidden_irreps"])
    arguments["MLP_irreps"] = o3.Irreps(hyper["MLP_irreps"])
    arguments["gate"] = torch.nn.functional.silu
    arguments["atomic_energies"] = np.array(hyper["atomic_energies"])
    arguments["num_elements"] = len(hyper["atomic_numbers"])
    model = getattr(modules, kind)(**arguments)
    randomise(model, name)
    return model, {key: value for key, value in hyper.items() if value is not None}


def randomise(model: torch.nn.Module, name: str) -> None:
    """Every weight anew, and the radial basis's frequencies or centres moved; independent of torch's generators."""
    for key, value in model.state_dict().items():
        random = np.random.default_rng([zlib.crc32(name.encode()), zlib.crc32(key.encode())])
        normal = random.standard_normal(tuple(value.shape))
        if key.endswith(("bessel_weights", "gaussian_weights")):
            new = value.numpy() + 0.05 * normal
        elif value.is_floating_point() and ("weight" in key or "bias" in key):
            scale = 1.0
            if "symmetric_contractions" in key:
                scale = 2.0 / np.sqrt(value.shape[1])
            if "conv_tp_weights.layer0" in key and name == "chebyshev":
                scale = 2.0**-8  # these polynomials of the distance itself reach 10^3
            new = np.round(256 * scale * normal) / 256 if scale > 0.01 else np.round(256 * normal) / 256 * scale
        else:
            continue
        value.copy_(torch.as_tensor(new))


def evaluate(model: torch.nn.Module, hyper: dict, structure: dict, head: str) -> dict[str, np.ndarray]:
    """Energy, energies per atom, forces and virial dE/d(strain) of one structure."""
    periodic = bool(structure["pbc"].any())
    item = Configuration(
        atomic_numbers=structure["numbers"],
        positions=structure["positions"].copy(),
        properties={},
        property_weights={},
        cell=structure["cell"].copy() if periodic else None,
        pbc=tuple(bool(flag) for flag in structure["pbc"]),
        head=head,
    )
    heads = hyper.get("heads", ["Default"])
    data = AtomicData.from_config(
        item, z_table=AtomicNumberTable(hyper["atomic_numbers"]), cutoff=hyper["r_max"], heads=heads
    )
    batch = next(iter(torch_geometric.dataloader.DataLoader([data], batch_size=1))).to_dict()
    # torch takes its Chebyshev polynomials for constants, so forces of such a model are not those of its energy
    smooth = hyper["radial_type"] != "chebyshev"
    out = model(batch, compute_force=smooth, compute_virials=smooth, compute_stress=False)
    result = {"energy": out["energy"], "atom_energies": out["node_energy"]}
    if smooth:
        result |= {"forces": out["forces"], "virial": -out["virials"][0]}
    result = {key: value.detach().numpy() for key, value in result.items()}
    result["num_edges"] = np.array(data.edge_index.shape[1])
    return result


def sparse(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Shape, steps between places that are not zero, and values as numbers of a short list."""
    flat = matrix.reshape(-1)
    places = np.flatnonzero(np.abs(flat) > 1e-14)
    levels, code = np.unique(np.round(flat[places], 14), return_inverse=True)
    # the list keeps full digits: mean over the entries that agree to 14 places
    levels = np.bincount(code, flat[places], len(levels)) / np.bincount(code, minlength=len(levels))
    steps = np.diff(places, prepend=0).astype(np.uint32)
    kind = np.uint8 if len(levels) < 256 else np.uint16
    return {"shape": np.array(matrix.shape), "steps": steps, "levels": levels, "codes": code.astype(kind)}


def coupling_name(hyper: dict, key: str) -> str:
    """``l_max/correlation/degree/order`` of a U matrix: what it depends on."""
    _, layer, _, _, degree, order = key.split(".")
    correlation = hyper["correlation"]
    top = correlation if isinstance(correlation, int) else correlation[int(layer)]
    return f"{hyper['max_ell']}/{top}/{degree}/{order.removeprefix('U_matrix_')}"


def make(names: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """Content of every file."""
    frames = frozen.structures()
    couplings: dict[str, np.ndarray] = {}
    files: dict[str, dict[str, np.ndarray]] = {}
    for name in names:
        model, hyper = build(name)
        content = {"hyperparameters": np.array(json.dumps(hyper))}
        for key, value in model.state_dict().items():
            array = value.numpy()
            if "U_matrix" in key:
                for part, values in sparse(array).items():
                    couplings[f"{coupling_name(hyper, key)}/{part}"] = values
            elif array.size and "output_mask" not in key:
                half = array.astype(np.float16) if array.dtype == np.float64 else array
                content[f"weights/{key}"] = half if np.array_equal(half, array) else array
        for frame in CONFIGURATIONS[name][1]:
            for head in hyper.get("heads", ["Default"]):
                content |= {f"{frame}/{key}": value for key, value in frames[frame].items()}
                suffix = f"/{head}" if "heads" in hyper else ""
                for key, value in evaluate(model, hyper, frames[frame], head).items():
                    content[f"{frame}{suffix}/{key}"] = value
                    print(f"{name:20} {frame}{suffix} {key} {np.abs(value).max():.6g}")
        files[name] = content
    files["couplings"] = couplings
    files["wigner_3j"] = {
        f"{a}_{b}_{c}": o3.wigner_3j(a, b, c).numpy()
        for a in range(5) for b in range(5) for c in range(abs(a - b), min(a + b, 4) + 1) if (a + b + c) % 2 == 0
    }  # fmt: skip
    return files


def main() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    frozen.write_or_check(__doc__, "mace_torch", lambda: make(list(CONFIGURATIONS)))


if __name__ == "__main__":
    main()
