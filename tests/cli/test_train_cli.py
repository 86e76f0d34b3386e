"""``steradian train`` and ``steradian config``, and every configuration that the package brings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.build import molecule
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

from steradian.cli import main
from steradian.config import load_config, parse_config
from steradian.evaluation.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = [*sorted((ROOT / "configs").glob("*.yaml")), *sorted((ROOT / "src/steradian/data/bundled").glob("*.yaml"))]
SMALL = [
    "--set=model.host={num_channels: 4, hidden_l: 0, l_max: 1, correlation: 1, radial_mlp: [8]}",
    "--set=training.max_epochs=1",
]


@dataclass
class Called:
    exit_code: int
    output: str


Call = Callable[..., Called]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The command as a user types it; standard output and errors together."""

    def run(*arguments: str) -> Called:
        monkeypatch.setattr(sys, "argv", ["steradian", *arguments])
        capsys.readouterr()
        code: int | str | None = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return Called(int(code or 0), captured.out + captured.err)

    return run


@pytest.fixture
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of one's own; the run goes into the same temporary folder."""
    frames = []
    for index in range(24):
        atoms = Atoms("Ar3", [[0, 0, 0], [1.1, 0.02 * index, 0], [0, 1.2, 0.01 * index]])
        atoms.calc = LennardJones()
        labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        frames.append(atoms)
    write(tmp_path / "argon.xyz", frames, format="extxyz")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "argon.xyz"


def test_own_file_needs_no_configuration(own_data: Path, call: Call) -> None:
    first = call("train", "--data", "argon.xyz", *SMALL)
    assert first.exit_code == 0, first.output
    assert "23 frames, 3 atoms each (Ar)" in first.output
    assert "runs/argon/model.safetensors" in first.output
    assert (own_data.parent / "runs/argon/model.safetensors").is_file()

    again = call("train", "--data", "argon.xyz", *SMALL)
    assert again.exit_code == 2
    assert "--resume" in again.output
    assert "--overwrite" in again.output
    assert call("train", "--data", "argon.xyz", "--overwrite", "--quiet", *SMALL).output == ""

    further = call("train", "--resume", "runs/argon", "--set", "training.max_epochs=2")
    assert further.exit_code == 0, further.output
    assert "finished: 2 epochs" in further.output
    assert load_config("runs/argon/config.yaml").training.max_epochs == 2


def test_several_files_a_folder_and_a_pattern(own_data: Path, call: Call) -> None:
    """24 frames in three files are the 24 frames of one, in the order of the files' names."""
    frames = read(own_data, ":")
    (own_data.parent / "parts").mkdir()
    for part in range(3):
        write(own_data.parent / f"parts/part{part}.xyz", frames[8 * part : 8 * part + 8], format="extxyz")
    (own_data.parent / "parts/README.md").write_text("not data")
    each = [f"--data=parts/part{part}.xyz" for part in range(3)]
    for number, arguments in enumerate((each, ["--data=parts"], ["--data=parts/p*[0-2].xyz"])):
        result = call("train", *arguments, *SMALL, *([] if number == 1 else ["--name", f"run{number}"]))
        assert result.exit_code == 0, result.output
        assert "23 frames, 3 atoms each (Ar)" in result.output
        provenance = json.loads(
            (own_data.parent / f"runs/{'parts' if number == 1 else f'run{number}'}/provenance.json").read_text()
        )
        assert [Path(file["path"]).name for file in provenance["files"]] == [f"part{part}.xyz" for part in range(3)]
        assert sum(provenance["counts"].values()) == 24
    assert call("train", "--data=parts/q*.xyz").output == "error: parts/q*.xyz: no such file\n"
    (own_data.parent / "empty").mkdir()
    assert "no data files in this folder" in call("train", "--data=empty").output
    assert "given twice" in call("train", "--data=argon.xyz", "--data=argon.xyz").output
    assert not (own_data.parent / "runs/argon").exists()


def test_dry_run(own_data: Path, call: Call) -> None:
    result = call("train", "--data", "argon.xyz", "--name", "other", "--dry-run", *SMALL)
    assert result.exit_code == 0, result.output
    assert "nothing was written" in result.output
    assert not (own_data.parent / "runs").exists()


def test_the_plan_names_the_likely_unit(own_data: Path, call: Call) -> None:
    """Water in kcal/mol, its units undeclared: the plan warns, also where nothing is trained."""
    generator = np.random.default_rng(0)
    frames = []
    for _ in range(24):
        atoms = molecule("H2O")
        atoms.positions += 0.05 * generator.normal(size=(3, 3))
        labels = {"energy": 23.06 * (-2080.0 + generator.normal()), "forces": 23.06 * generator.normal(size=(3, 3))}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        frames.append(atoms)
    write(own_data.parent / "water.xyz", frames, format="extxyz")
    said = call("train", "--data", "water.xyz", "--dry-run", *SMALL)
    assert said.exit_code == 0, said.output
    assert "data.units.energy=kcal/mol" in said.output
    assert "data.units.forces=kcal/mol/Angstrom" in said.output
    declared = call("train", "--data", "water.xyz", "--dry-run", *SMALL, "--set", "data.units.energy=kcal/mol")
    assert "warning" not in declared.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--data FILE"),
        (["nowhere.yaml"], "cannot be read"),
        (["--data", "nowhere.xyz"], "no such file"),
        (["--resume", "nowhere"], "no run to resume"),
        (["--resume", "nowhere", "--data", "argon.xyz"], "leave out"),
        (["--data", "argon.xyz", "--set", "training.epochs=3"], "did you mean"),
        (["--data", "argon.xyz", "--set", "training.monitor=validation/forces_q90"], "did you mean"),
        (["--data", "argon.xyz", "--set", "data.keys.forces=dft_forces"], "forces"),
    ],
)
def test_mistakes_are_one_message(call: Call, own_data: Path, arguments: list[str], expected: str) -> None:
    result = call("train", *arguments)
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert expected in result.output
    assert "Traceback" not in result.output
    assert not (own_data.parent / "runs").exists()


def processor_seconds(*arguments: str) -> float:
    """Least processor time of three runs of Python: others use the machine too."""

    def once() -> float:
        before = os.times()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    return min(once() for _ in range(3))


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, steradian.cli\nsys.argv = ['steradian', 'train', '--help']\n"
        "try:\n    steradian.cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = ('torch', 'numpy', 'scipy', 'ase', 'matplotlib', 'llvmlite', 'cuequivariance')\n"
        "sys.exit(' '.join(name for name in heavy if name in sys.modules) or 0)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "--resume" in answer.stdout, answer.stderr
    assert answer.returncode == 0, answer.stderr


def test_start_is_quick() -> None:
    assert processor_seconds("-m", "steradian", "train", "--help") < 0.7
    torch_alone = processor_seconds("-c", "import torch")
    assert processor_seconds("-c", "import torch, steradian; dir(steradian)") - torch_alone < 1.5


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_configurations_of_the_package(path: Path) -> None:
    config = load_config(path)
    assert config.training.monitor.removeprefix("validation/") in METRICS


@pytest.mark.parametrize("pair", ["src/steradian/data/bundled/demo", "configs/rmd17_ethanol", "configs/rmd17_aspirin"])
def test_compared_models_differ_in_the_gate_only(pair: str) -> None:
    plain, gated = (load_config(ROOT / f"{pair}_{kind}.yaml").model_dump() for kind in ("mace", "mace_mara"))
    assert plain["model"].pop("edge_gate")["kind"] == "none"
    assert gated["model"].pop("edge_gate")["kind"] == "mara"
    assert {**plain, "name": ""} == {**gated, "name": ""}


def test_config_schema(call: Call) -> None:
    schema = json.loads(call("config", "schema").output)
    assert "training" in schema["properties"]


def test_config_show_and_new(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    assert call("config", "new", str(path), "--data", "my.xyz").exit_code == 0
    text = path.read_text(encoding="utf-8")
    assert load_config(path) == parse_config({"name": "mine", "data": {"train": "my.xyz"}})
    assert "# CPU threads" in text
    assert call("config", "new", str(path)).exit_code == 2

    shown = call("config", "show", str(path), "--set", "training.max_epochs=7")
    assert yaml.safe_load(shown.output)["training"]["max_epochs"] == 7
    wrong = call("config", "show", str(path), "--set", "training.max_epoch=7")
    assert wrong.exit_code == 2
    assert "did you mean 'max_epochs'?" in wrong.output
