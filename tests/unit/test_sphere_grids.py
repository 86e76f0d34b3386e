"""Quadrature rules on the sphere: weights, degrees, conventions, refusals."""

import math

import numpy as np
import pytest
import torch
from scipy.special import sph_harm_y

from steradian.config import EquiangularGrid, GaussLegendreGrid, LebedevGrid, SphericalDesign
from steradian.equivariant import sphere as grids
from steradian.equivariant.sphere import (
    DESIGN_DEGREES,
    SphereGrid,
    design,
    equiangular,
    gauss_legendre,
    lebedev,
    make_grid,
)

RULES = [
    *(equiangular(lat, lon) for lat, lon in [(2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (5, 6), (3, 9), (7, 3), (2, 1)]),
    *(equiangular(lat, lon, poles=False) for lat, lon in [(1, 4), (2, 4), (4, 8), (5, 8), (4, 3), (8, 8)]),
    *(gauss_legendre(lat, lon) for lat, lon in [(1, 2), (2, 4), (4, 8), (3, 2), (5, 12)]),
    *(lebedev(points) for points in (6, 14, 26, 38, 50, 74, 86, 110, 146, 170, 194, 230, 266)),
    *(design(degree) for degree in DESIGN_DEGREES),
]


def integrals(grid: SphereGrid, degree: int) -> np.ndarray:
    """Integrals of all orthonormal real harmonics of one degree (of real and imaginary parts of the complex ones)."""
    x, y, z = grid.points.numpy().T
    orders = np.arange(degree + 1)[:, None]
    values = sph_harm_y(degree, orders, np.arccos(np.clip(z, -1, 1)), np.arctan2(y, x)) @ grid.weights.numpy()
    return np.concatenate([values.real, values.imag])


@pytest.mark.parametrize("grid", RULES, ids=lambda grid: grid.name)
def test_degree_is_exact_and_not_more(grid):
    assert grid.points.dtype == grid.weights.dtype == torch.float64
    assert torch.allclose(grid.points.norm(dim=1), torch.ones(grid.num_points, dtype=torch.float64), atol=1e-14, rtol=0)
    assert abs(float(grid.weights.sum()) - 4 * math.pi) < 1e-12
    for degree in range(1, grid.degree + 1):
        assert np.abs(integrals(grid, degree)).max() < 1e-12, degree
    assert np.abs(integrals(grid, grid.degree + 1)).max() > 1e-4


def test_a_moved_point_is_noticed():
    grid = lebedev(26)
    points = grid.points.clone()
    points[0] += 1e-9
    moved = SphereGrid(points, grid.weights, grid.degree, grid.kind, grid.name)
    assert max(np.abs(integrals(moved, degree)).max() for degree in range(1, 8)) > 1e-11


def test_equiangular_convention():
    """torch-harmonics: Clenshaw-Curtiss latitudes from pole to pole, longitudes from zero, latitude first."""
    grid = equiangular(4, 8)
    assert grid.shape == (4, 8)
    assert grid.num_points == 32
    assert torch.equal(grid.points[:8], torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand(8, 3))
    assert torch.equal(grid.points[24:], torch.tensor([0.0, 0.0, -1.0], dtype=torch.float64).expand(8, 3))
    third = [math.sin(math.pi / 3) * math.cos(math.pi / 4), math.sin(math.pi / 3) * math.sin(math.pi / 4), 0.5]
    assert grid.points[9].tolist() == pytest.approx(third, abs=1e-15)
    # Clenshaw-Curtiss weights of four nodes: 1/9, 8/9, 8/9, 1/9
    latitudes = grid.weights.reshape(4, 8).sum(1) / (2 * math.pi)
    assert latitudes.tolist() == pytest.approx([1 / 9, 8 / 9, 8 / 9, 1 / 9], abs=1e-14)
    assert equiangular(4, 8, poles=False).points[:, 2].abs().max() < 0.93


def test_designs_have_equal_weights_and_no_double_points():
    for degree in DESIGN_DEGREES:
        grid = design(degree)
        assert torch.equal(grid.weights, grid.weights[:1].expand(grid.num_points))
        distances = torch.cdist(grid.points, grid.points) + 10 * torch.eye(grid.num_points)
        assert distances.min() > 0.25
    assert design(4).degree == 5
    assert design(4).num_points == 12
    assert design(7).num_points == 24


def test_lebedev_table_is_that_of_scipy():
    from scipy.integrate import lebedev_rule

    for points, degree in grids.LEBEDEV_DEGREES.items():
        if points < 1000:
            assert lebedev_rule(degree)[0].shape == (3, points)


@pytest.mark.parametrize("points", [74, 230, 266])
def test_negative_weights_are_refused_where_a_softmax_needs_logarithms(points):
    grid = lebedev(points)
    assert grid.has_negative_weights
    with pytest.raises(ValueError, match=f"Lebedev {points} has negative ones; take 50, 86"):
        grid.require_positive_weights("MARA")
    lebedev(86).require_positive_weights("MARA")


def test_make_grid():
    assert make_grid(EquiangularGrid()).name == "equiangular 4 x 8"
    assert make_grid(EquiangularGrid(poles=False)).name == "equiangular 4 x 8 without poles"
    assert make_grid(GaussLegendreGrid(num_lat=3, num_lon=6)).num_points == 18
    assert make_grid(LebedevGrid(num_points=26)).degree == 7
    assert make_grid(SphericalDesign(degree=6)).degree == 7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lebedev(51), "no Lebedev rule with 51 points; take one of 6, 14"),
        (lambda: equiangular(1, 4), "at least 2 latitudes"),
        (lambda: equiangular(0, 4, poles=False), "at least 1 latitude"),
        (lambda: gauss_legendre(0, 4), "at least 1 latitude"),
        (lambda: design(40), "no stored spherical design has degree 40"),
        (lambda: make_grid("lebedev"), "not a section"),
    ],
)
def test_mistakes_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()
