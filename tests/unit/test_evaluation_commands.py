"""The commands evaluate and compare on a small real model."""

from __future__ import annotations

import io
import json

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from steradian.build import build_potential, save_potential
from steradian.cli.common import parsed_units
from steradian.cli.evaluate import compare, distinct, evaluate, model_name
from steradian.config import MACEConfig, MARAConfig, ModelConfig
from steradian.evaluation.errors import ErrorReport
from tests.systems import made_up
from tests.unit.evaluation_fakes import molecules

KCAL = 0.0433641153087705


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models in folders of runs and one file of structures in kcal/mol."""
    import ase.io

    root = tmp_path_factory.mktemp("models")
    statistics = made_up({1: 0.0, 6: 0.0, 8: 0.0})
    host = MACEConfig(num_layers=1, num_channels=4, hidden_l=0, l_max=1, correlation=1, cutoff_A=3.0, radial_mlp=[8])
    mara = MARAConfig(form="published", frame="lab", hidden_dim=4, gate="published")
    for name, gate in (("bare", None), ("gated", mara)):
        config = ModelConfig(host=host, **({"edge_gate": gate} if gate else {}))
        save_potential(root / name / "model.safetensors", build_potential(config, statistics, seed=0))
    (root / "bare" / "metrics.csv").write_text("epoch,validation/forces_mae\n0,0.2\n1,0.1\n")
    frames = []
    for structure in molecules(6):
        atoms = ase.Atoms(structure.numbers, structure.positions)
        atoms.info["E"] = structure.energy / KCAL
        atoms.arrays["F"] = structure.forces / KCAL
        frames.append(atoms)
    ase.io.write(root / "test.extxyz", frames, format="extxyz")
    return root


def run(*arguments):
    app = typer.Typer()
    app.command()(evaluate)
    app.command()(compare)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


LABELS = ("--units", "kcal/mol,Angstrom", "--energy-key", "E", "--forces-key", "F")


def test_evaluate_prints_and_writes(folder, tmp_path):
    out = tmp_path / "out"
    found = run("evaluate", folder / "bare", folder / "test.extxyz", *LABELS, "--rotations", "--out", out, "--worst", 2)
    assert found.exit_code == 0, found.output
    assert "bare: errors on 6 structures" in found.output
    assert "The 2 worst structures" in found.output
    assert "Invariant: " in found.output
    written = {path.name for path in out.iterdir()}
    assert written >= {"report.html", "report.txt", "errors.json", "errors-bare.npz", "parity.png", "elements.png"}
    assert not [name for name in written if name.startswith(".")]
    content = json.loads((out / "errors.json").read_text())
    stored = ErrorReport.load(out / "errors-bare.npz")
    assert content["total"]["forces_mae"]["value"] == stored.total["forces_mae"]
    assert content["rotations"]["exact"] is True
    assert stored.arrays.energy_reference.tolist() == pytest.approx([s.energy for s in molecules(6)], abs=1e-6)
    assert "Training" in (out / "report.html").read_text(encoding="utf-8")


def test_compare_models_and_stored_errors(folder, tmp_path):
    out = tmp_path / "out"
    models = (folder / "bare", folder / "gated" / "model.safetensors")
    found = run("compare", *models, "--data", folder / "test.extxyz", *LABELS, "--out", out)
    assert found.exit_code == 0, found.output
    assert "differences to bare" in found.output
    assert "gated: Not invariant" in found.output
    content = json.loads((out / "comparison.json").read_text())
    assert [model["name"] for model in content["models"]] == ["bare", "gated"]
    again = run("compare", out / "errors-bare.npz", out / "errors-gated.npz")
    assert again.exit_code == 0, again.output
    # older releases of rich leave empty lines where a bar of progress would stand
    assert again.output.lstrip().splitlines()[:9] == found.output.lstrip().splitlines()[:9]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "nowhere", "test.extxyz"), "no such model file"),
        (("evaluate", "bare", "nowhere.xyz"), "no such file"),
        (("evaluate", "bare", "bundled:nothing"), "bundled:malonaldehyde"),
        (("evaluate", "bare", "test.extxyz", *LABELS, "--device", "nonsense"), "--device cpu"),
        (("evaluate", "bare", "test.extxyz", *LABELS, "--precision", "float16"), "choose float64, float32, mixed"),
        (("evaluate", "bare", "test.extxyz", *LABELS, "--out", "test.extxyz"), "cannot be used for the results"),
        (("evaluate", "bare", "test.extxyz", *LABELS, "--json", "."), "is a folder"),
        (("evaluate", "bare", "test.extxyz", "--energy-key", "Q"), "set --energy-key to the right one"),
        (
            ("evaluate", "bare", "test.extxyz", *LABELS, "--json", "test.extxyz/x.json"),
            "cannot be used for the results",
        ),
        (("compare", "bare", "--data", "test.extxyz"), "2 to 7 models"),
        (("compare", "bare", "gated"), "give --data FILE"),
    ],
)
def test_wrong_inputs_give_one_line(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    found = run(*arguments)
    assert isinstance(found.exception, ValueError)
    assert message in str(found.exception)
    assert "\n" not in str(found.exception)


HOSTILE = "x [/bold] $\\q$ \x1b[31m"


def test_names_that_terminals_and_pictures_would_obey(folder, tmp_path, monkeypatch):
    """Control sequences, markup and formulas in names are shown as they are, in a pipe, in a terminal, in pictures."""
    out = tmp_path / "out"
    call = ("evaluate", folder / "bare", folder / "test.extxyz", *LABELS, "--name", HOSTILE, "--out", out)
    found = run(*call)
    assert found.exit_code == 0, found.output
    assert r"x [/bold] $\q$ \x1b[31m: errors on 6 structures" in found.output
    assert "\x1b" not in found.output
    report = ErrorReport.load(next(out.glob("errors-*.npz")))
    assert report.name == HOSTILE
    for table in report.tables():
        with Console(file=io.StringIO(), force_terminal=True, color_system=None) as console:
            console.print(table.rich())
            assert "\x1b[31m" not in console.file.getvalue()


def test_nothing_is_left_of_an_evaluation_that_fails(folder, tmp_path):
    for wrong in (("evaluate", folder / "nothing"), ("evaluate", folder / "bare", "--energy-key", "Q")):
        found = run(wrong[0], wrong[1], folder / "test.extxyz", *wrong[2:], "--out", tmp_path / "a" / "b")
        assert isinstance(found.exception, ValueError)
        assert not (tmp_path / "a").exists()


def test_energies_in_another_unit_are_noticed(folder):
    keys = ("--energy-key", "E", "--forces-key", "F")
    found = run("evaluate", folder / "bare", folder / "test.extxyz", *keys, "--units", "Hartree")
    assert "are --units those of the file" in found.output


def test_names_and_units(tmp_path):
    assert model_name(tmp_path / "run" / "model.safetensors") == "run"
    assert model_name(tmp_path / "small.safetensors") == "small"
    assert model_name(tmp_path / "run") == "run"
    assert distinct(["a", "b", "a"]) == ["a (1)", "b", "a (2)"]
    assert (parsed_units("kcal/mol").energy, parsed_units("kcal/mol").length) == ("kcal/mol", None)
    assert parsed_units("Hartree, Bohr").length == "Bohr"
