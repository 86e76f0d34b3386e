"""Whether a prepared step may be used: the same results as the potential, and still the same potential."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from steradian.compiler.checked import OF_GRADIENTS, MismatchError, allowed, require_equal
from steradian.equivariant.symmetric_contraction import SymmetricContraction
from steradian.graph import Prediction
from steradian.potential import Potential
from steradian.precision import PrecisionPolicy

__all__ = ["MismatchError", "check_gradients", "check_loss", "check_prediction", "tolerance", "weights_state"]


def tolerance(policy: PrecisionPolicy) -> float:
    """Largest difference, relative to the largest number, that is allowed to a prepared step."""
    formats = [policy.weights, policy.radial, policy.messages, policy.paths, policy.node, policy.attention]
    narrow = policy.tf32 or policy.int8 or any(dtype.itemsize < 4 for dtype in formats)
    return allowed("prepared step", "narrow" if narrow else policy.weights)


def check_prediction(found: Prediction, expected: Prediction, policy: PrecisionPolicy) -> None:
    """Compare energies, forces and stresses.

    Raises:
        MismatchError: they differ; the message says by how much.
    """
    for name in ("interaction_energy", "forces", "stress"):
        value, truth = getattr(found, name), getattr(expected, name)
        if truth is not None:
            require_equal(name.replace("_", " "), value, truth, tolerance(policy), floor=1e-3)


def check_loss(found: Tensor, expected: Tensor, policy: PrecisionPolicy) -> None:
    """Compare two losses ``[]``.

    Raises:
        MismatchError: they differ.
    """
    bound = OF_GRADIENTS["prepared step"] * tolerance(policy)
    require_equal("the loss", found.reshape(1), expected.reshape(1), bound, floor=1e-6)


def check_gradients(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], policy: PrecisionPolicy) -> None:
    """Compare the gradients of all weights, relative to the largest of them.

    Raises:
        MismatchError: they differ.
    """
    if [value is None for value in found] != [value is None for value in expected]:
        raise MismatchError("other weights have gradients")
    given = [value.double().flatten() for value in found if value is not None]
    truth = [value.double().flatten() for value in expected if value is not None]
    if truth:
        bound = OF_GRADIENTS["prepared step"] * tolerance(policy)
        require_equal("gradients", torch.cat(given), torch.cat(truth), bound, floor=1e-12)


def weights_state(potential: Potential) -> Hashable:
    """What a prepared step depends on besides the numbers of weights that are trained; compared before every call.

    Weights that take no gradient may have been folded into constants, so their versions count.
    """
    weights = tuple(
        (weight.data_ptr(), weight.dtype, weight.requires_grad or weight._version)
        for weight in (*potential.parameters(), *potential.buffers())
    )
    orders = tuple(module.order for module in potential.modules() if isinstance(module, SymmetricContraction))
    return weights, orders, potential.training, potential.policy.name, potential.radial_table_error, potential.device
