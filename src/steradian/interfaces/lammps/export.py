"""A model file for LAMMPS: it says what it can, and tests itself wherever it is loaded."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ase.data import chemical_symbols, covalent_radii

from steradian.build import load_potential, save_potential
from steradian.checkpoint import package_version
from steradian.execution.self_test import SelfTest
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure
from steradian.interfaces.lammps.pair import exchanged_bytes, refusals
from steradian.operators.base import declares
from steradian.polynomials.backend import use_backend
from steradian.potential import PLAIN, Potential

__all__ = ["Exported", "export", "self_test_of"]

CLUSTERS, ATOMS = 3, 8


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        symbols: elements that the model knows.
        cutoff: [Å].
        exchanges: bytes per atom of every exchange between processes.
        is_global: attention between all atoms: no virials of atoms.
        worst: largest relative difference of the self-test, all backends.
        source: whose numbers the self-test holds.
    """

    symbols: tuple[str, ...]
    cutoff: float
    exchanges: tuple[int, ...]
    is_global: bool
    worst: float
    source: str


def export(model: Path, out: Path, *, precision: str | None = None) -> Exported:
    """Write a model for LAMMPS.

    Args:
        model: file or folder of a run.
        out: ``.safetensors`` file to write.
        precision: preset that it computes in unless the input says otherwise; None as it was trained.

    Raises:
        ValueError: no model, a model that LAMMPS cannot use, or one whose backends differ.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: give a file that ends in .safetensors")
    potential = load_potential(model, precision=precision)
    wrong = refusals(potential)
    if wrong:
        raise ValueError(f"{model}: {wrong[0]}")
    if potential.self_test is None:
        potential.self_test = self_test_of(potential)
    plain = copy.deepcopy(potential).set_precision(PLAIN[potential.dtype])
    found = Exported(
        symbols=tuple(chemical_symbols[number] for number in potential.elements),
        cutoff=potential.cutoff,
        exchanges=tuple(exchanged_bytes(potential)),
        is_global=declares(potential, "is_global"),
        worst=potential.self_test.check(plain),
        source=potential.self_test.source,
    )
    facts = {
        "elements": list(found.symbols),
        "cutoff_A": found.cutoff,
        "exchanged_bytes_per_atom": list(found.exchanges),
        "virials_of_atoms": not found.is_global,
        "units": ["metal", "real"],
    }
    save_potential(out, potential, {"lammps": facts})
    return found


def self_test_of(potential: Potential) -> SelfTest:
    """Energies and forces of made-up clusters by the plain backend in float64, to be found wherever it is loaded.

    All elements occur; atoms are as far apart as bonds are long.
    """
    exact = copy.deepcopy(potential).train().eval().set_precision("float64")
    generator = np.random.default_rng(0)
    entries = []
    for number in range(max(CLUSTERS, -(-len(potential.elements) // ATOMS))):
        first = number * ATOMS
        numbers = np.array([potential.elements[(first + each) % len(potential.elements)] for each in range(ATOMS)])
        structure = Structure(numbers, _places(numbers, generator))
        with use_backend("reference"):
            found = exact(make_graph(structure, potential.cutoff))
        assert found.forces is not None
        entry = {"numbers": numbers, "positions": structure.positions, "energy": found.energy.numpy()}
        entries.append({**entry, "forces": found.forces.double().numpy()})
    return SelfTest(f"steradian {package_version()}", tuple(entries), single=potential.dtype == torch.float32)


def _places(numbers: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Atoms one after the other near one that is there, none closer to another than a bond."""
    places = np.zeros((1, 3))
    while len(places) < len(numbers):
        reach = covalent_radii[numbers[: len(places)]] + covalent_radii[numbers[len(places)]]
        towards = generator.normal(size=3)
        start = int(generator.integers(len(places)))
        place = places[start] + 1.1 * reach[start] * towards / np.linalg.norm(towards)
        if (np.linalg.norm(places - place, axis=1) > 0.95 * reach).all():
            places = np.concatenate([places, place[None]])
    return places
