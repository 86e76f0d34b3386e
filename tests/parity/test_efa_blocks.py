"""Equivariant building blocks of the O(3) network against frozen numbers of the published implementation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from steradian.equivariant.harmonics import coupling, spherical_harmonics, to_cartesian_order
from steradian.equivariant.irreps import all_degrees, dim, has_pseudotensors, max_degree, natural_degrees
from steradian.equivariant.linear import Dense, activate, add_features, change_degrees
from steradian.equivariant.paths import CoupledProduct, MessagePassing, SelfCoupling, coupled_degrees
from steradian.graph import Edges
from steradian.graph.topology import Topology
from steradian.interfaces.efa_jax import dense_state, features_from_reference, features_to_reference, path_kernel

TOLERANCE = 1e-13  # float64, sums of some ten terms of order one


@pytest.fixture(scope="module")
def blocks(efa_fixtures):
    with np.load(efa_fixtures / "blocks_01.npz") as file:
        return {key: file[key] for key in file.files}


def assert_same(ours, degrees, theirs):
    num_slots, l_max = theirs.shape[-3], round(theirs.shape[-2] ** 0.5) - 1
    difference = np.abs(features_to_reference(ours, degrees, num_slots, l_max) - theirs).max()
    assert difference < TOLERANCE * max(1.0, np.abs(theirs).max())


def test_couplings(blocks):
    table = blocks["cg/tensor"]
    part = [slice(degree**2, (degree + 1) ** 2) for degree in range(5)]
    for a, b, c in np.ndindex(5, 5, 5):
        theirs = table[part[a], part[b], part[c]]
        if not abs(a - b) <= c <= a + b:
            assert not theirs.any()
            with pytest.raises(ValueError):
                coupling(a, b, c)
            continue
        changes = [to_cartesian_order(degree) for degree in (a, b, c)]
        ours = np.einsum("xyz,xa,yb,zc->abc", coupling(a, b, c), *changes)
        assert np.abs(ours - theirs).max() < TOLERANCE


def test_harmonics(blocks):
    vectors = torch.from_numpy(blocks["sph/r"])
    ours = spherical_harmonics(vectors / vectors.norm(dim=1, keepdim=True), 4)
    scale = torch.cat([torch.full((2 * degree + 1,), 2.0 * degree + 1, dtype=ours.dtype) for degree in range(5)])
    ours = (ours * scale.rsqrt()).unsqueeze(-1)
    assert_same(ours, natural_degrees(4), blocks["sph/y_L4_racah"][:, None, :, None])


@pytest.mark.parametrize("kind", ["P1", "P2"])
def test_activations(blocks, kind):
    features, degrees = features_from_reference(blocks[f"feat/{kind}"])
    for name in ("silu", "gelu"):
        assert_same(activate(features, name), degrees, blocks[f"act/{name}_{kind}"])


@pytest.mark.parametrize("kind", ["P1", "P2"])
def test_dense(blocks, kind):
    features, degrees = features_from_reference(blocks[f"feat/{kind}"])
    layer = Dense(degrees, 4, 3).double()
    layer.load_state_dict(dense_state(blocks, f"dense/{kind}/params", layer))
    assert_same(layer(features), degrees, blocks[f"dense/{kind}/y"])


@pytest.mark.parametrize("kind", ["P1", "P2"])
@pytest.mark.parametrize("l_max", [0, 1, 3])
@pytest.mark.parametrize("pseudotensors", [True, False])
def test_changes_of_irreps(blocks, kind, l_max, pseudotensors):
    features, degrees = features_from_reference(blocks[f"feat/{kind}"])
    after = (all_degrees if pseudotensors else natural_degrees)(l_max)
    assert_same(change_degrees(features, degrees, after), after, blocks[f"change/{kind}_L{l_max}_{pseudotensors}"])


@pytest.mark.parametrize(
    ("one", "other", "name"),
    [("P1", "P2", "P1L2_P2L2"), ("P1_L1", "P1", "P1L1_P1L2"), ("P2", "P1_L1", "P2L2_P1L1")],
)
def test_sums(blocks, one, other, name):
    first, second = features_from_reference(blocks[f"feat/{one}"]), features_from_reference(blocks[f"feat/{other}"])
    assert_same(*add_features(*first, *second), blocks[f"add/{name}"])


def test_products(blocks):
    for case in json.loads(str(blocks["hp"]))["tensor_cases"]:
        name = f"tensor/{case['case']}"
        (x, degrees_x), (y, degrees_y) = (features_from_reference(blocks[f"{name}/x{k}"]) for k in (1, 2))
        out = coupled_degrees(degrees_x, degrees_y, case["max_degree"], case["include_pseudotensors"])
        product = CoupledProduct(degrees_x, degrees_y, out, x.shape[-1]).double()
        kernel = path_kernel(blocks[f"{name}/params/kernel"], product.paths)
        product.weights.kernel.data = kernel
        theirs = blocks[f"{name}/y"]
        assert theirs.shape[1] == 1 + has_pseudotensors(out)
        assert theirs.shape[2] == (max_degree(out) + 1) ** 2
        assert_same(product(x, y), product.degrees_out, theirs)
        assert_same(product.of_pairs(x[:, :, None] * y[:, None]), product.degrees_out, theirs)


@pytest.mark.parametrize(("kind", "options"), [("P1", {}), ("P2", {"highest": 0, "pseudotensors": False})])
def test_self_coupling(blocks, kind, options):
    features, degrees = features_from_reference(blocks[f"feat/{kind}"])
    layer = SelfCoupling(degrees, 4, **options).double()
    prefix = f"tensordense/{kind}/params"
    layer.dense.load_state_dict(dense_state(blocks, f"{prefix}/dense", layer.dense))
    layer.product.weights.kernel.data = path_kernel(blocks[f"{prefix}/tensor/kernel"], layer.product.paths)
    assert_same(layer(features), layer.degrees_out, blocks[f"tensordense/{kind}/y"])


@pytest.mark.parametrize(
    ("kind", "options"), [("P1", {}), ("P2", {}), ("P2_scalar", {"highest": 0, "pseudotensors": False})]
)
def test_message_passing(blocks, kind, options):
    features, degrees = features_from_reference(blocks[f"feat/{kind.removesuffix('_scalar')}"])
    basis, l_basis = features_from_reference(blocks["mp/basis"])
    # the layer takes harmonics and radial functions apart; a filter is linear in their product, so components of the
    # product that are not of that form are fed as 16 edges, each with one harmonic and one radial function
    layer = MessagePassing(degrees, 1, 6, 4, **options).double()
    prefix = f"mp/{kind}/params"
    layer.filter.data = torch.stack([torch.from_numpy(blocks[f"{prefix}/filter/{n}/kernel"]) for n in ("0+", "1-")])
    layer.weights.kernel.data = path_kernel(blocks[f"{prefix}/tensor/kernel"], layer.paths)
    components = dim(l_basis)
    scale = torch.tensor([1.0] + [3**0.5] * 3, dtype=torch.float64)
    senders = torch.from_numpy(blocks["mp/src_idx"]).repeat_interleave(components)
    edges = Edges(
        topology=Topology(senders, torch.from_numpy(blocks["mp/dst_idx"]).repeat_interleave(components), len(features)),
        vectors=torch.zeros(len(senders), 3),
        lengths=torch.zeros(len(senders)),
        radial=basis.flatten(0, 1),
        envelope=torch.ones(len(senders)),
        harmonics=(torch.eye(components, dtype=torch.float64) * scale).repeat(len(basis), 1),
    )
    assert_same(layer(features, edges), layer.degrees_out, blocks[f"mp/{kind}/y"])
