"""The ASE calculator against the potential itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.optimize import BFGS

from steradian.build import build_potential, save_potential
from steradian.config import MACEConfig, MARAConfig, ModelConfig
from steradian.graph.neighbors import make_graph
from steradian.graph.skin import Capacity
from steradian.graph.structures import Structure
from steradian.interfaces.ase import SteradianCalculator
from tests.systems import STATISTICS


def potential(gate: bool = False, precision: str = "float64"):
    mara = MARAConfig(form="published", frame="lab", gate="published", hidden_dim=8)
    config = ModelConfig(
        host=MACEConfig(num_channels=4, l_max=2, correlation=2, radial_mlp=[8], cutoff_A=3.0),
        edge_gate=mara if gate else {"kind": "none"},
        precision=precision,
    )
    return build_potential(config, STATISTICS, seed=1).eval()


def crystal() -> Atoms:
    generator = np.random.default_rng(0)
    cell = np.array([[4.0, 0, 0], [0.5, 4.2, 0], [0.1, -0.4, 4.4]])
    return Atoms("C2H2O2", generator.uniform(size=(6, 3)) @ cell, cell=cell, pbc=True)


def test_all_properties_equal_the_potential():
    model = potential(gate=True)
    atoms = crystal()
    atoms.calc = SteradianCalculator(model)
    graph = make_graph(Structure(atoms.numbers, atoms.positions, cell=np.asarray(atoms.cell), pbc=atoms.pbc), 3.0)
    expected = model(graph, stress=True)
    assert atoms.get_potential_energy() == pytest.approx(float(expected.energy[0]), abs=1e-12)
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
    assert np.allclose(atoms.get_forces(), expected.forces.numpy(), atol=1e-12)
    assert np.allclose(atoms.get_stress(voigt=False), expected.stress[0].numpy(), atol=1e-12)
    assert np.allclose(atoms.get_potential_energies().sum(), atoms.get_potential_energy())
    assert np.abs(atoms.get_stress()).max() > 1e-4


def test_a_molecule_has_no_stress():
    atoms = molecule("CH3CH2OH")
    atoms.calc = SteradianCalculator(potential())
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_stress()


@pytest.mark.parametrize("make", [lambda: molecule("CH3CH2OH"), crystal], ids=["molecule", "crystal"])
def test_the_skin_changes_nothing_and_saves_lists(make):
    generator = np.random.default_rng(3)
    fresh, reused = make(), make()
    fresh.calc = SteradianCalculator(potential())
    reused.calc = SteradianCalculator(potential(), skin=0.6)
    for _ in range(20):
        step = generator.normal(scale=0.02, size=fresh.positions.shape)
        fresh.positions += step
        reused.positions += step
        assert np.allclose(reused.get_forces(), fresh.get_forces(), atol=1e-11)
        assert abs(reused.get_potential_energy() - fresh.get_potential_energy()) < 1e-10
    assert reused.calc.num_lists < fresh.calc.num_lists / 2


@pytest.mark.parametrize("make", [lambda: molecule("CH3CH2OH"), crystal], ids=["molecule", "crystal"])
@pytest.mark.parametrize("skin", [0.0, 0.6])
def test_lists_of_fixed_shape_give_the_same(make, skin):
    """What runs on a GPU, on a CPU."""
    generator = np.random.default_rng(4)
    plain, padded = make(), make()
    plain.calc = SteradianCalculator(potential(gate=True))
    padded.calc = SteradianCalculator(potential(gate=True), skin=skin)
    padded.calc.on_device = True
    for move in range(12):
        step = generator.normal(scale=0.03, size=plain.positions.shape)
        if move == 5:
            step[0] += 1.0  # a jump
        plain.positions += step
        padded.positions += step
        if move == 8 and plain.pbc.any():  # more neighbours than there were places for
            for atoms in (plain, padded):
                atoms.set_cell(atoms.cell * 0.8, scale_atoms=True)
        expected, found = plain.get_forces(), padded.get_forces()
        assert np.allclose(found, expected, atol=1e-11)
        assert np.abs(expected).max() > 1e-3
        for name in ("energy", "energies", *(("stress",) if plain.pbc.any() else ())):
            assert np.allclose(padded.calc.results[name], plain.calc.results[name], atol=1e-10)
    assert (padded.calc.num_lists < 12) == bool(skin)


def test_a_cell_that_changes_at_every_call_has_its_lists_on_the_host():
    plain, padded = crystal(), crystal()
    plain.calc, padded.calc = SteradianCalculator(potential()), SteradianCalculator(potential(), skin=0.3)
    padded.calc.on_device = True
    for call in range(4):
        assert np.allclose(padded.get_forces(), plain.get_forces(), atol=1e-11)
        assert (padded.calc._listed is None) == (call == 0)
        for atoms in (plain, padded):
            atoms.set_cell(atoms.cell * 1.01, scale_atoms=True)


def test_a_list_of_fixed_shape_that_is_too_short_is_made_again():
    atoms = crystal()
    atoms.calc = SteradianCalculator(potential(), skin=0.3)
    atoms.calc.on_device = True
    atoms.calc._capacity = Capacity(8, 64, 64)
    expected = crystal()
    expected.calc = SteradianCalculator(potential())
    assert np.allclose(atoms.get_forces(), expected.get_forces(), atol=1e-11)
    assert atoms.calc._rows[0].capacity.width > 8


def test_the_skin_notices_jumps_and_new_cells():
    atoms = crystal()
    atoms.calc = SteradianCalculator(potential(), skin=0.5)
    atoms.get_forces()
    atoms.positions[0] += [1.0, 0.5, 0.0]
    moved = atoms.get_forces()
    again = atoms.copy()
    again.calc = SteradianCalculator(potential())
    assert np.allclose(moved, again.get_forces(), atol=1e-11)
    atoms.set_cell(atoms.cell * 1.02, scale_atoms=True)
    again.set_cell(atoms.cell, scale_atoms=True)
    assert np.allclose(atoms.get_forces(), again.get_forces(), atol=1e-11)


def test_far_from_the_origin():
    near, far = molecule("CH3CH2OH"), molecule("CH3CH2OH")
    far.positions += 1e4
    near.calc = SteradianCalculator(potential(precision="float32"))
    far.calc = SteradianCalculator(potential(precision="float32"))
    assert np.abs(near.get_forces()).max() > 1e-2
    assert np.allclose(near.get_forces(), far.get_forces(), atol=1e-5)


def test_from_a_file_and_with_an_optimiser(tmp_path):
    save_potential(tmp_path / "m.safetensors", potential())
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=0)
    atoms.calc = SteradianCalculator(tmp_path / "m.safetensors", dtype=torch.float64)
    before = atoms.get_potential_energy()
    BFGS(atoms, logfile=None).run(steps=3)
    assert atoms.get_potential_energy() < before


def test_mistakes():
    atoms = molecule("NH3")
    atoms.calc = SteradianCalculator(potential())
    with pytest.raises(ValueError, match="does not know N"):
        atoms.get_potential_energy()
    with pytest.raises(ValueError, match="skin must not be negative"):
        SteradianCalculator(potential(), skin=-1.0)
