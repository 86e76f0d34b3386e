"""Weights of a nequip model become weights of :class:`steradian.hosts.nequip.NequIP`, number for number.

Needs arrays and plain data only, neither nequip nor e3nn. Edges point the same way on both sides. What differs from
nequip (0.19.1 with e3nn 0.6) is the order of the coupling paths in the last layer of the radial networks, and the signs
of the Clebsch-Gordan coefficients, which are read off the Wigner 3j symbols that the state dict holds.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ase.data import atomic_numbers
from torch import Tensor

from steradian.config import ModelConfig, NequIPConfig, RadialConfig
from steradian.data.statistics import DatasetStatistics
from steradian.equivariant.irreps import Degrees
from steradian.equivariant.tensor_product import channelwise_polynomial
from steradian.hosts.nequip import EVEN_SCALAR, layer_degrees
from steradian.interfaces.foreign import ForeignArrays, ForeignModelError, coupling_signs

__all__ = ["config_and_weights_from_nequip"]

# arguments that change the model and have no counterpart here, with the values that leave it as it is
ABSENT: dict[str, tuple[Any, ...]] = {
    "per_edge_type_cutoff": (None,),
    "pair_potential": (None,),
    "categorical_graph_field_embed": (None, []),
    "convnet_sc": (True,),
    "convnet_resnet": (False,),
    "learnable_shift": (False,),
    "convnet_nonlinearity_type": ("gate",),
    "convnet_nonlinearity_scalars": ({"e": "silu", "o": "tanh"},),
    "convnet_nonlinearity_gates": ({"e": "silu", "o": "tanh"},),
}
# entries of a state dict that hold nothing, or are marks of the implementation
IGNORED = re.compile(r"(output_mask|_w3j_\d+_\d+_\d+|_empty|_rmax_recip|metadata|_tensor_constant\d+)$")


def config_and_weights_from_nequip(
    state_dict: Mapping[str, np.ndarray], hyperparameters: Mapping[str, Any]
) -> tuple[ModelConfig, DatasetStatistics, dict[str, Tensor]]:
    """Configuration, statistics and the host's state dict of a ``NequIPGNNModel`` of nequip.

    ``build_potential(config, statistics).host.load_state_dict(weights)`` then gives the same energies.

    Args:
        state_dict: all entries by name, buffers included (``_w3j``); a prefix before ``type_embed`` does not matter.
        hyperparameters: the builder's arguments as plain data, among them ``type_names`` (element symbols), ``r_max``
            and ``avg_num_neighbors``. Those left out have nequip's default.

    Raises:
        ForeignModelError: something without counterpart here, or an entry that is missing or does not fit.
    """
    state = _without_prefix(state_dict)
    config = _config(hyperparameters, state)
    host = config.host
    assert isinstance(host, NequIPConfig)
    arrays = ForeignArrays(state, "nequip")
    stored = 1.0 / float(arrays["edge_norm._rmax_recip"])
    if abs(stored - host.cutoff_A) > 1e-6 * host.cutoff_A:
        raise ForeignModelError(f"'r_max' is {stored:g} in the state dict and {host.cutoff_A:g} in the hyperparameters")
    numbers = _numbers(hyperparameters["type_names"])
    order = np.argsort(numbers)  # elements are sorted here
    scales = _per_type(arrays, "scales", 1.0, len(numbers))
    shifts = _per_type(arrays, "shifts", 0.0, len(numbers))
    learned = shifts if host.trainable_shifts else np.zeros_like(shifts)
    references = shifts - learned  # energies of isolated atoms keep all their digits in a float32 model
    statistics = DatasetStatistics(
        elements=tuple(int(number) for number in numbers[order]),
        atom_references={int(number): float(energy) for number, energy in zip(numbers, references)},
        avg_num_neighbors=float(host.avg_num_neighbors or 1.0),
        energy_shift=0.0,
        force_rms=float(np.abs(scales).mean()),
        reference_report="from a nequip model",
    )
    weights = _host_weights(arrays, host, order)
    weights |= {"scale": scales[order], "shift": learned[order]}
    arrays.check_nothing_left(IGNORED)
    return config, statistics, {name: torch.tensor(value, dtype=torch.float64) for name, value in weights.items()}


# ---------------------------------------------------------------------------------------------------- configuration


def _without_prefix(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names from the modules of the energy model on: checkpoints and wrappers put more before them."""
    mark = "type_embed.embed_module.weight"
    found = [name.removesuffix(mark) for name in state if name.endswith(mark)]
    if len(found) != 1:
        raise ForeignModelError(f"'{mark}' is missing: is this the whole state dict of a nequip model?")
    return {name.removeprefix(found[0]): value for name, value in state.items()}


def _config(hyper: Mapping[str, Any], state: Mapping[str, np.ndarray]) -> ModelConfig:
    for key, harmless in ABSENT.items():
        value = hyper.get(key, harmless[0])
        if value not in harmless:
            raise ForeignModelError(f"{key}={value} has no counterpart here; only {key}={harmless[0]} can be converted")
    missing = [key for key in ("type_names", "r_max", "avg_num_neighbors") if hyper.get(key) is None]
    if missing:
        raise ForeignModelError(f"hyperparameters lack {', '.join(missing)}; the state dict does not hold them")
    neighbors = hyper["avg_num_neighbors"]
    if isinstance(neighbors, Mapping):
        if len(set(neighbors.values())) > 1:
            raise ForeignModelError("avg_num_neighbors by type has no counterpart here; only one number for all types")
        neighbors = next(iter(neighbors.values()))
    channels = hyper.get("num_features", 32)
    widths = {channels} if isinstance(channels, int) else set(channels)
    if len(widths) > 1:
        raise ForeignModelError(
            f"num_features={list(channels)} cannot be converted: all irreps have the same number of features here"
        )
    depth, activation = (
        int(hyper.get("readout_mlp_hidden_layers_depth", 0)),
        hyper.get("readout_mlp_nonlinearity", "silu"),
    )
    if depth and activation != "silu":
        raise ForeignModelError(f"readout_mlp_nonlinearity={activation} cannot be converted; known: silu")
    width = int(next(iter(widths)))
    floating = np.asarray(state["type_embed.embed_module.weight"]).dtype
    return ModelConfig(
        host=NequIPConfig(
            num_layers=int(hyper.get("num_layers", 4)),
            num_channels=width,
            l_max=int(hyper.get("l_max", 1)),
            parity=bool(hyper.get("parity", True)),
            cutoff_A=float(hyper["r_max"]),
            radial=RadialConfig(
                num=int(hyper.get("num_bessels", 8)),
                envelope_p=int(hyper.get("polynomial_cutoff_p", 6)),
                trainable=bool(hyper.get("bessel_trainable", False)),
            ),
            radial_mlp=[int(hyper.get("radial_mlp_width", 128))] * int(hyper.get("radial_mlp_depth", 1)),
            embedding_dim=hyper.get("type_embed_num_features"),
            readout_mlp=[int(hyper.get("readout_mlp_hidden_layers_width") or width)] * depth,
            avg_num_neighbors=float(neighbors),
            message_scale="root",
            trainable_scales=bool(hyper.get("per_type_energy_scales_trainable", False)),
            trainable_shifts=bool(hyper.get("per_type_energy_shifts_trainable", False)),
        ),
        precision="float32" if floating == np.float32 else "float64",
    )


def _numbers(type_names: list[str]) -> np.ndarray:
    unknown = [name for name in type_names if name not in atomic_numbers]
    if unknown:
        raise ForeignModelError(f"type_names must be element symbols here, not {', '.join(unknown)}")
    return np.array([atomic_numbers[name] for name in type_names])


def _per_type(arrays: ForeignArrays, name: str, default: float, num_types: int) -> np.ndarray:
    value = arrays[f"per_type_energy_scale_shift.{name}"].astype(np.float64).reshape(-1)
    if not value.size:
        return np.full(num_types, default)
    return np.broadcast_to(value, num_types).copy()


# ---------------------------------------------------------------------------------------------------------- weights


def _host_weights(arrays: ForeignArrays, host: NequIPConfig, order: np.ndarray) -> dict[str, np.ndarray]:
    """Our names and layouts. Maps of irreps are ``[channel in, channel out]`` blocks on both sides."""
    channels, num_elements = host.num_channels, len(order)
    embedding_dim = host.embedding_dim or channels
    bessel = arrays.shaped("bessel_encode.bessel_weights", host.radial.num)
    weights = {
        "embedding": arrays.shaped("type_embed.embed_module.weight", num_elements, embedding_dim)[order],
        "radial_basis.positions": bessel * np.pi / host.cutoff_A,
    }
    for index, (degrees_in, degrees_out) in enumerate(layer_degrees(host)):
        theirs, ours = f"layer{index}_convnet.conv", f"layers.{index}"
        channels_in = channels if index else embedding_dim
        weights[f"{ours}.linear_up.weight"] = arrays.shaped(
            f"{theirs}.linear_1.weight", len(degrees_in), channels_in, channels_in
        )
        widths = {irrep: channels for irrep in degrees_out}
        widths[EVEN_SCALAR] += channels * sum(degree > 0 for degree, _ in degrees_out)
        weights |= _convolution(arrays, theirs, ours, degrees_in, channels_in, widths, host)
        if index:
            kept = [irrep for irrep in degrees_in if irrep in widths]
            shapes = [(channels_in, embedding_dim, widths[irrep]) for irrep in kept]
            weights |= _blocks(arrays, f"{theirs}.sc.weight", f"{ours}.skip.weights", shapes)
    for layer, shape in enumerate(itertools.pairwise([channels, *host.readout_mlp, 1])):
        weights[f"readout.weights.{layer}"] = arrays.shaped(
            f"per_atom_energy_readout.mlp_module.mlp.{2 * layer}.weight", *shape
        )
    return weights


def _convolution(
    arrays: ForeignArrays,
    theirs: str,
    ours: str,
    degrees_in: Degrees,
    channels: int,
    widths: Mapping[tuple[int, int], int],
    host: NequIPConfig,
) -> dict[str, np.ndarray]:
    """Radial network (paths put in our order, with their signs) and the linear map after the convolution.

    Paths come by output irrep, input irrep and degree of the harmonics here; there by input irrep, degree of the
    harmonics and degree of the output. The linear map sees them in the same order on both sides.
    """
    polynomial, table = channelwise_polynomial(degrees_in, host.l_max, tuple(sorted(widths)))
    signs = coupling_signs(arrays.state, theirs, polynomial, degrees_in, table.paths, table.degrees_out)
    there = sorted(
        range(len(table.paths)),
        key=lambda path: (*table.paths[path][:2], table.degrees_out[table.paths[path][2]]),
    )
    place = np.argsort(there)  # where our path stands there
    shapes = list(itertools.pairwise([host.radial.num, *host.radial_mlp, len(place) * channels]))
    weights = {}
    for layer, shape in enumerate(shapes):
        value = arrays.shaped(f"{theirs}.edge_mlp.mlp.{2 * layer}.weight", *shape)
        if layer == len(shapes) - 1:
            value = (value.reshape(shape[0], len(place), channels)[:, place] * signs[:, None]).reshape(shape)
        weights[f"{ours}.radial_network.weights.{layer}"] = value
    rows = [(count * channels, widths[irrep]) for irrep, count in zip(table.degrees_out, table.counts)]
    return weights | _blocks(arrays, f"{theirs}.linear_2.weight", f"{ours}.linear_message.weights", rows)


def _blocks(arrays: ForeignArrays, theirs: str, ours: str, shapes: Sequence[tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Cut a flat list of weights into blocks, one per irrep."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    flat = arrays.shaped(theirs, sum(sizes))
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    return {f"{ours}.{number}": part.reshape(shape) for number, (part, shape) in enumerate(zip(parts, shapes))}
