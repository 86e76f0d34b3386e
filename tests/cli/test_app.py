"""The command line as a whole: quick help, one clear line for a mistake, no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from steradian.build import build_potential, save_potential
from steradian.cli.common import speak_any_encoding
from steradian.config import MACEConfig, MARAConfig, ModelConfig
from tests.systems import made_up

STATISTICS = made_up({1: -13.0, 6: -1000.0, 8: -2000.0}, num_frames=7)


def run(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "steradian", *map(str, arguments)], capture_output=True, text=True, check=False, cwd=cwd
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with MARA, one without, and a molecule."""
    path = tmp_path_factory.mktemp("models")
    host = MACEConfig(num_channels=4, l_max=2, correlation=2, radial_mlp=[8], cutoff_A=3.0)
    mara = MARAConfig(form="published", frame="lab", gate="published", hidden_dim=8)
    for name, gate in (("plain", {"kind": "none"}), ("mara", mara)):
        save_potential(
            path / f"{name}.safetensors", build_potential(ModelConfig(host=host, edge_gate=gate), STATISTICS, seed=0)
        )
    positions = [[0, 0, 0], [1.2, 0.1, 0], [-0.6, 0.9, 0.1], [-0.5, -0.9, 0.2]]
    write(path / "formaldehyde.xyz", Atoms("COH2", positions))
    write(path / "gold.xyz", Atoms("Au2", [[0, 0, 0], [2.5, 0, 0]]))
    (path / "empty.xyz").write_text("")
    return path


def test_importing_the_command_line_imports_nothing_heavy():
    code = "import sys, steradian.cli; print([m for m in ('torch', 'ase', 'scipy', 'matplotlib') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def processor_seconds_of_children():
    used = os.times()
    return used.children_user + used.children_system


def test_help_is_quick_and_lists_every_command():
    times = []
    for _ in range(3):
        start = processor_seconds_of_children()
        answer = run("--help")
        times.append(processor_seconds_of_children() - start)
    assert answer.returncode == 0
    for command in ("train", "evaluate", "compare", "md", "attend", "inspect", "demo", "dataset", "config"):
        assert command in answer.stdout
    assert min(times) < 1.5  # processor time, which a busy machine stretches little; 0.5 s where nothing else runs


@pytest.mark.parametrize("command", ["train", "evaluate", "compare", "md", "attend", "inspect", "demo"])
def test_every_command_explains_itself(command):
    answer = run(command, "--help")
    assert answer.returncode == 0
    assert "Usage" in answer.stdout


def test_version():
    assert run("--version").stdout.startswith("steradian ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("inspect", "none.safetensors"), "no such model file"),
        (("inspect", "empty.xyz"), "not a safetensors file"),
        (("attend", "plain.safetensors", "formaldehyde.xyz"), "no attention to show"),
        (("attend", "mara.safetensors", "none.xyz"), "no such file"),
        (("attend", "mara.safetensors", "gold.xyz"), "does not know Au; it was trained on H, C, O"),
        (("attend", "mara.safetensors", "formaldehyde.xyz", "--atom", "9"), "there is no atom 9"),
        (("md", "plain.safetensors", "empty.xyz"), "ASE cannot read it"),
        (("md", "plain.safetensors", "gold.xyz"), "does not know Au"),
        (("md", "plain.safetensors", "formaldehyde.xyz", "--timestep", "-1"), "timestep must be positive"),
        (("md", "plain.safetensors", "formaldehyde.xyz", "--device", "abacus"), "choose auto, cpu or cuda"),
        (("md", "plain.safetensors", "gold.xyz", "--engine", "device", "--device", "cpu"), "does not know Au"),
        (("md", "plain.safetensors", "formaldehyde.xyz", "--timestep", "50"), "say why with --timestep-reason"),
        (("md", "plain.safetensors", "formaldehyde.xyz", "--out", "gold.xyz/run"), "gold.xyz/run: Not a directory"),
        (("inspect", "[/x] \x1b[31m.safetensors"), r"[/x] \x1b[31m.safetensors: no such model file"),
        (("evaluate", "plain.safetensors", "none.xyz"), "none.xyz"),
        (("train",), "give a configuration file, or --data FILE"),
        (("train", "--data", "empty.xyz"), "empty"),
    ],
)
def test_mistakes_get_one_line(folder, arguments, expected):
    answer = run(*arguments, cwd=folder)
    assert answer.returncode == 2, answer.stdout + answer.stderr
    assert "Traceback" not in answer.stderr
    assert expected in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1


def test_inspect(folder):
    answer = run("inspect", "mara.safetensors", "--json", cwd=folder)
    assert answer.returncode == 0, answer.stderr
    assert "lab_frame" in answer.stdout
    assert "C -1000.0000" in answer.stdout


def test_attend_writes_pictures_and_numbers(folder):
    answer = run("attend", "mara.safetensors", "formaldehyde.xyz", "--out", "att", cwd=folder)
    assert answer.returncode == 0, answer.stderr
    names = {entry.name for entry in (folder / "att").iterdir()}
    assert names == {"messages.png", "sphere.png", "distance.png", "attention.npz"}
    with np.load(folder / "att" / "attention.npz") as file:
        assert file["alpha_0"].shape == file["senders"].shape
        # equal shares average to one: the profile is a density over the sphere
        assert np.all(file["profile_0"] >= 0)
        assert file["alpha_0"].std() > 0


def test_dynamics_on_the_device(folder):
    """The engine of a GPU, on the CPU: the same files, and a run that goes on."""
    command = ("md", "plain.safetensors", "formaldehyde.xyz", "--out", "run", "--engine", "device", "--device", "cpu")
    for ensemble in ("nve", "bussi"):
        answer = run(*command, "--steps", 20, "--ensemble", ensemble, "--overwrite", cwd=folder)
        assert answer.returncode == 0, answer.stderr
    assert "20 steps, mean temperature" in answer.stdout
    names = {"trajectory.extxyz", "md.csv", "md.png", "restart.json", "settings.json"}
    assert {entry.name for entry in (folder / "run").iterdir()} == names
    answer = run(*command, "--steps", 40, "--ensemble", "bussi", "--resume", cwd=folder)
    assert answer.returncode == 0, answer.stderr
    table = np.genfromtxt(folder / "run" / "md.csv", delimiter=",", names=True)
    assert table["step"].tolist() == [0, 10, 20, 30, 40]
    answer = run(*command[:-4], "--engine", "ase", "--steps", 50, "--ensemble", "bussi", "--resume", cwd=folder)
    assert answer.returncode == 2
    assert "another engine" in answer.stderr


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii"])
def test_output_in_any_encoding(tmp_path, encoding):
    command = [sys.executable, "-m", "steradian", "dataset", "info", "bundled:malonaldehyde"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode(encoding)
    assert ("eV/A" if encoding == "ascii" else "eV/Å") in text
    command[-1] = "Å→\x1b[31m.xyz"
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 2
    assert b"\x1b" not in done.stderr
    assert b"no file matches" in done.stderr


@pytest.mark.parametrize(("name", "engine"), [("SIGTERM", "ase"), ("SIGHUP", "device"), ("SIGINT", "ase")])
def test_a_signal_ends_dynamics_with_a_restart_point_and_a_line(folder, tmp_path, name, engine):
    command = ["md", "plain.safetensors", "formaldehyde.xyz", "--out", tmp_path / "run", "--engine", engine]
    arguments = [sys.executable, "-m", "steradian", *map(str, [*command, "--steps", 100_000])]
    process = subprocess.Popen(
        arguments, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # what a shell starts in the background ignores Ctrl-C, and hands that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    started = time.monotonic()
    while not (tmp_path / "run" / "restart.json").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - started < 120
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + getattr(signal, name)
    lines = errors.strip().splitlines()
    assert "has a restart point at step" in lines[0]
    assert lines[1:] == [f"stopped by {name}"]
    assert not [entry for entry in (tmp_path / "run").iterdir() if entry.name.startswith(".")]
    answer = run(*command, "--steps", 5, "--resume", cwd=folder)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_an_evaluation_with_a_line_and_leaves_nothing(folder, tmp_path, name):
    atoms = Atoms("COH2", [[0, 0, 0], [1.2, 0.1, 0], [-0.6, 0.9, 0.1], [-0.5, -0.9, 0.2]])
    atoms.calc = SinglePointCalculator(atoms, energy=-3026.0, forces=np.zeros((4, 3)))
    write(tmp_path / "many.xyz", [atoms] * 4000, format="extxyz")
    command = ["evaluate", "plain.safetensors", tmp_path / "many.xyz", "--out", tmp_path / "results", "--batch", 1]
    arguments = [sys.executable, "-m", "steradian", *map(str, command)]
    process = subprocess.Popen(arguments, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started = time.monotonic()
    while not (tmp_path / "results").exists():  # made before the work begins
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - started < 120
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name)
    assert errors.strip().splitlines()[-1] == f"stopped by {name}"
    assert "Traceback" not in errors
    assert [entry.name for entry in tmp_path.iterdir()] == ["many.xyz"]


def test_the_drift_is_said_where_energy_is_conserved(folder):
    for ensemble, said in (("nve", True), ("langevin", False)):
        command = ("md", "plain.safetensors", "formaldehyde.xyz", "--out", "drift", "--steps", 2, "--overwrite")
        answer = run(*command, "--ensemble", ensemble, cwd=folder)
        assert answer.returncode == 0, answer.stderr
        assert ("drift of the total energy" in answer.stdout) is said


def test_output_for_terminals_without_unicode_and_readers_that_leave(folder):
    command = [sys.executable, "-m", "steradian", "inspect", "plain.safetensors"]
    for encoding, shown in (("cp1252", "eV/Å"), ("latin-1", "eV/Å")):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        answer = subprocess.run(command, cwd=folder, capture_output=True, env=environment, check=False)
        assert answer.returncode == 0, answer.stderr
        assert shown in answer.stdout.decode(encoding)
    speak_any_encoding()
    assert "a −1.5 → b".encode("cp1252", errors="spelled") == b"a -1.5 -> b"
    assert "∞ … α 中".encode("ascii", errors="spelled") == b"inf ... a ?"
