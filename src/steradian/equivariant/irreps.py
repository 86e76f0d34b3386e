"""Irreps of O(3) as pairs (degree, parity), in e3nn's notation ``0e + 1o``, for features ``[N, D, C]``.

All irreps of a feature have the same number C of channels, so a list of irreps is just a list of pairs.
"""

from __future__ import annotations

from collections.abc import Iterable

import cuequivariance as cue

__all__ = [
    "Degrees",
    "all_degrees",
    "dim",
    "format_degrees",
    "has_pseudotensors",
    "max_degree",
    "natural_degrees",
    "slices",
    "to_cue",
]

Degrees = tuple[tuple[int, int], ...]


def natural_degrees(l_max: int) -> Degrees:
    """Degrees 0 to l_max with the parity of spherical harmonics: ``0e + 1o + 2e + ...``."""
    return tuple((degree, (-1) ** degree) for degree in range(l_max + 1))


def dim(degrees: Iterable[tuple[int, int]]) -> int:
    """D, the number of components."""
    return sum(2 * degree + 1 for degree, _ in degrees)


def slices(degrees: Iterable[tuple[int, int]]) -> list[slice]:
    """The components of each irrep."""
    out, start = [], 0
    for degree, _ in degrees:
        out.append(slice(start, start + 2 * degree + 1))
        start += 2 * degree + 1
    return out


def format_degrees(degrees: Iterable[tuple[int, int]]) -> str:
    """``((0, 1), (1, -1))`` as ``0e + 1o``."""
    return " + ".join(f"{degree}{'e' if parity == 1 else 'o'}" for degree, parity in degrees)


def to_cue(degrees: Iterable[tuple[int, int]]) -> cue.Irreps:
    """One copy of each irrep, for cuequivariance's descriptors."""
    return cue.Irreps("O3", "+".join(f"1x{degree}{'e' if parity == 1 else 'o'}" for degree, parity in degrees))


def all_degrees(l_max: int) -> Degrees:
    """Degrees 0 to l_max with both parities, the even ones first: ``0e + 1e + 2e + 0o + 1o + 2o``."""
    return tuple((degree, parity) for parity in (1, -1) for degree in range(l_max + 1))


def max_degree(degrees: Iterable[tuple[int, int]]) -> int:
    """The highest degree of a list."""
    return max(degree for degree, _ in degrees)


def has_pseudotensors(degrees: Iterable[tuple[int, int]]) -> bool:
    """Whether an irrep has another parity than the spherical harmonics of its degree."""
    return any(parity != (-1) ** degree for degree, parity in degrees)
