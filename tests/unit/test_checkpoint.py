"""Model files: whole or not there, and never silently wrong."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from steradian.build import build_potential, load_potential, save_potential
from steradian.checkpoint import (
    FolderInUseError,
    ModelFileError,
    held,
    made_folder,
    open_atomically,
    read_arrays,
    read_json,
    read_model_file,
    write_atomically,
    write_json,
    write_model_file,
)
from steradian.config import MACEConfig, ModelConfig
from steradian.data.formats import load_npz
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


def test_temporary_names_follow_no_link_and_what_a_kill_left_is_swept(tmp_path):
    path = tmp_path / "model.safetensors"
    for name in ("model.safetensors.tmp", f".model.safetensors.{os.getpid()}.tmp"):  # what could be guessed
        (tmp_path / name).symlink_to(tmp_path / "victim")
    (tmp_path / ".model.safetensors.0123456789abcdef.tmp").write_bytes(b"half")
    code = (
        "import os, sys, steradian.checkpoint as c\nwith c.open_atomically(sys.argv[1]) as f: os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    assert len([entry for entry in tmp_path.iterdir() if not entry.is_symlink()]) == 1
    with open_atomically(path) as stream:  # another one that writes at the same time keeps its own
        stream.write(b"first")
        write_atomically(path, b"second")
    assert path.read_bytes() == b"first"
    assert not (tmp_path / "victim").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir() if not entry.is_symlink()) == [path.name]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_full_disk_names_file_and_way_out(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("steradian.checkpoint.os.fsync", full)
    with pytest.raises(OSError, match="free some space") as caught:
        write_atomically(tmp_path / "model.safetensors", b"content")
    assert caught.value.filename == str(tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_held_once_and_goes_where_nothing_came_into_it(tmp_path):
    folder = tmp_path / "a" / "b"
    with held(folder):
        with pytest.raises(FolderInUseError, match="another process is working there"), held(folder):
            pass
        code = "import sys, steradian.checkpoint as c\nwith c.held(c.Path(sys.argv[1])): pass"
        other = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
        assert "FolderInUseError" in other.stderr
    assert not (tmp_path / "a").exists()
    with held(folder):
        (folder / "result").touch()
    assert [entry.name for entry in folder.iterdir()] == ["result"]
    with held(folder):  # free again
        pass
    with pytest.raises(NotADirectoryError, match="choose another name"), made_folder(folder / "result" / "below"):
        pass


def test_what_a_kill_left_in_a_folder_goes(tmp_path):
    ours, others = (".probe.0123456789abcdef.tmp", ".model.safetensors.0123456789abcdef.tmp"), (".mine.tmp", "a.tmp")
    for name in ours + others:
        (tmp_path / name).touch()
    with made_folder(tmp_path):  # not held: only what made_folder itself leaves
        assert {entry.name for entry in tmp_path.iterdir()} == {*ours[1:], *others}
    with open_atomically(tmp_path / "written"), held(tmp_path):  # what another process writes at the time stays
        pass
    assert {entry.name for entry in tmp_path.iterdir()} == {"written", *others}


def test_plain_data_carries_a_hash(tmp_path, capsys):
    path, content = tmp_path / "restart.json", {"step": 3, "positions": [[0.1, -2.5e-7, 1e300]], "name": "Å"}
    write_json(path, content)
    assert read_json(path) == content
    path.write_text(path.read_text().replace("0.1", "0.3"))
    with pytest.raises(ValueError, match="damaged, its content is not what was written"):
        read_json(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="damaged"):
        read_json(path)
    path.write_text(json.dumps(content))  # of an earlier version
    assert read_json(path) == content
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def model_file(path, **changes):
    """A model file whose content was changed before it was written, hash and all."""
    save_potential(path, build_potential(CONFIG, STATISTICS, seed=0))
    weights, header = read_model_file(path)
    for place, value in changes.items():
        (weights if "." in place or place in weights else header["statistics"])[place] = value
    write_model_file(path, weights, header["model"], header["statistics"], header["extra"])
    return path


def test_old_models_without_a_hash_load_with_one_line(tmp_path, capsys):
    path = model_file(tmp_path / "m.safetensors")
    expected = load_potential(path)(water()).energy
    assert capsys.readouterr().err == ""
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["steradian"])
    weights, _ = read_model_file(path)
    for found, text in ((1, "without a hash"), (2, "")):
        save_file(weights, path, metadata={"steradian": json.dumps(metadata | {"format_version": found})})
        if text:
            assert torch.equal(load_potential(path)(water()).energy, expected)
            assert text in capsys.readouterr().err
        else:  # the mark of a hash was lost
            with pytest.raises(ModelFileError, match="hash differs"):
                load_potential(path)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("avg_num_neighbors", -3.0, "avg_num_neighbors is -3.0"),
        ("avg_num_neighbors", float("inf"), "avg_num_neighbors is inf"),
        ("avg_num_neighbors", 0.0, "avg_num_neighbors is 0.0"),
        ("energy_shift", float("nan"), "energy_shift is nan"),
        ("atom_references", {"H": -13.0}, "no reference energy of atomic number 8"),
        ("atom_references", {"Qq": -13.0}, "cannot be read"),
        ("elements", [0, 300], "elements are"),
        ("elements", "HO", "cannot be read"),
        ("host.embedding", torch.ones(2, 4, dtype=torch.int64), "holds torch.int64"),
        ("host.embedding", torch.full((2, 4), float("nan")), "NaN"),
        ("host.embedding", torch.ones(2, 5), "do not fit"),
    ],
)
def test_absurd_values_are_refused(tmp_path, place, value, said):
    path = model_file(tmp_path / "m.safetensors", **{place: value})
    with pytest.raises(ModelFileError, match=said) as caught:
        load_potential(path)
    assert len(str(caught.value).splitlines()) == 1


def test_npz_files_that_are_none(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.arange(1000.0))
    assert read_arrays(path)["a"][3] == 3.0
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[4000] ^= 4
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="damaged"):
        read_arrays(path)
    huge = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776,), }".ljust(
        117
    )
    with zipfile.ZipFile(path, "w") as container:
        container.writestr("a.npy", huge + b"\n")
    with pytest.raises(ValueError, match="not an npz file, or damaged"):
        read_arrays(path)
    for content in (b"", whole[:700], b"text", b"\x93NUMPY\x01\x00"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not an npz file, or damaged"):
            read_arrays(path)


def test_entries_that_a_damaged_directory_skips(tmp_path):
    """A length in the directory of a zip container swallows what follows; every bit of the directory is flipped."""
    path, arrays = tmp_path / "a.npz", {name: np.arange(3.0) for name in "abc"}
    np.savez(path, **arrays)
    whole = path.read_bytes()
    for place in range(8 * whole.index(b"PK\x01\x02"), 8 * len(whole)):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        for read in (read_arrays, load_npz):
            found = None
            with contextlib.suppress(ValueError):
                found = read(path)
            assert found is None or {name: array.tolist() for name, array in found.items()} == {
                name: array.tolist() for name, array in arrays.items()
            }


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
