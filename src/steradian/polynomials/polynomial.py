"""Polynomials as data: the algebra of equivariant networks written down as tables.

A :class:`Polynomial` maps rows of its inputs to rows of its output,

.. math:: y_{b,o,c} = \\sum_t c_t \\prod_k x^{(k)}_{b, i_{t,k}, c} ,

where an input has channels (``[B, dim, C]``) or none (``[B, dim]``, the same for all channels). Spherical harmonics,
channelwise tensor products and the symmetric contraction are all of this form; the tables come from cuequivariance's
descriptors. The same table is evaluated by every backend (:mod:`steradian.polynomials`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch

__all__ = ["Made", "Operand", "Polynomial", "Terms", "without_periods"]


class Made(dict):
    """What is made of an object once, such as programs and machine code, and lives as long as it; not pickled."""

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self:
            self[key] = make()
        return self[key]

    def __reduce__(self) -> tuple:
        return Made, ()


@dataclass(frozen=True)
class Operand:
    """One input or output.

    Attributes:
        name: for messages.
        dim: number of components.
        has_channels: or the same number for all channels.
        read_once: where it is gathered, a row is read once or twice, and comes from memory every time.
        period: with channels, of which there are only so many: channel c has the numbers of c modulo this.
    """

    name: str
    dim: int
    has_channels: bool = True
    read_once: bool = False
    period: int | None = None


@dataclass(frozen=True, eq=False)
class Terms:
    """Terms with the same pattern of factors.

    Attributes:
        factors: which input each factor comes from; an input may appear more than once (``x * x``).
        indices: ``[T, len(factors)]`` component of each factor.
        outputs: ``[T]`` component of the output.
        coefficients: ``[T]`` float64.
    """

    factors: tuple[int, ...]
    indices: np.ndarray
    outputs: np.ndarray
    coefficients: np.ndarray

    def __post_init__(self) -> None:
        if self.indices.shape != (len(self.outputs), len(self.factors)):
            raise ValueError(f"indices {self.indices.shape} do not fit {len(self.outputs)} terms, {self.factors}")


@dataclass(frozen=True, eq=False)
class Polynomial:
    """A polynomial map; compared and hashed by identity, so make each one once and keep it.

    Attributes:
        inputs, output: the operands.
        terms: groups of terms.
        outer: index of an input that every term contains exactly once and that is cheapest to multiply last (the
            weights of a tensor product or of a contraction), or None.
        folds: where the outer input is gathered, whether few rows of it serve so many rows of work that multiplying
            them with the coefficients first pays.
    """

    inputs: tuple[Operand, ...]
    output: Operand
    terms: tuple[Terms, ...]
    outer: int | None = None
    folds: bool = True
    made: Made = field(default_factory=Made, init=False, repr=False)

    @property
    def num_terms(self) -> int:
        return sum(len(group.outputs) for group in self.terms)

    def rounded(self, dtype: torch.dtype | None) -> Polynomial:
        """The polynomial with coefficients rounded to float32; None or float64: itself."""
        return self if dtype in (None, torch.float64) else _rounded(self)

    def __deepcopy__(self, memo: dict) -> Polynomial:
        return self  # a copy of a model uses what was made for the model

    def __post_init__(self) -> None:
        for group in self.terms:
            for column, factor in enumerate(group.factors):
                top = group.indices[:, column].max(initial=-1)
                if top >= self.inputs[factor].dim:
                    raise ValueError(f"component {top} of '{self.inputs[factor].name}' is out of range")
            if group.outputs.max(initial=-1) >= self.output.dim:
                raise ValueError(f"component {group.outputs.max()} of '{self.output.name}' is out of range")
            if self.outer is not None and group.factors.count(self.outer) != 1:
                raise ValueError("the outer input must appear exactly once in every term")


@cache
def _rounded(polynomial: Polynomial) -> Polynomial:
    terms = (
        replace(group, coefficients=group.coefficients.astype(np.float32).astype(np.float64))
        for group in polynomial.terms
    )
    return replace(polynomial, terms=tuple(terms))


@cache
def without_periods(polynomial: Polynomial) -> Polynomial:
    """The polynomial of inputs that have all their channels; itself where all have."""
    if all(operand.period is None for operand in polynomial.inputs):
        return polynomial
    return replace(polynomial, inputs=tuple(replace(operand, period=None) for operand in polynomial.inputs))
