"""Model files: whole or not there, and never silently wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from steradian.build import build_potential, load_potential, save_potential
from steradian.checkpoint import ModelFileError, write_atomically
from steradian.config import MACEConfig, ModelConfig
from steradian.data.statistics import DatasetStatistics
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure

STATISTICS = DatasetStatistics(
    elements=(1, 8),
    atom_references={1: -13.587222780835477, 8: -2041.9816003861047},
    avg_num_neighbors=2.0,
    energy_shift=-0.123456789012345,
    force_rms=1.1,
    energy_std=1.0,
    num_frames=3,
    reference_report="given",
)
CONFIG = ModelConfig(host=MACEConfig(num_channels=4, l_max=2, correlation=2, radial_mlp=[4], cutoff_A=3.0))


def water():
    return make_graph(Structure(np.array([8, 1, 1]), np.array([[0, 0, 0.1], [0, 0.8, -0.5], [0, -0.7, -0.5]])), 3.0)


def test_round_trip_keeps_every_digit(tmp_path):
    potential = build_potential(CONFIG, STATISTICS, seed=0).eval()
    save_potential(tmp_path / "m.safetensors", potential, extra={"note": "x"})
    loaded = load_potential(tmp_path / "m.safetensors")
    assert torch.equal(loaded(water()).energy, potential(water()).energy)
    assert loaded.statistics == potential.statistics
    assert loaded.atom_references.dtype == torch.float64


def test_a_run_folder_is_a_model(tmp_path):
    save_potential(tmp_path / "model.safetensors", build_potential(CONFIG, STATISTICS, seed=0))
    assert load_potential(tmp_path).num_parameters > 0


def test_another_dtype_on_load(tmp_path):
    save_potential(tmp_path / "m.safetensors", build_potential(CONFIG, STATISTICS, seed=0))
    single = load_potential(tmp_path / "m.safetensors")
    double = load_potential(tmp_path / "m.safetensors", dtype=torch.float64)
    assert double(water()).forces.dtype == torch.float64
    assert torch.allclose(double(water()).forces, single(water()).forces.double(), atol=1e-5)


def test_damaged_and_foreign_files(tmp_path):
    potential = build_potential(CONFIG, STATISTICS, seed=0)
    path = tmp_path / "m.safetensors"
    save_potential(path, potential)
    whole = path.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    for name, text in [
        ("cut", "damaged"),
        ("empty", "damaged"),
        ("foreign", "not a steradian model"),
        ("absent", "no such model file"),
    ]:
        with pytest.raises(ModelFileError, match=text) as caught:
            load_potential(tmp_path / f"{name}.safetensors")
        assert len(str(caught.value).splitlines()) == 1


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("steradian.checkpoint.os.replace", broken)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_seeds():
    a, b, c = (build_potential(CONFIG, STATISTICS, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(next(a.host.parameters()), next(c.host.parameters()))


def test_building_leaves_the_random_state_and_the_dtype_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_potential(CONFIG.model_copy(update={"precision": "float64"}), STATISTICS, seed=0)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_default_dtype() == torch.float32
