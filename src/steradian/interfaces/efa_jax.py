"""Parameters of the published JAX implementation of Euclidean Fast Attention, as flat ``name -> array`` dictionaries.

Names are those of the nested parameter dictionaries joined by "/" (``Dense_3/1-/kernel``); irreps are written as degree
and parity sign. Features there are ``[N, P, (L + 1)^2, F]``: P = 1 holds every degree once, with the parity of the
harmonics, P = 2 the even irreps and then the odd ones; the components of a degree run over m = l, -l, ..., 1, -1, 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steradian.build import build_potential
from steradian.config import EFAConfig, ModelConfig, O3MPNNConfig
from steradian.config.operators import TensorIntegrationConfig
from steradian.data.statistics import DatasetStatistics
from steradian.equivariant.harmonics import to_cartesian_order
from steradian.equivariant.irreps import Degrees, all_degrees, dim, natural_degrees, slices
from steradian.equivariant.linear import MLP, Dense
from steradian.equivariant.paths import Paths
from steradian.equivariant.sphere import LEBEDEV_DEGREES
from steradian.hosts.o3mpnn import O3MPNN, O3Layer
from steradian.operators.efa.operator import EFAMixer, EuclideanFastAttention
from steradian.potential import Potential

__all__ = [
    "attention_config",
    "attention_state",
    "dense_state",
    "features_from_reference",
    "features_to_reference",
    "lebedev_points",
    "model_config",
    "model_state",
    "path_kernel",
    "potential_from_reference",
]

Arrays = Mapping[str, np.ndarray]


def _sign(parity: int) -> str:
    return "+" if parity == 1 else "-"


def dense_state(arrays: Arrays, prefix: str, layer: Dense) -> dict[str, Tensor]:
    """``weight`` and ``bias`` of a dense layer; matrices of irreps the layer never sees are left behind."""
    kernels = [arrays[f"{prefix}/{degree}{_sign(parity)}/kernel"] for degree, parity in layer.degrees]
    state = {"weight": torch.from_numpy(np.stack(kernels))}
    if layer.bias is not None:
        state["bias"] = torch.from_numpy(np.array(arrays[f"{prefix}/0+/bias"]))
    return state


def path_kernel(kernel: np.ndarray, paths: Paths) -> Tensor:
    """``[P, F]`` from ``[P1, L1+1, P2, L2+1, P3, L3+1, F]``; entries of forbidden paths are left behind."""
    rows = []
    for i1, i2, i3 in paths.entries:
        index: list[int] = []
        for axis, (degree, parity) in zip((0, 2, 4), (paths.first[i1], paths.second[i2], paths.out[i3])):
            index += [_slot(kernel.shape[axis], parity), degree]
        rows.append(kernel[tuple(index)])
    return torch.from_numpy(np.stack(rows))


def _slot(num_slots: int, parity: int) -> int:
    return 0 if num_slots == 1 or parity == 1 else 1


def features_from_reference(array: np.ndarray) -> tuple[Tensor, Degrees]:
    """``[..., P, (L + 1)^2, F] -> [..., D, F]`` in this package's basis, and the irreps."""
    num_slots, components = array.shape[-3], array.shape[-2]
    l_max = round(components**0.5) - 1
    degrees = natural_degrees(l_max) if num_slots == 1 else all_degrees(l_max)
    blocks = []
    for degree, parity in degrees:
        block = array[..., _slot(num_slots, parity), degree**2 : (degree + 1) ** 2, :]
        blocks.append(np.einsum("xm,...mf->...xf", to_cartesian_order(degree), block))
    return torch.from_numpy(np.concatenate(blocks, axis=-2)), degrees


def features_to_reference(features: Tensor, degrees: Degrees, num_slots: int, l_max: int) -> np.ndarray:
    """``[..., D, F] -> [..., P, (L + 1)^2, F]``; irreps that are not listed are zero."""
    values = features.detach().numpy()
    assert values.shape[-2] == dim(degrees)
    out = np.zeros((*values.shape[:-2], num_slots, (l_max + 1) ** 2, values.shape[-1]), dtype=values.dtype)
    for (degree, parity), part in zip(degrees, slices(degrees)):
        block = np.einsum("xm,...xf->...mf", to_cartesian_order(degree), values[..., part, :])
        out[..., _slot(num_slots, parity), degree**2 : (degree + 1) ** 2, :] = block
    return out


def attention_config(hyper: Mapping[str, Any]) -> EFAConfig:
    """The options of the stand-alone module ``EuclideanFastAttention``."""
    integration = None
    if hyper.get("tensor_integration"):
        integration = TensorIntegrationConfig(
            max_degree_sph=hyper.get("ti_max_degree_sph"),
            max_degree=hyper.get("ti_max_degree"),
            include_pseudotensors=hyper.get("ti_include_pseudotensors"),
            learned_paths=bool(hyper.get("ti_parametrize_coupling_paths")),
            degree_scaling=hyper.get("ti_degree_scaling_constants"),
        )
    return EFAConfig(
        num_points=lebedev_points(hyper["lebedev_num"]),
        max_frequency=hyper["epe_max_frequency"],
        max_length_A=hyper["epe_max_length"],
        trainable_frequencies=bool(hyper.get("epe_frequencies_trainable")),
        parametrized=hyper.get("parametrized", True),
        num_features_qk=hyper.get("num_features_qk"),
        num_features_v=hyper.get("num_features_v"),
        max_degree_qk=hyper.get("max_degree_qk"),
        max_degree_v=hyper.get("max_degree_v"),
        include_pseudotensors_qk=hyper.get("include_pseudotensors_qk"),
        include_pseudotensors_v=hyper.get("include_pseudotensors_v"),
        activation=hyper.get("activation_fn", "identity"),
        tensor_integration=integration,
    )


def lebedev_points(asked: int) -> int:
    """The largest rule with at most so many points, as the reference chooses it."""
    return max(points for points in LEBEDEV_DEGREES if points <= asked)


def attention_state(arrays: Arrays, prefix: str, attention: EuclideanFastAttention) -> dict[str, Tensor]:
    """State of the attention from parameters below ``prefix`` (``""`` or ``EuclideanRopeAttention_0/``)."""
    state: dict[str, Tensor] = {}
    for number, name in enumerate(("query", "key", "value")):
        layer = getattr(attention, name)
        if layer is not None:
            found = dense_state(arrays, f"{prefix}Dense_{number}", layer)
            state |= {f"{name}.{key}": value for key, value in found.items()}
    if isinstance(attention.frequencies, torch.nn.Parameter):
        state["frequencies"] = torch.from_numpy(np.array(arrays[f"{prefix}frequencies"]))
    integration = attention.integration
    if integration is not None and integration.product.weights.kernel is not None:
        kernel = arrays[f"{prefix}TensorIntegration_0/kernel"]
        state["integration.product.weights.kernel"] = path_kernel(kernel, integration.product.paths)
    return state


# ------------------------------------------------------------------------------------------------- the energy model


def model_config(hyper: Mapping[str, Any]) -> ModelConfig:
    """Host and mixer of the energy model with these constructor arguments (defaults where they are missing)."""
    host = O3MPNNConfig(
        num_layers=hyper.get("num_iterations", 2),
        num_channels=hyper.get("num_features", 32),
        l_max=hyper.get("mp_max_degree", 2),
        num_radial=hyper.get("mp_num_basis_fn", 32),
        cutoff_A=hyper.get("cutoff", 5.0),
        num_post_residual_mlps=hyper.get("num_post_residual_mlps", 0),
        self_interaction=hyper.get("self_interaction", False),
        dipole_embedding=hyper.get("atomic_dipole_embedding", False),
        use_switch=hyper.get("use_switch", True),
        zero_init=hyper.get("output_is_zero_at_init", True),
        message_scale=1.0,
    )
    if hyper.get("era_use_in_iterations") is None:
        return ModelConfig(host=host)
    return ModelConfig(host=host, global_mixer=_mixer_config(hyper, host.zero_init))


def _mixer_config(hyper: Mapping[str, Any], zero_init: bool) -> EFAConfig:
    names = ["tensor_integration", "ti_max_degree_sph", "ti_max_degree", "ti_parametrize_coupling_paths"]
    names += ["ti_degree_scaling_constants", "lebedev_num"]
    inner = {name: hyper[f"era_{name}"] for name in names if f"era_{name}" in hyper}
    emulate = hyper.get("emulate_era_block", False)
    inner = {"lebedev_num": 6} | inner
    attention = attention_config(
        inner
        | {
            "epe_max_frequency": hyper.get("era_max_frequency") or 1.0,
            "epe_max_length": hyper.get("era_max_length") or 1.0,
            "num_features_qk": hyper.get("era_qk_num_features"),
            "num_features_v": hyper.get("era_v_num_features"),
            "activation_fn": hyper.get("era_activation_fn", "identity"),
        }
    )
    return attention.model_copy(
        update={
            "max_degree": hyper.get("era_max_degree"),
            "include_pseudotensors": hyper.get("era_include_pseudotensors", False),
            "emulate": emulate,
            "zero_init": zero_init,
            "layers": list(hyper["era_use_in_iterations"]),
        }
    )


def model_state(arrays: Arrays, host: O3MPNN, elements: Sequence[int]) -> dict[str, Tensor]:
    """State of a host from the parameters of the energy model; rows of other elements are left behind.

    Args:
        arrays: flat parameters.
        host: built from :func:`model_config`.
        elements: atomic numbers in the order of the host's table.

    Raises:
        KeyError: a parameter is missing.
    """
    rows = list(elements)
    state = {
        "embedding": torch.from_numpy(arrays["Embed_0/embedding"][rows, 0, 0]),
        "element_bias": torch.from_numpy(arrays["element_bias"][rows]),
        "scale": host.scale,
        "shift": host.shift,
    }
    number = itertools.count()

    def dense(name: str, layer: Dense) -> None:
        prefix = f"Dense_{next(number)}"
        state.update({f"{name}.{key}": value for key, value in dense_state(arrays, prefix, layer).items()})

    def plain(name: str) -> None:
        state[f"{name}.weight"] = torch.from_numpy(arrays[f"Dense_{next(number)}/kernel"][None])

    if host.dipole is not None:
        plain("dipole")
    for index, layer in enumerate(host.layers):
        assert isinstance(layer, O3Layer)
        name = f"layers.{index}"
        state |= _message_state(arrays, index, layer)
        dense(f"{name}.mlp.first", layer.mlp.first)
        dense(f"{name}.mlp.last", layer.mlp.last)
        mixer = layer.mixer
        if isinstance(mixer, EFAMixer):
            if isinstance(mixer.attention, Dense):
                dense(f"{name}.mixer.attention", mixer.attention)
            else:
                found = attention_state(arrays, f"EuclideanRopeAttention_{index}/", mixer.attention)
                state |= {f"{name}.mixer.attention.{key}": value for key, value in found.items()}
            dense(f"{name}.mixer.dense", mixer.dense)
            dense(f"{name}.mixer.mlp.first", mixer.mlp.first)
            dense(f"{name}.mixer.mlp.last", mixer.mlp.last)
        for place, mlp in enumerate(layer.post):
            assert isinstance(mlp, MLP)
            dense(f"{name}.post.{place}.first", mlp.first)
            dense(f"{name}.post.{place}.last", mlp.last)
    plain("readout")
    return state


def _message_state(arrays: Arrays, index: int, layer: O3Layer) -> dict[str, Tensor]:
    """Message passing, switch and self-coupling of a layer."""
    name, message = f"layers.{index}", layer.message
    filters = [
        arrays[f"MessagePass_{index}/filter/{degree}{_sign((-1) ** degree)}/kernel"]
        for degree in range(message.l_max + 1)
    ]
    state = {
        f"{name}.message.filter": torch.from_numpy(np.stack(filters)),
        f"{name}.message.weights.kernel": path_kernel(arrays[f"MessagePass_{index}/tensor/kernel"], message.paths),
    }
    if layer.switch is not None:
        state[f"{name}.switch"] = torch.from_numpy(arrays[f"c_switch_layer_{index}"])
    coupling = layer.coupling
    if coupling is not None:
        found = dense_state(arrays, f"TensorDense_{index}/dense", coupling.dense)
        state |= {f"{name}.coupling.dense.{key}": value for key, value in found.items()}
        kernel = arrays[f"TensorDense_{index}/tensor/kernel"]
        state[f"{name}.coupling.product.weights.kernel"] = path_kernel(kernel, coupling.product.paths)
    return state


def potential_from_reference(
    hyper: Mapping[str, Any],
    arrays: Arrays,
    atom_references: Mapping[int, float],
    dtype: torch.dtype = torch.float32,
) -> Potential:
    """The energy model of the reference as a potential.

    Args:
        hyper: constructor arguments.
        arrays: flat parameters.
        atom_references: for the elements to take over [eV]: what is added to the model's energy per atom.
        dtype: precision of the network.
    """
    elements = tuple(sorted(atom_references))
    statistics = DatasetStatistics(
        elements=elements,
        atom_references=dict(atom_references),
        avg_num_neighbors=1.0,
        energy_shift=0.0,
        force_rms=1.0,
        energy_std=1.0,
        num_frames=0,
        reference_report="imported with the model",
    )
    precision = {torch.float32: "float32", torch.float64: "float64"}[dtype]
    config = model_config(hyper).model_copy(update={"precision": precision})
    potential = build_potential(config, statistics, seed=0)
    assert isinstance(potential.host, O3MPNN)
    potential.host.load_state_dict(model_state(arrays, potential.host, elements))
    return potential.eval()
