"""The symmetric contraction of MACE: products of a feature with itself, coupled to irreps, weighted per element.

The published basis of couplings is redundant: of its paths only those independent after symmetrisation over the
repeated factor matter. For l_max = 3, correlation 3 and outputs ``0e + 1o`` the published form has 86 weights per
element and channel; the polynomial depends on 29 numbers, which are the parameters here. So parameter counts differ
from mace-torch's while the functions that can be represented are the same.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import factorial

import cuequivariance as cue
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from steradian.equivariant.irreps import Degrees, dim, to_cue
from steradian.graph.topology import Rows
from steradian.polynomials import Operand, Polynomial, Terms, evaluate
from steradian.precision import WithRole, cast

__all__ = ["SymmetricContraction", "contraction_polynomial", "published_path_count"]


@cache
def contraction_polynomial(degrees_in: Degrees, degrees_out: Degrees, correlation: int) -> Polynomial:
    """Table ``(weights [N, P, C], features [N, D, C]) -> [N, D_out, C]`` from cuequivariance's descriptor."""
    descriptor = cue.descriptors.symmetric_contraction(
        to_cue(degrees_in), to_cue(degrees_out), tuple(range(1, correlation + 1))
    ).polynomial
    groups = []
    num_weights = descriptor.inputs[0].size
    for _, table in descriptor.operations:
        order = table.num_operands - 2
        if not table.num_paths:
            continue
        indices = np.array([path.indices for path in table.paths])
        coefficients = np.array([float(path.coefficients) for path in table.paths])
        # x_i x_j and x_j x_i are one monomial: keep each once
        indices[:, 1 : order + 1] = np.sort(indices[:, 1 : order + 1], axis=1)
        unique, inverse = np.unique(indices, axis=0, return_inverse=True)
        merged = np.zeros(len(unique))
        # NumPy 2.0 gives the inverse an axis more than other releases
        np.add.at(merged, inverse.reshape(-1), coefficients)
        groups.append(Terms((0,) + (1,) * order, unique[:, : order + 1], unique[:, -1], merged))
    return Polynomial(
        (Operand("weights", num_weights), Operand("features", dim(degrees_in))),
        Operand("contracted", dim(degrees_out)),
        tuple(groups),
        outer=0,
    )


def published_path_count(degrees_in: Degrees, irrep_out: tuple[int, int], order: int) -> int:
    """How many couplings of ``order`` copies of the input to one irrep the published (unsymmetrised) basis has."""
    multiplicity = {irrep: 1 for irrep in degrees_in}
    for _ in range(order - 1):
        product: dict[tuple[int, int], int] = {}
        for (left, left_parity), count in multiplicity.items():
            for right, right_parity in degrees_in:
                for degree in range(abs(left - right), left + right + 1):
                    key = (degree, left_parity * right_parity)
                    product[key] = product.get(key, 0) + count
        multiplicity = product
    return multiplicity.get(irrep_out, 0)


def _initial_scales(polynomial: Polynomial, degrees_in: Degrees, degrees_out: Degrees) -> np.ndarray:
    """``[P, P]`` lower-triangular map from normal numbers to weights with the published distribution of outputs.

    The published weights are normal with deviation 1/(number of paths) on orthonormal couplings. Symmetrisation
    projects those onto the symmetric ones, so in any orthonormal basis of these the weights are again independent with
    the same deviation. The Gram matrix of the descriptor's basis gives the change of basis.
    """
    num_weights = polynomial.inputs[0].dim
    scales = np.zeros((num_weights, num_weights))
    bounds = np.cumsum([0] + [2 * degree + 1 for degree, _ in degrees_out])
    for group in polynomial.terms:
        order = len(group.factors) - 1
        monomials, of_term = np.unique(group.indices[:, 1:], axis=0, return_inverse=True)
        # how often a monomial stands in the symmetric tensor: x_i x_j twice, x_i x_i once
        repeats = [factorial(order) // np.prod([factorial(n) for n in np.unique(row, return_counts=True)[1]])
                   for row in monomials]  # fmt: skip
        for index, irrep in enumerate(degrees_out):
            inside = (group.outputs >= bounds[index]) & (group.outputs < bounds[index + 1])
            weights = np.unique(group.indices[inside, 0])
            if not len(weights):
                continue
            tensor = np.zeros((len(weights), polynomial.output.dim, len(monomials)))
            place = np.searchsorted(weights, group.indices[inside, 0])
            np.add.at(tensor, (place, group.outputs[inside], of_term.reshape(-1)[inside]), group.coefficients[inside])
            # n equal entries c / n add c^2 / n to the norm; all 2 l + 1 components of an irrep have the same
            flat = (tensor / np.sqrt(repeats)).reshape(len(weights), -1)
            gram = flat @ flat.T / (2 * irrep[0] + 1)
            change = np.linalg.inv(np.linalg.cholesky(gram)).T  # columns: orthonormal combinations
            scales[np.ix_(weights, weights)] += change / published_path_count(degrees_in, irrep, order)
    return scales


class SymmetricContraction(WithRole):
    """``B = sum_p w[element, p] U_p(A, ..., A)`` up to a given correlation (Batatia et al. 2022, equation 10).

    Args:
        degrees_in: irreps of the atomic basis A.
        degrees_out: irreps of the result.
        correlation: highest number of factors.
        num_elements: Z.
        num_channels: C.

    The weight is ``[Z, P, C]``, P the number of independent couplings.
    """

    role = "contraction"
    #: Highest number of factors that takes part at present (see :mod:`steradian.training.optimisation`).
    order: int
    #: Format of the coefficients (see :mod:`steradian.precision`); None: that of the features.
    tables_dtype: torch.dtype | None = None

    def __init__(
        self, degrees_in: Degrees, degrees_out: Degrees, correlation: int, num_elements: int, num_channels: int
    ) -> None:
        super().__init__()
        self.correlation = self.order = correlation
        self.polynomial = contraction_polynomial(degrees_in, degrees_out, correlation)
        scales = torch.as_tensor(
            _initial_scales(self.polynomial, degrees_in, degrees_out), dtype=torch.get_default_dtype()
        )
        normal = torch.randn(num_elements, self.polynomial.inputs[0].dim, num_channels)
        self.weight = nn.Parameter(torch.einsum("pq,zqc->zpc", scales, normal))

    def forward(self, features: Tensor, species: Rows | Tensor) -> Tensor:
        """``[N, D, C] -> [N, D_out, C]``; species ``[N]`` indexes the table of elements."""
        given = [cast(self.weight, self.low), cast(features, self.low)]
        polynomial = self.polynomial if self.order >= self.correlation else _truncated(self.polynomial, self.order)
        out = evaluate(polynomial.rounded(self.tables_dtype), given, gathers=[species, None], folded=self.folded)
        return out.to(features.dtype)

    @torch.no_grad()
    def clear_orders_above(self, order: int) -> None:
        """Put the weights of terms with more factors to zero."""
        weight = self.weight.clone()
        for group in self.polynomial.terms:
            if len(group.factors) - 1 > order:
                weight[:, torch.as_tensor(np.unique(group.indices[:, 0]))] = 0.0
        # behind element tables of low rank the weight is computed: it can be assigned, not changed in place
        if parametrize.is_parametrized(self, "weight"):
            self.weight = weight  # type: ignore[assignment]
        else:
            self.weight.copy_(weight)


@cache
def _truncated(polynomial: Polynomial, order: int) -> Polynomial:
    """The terms of a contraction with at most so many factors, on the same weights."""
    return replace(polynomial, terms=tuple(group for group in polynomial.terms if len(group.factors) - 1 <= order))
