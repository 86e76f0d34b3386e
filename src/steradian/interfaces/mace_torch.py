"""Weights of a mace-torch model become weights of :class:`steradian.hosts.mace.MACE`, number for number.

Needs arrays and plain data only, neither mace-torch nor e3nn. Three things differ from mace-torch (0.3.16 with e3nn
0.4.4), and each step is exact and checks that it is:

* edge vectors run the other way there, so harmonics of odd degree change sign;
* Clebsch-Gordan coefficients differ by a sign per path: read off the Wigner 3j symbols that the state dict holds;
* the symmetric contraction has a redundant basis there: its weights are projected on the independent couplings.

The first two go into the last layer of the radial networks; features then agree component by component.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steradian.config import MACEConfig, ModelConfig, RadialConfig, ReadoutConfig
from steradian.data.statistics import DatasetStatistics
from steradian.equivariant.irreps import Degrees, natural_degrees, slices
from steradian.equivariant.symmetric_contraction import contraction_polynomial
from steradian.equivariant.tensor_product import channelwise_polynomial
from steradian.interfaces.foreign import ForeignArrays, ForeignModelError, coupling_signs
from steradian.polynomials import Polynomial

__all__ = ["ForeignModelError", "config_and_weights_from_mace_torch"]

BLOCKS = {
    "RealAgnosticResidualInteractionBlock": "residual",
    "RealAgnosticInteractionBlock": "agnostic",
    "RealAgnosticDensityResidualInteractionBlock": "density_residual",
    "RealAgnosticDensityInteractionBlock": "density",
}
TRANSFORMS = {"None": None, "Agnesi": "agnesi", "Soft": "soft"}
TRANSFORM = "radial_embedding.distance_transform"
# constructor arguments that change the model and have no counterpart here, with the value that leaves it as it is
ABSENT = {
    "apply_cutoff": True,
    "use_so3": False,
    "edge_irreps": None,
    "use_edge_irreps_first": False,
    "embedding_specs": None,
    "use_embedding_readout": False,
    "keep_last_layer_irreps": False,
}
# entries of a state dict that repeat the hyper-parameters, hold nothing, or are marks of the implementation
IGNORED = re.compile(
    r"(output_mask|_zeroed|num_interactions|prefactor|_w3j_\d+_\d+_\d+|conv_tp\.weight|linear\w*\.bias|bessel_fn\.n"
    r"|bessel_fn\.r_max|cutoff_fn\.r_max)$"
)
EXACT = 1e-10
"""Largest residual that counts as rounding, relative to the largest entry of the table (float64)."""


def config_and_weights_from_mace_torch(
    state_dict: Mapping[str, np.ndarray], hyperparameters: Mapping[str, Any], head: str | None = None
) -> tuple[ModelConfig, DatasetStatistics, dict[str, Tensor]]:
    """Configuration, statistics and the host's state dict of a ``MACE`` or ``ScaleShiftMACE`` of mace-torch.

    ``build_potential(config, statistics).host.load_state_dict(weights)`` then gives the same energies.

    Args:
        state_dict: all entries by name, buffers included (``U_matrix``, ``_w3j``).
        hyperparameters: the model's constructor arguments as plain data (classes and irreps as strings), among them
            ``avg_num_neighbors`` and the names of the interaction blocks, which the state dict does not hold.
        head: which of several heads to take; may be left out where there is one.

    Raises:
        ForeignModelError: something without counterpart here, an entry that is missing or does not fit, or a
            projection that leaves more than rounding.
    """
    config = _config(hyperparameters, state_dict)
    assert isinstance(config.host, MACEConfig)
    arrays = ForeignArrays(state_dict, "mace-torch")
    _check_radial_settings(arrays, config.host)
    index, num_heads = _head(hyperparameters, head)
    numbers = arrays["atomic_numbers"].astype(int).reshape(-1)
    order = np.argsort(numbers)  # elements are sorted here
    energies = arrays["atomic_energies_fn.atomic_energies"].reshape(num_heads, len(numbers))[index]
    scale = arrays.get("scale_shift.scale", np.array(1.0)).reshape(-1)
    shift = arrays.get("scale_shift.shift", np.array(0.0)).reshape(-1)
    scale, shift = (values[index if len(values) > 1 else 0] for values in (scale, shift))
    statistics = DatasetStatistics(
        elements=tuple(int(number) for number in numbers[order]),
        atom_references={int(number): float(energy) for number, energy in zip(numbers, energies)},
        avg_num_neighbors=float(hyperparameters["avg_num_neighbors"]),
        energy_shift=float(shift),
        force_rms=float(scale),
        reference_report="from a mace-torch model" + (f", head {head}" if head else ""),
    )
    weights = _host_weights(arrays, config.host, order, index, num_heads)
    weights |= {"scale": np.array(scale), "shift": np.array(shift)}
    arrays.check_nothing_left(IGNORED)
    return config, statistics, {name: torch.tensor(value, dtype=torch.float64) for name, value in weights.items()}


# ---------------------------------------------------------------------------------------------------- configuration


def _config(hyper: Mapping[str, Any], state: Mapping[str, np.ndarray]) -> ModelConfig:
    for key, harmless in ABSENT.items():
        value = hyper.get(key, harmless)
        if value not in (harmless, None):
            raise ForeignModelError(f"{key}={value} has no counterpart here; only {key}={harmless} can be converted")
    missing = [key for key in ("avg_num_neighbors", "interaction_cls", "interaction_cls_first") if key not in hyper]
    if missing:
        raise ForeignModelError(f"hyperparameters lack {', '.join(missing)}; the state dict does not hold them")
    num_layers = int(hyper["num_interactions"])
    channels, hidden_l = _hidden(str(hyper["hidden_irreps"]))
    floating = np.asarray(state["r_max"]).dtype if "r_max" in state else np.dtype(np.float64)
    return ModelConfig(
        host=MACEConfig(
            num_layers=num_layers,
            num_channels=channels,
            hidden_l=hidden_l if num_layers > 1 else 0,
            l_max=int(hyper["max_ell"]),
            correlation=hyper["correlation"],
            cutoff_A=float(hyper["r_max"]),
            radial=RadialConfig(
                kind=hyper.get("radial_type", "bessel"),
                num=int(hyper["num_bessel"]),
                envelope_p=int(hyper["num_polynomial_cutoff"]),
            ),
            radial_mlp=list(hyper.get("radial_MLP") or [64, 64, 64]),
            first_interaction=_block(hyper["interaction_cls_first"]),
            interaction=_block(hyper["interaction_cls"]),
            distance_transform=_transform(hyper.get("distance_transform")),
            pair_repulsion="zbl" if hyper.get("pair_repulsion") else None,
            # a model of one layer has only the linear readout there
            readout=ReadoutConfig(mlp=_readout_width(hyper) if num_layers > 1 else None),
            avg_num_neighbors=float(hyper["avg_num_neighbors"]),
            message_scale="mean",
        ),
        precision="float32" if floating == np.float32 else "float64",
    )


def _block(name: Any) -> Any:
    found = re.findall(r"\w*InteractionBlock", str(name))
    if not found or found[-1] not in BLOCKS:
        raise ForeignModelError(f"interaction block {name} cannot be converted; known: {', '.join(BLOCKS)}")
    return BLOCKS[found[-1]]


def _transform(name: Any) -> Any:
    if str(name) not in TRANSFORMS:
        raise ForeignModelError(f"distance_transform {name} cannot be converted; known: {', '.join(TRANSFORMS)}")
    return TRANSFORMS[str(name)]


def _hidden(irreps: str) -> tuple[int, int]:
    """Channels and highest degree of ``128x0e + 128x1o``."""
    entries = [re.fullmatch(r"(\d+)x(\d+)([eo])", entry.strip()) for entry in irreps.split("+")]
    parsed = [(int(entry[1]), int(entry[2]), entry[3]) for entry in entries if entry]
    expected = [(parsed[0][0], degree, "eo"[degree % 2]) for degree in range(len(entries))] if parsed else []
    if not parsed or parsed != expected:
        raise ForeignModelError(
            f"hidden_irreps '{irreps}' cannot be converted; known: 0e + 1o + 2e ... in order with equal channels"
        )
    return parsed[0][0], len(parsed) - 1


def _readout_width(hyper: Mapping[str, Any]) -> int:
    block = str(hyper.get("readout_cls", "NonLinearReadoutBlock"))
    if not re.search(r"\bNonLinearReadoutBlock\b", block):
        raise ForeignModelError(f"readout_cls={block} cannot be converted; known: NonLinearReadoutBlock")
    match = re.fullmatch(r"(\d+)x0e", str(hyper["MLP_irreps"]).strip())
    if not match:
        raise ForeignModelError(f"MLP_irreps '{hyper['MLP_irreps']}' cannot be converted; known: scalars such as 16x0e")
    if not re.search(r"\bsilu\b", str(hyper["gate"]), re.IGNORECASE):
        raise ForeignModelError(f"gate {hyper['gate']} cannot be converted; known: silu")
    return int(match[1])


def _head(hyper: Mapping[str, Any], head: str | None) -> tuple[int, int]:
    heads = list(hyper.get("heads") or ["Default"])
    if head is None and len(heads) > 1:
        raise ForeignModelError(f"the model has several heads, choose one: {', '.join(heads)}")
    if head is not None and head not in heads:
        raise ForeignModelError(f"the model has no head '{head}'; it has {', '.join(heads)}")
    return (0 if head is None else heads.index(head)), len(heads)


def _check_radial_settings(arrays: ForeignArrays, host: MACEConfig) -> None:
    """The state dict repeats two settings; they must be the given ones."""
    for name, given in (("r_max", host.cutoff_A), ("radial_embedding.cutoff_fn.p", host.radial.envelope_p)):
        stored = float(arrays[name])
        if abs(stored - given) > 1e-6 * given:
            raise ForeignModelError(f"'{name}' is {stored:g} in the state dict and {given:g} in the hyperparameters")


# ---------------------------------------------------------------------------------------------------------- weights


def _host_weights(
    arrays: ForeignArrays, host: MACEConfig, order: np.ndarray, head: int, num_heads: int
) -> dict[str, np.ndarray]:
    """Our names and layouts. Channels of irreps are ``[channel in, channel out]`` blocks on both sides."""
    channels, num_elements = host.num_channels, len(order)
    hidden, scalars, messages = natural_degrees(host.hidden_l), natural_degrees(0), natural_degrees(host.l_max)
    weights = {
        "embedding": arrays.shaped("node_embedding.linear.weight", num_elements, channels)[order],
        "radial_basis.positions": _radial_positions(arrays, host.radial),
    }
    weights |= _pair_constants(arrays, host, order)
    for index in range(host.num_layers):
        first, last = index == 0, index == host.num_layers - 1
        degrees_in = scalars if first else hidden
        degrees_out = scalars if last else hidden
        block = host.first_interaction if first else host.interaction
        residual = block.endswith("residual")
        skipped = degrees_out[: min(len(degrees_in), len(degrees_out))] if residual else messages
        theirs, product, ours = f"interactions.{index}", f"products.{index}", f"layers.{index}"
        skip = arrays.shaped(f"{theirs}.skip_tp.weight", len(skipped), channels, num_elements, channels)
        contraction = _contraction(
            arrays, f"{product}.symmetric_contractions", messages, degrees_out, host.correlations[index]
        )
        if contraction.shape[0] == 1:  # one set of weights for all elements (use_agnostic_product)
            contraction = np.repeat(contraction, num_elements, axis=0)
        weights |= {
            f"{ours}.linear_up.weight": arrays.shaped(
                f"{theirs}.linear_up.weight", len(degrees_in), channels, channels
            ),
            f"{ours}.skip.weight": skip.transpose(2, 0, 1, 3)[order],
            f"{ours}.contraction.weight": contraction[order],
            f"{ours}.linear_out.weight": arrays.shaped(
                f"{product}.linear.weight", len(degrees_out), channels, channels
            ),
        }
        weights |= _convolution(arrays, theirs, ours, degrees_in, host)
        if block.startswith("density"):
            weights[f"{ours}.density"] = arrays.shaped(f"{theirs}.density_fn.layer0.weight", host.radial.num, 1)
        weights |= _readout(arrays, index, host, head, num_heads)
    return weights


def _pair_constants(arrays: ForeignArrays, host: MACEConfig, order: np.ndarray) -> dict[str, np.ndarray]:
    """Radii and constants of what depends on the elements of two neighbours."""
    numbers = arrays["atomic_numbers"].astype(int).reshape(-1)[order]
    weights = {}
    if host.distance_transform is not None:
        for name in ("a", "q", "p") if host.distance_transform == "agnesi" else ("alpha",):
            weights[f"distance_transform.{name}"] = arrays[f"{TRANSFORM}.{name}"].reshape(())
        weights["distance_transform.radii"] = arrays[f"{TRANSFORM}.covalent_radii"][numbers]
    if host.pair_repulsion is not None:
        theirs = "pair_repulsion_fn"
        if int(arrays[f"{theirs}.p"]) != host.radial.envelope_p:
            raise ForeignModelError("the repulsion ends with another polynomial than the radial basis")
        weights |= {
            "repulsion.radii": arrays[f"{theirs}.covalent_radii"][numbers],
            "repulsion.numbers": numbers.astype(np.float64),
            "repulsion.coefficients": arrays.shaped(f"{theirs}.c", 4),
            "repulsion.exponent": arrays[f"{theirs}.a_exp"].reshape(()),
            "repulsion.prefactor": arrays[f"{theirs}.a_prefactor"].reshape(()),
        }
    return weights


def _radial_positions(arrays: ForeignArrays, radial: RadialConfig) -> np.ndarray:
    if radial.kind == "chebyshev":
        return np.arange(1.0, radial.num + 1)
    return arrays.shaped(f"radial_embedding.bessel_fn.{radial.kind}_weights", radial.num)


def _convolution(
    arrays: ForeignArrays, theirs: str, ours: str, degrees_in: Degrees, host: MACEConfig
) -> dict[str, np.ndarray]:
    """Radial network (with the sign of every path) and the linear map after the convolution.

    Paths stand in the same order on both sides: by output irrep, input irrep, degree of the harmonics.
    """
    channels = host.num_channels
    polynomial, table = channelwise_polynomial(degrees_in, host.l_max, natural_degrees(host.l_max))
    signs = path_signs(arrays.state, theirs, polynomial, degrees_in, table.paths, table.degrees_out)
    widths = [host.radial.num, *host.radial_mlp, len(table.paths) * channels]
    weights = {}
    for layer, shape in enumerate(itertools.pairwise(widths)):
        value = arrays.shaped(f"{theirs}.conv_tp_weights.layer{layer}.weight", *shape)
        if layer == len(host.radial_mlp):
            value = value * np.repeat(signs, channels)
        weights[f"{ours}.radial_network.weights.{layer}"] = value
    blocks = arrays.shaped(f"{theirs}.linear.weight", len(table.paths), channels, channels)
    start = 0
    for number, count in enumerate(table.counts):
        weights[f"{ours}.linear_message.weights.{number}"] = blocks[start : start + count].reshape(-1, channels)
        start += count
    return weights


def path_signs(
    state: Mapping[str, np.ndarray],
    prefix: str,
    polynomial: Polynomial,
    degrees_in: Degrees,
    paths: Sequence[tuple[int, int, int]],
    degrees_out: Degrees,
) -> np.ndarray:
    """``[P]`` sign of every path: of its coupling there against the one here, and of the reversed edge.

    See :func:`steradian.interfaces.foreign.coupling_signs`.
    """
    signs = coupling_signs(state, prefix, polynomial, degrees_in, paths, degrees_out)
    return signs * np.array([(-1.0) ** degree_y for _, degree_y, _ in paths])


def _readout(arrays: ForeignArrays, index: int, host: MACEConfig, head: int, num_heads: int) -> dict[str, np.ndarray]:
    """Weights of one head. A hidden layer holds the heads one after the other and is scaled by their number."""
    channels, width = host.num_channels, host.readout.mlp
    last = index == host.num_layers - 1
    ours = f"readouts.{index}.weights"
    if last and width is not None:
        only = "readouts.0.linear_1.weight" in arrays.state  # use_last_readout_only
        theirs = f"readouts.{0 if only else index}"
        hidden = arrays.shaped(f"{theirs}.linear_1.weight", channels, num_heads, width)[:, head]
        outer = arrays.shaped(f"{theirs}.linear_2.weight", num_heads, width, num_heads)[head, :, head]
        return {f"{ours}.0": hidden, f"{ours}.1": outer.reshape(width, 1) * num_heads**-0.5}
    if "readouts.0.linear_1.weight" in arrays.state:
        return {f"{ours}.0": np.zeros((channels, 1))}
    linear = arrays.shaped(f"readouts.{index}.linear.weight", channels, num_heads)
    return {f"{ours}.0": linear[:, head : head + 1]}


# ---------------------------------------------------------------------------------------------- symmetric contraction


def _contraction(
    arrays: ForeignArrays, prefix: str, degrees_in: Degrees, degrees_out: Degrees, correlation: int
) -> np.ndarray:
    """``[Z, P, C]`` weights on the independent couplings that give the same polynomial as the redundant ones."""
    polynomial = contraction_polynomial(degrees_in, degrees_out, correlation)
    result: np.ndarray | None = None
    for number, block in enumerate(slices(degrees_out)):
        base = f"{prefix}.contractions.{number}"
        for order in range(1, correlation + 1):
            name = "weights_max" if order == correlation else f"weights.{correlation - 1 - order}"
            weight = arrays[f"{base}.{name}"].astype(np.float64)  # [Z, paths, C]
            if result is None:
                result = np.zeros((weight.shape[0], polynomial.inputs[0].dim, weight.shape[2]))
            table = arrays[f"{base}.U_matrix_{order}"]
            rows, projection = project_couplings(polynomial, table, order, block)
            result[:, rows] += np.einsum("qp,zpc->zqc", projection, weight)
    assert result is not None  # correlation is at least 1
    return result


def project_couplings(
    polynomial: Polynomial, table: np.ndarray, order: int, block: slice
) -> tuple[np.ndarray, np.ndarray]:
    """Published couplings of one order and output irrep as combinations of ours.

    Args:
        polynomial: of the contraction.
        table: ``[components, D, ..., D, paths]`` (the first axis is missing for scalars), ``order`` axes D.
        order: number of factors.
        block: components of the output irrep in the polynomial's output.

    Returns:
        Indices of our weights ``[P']``, and ``[P', paths]`` coefficients.

    Raises:
        ForeignModelError: the combination is not exact.
    """
    tolerance = EXACT if table.dtype == np.float64 else 1e-5
    dim, components = polynomial.inputs[1].dim, block.stop - block.start
    if table.size != components * dim**order * table.shape[-1]:
        raise ForeignModelError(f"U_matrix_{order} of shape {list(table.shape)} does not fit the hyperparameters")
    published = table.astype(np.float64).reshape(components, *(dim,) * order, -1)
    places = np.argwhere(np.abs(published).max(axis=-1) > 0)
    entries = published[tuple(places.T)]  # [T, paths]
    keys = [_monomials(places[:, 0], places[:, 1:], dim)]
    groups = [group for group in polynomial.terms if len(group.factors) == order + 1]
    for group in groups:
        inside = (group.outputs >= block.start) & (group.outputs < block.stop)
        keys.append(_monomials(group.outputs[inside] - block.start, group.indices[inside, 1:], dim))
    unique, place = np.unique(np.concatenate(keys), return_inverse=True)
    theirs = np.zeros((len(unique), published.shape[-1]))
    np.add.at(theirs, place[: len(places)], entries)
    if not groups or not len(keys[1]):
        if np.abs(theirs).max(initial=0.0) > tolerance:
            raise ForeignModelError(f"couplings of order {order} that have no counterpart here")
        return np.zeros(0, dtype=int), np.zeros((0, published.shape[-1]))
    (group,) = groups
    inside = (group.outputs >= block.start) & (group.outputs < block.stop)
    rows, column = np.unique(group.indices[inside, 0], return_inverse=True)
    own = np.zeros((len(unique), len(rows)))
    np.add.at(own, (place[len(places) :], column), group.coefficients[inside])
    projection, *_ = np.linalg.lstsq(own, theirs, rcond=None)
    residual = np.abs(own @ projection - theirs).max() / max(np.abs(theirs).max(), 1.0)
    if residual > tolerance:
        raise ForeignModelError(
            f"the couplings of order {order} are not combinations of ours (residual {residual:.1e})"
        )
    return rows, projection


def _monomials(components: np.ndarray, indices: np.ndarray, dim: int) -> np.ndarray:
    """One number for every component and unordered product of factors."""
    key = components.astype(np.int64)
    for column in np.sort(indices, axis=1).T:
        key = key * dim + column
    return key
