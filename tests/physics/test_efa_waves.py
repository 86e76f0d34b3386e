"""What Euclidean fast attention is: a sum over pairs with sin(w r) / (w r), and its counterpart in a crystal."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from steradian.config.operators import EFAConfig, TensorIntegrationConfig
from steradian.equivariant.harmonics import spherical_harmonics
from steradian.equivariant.irreps import natural_degrees
from steradian.equivariant.sphere import lebedev
from steradian.operators.efa.attention import Waves, rotary_attention
from steradian.operators.efa.operator import EuclideanFastAttention, Systems
from steradian.operators.efa.paper import QKV, attention_along, frequencies_up_to, sinc_kernel, sum_over_pairs
from steradian.operators.efa.periodic import lattice_vectors, reciprocal_attention, shell_weights
from steradian.operators.efa.rules import DirectionRule

CELL = torch.tensor([[5.1, 0.0, 0.0], [0.9, 4.7, 0.0], [-0.6, 0.8, 5.6]], dtype=torch.float64)
FREQUENCIES = torch.tensor([0.0, 0.7, 1.4, 2.1], dtype=torch.float64)
WIDTH = 0.7


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(num_atoms, seed=0):
    """Queries, keys, values."""
    return (
        random(num_atoms, 1, 8, seed=seed) / math.sqrt(8),
        random(num_atoms, 1, 8, seed=seed + 1),
        random(num_atoms, 4, 3, seed=seed + 2),
    )


def crystal(num_atoms=4, seed=5):
    fractions = torch.rand(num_atoms, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return fractions @ CELL


def in_crystal(q, k, v, positions, cell, scaling=None):
    """``[N, D_v, F_v]``, with harmonics ``[N, L, D_v, F_v]``."""
    out = reciprocal_attention(QKV(q, k, v, positions), cell, FREQUENCIES, WIDTH, degree_scaling=scaling)
    return out.squeeze(1) if scaling is None else out


def test_a_molecule_is_a_sum_of_sinc_over_pairs():
    q, k, v = features(20)
    positions = 1.5 * random(20, 3, seed=9)
    distances = (positions[:, None] - positions).norm(dim=-1)
    rule, atoms = DirectionRule.from_grid(lebedev(434)), QKV(q, k, v, positions)
    assert float(distances.max() * FREQUENCIES.max()) < 7.5 * math.pi, "the rule resolves the largest phase"
    ours = rotary_attention(atoms, Waves.of_rule(rule, FREQUENCIES), (20,)).squeeze(1)
    theirs = sum_over_pairs(atoms, sinc_kernel(distances, FREQUENCIES))
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def damped_kernel(distances):
    """``∫ g_n(k) sin(k r) / (k r) d^3k`` by quadrature, ``[..., n]``."""
    nodes, weights = np.polynomial.legendre.leggauss(400)
    top = float(FREQUENCIES.max()) + WIDTH
    k, w = torch.from_numpy(0.5 * top * (nodes + 1)), torch.from_numpy(0.5 * top * weights)
    density = shell_weights(k, FREQUENCIES, WIDTH) * (4 * math.pi * k.square() * w).unsqueeze(-1)
    return sinc_kernel(distances, k) @ density


def test_shells_integrate_to_one():
    assert torch.allclose(
        damped_kernel(torch.zeros(1, dtype=torch.float64)), torch.ones(1, 4, dtype=torch.float64), atol=1e-4
    )


def test_shells_end_with_value_slope_and_curvature_zero():
    """As the third power of the distance from the edge."""
    steps = torch.tensor([1e-4, 2e-4, -1e-9], dtype=torch.float64)
    near, twice, beyond = shell_weights(1.4 + WIDTH - steps, FREQUENCIES, WIDTH)[:, 2].tolist()
    assert abs(twice / near - 8) < 0.01
    assert beyond == 0


def test_a_crystal_is_a_sum_over_all_images():
    q, k, v = features(4)
    positions = crystal()
    ours = in_crystal(q, k, v, positions, CELL)
    reach = torch.arange(-11, 12, dtype=torch.float64)
    images = torch.cartesian_prod(reach, reach, reach) @ CELL
    images = images[images.norm(dim=1) < 45]
    kernel = torch.stack(
        [damped_kernel((positions[i] - positions[:, None] - images).norm(dim=-1)).sum(1) for i in range(4)]
    )
    theirs = sum_over_pairs(QKV(q, k, v, positions), kernel)
    assert (ours - theirs).abs().max() < 2e-3 * theirs.abs().max()  # images beyond 45 Å are left out


def test_a_crystal_is_a_sum_over_wave_vectors():
    """Every wave vector with its opposite, its harmonics and turned queries and keys, one by one."""
    q, k, v, scaling, out = *features(4), [1.0, 0.5, 2.0], 0.0
    positions = crystal()
    steps = torch.cartesian_prod(*[torch.arange(-4.0, 5.0, dtype=torch.float64)] * 3)
    vectors = 2 * math.pi * steps @ torch.linalg.inv(CELL).T
    vectors = vectors[vectors.norm(dim=1) < float(FREQUENCIES.max()) + WIDTH]
    assert len(vectors) == 2 * len(lattice_vectors(CELL, float(FREQUENCIES.max()) + WIDTH)) - 1
    factors = random(1, seed=0).new_tensor([scaling[d] / (2 * d + 1) ** 0.5 for d in (0, 1, 1, 1, 2, 2, 2, 2, 2)])
    for vector in vectors:
        length = vector.norm()
        density = shell_weights(length[None], FREQUENCIES, WIDTH)[0] * (2 * math.pi) ** 3 / torch.linalg.det(CELL)
        weighted = q * density.repeat_interleave(2)  # a factor per pair of channels
        along = attention_along(QKV(weighted, k, v, positions), torch.ones(4, dtype=torch.float64), vector)
        direction = vector / length if length > 0 else vector
        out = out + torch.einsum("l,nde->nlde", factors * spherical_harmonics(direction[None], 2)[0], along)
    even_first = [0, 4, 5, 6, 7, 8, 1, 2, 3]
    assert torch.allclose(in_crystal(q, k, v, positions, CELL, scaling), out[:, even_first], rtol=0, atol=1e-11)


def test_a_large_box_gives_the_damped_molecule():
    """Far images are out of reach of the damped kernel, so a molecule in a box is a molecule."""
    q, k, v = features(5)
    positions = random(5, 3, seed=3)
    errors = []
    theirs = sum_over_pairs(QKV(q, k, v, positions), damped_kernel((positions[:, None] - positions).norm(dim=-1)))
    for length in (8.0, 16.0, 32.0):
        box = length * torch.eye(3, dtype=torch.float64)
        ours = in_crystal(q, k, v, positions, box)
        errors.append(float((ours - theirs).abs().max() / theirs.abs().max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 2e-3


@pytest.mark.parametrize("scaling", [None, [1.0, 0.5, 2.0]])
def test_symmetries_of_a_crystal_are_exact(scaling):
    q, k, v = features(4)
    positions = crystal()

    def attention(positions, cell, q=q, k=k, v=v):
        return in_crystal(q, k, v, positions, cell, scaling)

    before = attention(positions, CELL)
    scale = float(before.abs().max())
    assert torch.allclose(attention(positions + random(3, seed=2), CELL), before, atol=1e-12 * scale)
    # every atom moved by lattice vectors of its own
    hops = torch.tensor([[1, 0, -2], [0, 3, 0], [0, 0, 0], [-5, 1, 1]], dtype=torch.float64) @ CELL
    assert torch.allclose(attention(positions + hops, CELL), before, atol=1e-12 * scale)
    # another basis of the same lattice
    basis = torch.tensor([[1, 1, 0], [0, 1, 0], [2, 0, 1]], dtype=torch.float64)
    assert torch.allclose(attention(positions, basis @ CELL), before, atol=1e-12 * scale)
    assert torch.allclose(attention(positions, CELL[[1, 0, 2]]), before, atol=1e-12 * scale)  # a left-handed one
    # a supercell: twice the atoms, the same values
    double = torch.cat([positions, positions + CELL[1]])
    doubled = attention(
        double, torch.diag(torch.tensor([1.0, 2.0, 1.0]).double()) @ CELL, *(torch.cat([x, x]) for x in (q, k, v))
    )
    assert torch.allclose(doubled, torch.cat([before, before]), atol=1e-12 * scale)
    if scaling is None:
        matrix = torch.linalg.qr(random(3, 3, seed=8))[0]
        assert torch.allclose(attention(positions @ matrix.T, CELL @ matrix.T), before, atol=1e-12 * scale)


def test_nothing_jumps_as_the_cell_changes():
    """Wave vectors come and go with the cell: value and slope stay continuous."""
    q, k, v = features(4)
    fractions = crystal() @ torch.linalg.inv(CELL)
    factors, counts, values, slopes = np.linspace(0.9, 1.1, 401), [], [], []
    for factor in factors:
        stretch = torch.tensor(factor, dtype=torch.float64, requires_grad=True)
        cell = stretch * CELL
        out = (in_crystal(q, k, v, fractions @ cell, cell) * v).sum()
        counts.append(len(lattice_vectors(cell, float(FREQUENCIES.max()) + WIDTH)))
        values.append(out.item())
        slopes.append(torch.autograd.grad(out, stretch)[0].item())
    assert len(set(counts)) > 10, "wave vectors must come and go for this to test something"
    values, slopes, step = np.array(values), np.array(slopes), factors[1] - factors[0]
    rise = 0.5 * step * (slopes[1:] + slopes[:-1])
    assert np.abs(np.diff(values) - rise).max() < 2e-3 * np.abs(rise).max()
    assert np.abs(np.diff(slopes)).max() < 0.05 * np.ptp(slopes)


@pytest.mark.parametrize("integration", [None, TensorIntegrationConfig(learned_paths=True)])
def test_module_in_mixed_batches(integration):
    """Molecules and crystals in any order; derivatives by strain and positions against differences."""
    torch.manual_seed(0)
    config = EFAConfig(periodic=True, max_length_A=2.0, num_points=110, tensor_integration=integration)
    attention = EuclideanFastAttention(config, natural_degrees(1), 4).double()
    assert torch.equal(attention.frequencies, frequencies_up_to(math.pi, 2.0, 2))
    x, positions = random(14, 4, 4), 1.5 * random(14, 3, seed=1)
    sizes = (3, 4, 2, 2, 3)
    cell = torch.stack([0 * CELL, CELL, 1.1 * CELL, 0 * CELL, 0 * CELL])
    pbc = torch.tensor([[False] * 3, [True] * 3, [True] * 3, [False] * 3, [False] * 3])
    together = attention(x, positions, Systems(sizes), cell, pbc)
    parts = zip(together.split(sizes), x.split(sizes), positions.split(sizes), cell.split(1), pbc.split(1))
    for one, own_x, own_positions, own_cell, own_pbc in parts:
        alone = attention(own_x, own_positions, Systems((len(one),)), own_cell, own_pbc)
        assert torch.allclose(one, alone, atol=1e-12)

    def value(strain):
        deformation = torch.eye(3, dtype=torch.float64) + strain
        return attention(x, positions @ deformation, Systems(sizes), cell @ deformation, pbc).square().sum()

    strain = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(value, [strain], eps=1e-5, atol=1e-5, rtol=1e-5)
    assert torch.autograd.gradgradcheck(value, [strain], eps=1e-5, atol=1e-4, rtol=1e-4)


def test_periodicity_must_be_asked_for_and_be_whole():
    attention = EuclideanFastAttention(EFAConfig(), natural_degrees(0), 4).double()
    given = random(2, 1, 4), random(2, 3), Systems((2,)), CELL[None]
    with pytest.raises(ValueError, match="periodic=true"):
        attention(*given, torch.tensor([[True, True, True]]))
    attention = EuclideanFastAttention(EFAConfig(periodic=True), natural_degrees(0), 4).double()
    with pytest.raises(ValueError, match="in all three directions or in none"):
        attention(*given, torch.tensor([[True, True, False]]))
    with pytest.raises(ValueError, match="three independent lattice vectors"):
        attention(*given[:3], 0 * CELL[None], torch.tensor([[True, True, True]]))
