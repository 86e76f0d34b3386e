"""Files of earlier versions, which name neither message scale nor form of a gate, mean what was published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from steradian import checkpoint
from steradian.build import build_potential, load_potential
from steradian.cli.train import resolve
from steradian.config import (
    MACEConfig,
    MARAConfig,
    ModelConfig,
    NequIPConfig,
    O3MPNNConfig,
    ViSNetConfig,
    dump_config,
    load_config,
)
from steradian.config.earlier import complete_gate, complete_model
from steradian.training.record import RunDirectory
from steradian.training.run import fit
from tests.systems import STATISTICS
from tests.systems import seven_atoms as graph
from tests.unit.training_cases import toy_file, toy_sections

HOSTS: dict[str, Any] = {
    "mace": MACEConfig(num_channels=4, l_max=2, radial_mlp=[8], correlation=2),
    "nequip": NequIPConfig(num_layers=2, num_channels=4, l_max=1, radial_mlp=[8]),
    "visnet": ViSNetConfig(num_layers=2, num_channels=8, num_heads=2, radial={"num": 8}),
    "o3mpnn": O3MPNNConfig(num_channels=4, l_max=1, num_radial=8, zero_init=False),
}
PUBLISHED = {"mace": "mean", "nequip": "root", "visnet": 1.0, "o3mpnn": 1.0}
GATES: dict[str, Any] = {
    "none": None,
    "lab": MARAConfig(form="published", frame="lab", gate="published", hidden_dim=8),
    "intrinsic": MARAConfig(
        form="published", grid={"kind": "lebedev", "num_points": 26}, gate="published", hidden_dim=8
    ),
}
NEW_KEYS = ("form", "heads", "inputs", "activation")


def as_before(model: dict[str, Any], *also: str) -> dict[str, Any]:
    """The section without the settings that earlier versions did not have, and without some more of the gate."""
    host = {key: value for key, value in model["host"].items() if key != "message_scale"}
    if host["kind"] == "visnet":
        del host["avg_num_neighbors"]
    gate = {key: value for key, value in model["edge_gate"].items() if key not in (*NEW_KEYS, *also)}
    return {**model, "host": host, "edge_gate": gate}


def written(path: Path, potential: Any, model: dict[str, Any], version: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT_VERSION", version)
        checkpoint.write_model_file(path, potential.state_dict(), model, potential.statistics.to_dict(), {})
    return path


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("host", HOSTS)
def test_model_files(host, gate, tmp_path, monkeypatch):
    section = HOSTS[host].model_copy(update={"message_scale": PUBLISHED[host]})
    config = ModelConfig(host=section, precision="float64", **({"edge_gate": GATES[gate]} if GATES[gate] else {}))
    potential = build_potential(config, STATISTICS, seed=1).eval()
    model = as_before(config.model_dump(mode="json"), *(["frame", "grid"] if gate == "lab" else []))
    loaded = load_potential(written(tmp_path / "m.safetensors", potential, model, 2, monkeypatch))
    assert torch.equal(loaded(graph()).forces, potential(graph()).forces)
    assert loaded.config.host.message_scale == PUBLISHED[host]
    if gate != "none":
        assert (loaded.config.edge_gate.form, loaded.config.edge_gate.frame) == ("published", gate)


def test_what_a_file_names_stays(tmp_path, monkeypatch):
    config = ModelConfig(host=HOSTS["mace"], edge_gate=MARAConfig(hidden_dim=8), precision="float64")
    assert config.host.message_scale == "root"
    potential = build_potential(config, STATISTICS, seed=1).eval()
    for version in (2, checkpoint.FORMAT_VERSION):
        path = written(tmp_path / "m.safetensors", potential, config.model_dump(mode="json"), version, monkeypatch)
        assert load_potential(path).config == config


def test_files_of_now_say_so_to_earlier_versions(tmp_path, monkeypatch):
    """An earlier version would not know the new settings: it is told to be upgraded instead."""
    potential = build_potential(ModelConfig(host=HOSTS["mace"]), STATISTICS, seed=1)
    path = tmp_path / "m.safetensors"
    checkpoint.write_model_file(path, potential.state_dict(), {}, {}, {})
    assert checkpoint.read_model_file(path)[1]["format_version"] == 3
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
    with pytest.raises(checkpoint.ModelFileError, match="written by the newer steradian"):
        checkpoint.read_model_file(path)


def test_a_run_goes_on_as_it_began(tmp_path):
    toy_file(tmp_path)
    sections = toy_sections(tmp_path)
    sections["model"]["host"]["message_scale"] = "mean"
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(sections))
    run = RunDirectory(fit(load_config(path, ["training.max_epochs=1"]), progress=False).run_dir)
    content = yaml.safe_load(run.config.read_text())
    before = {**content, "model": as_before(content["model"], "frame")}
    assert len(str(before)) < len(str(content))
    run.config.write_text(yaml.safe_dump(before, sort_keys=False))
    config = resolve(None, None, None, ["training.max_epochs=2"], run.path)
    assert config.model.host.message_scale == "mean"
    assert (config.model.edge_gate.form, config.model.edge_gate.frame) == ("published", "lab")
    assert fit(config, resume=run.path, progress=False).epochs == 2
    assert yaml.safe_load(run.config.read_text())["model"] == content["model"]


def test_a_configuration_with_every_default_written_out_is_an_earlier_one(tmp_path):
    path = tmp_path / "config.yaml"
    whole = yaml.safe_load(dump_config(load_config(made(path, {"model": {"edge_gate": {"kind": "mara"}}}))))
    old = {**whole, "model": as_before(whole["model"])}
    for setting in ("frame", "grid"):  # their defaults were the published ones
        old["model"]["edge_gate"].pop(setting)
    config = load_config(made(path, old), ["model.host.num_channels=8"])
    assert config.model.host.message_scale == "mean"
    assert config.model.host.num_channels == 8
    assert (config.model.edge_gate.form, config.model.edge_gate.frame) == ("published", "lab")


def test_what_is_written_by_hand_has_the_defaults_of_today(tmp_path):
    path = tmp_path / "mine.yaml"
    written_by_hand = {"model": {"host": {"kind": "mace", "num_channels": 8}, "edge_gate": {"kind": "mara"}}}
    config = load_config(made(path, written_by_hand))
    assert config.model.host.message_scale == "root"
    assert config.model.edge_gate.form == "channel"


def made(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def test_sections():
    assert complete_gate({"kind": "mara", "frame": "intrinsic"})["frame"] == "intrinsic"
    assert complete_gate({"kind": "mara", "form": "channel"}) == {"kind": "mara", "form": "channel"}
    assert complete_gate({"kind": "efa"}) == {"kind": "efa"}
    assert complete_model({"host": {"message_scale": 2.0}})["host"] == {"message_scale": 2.0}
    assert complete_model({"host": {}})["host"] == {"message_scale": "mean"}  # MACE is what a host is unless it says
    for nonsense in ({}, {"host": None}, {"host": {"kind": "other"}}, {"edge_gate": 3}):
        assert complete_model(nonsense) == nonsense
