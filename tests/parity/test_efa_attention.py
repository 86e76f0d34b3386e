"""Rotary attention, tensor integration and the EFA module against frozen numbers of the published implementation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from steradian.equivariant.harmonics import to_cartesian_order
from steradian.equivariant.irreps import dim, has_pseudotensors, slices
from steradian.equivariant.linear import change_degrees
from steradian.equivariant.paths import CoupledProduct, coupled_degrees
from steradian.equivariant.sphere import SphereGrid
from steradian.interfaces.efa_jax import (
    attention_config,
    attention_state,
    features_from_reference,
    features_to_reference,
    path_kernel,
)
from steradian.operators.efa.attention import Waves, rotary_attention
from steradian.operators.efa.operator import EuclideanFastAttention, Systems, TensorIntegration, nominal_degrees
from steradian.operators.efa.paper import QKV, attention_per_direction, invariant_attention, tensor_integration
from steradian.operators.efa.rules import DirectionRule

RELATIVE = 1e-10  # the tolerance the reference numbers are good for in float64


def read(folder, name):
    with np.load(folder / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return json.loads(str(arrays.pop("hp"))), arrays


def assert_same(ours, theirs):
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= RELATIVE * max(1.0, np.abs(theirs).max())


def sizes_of(arrays):
    """Atoms of every system, as the reference sees it: one mask entry means one system."""
    segments, count = arrays["in/batch_segments"].astype(np.int64), len(arrays["in/graph_mask"])
    return (len(segments),) if count == 1 else tuple(np.bincount(segments, minlength=count).tolist())


def like_reference(array, degrees, theirs):
    return features_to_reference(array, degrees, theirs.shape[-3], round(theirs.shape[-2] ** 0.5) - 1)


@pytest.mark.parametrize("number", range(1, 8))
def test_rotary_attention(efa_fixtures, number):
    hyper, arrays = read(efa_fixtures, f"rope_{number:02d}")
    (q, degrees_qk), (k, _), (v, degrees_v) = (features_from_reference(arrays[f"in/{name}"]) for name in "qkv")
    nominal_qk = nominal_degrees(degrees_qk, hyper.get("max_degree_qk"), hyper.get("include_pseudotensors_qk"), "qk")
    nominal_v = nominal_degrees(degrees_v, hyper.get("max_degree_v"), hyper.get("include_pseudotensors_v"), "v")
    positions, theta = (torch.from_numpy(arrays[f"in/{name}"]) for name in ("pos", "theta"))
    inputs = [tensor.requires_grad_(True) for tensor in (q, k, v, positions, theta)]
    q_used, k_used = (change_degrees(x, degrees_qk, nominal_qk) for x in (q, k))
    scale = (q_used.shape[1] * q_used.shape[2]) ** -0.5
    atoms = QKV(q_used * scale, k_used, change_degrees(v, degrees_v, nominal_v), positions)
    points, weights = (torch.from_numpy(arrays[f"in/grid_{name}"]) for name in "uw")
    sizes = sizes_of(arrays)
    if hyper.get("do_integration", True):
        rule = DirectionRule.from_grid(SphereGrid(points, weights, 0, "lebedev", "fixture"))
        assert 2 * len(rule.weights) == len(points)
        ours = [
            invariant_attention(atoms, theta, points, weights, sizes),
            rotary_attention(atoms, Waves.of_rule(rule, theta), sizes).squeeze(1),
        ]
    else:
        ours = [attention_per_direction(atoms, theta, points, sizes)]
    cotangent, _ = features_from_reference(arrays["vjp/cotangent"])
    for y in ours:
        assert_same(like_reference(y, nominal_v, arrays["out/y"]), arrays["out/y"])
        total = (change_degrees_last(cotangent, arrays["out/y"]) * y).sum()
        gradients = torch.autograd.grad(total, inputs, retain_graph=True)
        for name, gradient, degrees in zip("qkv", gradients, (degrees_qk, degrees_qk, degrees_v)):
            theirs = arrays[f"vjp/{name}"]
            assert_same(like_reference(gradient, degrees, theirs), theirs)
        assert_same(gradients[3].numpy(), arrays["vjp/pos"])
        assert_same(gradients[4].numpy(), arrays["vjp/theta"])


def change_degrees_last(cotangent, theirs):
    """The cotangent lists all irreps of the output; nothing to do where the output does too."""
    assert cotangent.shape[-2] == theirs.shape[-3] * theirs.shape[-2]
    return cotangent


@pytest.mark.parametrize("number", range(1, 5))
def test_tensor_integration(efa_fixtures, number):
    hyper, arrays = read(efa_fixtures, f"ti_{number:02d}")
    (first, degrees_1), (second, degrees_2) = (features_from_reference(arrays[f"in/inputs{k}"]) for k in (1, 2))
    out = coupled_degrees(degrees_1, degrees_2, hyper.get("max_degree"), hyper["include_pseudotensors"])
    learned = hyper["parametrize_coupling_paths"]
    layer = TensorIntegration(CoupledProduct(degrees_1, degrees_2, out, first.shape[-1], learned=learned)).double()
    inputs = [first.requires_grad_(True), second.requires_grad_(True)]
    kernel = layer.product.weights.kernel
    if kernel is not None:
        kernel.data = path_kernel(arrays["params/kernel"], layer.product.paths)
        inputs.append(kernel)
    weights = torch.from_numpy(arrays["in/integration_weights"])
    y = tensor_integration(first, second, weights, layer.product)
    pairs = torch.einsum("...mxc,nmyc,m->nxyc" if first.ndim == 3 else "nmxc,nmyc,m->nxyc", first, second, weights)
    assert torch.allclose(layer(pairs), y, rtol=0, atol=1e-13)
    theirs = arrays["out/y"]
    assert_same(like_reference(y, layer.degrees_out, theirs), theirs)
    cotangent, degrees = features_from_reference(arrays["vjp/cotangent"])
    gradients = torch.autograd.grad((change_degrees(cotangent, degrees, layer.degrees_out) * y).sum(), inputs)
    for k, degrees in ((1, degrees_1), (2, degrees_2)):
        assert_same(like_reference(gradients[k - 1], degrees, arrays[f"vjp/inputs{k}"]), arrays[f"vjp/inputs{k}"])
    if kernel is not None:
        assert_same(gradients[2].numpy(), path_kernel(arrays["vjp/params/kernel"], layer.product.paths).numpy())


@pytest.mark.parametrize("number", range(1, 9))
def test_module(efa_fixtures, number):
    hyper, arrays = read(efa_fixtures, f"efa_{number:02d}")
    features, degrees = features_from_reference(arrays["in/inputs"])
    attention = EuclideanFastAttention(attention_config(hyper), degrees, features.shape[-1]).double()
    parameters = {name.removeprefix("params/"): value for name, value in arrays.items() if name.startswith("params/")}
    attention.load_state_dict(attention_state(parameters, "", attention))
    positions = torch.from_numpy(arrays["in/positions"]).requires_grad_(True)
    features.requires_grad_(True)
    y = attention(features, positions, Systems(sizes_of(arrays)))
    theirs = arrays["out/y"]
    assert_same(like_reference(y, attention.degrees_out, theirs), theirs)

    cotangent, cotangent_degrees = features_from_reference(arrays["vjp/cotangent"])
    (change_degrees(cotangent, cotangent_degrees, attention.degrees_out) * y).sum().backward()
    assert_same(like_reference(features.grad, degrees, arrays["vjp/inputs"]), arrays["vjp/inputs"])
    assert_same(positions.grad.numpy(), arrays["vjp/positions"])
    gradients = {name.removeprefix("vjp/params/"): value for name, value in arrays.items() if "vjp/params/" in name}
    expected = attention_state(gradients, "", attention)
    assert expected.keys() == dict(attention.named_parameters()).keys()
    for name, parameter in attention.named_parameters():
        assert_same(parameter.grad.numpy(), expected[name].numpy())


def test_bases_of_components():
    """The change of basis that the comparisons rely on keeps scalar products and leaves vectors alone."""
    assert np.abs(to_cartesian_order(1) - np.eye(3)).max() < 1e-14
    for degree in range(5):
        change = to_cartesian_order(degree)
        assert np.abs(change @ change.T - np.eye(2 * degree + 1)).max() < 1e-14
    generator = np.random.default_rng(0)
    array = generator.normal(size=(3, 2, 9, 4))
    features, degrees = features_from_reference(array)
    assert has_pseudotensors(degrees)
    assert dim(degrees) == slices(degrees)[-1].stop == 18
    assert np.abs(features_to_reference(features, degrees, 2, 2) - array).max() < 1e-14
