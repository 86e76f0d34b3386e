"""Molecular dynamics: conservation, thermostat, and runs that go on as if never stopped."""

from __future__ import annotations

import numpy as np
import pytest
from ase.build import molecule

from steradian.build import build_potential
from steradian.config import MACEConfig, ModelConfig
from steradian.simulate.analysis import energy_drift, force_statistics, radial_distribution
from steradian.simulate.md import MDSettings, SimulationError, run_md
from tests.systems import STATISTICS


@pytest.fixture(scope="module")
def potential():
    host = MACEConfig(num_channels=4, l_max=1, correlation=2, radial_mlp=[8], cutoff_A=4.0)
    return build_potential(ModelConfig(host=host, precision="float64"), STATISTICS, seed=2).eval()


def ethanol():
    return molecule("CH3CH2OH")


def files(folder):
    return {name: (folder / name).read_bytes() for name in ("trajectory.extxyz", "md.csv", "restart.json")}


def test_nve_conserves_energy_to_second_order(potential, tmp_path):
    spreads = []
    for timestep in (0.4, 0.2):
        folder = tmp_path / str(timestep)
        settings = MDSettings(ensemble="nve", timestep=timestep, save_every=1, temperature=300.0)
        run_md(potential, ethanol(), folder, steps=int(40 / timestep), settings=settings)
        log = np.genfromtxt(folder / "md.csv", delimiter=",", names=True)
        assert np.ptp(log["potential_eV"]) > 1e-3, "nothing moved"
        spreads.append(np.ptp(log["total_eV"]))
    assert spreads[0] < 5e-3
    assert 2.5 < spreads[0] / spreads[1] < 6.5  # velocity Verlet: half the step, a quarter of the error


def test_a_resumed_run_equals_a_whole_one(potential, tmp_path):
    settings = MDSettings(ensemble="langevin", save_every=5, restart_every=20)
    run_md(potential, ethanol(), tmp_path / "whole", steps=60, settings=settings)
    run_md(potential, ethanol(), tmp_path / "cut", steps=35, settings=settings)
    # a kill in mid-write: half a frame and half a line after the restart point
    for name in ("trajectory.extxyz", "md.csv"):
        with open(tmp_path / "cut" / name, "a") as stream:
            stream.write("9\nhalf a fra")
    run_md(potential, ethanol(), tmp_path / "cut", steps=60, settings=settings, resume=True)
    whole, resumed = files(tmp_path / "whole"), files(tmp_path / "cut")
    assert whole["trajectory.extxyz"] == resumed["trajectory.extxyz"]
    assert whole["md.csv"] == resumed["md.csv"]


def test_interruption_between_restart_points(potential, tmp_path):
    settings = MDSettings(ensemble="langevin", save_every=5, restart_every=20)
    run_md(potential, ethanol(), tmp_path / "whole", steps=40, settings=settings)

    def interrupt(step, temperature, energy):
        if step == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_md(potential, ethanol(), tmp_path / "cut", steps=40, settings=settings, report=interrupt)
    run_md(potential, ethanol(), tmp_path / "cut", steps=40, settings=settings, resume=True)
    assert files(tmp_path / "whole") == files(tmp_path / "cut")


def test_seeds_matter(potential, tmp_path):
    for seed in (0, 1):
        run_md(potential, ethanol(), tmp_path / str(seed), steps=10, settings=MDSettings(seed=seed))
    assert files(tmp_path / "0")["md.csv"] != files(tmp_path / "1")["md.csv"]


def test_refusals(potential, tmp_path):
    with pytest.raises(SimulationError, match="ensemble must be"):
        MDSettings(ensemble="npt")
    with pytest.raises(SimulationError, match="no run to resume"):
        run_md(potential, ethanol(), tmp_path / "x", steps=1, resume=True)
    run_md(potential, ethanol(), tmp_path / "x", steps=2)
    with pytest.raises(SimulationError, match="holds a run already"):
        run_md(potential, ethanol(), tmp_path / "x", steps=2)
    with pytest.raises(SimulationError, match="another temperature"):
        run_md(potential, ethanol(), tmp_path / "x", steps=2, settings=MDSettings(temperature=10.0), resume=True)
    with pytest.raises(SimulationError, match="other atoms"):
        run_md(potential, molecule("CH4"), tmp_path / "x", steps=2, resume=True)


def test_a_breakdown_is_said(potential, tmp_path):
    hot = ethanol()
    hot.set_momenta(np.random.default_rng(0).normal(scale=300.0, size=(9, 3)))
    with pytest.raises(SimulationError, match="broke down at step"):
        run_md(potential, hot, tmp_path, steps=20, settings=MDSettings(ensemble="nve"))


def test_analysis():
    assert energy_drift(np.array([0.0, 1000.0, 2000.0]), np.array([0.0, 0.3, 0.6]), 3) == pytest.approx(0.1)
    forces = np.zeros((4, 2, 3))
    forces[:, 0, 0] = [1, 2, 3, 4]
    assert np.allclose(force_statistics(forces)["max"], [1, 2, 3, 4])
    assert np.allclose(force_statistics(forces, window=3)["max"][1:3], [2, 3])
    distance, g = radial_distribution([np.array([[0, 0, 0], [1.5, 0, 0]])], num_bins=60, maximum=3.0)
    assert distance[np.argmax(g)] == pytest.approx(1.5, abs=0.05)
    generator = np.random.default_rng(0)
    cell = np.array([[8.0, 0, 0], [1.0, 8, 0], [0, -0.5, 8]])
    frames = [generator.uniform(size=(60, 3)) @ cell for _ in range(20)]
    _, gas = radial_distribution(frames, num_bins=20, maximum=3.5, cell=cell)
    assert gas[8:].mean() == pytest.approx(1.0, abs=0.05)
    with pytest.raises(ValueError, match="above half"):
        radial_distribution(frames, maximum=6.0, cell=cell)
