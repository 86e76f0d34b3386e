"""Weights of torch_geometric's ViSNet become weights of :class:`steradian.hosts.visnet.ViSNet`, number for number.

Needs arrays and plain data only, not torch_geometric (2.8.1). Weights that cannot have an effect there are left out
here: those that act on the vectors of the first layer, which are zero, and on the vectors that nothing reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steradian.config import ExpNormalConfig, ModelConfig, ViSNetConfig
from steradian.data.statistics import DatasetStatistics
from steradian.interfaces.foreign import ForeignArrays, ForeignModelError

__all__ = ["config_and_weights_from_pyg_visnet"]

# entries that have no effect: of the first layer, of the last block, and the start of the atoms' reference energies
DEAD = re.compile(
    r"(vis_mp_layers\.0\.(vec_layernorm|vec_proj|f_proj|[wt]_(src|trg)_proj)\.\w+|output_network\.1\.vec2_proj\.weight"
    r"|prior_model\.initial_atomref)$"
)


def config_and_weights_from_pyg_visnet(
    state_dict: Mapping[str, np.ndarray], hyperparameters: Mapping[str, Any], elements: Sequence[int] | None = None
) -> tuple[ModelConfig, DatasetStatistics, dict[str, Tensor]]:
    """Configuration, statistics and the host's state dict of a ``ViSNet`` of torch_geometric.

    ``build_potential(config, statistics).host.load_state_dict(weights)`` then gives the same energies. Neighbours
    are all atoms within the cutoff here; a limit of ``max_num_neighbors`` there is not part of the model.

    Args:
        state_dict: all entries by name.
        hyperparameters: the constructor's arguments as plain data. Those left out have torch_geometric's default.
        elements: atomic numbers to keep; None for all that the embedding has.

    Raises:
        ForeignModelError: something without counterpart here, or an entry that is missing or does not fit.
    """
    if hyperparameters.get("reduce_op", "sum") != "sum":
        raise ForeignModelError(f"reduce_op={hyperparameters['reduce_op']} has no counterpart here; only sum")
    arrays = ForeignArrays(state_dict, "torch_geometric ViSNet")
    if float(arrays["mean"]) != 0.0:
        raise ForeignModelError(
            f"mean={float(arrays['mean']):g} is added once per structure there, whatever its size; only mean=0"
        )
    config = _config(hyperparameters, state_dict)
    host = config.host
    assert isinstance(host, ViSNetConfig)
    max_z = int(hyperparameters.get("max_z", 100))
    numbers = np.array(sorted(range(1, min(max_z, 119)) if elements is None else elements))
    if not len(numbers) or numbers[0] < 1 or numbers[-1] >= max_z:
        raise ForeignModelError(f"elements must be between 1 and {max_z - 1}, the largest that the embedding has")
    references = arrays.shaped("prior_model.atomref.weight", max_z)[numbers]
    scale = float(arrays["std"])
    statistics = DatasetStatistics(
        elements=tuple(int(number) for number in numbers),
        atom_references={int(number): float(energy) for number, energy in zip(numbers, references)},
        avg_num_neighbors=1.0,
        energy_shift=0.0,
        force_rms=scale,
        reference_report="from a ViSNet of torch_geometric",
    )
    weights = _host_weights(arrays, host, max_z, numbers)
    weights |= {"scale": np.array(scale), "shift": np.array(0.0)}
    arrays.check_nothing_left(DEAD)
    return config, statistics, {name: torch.tensor(value, dtype=torch.float64) for name, value in weights.items()}


def _config(hyper: Mapping[str, Any], state: Mapping[str, np.ndarray]) -> ModelConfig:
    norm = hyper.get("vecnorm_type")
    if norm not in (None, "max_min"):
        raise ForeignModelError(f"vecnorm_type={norm} cannot be converted; known: None, max_min")
    try:
        floating = np.asarray(state["representation_model.embedding.weight"]).dtype
    except KeyError:
        raise ForeignModelError(
            "'representation_model.embedding.weight' is missing: is this the whole state dict of a ViSNet?"
        ) from None
    return ModelConfig(
        host=ViSNetConfig(
            num_layers=int(hyper.get("num_layers", 6)),
            num_channels=int(hyper.get("hidden_channels", 128)),
            l_max=int(hyper.get("lmax", 1)),
            num_heads=int(hyper.get("num_heads", 8)),
            cutoff_A=float(hyper.get("cutoff", 5.0)),
            radial=ExpNormalConfig(
                num=int(hyper.get("num_rbf", 32)), trainable=bool(hyper.get("trainable_rbf", False))
            ),
            vertex=bool(hyper.get("vertex", False)),
            vector_norm=norm,
            trainable_vector_norm=bool(hyper.get("trainable_vecnorm", False)),
            smooth=False,
            message_scale=1.0,
        ),
        precision="float32" if floating == np.float32 else "float64",
    )


# ---------------------------------------------------------------------------------------------------------- weights


def _host_weights(arrays: ForeignArrays, host: ViSNetConfig, max_z: int, numbers: np.ndarray) -> dict[str, np.ndarray]:
    channels, num_radial = host.num_channels, host.radial.num
    theirs = "representation_model"
    weights = {
        "embedding": arrays.shaped(f"{theirs}.embedding.weight", max_z, channels)[numbers],
        "neighbor_embedding": arrays.shaped(f"{theirs}.neighbor_embedding.embedding.weight", max_z, channels)[numbers],
        "radial_basis.means": arrays.shaped(f"{theirs}.distance_expansion.means", num_radial),
        "radial_basis.betas": arrays.shaped(f"{theirs}.distance_expansion.betas", num_radial),
    }
    for name, source, size_in in (
        ("neighbor_filter", "neighbor_embedding.distance_proj", num_radial),
        ("combine", "neighbor_embedding.combine", 2 * channels),
        ("edge_filter", "edge_embedding.edge_proj", num_radial),
    ):
        weights |= _linear(arrays, name, [f"{theirs}.{source}"], size_in, [channels])
    for index in range(host.num_layers):
        weights |= _layer(arrays, host, index)
    weights |= _norm(arrays, "norm", f"{theirs}.out_norm", channels)
    weights |= _vector_norm(arrays, "vector_norm", f"{theirs}.vec_out_norm", host)
    return weights | _readout(arrays, channels)


def _layer(arrays: ForeignArrays, host: ViSNetConfig, index: int) -> dict[str, np.ndarray]:
    """One layer; the first one has neither vectors nor an update of the edges, the last one no such update."""
    channels = host.num_channels
    theirs, ours = f"representation_model.vis_mp_layers.{index}", f"layers.{index}"
    first, last = index == 0, index == host.num_layers - 1
    updates_edges = not first and not last
    filters, filter_sizes = ["dk_proj", "dv_proj"], [channels, channels]
    vectors, vector_sizes = ["vec_proj"], [3 * channels]
    if updates_edges:
        filters.append("f_proj")
        filter_sizes.append(channels * (2 if host.vertex else 1))
        ends = ["w_trg_proj", "w_src_proj"] + (["t_trg_proj", "t_src_proj"] if host.vertex else [])
        vectors += ends
        vector_sizes += [channels] * len(ends)
    weights = _norm(arrays, f"{ours}.norm", f"{theirs}.layernorm", channels)
    for name, sources, sizes, bias in (
        ("query_key_value", ["q_proj", "k_proj", "v_proj"], [channels] * 3, True),
        ("filters", filters, filter_sizes, True),
        ("vector_weights", ["s_proj"], [2 * channels], True),
        ("update", ["o_proj"], [3 * channels], True),
        *([] if first else [("vectors", vectors, vector_sizes, False)]),
    ):
        places = [f"{theirs}.{source}" for source in sources]
        made = _linear(arrays, f"{ours}.{name}", places, channels, sizes, bias)
        if first and name in ("vector_weights", "update"):  # what is left acts on no vectors
            made = {key: value[-channels:] for key, value in made.items()}
        weights |= made
    if not first:
        weights |= _vector_norm(arrays, f"{ours}.vector_norm", f"{theirs}.vec_layernorm", host)
    return weights


def _readout(arrays: ForeignArrays, channels: int) -> dict[str, np.ndarray]:
    half = channels // 2
    first, last = (f"output_model.output_network.{index}" for index in (0, 1))
    vectors = [f"{first}.vec1_proj", f"{first}.vec2_proj"]
    weights = _linear(arrays, "readout.vectors", vectors, channels, [channels, half], bias=False)
    weights |= _linear(arrays, "readout.hidden", [f"{first}.update_net.0"], 2 * channels, [channels])
    weights |= _linear(arrays, "readout.out", [f"{first}.update_net.2"], channels, [2 * half])
    weights |= _linear(arrays, "readout.last_vectors", [f"{last}.vec1_proj"], half, [half], bias=False)
    weights |= _linear(arrays, "readout.last_hidden", [f"{last}.update_net.0"], 2 * half, [half])
    out = _linear(arrays, "readout.last_out", [f"{last}.update_net.2"], half, [2])
    return weights | {key: value[:1] for key, value in out.items()}  # the second one scales vectors that nothing reads


def _linear(
    arrays: ForeignArrays, ours: str, theirs: list[str], size_in: int, sizes_out: list[int], bias: bool = True
) -> dict[str, np.ndarray]:
    """Several maps of the same input, one below the other."""
    blocks = [arrays.shaped(f"{name}.weight", size, size_in) for name, size in zip(theirs, sizes_out)]
    weights = {f"{ours}.weight": np.concatenate(blocks)}
    if bias:
        parts = [arrays.shaped(f"{name}.bias", size) for name, size in zip(theirs, sizes_out)]
        weights[f"{ours}.bias"] = np.concatenate(parts)
    return weights


def _norm(arrays: ForeignArrays, ours: str, theirs: str, channels: int) -> dict[str, np.ndarray]:
    return {f"{ours}.{part}": arrays.shaped(f"{theirs}.{part}", channels) for part in ("weight", "bias")}


def _vector_norm(arrays: ForeignArrays, ours: str, theirs: str, host: ViSNetConfig) -> dict[str, np.ndarray]:
    weight = arrays.shaped(f"{theirs}.weight", host.num_channels)
    if host.trainable_vector_norm:
        return {f"{ours}.weight": weight}
    if np.any(weight != 1.0):
        raise ForeignModelError(f"'{theirs}.weight' is not one; give trainable_vecnorm=True in the hyperparameters")
    return {}
