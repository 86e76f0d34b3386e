"""Polynomials and their derivatives in plain PyTorch: the truth that every other backend is held to.

Derivatives of any order come from autograd. The work is arranged as products of components followed by matrix products,
so that it is also as fast as plain PyTorch allows:

* factors without channels (spherical harmonics) are contracted with the coefficients first, to a small matrix per row;
* factors with channels are multiplied once per distinct monomial;
* the outer input (the weights) multiplies last, after the sum over monomials.

:func:`sample` makes the small problem on which another backend is compared with this one when it is first used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from steradian.polynomials.polynomial import Polynomial, Terms
from steradian.polynomials.program import Program

__all__ = ["Sample", "evaluate_program", "evaluate_reference", "sample", "widened"]

#: Rows of a sample, how many of them are the user's own, and what the random ones are gathered from and added to.
ROWS, OWN, TARGETS = 40, 20, 4
#: Own numbers beyond these bounds, and what is not finite, show nothing about a kernel: random ones stand in for them.
SMALLEST, LARGEST = 1e-6, 1e6


def evaluate_reference(
    polynomial: Polynomial,
    inputs: Sequence[Tensor],
    gathers: Sequence[Tensor | None],
    scatter: Tensor | None,
    num_rows: int | None,
) -> Tensor:
    """See :func:`steradian.polynomials.evaluate`."""
    inputs = widened(polynomial, inputs)
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


def widened(polynomial: Polynomial, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The inputs, those of few channels that repeat (``period``) with all of them."""
    if all(operand.period is None for operand in polynomial.inputs):
        return list(inputs)
    channels = max(value.shape[2] for value in inputs if value.ndim == 3)
    return [
        value if operand.period in (None, channels) else value.repeat(1, 1, channels // value.shape[2])
        for operand, value in zip(polynomial.inputs, inputs)
    ]


def evaluate_program(
    program: Program, inputs: Sequence[Tensor], indices: Sequence[Tensor], counts: Sequence[int], num_work: int
) -> list[Tensor]:
    """Outputs of a program whose polynomial is known, or of a derivative of one, of any order, by autograd.

    Args:
        program: see :class:`~steradian.polynomials.program.Program`.
        inputs: of one format.
        indices, counts: the row indices and how many rows each refers to.
        num_work: rows of the work.
    """
    if program.polynomial is not None:
        gathers = [None if slot.index is None else indices[slot.index] for slot in program.inputs]
        scatter = program.outputs[0].index
        into = (None, None) if scatter is None else (indices[scatter], counts[scatter])
        return [evaluate_reference(program.polynomial, inputs, gathers, *into)]
    if program.derived is None:
        raise ValueError("a program made by hand has no reference")
    parent, wanted, given = program.derived
    with torch.enable_grad():
        number = len(parent.inputs)
        leaves = [
            value.view_as(value) if value.requires_grad else value.detach().requires_grad_(asked)
            for value, asked in zip(inputs[:number], wanted)
        ]
        outputs = evaluate_program(parent, leaves, indices, counts, num_work)
        used = [output for output, is_given in zip(outputs, given) if is_given]
        known = [(output, cotangent) for output, cotangent in zip(used, inputs[number:]) if output.requires_grad]
        asked_for = [leaf for leaf, asked in zip(leaves, wanted) if asked]
        if not known:
            return [torch.zeros_like(leaf) for leaf in asked_for]
        found = torch.autograd.grad(
            [output for output, _ in known], asked_for, [cotangent for _, cotangent in known],
            create_graph=True, allow_unused=True, materialize_grads=True,
        )  # fmt: skip
    return list(found)


class Sample(NamedTuple):
    """A small problem: inputs as for the work it stands for, row indices, and what each index refers to."""

    inputs: list[Tensor]
    indices: list[Tensor]
    counts: list[int]


def sample(inputs: Sequence[Tensor], numbers: Sequence[int | None], indices: Sequence[Tensor]) -> Sample:
    """Forty rows of work like the given ones.

    Up to half are the user's own: they show what a kernel does with such numbers. The others are random, of the size of
    the user's largest: own features are zero where training starts, and sums of them may cancel, and neither would show
    a wrong coefficient.

    Args:
        inputs: of the work.
        numbers: for each input the number of the index that gathers it, or None.
        indices: ``[B]`` each; where the own rows ascend, so do the sample's.
    """
    generator = torch.Generator().manual_seed(0)
    num_own = min(OWN, len(indices[0]) if indices else len(inputs[0]))
    taken, new, counts = [], [], []
    for index in indices:
        rows, own = torch.unique(index[:num_own].cpu(), return_inverse=True)
        random = len(rows) + torch.randint(0, TARGETS, (ROWS - num_own,), generator=generator)
        taken.append(rows.to(index.device))
        new.append(torch.cat([own, random.sort().values]).to(index.device))
        counts.append(len(rows) + TARGETS)
    values = []
    for value, number in zip(inputs, numbers):
        own = value[:num_own] if number is None else value.index_select(0, taken[number])
        extra = ROWS - num_own if number is None else TARGETS
        values.append(_with_random(own.detach(), extra, generator))
    return Sample(values, new, counts)


def _with_random(own: Tensor, extra: int, generator: torch.Generator) -> Tensor:
    random = torch.randn((len(own) + extra, *own.shape[1:]), dtype=torch.float64, generator=generator)
    largest = float(own.abs().max()) if own.numel() else 0.0
    random *= largest if SMALLEST < largest < LARGEST else 1.0
    random = random.to(device=own.device, dtype=own.dtype)
    return torch.cat([own, random[len(own) :]]) if largest < LARGEST else random  # a NaN is not less than anything


def _plans(polynomial: Polynomial) -> list[_GroupPlan]:
    plans: list[_GroupPlan] = polynomial.made.once(
        "reference", lambda: [_GroupPlan(polynomial, group) for group in polynomial.terms if len(group.outputs)]
    )
    return plans


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
