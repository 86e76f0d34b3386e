"""Means over the rotations of a group: the group itself, energies and derivatives, and the notice that offers them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.io import read, write

from steradian.build import save_potential
from steradian.equivariant.harmonics import spherical_harmonics
from steradian.equivariant.rotations import ROTATION_DEGREES, rotation_group
from steradian.evaluation.rotations import random_orthogonal, rotated, rotation_audit
from steradian.execution import frame_notice
from steradian.execution.steps import PredictionStep, Steps
from steradian.graph import batch_graphs
from steradian.graph.copies import copies_of
from steradian.interfaces.ase import SteradianCalculator
from steradian.simulate.device_md import DeviceMD
from steradian.simulate.files import MDSettings, SimulationError
from steradian.simulate.md import run_md
from tests import cases, tolerances

COUNTS = list(ROTATION_DEGREES)


@pytest.mark.parametrize("count", COUNTS)
def test_the_rotations_are_a_group_and_average_harmonics_of_their_degree_away(count):
    rotations = rotation_group(count)
    assert rotations.shape == (count, 3, 3)
    assert torch.equal(rotations[0], torch.eye(3, dtype=torch.float64))
    assert torch.allclose(rotations @ rotations.transpose(1, 2), torch.eye(3, dtype=torch.float64), atol=1e-14)
    assert torch.allclose(torch.linalg.det(rotations), torch.ones(count, dtype=torch.float64), atol=1e-14)
    products = torch.einsum("aij,bjk->abik", rotations, rotations).reshape(-1, 9)
    nearest = torch.cdist(products, rotations.reshape(-1, 9)).min(1)
    assert float(nearest.values.max()) < 1e-7
    assert nearest.indices.view(count, count).sort(1).values.eq(torch.arange(count)).all()
    points = random_orthogonal(5, seed=1)[:, 0]
    turned = torch.einsum("tij,pj->tpi", rotations, points)
    degree = ROTATION_DEGREES[count]
    mean = spherical_harmonics(turned.flatten(0, 1), degree + 1).unflatten(0, (count, -1)).mean(0)
    sizes = [float(block.abs().max()) for block in mean.split([2 * each + 1 for each in range(degree + 2)], dim=1)]
    assert max(sizes[1 : degree + 1]) < 1e-13
    assert sizes[degree + 1] > 1e-2  # and no further


def test_another_number_of_rotations_is_refused_in_one_line():
    model = cases.potential(operator="mara")
    with pytest.raises(ValueError, match=r"^rotation_average must be 4, 12, 24 or 60 \(rotations of a group\), not 7$"):
        model.average_rotations(7)
    assert model.rotation_average is None


@pytest.mark.parametrize("operator", ["none", "mara-channel", "mara-polynomial"])
def test_a_model_that_is_exact_refuses_the_average(operator):
    model = cases.potential(operator=operator)
    assert model.rotation == "exact"
    with pytest.raises(ValueError, match="do not turn with the atoms; an average over 24 rotations would cost 24"):
        model.for_inference(rotation_average=24)


def spread(model, structure, count=16):
    """Standard deviation of the energy over random rotations [eV]."""
    graph = cases.graph(structure)
    turned = batch_graphs([rotated(graph, matrix) for matrix in random_orthogonal(count, seed=5)])
    return float(model(turned, forces=False).interaction_energy.std())


def test_the_energy_turns_less_the_more_rotations_and_not_at_all_within_the_group():
    model, structure = cases.potential(operator="mara"), cases.ethanol()
    spreads = [spread(model, structure)]
    for count in (12, 24, 60):
        model.average_rotations(count)
        spreads.append(spread(model, structure))
        graph = cases.graph(structure)
        reference = model(graph)
        turn = rotation_group(count)[count // 2 + 1]
        found = model(rotated(graph, turn))
        change = (found.interaction_energy - reference.interaction_energy).abs()
        assert float(change) < tolerances.ENERGY[torch.float64]
        assert float((found.forces @ turn - reference.forces).abs().max()) < tolerances.FORCES[torch.float64]
    assert spreads[0] > 1e-5
    assert spreads[1] < 0.3 * spreads[0]
    assert spreads[3] < 0.6 * spreads[1]
    assert spreads[2] < spreads[0]
    assert not rotation_audit(model, [structure], num_rotations=2).exact


def test_the_average_is_that_of_predictions_one_by_one():
    """Energies, energies per atom, forces turned back, stress, alpha; a batch of a crystal and a molecule."""
    model = cases.potential(operator="mara")
    batch = cases.batch(cases.crystal(), cases.ethanol())
    rotations = rotation_group(12)
    single = [(turn, model(rotated(batch, turn), stress=True)) for turn in rotations]
    found = model.average_rotations(12)(batch, stress=True)

    def mean(values):
        return torch.stack(list(values)).mean(0)

    kwargs = {"atol": 1e-11, "rtol": 0}
    assert torch.allclose(found.energy, mean(p.energy for _, p in single), atol=1e-9, rtol=0)
    assert torch.allclose(found.atom_energies, mean(p.atom_energies for _, p in single), atol=1e-9, rtol=0)
    assert torch.allclose(found.interaction_energy, mean(p.interaction_energy for _, p in single), **kwargs)
    assert torch.allclose(found.forces, mean(p.forces @ turn for turn, p in single), **kwargs)
    assert torch.allclose(found.stress, mean(turn.T @ p.stress @ turn for turn, p in single), **kwargs)
    assert torch.allclose(found.gates[0], mean(p.gates[0] for _, p in single), **kwargs)
    assert (single[1][1].energy - single[0][1].energy).abs().max() > 1e-6  # something to average


@pytest.mark.parametrize("host", ["mace", "visnet"])
def test_forces_are_the_derivative_of_the_averaged_energy(host):
    model = cases.potential(host, operator="mara").for_inference(False, rotation_average=12)
    structure = cases.crystal()
    graph = cases.graph(structure)
    forces = model(graph).forces
    step = 1e-4
    for atom, axis in ((0, 0), (3, 2)):
        energies = []
        for sign in (1, -1):
            positions = graph.positions.clone()
            positions[atom, axis] += sign * step
            energies.append(model(dataclasses.replace(graph, positions=positions), forces=False).interaction_energy)
        numeric = float(energies[1] - energies[0]) / (2 * step)
        assert float(forces[atom, axis]) == pytest.approx(numeric, abs=tolerances.FINITE_DIFFERENCE)
    assert float(forces.abs().max()) > tolerances.SIGNAL * tolerances.FINITE_DIFFERENCE


def test_copies_in_parts_give_what_all_at_once_give(monkeypatch):
    model = cases.potential(operator="mara").average_rotations(12)
    graph = cases.graph(cases.ethanol())
    whole = model(graph)
    monkeypatch.setattr("steradian.potential.EDGES_AT_ONCE", 5 * graph.num_edges)
    parts = model(graph)
    assert torch.allclose(parts.energy, whole.energy, atol=1e-9, rtol=0)
    assert torch.allclose(parts.forces, whole.forces, atol=1e-12, rtol=0)


def test_the_topology_of_copies_is_made_once_and_holds_for_them():
    graph = cases.batch(cases.crystal(), cases.ethanol())
    copies = copies_of(graph, 3)
    assert copies_of(graph, 3).topology is copies.topology
    assert copies.prepared() is copies.topology
    again = batch_graphs([graph] * 3)
    for name in ("numbers", "system", "senders", "receivers", "shifts", "pbc", "positions", "cell"):
        assert torch.equal(getattr(copies, name), getattr(again, name))
    expected, found = again.prepared().pairs, copies.topology.pairs
    assert expected.count == found.count
    # the same edges are together
    assert torch.equal(found.first[found.of_edge], expected.first[expected.of_edge])


def test_a_padded_step_and_a_change_of_the_average_are_seen():
    """Topologies whose contents change in place, and steps that are kept, give the same."""
    model = cases.potential(operator="mara").for_inference(False)
    graph = cases.graph(cases.crystal())
    steps = Steps(PredictionStep(model), recorder=lambda function, **_: function)
    for count in (None, 4, 12):
        model.average_rotations(count)
        expected = model(graph)
        padded = steps(graph)[0]
        assert torch.allclose(padded.energy[:1], expected.energy, atol=1e-9, rtol=0)
        assert torch.allclose(padded.forces[: graph.num_atoms], expected.forces, atol=1e-11, rtol=0)


def test_training_ends_the_average():
    model = cases.potential(operator="mara").for_inference(False, rotation_average=4)
    assert model.train().rotation_average is None


def test_single_precision_and_copies_keep_the_average():
    model = cases.potential(operator="mara").average_rotations(4)
    graph = cases.graph(cases.ethanol())
    single = model.float()
    assert single.rotation_average == 4
    assert single.rotations.dtype == torch.float64
    assert "rotations" not in single.state_dict()
    expected = cases.potential(operator="mara").average_rotations(4)(graph)
    assert torch.allclose(single(graph).forces.double(), expected.forces, atol=tolerances.FORCES[torch.float32])


# ------------------------------------------------------------------------------------------------- commands, notice


@pytest.fixture
def untold(monkeypatch):
    monkeypatch.setattr(frame_notice, "_told", set())


def atoms():
    structure = cases.ethanol()
    return Atoms(structure.numbers, structure.positions)


def test_the_calculator_averages_and_says_once_what_a_laboratory_frame_means(untold, capsys):
    model = cases.potential(operator="mara")
    plain = atoms()
    plain.calc = SteradianCalculator(model, radial_table=False)
    alone = plain.get_potential_energy()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "energy turns with the molecule" in said
    assert "rotation_average" in said
    plain.rattle(0.01, seed=1)
    plain.get_potential_energy()
    other = atoms()
    other.calc = SteradianCalculator(cases.potential(operator="mara"))
    other.get_potential_energy()
    DeviceMD(cases.potential(operator="mara"), [atoms()], MDSettings())
    assert capsys.readouterr().err == ""
    averaged = atoms()
    averaged.calc = SteradianCalculator(model, radial_table=False, rotation_average=12)
    assert averaged.get_potential_energy() == pytest.approx(float(model(cases.graph(cases.ethanol())).energy), abs=1e-9)
    assert abs(averaged.get_potential_energy() - alone) > 1e-6


@pytest.mark.parametrize("operator", ["none", "mara-channel", "mara-intrinsic"])
def test_nothing_is_said_of_other_models(operator, untold, capsys):
    molecule = atoms()
    molecule.calc = SteradianCalculator(cases.potential(operator=operator))
    molecule.get_potential_energy()
    DeviceMD(cases.potential(operator=operator), [atoms()], MDSettings())
    assert capsys.readouterr().err == ""


def test_nothing_is_said_where_rotations_are_averaged_over(untold, capsys):
    DeviceMD(cases.potential(operator="mara").average_rotations(12), [atoms()], MDSettings())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("engine", ["ase", "device"])
def test_dynamics_average_and_a_resumed_run_must_too(engine, tmp_path, untold, capsys):
    file = tmp_path / "mara.safetensors"
    save_potential(file, cases.potential(operator="mara"))
    settings = MDSettings(ensemble="nve", temperature=50.0, timestep=0.1, save_every=1, rotation_average=4)
    run_md(file, atoms(), tmp_path / "md", steps=2, settings=settings, engine=engine)
    first = read(tmp_path / "md" / "trajectory.extxyz", index=0)
    expected = cases.potential(operator="mara").average_rotations(4)(cases.graph(cases.ethanol()))
    assert first.get_potential_energy() == pytest.approx(float(expected.energy), abs=1e-5)
    assert np.allclose(first.get_forces(), expected.forces, atol=1e-5)
    assert capsys.readouterr().err == ""
    without = dataclasses.replace(settings, rotation_average=None)
    with pytest.raises(SimulationError, match="another rotation_average"):
        run_md(file, atoms(), tmp_path / "md", steps=3, settings=without, engine=engine, resume=True)
    run_md(file, atoms(), tmp_path / "md", steps=3, settings=settings, engine=engine, resume=True)


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "steradian", *map(str, arguments)], capture_output=True, text=True, check=False, cwd=cwd
    )


def test_the_commands_take_it(tmp_path):
    save_potential(tmp_path / "mara.safetensors", cases.potential(operator="mara"))
    save_potential(tmp_path / "plain.safetensors", cases.potential())
    labelled = atoms()
    labelled.info["energy"] = -3000.0
    write(tmp_path / "data.extxyz", labelled)
    options = ("evaluate", "mara.safetensors", "data.extxyz", "--energy-only")
    answers = [run(*options, *more, "--json", "e.json", cwd=tmp_path) for more in ((), ("--rotation-average", 12))]
    assert [answer.returncode for answer in answers] == [0, 0], answers[1].stderr
    assert answers[0].stdout != answers[1].stdout
    assert '"mean over rotations": "12"' in (tmp_path / "e.json").read_text()
    refused = run("evaluate", "plain.safetensors", "data.extxyz", "--rotation-average", 12, cwd=tmp_path)
    assert refused.returncode == 2
    assert "change nothing, so leave it out" in refused.stderr
    short = ("--steps", 1, "--engine", "device")
    told = run("md", "mara.safetensors", "data.extxyz", *short, "--out", "md1", cwd=tmp_path)
    assert told.stderr.count("energy turns with the molecule") == 1, told.stderr
    quiet = run("md", "mara.safetensors", "data.extxyz", *short, "--out", "md2", "--rotation-average", 4, cwd=tmp_path)
    assert quiet.returncode == 0, quiet.stderr
    assert "energy turns" not in quiet.stderr
