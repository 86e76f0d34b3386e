"""Parameters of the published JAX implementation of Euclidean Fast Attention, as flat ``name -> array`` dictionaries.

Names are those of the nested parameter dictionaries joined by "/" (``Dense_3/1-/kernel``); irreps are written as degree
and parity sign. Features there are ``[N, P, (L + 1)^2, F]``: P = 1 holds every degree once, with the parity of the
harmonics, P = 2 the even irreps and then the odd ones; the components of a degree run over m = l, -l, ..., 1, -1, 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from steradian.equivariant.couplings import to_cartesian_order
from steradian.equivariant.dense import Dense
from steradian.equivariant.irreps import Degrees, all_degrees, dim, natural_degrees, slices
from steradian.equivariant.paths import Paths

__all__ = ["dense_state", "features_from_reference", "features_to_reference", "path_kernel"]

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
