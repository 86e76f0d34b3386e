"""Five hundred malformed data files and configurations: one clear line that names the file, or the right content.

Every case is a whole file with one random change. Whether what was read is right is decided without the reader: numbers
are compared with those of the file, so a change that alters a number must show in that number only, and a change of the
structure (a shifted column, a lost frame, another element) must be refused or not exist.
"""

from __future__ import annotations

import io
import json
import random
import time

import numpy as np
import pytest

from steradian.config import ConfigError, RunConfig, dump_config, load_config
from steradian.data.files import read_structures
from steradian.graph.structures import DataError

CASES = {"xyz": 200, "npz": 80, "json": 70, "deepmd": 50, "yaml": 100}
RNG = np.random.default_rng(0)
NUMBERS = np.array([8, 1, 1])
POSITIONS = np.round(RNG.normal(size=(4, 3, 3)) * 3, 6)
FORCES = np.round(RNG.normal(size=(4, 3, 3)), 6)
ENERGIES = np.round(RNG.normal(size=4), 6)
CELL = np.diag([9.0, 10.0, 11.0])
WORDS = [
    "nan",
    "inf",
    "T",
    "1_0",
    "1,5",
    "--1",
    "0x1",
    "",
    "Xx",
    "-1",
    "1e400",
    '"',
    "=",
    "[",
    "\x1b[31m",
    "٣",
    "{",
    "null",
]


def xyz() -> bytes:
    lines = []
    for positions, forces, energy in zip(POSITIONS, FORCES, ENERGIES):
        lattice = " ".join(f"{value:.1f}" for value in CELL.ravel())
        lines += ["3", f'Lattice="{lattice}" Properties=species:S:1:pos:R:3:forces:R:3 energy={energy:.6f} pbc="T T T"']
        for symbol, place, force in zip("OHH", positions, forces):
            lines.append(" ".join([symbol, *(f"{value:.6f}" for value in (*place, *force))]))
    return ("\n".join(lines) + "\n").encode()


def npz() -> bytes:
    content = io.BytesIO()
    cells = np.tile(CELL, (4, 1, 1))
    np.savez(content, R=POSITIONS, z=NUMBERS, E=ENERGIES, F=FORCES, cell=cells)
    return content.getvalue()


def pymatgen() -> bytes:
    entries = [
        {
            "structure": {
                "lattice": {"matrix": CELL.tolist()},
                "sites": [
                    {"species": [{"element": symbol}], "xyz": place} for symbol, place in zip("OHH", positions.tolist())
                ],
            },
            "outputs": {"energy": float(energy), "forces": forces.tolist()},
        }
        for positions, forces, energy in zip(POSITIONS, FORCES, ENERGIES)
    ]
    return json.dumps(entries).encode()


def changed_text(text: bytes, rng: random.Random) -> bytes:
    """One change of words, lines, bytes or length."""
    lines = text.decode().split("\n")
    row = rng.randrange(len(lines))
    words = lines[row].split(" ")
    kind = rng.randrange(8)
    if kind == 0:
        words[rng.randrange(len(words))] = rng.choice(WORDS)
    elif kind == 1:
        del words[rng.randrange(len(words))]
    elif kind == 2:
        words.insert(rng.randrange(len(words) + 1), rng.choice(words + WORDS))
    lines[row] = " ".join(words)
    if kind == 3:
        del lines[row]
    elif kind == 4:
        lines.insert(row, rng.choice(lines))
    changed = "\n".join(lines).encode(errors="surrogatepass")
    if kind == 5:
        changed = changed[: rng.randrange(len(changed))]
    elif kind == 6:
        place = rng.randrange(len(changed))
        changed = changed[:place] + bytes([rng.randrange(256)]) + changed[place + 1 :]
    elif kind == 7:
        letter = rng.choice(b'"=:{}[],.\n ')
        place = rng.randrange(len(changed))
        changed = changed[:place] + bytes([letter]) + changed[place:]
    return changed


def changed_npz(rng: random.Random) -> bytes:
    """One array of another shape or type, or damaged bytes."""
    if rng.random() < 0.5:
        content = bytearray(npz())
        if rng.random() < 0.3:
            return bytes(content[: rng.randrange(len(content))])
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return bytes(content)
    arrays = {"R": POSITIONS, "z": NUMBERS, "E": ENERGIES, "F": FORCES, "cell": np.tile(CELL, (4, 1, 1))}
    name = rng.choice(sorted(arrays))
    array = arrays[name]
    arrays[name] = rng.choice(
        [array[:-1], array[None], array + 0j, array.astype(str), array > 0, array.ravel()[:-1], array * np.nan,
         array.astype(int).astype("datetime64[s]"), array.T, np.array([]), np.array(True)]
    )  # fmt: skip
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def check_content(path, allowed_changes: int) -> None:
    """Frames that were read are those of the whole file, but for ``allowed_changes`` numbers."""
    frames = read_structures(path)
    assert len(frames) <= 5  # one frame may stand twice
    wrong = elements = 0
    for frame in frames:
        assert len(frame) == 3
        distances = [np.count_nonzero(~np.isclose(frame.positions, p, atol=1e-9)) for p in POSITIONS]
        index = int(np.argmin(distances))
        wrong += distances[index]
        wrong += np.count_nonzero(~np.isclose(frame.forces, FORCES[index], atol=1e-9))
        wrong += abs(frame.energy - ENERGIES[index]) > 1e-9
        wrong += np.count_nonzero(~np.isclose(frame.cell, CELL)) if frame.periodic else 1
        elements = max(elements, np.count_nonzero(frame.numbers != NUMBERS))  # DeePMD writes them once for all frames
    wrong += elements
    assert wrong <= allowed_changes, f"{wrong} numbers are not those of the file"


def told(error: Exception, path, lines: int = 1) -> None:
    message = str(error)
    assert str(path) in message
    assert len(message.splitlines()) <= lines
    assert "\x1b" not in message
    assert len(message) < 1200


def one_case(kind: str, rng: random.Random, folder) -> bool:
    """Whether the malformed file was refused (with a clear line); else what was read is right."""
    if kind == "deepmd":
        path = folder
        files = {"type.raw": b"0\n1\n1\n", "type_map.raw": b"O\nH\n"}
        arrays = {"coord": POSITIONS, "force": FORCES, "energy": ENERGIES, "box": np.tile(CELL, (4, 1, 1))}
        for name, array in arrays.items():
            content = io.BytesIO()
            np.save(content, array.reshape(4, -1))
            files[f"{name}.npy"] = content.getvalue()
        name = rng.choice(sorted(files))
        content = bytearray(files[name])
        if name.endswith(".raw"):
            content = bytearray(changed_text(bytes(content), rng))
        elif rng.random() < 0.5:
            content = content[: rng.randrange(len(content))]
        else:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        for file, value in (files | {name: bytes(content)}).items():
            (folder / file).write_bytes(value)
    else:
        path = folder / f"case.{kind}"
        make = {"xyz": lambda: changed_text(xyz(), rng), "npz": lambda: changed_npz(rng),
                "json": lambda: changed_text(pymatgen().replace(b", ", b",\n"), rng)}[kind]  # fmt: skip
        path.write_bytes(make())
    try:
        # A digit, a sign or an element in the place of another is a file as good as the first; so is a bit of a number
        # in DeePMD's folders, which carry no checksum.
        check_content(path, allowed_changes=2 if kind == "deepmd" else 1)
    except DataError as error:
        told(error, path)
        return True
    return False


@pytest.mark.parametrize("kind", ["xyz", "npz", "json", "deepmd"])
def test_malformed_data_is_refused_in_one_line_or_read_right(kind, tmp_path):
    refused = 0
    for case in range(CASES[kind]):
        folder = tmp_path / str(case)
        folder.mkdir()
        start = time.monotonic()
        try:
            refused += one_case(kind, random.Random(f"{kind} {case}"), folder)
        except Exception as error:
            raise AssertionError(f"{kind}, case {case} ({folder}): {type(error).__name__}: {error}") from error
        assert time.monotonic() - start < 5
    assert refused > 0.3 * CASES[kind]


def test_malformed_configurations_are_refused_in_place_or_read_right(tmp_path):
    text = dump_config(RunConfig()).encode()
    whole = RunConfig().model_dump(mode="json")
    refused = 0
    for case in range(CASES["yaml"]):
        path = tmp_path / f"{case}.yaml"
        path.write_bytes(changed_text(text, random.Random(f"yaml {case}")))
        start = time.monotonic()
        try:
            read = load_config(path).model_dump(mode="json")
        except ConfigError as error:
            refused += 1
            told(error, path, lines=12)
        else:
            assert differences(whole, read) <= 25, path  # a key that was taken out stands at its default
        assert time.monotonic() - start < 5
    assert refused > 0.3 * CASES["yaml"]


def differences(one, other) -> int:
    if isinstance(one, dict) and isinstance(other, dict):
        return sum(differences(one.get(key), other.get(key)) for key in {*one, *other})
    return int(one != other)
