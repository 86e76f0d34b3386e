"""Products of two features with one learned number per coupling path and channel.

``z[i3, f] = sum over paths k[path, f] sum_{m1 m2} C[l1 m1, l2 m2 -> l3 m3] x[i1 m1, f] y[i2 m2, f]`` with the
coefficients of :mod:`steradian.equivariant.harmonics`. The products are formed path by path first (by a polynomial or
a sum over neighbours), and the numbers k multiply last, where everything is a number per atom.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from steradian.equivariant.harmonics import coupling
from steradian.equivariant.irreps import Degrees, all_degrees, dim, has_pseudotensors, max_degree, natural_degrees
from steradian.equivariant.linear import Dense, lecun_normal
from steradian.equivariant.tensor_product import with_gate
from steradian.graph import Edges
from steradian.graph.topology import Rows
from steradian.polynomials import Operand, Polynomial, Terms, evaluate
from steradian.precision import WithRole, cast

__all__ = ["CoupledProduct", "MessagePassing", "Paths", "SelfCoupling", "coupled_degrees", "coupling_paths"]


@dataclass(frozen=True)
class Paths:
    """Coupling paths, ordered by output irrep, then first factor, then second factor.

    Attributes:
        first, second, out: irreps of both factors and of the result.
        entries: ``(i1, i2, i3)``, indices into these lists; every i3 has at least one.
        dim: components of all paths together. An output irrep's block lists its components, and within a component
            its paths, so it can be viewed as ``[N, 2 l + 1, paths, C]``.
    """

    first: Degrees
    second: Degrees
    out: Degrees
    entries: tuple[tuple[int, int, int], ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """How many paths lead to each output irrep."""
        return tuple(sum(i3 == index for _, _, i3 in self.entries) for index in range(len(self.out)))

    @property
    def dim(self) -> int:
        return sum(count * (2 * degree + 1) for count, (degree, _) in zip(self.counts, self.out))


def coupled_degrees(first: Degrees, second: Degrees, highest: int | None = None, pseudotensors: bool = True) -> Degrees:
    """Irreps of a product: up to ``highest`` (None: the higher of both factors), of both parities where asked for.

    Without pseudotensors in the factors none can arise if one of the three highest degrees is 0; then there are none in
    the result either.

    Raises:
        ValueError: a degree above the sum of the factors' degrees.
    """
    l1, l2 = max_degree(first), max_degree(second)
    l3 = max(l1, l2) if highest is None else highest
    if l3 > l1 + l2:
        raise ValueError(f"degree {l3} cannot be reached from degrees up to {l1} and {l2}")
    none_arise = 0 in (l1, l2, l3) and not has_pseudotensors(first) and not has_pseudotensors(second)
    return all_degrees(l3) if pseudotensors and not none_arise else natural_degrees(l3)


@cache
def coupling_paths(first: Degrees, second: Degrees, out: Degrees) -> Paths:
    """All paths that triangle rule and parity allow; irreps of ``out`` that no path reaches are left out."""
    entries = []
    for i3, (l3, p3) in enumerate(out):
        for i1, (l1, p1) in enumerate(first):
            for i2, (l2, p2) in enumerate(second):
                if abs(l1 - l2) <= l3 <= l1 + l2 and p3 == p1 * p2:
                    entries.append((i1, i2, i3))
    reached = sorted({i3 for _, _, i3 in entries})
    renumbered = tuple((i1, i2, reached.index(i3)) for i1, i2, i3 in entries)
    return Paths(first, second, tuple(out[index] for index in reached), renumbered)


def _path_table(paths: Paths) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``(component of x, component of y, path)`` of every term, component of the output, and coefficient."""
    starts = [np.cumsum([0] + [2 * degree + 1 for degree, _ in degrees]) for degrees in (paths.first, paths.second)]
    counts = paths.counts
    blocks = np.cumsum([0] + [n * (2 * degree + 1) for n, (degree, _) in zip(counts, paths.out)])
    seen = [0] * len(paths.out)
    indices, outputs, coefficients = [], [], []
    for number, (i1, i2, i3) in enumerate(paths.entries):
        table = coupling(paths.first[i1][0], paths.second[i2][0], paths.out[i3][0])
        for a, b, c in zip(*np.nonzero(table)):
            indices.append((starts[0][i1] + a, starts[1][i2] + b, number))
            outputs.append(blocks[i3] + c * counts[i3] + seen[i3])
            coefficients.append(table[a, b, c])
        seen[i3] += 1
    return np.array(indices), np.array(outputs), np.array(coefficients)


@cache
def _product_polynomial(paths: Paths) -> Polynomial:
    indices, outputs, coefficients = _path_table(paths)
    return Polynomial(
        (Operand("first", dim(paths.first)), Operand("second", dim(paths.second))),
        Operand("products", paths.dim),
        (Terms((0, 1), indices[:, :2], outputs, coefficients),),
    )


@cache
def _message_polynomial(paths: Paths) -> Polynomial:
    """Neighbour's features, harmonics ("component" normalisation) and one radial weight per degree of the harmonics."""
    indices, outputs, coefficients = _path_table(paths)
    degree_of = np.array([paths.first[i1][0] for i1, _, _ in paths.entries])[indices[:, 2]]
    columns = np.stack([indices[:, 1], indices[:, 0], degree_of], axis=1)
    return Polynomial(
        (
            Operand("features", dim(paths.second)),
            Operand("harmonics", dim(paths.first), has_channels=False),
            Operand("weights", len(paths.first)),
        ),
        Operand("messages", paths.dim),
        (Terms((0, 1, 2), columns, outputs, coefficients / np.sqrt(2 * degree_of + 1)),),
        outer=2,
    )


class PathWeights(nn.Module):
    """The learned number of every path and channel, ``[P, C]``; applied to products ``[N, paths.dim, C]``.

    The start has variance 1 / (paths into the same irrep). ``learned=False``: every number is one, no parameters.
    """

    def __init__(self, paths: Paths, num_channels: int, *, learned: bool = True) -> None:
        super().__init__()
        self.paths, self.counts = paths, paths.counts
        blocks = [lecun_normal((count, num_channels), count) for count in paths.counts]
        self.kernel = nn.Parameter(torch.cat(blocks)) if learned else None

    def forward(self, products: Tensor) -> Tensor:
        """``[N, paths.dim, C] -> [N, D, C]`` with the irreps ``paths.out``."""
        sizes = [count * (2 * degree + 1) for count, (degree, _) in zip(self.counts, self.paths.out)]
        kernels = [None] * len(sizes) if self.kernel is None else self.kernel.split(list(self.counts))
        out = []
        for part, kernel, count, (degree, _) in zip(products.split(sizes, 1), kernels, self.counts, self.paths.out):
            by_path = part.unflatten(1, (2 * degree + 1, count))
            out.append((by_path if kernel is None else by_path * kernel).sum(2))
        return out[0] if len(out) == 1 else torch.cat(out, dim=1)


class CoupledProduct(nn.Module):
    """Product of two features of the same atoms, ``[N, D1, C], [N, D2, C] -> [N, D3, C]``."""

    def __init__(self, first: Degrees, second: Degrees, out: Degrees, num_channels: int, *, learned: bool = True):
        super().__init__()
        self.paths = coupling_paths(first, second, out)
        self.degrees_out = self.paths.out
        self.weights = PathWeights(self.paths, num_channels, learned=learned)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.weights(evaluate(_product_polynomial(self.paths), [first, second]))

    def of_pairs(self, pairs: Tensor) -> Tensor:
        """The same, linear in ``pairs [N, D1, D2, C]``, such as a sum of products over a grid."""
        matrix = _pair_tensor(self.paths, pairs.dtype, pairs.device)
        return self.weights(torch.matmul(matrix, pairs.flatten(1, 2)))


@cache
def _pair_matrix(paths: Paths) -> np.ndarray:
    indices, outputs, coefficients = _path_table(paths)
    matrix = np.zeros((paths.dim, dim(paths.first) * dim(paths.second)))
    np.add.at(matrix, (outputs, indices[:, 0] * dim(paths.second) + indices[:, 1]), coefficients)
    return matrix


@cache
def _pair_tensor(paths: Paths, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.as_tensor(_pair_matrix(paths), dtype=dtype, device=device)


class SelfCoupling(nn.Module):
    """A dense layer to twice the channels, whose halves are multiplied: ``[N, D, C] -> [N, D', C]``."""

    def __init__(self, degrees: Degrees, num_channels: int, highest: int | None = None, pseudotensors: bool = True):
        super().__init__()
        out = coupled_degrees(degrees, degrees, max_degree(degrees) if highest is None else highest, pseudotensors)
        self.dense = Dense(degrees, num_channels, 2 * num_channels)
        self.product = CoupledProduct(degrees, degrees, out, num_channels)
        self.degrees_out = self.product.degrees_out

    def forward(self, features: Tensor) -> Tensor:
        return self.product(*self.dense(features).chunk(2, dim=-1))


class MessagePassing(WithRole):
    """Sum over neighbours of the product of a filter and the neighbour's features.

    The filter is ``Y_lm(direction) R_l(r)``: harmonics whose squares sum to one, times a linear map (no bias) of the
    radial basis for every degree l and channel.

    Args:
        degrees: irreps of the neighbours' features.
        l_max: highest degree of the filter.
        num_radial, num_channels: R, C.
        highest, pseudotensors: of the result; see :func:`coupled_degrees`.
        divisor: what the sum is divided by; as published by nothing.
        learned_gain: a learned factor on the sum, 1 at the start.
    """

    role = "radial"

    def __init__(
        self,
        degrees: Degrees,
        l_max: int,
        num_radial: int,
        num_channels: int,
        highest: int | None = None,
        pseudotensors: bool = True,
        *,
        divisor: float = 1.0,
        learned_gain: bool = False,
    ) -> None:
        super().__init__()
        harmonics = natural_degrees(l_max)
        self.paths = coupling_paths(harmonics, degrees, coupled_degrees(harmonics, degrees, highest, pseudotensors))
        self.degrees_out = self.paths.out
        self.num_channels, self.l_max = num_channels, l_max
        self.filter = nn.Parameter(lecun_normal((l_max + 1, num_radial, num_channels), num_radial))
        self.weights = PathWeights(self.paths, num_channels)
        self.divisor = divisor
        self.message_gain = nn.Parameter(torch.ones(())) if learned_gain else None

    def forward(self, features: Tensor, edges: Edges, gate: Tensor | None = None) -> Tensor:
        """Messages ``[N, D', C]``, each times its gate; edges carry basis times envelope.

        Args:
            features: ``[N, D, C]``.
            edges: geometry.
            gate: ``[E]``, ``[E, H]`` or ``[E, l_max + 1, H]`` (channel c belongs to head c modulo H), or None for ones.
        """
        polynomial, radial = _message_polynomial(self.paths), edges.radial
        if gate is not None and gate.dim() == 1:
            radial, gate = radial * gate.unsqueeze(-1), None
        weights = cast(radial, self.low) @ cast(self._filters(), self.low)  # [E, (l_max + 1) C]
        harmonics = edges.harmonics[:, : (self.l_max + 1) ** 2]
        given = [features, harmonics, weights.unflatten(1, (self.l_max + 1, -1))]
        gathers: list[Rows | None] = [edges.topology.by_sender, None, None]
        if gate is not None:
            polynomial, given, gathers = with_gate(polynomial, given, gathers, gate)
        return self.weights(evaluate(polynomial, given, gathers=gathers, scatter=edges.topology.by_receiver))

    def _filters(self) -> Tensor:
        """``[R, (l_max + 1) C]``, over the divisor: few numbers, and messages are linear in them."""
        filters = self.filter.transpose(0, 1).flatten(1)
        if self.divisor != 1.0:
            filters = filters / self.divisor
        return filters if self.message_gain is None else filters * self.message_gain
