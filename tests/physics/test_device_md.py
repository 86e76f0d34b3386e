"""Dynamics that stays on the device: against ASE, against itself, with lists that are too short or too old."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.md.verlet import VelocityVerlet
from torch.utils._python_dispatch import TorchDispatchMode

from steradian.build import build_potential
from steradian.config import (
    EFAConfig,
    MACEConfig,
    MARAConfig,
    ModelConfig,
    NequIPConfig,
    O3MPNNConfig,
    ViSNetConfig,
)
from steradian.execution.recording import Repeater
from steradian.graph import Prediction
from steradian.graph.skin import Capacity, DeviceList, HostList
from steradian.interfaces.ase import SteradianCalculator
from steradian.polynomials import use_backend
from steradian.simulate import device_md
from steradian.simulate.device_md import DeviceMD
from steradian.simulate.md import MDSettings, SimulationError, run_md
from tests.systems import STATISTICS


class LennardJones:
    """Argon; the pair energy and its slope are brought to zero at the cutoff."""

    cutoff, epsilon, sigma = 5.0, 0.0104, 3.4

    def __call__(self, graph, *, forces=True):
        cells = graph.cell.index_select(0, graph.system.index_select(0, graph.receivers))
        vectors = graph.positions.index_select(0, graph.senders) - graph.positions.index_select(0, graph.receivers)
        vectors = vectors + torch.einsum("ei,eij->ej", graph.shifts.double(), cells)
        lengths = vectors.square().sum(1).sqrt()
        energy, slope = self.pair(lengths)
        end, end_slope = self.pair(torch.full((1,), self.cutoff, dtype=torch.float64, device=lengths.device))
        inside = (lengths < self.cutoff).double()
        energy = inside * (energy - end - end_slope * (lengths - self.cutoff))
        pull = (inside * (slope - end_slope) / lengths).unsqueeze(1) * vectors
        atoms = lengths.new_zeros(graph.num_atoms).index_add(0, graph.receivers, 0.5 * energy)
        total = lengths.new_zeros(graph.num_systems).index_add(0, graph.system, atoms)
        force = torch.zeros_like(graph.positions).index_add(0, graph.receivers, pull)
        return Prediction(energy=total, atom_energies=atoms, interaction_energy=total, forces=force)

    def pair(self, lengths):
        s6 = (self.sigma / lengths) ** 6
        return 4 * self.epsilon * (s6**2 - s6), 4 * self.epsilon * (6 * s6 - 12 * s6**2) / lengths


def argon(repeat=3, temperature=60.0, seed=0, lattice=5.3):
    atoms = bulk("Ar", "fcc", a=lattice, cubic=True).repeat(repeat)
    atoms.rattle(0.05, seed=seed)
    random = np.random.default_rng(seed)
    atoms.set_velocities(random.normal(size=(len(atoms), 3)) * np.sqrt(units.kB * temperature / 39.95))
    return atoms


def potential(host=None, **slots):
    host = host or MACEConfig(num_channels=4, l_max=1, correlation=2, radial_mlp=[8], cutoff_A=4.0)
    return build_potential(ModelConfig(host=host, precision="float64", **slots), STATISTICS, seed=2).eval()


def ethanol(temperature=300.0):
    atoms = molecule("CH3CH2OH")
    random = np.random.default_rng(1)
    speeds = np.sqrt(units.kB * temperature / atoms.get_masses())[:, None]
    atoms.set_velocities(speeds * random.normal(size=(9, 3)))
    return atoms


def snapshots(engine, steps, every=1, first=0):
    return list(engine.run(first, steps, lambda step: step % every == 0))


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_nve_equals_ase(fixed_shapes):
    model = potential().for_inference()
    settings = MDSettings(ensemble="nve", timestep=0.5)
    atoms = ethanol()
    engine = DeviceMD(model, [atoms], settings, fixed_shapes=fixed_shapes)
    found = [engine.start(), *snapshots(engine, 100)]
    atoms.calc = SteradianCalculator(model, skin=0.5)
    truth = []
    VelocityVerlet(atoms, 0.5 * units.fs).run(0)
    for step in range(101):
        if step:
            VelocityVerlet(atoms, 0.5 * units.fs).run(1)
        truth.append((atoms.get_potential_energy(), atoms.get_kinetic_energy(), atoms.positions.copy()))
    assert [snapshot.step for snapshot in found] == list(range(101))
    assert np.ptp([energy for energy, _, _ in truth]) > 0.02, "nothing moved"
    for snapshot, (energy, kinetic, positions) in zip(found, truth):
        assert abs(snapshot.energy[0] - energy) < 1e-10
        assert abs(snapshot.kinetic[0] - kinetic) < 1e-10
        assert np.abs(snapshot.positions - positions).max() < 1e-10


def test_nve_conserves_energy_to_second_order():
    spreads = []
    for timestep in (8.0, 4.0):
        engine = DeviceMD(LennardJones(), [argon()], MDSettings(ensemble="nve", timestep=timestep), fixed_shapes=True)
        run = snapshots(engine, int(800 / timestep))
        total = np.array([snapshot.energy[0] + snapshot.kinetic[0] for snapshot in run])
        assert np.ptp([snapshot.energy[0] for snapshot in run]) > 0.1, "nothing moved"
        spreads.append(np.ptp(total))
    assert spreads[0] < 0.02
    assert 3.0 < spreads[0] / spreads[1] < 5.5  # half the step, a quarter of the error


@pytest.mark.parametrize("ensemble", ["langevin", "bussi"])
def test_the_friction_is_per_picosecond(ensemble):
    """Free atoms at zero temperature: exp(-t f) of velocities is left (langevin), of kinetic energies (bussi)."""
    atoms = Atoms("Ar2", positions=[[0.0, 0.0, 0.0], [100.0, 0.0, 0.0]])
    atoms.set_velocities(np.random.default_rng(0).normal(size=(2, 3)) * 0.01)
    settings = MDSettings(ensemble=ensemble, temperature=0.0, timestep=0.5, friction=7.0)
    engine = DeviceMD(LennardJones(), [atoms], settings)
    *_, last = snapshots(engine, 200)  # 0.1 ps
    rate = 7.0 if ensemble == "langevin" else 3.5
    assert np.allclose(last.velocities, atoms.get_velocities() * np.exp(-rate * 0.1), rtol=1e-10, atol=0)


@pytest.mark.parametrize("ensemble", ["langevin", "bussi"])
def test_thermostats_hold_the_temperature_and_its_spread(ensemble):
    settings = MDSettings(ensemble=ensemble, temperature=50.0, timestep=8.0, friction=2.0)
    replicas = [argon(repeat=2, temperature=20.0, seed=seed) for seed in range(8)]
    engine = DeviceMD(LennardJones(), replicas, settings, fixed_shapes=True)
    run = snapshots(engine, 1000, every=5)[60:]
    kinetic = np.array([snapshot.kinetic for snapshot in run])  # [T, S]
    degrees = 3 * 32
    thermal = 0.5 * degrees * units.kB * 50.0
    # 8 replicas, 5.6 ps with a relaxation time of 0.5 ps: some 50 independent values or more; sigma of one is 14 %
    assert kinetic.mean() / thermal == pytest.approx(1.0, abs=0.06)
    assert kinetic.std() / thermal == pytest.approx(np.sqrt(2 / degrees), rel=0.3)


@pytest.mark.parametrize("ensemble", ["nve", "langevin", "bussi"])
def test_replicas_move_as_they_would_alone(ensemble):
    settings = MDSettings(ensemble=ensemble, temperature=60.0, timestep=4.0, seed=5)
    systems = [argon(repeat=2, seed=0), argon(repeat=3, seed=1), argon(repeat=2, seed=2)]
    together = snapshots(DeviceMD(LennardJones(), systems, settings, fixed_shapes=True), 60, every=20)
    start = 0
    for index, atoms in enumerate(systems):
        own = dataclasses.replace(settings, seed=5 + index)
        alone = snapshots(DeviceMD(LennardJones(), [atoms], own, fixed_shapes=True), 60, every=20)
        for one, all_of_them in zip(alone, together):
            assert one.energy[0] == pytest.approx(all_of_them.energy[index], abs=1e-10)
            part = all_of_them.positions[start : start + len(atoms)]
            assert np.abs(one.positions - part).max() < 1e-9
        start += len(atoms)
    assert np.abs(together[-1].positions[:32] - systems[0].positions).max() > 0.05


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other):
        assert a.step == b.step
        for name in ("energy", "kinetic", "positions", "velocities", "forces"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_a_list_that_gets_too_short_is_repeated():
    settings = MDSettings(timestep=4.0, temperature=100.0, friction=5.0)
    roomy = DeviceMD(LennardJones(), [argon()], settings, fixed_shapes=True)
    truth = snapshots(roomy, 60, every=10)
    assert roomy.num_repeats == 0
    tight = DeviceMD(
        LennardJones(), [argon()], settings, fixed_shapes=True, capacity=Capacity(8, 8, 64), search="cells"
    )
    found = snapshots(tight, 60, every=10)
    assert tight.capacity.width > 8
    assert tight.capacity.crowd > 8
    assert tight.capacity.edges > 64
    for a, b in zip(found, truth):  # other shapes, other order of sums
        assert a.energy[0] == pytest.approx(b.energy[0], abs=1e-11)
    # in the middle of a run: shapes that hold the first edges and not one more
    cold = argon(lattice=5.4)
    roomy = DeviceMD(LennardJones(), [cold], settings, fixed_shapes=True)
    roomy.start()
    needs = roomy.list.needs(roomy.list.flags.tolist())
    exact = dataclasses.replace(roomy.capacity, edges=needs.edges)
    engine = DeviceMD(LennardJones(), [cold], settings, fixed_shapes=True, capacity=exact)
    engine.start()
    assert engine.capacity == exact
    found = snapshots(engine, 40, every=10)
    truth = snapshots(roomy, 40, every=10)
    assert engine.num_repeats > 0
    assert engine.capacity.edges > needs.edges
    for a, b in zip(found, truth):
        assert np.abs(a.positions - b.positions).max() < 1e-11


def test_a_list_that_gets_too_old_is_repeated():
    settings = MDSettings(ensemble="nve", timestep=10.0, skin=0.3)
    hot = argon(temperature=300.0)
    engine = DeviceMD(LennardJones(), [hot], settings, fixed_shapes=True)
    found = snapshots(engine, 60, every=5)
    assert engine.num_repeats > 0
    fresh = DeviceMD(LennardJones(), [hot], dataclasses.replace(settings, skin=0.0), fixed_shapes=True)
    fresh._every = 1
    truth = snapshots(fresh, 60, every=5)
    assert fresh.list.num_lists >= 60
    for a, b in zip(found, truth):
        assert np.abs(a.positions - b.positions).max() < 1e-9
    host = snapshots(DeviceMD(LennardJones(), [hot], settings), 60, every=5)
    for a, b in zip(host, truth):
        assert np.abs(a.positions - b.positions).max() < 1e-9


@pytest.mark.parametrize("trouble", ["old", "short"])
def test_blocks_ahead_and_recorded_steps_change_nothing(monkeypatch, trouble):
    """What a GPU does: a block is launched before the one before it was looked at, and steps are replayed."""
    monkeypatch.setattr(device_md, "record", partial(device_md.record, recorder=Repeater()))
    settings = MDSettings(timestep=10.0, skin=0.3, temperature=300.0)
    options = {"fixed_shapes": True, "capacity": Capacity(64, 64, 1536 if trouble == "old" else 1344)}
    plain = DeviceMD(LennardJones(), [argon(temperature=300.0)], settings, **options)
    ahead = DeviceMD(LennardJones(), [argon(temperature=300.0)], settings, record=True, **options)
    ahead.blocks_ahead = 3
    runs = [snapshots(engine, 150, every=5) for engine in (plain, ahead)]
    assert ahead.num_repeats > 0
    if trouble == "short":
        assert ahead.capacity.edges > 1344
    assert ahead._recorded is not None
    for a, b in zip(*runs, strict=True):
        assert a.step == b.step
        assert np.abs(a.positions - b.positions).max() < 1e-8


def test_without_a_skin_every_step_has_its_list():
    settings = MDSettings(ensemble="nve", timestep=2.0, skin=0.0)
    engine = DeviceMD(LennardJones(), [argon()], settings, fixed_shapes=True)
    skinned = DeviceMD(LennardJones(), [argon()], dataclasses.replace(settings, skin=1.0), fixed_shapes=True)
    for a, b in zip(snapshots(engine, 30), snapshots(skinned, 30)):
        assert np.abs(a.positions - b.positions).max() < 1e-10
    assert skinned.list.num_lists < 10


def test_results_do_not_depend_on_how_often_lists_are_made():
    settings = MDSettings(timestep=4.0, temperature=80.0, skin=1.0)
    runs = []
    for every in (1, 7):
        engine = DeviceMD(LennardJones(), [argon()], settings, fixed_shapes=True, capacity=Capacity(128, 64, 64 * 108))
        engine._every = every
        engine._adapt = lambda moved: None
        runs.append(snapshots(engine, 40, every=10))
        assert engine.num_repeats == 0
    assert_same(*runs)


def test_a_lost_atom_ends_the_run():
    class Broken(LennardJones):
        def __call__(self, graph, *, forces=True):
            prediction = super().__call__(graph)
            return dataclasses.replace(prediction, forces=prediction.forces * float("nan"))

    engine = DeviceMD(Broken(), [argon(repeat=2)], MDSettings(), fixed_shapes=True)
    with pytest.raises(SimulationError, match="broke down within"):
        snapshots(engine, 30)


class NoQuestions(TorchDispatchMode):
    """Refuses what makes a GPU wait for the host or the host for it."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "is_nonzero", "equal", "bincount")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.split(".")[-1]
        if name in ("nonzero_static",):
            return function(*args, **(kwargs or {}))
        assert not any(name == refused or name.startswith("_unique") for refused in self.REFUSED), name
        if name == "index" or name.startswith("index_put"):
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            assert not masks, "a mask as an index"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("search", ["brute", "cells"])
@pytest.mark.parametrize("ensemble", ["nve", "langevin", "bussi"])
def test_no_step_and_no_list_asks_the_device(ensemble, search):
    engine = DeviceMD(LennardJones(), [argon()], MDSettings(ensemble=ensemble), fixed_shapes=True, search=search)
    engine.start()
    with torch.no_grad():
        engine.integrator.prepare(0)
        with NoQuestions():
            for _ in range(3):
                engine.integrator.first_half()
                engine._renew()
                engine._forces_and_kick()
            engine._packet(wanted=True)
    with pytest.raises(AssertionError), NoQuestions():
        engine.state.energy.sum().item()


def test_the_whole_run_asks_only_for_packets(monkeypatch):
    """What the engine does between packets, blocks and all; on a CPU reading a packet is not a question."""
    engine = DeviceMD(LennardJones(), [argon()], MDSettings(), fixed_shapes=True)
    engine.start()
    launch = engine._launch

    def watched(*arguments):
        engine.integrator.prepare(arguments[0])  # random numbers are seeded on the host, outside the steps
        with NoQuestions():
            return launch(*arguments)

    monkeypatch.setattr(engine, "_launch", watched)
    assert len(snapshots(engine, 48, every=10)) == 4


HOSTS = {
    "mace": MACEConfig(num_channels=4, l_max=2, correlation=2, radial_mlp=[8], cutoff_A=4.0),
    "nequip": NequIPConfig(num_channels=4, num_layers=2, cutoff_A=4.0),
    "visnet": ViSNetConfig(num_channels=8, num_layers=2, num_heads=2, cutoff_A=4.0),
    "o3": O3MPNNConfig(num_channels=8, num_layers=2, l_max=1, cutoff_A=4.0, zero_init=False),
}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("slot", ["bare", "mara", "efa"])
@pytest.mark.parametrize("host", HOSTS)
def test_padding_changes_nothing(host, slot, backend):
    slots = {
        "mara": {"edge_gate": MARAConfig(form="published", frame="lab", gate="published", hidden_dim=8)},
        "efa": {"global_mixer": EFAConfig(max_degree=0, num_features_qk=4, num_features_v=4, zero_init=False)},
    }.get(slot, {})
    model = potential(HOSTS[host], **slots)
    systems = [ethanol(), molecule("CH4")]
    exact, padded = HostList(systems, 4.0, 0.5), DeviceList(systems, 4.0, 0.5, device=torch.device("cpu"))
    x = torch.tensor(np.concatenate([atoms.positions for atoms in systems]))
    padded.build(x)
    with use_backend(backend):
        truth = model(exact.refresh(x))
        found = model(padded.refresh(x))
    assert int((padded.graph.receivers >= len(x)).sum()) > 0
    assert float(truth.forces.abs().max()) > 1e-3
    np.testing.assert_allclose(found.energy[:2].numpy(), truth.energy.numpy(), rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.forces[: len(x)].numpy(), truth.forces.numpy(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_a_resumed_run_equals_a_whole_one(tmp_path, monkeypatch, fixed_shapes):
    model = potential()
    if fixed_shapes:
        monkeypatch.setattr("steradian.simulate.md.DeviceMD", lambda *a, **k: DeviceMD(*a, fixed_shapes=True, **k))
    settings = MDSettings(save_every=5, restart_every=20)

    def run(name, steps, **options):
        return run_md(model, ethanol(), tmp_path / name, steps=steps, settings=settings, engine="device", **options)

    def files(name):
        return {file: (tmp_path / name / file).read_bytes() for file in ("trajectory.extxyz", "md.csv", "restart.json")}

    run("whole", 60)
    run("cut", 35)
    for name in ("trajectory.extxyz", "md.csv"):  # a kill in mid-write
        with open(tmp_path / "cut" / name, "a") as stream:
            stream.write("9\nhalf a fra")
    run("cut", 60, resume=True)
    assert files("whole") == files("cut")

    def interrupt(step, temperature, energy):
        if step == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("stopped", 60, report=interrupt)
    run("stopped", 60, resume=True)
    assert files("whole") == files("stopped")
    with pytest.raises(SimulationError, match="another engine"):
        run_md(model, ethanol(), tmp_path / "cut", steps=70, settings=settings, engine="ase", resume=True)
    # without a word the engine of the run goes on
    result = run_md(model, ethanol(), tmp_path / "cut", steps=65, settings=settings, resume=True)
    assert result.steps == 65


def test_mistakes(tmp_path):
    model = potential()
    with pytest.raises(SimulationError, match="engine must be auto, ase or device"):
        run_md(model, ethanol(), tmp_path / "a", steps=1, engine="magic")
    with pytest.raises(SimulationError, match="device 'abacus' is not known"):
        run_md(model, ethanol(), tmp_path / "a", steps=1, device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(SimulationError, match="no GPU that PyTorch"):
            run_md(model, ethanol(), tmp_path / "a", steps=1, device="cuda")
    with pytest.raises(SimulationError, match="no atoms"):
        run_md(model, Atoms(), tmp_path / "a", steps=1, engine="device")
    with pytest.raises(ValueError, match="does not know Ar"):
        run_md(model, argon(), tmp_path / "a", steps=1, engine="device")
    for engine in ("ase", "device"):
        lost = ethanol()
        lost.positions[2, 1] = np.nan
        with pytest.raises(SimulationError, match="the position of atom 2 is not finite"):
            run_md(model, lost, tmp_path / "a", steps=1, engine=engine)
    assert not (tmp_path / "a").exists()
