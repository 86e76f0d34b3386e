"""Channelwise tensor product of node features and spherical harmonics, weighted by radial weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import cuequivariance as cue
import numpy as np
import torch
from torch import Tensor

from steradian.equivariant.irreps import Degrees, format_degrees, natural_degrees, to_cue
from steradian.graph import Edges
from steradian.graph.topology import Rows
from steradian.polynomials import Operand, Polynomial, Terms, evaluate
from steradian.precision import WithRole, cast

__all__ = [
    "ChannelwiseTensorProduct",
    "PathTable",
    "channelwise_polynomial",
    "gated_polynomial",
    "num_paths",
    "of_channels",
    "with_gate",
]


@dataclass(frozen=True)
class PathTable:
    """The coupling paths of a channelwise product.

    Attributes:
        paths: ``(index of the input irrep, degree of the harmonics, index of the output irrep)`` in the order of the
            radial weights.
        degrees_out: output irreps, one entry each.
        counts: how many paths lead to each output irrep.

    The output ``[N, D_out, C]`` lists for every output irrep its components, and within a component its paths, so that
    the block of an irrep is ``[N, 2 l + 1, paths * C]`` without a copy.
    """

    paths: tuple[tuple[int, int, int], ...]
    degrees_out: Degrees
    counts: tuple[int, ...]

    @property
    def dim(self) -> int:
        return sum(count * (2 * degree + 1) for count, (degree, _) in zip(self.counts, self.degrees_out))


@cache
def channelwise_polynomial(degrees_in: Degrees, l_max: int, degrees_allowed: Degrees) -> tuple[Polynomial, PathTable]:
    """Table of ``sum_ij C_ijk x_i Y_j R_path`` with coefficients normalised so that each path has unit variance.

    Paths come ordered by output irrep, then by input irrep, then by degree of the harmonics.

    Raises:
        ValueError: no path leads to an allowed output.
    """
    found = []
    for index_in, (degree_in, parity_in) in enumerate(degrees_in):
        for degree_y in range(l_max + 1):
            for index_out, (degree_out, parity_out) in enumerate(degrees_allowed):
                triangle = abs(degree_in - degree_y) <= degree_out <= degree_in + degree_y
                if triangle and parity_out == parity_in * (-1) ** degree_y:
                    found.append((index_out, index_in, degree_y))
    if not found:
        raise ValueError(f"no coupling of {format_degrees(degrees_in)} and harmonics up to degree {l_max} leads to "
                         f"{format_degrees(degrees_allowed)}")  # fmt: skip
    found.sort()
    reached = sorted({index_out for index_out, _, _ in found})
    degrees_out = tuple(degrees_allowed[index] for index in reached)
    counts = tuple(sum(entry[0] == index for entry in found) for index in reached)
    starts_in = np.cumsum([0] + [2 * degree + 1 for degree, _ in degrees_in])
    starts_out = np.cumsum([0] + [n * (2 * degree + 1) for n, (degree, _) in zip(counts, degrees_out)])

    indices, outputs, coefficients = [], [], []
    position = dict.fromkeys(reached, 0)
    for path, (index_out, index_in, degree_y) in enumerate(found):
        coupling = _coupling(degrees_in[index_in], degree_y, degrees_allowed[index_out])
        within = position[index_out]
        position[index_out] += 1
        block = reached.index(index_out)
        for i, j, k in zip(*np.nonzero(coupling)):
            indices.append((starts_in[index_in] + i, degree_y**2 + j, path))
            outputs.append(starts_out[block] + k * counts[block] + within)
            coefficients.append(coupling[i, j, k])
    table = PathTable(
        tuple((index_in, degree_y, reached.index(index_out)) for index_out, index_in, degree_y in found),
        degrees_out,
        counts,
    )
    polynomial = Polynomial(
        (
            Operand("features", int(starts_in[-1])),
            Operand("harmonics", (l_max + 1) ** 2, has_channels=False),
            Operand("weights", len(found), read_once=True),
        ),
        Operand("messages", table.dim),
        (Terms((0, 1, 2), np.array(indices), np.array(outputs), np.array(coefficients)),),
        outer=2,
        folds=False,  # weights are shared by the two edges of a pair at most
    )
    return polynomial, table


@cache
def gated_polynomial(polynomial: Polynomial, groups: int, period: int | None) -> Polynomial:
    """A product such as :func:`channelwise_polynomial` with one more factor, a gate.

    Args:
        polynomial: features, harmonics and weights.
        groups: components of the gate: 1, or one per weight.
        period: channels of the gate, where they repeat; None where it has all.

    Raises:
        ValueError: another number of components.
    """
    (terms,) = polynomial.terms
    weight = terms.indices[:, terms.factors.index(2)]
    if groups not in (1, polynomial.inputs[2].dim):
        raise ValueError(f"a gate of {groups} components does not fit {polynomial.inputs[2].dim} weights per message")
    indices = np.concatenate([weight[:, None] if groups > 1 else 0 * weight[:, None], terms.indices], axis=1)
    return Polynomial(
        (Operand("gate", groups, period=period), *polynomial.inputs),
        polynomial.output,
        (Terms((0, *(1 + factor for factor in terms.factors)), indices, terms.outputs, terms.coefficients),),
        outer=None if polynomial.outer is None else 1 + polynomial.outer,
        folds=polynomial.folds,
    )


def with_gate(
    polynomial: Polynomial, given: list[Tensor], gathers: list[Rows | None], gate: Tensor
) -> tuple[Polynomial, list[Tensor], list[Rows | None]]:
    """Polynomial, inputs and gathers of a product whose messages have a gate ``[E, H]`` or ``[E, P, H]``.

    Raises:
        ValueError: heads or groups that do not fit the product.
    """
    gate = gate.unsqueeze(1) if gate.dim() == 2 else gate
    repeats = _repeats(gate, given[0].shape[-1])
    polynomial = gated_polynomial(polynomial, gate.shape[1], gate.shape[2] if repeats else None)
    return polynomial, [gate, *given], [None, *gathers]


def num_paths(degrees_in: Degrees, l_max: int, degrees_allowed: Degrees) -> int:
    """Coupling paths of :class:`ChannelwiseTensorProduct`, the weights of a message per channel."""
    return len(channelwise_polynomial(degrees_in, l_max, degrees_allowed)[1].paths)


def _coupling(irrep_in: tuple[int, int], degree_y: int, irrep_out: tuple[int, int]) -> np.ndarray:
    """``[2 l1 + 1, 2 l2 + 1, 2 l3 + 1]`` coefficients of one path of cuequivariance's descriptor."""
    descriptor = cue.descriptors.channelwise_tensor_product(
        to_cue((irrep_in,)), to_cue((natural_degrees(degree_y)[-1],)), to_cue((irrep_out,))
    ).polynomial
    ((_, table),) = descriptor.operations
    (path,) = table.paths
    return np.asarray(path.coefficients)


class ChannelwiseTensorProduct(WithRole):
    """Gather - product - scatter: ``m_i = sum_j R_ij * (h_j x Y(rhat_ij))``, no parameters of its own.

    Args:
        degrees_in: irreps of the node features.
        l_max: highest degree of the harmonics.
        degrees_allowed: irreps kept of the product.
    """

    role = "messages"
    #: Formats of the sums and of the coefficients (see :mod:`steradian.precision`); None: that of the features.
    accumulate_dtype: torch.dtype | None = None
    tables_dtype: torch.dtype | None = None
    #: Format of the result, that of the map of paths behind it; None: that of the features.
    paths_dtype: torch.dtype | None = None

    def __init__(self, degrees_in: Degrees, l_max: int, degrees_allowed: Degrees) -> None:
        super().__init__()
        self.polynomial, self.table = channelwise_polynomial(degrees_in, l_max, degrees_allowed)

    @property
    def num_paths(self) -> int:
        return len(self.table.paths)

    def forward(self, features: Tensor, edges: Edges, weights: Tensor, gate: Tensor | None = None) -> Tensor:
        """Messages summed at the receivers ``[N, D_out, C]``, each times its gate; in the format of paths.

        Args:
            features: ``[N, D, C]``.
            edges: geometry.
            weights: ``[Q, P, C]`` of pairs, where the edges are sorted into pairs, else ``[E, P, C]``.
            gate: ``[E]``; ``[E, H]``, where channel c belongs to head c modulo H; ``[E, P, H]`` with one for every
                path; or None for ones.
        """
        polynomial = self.polynomial
        harmonics = edges.harmonics[:, : polynomial.inputs[1].dim]
        given = [cast(features, self.low), harmonics, weights]
        gathers: list[Rows | None] = [edges.topology.by_sender, None, None if edges.pairs is None else edges.pairs.rows]
        if gate is not None and gate.dim() == 1:
            given[1] = harmonics * gate.unsqueeze(1)
        elif gate is not None:
            polynomial, given, gathers = with_gate(polynomial, given, gathers, gate)
        if self.accumulate_dtype is not None:
            given = [narrowed(value, self.accumulate_dtype) for value in given]
        stored = self.paths_dtype if self.paths_dtype == torch.bfloat16 else features.dtype
        return evaluate(
            polynomial.rounded(self.tables_dtype),
            given,
            gathers=gathers,
            scatter=edges.topology.by_receiver,
            dtype=stored,
        )


def _repeats(gate: Tensor, num_channels: int) -> bool:
    """Whether a gate ``[..., H]`` has fewer heads than there are channels.

    Raises:
        ValueError: the channels cannot be shared out among the heads.
    """
    heads = gate.shape[-1]
    if num_channels % heads:
        raise ValueError(f"a gate of {heads} heads does not fit {num_channels} channels")
    return heads != num_channels


def of_channels(gate: Tensor, num_channels: int) -> Tensor:
    """``[E, C]`` from a gate ``[E, H]``: channel c belongs to head c modulo H."""
    return gate.repeat(1, num_channels // gate.shape[1]) if _repeats(gate, num_channels) else gate


def narrowed(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The value in a format of sums, unless its own is one of 16 bits, which any sum reads exactly."""
    return value if value.dtype.itemsize < 4 else value.to(dtype)
