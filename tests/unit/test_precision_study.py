"""The study of precision: figures mean what they say, the recommendation follows from them, the command writes them."""

from __future__ import annotations

import json
import math

import pytest
import torch

from steradian.build import save_potential
from steradian.graph.structures import Structure
from steradian.studies.precision import PrecisionRow, PrecisionStudy, StudySettings, precision_study
from tests.unit.precision_cases import potential

SMALL = StudySettings(max_structures=3, md_steps=20, repeats=2, presets=("float64", "float32", "mixed"))


def structures(count: int = 3, labels: bool = True) -> list[Structure]:
    import numpy as np

    random = np.random.default_rng(0)
    grid = 1.4 * np.array([[i, j, k] for i in range(2) for j in range(2) for k in range(2)], dtype=float)
    found = []
    for _ in range(count):
        positions = grid + 0.1 * random.normal(size=grid.shape)
        forces = 0.1 * random.normal(size=grid.shape) if labels else None
        found.append(Structure(np.array([8, 1] * 4), positions, energy=-1.0 if labels else None, forces=forces))
    return found


def test_figures_of_roles_and_presets():
    model = potential("mace")
    study = precision_study(model, structures(), SMALL)
    rows = {(row.kind, row.name, row.format): row for row in study.rows}
    assert rows["preset", "float64", ""].forces_mae == 0
    float32, mixed = (rows["preset", name, ""] for name in ("float32", "mixed"))
    assert 0 < float32.forces_mae < 1e-2 * mixed.forces_mae
    assert float32.rotation < 1e-2 * mixed.rotation  # rounding depends on the axes
    assert all(row.seconds > 0 and row.memory > 0 and math.isfinite(row.drift) for row in (float32, mixed))
    assert mixed.memory < float32.memory
    radial = rows["role", "radial", "bfloat16"]
    assert all(row.seconds > 0 and row.memory > 0 and row.rotation >= 0 for row in study.rows)
    assert math.isnan(radial.drift)
    # radial weights depend on nothing but distances, so rounding them breaks no symmetry
    turned = rows["preset", "float64", ""].rotation
    assert radial.rotation < 10 * turned
    assert rows["role", "messages", "bfloat16"].rotation > 1e3 * turned
    assert radial.memory < rows["preset", "float64", ""].memory
    assert rows["role", "radial", "float32"].forces_mae < 1e-2 * radial.forces_mae
    # the preset's two roles together: more than either, less than their sum times two
    paths = rows["role", "paths", "bfloat16"]
    assert (
        max(radial.forces_mae, paths.forces_mae) * 0.8 < mixed.forces_mae < 2 * (radial.forces_mae + paths.forces_mae)
    )
    assert study.own_error > 0
    assert study.tolerance == pytest.approx(1e-4 + 0.05 * study.own_error)
    assert model.config.precision == "float32"  # copies were measured
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert "radial" in study.table().text()
    assert study.picture().axes
    content = json.loads(json.dumps(study.to_dict(), allow_nan=False))
    assert content["cheapest"] == study.cheapest.name


def test_the_cheapest_preset_is_the_fastest_within_the_tolerance():
    rows = tuple(
        PrecisionRow("preset", name, "", 0.0, error, error, seconds=seconds)
        for name, error, seconds in (("float64", 0.0, 3.0), ("float32", 1e-6, 2.0), ("mixed", 1e-3, 1.0))
    )
    assert PrecisionStudy(rows, math.nan, 1e-2, 1, "CPU").cheapest.name == "mixed"
    assert PrecisionStudy(rows, math.nan, 1e-4, 1, "CPU").cheapest.name == "float32"
    pretended = PrecisionRow("preset", "tf32", "= float32", 0.0, 1e-6, 1e-6, seconds=0.5)
    assert PrecisionStudy((*rows, pretended), math.nan, 1e-4, 1, "CPU").cheapest.name == "float32"
    none = PrecisionStudy(rows[1:], math.nan, 0.0, 1, "CPU")
    assert none.cheapest is None
    assert "no preset stays within" in none.summary()


def test_roles_have_a_drift_where_it_is_asked_for():
    chosen = StudySettings(presets=(), role_md_steps=2, repeats=1, max_structures=1)
    study = precision_study(potential("mace"), structures(1), chosen)
    assert all(math.isfinite(row.drift) for row in study.rows)


def test_presets_that_a_cpu_has_no_units_for_say_so():
    chosen = StudySettings(roles=False, presets=("float32", "half", "tf32"), md_steps=0, repeats=1)
    study = precision_study(potential("mace"), structures(1), chosen)
    assert [row.format for row in study.rows] == ["", "emulated", "= float32"]
    assert study.cheapest.name == "float32"


def test_without_labels_there_is_no_own_error():
    study = precision_study(potential("mace"), structures(1, labels=False), StudySettings(
        roles=False, presets=("float32",), md_steps=0, repeats=1))  # fmt: skip
    assert math.isnan(study.own_error)
    assert study.tolerance == 1e-4
    assert math.isnan(study.rows[0].drift)
    assert study.to_dict()["own_forces_mae"] is None


@pytest.mark.parametrize("settings", [{"presets": ("quarter",)}])
def test_unknown_presets_are_refused(settings):
    with pytest.raises(ValueError, match="unknown preset quarter; choose from float64"):
        precision_study(potential("mace"), structures(), StudySettings(**settings))


def test_the_command(tmp_path, capsys):
    from typer.testing import CliRunner

    from steradian.cli import app
    from steradian.data.files import write_structures

    save_potential(tmp_path / "model.safetensors", potential("mace"))
    write_structures(tmp_path / "data.xyz", structures())
    call = ["precision", str(tmp_path / "model.safetensors"), str(tmp_path / "data.xyz"), "--no-roles", "--preset",
            "float32", "--preset", "mixed", "--md-steps", "5", "--out", str(tmp_path / "out"),
            "--force-tolerance", "1e9"]  # fmt: skip
    result = CliRunner().invoke(app, call, catch_exceptions=False)
    assert result.exit_code == 0
    assert "cheapest preset within 1.00e+09 meV/Å of float64" in result.output
    content = json.loads((tmp_path / "out/precision.json").read_text())
    assert [row["name"] for row in content["rows"]] == ["float32", "mixed"]
    assert content["force_tolerance"] == 1e6
    assert (tmp_path / "out/precision.png").read_bytes()[:4] == b"\x89PNG"
    assert "mixed" in (tmp_path / "out/precision.txt").read_text()
    with pytest.raises(ValueError, match="unknown preset quarter"):
        CliRunner().invoke(app, [*call, "--preset", "quarter"], catch_exceptions=False)
    assert torch.get_default_dtype() == torch.float32


def test_an_unknown_element_leaves_nothing_behind(tmp_path):
    from ase import Atoms
    from typer.testing import CliRunner

    from steradian.cli import app

    save_potential(tmp_path / "model.safetensors", potential("mace"))
    Atoms("Xe2", [[0, 0, 0], [0, 0, 2]]).write(tmp_path / "data.xyz")
    files = [str(tmp_path / name) for name in ("model.safetensors", "data.xyz", "out")]
    call = ["precision", files[0], files[1], "--out", files[2]]
    with pytest.raises(ValueError, match="the model does not know Xe"):
        CliRunner().invoke(app, call, catch_exceptions=False)
    assert not (tmp_path / "out").exists()
