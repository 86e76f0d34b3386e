"""Sizes of messages, features and energies layer by layer: measured where they are, and what a message scale does."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.io import write

from steradian.build import build_potential, save_potential
from steradian.config import MACEConfig, ModelConfig, NequIPConfig
from steradian.evaluation.activations import activations, random_structures, with_random_weights
from steradian.graph.neighbors import make_graph
from tests import cases

SMALL = {"num_channels": 16, "l_max": 2, "radial_mlp": [16], "cutoff_A": 4.0}


def potential(host, neighbors=20.0):
    statistics = dataclasses.replace(cases.STATISTICS, avg_num_neighbors=neighbors, energy_shift=0.0)
    return build_potential(ModelConfig(host=host, precision="float64"), statistics, seed=2).eval()


def sizes(found, layer, quantity):
    (entry,) = [entry for entry in found if (entry.layer, entry.quantity) == (layer, quantity)]
    return entry


@pytest.mark.parametrize("host", list(cases.HOSTS))
def test_every_host_tells_of_every_layer(host):
    model = cases.potential(host).train()
    structure = cases.ethanol()
    found = activations(model, [structure])
    assert model.training
    layers = len(list(model.host.layers))
    assert {entry.layer for entry in found} == {*range(layers), None}
    for layer in range(layers):
        names = [entry.quantity for entry in found if entry.layer == layer]
        assert names[:2] == ["scalars in", "messages 0e"] or "messages 0o" in names
        assert "features out 0e" in names
        if layer:  # what leaves a layer enters the next one
            before = sizes(found, layer - 1, "features out 0e")
            assert sizes(found, layer, "scalars in").rms == pytest.approx(before.rms, rel=1e-12)
    assert all(entry.rms > 0 and entry.spread <= entry.rms * (1 + 1e-12) for entry in found)
    assert found == activations(model, [structure])  # hooks are gone, nothing is counted twice


def test_energies_and_messages_are_those_of_the_model():
    model = potential(MACEConfig(**SMALL, correlation=2))
    structure = cases.ethanol()
    seen = {}
    layer = model.host.layers[1].linear_message
    handle = layer.register_forward_hook(lambda *given: seen.update(messages=given[2].detach()))
    prediction = model(make_graph(structure, 4.0), forces=False)
    handle.remove()
    found = activations(model, [structure])
    references = torch.tensor(
        [cases.STATISTICS.atom_references[number] for number in structure.numbers.tolist()], dtype=torch.float64
    )
    energies = prediction.atom_energies - references
    assert sizes(found, None, "atom energies").rms == pytest.approx(float(energies.square().mean().sqrt()), abs=1e-8)
    assert sizes(found, None, "atom energies").spread == pytest.approx(float(energies.std(correction=0)), abs=1e-8)
    vectors = seen["messages"][:, 1:4]
    assert sizes(found, 1, "messages 1o").rms == pytest.approx(float(vectors.square().mean().sqrt()), rel=1e-10)


def mace(**scale):
    return MACEConfig(**SMALL, correlation=2, **scale)


def nequip(**scale):
    return NequIPConfig(**SMALL, num_layers=2, **scale)


@pytest.mark.parametrize("make", [mace, nequip])
def test_the_scale_divides_the_messages(make):
    model = potential(make(message_scale="root"), neighbors=16.0)
    structures = random_structures(model, num_atoms=24)
    root, mean, two = (
        activations(potential(make(message_scale=scale), neighbors=16.0), structures) for scale in ("root", "mean", 2.0)
    )
    for degree in ("0e", "1o", "2e"):
        size = sizes(root, 0, f"messages {degree}").rms
        assert size == pytest.approx(4.0 * sizes(mean, 0, f"messages {degree}").rms, rel=1e-10)
        assert size == pytest.approx(0.5 * sizes(two, 0, f"messages {degree}").rms, rel=1e-10)


def test_the_root_keeps_messages_of_independent_neighbours():
    """And the mean does not: the finding of benchmarks/activations.py, for one host."""
    found = {}
    for scale in ("root", "mean"):
        for neighbors in (5.0, 60.0):
            model = potential(MACEConfig(**SMALL, correlation=2, message_scale=scale), neighbors)
            structures = random_structures(model, count=4, neighbors=neighbors, apart=0.6)
            found[scale, neighbors] = sizes(activations(model, structures), 0, "messages 2e").rms
    assert found["root", 60.0] / found["root", 5.0] == pytest.approx(1.0, abs=0.25)
    assert found["mean", 60.0] / found["mean", 5.0] == pytest.approx(12**-0.5, rel=0.25)


def test_random_structures_have_the_neighbours_asked_for():
    model = potential(MACEConfig(**SMALL), neighbors=17.0)
    structures = random_structures(model, count=3)
    graphs = [make_graph(structure, 4.0) for structure in structures]
    assert sum(graph.num_edges for graph in graphs) / 192 == pytest.approx(17.0, rel=0.15)
    assert set(structures[0].numbers.tolist()) == {1, 6, 8}
    assert structures[0].pbc.all()
    again = random_structures(model, count=3)
    assert np.array_equal(structures[2].positions, again[2].positions)
    assert not np.array_equal(structures[0].positions, structures[1].positions)


def test_random_weights_are_those_of_the_start():
    model = cases.potential()
    start = activations(with_random_weights(model, seed=3), [cases.ethanol()])
    assert start == activations(model, [cases.ethanol()])  # it was made with this seed
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.3)
    assert start != activations(model, [cases.ethanol()])
    assert start == activations(with_random_weights(model, seed=3), [cases.ethanol()])


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "steradian", *map(str, arguments)], capture_output=True, text=True, check=False, cwd=cwd
    )


def test_inspect_shows_them(tmp_path):
    save_potential(tmp_path / "m.safetensors", cases.potential())
    structure = cases.ethanol()
    write(tmp_path / "ethanol.xyz", Atoms(structure.numbers, structure.positions))
    shown = run("inspect", "m.safetensors", "--activations", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "Activations on 2 structures (random structures)" in shown.stdout
    assert "messages 2e" in shown.stdout
    assert "atom energies [eV]" in shown.stdout
    given = run("inspect", "m.safetensors", "--activations", "--data", "ethanol.xyz", "--json", cwd=tmp_path)
    content = json.loads(given.stdout)
    assert content["host"].startswith("mace")
    trained = content["activations"]["trained"]
    expected = activations(cases.potential(), [structure])
    assert [entry["quantity"] for entry in trained] == [entry.quantity for entry in expected]
    assert [entry["rms"] for entry in trained] == pytest.approx([entry.rms for entry in expected], rel=1e-5)
    alone = run("inspect", "m.safetensors", "--data", "ethanol.xyz", cwd=tmp_path)
    assert alone.returncode == 2
    assert "--data: belongs to --activations" in alone.stderr
