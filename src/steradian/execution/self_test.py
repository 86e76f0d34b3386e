"""Energies and forces that a converted model must give, checked whenever it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from steradian.compiler.checked import allowed, difference
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure
from steradian.polynomials.backend import compiler_works, use_backend

if TYPE_CHECKING:
    from steradian.potential import Potential

__all__ = ["SelfTest", "SelfTestError"]


class SelfTestError(ValueError):
    """A model that does not give the numbers it was converted with."""


@dataclass(frozen=True)
class SelfTest:
    """Structures (not periodic) with the energies [eV] and forces [eV/Å] of the package that a model comes from.

    Attributes:
        source: that package, for messages.
        structures: with ``numbers``, ``positions`` [Å], ``energy`` and, where the package's are right, ``forces``.
        single: whether that package keeps the model in float32.
    """

    source: str
    structures: tuple[dict[str, np.ndarray], ...]
    single: bool = False

    def to_dict(self) -> dict[str, Any]:
        entries = [{key: np.asarray(value).tolist() for key, value in entry.items()} for entry in self.structures]
        return {"source": self.source, "structures": entries, "single": self.single}

    @staticmethod
    def from_dict(content: dict[str, Any], single: bool = False) -> SelfTest:
        """Inverse of :meth:`to_dict`; ``single`` holds for files that do not say it."""
        entries = [{key: np.asarray(value) for key, value in entry.items()} for entry in content["structures"]]
        return SelfTest(str(content["source"]), tuple(entries), bool(content.get("single", single)))

    def check(self, potential: Potential, backends: Sequence[str] | None = None) -> float:
        """Compare on every backend that the potential's device has.

        Args:
            potential: in evaluation mode.
            backends: names; None for ``reference`` and, on a CPU with a compiler, ``cpu``.

        Returns:
            The largest relative difference of forces and energies.

        Raises:
            SelfTestError: a difference beyond rounding.
        """
        if backends is None:
            has_cpu = potential.device.type == "cpu" and compiler_works()
            backends = ("reference", "cpu") if has_cpu else ("reference",)
        bound = allowed("rounded model" if self.single else "model", potential.dtype)
        worst = 0.0
        for backend in backends:
            with use_backend(backend):
                found = max(_difference(potential, entry) for entry in self.structures)
            if not found <= bound:
                raise SelfTestError(
                    f"self-test failed on backend '{backend}': energies and forces differ from those of {self.source} "
                    f"by {found:.1e} (relative), more than {bound:.0e}; the model is not used"
                )
            worst = max(worst, found)
        return worst


def _difference(potential: Potential, entry: dict[str, np.ndarray]) -> float:
    graph = make_graph(Structure(entry["numbers"], entry["positions"]), potential.cutoff)
    found = potential(graph.to(potential.device))
    references = float((found.energy - found.interaction_energy)[0])
    # on the scale of the interaction energy: reference energies of thousands of eV would hide a difference
    expected = torch.from_numpy(np.asarray(entry["energy"], dtype=np.float64)).reshape(1) - references
    energy = difference(found.interaction_energy.cpu(), expected, 1e-3 * len(entry["numbers"]))
    if "forces" not in entry:
        return energy
    assert found.forces is not None
    forces = torch.from_numpy(np.asarray(entry["forces"], dtype=np.float64))
    return max(energy, difference(found.forces.cpu(), forces, 1e-3))
