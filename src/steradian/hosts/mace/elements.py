"""What MACE knows of elements: of two neighbours (transformed distances, the repulsion of nuclei), and smaller tables.

Transforms and repulsion follow mace-torch 0.3.16, whose published foundation models use them. Covalent radii [Å] are
those of Cordero et al. 2008 (Dalton Trans. 2832) as ASE has them; they and all constants are buffers, so an imported
model keeps its own. Tables of the elements can be stored as a product of two matrices or in few bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from steradian.config.precision import ElementTablesConfig
from steradian.equivariant.linear import ElementLinear
from steradian.equivariant.symmetric_contraction import SymmetricContraction
from steradian.radial import polynomial_envelope

__all__ = [
    "AgnesiTransform",
    "LowRank",
    "NuclearRepulsion",
    "RoundedRows",
    "SoftTransform",
    "compress_element_tables",
    "make_repulsion",
    "make_transform",
]

BOHR = 0.529
"""Bohr radius [Å] with the digits of the published models."""
COULOMB = 14.3996
"""e^2 / (4 pi epsilon_0) [eV Å]."""
SCREENING = ((0.1818, 3.2), (0.5099, 0.9423), (0.2802, 0.4028), (0.02817, 0.2016))
"""Weights and decay rates of the universal screening function (Ziegler, Biersack, Littmark 1985)."""


def covalent_radii(elements: Sequence[int]) -> Tensor:
    """``[Z]`` radii [Å] of the elements, in their order."""
    from ase.data import covalent_radii as table

    return torch.tensor([float(table[number]) for number in elements], dtype=torch.float64)


class _PairModule(nn.Module):
    """Holds the radii of the model's elements."""

    radii: Tensor

    def __init__(self, elements: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("radii", covalent_radii(elements))

    def sum_of_radii(self, species: Tensor, senders: Tensor, receivers: Tensor) -> Tensor:
        """``[E]`` [Å]."""
        radii = self.radii.index_select(0, species)
        return radii.index_select(0, senders) + radii.index_select(0, receivers)


class AgnesiTransform(_PairModule):
    """``1 / (1 + a x^q / (1 + x^(q - p)))`` with ``x = r / r_0``, r_0 the mean of the two covalent radii.

    1 at distance zero, and falling to 0 (Witt et al. 2023, J. Chem. Phys. 159, 164101, section on transforms).
    """

    a: Tensor
    q: Tensor
    p: Tensor

    def __init__(self, elements: Sequence[int]) -> None:
        super().__init__(elements)
        for name, value in (("a", 1.0805), ("q", 0.9183), ("p", 4.5791)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))

    def forward(self, lengths: Tensor, species: Tensor, senders: Tensor, receivers: Tensor) -> Tensor:
        """``[E]`` numbers between 0 and 1 from distances ``[E]`` [Å]; species are indices ``[N]``."""
        x = lengths / (0.5 * self.sum_of_radii(species, senders, receivers))
        # x^q / (1 + x^(q - p)), without a negative power
        return 1.0 / (1.0 + self.a * x.pow(self.p) / (1.0 + x.pow(self.p - self.q)))


class SoftTransform(_PairModule):
    """A distance that stops falling near three quarters of the sum r_0 of the covalent radii.

    ``p_0 + (r - p_0) (1 + tanh(alpha (r - m) / (p_1 - p_0))) / 2`` with p_0 = 3/4 r_0, p_1 = 4/3 r_0, m between them.
    """

    alpha: Tensor

    def __init__(self, elements: Sequence[int]) -> None:
        super().__init__(elements)
        self.register_buffer("alpha", torch.tensor(4.0, dtype=torch.float64))

    def forward(self, lengths: Tensor, species: Tensor, senders: Tensor, receivers: Tensor) -> Tensor:
        """``[E]`` [Å] from distances ``[E]`` [Å]; species are indices ``[N]``."""
        touching = self.sum_of_radii(species, senders, receivers)
        low, high = 0.75 * touching, touching * (4.0 / 3.0)
        steepness = self.alpha / (high - low)
        step = 0.5 * (1.0 + torch.tanh(steepness * (lengths - 0.5 * (low + high))))
        return low + (lengths - low) * step


class NuclearRepulsion(_PairModule):
    """Screened Coulomb energy of the nuclei (Ziegler, Biersack, Littmark 1985), ended at the sum of covalent radii.

    Args:
        elements: atomic numbers in the order of the species.
        envelope_p: order of the polynomial that ends it.
    """

    numbers: Tensor
    coefficients: Tensor
    exponent: Tensor
    prefactor: Tensor

    def __init__(self, elements: Sequence[int], envelope_p: int) -> None:
        super().__init__(elements)
        self.envelope_p = envelope_p
        self.register_buffer("numbers", torch.tensor([float(number) for number in elements], dtype=torch.float64))
        self.register_buffer("coefficients", torch.tensor([weight for weight, _ in SCREENING], dtype=torch.float64))
        self.register_buffer("exponent", torch.tensor(0.300, dtype=torch.float64))
        self.register_buffer("prefactor", torch.tensor(0.4543, dtype=torch.float64))

    def forward(
        self, lengths: Tensor, species: Tensor, senders: Tensor, receivers: Tensor, *, pick: bool = True
    ) -> Tensor:
        """``[N]`` [eV]: half of every pair's energy goes to each of its atoms. Arguments as for the transforms.

        Args:
            pick: on a CPU, work on the few pairs that overlap alone; off where shapes must not depend on distances.
        """
        end = self.sum_of_radii(species, senders, receivers)
        if lengths.device.type == "cpu" and pick:
            (near,) = (lengths < end).nonzero(as_tuple=True)  # few: the others are beyond the end
            lengths, end = lengths.index_select(0, near), end.index_select(0, near)
            senders, receivers = senders.index_select(0, near), receivers.index_select(0, near)
        charges = self.numbers.index_select(0, species)
        sizes = charges.pow(self.exponent)
        screening_length = self.prefactor * BOHR / (sizes.index_select(0, senders) + sizes.index_select(0, receivers))
        ratio = lengths / screening_length
        rates = [rate for _, rate in SCREENING]
        screening = sum(weight * torch.exp(-rate * ratio) for weight, rate in zip(self.coefficients.unbind(), rates))
        product = charges.index_select(0, senders) * charges.index_select(0, receivers)
        energies = 0.5 * COULOMB * product / lengths * screening * polynomial_envelope(lengths, end, self.envelope_p)
        return energies.new_zeros(len(species)).index_add(0, receivers, energies)


def make_transform(kind: str | None, elements: Sequence[int]) -> AgnesiTransform | SoftTransform | None:
    """The transform of a configuration; None leaves distances as they are."""
    if kind is None:
        return None
    return AgnesiTransform(elements) if kind == "agnesi" else SoftTransform(elements)


def make_repulsion(kind: str | None, elements: Sequence[int], envelope_p: int) -> NuclearRepulsion | None:
    """The repulsion of a configuration."""
    return None if kind is None else NuclearRepulsion(elements, envelope_p)


# ------------------------------------------------------------------------------------------------------ smaller tables


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
