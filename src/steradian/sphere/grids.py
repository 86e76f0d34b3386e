"""Points and quadrature weights on the unit sphere.

A rule of degree t integrates every polynomial of degree at most t over the sphere to rounding. Coordinates and weights
are float64; callers cast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from steradian.config import EquiangularGrid, GaussLegendreGrid, LebedevGrid, SphericalDesign
from steradian.sphere.designs import design_points

__all__ = ["SphereGrid", "design", "equiangular", "gauss_legendre", "lebedev", "make_grid"]

#: Points of each Lebedev rule and its degree (Lebedev and Laikov 1999), as scipy.integrate.lebedev_rule counts them.
LEBEDEV_DEGREES = {
    6: 3, 14: 5, 26: 7, 38: 9, 50: 11, 74: 13, 86: 15, 110: 17, 146: 19, 170: 21, 194: 23, 230: 25, 266: 27, 302: 29,
    350: 31, 434: 35, 590: 41, 770: 47, 974: 53, 1202: 59, 1454: 65, 1730: 71, 2030: 77, 2354: 83, 2702: 89, 3074: 95,
    3470: 101, 3890: 107, 4334: 113, 4802: 119, 5294: 125, 5810: 131,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class SphereGrid:
    """A quadrature rule on the unit sphere.

    Attributes:
        points: ``[K, 3]`` unit vectors, float64.
        weights: ``[K]`` quadrature weights, float64, summing to 4 pi.
        degree: highest degree of polynomials that are integrated exactly.
        kind: family of the rule: ``equiangular``, ``gauss_legendre``, ``lebedev`` or ``design``.
        name: for tables and messages, such as ``equiangular 4 x 8``.
        shape: (latitudes, longitudes) of a product grid, latitude first; None for the others.
    """

    points: Tensor
    weights: Tensor
    degree: int
    kind: str
    name: str
    shape: tuple[int, int] | None = None

    @property
    def num_points(self) -> int:
        """K."""
        return self.points.shape[0]

    @property
    def has_negative_weights(self) -> bool:
        return bool((self.weights < 0).any())

    def require_positive_weights(self, user: str) -> None:
        """Refuse a rule that cannot carry a softmax, which needs the logarithm of every weight.

        Raises:
            ValueError: a weight is not positive.
        """
        if bool((self.weights <= 0).any()):
            better = "; take 50, 86, 110 or 194 points" if self.kind == "lebedev" else "; take another rule"
            raise ValueError(f"{user} needs positive weights, but {self.name} has negative ones{better}")


def _product_grid(cosines: np.ndarray, latitude_weights: np.ndarray, num_lon: int) -> tuple[Tensor, Tensor]:
    """Latitudes times equidistant longitudes from 0; the point (latitude t, longitude p) has index t * num_lon + p."""
    longitudes = 2 * math.pi * np.arange(num_lon) / num_lon
    sines = np.sqrt(np.clip((1 - cosines) * (1 + cosines), 0, None))
    points = np.stack(
        [
            np.outer(sines, np.cos(longitudes)),
            np.outer(sines, np.sin(longitudes)),
            np.repeat(cosines[:, None], num_lon, axis=1),
        ],
        axis=-1,
    ).reshape(-1, 3)
    weights = np.repeat(latitude_weights * (2 * math.pi / num_lon), num_lon)
    return torch.from_numpy(points), torch.from_numpy(weights)


def equiangular(num_lat: int = 4, num_lon: int = 8, *, poles: bool = True) -> SphereGrid:
    """Equidistant latitudes and longitudes.

    With ``poles=True`` (the convention of torch-harmonics' "equiangular", so that of the paper) the first and the last
    latitude are the poles, each held by ``num_lon`` coinciding points, and the weights are Clenshaw and Curtis's. With
    ``poles=False`` latitudes sit in the middle of equal cells, pi (t + 1/2) / num_lat, with Fejér's first rule.
    The first point is the north pole, or the latitude next to it; longitudes start on the x axis.

    Raises:
        ValueError: fewer than two latitudes with poles, or fewer than one of anything.
    """
    if num_lon < 1 or num_lat < (2 if poles else 1):
        least = "at least 2 latitudes (the poles)" if poles else "at least 1 latitude"
        raise ValueError(f"an equiangular grid needs {least} and 1 longitude, not {num_lat} x {num_lon}")
    if poles:
        colatitudes = math.pi * np.arange(num_lat) / (num_lat - 1)
    else:
        colatitudes = math.pi * (np.arange(num_lat) + 0.5) / num_lat
    # exactly symmetric cosines: cos(pi/2) must be 0 and the poles must be +-1
    cosines = 0.5 * (np.cos(colatitudes) - np.cos(colatitudes)[::-1])
    moments = np.zeros(num_lat)
    moments[::2] = [2 / (1 - order**2) for order in range(0, num_lat, 2)]
    chebyshev = np.cos(np.outer(np.arange(num_lat), colatitudes))
    latitude_weights = np.linalg.solve(chebyshev, moments)
    points, weights = _product_grid(cosines, 0.5 * (latitude_weights + latitude_weights[::-1]), num_lon)
    latitude_degree = num_lat if num_lat % 2 else num_lat - 1
    only_poles = poles and num_lat == 2
    return SphereGrid(
        points,
        weights,
        degree=latitude_degree if only_poles else min(latitude_degree, num_lon - 1),
        kind="equiangular",
        name=f"equiangular {num_lat} x {num_lon}" + ("" if poles else " without poles"),
        shape=(num_lat, num_lon),
    )


def gauss_legendre(num_lat: int = 4, num_lon: int = 8) -> SphereGrid:
    """Gauss-Legendre latitudes (no poles, north first) times equidistant longitudes.

    Raises:
        ValueError: fewer than one latitude or longitude.
    """
    if num_lat < 1 or num_lon < 1:
        raise ValueError(f"a Gauss-Legendre grid needs at least 1 latitude and 1 longitude, not {num_lat} x {num_lon}")
    cosines, latitude_weights = np.polynomial.legendre.leggauss(num_lat)
    points, weights = _product_grid(cosines[::-1].copy(), latitude_weights[::-1].copy(), num_lon)
    name = f"Gauss-Legendre {num_lat} x {num_lon}"
    degree = min(2 * num_lat - 1, num_lon - 1)
    return SphereGrid(points, weights, degree, "gauss_legendre", name, shape=(num_lat, num_lon))


def lebedev(num_points: int = 50) -> SphereGrid:
    """Lebedev's rule with that many points: full octahedral symmetry, so points on the axes.

    The rules with 74, 230 and 266 points have negative weights: fine for sums, refused by a softmax.

    Raises:
        ValueError: there is no such rule.
    """
    if num_points not in LEBEDEV_DEGREES:
        known = ", ".join(str(points) for points in LEBEDEV_DEGREES if points <= 434)
        raise ValueError(f"there is no Lebedev rule with {num_points} points; take one of {known}, ...")
    from scipy.integrate import lebedev_rule  # slow to import, so only where it is used

    degree = LEBEDEV_DEGREES[num_points]
    points, weights = lebedev_rule(degree)
    weights = weights * (4 * math.pi / weights.sum())
    return SphereGrid(
        torch.from_numpy(np.ascontiguousarray(points.T)),
        torch.from_numpy(np.ascontiguousarray(weights)),
        degree,
        "lebedev",
        f"Lebedev {num_points}",
    )


def design(degree: int = 5) -> SphereGrid:
    """The smallest stored spherical design (equal weights) of at least this degree.

    Raises:
        ValueError: no stored design is exact to that degree.
    """
    points, exact_degree = design_points(degree)
    num_points = len(points)
    weights = torch.full((num_points,), 4 * math.pi / num_points, dtype=torch.float64)
    name = f"spherical {exact_degree}-design of {num_points} points"
    return SphereGrid(torch.from_numpy(points), weights, exact_degree, "design", name)


def make_grid(config: EquiangularGrid | GaussLegendreGrid | LebedevGrid | SphericalDesign) -> SphereGrid:
    """The rule that a configuration section describes.

    Raises:
        ValueError: the section names a rule that does not exist.
    """
    match config:
        case EquiangularGrid():
            return equiangular(config.num_lat, config.num_lon, poles=config.poles)
        case GaussLegendreGrid():
            return gauss_legendre(config.num_lat, config.num_lon)
        case LebedevGrid():
            return lebedev(config.num_points)
        case SphericalDesign():
            return design(config.degree)
    raise ValueError(f"'{type(config).__name__}' is not a section that describes a sphere grid")
