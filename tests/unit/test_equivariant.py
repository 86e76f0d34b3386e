"""Harmonics, tensor product and symmetric contraction against independent formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import sph_harm_y

from steradian.config import RadialConfig
from steradian.equivariant.harmonics import spherical_harmonics, unit_vectors
from steradian.equivariant.irreps import dim, format_degrees, natural_degrees
from steradian.equivariant.linear import ElementLinear, PathLinear
from steradian.equivariant.symmetric_contraction import SymmetricContraction, published_path_count
from steradian.equivariant.tensor_product import ChannelwiseTensorProduct, channelwise_polynomial
from steradian.graph import Edges
from steradian.graph.topology import Topology
from steradian.radial import (
    RadialBasis,
    RadialNetwork,
    cosine_envelope,
    polynomial_envelope,
    safe_norm,
    smooth_envelope,
)


def random_directions(count, seed=0):
    vectors = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return vectors / vectors.norm(dim=1, keepdim=True)


def random_rotation(seed=0):
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return torch.as_tensor(q if np.linalg.det(q) > 0 else -q)


def wigner_d(rotation, l_max):
    """Block matrix that turns harmonics, found by least squares on many directions."""
    directions = random_directions(400)
    before = spherical_harmonics(directions, l_max)
    after = spherical_harmonics(directions @ rotation.T, l_max)
    return torch.linalg.lstsq(before, after).solution.T  # after = before @ D.T


def test_harmonics_span_the_textbook_ones():
    """Each degree is an orthogonal mixture of scipy's harmonics, times sqrt(4 pi) ("component" normalisation)."""
    directions = random_directions(300)
    ours = spherical_harmonics(directions, 4).numpy()
    theta = np.arccos(directions[:, 2].numpy())
    phi = np.arctan2(directions[:, 1].numpy(), directions[:, 0].numpy())
    for degree in range(5):
        columns = []
        for m in range(degree + 1):
            value = sph_harm_y(degree, m, theta, phi)
            columns += [value.real] if m == 0 else [math.sqrt(2) * value.real, math.sqrt(2) * value.imag]
        theirs = math.sqrt(4 * math.pi) * np.stack(columns, 1)
        mixture, *_ = np.linalg.lstsq(theirs, ours[:, degree**2 : (degree + 1) ** 2], rcond=None)
        assert np.allclose(theirs @ mixture, ours[:, degree**2 : (degree + 1) ** 2], atol=1e-12)
        assert np.allclose(mixture.T @ mixture, np.eye(2 * degree + 1), atol=1e-12)


def test_harmonics_conventions():
    directions = random_directions(20)
    values = spherical_harmonics(directions, 5)
    assert torch.allclose(values[:, 1:4], math.sqrt(3) * directions, atol=1e-13)
    for degree in range(6):
        norm = values[:, degree**2 : (degree + 1) ** 2].square().sum(1)
        assert torch.allclose(norm, torch.full_like(norm, 2 * degree + 1), atol=1e-11)


def test_harmonics_of_degree_two_and_three_have_their_order_and_signs():
    """Those of e3nn (y is its polar axis): stored weights mean nothing with others."""
    directions = random_directions(20)
    x, y, z = directions.T
    values = spherical_harmonics(directions, 3)
    pairs, around = 15**0.5, x**2 + z**2
    second = [pairs * x * z, pairs * x * y, 5**0.5 * (y**2 - around / 2), pairs * y * z, pairs / 2 * (z**2 - x**2)]
    assert torch.allclose(values[:, 4:9], torch.stack(second, dim=1), atol=1e-13)
    assert torch.allclose(values[:, 12], 7**0.5 / 2 * y * (2 * y**2 - 3 * around), atol=1e-13)
    first_of_third = (5 / 6) ** 0.5 * 3**0.5 * (x * z * z + (z**2 - x**2) * x / 2)
    assert torch.allclose(values[:, 9], 7**0.5 * first_of_third, atol=1e-13)


def test_a_zero_vector_has_no_direction_and_finite_derivatives():
    vectors = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    lengths = safe_norm(vectors)
    value = spherical_harmonics(unit_vectors(vectors, lengths), 3).sum() + lengths.sum()
    (first,) = torch.autograd.grad(value, vectors, create_graph=True)
    assert torch.isfinite(first).all()
    if first.requires_grad:
        (second,) = torch.autograd.grad(first.sum(), vectors, allow_unused=True)
        assert second is None or torch.isfinite(second).all()


def make_edges(directions, num_atoms, l_max):
    generator = torch.Generator().manual_seed(1)
    count = len(directions)
    receivers = torch.randint(num_atoms, (count,), generator=generator).sort().values
    senders = torch.randint(num_atoms, (count,), generator=generator)
    ones = torch.ones(count, dtype=torch.float64)
    topology = Topology(senders, receivers, num_atoms)
    topology._looked_for_pairs = True  # weights are per edge here
    return Edges(topology, directions, ones, ones[:, None], ones, spherical_harmonics(directions, l_max))


def path_representation(table, wigner):
    """Matrix that turns ``[D_paths]``: the component index is outer, the path index inner."""
    blocks = []
    for (degree, _), count in zip(table.degrees_out, table.counts):
        block = wigner[degree**2 : (degree + 1) ** 2, degree**2 : (degree + 1) ** 2]
        blocks.append(torch.kron(block, torch.eye(count, dtype=block.dtype)))
    return torch.block_diag(*blocks)


@pytest.mark.parametrize(("hidden_l", "l_max"), [(0, 3), (1, 2), (2, 3)])
def test_tensor_product_is_equivariant(hidden_l, l_max):
    generator = torch.Generator().manual_seed(0)
    degrees = natural_degrees(hidden_l)
    product = ChannelwiseTensorProduct(degrees, l_max, natural_degrees(l_max))
    directions = random_directions(12)
    features = torch.randn(5, dim(degrees), 3, generator=generator, dtype=torch.float64)
    weights = torch.randn(12, product.num_paths, 3, generator=generator, dtype=torch.float64)
    rotation = random_rotation()
    wigner = wigner_d(rotation, l_max)
    before = product(features, make_edges(directions, 5, l_max), weights)
    turned_features = torch.einsum("ij,njc->nic", wigner[: dim(degrees), : dim(degrees)], features)
    after = product(turned_features, make_edges(directions @ rotation.T, 5, l_max), weights)
    expected = torch.einsum("ij,njc->nic", path_representation(product.table, wigner), before)
    assert expected.abs().max() > 1e-2
    assert torch.allclose(after, expected, atol=1e-10)
    inverted = product(features, make_edges(-directions, 5, l_max), weights)
    assert not torch.allclose(inverted, before, atol=1e-3)


def test_tensor_product_paths_and_variance():
    polynomial, table = channelwise_polynomial(natural_degrees(1), 3, natural_degrees(3))
    assert len(table.paths) == 10
    assert format_degrees(table.degrees_out) == "0e + 1o + 2e + 3o"
    assert table.counts == (2, 3, 3, 2)
    assert polynomial.output.dim == table.dim == 40
    # unit-variance inputs give unit variance to every component of every path
    (group,) = polynomial.terms
    power = np.zeros(table.dim)
    np.add.at(power, group.outputs, group.coefficients**2)
    assert np.allclose(power, 1.0)


def test_an_impossible_product_is_refused():
    with pytest.raises(ValueError, match="no coupling"):
        channelwise_polynomial(((0, -1),), 0, ((0, 1),))


@pytest.mark.parametrize(("l_max", "hidden_l", "correlation"), [(3, 1, 3), (2, 2, 2), (1, 1, 4)])
def test_contraction_is_equivariant(l_max, hidden_l, correlation):
    torch.manual_seed(0)
    contraction = SymmetricContraction(natural_degrees(l_max), natural_degrees(hidden_l), correlation, 2, 3).double()
    features = torch.randn(4, (l_max + 1) ** 2, 3, dtype=torch.float64)
    species = torch.tensor([0, 1, 1, 0])
    wigner = wigner_d(random_rotation(), l_max)
    before = contraction(features, species)
    after = contraction(torch.einsum("ij,njc->nic", wigner, features), species)
    size = (hidden_l + 1) ** 2
    expected = torch.einsum("ij,njc->nic", wigner[:size, :size], before)
    assert before[:, 1:].abs().max() > 1e-2
    assert torch.allclose(after, expected, atol=1e-9)


def test_contraction_has_the_rank_and_the_published_redundancy():
    contraction = SymmetricContraction(natural_degrees(3), natural_degrees(1), 3, 1, 1)
    assert contraction.weight.shape[1] == 29
    counts = [
        published_path_count(natural_degrees(3), irrep, order) for irrep in ((0, 1), (1, -1)) for order in (3, 2, 1)
    ]
    assert counts == [23, 4, 1, 51, 6, 1]


def test_contraction_is_homogeneous_of_each_order():
    """Scaling the input by t gives a cubic in t without a constant term."""
    torch.manual_seed(1)
    contraction = SymmetricContraction(natural_degrees(2), natural_degrees(0), 3, 1, 2).double()
    features = torch.randn(3, 9, 2, dtype=torch.float64)
    species = torch.zeros(3, dtype=torch.int64)
    scales = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    values = torch.stack([contraction(t * features, species).flatten() for t in scales])
    powers = torch.stack([scales, scales**2, scales**3], 1)
    fit = torch.linalg.lstsq(powers, values).solution
    assert torch.allclose(powers @ fit, values, atol=1e-9)
    assert fit.abs().max(dim=1).values.min() > 1e-3


def test_contraction_starts_with_the_published_variance():
    """Over random weights: every path by itself, normal with deviation 1 / (number of published paths)."""
    torch.manual_seed(0)
    samples = 20000
    contraction = SymmetricContraction(natural_degrees(1), natural_degrees(1), 2, samples, 1).double()
    features = torch.tensor([0.9, 0.5, -0.7, 1.1], dtype=torch.float64)
    found = contraction(features[None, :, None].expand(samples, 4, 1).contiguous(), torch.arange(samples))[..., 0]
    s, v = features[0], features[1:]
    # s; s s and v.v / sqrt(3): two paths; v; s v and v s: two paths, which are the same product
    scalar = s**2 + (s**4 + v.square().sum() ** 2 / 3) / 4
    vector = v**2 * (1 + 2 * s**2 / 4)
    assert torch.allclose(found.var(0), torch.cat([scalar[None], vector]), rtol=0.05)


def test_element_linear_uses_each_elements_own_matrix():
    torch.manual_seed(0)
    linear = ElementLinear(natural_degrees(1), 3, 4, 5).double()
    features = torch.randn(6, 4, 4, dtype=torch.float64)
    species = torch.tensor([2, 0, 2, 1, 0, 2])
    out = linear(features, species)
    for atom, element in enumerate(species.tolist()):
        scale = (3 * 4) ** -0.5
        expected = torch.cat(
            [features[atom, :1] @ linear.weight[element, 0], features[atom, 1:] @ linear.weight[element, 1]]
        )
        assert torch.allclose(out[atom], scale * expected, atol=1e-12)
    assert linear(features[:0], species[:0]).shape == (0, 4, 5)


def test_path_linear_fills_missing_irreps_with_zeros():
    _, table = channelwise_polynomial(natural_degrees(0), 1, natural_degrees(1))
    linear = PathLinear(table, 2, natural_degrees(2))
    out = linear(torch.randn(3, table.dim, 2))
    assert out.shape == (3, 9, 2)
    assert out[:, 4:].abs().max() == 0


@pytest.mark.parametrize("p", [5, 6])
def test_envelope_is_smooth_at_the_cutoff(p):
    r = torch.tensor([0.0, 1.0, 5.0 - 1e-6, 5.0, 6.0], dtype=torch.float64, requires_grad=True)
    value = polynomial_envelope(r, 5.0, p)
    assert value[0] == 1.0
    assert value[3] == 0.0
    assert value[4] == 0.0
    (slope,) = torch.autograd.grad(value.sum(), r, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), r)
    assert abs(slope[2]) < 1e-10
    assert abs(curvature[2]) < 1e-4
    assert value[1] > 0.9


class TestRadialTable:
    def network(self):
        torch.manual_seed(0)
        return RadialNetwork(6, [16], 3, 4).double()

    def radial(self, lengths):
        basis = RadialBasis(RadialConfig(num=6), 4.0).double()
        return basis(lengths) * polynomial_envelope(lengths, 4.0, 5).unsqueeze(-1)

    def test_error_falls_with_the_fourth_power(self):
        network = self.network()
        errors = [network.tabulate(self.radial, 4.0, count) for count in (64, 128, 256)]
        assert errors[0] < 1e-3
        assert 12 < errors[0] / errors[1] < 20
        assert 12 < errors[1] / errors[2] < 20

    def test_value_slope_gate_and_cutoff(self):
        network = self.network()
        lengths = torch.tensor([0.0, 0.3, 1.0, 2.0, 3.999, 4.0, 4.5], dtype=torch.float64, requires_grad=True)
        gate = torch.linspace(0.5, 1.5, 7, dtype=torch.float64)
        exact = network(self.radial(lengths), gate)
        (slope,) = torch.autograd.grad(exact.square().sum(), lengths)
        network.tabulate(self.radial, 4.0, 1024)
        table = network(self.radial(lengths), gate, lengths)
        (table_slope,) = torch.autograd.grad(table.square().sum(), lengths)
        scale = float(exact.detach().abs().max())
        assert torch.allclose(table, exact, rtol=0, atol=1e-7 * scale)
        assert torch.allclose(table_slope, slope, rtol=0, atol=1e-4 * float(slope.abs().max()))
        assert torch.equal(table[-2:], torch.zeros_like(table[-2:]))

    def test_slope_is_continuous_at_a_knot(self):
        network = self.network()
        network.tabulate(self.radial, 4.0, 32)
        slopes = []
        for side in (-1e-9, 1e-9):
            length = torch.tensor([1.0 + side], dtype=torch.float64, requires_grad=True)  # a knot is at 1.0
            (slope,) = torch.autograd.grad(network(None, None, length).sum(), length)
            slopes.append(float(slope))
        assert abs(slopes[0] - slopes[1]) < 1e-6 * abs(slopes[0])

    def test_training_drops_the_table(self):
        network = self.network()
        network.tabulate(self.radial, 4.0, 32)
        assert network.eval().table is not None
        assert network.train().table is None


def test_radial_functions_are_those_of_their_formulas():
    cutoff, num = 4.0, 5
    r = torch.tensor([0.7, 1.9, 3.3], dtype=torch.float64)

    def basis(kind):
        return RadialBasis(RadialConfig(kind=kind, num=num), cutoff).double()(r)

    for n in range(1, num + 1):
        bessel = (2 / cutoff) ** 0.5 * torch.sin(n * torch.pi * r / cutoff) / r
        assert torch.allclose(basis("bessel")[:, n - 1], bessel, rtol=1e-13)
        # neighbouring Gaussians are one width apart
        gaussian = torch.exp(-0.5 * (r / (cutoff / (num - 1)) - (n - 1)) ** 2)
        assert torch.allclose(basis("gaussian")[:, n - 1], gaussian, rtol=1e-13)
        polynomial = np.polynomial.chebyshev.Chebyshev.basis(n)(r.numpy())
        assert torch.allclose(basis("chebyshev")[:, n - 1], torch.from_numpy(polynomial), rtol=1e-13)


def test_envelopes_are_those_of_their_formulas():
    cutoff = 4.0
    r = torch.tensor([0.7, 1.9, 3.3], dtype=torch.float64)
    x = r / cutoff
    for p in (5, 6):
        polynomial = 1 - (p + 1) * (p + 2) / 2 * x**p + p * (p + 2) * x ** (p + 1) - p * (p + 1) / 2 * x ** (p + 2)
        assert torch.allclose(polynomial_envelope(r, cutoff, p), polynomial, rtol=1e-13)
    assert torch.allclose(smooth_envelope(r, cutoff), torch.exp(1 - 1 / (1 - x**2)), rtol=1e-13)
    assert torch.allclose(cosine_envelope(r, cutoff), (1 + torch.cos(torch.pi * x)) / 2, rtol=1e-13)
