"""Linear maps of features ``[N, D, C]``: they mix channels and copies of an irrep, never components."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from steradian.equivariant.irreps import Degrees, dim
from steradian.equivariant.tensor_product import PathTable
from steradian.graph.topology import Rows, rows_of
from steradian.precision import WithRole, cast

__all__ = [
    "Activation",
    "Dense",
    "ElementLinear",
    "EmbeddedLinear",
    "IrrepsLinear",
    "MLP",
    "PathLinear",
    "activate",
    "add_features",
    "change_degrees",
    "lecun_normal",
    "union",
]


class IrrepsLinear(WithRole):
    """Mixes channels degree by degree: ``[N, D, C_in] -> [N, D, C_out]``; weights ``[irreps, C_in, C_out]``.

    Scaled by 1/sqrt(C_in), so that unit-variance weights keep unit variance.
    """

    def __init__(self, degrees: Degrees, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.degrees = degrees
        self.weight = nn.Parameter(torch.randn(len(degrees), channels_in, channels_out))

    def forward(self, features: Tensor) -> Tensor:
        weight = self.folded(self.low, lambda: cast(_unit_variance(self.weight), self.low), self.weight)
        return _per_irrep(cast(features, self.low), self.degrees, weight).to(features.dtype)


def _per_irrep(features: Tensor, degrees: Degrees, weight: Tensor) -> Tensor:
    if len(degrees) == 1:
        return _mix(features, weight[0])
    # split, not slices: the derivative of a slice is a tensor of zeros as large as all of them
    blocks = features.split([2 * degree + 1 for degree, _ in degrees], dim=1)
    return torch.cat([_mix(block, matrix) for block, matrix in zip(blocks, weight)], dim=1)


def _mix(block: Tensor, matrix: Tensor) -> Tensor:
    """``[N, d, C_in] @ [C_in, C_out]`` as one product of matrices; PyTorch would make N small ones of it."""
    return (block.reshape(-1, block.shape[2]) @ matrix).view(block.shape[0], block.shape[1], matrix.shape[1])


class PathLinear(WithRole):
    """Mixes the paths and channels of a tensor product: ``[N, D_paths, C] -> [N, D_out, C]``.

    Scaled by 1/sqrt(paths * C) of each irrep. Irreps of ``degrees_out`` that no path reaches are zero.

    A format of its own (:mod:`steradian.precision`) is that of degree 1 and above. The product of the scalars, of which
    energies are made, is a small part of the work and would be a large one of the error.

    Args:
        table: paths of the product.
        num_channels: C.
        degrees_out: irreps of the result.
        widths: channels of every output irrep, where they are not C; then only :meth:`blocks` can be used.
        divisor: of the result, with no work of its own.
    """

    role = "paths"

    def __init__(
        self,
        table: PathTable,
        num_channels: int,
        degrees_out: Degrees,
        widths: Mapping[tuple[int, int], int] | None = None,
        divisor: float = 1.0,
    ) -> None:
        super().__init__()
        self.table, self.degrees_out, self.num_channels = table, degrees_out, num_channels
        self.divisor = divisor
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(count * num_channels, num_channels if widths is None else widths[irrep]))
            for irrep, count in zip(table.degrees_out, table.counts)
        )

    def blocks(self, messages: Tensor) -> dict[tuple[int, int], Tensor]:
        """``[N, 2 l + 1, width]`` of every irrep that a path reaches, from ``[N, D_paths, C]``."""
        num_atoms = messages.shape[0]
        blocks: dict[tuple[int, int], Tensor] = {}
        sizes = [(2 * degree + 1) * count for (degree, _), count in zip(self.table.degrees_out, self.table.counts)]
        for (degree, parity), count, weight, part in zip(
            self.table.degrees_out, self.table.counts, self.weights, messages.split(sizes, dim=1)
        ):
            low = self.low if degree else None
            wide = weight.dtype
            block = cast(part, low or wide).reshape(num_atoms, 2 * degree + 1, count * self.num_channels)
            scale = weight.shape[0] ** -0.5 / self.divisor
            make = partial(_scaled, weight, scale=scale, low=low)
            matrix = self.folded((degree, parity, scale, low), make, weight)
            blocks[degree, parity] = _mix(block, matrix).to(wide)
        return blocks

    def forward(self, messages: Tensor) -> Tensor:
        blocks = self.blocks(messages)
        out = []
        for degree, parity in self.degrees_out:
            shape = (messages.shape[0], 2 * degree + 1, self.num_channels)
            empty = messages.new_zeros(shape, dtype=self.weights[0].dtype)
            out.append(blocks.get((degree, parity), empty))
        return out[0] if len(out) == 1 else torch.cat(out, dim=1)


class ElementLinear(WithRole):
    """A linear map per chemical element: weights ``[Z, irreps, C_in, C_out]``.

    Scaled by 1/sqrt(C_in * Z), as a fully connected product with one-hot elements is.
    """

    def __init__(self, degrees: Degrees, num_elements: int, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.degrees = degrees
        self.weight = nn.Parameter(torch.randn(num_elements, len(degrees), channels_in, channels_out))

    def forward(self, features: Tensor, species: Rows | Tensor) -> Tensor:
        """``[N, D, C_in] -> [N, D, C_out]``; species ``[N]`` is the index into the table of elements."""
        species = rows_of(species, self.weight.shape[0])
        scale = (self.weight.shape[0] * self.weight.shape[2]) ** -0.5
        weight = self.folded(self.low, lambda: cast(self.weight * scale, self.low), self.weight)
        if species.counts is None:
            return _of_own_element(cast(features, self.low), self.degrees, weight, species.index).to(features.dtype)
        if not len(species):
            return features.new_zeros((0, features.shape[1], weight.shape[-1]))
        present = [(element, count) for element, count in enumerate(species.counts) if count]
        parts = _sorted(cast(features, self.low), species).split([count for _, count in present])
        blocks = [_per_irrep(part, self.degrees, weight[element]) for part, (element, _) in zip(parts, present)]
        return _put_back(torch.cat(blocks), species).to(features.dtype)


class EmbeddedLinear(WithRole):
    """A linear map per chemical element that is itself linear in the elements' embedding: ``x_c e_t W_ct``.

    The weights of an irrep are ``[C_in, T, width]``, scaled by 1/sqrt(C_in * T), as those of a fully connected product
    of features and embedding.

    Args:
        degrees: irreps of the features.
        channels_in: C_in.
        embedding_dim: T.
        widths: channels that an irrep has in the result; those of ``degrees`` that are missing here are dropped.
    """

    def __init__(
        self, degrees: Degrees, channels_in: int, embedding_dim: int, widths: Mapping[tuple[int, int], int]
    ) -> None:
        super().__init__()
        self.degrees = degrees
        self.kept = tuple(irrep for irrep in degrees if irrep in widths)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(channels_in, embedding_dim, widths[irrep])) for irrep in self.kept
        )

    def forward(self, features: Tensor, species: Rows | Tensor, embedding: Tensor) -> dict[tuple[int, int], Tensor]:
        """``[N, 2 l + 1, width]`` of every irrep that is kept, from features ``[N, D, C_in]``.

        Args:
            features: node features.
            species: ``[N]`` index into the table of elements.
            embedding: ``[Z, T]``.
        """
        parts = cast(features, self.low).split([2 * degree + 1 for degree, _ in self.degrees], dim=1)
        species = rows_of(species, embedding.shape[0])
        if species.counts is None:
            return self._of_own_element(parts, species.index, embedding, features.dtype)
        counts = [count for count in species.counts if count]
        present = [element for element, count in enumerate(species.counts) if count]
        out = {}
        for irrep, weight in zip(self.kept, self.weights):
            matrices = self._per_element(irrep, weight, embedding, present)
            block = parts[self.degrees.index(irrep)]
            if len(present) == 1:
                out[irrep] = _mix(block, matrices[0])
                continue
            pieces = _sorted(block, species).split(counts) if present else []
            mixed = [_mix(piece, matrix) for piece, matrix in zip(pieces, matrices)]
            empty = block.new_zeros((0, block.shape[1], weight.shape[2]))
            out[irrep] = _put_back(torch.cat(mixed), species) if mixed else empty
        return {irrep: block.to(features.dtype) for irrep, block in out.items()}

    def _of_own_element(
        self, parts: Sequence[Tensor], species: Tensor, embedding: Tensor, dtype: torch.dtype
    ) -> dict[tuple[int, int], Tensor]:
        out = {}
        for irrep, weight in zip(self.kept, self.weights):
            matrices = torch.stack(self._per_element(irrep, weight, embedding, list(range(embedding.shape[0]))))
            block = parts[self.degrees.index(irrep)]
            out[irrep] = _of_own_element(block, (irrep,), matrices.unsqueeze(1), species).to(dtype)
        return out

    def _per_element(
        self, irrep: tuple[int, int], weight: Tensor, embedding: Tensor, present: list[int]
    ) -> list[Tensor]:
        """``[C_in, width]`` of every element in a list; made once for weights that are not trained."""

        def made() -> list[Tensor]:
            scale = (weight.shape[0] * weight.shape[1]) ** -0.5
            rows = embedding if len(present) == len(embedding) else embedding[present]
            mixed = torch.einsum("zt,ctd->zcd", rows * scale, weight)
            return list(cast(mixed, self.low).contiguous().unbind(0))

        return self.folded((irrep, tuple(present), self.low), made, weight, embedding)


def _scaled(weight: Tensor, scale: float, low: torch.dtype | None) -> Tensor:
    return cast(weight * scale, low)


def _unit_variance(weight: Tensor) -> Tensor:
    return weight * weight.shape[1] ** -0.5


def _of_own_element(features: Tensor, degrees: Degrees, weight: Tensor, species: Tensor) -> Tensor:
    """``[N, D, C_out]`` with every element's own maps ``[Z, irreps, C_in, C_out]``, as a product with one-hot elements.

    Shapes do not depend on the composition; the work grows with the number of elements.
    """
    mine = (species.unsqueeze(1) == torch.arange(weight.shape[0], device=species.device)).to(features.dtype)  # [N, Z]
    out = []
    for index, block in enumerate(features.split([2 * degree + 1 for degree, _ in degrees], dim=1)):
        spread = block.unsqueeze(2) * mine[:, None, :, None]  # [N, d, Z, C_in], zero but for the own element
        rows = spread.reshape(block.shape[0] * block.shape[1], -1)
        mixed = rows @ weight[:, index].reshape(-1, weight.shape[3])
        out.append(mixed.view(block.shape[0], block.shape[1], weight.shape[3]))
    return out[0] if len(out) == 1 else torch.cat(out, dim=1)


def _sorted(values: Tensor, species: Rows) -> Tensor:
    """Values ``[N, ...]`` element by element."""
    return values if species.order is None else values.index_select(0, species.order)


def _put_back(values: Tensor, species: Rows) -> Tensor:
    """Values that were sorted by element in the order of the atoms."""
    return values if species.order is None else values.index_select(0, species.inverse)


# -------------------------------------------------------------------------------- the dense layers of the O(3) network


Activation = Literal["identity", "silu", "gelu"]


def lecun_normal(shape: tuple[int, ...], fan_in: int) -> Tensor:
    """Normal numbers of variance 1 / fan_in, none beyond two standard deviations (of the uncut distribution)."""
    # 0.8796...: standard deviation of a normal distribution cut at two
    scale = fan_in**-0.5 / 0.87962566103423978
    return nn.init.trunc_normal_(torch.empty(shape), std=scale, a=-2 * scale, b=2 * scale)


def activate(features: Tensor, activation: Activation) -> Tensor:
    """Silu, gelu (tanh form) or identity of features ``[N, D, C]`` whose component 0 is a scalar.

    These activations multiply a scalar by a factor. All components of a channel are multiplied by the factor of its
    scalar, which keeps them equivariant.
    """
    if activation == "identity":
        return features
    scalars = features[:, :1]
    if activation == "silu":
        factor = torch.sigmoid(scalars)
    else:
        factor = 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (scalars + 0.044715 * scalars.pow(3))))
    return factor * features


def change_degrees(features: Tensor, before: Degrees, after: Degrees) -> Tensor:
    """Features with the irreps ``after``: some are dropped, missing ones are zero. ``[N, D, C] -> [N, D', C]``."""
    if before == after:
        return features
    blocks = dict(zip(before, features.split([2 * degree + 1 for degree, _ in before], dim=1)))
    if all(irrep in blocks for irrep in after):
        kept = [blocks[irrep] for irrep in after]
    else:
        empty = features.new_zeros((features.shape[0], 1, features.shape[2]))
        kept = [blocks[i] if i in blocks else empty.expand(-1, 2 * i[0] + 1, -1) for i in after]
    return kept[0] if len(kept) == 1 else torch.cat(kept, dim=1)


def union(one: Degrees, other: Degrees) -> Degrees:
    """The irreps of a sum: those of both, up to the higher degree, and of both parities where either has both."""
    both = set(one) | set(other)
    return tuple(sorted(both, key=lambda irrep: _position(irrep, _is_natural(both))))


def _is_natural(degrees: set[tuple[int, int]]) -> bool:
    return all(parity == (-1) ** degree for degree, parity in degrees)


def _position(irrep: tuple[int, int], natural: bool) -> tuple[int, int]:
    """Natural lists run over the degree; lists with both parities have the even irreps first."""
    return (0, irrep[0]) if natural else (-irrep[1], irrep[0])


def add_features(one: Tensor, degrees_one: Degrees, other: Tensor, degrees_other: Degrees) -> tuple[Tensor, Degrees]:
    """Sum of features with different irreps; missing ones count as zero."""
    degrees = union(degrees_one, degrees_other)
    return change_degrees(one, degrees_one, degrees) + change_degrees(other, degrees_other, degrees), degrees


class Dense(WithRole):
    """One matrix per irrep and a bias on the scalars: ``[N, D, C_in] -> [N, D, C_out]``.

    Args:
        degrees: irreps; the bias goes to the first one, which must be 0e.
        channels_in, channels_out: C.
        bias: whether there is a bias.
        zero: start from zero weights instead of lecun-normal ones.
        unit: keep weights of unit variance and scale them by 1/sqrt(C_in) where they are used.

    Raises:
        ValueError: the first irrep is not 0e, but there is a bias.
    """

    def __init__(
        self,
        degrees: Degrees,
        channels_in: int,
        channels_out: int,
        *,
        bias: bool = True,
        zero: bool = False,
        unit: bool = False,
    ) -> None:
        super().__init__()
        if bias and degrees[0] != (0, 1):
            raise ValueError("a bias needs scalars: the first irrep must be 0e")
        self.degrees, self.dim = degrees, dim(degrees)
        shape = (len(degrees), channels_in, channels_out)
        self.scale = channels_in**-0.5 if unit else 1.0
        self.weight = nn.Parameter(torch.zeros(shape) if zero else lecun_normal(shape, 1 if unit else channels_in))
        self.bias = nn.Parameter(torch.zeros(channels_out)) if bias else None

    def forward(self, features: Tensor) -> Tensor:
        weight: Tensor = self.weight
        if self.scale != 1.0 or self.low is not None:
            weight = self.folded(self.low, lambda: cast(self.weight * self.scale, self.low), weight)
        out = _per_irrep(cast(features, self.low), self.degrees, weight).to(features.dtype)
        if self.bias is None:
            return out
        if self.dim == 1:
            return out + self.bias
        return torch.cat([out[:, :1] + self.bias, out[:, 1:]], dim=1)


class MLP(nn.Module):
    """Dense, silu, Dense (:func:`activate`); ``zero``: the last starts from zero, and so does the MLP."""

    def __init__(self, degrees: Degrees, num_channels: int, *, zero: bool = False, unit: bool = False) -> None:
        super().__init__()
        self.first = Dense(degrees, num_channels, num_channels, unit=unit)
        self.last = Dense(degrees, num_channels, num_channels, zero=zero, unit=unit)

    def forward(self, features: Tensor) -> Tensor:
        return self.last(activate(self.first(features), "silu"))
