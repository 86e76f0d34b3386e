"""Smaller tables of the elements: what MACE learns per chemical element, as a product of two matrices or in few bits.

MACE has one row per element in its embedding, its skip connections and its contractions; with many elements that is
most of the parameters. Rows of *low rank* are combinations of a few shared ones, ``[Z, rank] @ [rank, ...]``; rows *in
few bits* are rounded to so many levels, with one scale per row. Both act through PyTorch's parametrisations, so layers
read their ``weight`` as before.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from steradian.config.precision import ElementTablesConfig
from steradian.equivariant.linear import ElementLinear
from steradian.equivariant.symmetric_contraction import SymmetricContraction

__all__ = ["LowRank", "RoundedRows", "compress_element_tables"]


class LowRank(nn.Module):
    """``[Z, ...]`` from ``[Z, rank]`` and ``[rank, ...]``; a whole table is put in as its best such approximation."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, codes: Tensor, basis: Tensor) -> Tensor:
        return (codes @ basis.flatten(1)).view(len(codes), *basis.shape[1:])

    def right_inverse(self, table: Tensor) -> tuple[Tensor, Tensor]:
        left, sizes, right = torch.linalg.svd(table.flatten(1).double(), full_matrices=False)
        root = sizes[: self.rank].sqrt()
        codes, basis = left[:, : self.rank] * root, root[:, None] * right[: self.rank]
        return codes.to(table.dtype), basis.view(self.rank, *table.shape[1:]).to(table.dtype)


class RoundedRows(nn.Module):
    """Every element's row rounded to ``bits`` bits; gradients pass as if it were not."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.levels = 2 ** (bits - 1) - 1

    def forward(self, table: Tensor) -> Tensor:
        rows = table.detach().flatten(1)
        scale = (rows.abs().amax(1, keepdim=True) / self.levels).clamp(min=1e-30)
        rounded = (torch.round(rows / scale) * scale).view_as(table)
        return table + (rounded - table.detach())

    def right_inverse(self, table: Tensor) -> Tensor:
        return table


def compress_element_tables(host: nn.Module, config: ElementTablesConfig, num_elements: int) -> None:
    """Put the tables of a MACE host into the configured form.

    A random table of low rank is scaled back to the size of its entries, so that the network starts as it would.

    Raises:
        ValueError: another host, or a rank that saves nothing.
    """
    if config.rank is None and config.bits is None:
        return
    tables: list[tuple[nn.Module, str]] = [(host, "embedding")]
    for module in host.modules():
        if isinstance(module, ElementLinear | SymmetricContraction):
            tables.append((module, "weight"))
    if len(tables) == 1:
        raise ValueError("model.element_tables belongs to the host 'mace'")
    if config.rank is not None and config.rank >= num_elements:
        raise ValueError(
            f"model.element_tables.rank ({config.rank}) must be below the number of elements ({num_elements})"
        )
    for module, name in tables:
        if config.rank is not None:
            size = getattr(module, name).detach().square().mean().sqrt()
            parametrize.register_parametrization(module, name, LowRank(config.rank))
            with torch.no_grad():
                left = getattr(module, name).square().mean().sqrt()
                getattr(module.parametrizations, name).original1.mul_(size / left)  # type: ignore[union-attr]
        if config.bits is not None:
            parametrize.register_parametrization(module, name, RoundedRows(config.bits))
