"""Configuration files: defaults, overrides, and what a mistake is told."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import yaml

from steradian.config import ConfigError, RunConfig, dump_config, json_schema, load_config, parse_config


def message(content, overrides=()):
    with pytest.raises(ConfigError) as caught:
        parse_config(content, overrides, source="file.yaml")
    return str(caught.value)


def test_defaults_round_trip():
    config = parse_config({})
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_overrides_are_typed_and_nested():
    config = parse_config({}, ["model.host.num_channels=32", "model.edge_gate.kind=mara", "data.train=[a.xyz, b.xyz]"])
    assert config.model.host.num_channels == 32
    assert config.model.edge_gate.kind == "mara"
    assert [str(path) for path in config.data.train] == ["a.xyz", "b.xyz"]


def test_the_default_training_set_is_the_bundled_one():
    assert parse_config({}).data.train == "bundled:malonaldehyde"
    assert parse_config(yaml.safe_load(dump_config(parse_config({})))).data.train == "bundled:malonaldehyde"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"fiting": 1}, "fiting: unknown key; did you mean 'training'?"),
        ({"model": {"host": {"num_chanels": 3}}}, "model.host.num_chanels: unknown key; did you mean 'num_channels'?"),
        (
            {"model": {"edge_gate": {"kind": "mara", "grid": {"kind": "lebedev", "num_pts": 26}}}},
            "num_pts: unknown key; did you mean 'num_points'?",
        ),
        ({"model": {"host": {"cutoff_A": -1}}}, "model.host.cutoff_A: input should be greater than 0 (got -1)"),
        ({"model": {"host": {"correlation": 7}}}, "correlation must be between 1 and 4, not 7"),
        ({"model": {"host": {"correlation": [3]}}}, "correlation lists 1 orders for 2 layers"),
        (
            {"model": {"edge_gate": {"kind": "mara", "form": "published", "hidden_dim": 30, "num_heads": 4}}},
            "must be a multiple of num_heads",
        ),
        ({"model": {"edge_gate": {"kind": "mara", "form": "published", "field": "distance"}}}, "squared field"),
        (
            {"model": {"edge_gate": {"kind": "mara", "frame": "lab", "dropout": 0.1}}},
            "model.edge_gate: dropout, frame: of form 'published'; set form: published",
        ),
        (
            {"model": {"edge_gate": {"kind": "mara", "form": "published", "heads": 4}}},
            "heads: of form 'channel'; set form: channel or leave it out",
        ),
        ({"model": {"edge_gate": {"kind": "mara", "inputs": ["radial", "radial"]}}}, "inputs lists one twice"),
        ({"model": {"host": {"message_scale": 0.0}}}, "message_scale"),
        ({"training": {"loss": {"kind": "mae"}}}, "input should be 'mse', 'huber' or 'l1' (got 'mae')"),
    ],
)
def test_mistakes_are_explained(content, expected):
    assert expected in message(content)


def test_every_mistake_is_listed():
    text = message({"model": {"hst": {}}, "training": {"max_epochs": 0}})
    assert text.startswith("file.yaml: 2 mistakes")
    assert len(text.splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nname: b\n", "line 2: the key 'name' is given twice"),
        ("data:\n  split: {seed: 1, seed: 2}\n", "line 2: the key 'seed' is given twice"),
        ("a: &a [*a]\n", "an alias inside its own anchor"),
        ("2024-01-01: 3\n", "2024-01-01: unknown key"),
        ("? [1, 2]\n: 3\n", "a key must be text"),
        ("training: {seed: 010}\n", "010 would be read in base 8"),
        ("training: {max_time_s: 1:30}\n", "1:30 would be read in base 60"),
        ("model: {host: {cutoff_A: .inf}}\n", "model.host.cutoff_A: input should be a finite number"),
        ("model: {host: {cutoff_A: .nan}}\n", "model.host.cutoff_A: input should be"),
        ("model: {host: {num_channels: 1.0e+12}}\n", "num_channels: input should be less than or equal to 65536"),
        ("[" * 5000, "nested too deeply"),
        ("name: \x1b[31m\n", r"x001b|special characters"),
    ],
)
def test_yaml_that_would_be_read_as_something_else(tmp_path, text, expected):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_aliases_that_would_fill_the_memory_are_refused_at_once(tmp_path):
    path = tmp_path / "bomb.yaml"
    levels = [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12)]
    path.write_text("\n".join(["a0: &a0 [1, 1]", *levels]))
    start = time.monotonic()
    with pytest.raises(ConfigError, match="more than 100000 values, once aliases are written out"):
        load_config(path)
    assert time.monotonic() - start < 5
    path.write_text("data: &d {split: {seed: 3}}\n")
    assert load_config(path).data.split.seed == 3


def test_encodings_of_configurations(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes("name: Å\n".encode("utf-8-sig"))
    assert load_config(path).name == "Å"
    path.write_bytes("name: Å\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"c.yaml, line 1: the byte 0xc5 is not UTF-8"):
        load_config(path)


def test_elements_that_yaml_takes_for_truth_values():
    content = "data: {reference_energies: {kind: given, values: {No: -1.0, Y: -2.0}}}"
    assert parse_config({}, [content.replace(": ", "=", 1)]).data.reference_energies.values == {"No": -1.0, "Y": -2.0}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.learning_rate=1", "did you mean 'training.optimizer.learning_rate'?"),
        ("energy_weight=1", "did you mean 'training.loss.energy_weight'?"),
        ("model={host: {kind: mace, kind: nequip}}", "the key 'kind' is given twice"),
    ],
)
def test_keys_in_the_wrong_section_and_twice(override, expected):
    assert expected in message({}, [override])


def test_an_override_given_twice():
    assert "--set name is given twice" in message({}, ["name=a", "name=b"])
    assert parse_config({}, ["name=a", "name=a"]).name == "a"


@pytest.mark.parametrize("override", ["novalue", "=3", "name.x=3", "model.host.num_channels=[1"])
def test_bad_overrides(override):
    with pytest.raises(ConfigError):
        parse_config({"name": "a"}, [override])


@pytest.mark.parametrize(
    ("text", "expected"), [("", "is empty"), ("a: [1", "not valid YAML"), ("- 1\n- 2\n", "expected sections")]
)
def test_files_that_are_not_configurations(tmp_path, text, expected):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_config(path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_schema_is_json():
    schema = json.loads(json.dumps(json_schema()))
    assert "model" in schema["properties"]
    assert set(schema["properties"]) == set(RunConfig.model_fields)


def test_importing_the_schema_imports_no_torch():
    code = "import sys, steradian.config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
