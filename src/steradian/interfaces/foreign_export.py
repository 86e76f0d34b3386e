"""Write a model of mace-torch, nequip or torch_geometric (ViSNet) as plain arrays, for ``steradian convert``.

This file needs torch, numpy and the model's own package, not steradian: copy it into that package's environment
(``steradian convert --exporter`` writes it) and run

    python foreign_export.py MODEL OUT.npz

MODEL is a whole pickled module (mace-torch's ``.model``, a ``torch.save`` of a module), or a checkpoint or package of
nequip. **Unpickling runs code of the file: only give files that you trust.** Or call ``export(model, "out.npz")`` on a
model in memory. The file holds the state dict, the hyper-parameters and, as a self-test, energies and forces of two
structures in double precision.
"""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import numpy as np
import torch


def export(model: torch.nn.Module, path: str) -> str:
    """Write weights, hyper-parameters and self-test of a live model; returns the name of its package."""
    package = package_of(model)
    describe, evaluate = {
        "mace-torch": (_mace, _mace_run),
        "nequip": (_nequip, _nequip_run),
        "torch_geometric": (_pyg, _pyg_run),
    }[package]
    model = copy.deepcopy(model).cpu().eval()
    hyper, numbers = describe(model)
    weights = {key: value.detach().cpu().numpy() for key, value in model.state_dict().items()}
    content = {f"weights/{key}": value for key, value in weights.items()}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model = model.double()
        for index, structure in enumerate(_structures(numbers)):
            heads = hyper.get("heads") or [None]
            results = [evaluate(model, hyper, *structure, head) for head in heads]
            content[f"test/{index}/numbers"], content[f"test/{index}/positions"] = structure
            content[f"test/{index}/energy"] = np.array([energy for energy, _ in results])
            content[f"test/{index}/forces"] = np.array([forces for _, forces in results])
    finally:
        torch.set_default_dtype(default)
    content["about"] = np.array(json.dumps({"package": package, "hyperparameters": hyper}))
    np.savez_compressed(path, **content)
    return package


def package_of(model: torch.nn.Module) -> str:
    """``mace-torch``, ``nequip`` or ``torch_geometric``."""
    for part in model.modules():
        module = type(part).__module__
        for name, beginning in (("mace-torch", "mace.modules.blocks"), ("nequip", "nequip.nn.interaction_block"),
                                ("torch_geometric", "torch_geometric.nn.models.visnet")):  # fmt: skip
            if beginning in module:
                return name
    raise ValueError(f"{type(model).__name__} is no model of mace-torch, nequip or torch_geometric's ViSNet")


def _structures(numbers: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Two molecules without symmetry, of up to four of the elements: numbers and positions [Angstrom]."""
    known = [number for number in (1, 6, 7, 8) if number in numbers] or sorted(numbers)[:4]
    made = []
    for seed, count in ((11, 6), (12, 9)):
        random = np.random.RandomState(seed)
        sites = np.array([[i, j, k] for i in range(3) for j in range(3) for k in range(2)])
        chosen = sites[random.permutation(len(sites))[:count]]
        positions = 1.5 * chosen + random.uniform(-0.25, 0.25, (count, 3))
        made.append((np.array([known[index % len(known)] for index in range(count)]), np.round(positions, 6)))
    return made


# --------------------------------------------------------------------------------------------------------- mace-torch


def _mace(model: Any) -> tuple[dict[str, Any], list[int]]:
    if type(model).__name__ not in ("MACE", "ScaleShiftMACE"):
        raise ValueError(f"{type(model).__name__} cannot be exported; known: MACE, ScaleShiftMACE")
    if not hasattr(model.products[0].symmetric_contractions, "contractions"):
        raise ValueError("the model runs on cuequivariance; turn it back with mace-torch's convert_cueq_e3nn first")
    radial, last = model.radial_embedding, model.readouts[-1]
    heads = list(getattr(model, "heads", None) or ["Default"])
    transform = getattr(radial, "distance_transform", None)
    hidden = getattr(last, "hidden_irreps", None)
    gates = getattr(getattr(last, "non_linearity", None), "acts", None) or [None]
    gate = getattr(gates[0], "f", gates[0])
    first = model.interactions[0]
    widths = list(first.conv_tp_weights.hs) if hasattr(first.conv_tp_weights, "hs") else None
    hyper = {
        "model": type(model).__name__,
        "r_max": float(model.r_max),
        "num_bessel": int(radial.out_dim),
        "num_polynomial_cutoff": int(radial.cutoff_fn.p),
        "radial_type": type(radial.bessel_fn).__name__.removesuffix("Basis").lower().replace("chebychev", "chebyshev"),
        "radial_MLP": None if widths is None else [int(width) for width in widths[1:-1]],
        "distance_transform": "None" if transform is None else type(transform).__name__.removesuffix("Transform"),
        "pair_repulsion": hasattr(model, "pair_repulsion_fn"),
        "max_ell": int(model.spherical_harmonics._lmax),
        "interaction_cls": type(model.interactions[-1]).__name__,
        "interaction_cls_first": type(first).__name__,
        "num_interactions": len(model.interactions),
        "hidden_irreps": str(model.products[0].linear.irreps_out),
        "correlation": [len(each.symmetric_contractions.contractions[0].weights) + 1 for each in model.products],
        "readout_cls": type(last).__name__,
        "MLP_irreps": "1x0e" if hidden is None else f"{sum(mul for mul, _ in hidden) // len(heads)}x0e",
        "gate": "silu" if gate is None else getattr(gate, "__name__", str(gate)),
        "avg_num_neighbors": float(first.avg_num_neighbors),
        "heads": heads,
        "use_embedding_readout": hasattr(model, "embedding_readout"),
    }
    for name, usual in (("apply_cutoff", True), ("use_so3", False), ("use_edge_irreps_first", False)):
        hyper[name] = bool(getattr(model, name, usual))
    for name in ("edge_irreps", "embedding_specs"):
        hyper[name] = _plain(getattr(model, name, None))
    numbers = [int(number) for number in model.atomic_numbers]
    hyper |= {"atomic_numbers": numbers}
    return hyper, numbers


def _mace_run(model: Any, hyper: Any, numbers: Any, positions: Any, head: Any) -> tuple[float, np.ndarray]:
    from mace.data import AtomicData, Configuration
    from mace.tools import AtomicNumberTable, torch_geometric

    item = Configuration(
        atomic_numbers=numbers, positions=positions, properties={}, property_weights={}, pbc=(False,) * 3, head=head
    )
    table = AtomicNumberTable(hyper["atomic_numbers"])
    data = AtomicData.from_config(item, z_table=table, cutoff=hyper["r_max"], heads=hyper["heads"])
    batch = next(iter(torch_geometric.dataloader.DataLoader([data], batch_size=1)))
    out = model(batch.to_dict(), compute_force=True)
    return float(out["energy"]), out["forces"].detach().numpy()


# ------------------------------------------------------------------------------------------------------------- nequip


def _nequip(model: Any) -> tuple[dict[str, Any], list[int]]:
    import ase.data

    parts = dict(model.named_modules())
    (start,) = [name.removesuffix("type_embed") for name in parts if name.endswith("type_embed")]
    get = lambda name: parts[start + name]  # noqa: E731
    num_layers = sum(name.startswith(start + "layer") and name.endswith("_convnet") for name in parts)
    layers = [get(f"layer{index}_convnet") for index in range(num_layers)]
    bessel, readout = get("bessel_encode"), get("per_atom_energy_readout.mlp_module")
    scale_shift, norm = get("per_type_energy_scale_shift"), layers[0].conv.avg_num_neighbors_norm.norm_const
    l_max = max(int(irrep.l) for _, irrep in get("spharm").irreps_edge_sh)
    seen = [
        entry for layer in layers for entry in layer.conv.irreps_out["node_features"] if entry.ir.l or entry.ir.p < 0
    ]
    hidden = [entry for layer in layers for entry in layer.irreps_out["node_features"]]
    widths = {int(irrep.l): mul for mul, irrep in hidden}
    features = [widths.get(degree, widths[0]) for degree in range(l_max + 1)]
    activations = [type(part).__name__ for part in readout.modules()]
    names = [str(name) for name in scale_shift.type_names]
    neighbors = (norm.double().reshape(-1) ** -2).tolist()
    dims = layers[0].conv.edge_mlp.dims
    hyper = {
        "type_names": names,
        "r_max": float(get("edge_norm").r_max),
        "per_edge_type_cutoff": "given" if get("edge_norm")._per_edge_type else None,
        "pair_potential": "given" if start + "pair_potential" in parts else None,
        "num_layers": num_layers,
        "l_max": l_max,
        "parity": any(irrep.p != (-1) ** irrep.l for _, irrep in seen),
        "num_features": features[0] if len(set(features)) == 1 else features,
        "type_embed_num_features": get("type_embed").embed_module.embedding_dim,
        "categorical_graph_field_embed": "given" if get("type_embed").do_categorical_graph_field_embed else None,
        "radial_mlp_depth": len(dims) - 2,
        "radial_mlp_width": dims[1] if len(dims) > 2 else 1,
        "readout_mlp_hidden_layers_depth": len(readout.dims) - 2,
        "readout_mlp_hidden_layers_width": readout.dims[1] if len(readout.dims) > 2 else None,
        "readout_mlp_nonlinearity": "silu" if "SiLU" in activations or len(readout.dims) == 2 else str(activations),
        "num_bessels": bessel.num_bessels,
        "bessel_trainable": bool(bessel.trainable),
        "polynomial_cutoff_p": int(bessel.cutoff.p),
        "avg_num_neighbors": neighbors[0] if len(neighbors) == 1 else dict(zip(names, neighbors)),
        "per_type_energy_scales_trainable": bool(scale_shift.scales_trainable),
        "per_type_energy_shifts_trainable": bool(scale_shift.shifts_trainable),
        "convnet_resnet": any(layer.resnet for layer in layers),
        "convnet_sc": all(layer.conv.use_sc for layer in layers[1:]),
        "learnable_shift": bool(layers[0].conv.use_sc),
        "convnet_nonlinearity_type": type(layers[0].equivariant_nonlin).__name__.lower(),
    }
    return hyper, [ase.data.atomic_numbers[name] for name in names]


def _nequip_run(model: Any, hyper: Any, numbers: Any, positions: Any, head: Any) -> tuple[float, np.ndarray]:
    import ase
    from nequip.data import compute_neighborlist_, from_dict

    symbols = ase.Atoms(numbers=numbers).get_chemical_symbols()
    data = {
        "pos": torch.tensor(positions),
        "atom_types": torch.tensor([hyper["type_names"].index(symbol) for symbol in symbols]),
        "pbc": torch.zeros(3, dtype=torch.bool),
    }
    for part in model.modules():  # modules keep the precision that they were built for
        for name in ("_output_dtype", "model_dtype"):
            if hasattr(part, name):
                setattr(part, name, torch.float64)
    out = model(compute_neighborlist_(from_dict(data), r_max=hyper["r_max"]))
    return float(out["total_energy"]), out["forces"].detach().numpy()


# ---------------------------------------------------------------------------------------------------- torch_geometric


def _pyg(model: Any) -> tuple[dict[str, Any], list[int]]:
    block = model.representation_model
    names = (
        "lmax vecnorm_type trainable_vecnorm num_heads num_layers hidden_channels num_rbf trainable_rbf max_z cutoff"
    )
    hyper = {name: getattr(block, name) for name in names.split()}
    hyper |= {"vertex": type(block.vis_mp_layers[0]).__name__ == "ViS_MP_Vertex", "reduce_op": model.reduce_op}
    return hyper, list(range(1, block.max_z))


def _pyg_run(model: Any, hyper: Any, numbers: Any, positions: Any, head: Any) -> tuple[float, np.ndarray]:
    from torch_geometric.nn.models import visnet

    def all_neighbors(pos: Any, r: float, batch: Any, loop: bool = False, max_num_neighbors: int = 32) -> Any:
        near = torch.cdist(pos.detach(), pos.detach()) <= r
        near.fill_diagonal_(loop)
        return near.nonzero().T.flip(0)

    search = visnet.radius_graph  # the package's own search needs another one, and cuts off at 32 neighbours
    visnet.radius_graph = all_neighbors
    model.derivative = True
    try:
        energy, forces = model(
            torch.tensor(numbers), torch.tensor(positions), torch.zeros(len(numbers), dtype=torch.long)
        )
    finally:
        visnet.radius_graph = search
    return float(energy), forces.detach().numpy()


# ---------------------------------------------------------------------------------------------------------------- files


def _plain(value: Any) -> Any:
    """Plain data for JSON: classes by name, irreps as text, arrays as lists."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value.tolist()
    if type(value).__name__ == "Irreps":  # a tuple of its own
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return getattr(value, "__name__", str(value))


def load(path: str) -> torch.nn.Module:
    """Unpickle a model: this runs code of the file."""
    if path.endswith((".ckpt", ".nequip.zip")):
        from nequip.model.saved_models.checkpoint import ModelFromCheckpoint
        from nequip.model.saved_models.package import ModelFromPackage
        from nequip.utils.global_state import global_state_initialized, set_global_state

        if not global_state_initialized():
            set_global_state()
        model = ModelFromCheckpoint(path) if path.endswith(".ckpt") else ModelFromPackage(path)
        return model[next(iter(model))] if isinstance(model, torch.nn.ModuleDict) else model
    return torch.load(path, map_location="cpu", weights_only=False)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python foreign_export.py MODEL OUT.npz")
    print(f"{sys.argv[2]}: a model of {export(load(sys.argv[1]), sys.argv[2])}")
