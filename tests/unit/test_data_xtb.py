import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from steradian.cli.dataset import app
from steradian.data.files import read_structures, write_structures
from steradian.data.xtb import Recipe, _State, autocorrelation_time, make_dataset, starting_geometry
from steradian.graph.structures import DataError

needs_tblite = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("tblite") is None, reason="needs tblite (the xtb extra)"
)
TINY = Recipe(molecule="H2O", frames=12, stride=2.0, equilibration=5.0, seed=3)
runner = CliRunner()


def arrays(path):
    frames = read_structures(path)
    return np.array([frame.positions for frame in frames]), np.array([frame.energy for frame in frames])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was not interrupted."""
    pytest.importorskip("tblite")
    path = tmp_path_factory.mktemp("whole") / "water.npz"
    report = make_dataset(TINY, path, progress=False)
    return path, report


@needs_tblite
def test_labels_are_those_of_the_method(whole):
    from tblite.ase import TBLite

    path, report = whole
    frames = read_structures(path)
    assert report["frames"] == len(frames) == 12
    atoms = frames[7].to_ase()
    atoms.calc = TBLite(method="GFN2-xTB", verbosity=0, accuracy=0.01)
    assert frames[7].energy == pytest.approx(atoms.get_potential_energy(), abs=1e-5)
    assert frames[7].forces == pytest.approx(atoms.get_forces(), abs=1e-3)
    assert np.abs(frames[7].forces).max() > 0.1
    assert atoms.get_center_of_mass() == pytest.approx(0, abs=1e-12)
    assert len({frame.energy for frame in frames}) == 12
    assert frames[0].config_type == "GFN2-xTB 500K"
    recipe = json.loads(path.with_name("water.npz.recipe.json").read_text())
    assert recipe["recipe"]["seed"] == 3
    assert recipe["report"]["independent_frames"] <= 12
    assert sorted(file.name for file in path.parent.iterdir()) == ["water.npz", "water.npz.recipe.json"]


@needs_tblite
def test_seeds_give_different_frames_and_the_same_seed_the_same(whole, tmp_path):
    path, _ = whole
    make_dataset(TINY, tmp_path / "again.npz", progress=False)
    for mine, expected in zip(arrays(tmp_path / "again.npz"), arrays(path)):
        assert (mine == expected).all()
    other = Recipe(molecule="H2O", frames=2, stride=2.0, equilibration=5.0, seed=4)
    make_dataset(other, tmp_path / "other.npz", progress=False)
    assert not np.allclose(arrays(tmp_path / "other.npz")[0], arrays(path)[0][:2])


COMMAND = """
import os, sys
import steradian.data.xtb as xtb
save = xtb._State.save
def save_and_hang(self, path, recipe):
    save(self, path, recipe)
    if len(self.energies) == 5:
        print("saved", flush=True)
        path.with_name(f".{path.name}.0123456789abcdef.tmp").write_bytes(b"half written")
        import time; time.sleep(60)
xtb._State.save = save_and_hang
recipe = xtb.Recipe(molecule="H2O", frames=12, stride=2.0, equilibration=5.0, seed=3)
xtb.make_dataset(recipe, sys.argv[1], progress=False)
"""


@needs_tblite
def test_a_killed_run_continues_to_the_same_frames(whole, tmp_path):
    out = tmp_path / "water.npz"
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(out)], stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.stdout.readline() == b"saved\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    assert (tmp_path / "water.npz.state").exists()
    out.write_bytes(b"")  # as if it had been killed between writing the frames and removing the state
    with pytest.raises(DataError, match=r"another run: temperature was 500\.0 and is 600\.0 now"):
        make_dataset(Recipe(molecule="H2O", frames=12, stride=2.0, equilibration=5.0, seed=3, temperature=600.0), out)
    report = make_dataset(TINY, out, progress=False)
    assert report["frames_resumed"] == 5
    for mine, expected in zip(arrays(out), arrays(whole[0])):
        assert (mine == expected).all()
    assert {file.name for file in tmp_path.iterdir()} == {"water.npz", "water.npz.recipe.json"}


@needs_tblite
def test_a_run_killed_before_its_first_frames_continues_to_the_same_ones(whole, tmp_path, monkeypatch):
    """The calculator is warm from the relaxation in one case and new in the other; the frames are the same."""

    def killed(*_):
        raise KeyboardInterrupt

    out = tmp_path / "water.npz"
    with monkeypatch.context() as patch:
        patch.setattr("steradian.data.xtb._State.extend", killed)
        with pytest.raises(KeyboardInterrupt):
            make_dataset(TINY, out, progress=False)
    assert make_dataset(TINY, out, progress=False)["frames_resumed"] == 0
    for mine, expected in zip(arrays(out), arrays(whole[0])):
        assert (mine == expected).all()


@needs_tblite
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"charge": 50}, "a charge of 50 on 3 atoms"),
        ({"charge": -7}, "a charge of -7 on 3 atoms"),
        ({"multiplicity": -1}, "multiplicity must be 1"),
        ({"multiplicity": 0}, "multiplicity must be 1"),
        ({"multiplicity": 2}, "multiplicity 2 is impossible with 10 electrons: it is odd"),
        ({"charge": 1, "multiplicity": 1}, "multiplicity 1 is impossible with 9 electrons: it is even"),
        ({"multiplicity": 13}, "impossible"),
    ],
)
def test_charges_and_multiplicities_that_cannot_be(change, match, tmp_path):
    with pytest.raises(DataError, match=match):
        make_dataset(Recipe(molecule="H2O", frames=1, **change), tmp_path / "a.npz", progress=False)
    assert not list(tmp_path.iterdir())


@needs_tblite
def test_mistakes(tmp_path, monkeypatch):
    out = tmp_path / "a.npz"
    with pytest.raises(DataError, match="neither malonaldehyde, nor a name"):
        make_dataset(Recipe(molecule="unobtainium"), out)
    with pytest.raises(DataError, match="unknown method 'PM7'; known: GFN2-xTB"):
        make_dataset(Recipe(method="PM7"), out)
    with pytest.raises(DataError, match="cannot write this format"):
        make_dataset(TINY, tmp_path / "a.pdf")
    with pytest.raises(DataError, match="there is no folder"):
        make_dataset(TINY, tmp_path / "nowhere" / "a.npz")
    with pytest.raises(DataError, match="temperature must be positive"):
        Recipe(temperature=-1)
    out.write_text("mine")
    with pytest.raises(DataError, match="exists; choose another name"):
        make_dataset(TINY, out)
    assert out.read_text() == "mine"
    (tmp_path / "b.npz.state").write_text("junk")
    with pytest.raises(DataError, match="not a readable state"):
        make_dataset(TINY, tmp_path / "b.npz")
    (tmp_path / "c.xyz").write_text('1\nLattice="3 0 0 0 3 0 0 0 3" Properties=species:S:1:pos:R:3\nH 0 0 0\n')
    with pytest.raises(DataError, match="periodic; only molecules"):
        make_dataset(Recipe(molecule=str(tmp_path / "c.xyz")), tmp_path / "c.npz")
    monkeypatch.setitem(sys.modules, "tblite.ase", None)
    with pytest.raises(DataError, match=r"pip install 'steradian\[xtb\]'"):
        make_dataset(TINY, tmp_path / "d.npz")


@needs_tblite
def test_a_run_that_explodes_says_so(tmp_path):
    wild = Recipe(molecule="H2O", frames=2, timestep=20.0, stride=400.0, equilibration=0.0, temperature=3000)
    with pytest.raises(DataError, match="timestep"):
        make_dataset(wild, tmp_path / "a.npz", progress=False)
    assert not (tmp_path / "a.npz").exists()


def test_geometries(tmp_path):
    assert starting_geometry("malonaldehyde").get_chemical_formula() == "C3H4O2"
    assert starting_geometry("CH3CH2OH").get_chemical_formula() == "C2H6O"
    (tmp_path / "a.xyz").write_text("2\n\nH 0 0 0\nF 0 0 0.9\n")
    assert starting_geometry(str(tmp_path / "a.xyz")).get_chemical_formula() == "HF"


def test_autocorrelation_time_of_a_known_process():
    """An autoregressive process x' = a x + noise has tau = 1/2 + a / (1 - a)."""
    rng = np.random.default_rng(0)
    for a in (0.0, 0.5, 0.9):
        noise = rng.normal(size=40000)
        series = np.zeros(40000)
        for step in range(1, 40000):
            series[step] = a * series[step - 1] + noise[step]
        assert autocorrelation_time(series) == pytest.approx(0.5 + a / (1 - a), rel=0.12)
    assert autocorrelation_time(np.ones(10)) == 0.5


# ----------------------------------------------------------------------------------------------------------- commands


@needs_tblite
def test_make_info_convert(tmp_path, monkeypatch):
    monkeypatch.setenv("STERADIAN_BACKEND", "reference")  # labels need no kernels
    made = tmp_path / "w.npz"
    arguments = [
        "make",
        "--molecule",
        "H2O",
        "--frames",
        "3",
        "--stride",
        "1",
        "--equilibration",
        "1",
        "--out",
        str(made),
    ]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "3 frames of 3 atoms" in result.output
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert "exists" in result.output
    result = runner.invoke(app, ["convert", str(made), str(tmp_path / "w.extxyz")])
    assert result.exit_code == 0, result.output
    assert "3 frames with energy, forces" in result.output
    first, second = read_structures(made), read_structures(tmp_path / "w.extxyz")
    assert first[2].forces == pytest.approx(second[2].forces, abs=1e-7)
    result = runner.invoke(app, ["info", str(tmp_path / "w.extxyz"), "--json"])
    summary = json.loads(result.output)
    assert summary["frames"] == 3
    assert summary["elements"] == {"H": 6, "O": 3}
    assert summary["coverage"] == {"energy": 3, "forces": 3, "stress": 0}


def test_info_tells_what_is_suspicious(tmp_path):
    rng = np.random.default_rng(0)
    positions = np.array([[0.0, 0, 0], [0, 0, 0.97], [0, 0.97, 0]]) + rng.normal(size=(30, 3, 3)) * 0.02
    forces = rng.normal(size=(30, 3, 3))
    forces -= forces.mean(axis=1, keepdims=True)
    energies = rng.normal(size=30)
    energies[4] = 500.0
    forces[5] *= 1000
    forces[6] = 0
    positions[7, 1] = positions[7, 0] + [0, 0, 0.2]
    positions[9] = positions[8]
    np.savez(tmp_path / "a.npz", R=positions, z=[8, 1, 1], E=energies, F=forces)
    result = runner.invoke(app, ["info", str(tmp_path / "a.npz")])
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "frame 4: energy per atom" in text
    assert "frame 5: largest force" in text
    assert "1 frames (first: 6) have forces that are all exactly zero" in text
    assert "frame 7: atoms 0 and 1 (O-H) are 0.200 Å apart" in text
    assert "1 frames (first: 9) repeat the atoms of another frame with a different energy" in text
    assert "frame 3" not in text


def test_brackets_and_escape_sequences_are_shown_as_text(tmp_path):
    path = tmp_path / "[bold]a.xyz"
    path.write_text(
        '2\nProperties=species:S:1:pos:R:3:forces:R:3 energy=-1 config_type="[/x] \x1b[31m"\n'
        "H 0 0 0 0 0 0\nH 0 0 0.7 0 0 0\n"
    )
    result = runner.invoke(app, ["info", str(path)])
    assert result.exit_code == 0, result.output
    assert "[/x]" in result.output
    assert "\x1b" not in result.output
    result = runner.invoke(app, ["convert", str(path), str(path), "--overwrite", "--energy-key", "[/e]\x1b[2J"])
    assert result.exit_code == 2
    assert "[/e]" in result.output
    assert "\x1b" not in result.output


def test_command_mistakes(tmp_path):
    np.savez(tmp_path / "a.npz", R=np.arange(6.0).reshape(1, 2, 3), z=[1, 1], E=[1.0], F=np.zeros((1, 2, 3)))
    for arguments, match in [
        (["info", str(tmp_path / "b.npz")], "no such file"),
        (["info", str(tmp_path / "a.npz"), "--energy-unit", "kcal"], "did you mean 'kcal/mol'?"),
        (["convert", str(tmp_path / "a.npz"), str(tmp_path / "b.npz"), "--energy-key", "e"], "no energy under 'e'"),
        (["convert", str(tmp_path / "a.npz"), str(tmp_path / "b.doc")], "cannot write this format"),
        (["convert", str(tmp_path / "a.npz"), str(tmp_path / "a.npz")], "exists"),
        (["info", "bundled:nothing"], "no such data set"),
    ]:
        result = runner.invoke(app, arguments)
        assert result.exit_code == 2
        assert match in result.output
        assert result.output.startswith("error: ")
        assert result.output.count("\n") == 1


@needs_tblite
def test_nothing_is_written_through_links_that_others_could_have_made(tmp_path):
    out, victim = tmp_path / "water.npz", tmp_path / "victim"
    victim.write_text("whole")
    for name in ("water.npz", "water.npz.state", "water.npz.recipe.json", "water.extxyz"):
        (tmp_path / f"{name}.tmp").symlink_to(victim)
    make_dataset(Recipe(molecule="H2O", frames=1, stride=1.0, equilibration=1.0), out, progress=False)
    write_structures(tmp_path / "water.extxyz", read_structures(out))
    assert victim.read_text() == "whole"
    assert len(read_structures(tmp_path / "water.extxyz")) == 1


@needs_tblite
def test_no_flipped_bit_of_a_data_set_or_its_state_is_read_silently(whole, tmp_path, monkeypatch):
    """Dates and attributes of the zip container are not looked at; what is read is what was written."""
    state = tmp_path / "water.npz.state"
    with monkeypatch.context() as patch:
        patch.setattr("steradian.data.xtb.write_structures", lambda *_: 1 / 0)  # killed with all frames made
        with pytest.raises(ZeroDivisionError):
            make_dataset(TINY, tmp_path / "water.npz", progress=False)

    def content_of_set(path):
        frames = read_structures(path)
        return [(f.energy, f.positions.tobytes(), f.forces.tobytes(), f.config_type, f.periodic) for f in frames]

    def content_of_state(path):
        found = _State.load(path, TINY)
        arrays = (found.positions, found.forces, found.energies, found.temperatures, found.atoms.get_momenta())
        return [np.array(array).tobytes() for array in arrays] + [
            found.equilibrated,
            found.generator.bit_generator.state,
        ]

    for path, read in ((whole[0], content_of_set), (state, content_of_state)):
        content, expected = path.read_bytes(), read(path)
        draw, refused = random.Random(0), 0
        damaged = tmp_path / f"damaged{path.suffix}"
        for _ in range(100):
            flipped = bytearray(content)
            flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            damaged.write_bytes(flipped)
            said = None
            try:
                assert read(damaged) == expected
            except DataError as error:
                said = str(error)
            if said is not None:
                refused += 1
                assert str(damaged) in said
                assert len(said.splitlines()) == 1
        assert refused > 50
