"""Polynomials by NVIDIA's cuEquivariance: the same tables as segmented polynomials of one mode, the channels.

``cuequivariance-torch`` brings the descriptors and a plain method (``naive``, used in tests on a CPU),
``cuequivariance-ops-torch-cu12`` the kernels (``uniform_1d``), which gather, multiply and scatter in one pass and
give derivatives of any order. How they add up what is scattered is not documented, so this backend is not used under
``torch.use_deterministic_algorithms``.
"""

from __future__ import annotations

import cuequivariance as cue
import torch
from torch import Tensor, nn

from steradian.polynomials.polynomial import Operand, Polynomial, Terms
from steradian.polynomials.reference import evaluate_reference

__all__ = ["evaluate_cuequivariance", "segmented"]


def segmented(polynomial: Polynomial, channels: int) -> cue.SegmentedPolynomial:
    """The polynomial as cuEquivariance's: a component is a segment of all channels, so ``[B, dim, C]`` is its layout.

    Args:
        polynomial: the table.
        channels: C; an operand without channels has segments of one number.
    """
    operands = [_operand(operand, channels) for operand in (*polynomial.inputs, polynomial.output)]
    output = len(polynomial.inputs)
    operations = [
        (cue.Operation((*group.factors, output)), _product(polynomial, group, channels))
        for group in polynomial.terms
        if len(group.outputs)
    ]
    return cue.SegmentedPolynomial(operands[:-1], operands[-1:], operations)


def _operand(operand: Operand, channels: int) -> cue.SegmentedOperand:
    if operand.has_channels:
        return cue.SegmentedOperand(ndim=1, segments=[(channels,)] * operand.dim)
    return cue.SegmentedOperand.empty_segments(operand.dim)


def _product(polynomial: Polynomial, group: Terms, channels: int) -> cue.SegmentedTensorProduct:
    used = [*(polynomial.inputs[factor] for factor in group.factors), polynomial.output]
    product = cue.SegmentedTensorProduct.from_subscripts(",".join("u" if one.has_channels else "" for one in used))
    for place, operand in enumerate(used):
        product.set_operand(place, _operand(operand, channels))
    for indices, target, coefficient in zip(group.indices, group.outputs, group.coefficients):
        product.add_path(*(int(index) for index in indices), int(target), c=float(coefficient))
    return product


def evaluate_cuequivariance(
    polynomial: Polynomial,
    inputs: list[Tensor],
    gathers: list[Tensor | None],
    scatter: Tensor | None,
    num_rows: int | None,
    method: str | None = None,
) -> Tensor:
    """See :func:`steradian.polynomials.evaluate`; inputs are of one format, float32 or float64.

    Args:
        polynomial, inputs, gathers, scatter, num_rows: as there.
        method: of cuequivariance_torch; None: ``uniform_1d`` on a GPU, ``naive`` elsewhere.
    """
    channels = next((value.shape[2] for value in inputs if value.ndim == 3), 1)
    work = next((len(index) for index in (*gathers, scatter) if index is not None), inputs[0].shape[0])
    if not work:
        return evaluate_reference(polynomial, inputs, gathers, scatter, num_rows)
    method = method or ("uniform_1d" if inputs[0].is_cuda else "naive")
    module = _module(polynomial, channels, method, inputs[0].dtype, inputs[0].device)
    flat = [value.flatten(1).contiguous() for value in inputs]
    gathered = {place: index for place, index in enumerate(gathers) if index is not None}
    if scatter is None:
        (out,) = module(flat, gathered)
    else:
        # only the shape of the second argument is read
        target = flat[0].new_empty((num_rows or 0, 1))
        (out,) = module(flat, gathered, {0: target}, {0: scatter})
    return out.unflatten(1, (polynomial.output.dim, channels)) if polynomial.output.has_channels else out


def _module(polynomial: Polynomial, channels: int, method: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    def make() -> nn.Module:
        from cuequivariance_torch import SegmentedPolynomial

        found: nn.Module = SegmentedPolynomial(
            segmented(polynomial, channels), method=method, math_dtype=dtype, name="steradian_polynomial"
        )
        return found.to(device)

    module: nn.Module = polynomial.made.once(("cuequivariance", channels, method, dtype, device), make)
    return module
