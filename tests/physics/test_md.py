"""Molecular dynamics: conservation, thermostat, and runs that go on as if never stopped."""

from __future__ import annotations

import json

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule

from steradian.build import build_potential
from steradian.config import MACEConfig, ModelConfig
from steradian.simulate.analysis import energy_drift, force_statistics, radial_distribution
from steradian.simulate.files import RunFiles
from steradian.simulate.md import MDSettings, SimulationError, _draw_velocities, run_md
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


@pytest.mark.parametrize("engine", ["ase", "device"])
def test_a_breakdown_leaves_no_restart_point_of_its_own(potential, tmp_path, engine):
    """Restart points fall between saved frames here; what is broken must not become one."""
    hot = ethanol()
    hot.set_momenta(np.random.default_rng(0).normal(scale=300.0, size=(9, 3)))
    settings = MDSettings(ensemble="nve", save_every=1000, restart_every=2)
    with pytest.raises(SimulationError, match="broke down"):
        run_md(potential, hot, tmp_path, steps=40, settings=settings, engine=engine)
    restart = json.loads((tmp_path / "restart.json").read_text())
    assert restart["step"] == 0
    assert np.isfinite(restart["positions"]).all()


@pytest.mark.parametrize("engine", ["ase", "device"])
def test_a_start_that_fails_leaves_nothing_and_keeps_an_old_run(potential, tmp_path, engine):
    flat = ethanol()
    flat.set_cell([[8, 0, 0], [0, 8, 0], [8, 8, 0]])
    flat.pbc = True
    together = ethanol()
    together.positions[1] = together.positions[0]
    lost = ethanol()
    lost.numbers[0] = 79
    for start, said in ((flat, "no volume"), (together, "finite|same place|at one place"), (lost, "know Au")):
        with pytest.raises(ValueError, match=said):
            run_md(potential, start, tmp_path / "x" / "y", steps=2, engine=engine)
    assert not (tmp_path / "x").exists()
    run_md(potential, ethanol(), tmp_path / "x", steps=2, engine=engine)
    before = files(tmp_path / "x")
    for start in (flat, lost):
        with pytest.raises(ValueError):
            run_md(potential, start, tmp_path / "x", steps=2, engine=engine, overwrite=True)
    assert files(tmp_path / "x") == before
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="choose another name"):  # before anything is computed
        run_md(tmp_path / "no model", ethanol(), tmp_path / "file" / "run", steps=2, engine=engine)


@pytest.mark.parametrize("engine", ["ase", "device"])
def test_one_run_at_a_time_in_a_folder(potential, tmp_path, engine):
    def intrude(*_):
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(SimulationError, match="another process is simulating there"):
                run_md(potential, ethanol(), tmp_path, steps=30, engine=engine, **options)

    run_md(potential, ethanol(), tmp_path, steps=20, engine=engine, report=intrude)
    run_md(potential, ethanol(), tmp_path, steps=30, engine=engine, resume=True)
    assert not (tmp_path / ".lock").exists()


def resumed(potential, folder, steps=60):
    settings = MDSettings(save_every=5, restart_every=20)
    return run_md(potential, ethanol(), folder, steps=steps, settings=settings, resume=True)


def test_files_that_are_not_what_was_written_are_refused(potential, tmp_path, capsys):
    settings = MDSettings(save_every=5, restart_every=20)
    run_md(potential, ethanol(), tmp_path, steps=40, settings=settings)
    whole = {path: path.read_bytes() for path in tmp_path.iterdir()}
    trajectory, log, restart = (tmp_path / name for name in ("trajectory.extxyz", "md.csv", "restart.json"))
    text = whole[trajectory]
    twenty = text.index(b"step=20")
    for path, content, said in (
        (trajectory, text[:twenty], "what is left goes up to step 15"),
        (trajectory, b"", "nothing of it is left"),
        (trajectory, text.replace(b"step=20", b"step=21"), "damaged or changed"),
        (log, whole[log][:-200], "what is left goes up to step"),
        (log, whole[log].replace(b"10.0,", b"12.0,"), "damaged or changed"),
        (restart, whole[restart].replace(b"0.1", b"0.2", 1), "the hash differs"),
        (restart, whole[restart][:900], "damaged, it cannot be read"),
        (restart, b"{}", "damaged"),
        (restart, b"[]", "damaged"),
        (tmp_path / "settings.json", b"\xff\xfe", "damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(SimulationError, match=said) as caught:
            resumed(potential, tmp_path)
        assert str(path) in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        assert "--overwrite" in str(caught.value) or content == b"{}"
        assert path.read_bytes() == content, "changed by a refusal"
        path.write_bytes(whole[path])
    trajectory.unlink()
    with pytest.raises(SimulationError, match="nothing of it is left"):
        resumed(potential, tmp_path)
    trajectory.write_bytes(text)
    capsys.readouterr()
    resumed(potential, tmp_path)
    assert capsys.readouterr().err == ""
    run_md(potential, ethanol(), tmp_path / "whole", steps=60, settings=settings)
    assert files(tmp_path) == files(tmp_path / "whole")


def test_a_restart_point_without_a_hash_goes_on_with_a_line(potential, tmp_path, capsys):
    settings = MDSettings(save_every=5, restart_every=20)
    for name, steps in (("old", 40), ("whole", 60)):
        run_md(potential, ethanol(), tmp_path / name, steps=steps, settings=settings)
    restart = tmp_path / "old" / "restart.json"
    stored = json.loads(restart.read_text())
    old = {name: value for name, value in stored.items() if not name.endswith("sha256") and name != "format"}
    restart.write_text(json.dumps(old))
    resumed(potential, tmp_path / "old")
    assert "without a hash" in capsys.readouterr().err
    assert files(tmp_path / "old") == files(tmp_path / "whole")
    assert RunFiles(tmp_path / "old").restart_step() == 60


@pytest.mark.parametrize("engine", ["ase", "device"])
@pytest.mark.parametrize("ensemble", ["nve", "langevin", "bussi"])
def test_one_atom_moves(potential, tmp_path, engine, ensemble):
    for name, atoms in (("free", Atoms("C")), ("crystal", Atoms("C", cell=[3.0, 3.0, 3.0], pbc=True))):
        settings = MDSettings(ensemble=ensemble, save_every=1)
        run_md(potential, atoms, tmp_path / name, steps=3, settings=settings, engine=engine)
        log = np.genfromtxt(tmp_path / name / "md.csv", delimiter=",", names=True)
        assert np.isfinite(log["total_eV"]).all()
        assert (log["kinetic_eV"] > 0).all()


def test_a_single_atom_keeps_the_velocity_it_drew():
    """Taking off the motion of the whole would leave nothing but rounding, scaled up to the temperature."""
    for seed in range(20):
        atoms = Atoms("C")
        _draw_velocities(atoms, MDSettings(seed=seed), np.random.RandomState(seed))
        expected = np.random.RandomState(seed).standard_normal((1, 3))
        assert np.allclose(np.cross(atoms.get_momenta(), expected), 0.0, atol=1e-10)
        assert np.linalg.norm(atoms.get_momenta()) > 0.01


def test_absurd_settings():
    for settings, said in (
        ({"timestep": 50.0}, "say why with --timestep-reason"),
        ({"timestep": float("inf")}, "finite"),
        ({"temperature": float("nan")}, "finite"),
    ):
        with pytest.raises(SimulationError, match=said):
            MDSettings(**settings)
    assert MDSettings(timestep=50.0, timestep_reason="coarse grains").timestep == 50.0


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
