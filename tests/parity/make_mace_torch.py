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

import argparse
import json
import os
import warnings
import zlib
from pathlib import Path

# e3nn 0.4.4 loads its own constants with a plain torch.load, which newer versions of torch refuse
os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
warnings.filterwarnings("ignore")

import numpy as np
import torch
from e3nn import o3
from mace import modules
from mace.data import AtomicData, Configuration
from mace.tools import AtomicNumberTable, torch_geometric

RESIDUAL = "RealAgnosticResidualInteractionBlock"
AGNOSTIC = "RealAgnosticInteractionBlock"
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
    "shared_contraction": (
        {"use_agnostic_product": True, "use_last_readout_only": True, "max_ell": 2, "correlation": 2},
        ["molecule"],
    ),
}  # fmt: skip


def structures() -> dict[str, dict]:
    """Frames without symmetry: positions [Å], numbers, cell [Å] (rows) and periodicity."""
    random = np.random.default_rng(20)

    def frame(numbers, box, cell=None, pbc=(False, False, False), closest=0.8):
        positions = np.zeros((0, 3))
        while len(positions) < len(numbers):
            trial = random.uniform(0, 1, 3) @ np.asarray(box, dtype=float)
            if all(np.linalg.norm(trial - other) > closest for other in positions):
                positions = np.vstack([positions, trial])
        # multiples of 2^-20 Å: short, and exact in every precision used here
        return {
            "positions": np.round(positions * 2**20) / 2**20,
            "numbers": np.array(numbers),
            "cell": np.zeros((3, 3)) if cell is None else np.array(cell, dtype=float),
            "pbc": np.array(pbc),
        }

    triclinic = [[5.5, 0.25, -0.5], [1.25, 5.0, 0.75], [-0.75, 1.5, 6.0]]
    slab = [[5.25, 0.5, 0.0], [-1.0, 5.75, 0.25], [0.5, -0.25, 12.0]]
    frames = {
        "molecule": frame([6, 1, 8, 7, 1, 6, 1, 1], np.diag([4.0, 3.5, 3.0])),
        "water": frame([8, 1, 1, 8, 1, 1], np.diag([3.5, 3.5, 3.0])),
        "triclinic": frame([7, 8, 1, 6, 1], triclinic, triclinic, (True, True, True), closest=1.5),
        "slab": frame([8, 1, 6, 1, 7], np.diag([4.5, 4.5, 3.0]), slab, (True, True, False), closest=1.2),
        "isolated": frame([7, 1, 6, 8], np.diag([3.0, 2.5, 2.0])),
    }
    frames["isolated"]["positions"][2] += 64.0  # an atom without neighbours
    return frames


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
    frames = structures()
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


def compare(made: dict[str, np.ndarray], frozen: dict[str, np.ndarray], name: str) -> float:
    """Largest difference, relative to the largest entry of each array.

    Raises:
        SystemExit: entries missing or different.
    """
    if set(made) != set(frozen):
        raise SystemExit(f"{name}: entries differ: {sorted(set(made) ^ set(frozen))}")
    worst = 0.0
    for key, value in made.items():
        if value.dtype.kind not in "fiub":
            if str(value) != str(frozen[key]):
                raise SystemExit(f"{name}: {key} differs")
            continue
        if value.shape != frozen[key].shape:
            raise SystemExit(f"{name}: {key} has shape {value.shape}, frozen is {frozen[key].shape}")
        new, old = value.astype(np.float64), frozen[key].astype(np.float64)
        worst = max(worst, float(np.abs(new - old).max(initial=0) / max(np.abs(old).max(initial=0), 1e-300)))
    if not worst < 1e-10:
        raise SystemExit(f"{name}: the numbers differ from the frozen ones by {worst:.2g} (relative)")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true", help="compare with the frozen files and write nothing")
    arguments = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    files = make(list(CONFIGURATIONS))
    for name, content in files.items():
        path = arguments.folder / f"mace_torch_{name}.npz"
        if arguments.check:
            with np.load(path) as frozen:
                worst = compare(content, dict(frozen), name)
            print(f"{path.name}: equal to the frozen numbers, worst relative difference {worst:.1e}")
        else:
            arguments.folder.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(path, **content)
            print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
