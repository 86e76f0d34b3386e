"""Files that were cut, exchanged or had a bit flipped: one clear line each, no traceback, nothing loaded silently.

Everything is drawn from one seed; the number of cases is that of the constants below.
"""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from ase.build import molecule

from steradian.build import build_potential, load_potential, save_potential
from steradian.checkpoint import read_arrays
from steradian.config import MACEConfig, ModelConfig
from steradian.evaluation.errors import ErrorReport, evaluate
from steradian.graph.structures import Structure
from steradian.interfaces.convert import convert_file
from steradian.simulate.files import RunFiles
from steradian.simulate.md import MDSettings, run_md
from tests.systems import STATISTICS

FLIPS = {"model": 200, "restart": 60, "trajectory": 40, "errors": 60}
CUTS = 60
LONGEST = 5.0  # [s] of one case; a hang would be longer

SETTINGS = MDSettings(save_every=1, restart_every=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a simulation and a file of errors."""
    path = tmp_path_factory.mktemp("whole")
    host = MACEConfig(num_channels=2, l_max=1, correlation=1, radial_mlp=[4], cutoff_A=2.0)
    potential = build_potential(ModelConfig(host=host, precision="float64"), STATISTICS, seed=0).eval()
    save_potential(path / "model.safetensors", potential)
    run_md(potential, molecule("CH3CH2OH"), path / "md", steps=4, settings=SETTINGS)
    atoms = molecule("CH3CH2OH")
    frames = [
        Structure(atoms.numbers, atoms.positions + 0.01 * k, energy=float(k), forces=np.zeros((9, 3))) for k in range(3)
    ]
    evaluate(potential, frames, progress=False).save(path / "errors-x.npz")
    return path


def restore(path):
    """What ``--resume`` reads, without the steps after it."""
    files = RunFiles(path.parent)
    return files.restore(molecule("CH3CH2OH"), SETTINGS, "ase")


READERS = {
    "model": ("model.safetensors", load_potential),
    "restart": ("md/restart.json", restore),
    "trajectory": ("md/trajectory.extxyz", restore),
    "log": ("md/md.csv", restore),
    "settings": ("md/settings.json", restore),
    "errors": ("errors-x.npz", ErrorReport.load),
}


def outcome(path, content, read):
    """The line with which a changed file is refused, or None where it is read; the file is put back."""
    whole = path.read_bytes()
    path.write_bytes(content)
    started, said = time.monotonic(), None
    try:
        read(path)
    except ValueError as error:
        said = str(error)
    finally:
        path.write_bytes(whole)
    assert time.monotonic() - started < LONGEST
    if said is not None:
        assert len(said.splitlines()) == 1, said
        assert str(path.parent) in said, said
    return said


@pytest.mark.parametrize("kind", ["model", "restart", "trajectory"])
def test_no_flipped_bit_is_read_silently(folder, kind):
    name, read = READERS[kind]
    whole = (folder / name).read_bytes()
    assert outcome(folder / name, whole, read) is None, "the whole file is refused"
    draw = random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little") if kind == "model" else len(whole)
    silent = []
    for case in range(FLIPS[kind]):
        place = draw.randrange(header if case % 2 else len(whole))  # half of a model's flips in its header
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        if outcome(folder / name, bytes(flipped), read) is None:
            silent.append(place)
    if kind == "restart":  # an exponent written E instead of e is the same number
        silent = [place for place in silent if chr(whole[place]) not in "eE"]
    assert not silent, [whole[max(place - 20, 0) : place + 20] for place in silent]


def test_flipped_bits_of_errors_change_no_number(folder):
    """Dates and attributes of the zip container are not looked at; numbers are."""
    path = folder / "errors-x.npz"
    whole, expected = path.read_bytes(), ErrorReport.load(path)
    draw, refused = random.Random(1), 0
    for _ in range(FLIPS["errors"]):
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        found = []
        if outcome(path, bytes(flipped), lambda path: found.append(ErrorReport.load(path))) is None:  # noqa: B023
            assert found[0].to_dict() == expected.to_dict()
        else:
            refused += 1
    assert refused > FLIPS["errors"] // 2


@pytest.mark.parametrize("kind", READERS)
def test_cut_and_emptied_files(folder, kind):
    name, read = READERS[kind]
    whole = (folder / name).read_bytes()
    draw = random.Random(2)
    for size in [0, 1, 7, *(draw.randrange(len(whole) - 1) for _ in range(CUTS))]:
        assert outcome(folder / name, whole[:size], read) is not None, size


@pytest.mark.parametrize("kind", READERS)
def test_exchanged_files(folder, kind):
    name, read = READERS[kind]
    whole = (folder / name).read_bytes()
    others = [(folder / other).read_bytes() for other, _ in READERS.values()]
    others += [b"text\n", b"[" * 100_000, b"{}", b"null", b"\x93NUMPY\x01\x00", b"PK\x05\x06" + bytes(18), bytes(4096)]
    for content in others:
        if content != whole:
            said = outcome(folder / name, content, read)
            assert said is not None, content[:40]


def test_exports_for_conversion(folder):
    """Whatever stands in a file that is to be converted."""
    path = folder / "foreign.npz"
    np.savez(path, about=np.array('{"package": "mace-torch", "hyperparameters": {}}'))
    whole = path.read_bytes()
    draw = random.Random(3)
    contents = [whole, (folder / "errors-x.npz").read_bytes(), b"", b"text"]
    contents += [whole[: draw.randrange(len(whole))] for _ in range(CUTS // 2)]
    for about in ("[]", "null", '{"package": 3, "hyperparameters": 4}', '{"package": "nequip", "hyperparameters": {}}'):
        np.savez(path, about=np.array(about))
        contents.append(path.read_bytes())
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            convert_file(path)
        assert len(str(caught.value).splitlines()) == 1, str(caught.value)
    with pytest.raises(ValueError, match="cannot be read"):
        read_arrays(folder)
