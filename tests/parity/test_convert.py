"""``steradian convert``: from arrays to model files that test themselves. Frozen models stand in for exports."""

from __future__ import annotations

import ast
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from steradian.build import load_potential, save_potential
from steradian.checkpoint import ModelFileError
from steradian.execution.self_test import SelfTestError
from steradian.interfaces.convert import convert_file, exporter_source
from steradian.interfaces.foreign import ForeignModelError
from steradian.polynomials import use_backend
from tests.parity.frozen_models import DATA, graph_of, read, relative
from tests.parity.test_mace_torch import read as read_mace

PACKAGES = {"nequip": "degree_two", "torch_geometric": "vertex"}
PREFIX = {"nequip": "nequip", "torch_geometric": "pyg_visnet"}
ELEMENTS = {"nequip": None, "torch_geometric": (1, 6, 7, 8)}


def exported(folder, package, change=None, name=None):
    """A file as the exporter writes it, of a frozen model with its molecule as the test."""
    hyper, state, structures, results = read(PREFIX[package], name or PACKAGES[package])
    if package == "nequip":
        with np.load(DATA / "nequip_wigner_3j.npz") as file:
            state |= {f"model.func.shared._w3j_{key}": file[key] for key in file.files}
    frame, expected = structures["molecule"], results["molecule"]
    content = {f"weights/{key}": value for key, value in state.items()}
    content |= {"test/0/numbers": frame["numbers"], "test/0/positions": frame["positions"]}
    content |= {"test/0/energy": expected["energy"].reshape(1), "test/0/forces": expected["forces"][None]}
    content["about"] = np.array(json.dumps({"package": package, "hyperparameters": hyper}))
    content |= change(content) if change else {}
    np.savez(folder / "foreign.npz", **content)
    return folder / "foreign.npz", frame, expected


@pytest.fixture(params=list(PACKAGES))
def package(request):
    return request.param


def test_a_converted_model_gives_the_same_numbers_and_keeps_its_test(package, tmp_path):
    path, frame, expected = exported(tmp_path, package)
    potential = convert_file(path, elements=ELEMENTS[package])
    save_potential(tmp_path / "model.safetensors", potential)
    loaded = load_potential(tmp_path / "model.safetensors")
    assert loaded.self_test is not None
    for backend in ("reference", "cpu"):
        with use_backend(backend):
            assert relative(loaded(graph_of(frame, loaded.cutoff)).forces, expected["forces"]) < 1e-9
    single = load_potential(tmp_path / "model.safetensors", dtype=torch.float32)
    assert single.self_test.check(single) < 2e-4
    save_potential(tmp_path / "again.safetensors", loaded)
    assert load_potential(tmp_path / "again.safetensors").self_test is not None


def test_a_float32_model_is_as_good_in_float64(package, tmp_path):
    """Constants are rounded in its package; conversion and loading allow for that alike."""

    def rounded(content):
        weights = {name: value for name, value in content.items() if name.startswith("weights/")}
        return {
            name: value.astype(np.float32) if value.dtype == np.float64 else value for name, value in weights.items()
        }

    path, _, _ = exported(tmp_path, package, rounded)
    potential = convert_file(path, elements=ELEMENTS[package])
    assert potential.dtype == torch.float32
    save_potential(tmp_path / "model.safetensors", potential)
    double = load_potential(tmp_path / "model.safetensors", dtype=torch.float64)
    assert 1e-8 < double.self_test.check(double) < 5e-6, "nothing was rounded"
    save_potential(tmp_path / "again.safetensors", double)
    assert load_potential(tmp_path / "again.safetensors").self_test.single
    with torch.no_grad():
        double.host.embedding[0] *= 1.0001
    with pytest.raises(SelfTestError):
        double.self_test.check(double)


def test_elements_of_a_visnet_need_not_be_those_of_the_test(tmp_path):
    path, frame, _ = exported(tmp_path, "torch_geometric")
    assert 7 in frame["numbers"]
    potential = convert_file(path, elements=(1, 6, 8))
    save_potential(tmp_path / "model.safetensors", potential)
    loaded = load_potential(tmp_path / "model.safetensors")
    assert loaded.elements == (1, 6, 8)
    whole = convert_file(path, elements=(1, 6, 7, 8))
    other = dict(frame, numbers=np.where(frame["numbers"] == 7, 6, frame["numbers"]))
    graph = graph_of(other, loaded.cutoff)
    assert relative(loaded(graph).forces, whole(graph).forces.numpy()) < 1e-12
    with torch.no_grad():
        potential.host.embedding[0] *= 1.001
    save_potential(tmp_path / "model.safetensors", potential)
    with pytest.raises(ModelFileError, match="self-test failed"):
        load_potential(tmp_path / "model.safetensors")


def test_forces_of_chebyshev_models_are_wrong_in_mace_torch(tmp_path, capsys):
    hyper, state, structures, results = read_mace("chebyshev")
    ((place, _), expected), frame = next(iter(results.items())), next(iter(structures.values()))
    assert frame is structures[place]
    content = {f"weights/{key}": value for key, value in state.items()}
    content |= {"test/0/numbers": frame["numbers"], "test/0/positions": frame["positions"]}
    content |= {"test/0/energy": expected["energy"].reshape(1), "test/0/forces": np.ones((1, len(frame["numbers"]), 3))}
    content["about"] = np.array(json.dumps({"package": "mace-torch", "hyperparameters": hyper}))
    np.savez(tmp_path / "foreign.npz", **content)
    potential = convert_file(tmp_path / "foreign.npz")
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "Chebyshev" in said[0]
    save_potential(tmp_path / "model.safetensors", potential)
    assert load_potential(tmp_path / "model.safetensors").self_test is not None
    content["test/0/energy"] = content["test/0/energy"] + 0.1
    np.savez(tmp_path / "foreign.npz", **content)
    with pytest.raises(SelfTestError):
        convert_file(tmp_path / "foreign.npz")


def test_a_model_that_changed_is_refused_at_load(package, tmp_path):
    path, _, _ = exported(tmp_path, package)
    potential = convert_file(path, elements=ELEMENTS[package])
    with torch.no_grad():
        potential.host.embedding[0] *= 1.001
    save_potential(tmp_path / "model.safetensors", potential)
    with pytest.raises(ModelFileError, match=f"self-test failed on backend 'reference'.*those of {package}"):
        load_potential(tmp_path / "model.safetensors")


def test_a_model_that_is_trained_on_has_no_test_any_more(package, tmp_path):
    path, _, _ = exported(tmp_path, package)
    potential = convert_file(path, elements=ELEMENTS[package]).train()
    with torch.no_grad():
        potential.host.embedding[0] *= 1.001
    save_potential(tmp_path / "model.safetensors", potential.eval())
    assert load_potential(tmp_path / "model.safetensors").self_test is None


@pytest.mark.parametrize("name", ["test/0/energy", "test/0/forces"])
def test_wrong_numbers_in_the_export_are_noticed(package, name, tmp_path):
    path, _, _ = exported(tmp_path, package, lambda content: {name: content[name] + 1e-4})
    with pytest.raises(SelfTestError, match="self-test failed"):
        convert_file(path, elements=ELEMENTS[package])


def test_pickled_models_are_read_only_when_trusted(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    path = tmp_path / "foreign.model"
    with open(path, "wb") as file:
        pickle.dump(Harm(), file)
    with pytest.raises(ForeignModelError, match=r"runs code that stands in the file.*--trust"):
        convert_file(path)
    assert not (tmp_path / "harm").exists()
    with pytest.raises(ForeignModelError, match="cannot be read"):
        convert_file(path, trust=True)


def test_a_missing_package_is_named(tmp_path):
    class Elsewhere(torch.nn.Module):
        pass

    Elsewhere.__module__, Elsewhere.__qualname__ = "mace.modules.nowhere", "Elsewhere"
    module = type(sys)("mace.modules.nowhere")
    module.Elsewhere = Elsewhere
    added = {"mace": type(sys)("mace"), "mace.modules": type(sys)("mace.modules"), "mace.modules.nowhere": module}
    sys.modules.update(added)
    try:
        torch.save(Elsewhere(), tmp_path / "foreign.model")
    finally:
        for name in added:
            del sys.modules[name]
    with pytest.raises(ForeignModelError, match="needs mace-torch, which is not installed here; export it"):
        convert_file(tmp_path / "foreign.model", trust=True)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"about": np.array('{"package": "orb", "hyperparameters": {}}')}, {}, "models of 'orb' cannot be converted"),
        ({"about": np.array("nothing")}, {}, "not a file of foreign_export"),
        ({}, {"head": "pbe"}, "has no heads; leave --head out"),
        ({}, {"elements": (1,)}, "says which elements it has"),
        ({"test/0/numbers": np.array([79, 79])}, {}, "no structures to test"),
    ],
)
def test_what_cannot_be_converted_is_named(change, arguments, message, tmp_path):
    path, _, _ = exported(tmp_path, "nequip", lambda content: change)
    with pytest.raises(ForeignModelError, match=message):
        convert_file(path, **arguments)


def test_the_exporter_needs_nothing_of_steradian():
    tree = ast.parse(exporter_source())
    names = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    names |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    allowed = {
        "__future__",
        "ase",
        "copy",
        "json",
        "mace",
        "nequip",
        "numpy",
        "sys",
        "torch",
        "torch_geometric",
        "typing",
    }
    assert names <= allowed


def test_the_command_line(tmp_path):
    path, _, _ = exported(tmp_path, "nequip")

    def run(*arguments):
        command = [sys.executable, "-m", "steradian", "convert", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    done = run(path, "model.safetensors")
    assert done.returncode == 0, done.stderr
    assert "self-test against nequip" in done.stdout
    assert load_potential(tmp_path / "model.safetensors").elements == (1, 6, 7, 8)
    assert run("--exporter").returncode == 0
    assert (tmp_path / "foreign_export.py").read_text() == exporter_source()
    for arguments, message in (
        ((), "give the foreign model and the file to write"),
        (("missing.npz", "m.safetensors"), "missing.npz: no such file"),
        ((path, "model.txt"), "ends in .safetensors"),
        ((path, "m.safetensors", "--elements", "H,Xy"), "Xy is no element symbol"),
    ):
        answer = run(*arguments)
        assert answer.returncode == 2
        assert message in answer.stderr
        assert "Traceback" not in answer.stderr
