"""Virials, stresses of atoms, Hessians and modes: all from the gradients by edge vectors."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.vibrations import Vibrations
from typer.testing import CliRunner

from steradian.build import save_potential
from steradian.cli import app
from steradian.graph.structures import Structure
from steradian.interfaces.ase import SteradianCalculator
from steradian.simulate.modes import normal_modes
from tests import cases, tolerances

STEP = 3e-4
LOCAL = [("mace", "mara-channel"), ("nequip", "mara-intrinsic"), ("visnet-vectors", "none"), ("o3mpnn", "none")]


def strained(structure: Structure, strain: np.ndarray) -> Structure:
    change = np.eye(3) + strain
    return dataclasses.replace(structure, positions=structure.positions @ change, cell=structure.cell @ change)


@pytest.mark.parametrize(("host", "operator"), [*LOCAL, ("mace", "efa")])
@pytest.mark.parametrize("make", [cases.crystal, cases.ethanol])
def test_the_virial_is_the_derivative_by_the_strain(host, operator, make):
    potential, structure = cases.potential(host, operator), make()
    found = potential(cases.graph(structure), stress=True)
    for a, b in ((0, 0), (0, 1), (1, 2)):
        strain = np.zeros((3, 3))
        strain[a, b] += 0.5
        strain[b, a] += 0.5
        energies = [
            float(potential(cases.graph(strained(structure, factor * STEP * strain)), forces=False).energy[0])
            for factor in (-2, -1, 1, 2)
        ]
        slope = (energies[0] - 8 * energies[1] + 8 * energies[2] - energies[3]) / (12 * STEP)
        assert abs(slope + float(found.virial[0, a, b])) < 1e-6
    assert found.virial.abs().max() > 100 * 1e-6


@pytest.mark.parametrize(("host", "operator"), LOCAL)
def test_virials_of_atoms_sum_to_the_virial(host, operator):
    potential = cases.potential(host, operator)
    batch = cases.batch(cases.crystal(), cases.ethanol(), cases.crystal(5))
    found = potential(batch, stress=True, virials=True)
    for virials in (found.virials, found.centroid_virials):
        summed = torch.zeros_like(found.virial).index_add(0, batch.system, virials)
        assert (summed - found.virial).abs().max() < 1e-12
    volume = abs(np.linalg.det(cases.crystal().cell))
    assert (found.stress[0] + found.virial[0] / volume).abs().max() < 1e-14
    assert found.stress[1].abs().max() == 0
    assert found.virials.abs().max() > 1e-3


def test_halves_do_not_depend_on_what_pairs_share_and_senders_get_their_own():
    """With weights of pairs the pull of two opposite edges may stand at one of them: not with virials of atoms."""
    potential, graph = cases.potential("mace"), cases.graph(cases.ethanol())
    assert graph.prepared().pairs is not None
    shared, own = potential(graph, virials=True), potential(cases.without_pairs(graph), virials=True)
    assert (shared.virials - own.virials).abs().max() < 1e-13
    assert (shared.centroid_virials - own.centroid_virials).abs().max() < 1e-13
    assert (shared.centroid_virials - shared.virials).abs().max() > 1e-3


def test_attention_between_all_atoms_has_no_virials_of_atoms():
    with pytest.raises(ValueError, match="not a sum over neighbours"):
        cases.potential("mace", "efa")(cases.graph(cases.crystal()), virials=True)


def test_stresses_of_the_calculator_sum_to_its_stress():
    crystal = cases.crystal()
    atoms = Atoms(crystal.numbers, crystal.positions, cell=crystal.cell, pbc=True)
    atoms.calc = SteradianCalculator(cases.potential("mace", "mara-channel"))
    assert np.abs(atoms.get_stresses().sum(0) - atoms.get_stress()).max() < 1e-15
    molecule = Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.9]], calculator=atoms.calc)
    with pytest.raises(PropertyNotImplementedError, match="periodic in all directions"):
        molecule.get_stresses()


@pytest.mark.parametrize(("host", "operator"), [*LOCAL, ("mace", "efa"), ("mace-agnostic", "mara-channel")])
@pytest.mark.parametrize("make", [cases.crystal, cases.ethanol])
def test_the_hessian_is_the_derivative_of_the_forces(host, operator, make):
    potential, structure = cases.potential(host, operator), make()
    hessian = potential.hessian(cases.graph(structure))
    size = max(1.0, float(hessian.abs().max()))  # random weights make some models a thousand times stiffer than others
    assert (hessian - hessian.T).abs().max() < 1e-12 * size
    assert hessian.abs().max() > tolerances.SIGNAL * 1e-6
    for row in (0, 4, 8, 17):
        forces = []
        for factor in (-2, -1, 1, 2):
            moved = structure.positions.copy()
            moved.flat[row] += factor * STEP
            forces.append(potential(cases.graph(dataclasses.replace(structure, positions=moved))).forces.flatten())
        slope = (-forces[0] + 8 * forces[1] - 8 * forces[2] + forces[3]) / (12 * STEP)
        assert (slope - hessian[row]).abs().max() < 1e-7 * size


def test_rows_at_a_time_change_nothing_and_tables_are_not_used():
    graph = cases.graph(cases.ethanol())
    exact = cases.potential("mace").hessian(graph)
    for chunk in (1, 4, 100):
        assert (cases.potential("mace").hessian(graph, chunk=chunk) - exact).abs().max() < 1e-12
    tabled = cases.potential("mace").for_inference()
    assert tabled.radial_table_error is not None
    assert (tabled.hessian(graph) - exact).abs().max() < 1e-12
    assert tabled.radial_table_error is not None


def test_hessians_of_few_atoms_and_mistakes():
    potential = cases.potential("mace")
    alone = Structure(np.array([6]), np.zeros((1, 3)))
    assert potential.hessian(cases.graph(alone)).abs().max() == 0
    with pytest.raises(ValueError, match="of one system, not of 2"):
        potential.hessian(cases.batch(alone, alone))
    with pytest.raises(ValueError, match="at least 1, not 0"):
        potential.hessian(cases.graph(alone), chunk=0)


def test_modes_are_those_of_ase(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ethanol = cases.ethanol()
    atoms = Atoms(ethanol.numbers, ethanol.positions)
    potential = cases.potential("o3mpnn")
    atoms.calc = SteradianCalculator(potential, radial_table=False)
    vibrations = Vibrations(atoms, delta=0.002, nfree=4)
    vibrations.run()
    numeric = vibrations.get_frequencies()
    numeric = np.sort(np.where(np.abs(numeric.imag) > 0, -numeric.imag, numeric.real))
    found = normal_modes(potential, atoms)
    # six of a molecule are nothing but rounding under a root
    large = np.abs(numeric) > 1.0
    assert large.sum() >= 20
    assert np.abs(found.wavenumbers - numeric)[large].max() < 1e-4
    weighted = found.displacements.reshape(27, 27) * np.repeat(atoms.get_masses() ** 0.5, 3)
    assert np.abs(weighted @ weighted.T - np.eye(27)).max() < 1e-12


def test_the_command_prints_modes(tmp_path):
    import json

    ethanol = cases.ethanol()
    Atoms(ethanol.numbers, ethanol.positions).write(tmp_path / "mol.xyz")
    potential = cases.potential("mace")
    save_potential(tmp_path / "m.safetensors", potential)
    done = CliRunner().invoke(app, ["modes", str(tmp_path / "m.safetensors"), str(tmp_path / "mol.xyz"), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert len(found["wavenumbers_per_cm"]) == 27
    plain = CliRunner().invoke(app, ["modes", str(tmp_path / "m.safetensors"), str(tmp_path / "mol.xyz")])
    assert "zero-point energy" in plain.output
    assert "relax the structure first" in plain.output
