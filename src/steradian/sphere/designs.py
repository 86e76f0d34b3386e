"""Spherical designs: points of equal weight that integrate polynomials up to a degree exactly.

Small ones are regular solids. The others are unions of orbits of the rotation group of the cube (O) or tetrahedron (T),
so that only a few base points are stored. Those were found by solving for zero harmonic sums up to the degree; the
designs have as many points as the best designs known (Hardin and Sloane 1996) or a few more.
"""

from __future__ import annotations

from itertools import permutations, product

import numpy as np

__all__ = ["DESIGN_DEGREES", "design_points"]

_GOLDEN = (1 + 5**0.5) / 2


def _icosahedron() -> np.ndarray:
    plane = np.array([[0.0, one, golden * _GOLDEN] for one in (1, -1) for golden in (1, -1)])
    points = np.concatenate([np.roll(plane, shift, axis=1) for shift in range(3)])
    return points / np.linalg.norm(points[0])


_SOLIDS = {
    1: np.array([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]),
    2: np.array([[1.0, 1.0, 1.0], [1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]]) / 3**0.5,
    3: np.concatenate([np.eye(3), -np.eye(3)]),
    5: _icosahedron(),
}

#: degree: (rotation group, base points as longitude and cosine of the colatitude)
_ORBITS: dict[int, tuple[str, list[tuple[float, float]]]] = {
    7: (
        "O",
        [
            (2.0246023094104055, 0.2666354015167048),
        ],
    ),
    8: (
        "T",
        [
            (0.2906059998574371, 0.04452356458542022),
            (-2.1330340747453134, -0.30620001323957025),
            (0.8687173720577421, 0.24352777540919465),
        ],
    ),
    9: (
        "O",
        [
            (-3.0753130659199854, 0.3535421889214722),
            (-0.4035857646082948, 0.639740098619792),
        ],
    ),
    10: (
        "T",
        [
            (-0.6268090153927645, -0.365621190026288),
            (-3.093827709441494, -0.70018101936373),
            (-1.2293226970699893, -0.9332100372395263),
            (-2.86957030353385, -0.9579979399532583),
            (-0.4989324879148074, 0.4518191025552451),
        ],
    ),
    11: (
        "T",
        [
            (0.0722625193584244, 0.8578419715727166),
            (0.6971418591006414, -0.9789132438791773),
            (-1.3150150855302658, 0.8177509691631215),
            (-2.502795752140467, -0.7596125491943567),
            (0.23434739351797315, 0.3615507906068413),
            (-2.350092492165863, 0.34799207547717115),
        ],
    ),
    12: (
        "T",
        [
            (-1.4487274168918767, 0.9830866003885981),
            (-2.3199561819331955, -0.08251387327348399),
            (2.947442303447312, -0.45978619494832745),
            (-0.9437005608048854, 0.736091010112575),
            (-1.4181757918020073, -0.4268621912288651),
            (0.5434213722752282, -0.8979519870221463),
            (0.5570488866211601, 0.6962772781282022),
        ],
    ),
    14: (
        "T",
        [
            (1.2829169669429408, -0.9509324689752743),
            (-1.1903994979772723, 0.7947877196842106),
            (-0.3865789582899491, 0.8918754989401193),
            (1.551520608591528, 0.6632200563032347),
            (2.593803226846462, -0.6466348933170596),
            (-2.776634641909059, 0.9825031344629036),
            (-0.6732187423149176, 0.7267524154880363),
            (0.21127758264110544, 0.4852678362437858),
            (-1.8563308229845206, 0.42969437162987945),
        ],
    ),
    15: (
        "T",
        [
            (-1.834022023867804, 0.4044997179855001),
            (2.414539955480651, -0.168819854151365),
            (2.102554553987929, 0.883037486312545),
            (2.5711897214140027, -0.5220600732161192),
            (-2.98668131277687, -0.9733017278224524),
            (0.2894532745276134, -0.8561947500017659),
            (-2.141199258970686, -0.5220600732161192),
            (1.8602496013225096, -0.8561947500017653),
            (1.799713609915527, -0.03541466588470015),
            (1.822998431265296, 0.7364129195682954),
        ],
    ),
}

#: Degrees for which a design is stored.
DESIGN_DEGREES = tuple(sorted([*_SOLIDS, *_ORBITS]))


def _rotations(group: str) -> np.ndarray:
    """``[G, 3, 3]`` signed permutation matrices of determinant 1; for T even permutations only."""
    matrices = [np.diag(signs) @ np.eye(3)[list(order)]
                for order in permutations(range(3)) for signs in product((1.0, -1.0), repeat=3)]  # fmt: skip
    proper = [matrix for matrix in matrices if np.linalg.det(matrix) > 0]
    if group == "T":
        proper = [matrix for matrix in proper if np.linalg.det(np.abs(matrix)) > 0]
    return np.stack(proper)


def design_points(degree: int) -> tuple[np.ndarray, int]:
    """Points ``[K, 3]`` of the smallest stored design of at least this degree, and its exact degree.

    Raises:
        ValueError: no stored design is exact to that degree.
    """
    exact_degree = min((known for known in DESIGN_DEGREES if known >= degree), default=None)
    if exact_degree is None:
        highest = max(DESIGN_DEGREES)
        raise ValueError(f"no stored spherical design has degree {degree} (highest: {highest}); take a Lebedev rule")
    if exact_degree in _SOLIDS:
        return _SOLIDS[exact_degree].copy(), exact_degree
    group, base = _ORBITS[exact_degree]
    longitude, cosine = np.array(base).T
    sine = np.sqrt((1 - cosine) * (1 + cosine))
    points = np.stack([sine * np.cos(longitude), sine * np.sin(longitude), cosine], axis=1)
    return np.einsum("gab,pb->pga", _rotations(group), points).reshape(-1, 3), exact_degree
