"""Points and quadrature weights on the unit sphere.

A rule of degree t integrates every polynomial of degree at most t over the sphere to rounding. Coordinates and weights
are float64; callers cast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
import torch
from torch import Tensor

from steradian.config import EquiangularGrid, GaussLegendreGrid, LebedevGrid, SphericalDesign

__all__ = ["DESIGN_DEGREES", "SphereGrid", "design", "equiangular", "gauss_legendre", "lebedev", "make_grid"]

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


# ----------------------------------------------------------------------------------------------------------- designs

_GOLDEN = (1 + 5**0.5) / 2
_ICOSAHEDRON = (
    np.array([[0.0, one, golden * _GOLDEN] for one in (1, -1) for golden in (1, -1)]) / (1 + _GOLDEN**2) ** 0.5
)
_SOLIDS = {
    1: np.array([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]),
    2: np.array([[1.0, 1.0, 1.0], [1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]]) / 3**0.5,
    3: np.concatenate([np.eye(3), -np.eye(3)]),
    5: np.concatenate([np.roll(_ICOSAHEDRON, shift, axis=1) for shift in range(3)]),
}
#: degree: (rotation group, base points as longitude and cosine of the colatitude)
_ORBITS: dict[int, tuple[str, list[tuple[float, float]]]] = {
    7: ("O", [(2.0246023094104055, 0.2666354015167048)]),
    8: ("T", [
        (0.2906059998574371, 0.04452356458542022), (-2.1330340747453134, -0.30620001323957025),
        (0.8687173720577421, 0.24352777540919465),
    ]),
    9: ("O", [(-3.0753130659199854, 0.3535421889214722), (-0.4035857646082948, 0.639740098619792)]),
    10: ("T", [
        (-0.6268090153927645, -0.365621190026288), (-3.093827709441494, -0.70018101936373),
        (-1.2293226970699893, -0.9332100372395263), (-2.86957030353385, -0.9579979399532583),
        (-0.4989324879148074, 0.4518191025552451),
    ]),
    11: ("T", [
        (0.0722625193584244, 0.8578419715727166), (0.6971418591006414, -0.9789132438791773),
        (-1.3150150855302658, 0.8177509691631215), (-2.502795752140467, -0.7596125491943567),
        (0.23434739351797315, 0.3615507906068413), (-2.350092492165863, 0.34799207547717115),
    ]),
    12: ("T", [
        (-1.4487274168918767, 0.9830866003885981), (-2.3199561819331955, -0.08251387327348399),
        (2.947442303447312, -0.45978619494832745), (-0.9437005608048854, 0.736091010112575),
        (-1.4181757918020073, -0.4268621912288651), (0.5434213722752282, -0.8979519870221463),
        (0.5570488866211601, 0.6962772781282022),
    ]),
    14: ("T", [
        (1.2829169669429408, -0.9509324689752743), (-1.1903994979772723, 0.7947877196842106),
        (-0.3865789582899491, 0.8918754989401193), (1.551520608591528, 0.6632200563032347),
        (2.593803226846462, -0.6466348933170596), (-2.776634641909059, 0.9825031344629036),
        (-0.6732187423149176, 0.7267524154880363), (0.21127758264110544, 0.4852678362437858),
        (-1.8563308229845206, 0.42969437162987945),
    ]),
    15: ("T", [
        (-1.834022023867804, 0.4044997179855001), (2.414539955480651, -0.168819854151365),
        (2.102554553987929, 0.883037486312545), (2.5711897214140027, -0.5220600732161192),
        (-2.98668131277687, -0.9733017278224524), (0.2894532745276134, -0.8561947500017659),
        (-2.141199258970686, -0.5220600732161192), (1.8602496013225096, -0.8561947500017653),
        (1.799713609915527, -0.03541466588470015), (1.822998431265296, 0.7364129195682954),
    ]),
}  # fmt: skip
#: Degrees for which a design is stored.
DESIGN_DEGREES = tuple(sorted([*_SOLIDS, *_ORBITS]))


def design(degree: int = 5) -> SphereGrid:
    """The smallest stored spherical design (points of equal weight) of at least this degree.

    Small ones are regular solids. The others are unions of orbits of the rotation group of the cube (O) or tetrahedron
    (T), so that only a few base points are stored. Those were found by solving for zero harmonic sums up to the degree;
    the designs have as many points as the best designs known (Hardin and Sloane 1996) or a few more.

    Raises:
        ValueError: no stored design is exact to that degree.
    """
    exact_degree = min((known for known in DESIGN_DEGREES if known >= degree), default=None)
    if exact_degree is None:
        highest = max(DESIGN_DEGREES)
        raise ValueError(f"no stored spherical design has degree {degree} (highest: {highest}); take a Lebedev rule")
    if exact_degree in _SOLIDS:
        points = _SOLIDS[exact_degree].copy()
    else:
        group, base = _ORBITS[exact_degree]
        longitude, cosine = np.array(base).T
        sine = np.sqrt((1 - cosine) * (1 + cosine))
        points = np.stack([sine * np.cos(longitude), sine * np.sin(longitude), cosine], axis=1)
        points = np.einsum("gab,pb->pga", _rotations(group), points).reshape(-1, 3)
    weights = torch.full((len(points),), 4 * math.pi / len(points), dtype=torch.float64)
    name = f"spherical {exact_degree}-design of {len(points)} points"
    return SphereGrid(torch.from_numpy(points), weights, exact_degree, "design", name)


def _rotations(group: str) -> np.ndarray:
    """``[G, 3, 3]`` signed permutation matrices of determinant 1; for T even permutations only."""
    matrices = [np.diag(signs) @ np.eye(3)[list(order)]
                for order in permutations(range(3)) for signs in product((1.0, -1.0), repeat=3)]  # fmt: skip
    proper = [matrix for matrix in matrices if np.linalg.det(matrix) > 0]
    if group == "T":
        proper = [matrix for matrix in proper if np.linalg.det(np.abs(matrix)) > 0]
    return np.stack(proper)


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
