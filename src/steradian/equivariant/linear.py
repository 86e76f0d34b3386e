"""Linear maps of features ``[N, D, C]``: they mix channels and copies of an irrep, never components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from steradian.equivariant.irreps import Degrees
from steradian.equivariant.tensor_product import PathTable
from steradian.graph.topology import Rows, rows_of
from steradian.precision import WithRole, cast

__all__ = ["ElementLinear", "EmbeddedLinear", "IrrepsLinear", "PathLinear"]


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
