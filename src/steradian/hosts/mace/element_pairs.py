"""What depends on the elements of two neighbours: transformed distances, and the repulsion of their nuclei.

Both follow mace-torch 0.3.16, whose published foundation models use them. Covalent radii [Å] are those of Cordero et
al. 2008 (Dalton Trans. 2832) as ASE has them; they and all constants are buffers, so an imported model keeps its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from steradian.radial import polynomial_envelope

__all__ = ["AgnesiTransform", "NuclearRepulsion", "SoftTransform", "make_repulsion", "make_transform"]

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
