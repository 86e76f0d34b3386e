"""Parameters of the published JAX implementation of Euclidean Fast Attention, as flat ``name -> array`` dictionaries.

Names are those of the nested parameter dictionaries joined by "/" (``Dense_3/1-/kernel``); irreps are written as degree
and parity sign. Features there are ``[N, P, (L + 1)^2, F]``: P = 1 holds every degree once, with the parity of the
harmonics, P = 2 the even irreps and then the odd ones; the components of a degree run over m = l, -l, ..., 1, -1, 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steradian.config_efa import EFAConfig, TensorIntegrationConfig
from steradian.equivariant.couplings import to_cartesian_order
from steradian.equivariant.dense import Dense
from steradian.equivariant.irreps import Degrees, all_degrees, dim, natural_degrees, slices
from steradian.equivariant.paths import Paths
from steradian.operators.efa import EuclideanFastAttention
from steradian.sphere.grids import LEBEDEV_DEGREES

__all__ = [
    "attention_config",
    "attention_state",
    "dense_state",
    "features_from_reference",
    "features_to_reference",
    "lebedev_points",
    "path_kernel",
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
    state = {}
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
