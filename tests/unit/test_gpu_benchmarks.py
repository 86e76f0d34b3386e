"""The scripts for a GPU run to their end on a CPU, with tiny sizes; results are kept and not measured twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def run(script, *arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(FOLDER.parent / "src"), str(FOLDER)])}
    answer = subprocess.run(
        [sys.executable, str(FOLDER / script), "--device", "cpu", "--smoke", *map(str, arguments)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def rows(folder, name):
    content = json.loads((folder / f"{name}.json").read_text())
    assert content["settings"]["smoke"]
    assert not [row for row in content["results"].values() if "error" in row]
    return content["results"]


@pytest.mark.parametrize("count", [10, 11, 12, 135, 138, 1205])
@pytest.mark.parametrize("periodic", [False, True])
def test_systems_have_the_atoms_and_the_density_asked_for(count, periodic):
    from gpu_settings import graph_of, system

    atoms = system(count, periodic)
    assert len(atoms) == count
    assert set(atoms.numbers) <= {1, 6, 8}
    if periodic:
        assert len(atoms) / atoms.get_volume() == pytest.approx(0.1, rel=0.06)
    elif count > 1000:  # away from the surface
        inside = np.linalg.norm(atoms.positions - atoms.positions.mean(axis=0), axis=1) < 8.0
        assert inside.sum() / (4 / 3 * np.pi * 8.0**3) == pytest.approx(0.1, rel=0.1)
    if count > 100:
        graph = graph_of(atoms)
        vectors = (
            graph.positions[graph.senders] + graph.shifts.double() @ graph.cell[0] - graph.positions[graph.receivers]
        )
        assert float(vectors.norm(dim=1).min()) > 0.5


def test_attention_through_the_driver_and_again(tmp_path):
    run("gpu_all.py", "--only", "efa", "--results", tmp_path)
    found = rows(tmp_path, "gpu_efa")
    assert all(row["gradient_ms"] > 0 and row["forward_TFLOPs"] > 0 for row in found.values())
    again = run("gpu_all.py", "--only", "efa", "--results", tmp_path)
    assert again.count("known") == len(found)
    assert rows(tmp_path, "gpu_efa") == found


def test_dynamics(tmp_path):
    run("gpu_md.py", "--models", "MACE", "--ways", "recorded", "--results", tmp_path)
    (row,) = rows(tmp_path, "gpu_md").values()
    assert row["ms_per_step"] > 0
    assert row["padded_edges"] >= row["edges"] > 0


@pytest.mark.slow
def test_gates(tmp_path):
    run("gpu_mara.py", "--results", tmp_path)
    assert all(row["with_mara_ms"] > 0 for row in rows(tmp_path, "gpu_mara").values())


def test_what_fails_is_written_down_and_tried_again(tmp_path, capsys):
    from gpu_settings import Results, parser

    arguments = parser(None, "x").parse_args(["--device", "cpu", "--smoke", "--results", str(tmp_path)])

    def broken():
        raise RuntimeError("CUDA out of memory\nand more")

    results = Results(arguments)
    assert results.measure("a", broken) is None
    assert json.loads((tmp_path / "x.json").read_text())["results"]["a"] == {
        "error": "RuntimeError: CUDA out of memory"
    }
    assert Results(arguments).measure("a", lambda: {"ms": 1.0}) == {"ms": 1.0}
    assert Results(arguments).measure("a", broken) == {"ms": 1.0}
    arguments.minutes = 0.0
    assert Results(arguments).measure("b", broken) is None
    assert "left out" in capsys.readouterr().out
