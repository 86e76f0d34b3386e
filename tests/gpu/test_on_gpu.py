"""What only a GPU can test: the same numbers as on the CPU, and steps that do not wait. Skipped where there is none."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import molecule

if not torch.cuda.is_available():
    pytest.skip("needs a GPU: what runs without one is in the other folders", allow_module_level=True)

from steradian.build import build_potential
from steradian.config import EFAConfig, MACEConfig, MARAConfig, ModelConfig, NequIPConfig, O3MPNNConfig, ViSNetConfig
from steradian.execution.backend_benchmark import available_backends
from steradian.graph.neighbors import neighbor_pairs
from steradian.graph.neighbors_device import Boxes, has_nvalchemi, make_search
from steradian.graph.skin import Capacity, HostList
from steradian.interfaces.ase import SteradianCalculator
from steradian.polynomials import use_backend
from steradian.simulate.device_md import DeviceMD
from steradian.simulate.files import MDSettings
from tests.systems import STATISTICS

HOSTS = {
    "mace": MACEConfig(num_channels=16, l_max=2, correlation=3, radial_mlp=[8], cutoff_A=4.0),
    "nequip": NequIPConfig(num_channels=8, num_layers=2, cutoff_A=4.0),
    "visnet": ViSNetConfig(num_channels=16, num_layers=2, num_heads=2, cutoff_A=4.0),
    "o3": O3MPNNConfig(num_channels=16, num_layers=2, l_max=1, cutoff_A=4.0, zero_init=False),
}
SLOTS = {
    "bare": {},
    "mara": {"edge_gate": MARAConfig(form="published", frame="lab", hidden_dim=8)},
    "efa": {"global_mixer": EFAConfig(max_degree=0, num_features_qk=4, num_features_v=4, zero_init=False)},
}


def potential(host="mace", slot="bare", precision="float64"):
    config = ModelConfig(host=HOSTS[host], precision=precision, **SLOTS[slot])
    return build_potential(config, STATISTICS, seed=2).eval()


def molecules(temperature=300.0):
    water = molecule("H2O")
    water.translate([4.0, 0.5, 0.0])
    atoms = molecule("CH3CH2OH") + water
    random = np.random.default_rng(1)
    atoms.set_velocities(
        np.sqrt(units.kB * temperature / atoms.get_masses())[:, None] * random.normal(size=(len(atoms), 3))
    )
    return atoms


def crystal():
    random = np.random.default_rng(0)
    cell = np.array([[6.0, 0, 0], [0.5, 6.2, 0], [0.1, -0.4, 6.4]])
    return Atoms("C4H8O4", random.uniform(size=(16, 3)) @ cell, cell=cell, pbc=True)


@contextmanager
def no_waiting():
    """PyTorch raises where the host would wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("host", HOSTS)
def test_same_energies_and_forces_as_on_the_cpu(host, slot, backend):
    graph = HostList([molecules()], 4.0, 0.0).refresh(torch.tensor(molecules().positions))
    for precision, tolerance in (("float64", 1e-9), ("float32", 2e-4)):
        model = potential(host, slot, precision)
        with use_backend("reference"):
            expected = model(graph)
        with use_backend(backend):
            found = model.to("cuda")(graph.to("cuda"))
        scale = float(expected.forces.abs().max())
        assert scale > 1e-3
        assert float((found.forces.cpu() - expected.forces).abs().max()) < tolerance * max(scale, 1.0)
        assert abs(float(found.interaction_energy[0].cpu() - expected.interaction_energy[0])) < 10 * tolerance


@pytest.mark.parametrize("kind", ["brute", "cells", "nvalchemi"])
@pytest.mark.parametrize("pbc", [(True, True, True), (True, False, True), (False, False, False)])
def test_lists_equal_those_of_vesin(kind, pbc):
    if kind == "nvalchemi" and not has_nvalchemi():
        pytest.skip("optional package: pip install nvalchemi-toolkit-ops")
    positions = np.random.default_rng(3).uniform(-5, 25, (600, 3))
    cell = np.array([[18.0, 0, 0], [3.0, 15.0, 0], [0, -2.0, 21.0]])
    truth = neighbor_pairs(positions, cell, np.array(pbc), 4.0)
    x = torch.tensor(positions, device="cuda")
    search = make_search(kind, Boxes(cell[None], np.array([pbc]), (600,)), 4.0, x, width=120)[0]
    rows = search(x)
    counts = rows.counts.cpu().numpy()
    inside = np.arange(120) < counts[:, None]
    np.testing.assert_array_equal(np.repeat(np.arange(600), counts), truth[0])
    np.testing.assert_array_equal(rows.senders.cpu().numpy()[inside], truth[1])
    np.testing.assert_array_equal(rows.shifts.cpu().numpy()[inside], truth[2])
    if kind != "nvalchemi":
        with no_waiting():
            search(x)


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("make", [molecules, crystal])
def test_dynamics_equal_those_on_the_cpu(make, record):
    settings = MDSettings(ensemble="nve", timestep=0.25)
    runs = []
    for device in ("cpu", "cuda"):
        engine = DeviceMD(
            potential().to(device).for_inference(),
            [make()],
            settings,
            device=device,
            record=record and device == "cuda",
        )
        runs.append(list(engine.run(0, 60, lambda step: step % 5 == 0)))
    if record:
        assert engine._recorded is not None
        assert not any(half.eager for half in engine._recorded)
    for one, other in zip(*runs):
        assert abs(one.energy[0] - other.energy[0]) < 1e-7
        assert np.abs(one.positions - other.positions).max() < 1e-7


@pytest.mark.parametrize("ensemble", ["nve", "langevin", "bussi"])
def test_steps_do_not_wait(ensemble):
    engine = DeviceMD(
        potential(precision="float32").to("cuda").for_inference(), [molecules()], MDSettings(ensemble=ensemble),
        device="cuda", search="brute",
    )  # fmt: skip
    list(engine.run(0, 32, lambda step: False))
    engine.integrator.prepare(32)
    with no_waiting():
        for _ in range(4):
            block = engine._launch(32, 48, False)
    block.arrived.synchronize()
    assert engine.list.still_valid(engine._needs(block.packet)) or engine._every > 1


def test_short_lists_are_repeated_and_recorded_again():
    settings = MDSettings(temperature=600.0, seed=1)
    runs = []
    for capacity in (None, Capacity(8, 64, 64)):
        engine = DeviceMD(
            potential().to("cuda").for_inference(), [molecules()], settings, device="cuda", capacity=capacity
        )
        runs.append(list(engine.run(0, 40, lambda step: step % 10 == 0)))
    assert engine.capacity.edges > 64
    for one, other in zip(*runs):
        assert np.abs(one.positions - other.positions).max() < 1e-7


@pytest.mark.parametrize("make", [molecules, crystal])
def test_the_ase_calculator(make):
    here, there = make(), make()
    here.calc = SteradianCalculator(potential())
    there.calc = SteradianCalculator(potential(), device="cuda", skin=0.4)
    for _ in range(4):
        assert np.allclose(there.get_forces(), here.get_forces(), atol=1e-8)
        assert there.get_potential_energy() == pytest.approx(here.get_potential_energy(), abs=1e-7)
        if here.pbc.any():
            assert np.allclose(there.get_stress(), here.get_stress(), atol=1e-9)
        for atoms in (here, there):
            atoms.rattle(0.05, seed=3)
