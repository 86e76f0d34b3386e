"""Polynomials in plain PyTorch: the truth that every other backend is held to.

Derivatives of any order come from autograd. The work is arranged as products of components followed by matrix products,
so that it is also as fast as plain PyTorch allows:

* factors without channels (spherical harmonics) are contracted with the coefficients first, to a small matrix per row;
* factors with channels are multiplied once per distinct monomial;
* the outer input (the weights) multiplies last, after the sum over monomials.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from steradian.polynomials.polynomial import Polynomial, Terms

__all__ = ["evaluate_reference"]


def evaluate_reference(
    polynomial: Polynomial,
    inputs: Sequence[Tensor],
    gathers: Sequence[Tensor | None],
    scatter: Tensor | None,
    num_rows: int | None,
) -> Tensor:
    """See :func:`steradian.polynomials.evaluate`."""
    rows = [value if index is None else value.index_select(0, index) for value, index in zip(inputs, gathers)]
    out: Tensor | None = None
    for plan in _plans(polynomial):
        part = plan(rows)
        out = part if out is None else out + part
    if out is None:
        raise ValueError("a polynomial without terms has no value")
    if scatter is None:
        return out
    return out.new_zeros((num_rows or 0, *out.shape[1:])).index_add(0, scatter, out)


_CACHE: WeakKeyDictionary[Polynomial, list[_GroupPlan]] = WeakKeyDictionary()


def _plans(polynomial: Polynomial) -> list[_GroupPlan]:
    if polynomial not in _CACHE:
        _CACHE[polynomial] = [_GroupPlan(polynomial, group) for group in polynomial.terms if len(group.outputs)]
    return _CACHE[polynomial]


class _GroupPlan:
    """How one group of terms is computed: index tables and coefficient matrices, kept per dtype and device."""

    def __init__(self, polynomial: Polynomial, group: Terms) -> None:
        self.outer = polynomial.outer
        inner = [column for column, factor in enumerate(group.factors) if factor != self.outer]
        with_channels = [column for column in inner if polynomial.inputs[group.factors[column]].has_channels]
        without = [column for column in inner if not polynomial.inputs[group.factors[column]].has_channels]
        self.channel_monomials = _Monomials(group, with_channels)
        self.free_monomials = _Monomials(group, without)
        self.output_dim = polynomial.output.dim
        if not polynomial.output.has_channels and (with_channels or self.outer is not None):
            raise NotImplementedError("a sum over channels is taken by autograd, not by a polynomial")

        if self.outer is None:
            targets = group.outputs
            self.num_targets = self.output_dim
            self.outer_index = self.target_output = np.zeros(0, dtype=np.int64)
        else:
            weight = group.indices[:, group.factors.index(self.outer)]
            pairs, targets = np.unique(np.stack([group.outputs, weight], 1), axis=0, return_inverse=True)
            targets = targets.reshape(-1)
            self.num_targets = len(pairs)
            self.target_output, self.outer_index = pairs[:, 0], pairs[:, 1]
        shape = (self.free_monomials.count, self.num_targets, self.channel_monomials.count)
        coefficients = np.zeros(shape)
        np.add.at(
            coefficients, (self.free_monomials.of_term, targets, self.channel_monomials.of_term), group.coefficients
        )
        self.coefficients = coefficients
        self._constants: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor, Tensor]] = {}

    def _tensors(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key = (like.dtype, like.device)
        if key not in self._constants:
            summation = np.zeros((self.output_dim, self.num_targets))
            if self.outer is not None:
                summation[self.target_output, np.arange(self.num_targets)] = 1.0
            self._constants[key] = (
                torch.as_tensor(self.coefficients, dtype=like.dtype, device=like.device),
                torch.as_tensor(summation, dtype=like.dtype, device=like.device),
                torch.as_tensor(self.outer_index, device=like.device),
            )
        return self._constants[key]

    def __call__(self, rows: Sequence[Tensor]) -> Tensor:
        coefficients, summation, outer_index = self._tensors(rows[0])
        products = self.channel_monomials(rows)  # [B, U, C] or None
        free = self.free_monomials(rows)  # [B, V] or None
        num_free, num_targets, num_products = coefficients.shape
        if free is None:
            matrix = coefficients[0]  # [T, U]
        else:
            matrix = (free @ coefficients.reshape(num_free, num_targets * num_products)).view(
                -1, num_targets, num_products
            )
        if products is None:
            out = matrix[..., 0]  # [B, T] or [T]
            if self.outer is None:
                return out
            out = out.unsqueeze(-1)
        else:
            out = torch.matmul(matrix, products)  # [B, T, C]
        if self.outer is None:
            return out
        out = rows[self.outer].index_select(1, outer_index) * out
        if num_targets == self.output_dim and np.array_equal(self.target_output, np.arange(num_targets)):
            return out
        return torch.matmul(summation, out)


class _Monomials:
    """The distinct products of some factors of a group of terms."""

    def __init__(self, group: Terms, columns: list[int]) -> None:
        inputs = [group.factors[column] for column in columns]
        indices = group.indices[:, columns]
        if len(set(inputs)) == 1:
            indices = np.sort(indices, axis=1)  # x_i x_j = x_j x_i
        self.inputs = inputs
        unique, of_term = np.unique(indices, axis=0, return_inverse=True)
        self.of_term = of_term.reshape(-1)
        self.count = len(unique)
        # Longer monomials are built from shorter ones: x_i x_j x_k = (x_i x_j) x_k, each distinct prefix once.
        self.steps: list[tuple[np.ndarray, np.ndarray]] = []
        prefixes = unique
        levels = []
        while prefixes.shape[1] > 1:
            shorter, parent = np.unique(prefixes[:, :-1], axis=0, return_inverse=True)
            levels.append((parent.reshape(-1), prefixes[:, -1]))
            prefixes = shorter
        self.first = prefixes[:, 0] if inputs else np.zeros(0, dtype=np.int64)
        self.steps = levels[::-1]
        self._tables: dict[torch.device, tuple[_Index, list[tuple[_Index, _Index]]]] = {}

    def __call__(self, rows: Sequence[Tensor]) -> Tensor | None:
        if not self.inputs:
            return None
        device = rows[0].device
        if device not in self._tables:
            self._tables[device] = (
                _Index.of(self.first, device),
                [(_Index.of(a, device), _Index.of(b, device)) for a, b in self.steps],
            )
        first, steps = self._tables[device]
        value = _pick(rows[self.inputs[0]], first)
        for (parent, factor), source in zip(steps, self.inputs[1:]):
            value = _pick(value, parent) * _pick(rows[source], factor)
        return value


class _Index(NamedTuple):
    """Components to pick, and whether they are the first ones in order (known beforehand: a GPU is not asked)."""

    components: Tensor
    in_order: bool

    @classmethod
    def of(cls, components: np.ndarray, device: torch.device) -> _Index:
        in_order = np.array_equal(components, np.arange(len(components)))
        return cls(torch.as_tensor(components, device=device), in_order)


def _pick(value: Tensor, index: _Index) -> Tensor:
    if index.in_order and len(index.components) == value.shape[1]:
        return value
    return value.index_select(1, index.components)
