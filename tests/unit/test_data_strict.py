"""What a lenient reader would guess at: read right, or told in one line that names file and place."""

import gzip
import json
import os
import re
import zipfile

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read as ase_read
from ase.io import write as ase_write

from steradian.config import KeysConfig, UnitsConfig
from steradian.data.files import read_structures
from steradian.graph.structures import DataError, Structure

ALL = ("energy", "forces", "stress")
COLUMNS = "Properties=species:S:1:pos:R:3:forces:R:3"
ROWS = "Cu 0 0 0 0.1 0 0\nCu 2 0 0 -0.1 0 0\n"
CELL = "4 0 0 0 4 0 0 0 4"


def xyz(tmp_path, comment, rows=ROWS):
    path = tmp_path / "t.xyz"
    path.write_text(f"{len(rows.splitlines())}\n{comment}\n{rows}")
    return path


def refused(path, match, **options):
    with pytest.raises(DataError, match=match) as caught:
        read_structures(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# ------------------------------------------------------------------------------------------------------- extended XYZ


@pytest.mark.parametrize("key", ["Lattice", "lattice", "LATTICE"])
@pytest.mark.parametrize("columns", [COLUMNS, COLUMNS.replace("Prop", "prop")])
def test_lattice_and_properties_in_any_case(tmp_path, key, columns):
    (frame,) = read_structures(xyz(tmp_path, f'{key}="1 0 0 2 3 0 4 5 6" {columns} energy=-1'))
    assert frame.cell.tolist() == [[1, 0, 0], [2, 3, 0], [4, 5, 6]]
    assert frame.pbc.all()
    assert frame.forces[0, 0] == 0.1


@pytest.mark.parametrize(
    ("comment", "match"),
    [
        (f"{COLUMNS} energy=T", r"no energy|'energy' does not hold numbers but truth values"),
        (f"{COLUMNS} energy=1_000", "'energy' does not hold numbers but text"),
        (f"{COLUMNS} energy=-1,5", "'energy' holds 2 values, a frame has one energy"),
        (f"{COLUMNS} energy=-1.0 energy=-2.0", r"line 2\): the key 'energy' is given twice"),
        (f'{COLUMNS} Lattice="{CELL}" lattice="{CELL}" energy=1', "the key 'Lattice' is given twice"),
        (f'{COLUMNS} energy=-1 Lattice="{CELL}', r"Lattice=\" is not closed"),
        (f'Lattice="{CELL} {COLUMNS} energy=-1 note="a"', "no space after the value of Lattice"),
        (f'{COLUMNS} energy=-1 Lattice="4 4 4"', "Lattice holds 3 values, not nine numbers"),
        (f'{COLUMNS} energy=-1 Lattice="{CELL}" pbc="yes no T"', "pbc is"),
        (f'{COLUMNS} energy=-1 cell="{CELL}"', "no Lattice, but 'cell' holds nine numbers"),
        (f"{COLUMNS}:R:1 energy=-1", "is no list of name:type:width"),
        (f"{COLUMNS}:forces:R:1 energy=-1", r"8|twice|columns"),
        ("Properties=species:S:1:pos:R:3:forces:Q:3 energy=-1", "column type Q"),
        ("Properties=species:S:1:pos:R:3:forces:I:3 energy=-1", r"line 3\): .*'0.1' in column 'forces' is no whole"),
        ("Properties=species:S:1:xyz:R:3:forces:R:3 energy=-1", "or none 'pos'"),
        ("Properties=species:S:1:pos:R:3 energy=-1", r"line 3\): .*7 columns; Properties names 4"),
        (f"{COLUMNS} energy=-1 weight=heavy", "'weight' does not hold numbers but text.*one number per frame"),
        (f"{COLUMNS} energy=-1 weight=-2", "a weight of -2"),
        (f"{COLUMNS} energy=-1 e_unit=furlong", "unknown unit of energy 'furlong'.*set data.units.energy"),
        (f"{COLUMNS} energy='_JSON {{\"a\": 1, \"a\": 2}}'", "the key 'a' is given twice"),
    ],
)  # fmt: skip
def test_comments_that_would_be_read_as_something_else(tmp_path, comment, match):
    refused(xyz(tmp_path, comment), match)


@pytest.mark.parametrize("word", ["1_0", "٣", "1.0d+00", "0x1", "--1", "T", "1,5"])
def test_words_that_are_no_numbers(tmp_path, word):
    rows = ROWS.replace("-0.1", word)
    assert "line 4" in refused(
        xyz(tmp_path, f"{COLUMNS} energy=-1", rows), re.escape(f"'{word}' in column 'forces' is no number")
    )


def test_a_weight_column_is_not_the_weight_of_a_frame(tmp_path):
    rows = "".join(line + " 63.5\n" for line in ROWS.splitlines())
    path = xyz(tmp_path, f"{COLUMNS}:weight:R:1 my_weight=3 energy=-1", rows)
    refused(path, "'weight' holds 2 numbers, a frame has one weight; rename it, or set data.keys.weight")
    assert read_structures(path, KeysConfig(weight="my_weight"))[0].weight == 3


@pytest.mark.parametrize(
    ("tail", "cut"),
    [("0.12345678", False), ("0.1234567", True), ("0.", True), ("1.2345678e-05", False), ("1.2345678e-0", True)],
)
def test_a_last_number_that_lost_digits(tmp_path, tail, cut):
    other = "1.2345678e-03" if "e" in tail else "0.12345678"
    path = xyz(tmp_path, f"{COLUMNS} energy=-1", f"Cu 0 0 0 0.0 0.0 {other}\nCu 2 0 0 0.0 0.0 {tail}")
    if cut:
        refused(path, r"truncated.*in the middle of the number .*\(line 4; add a line end if it is whole\)")
        path.write_text(path.read_text() + "\n")
    assert read_structures(path)[0].forces[1, 2] == float(tail)


def test_encodings(tmp_path):
    text = f'2\n{COLUMNS} energy=-1.0 note="5 Å"\n{ROWS}'
    path = tmp_path / "t.xyz"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_bytes(text.encode(encoding))
        assert read_structures(path)[0].energy == -1
    path.write_bytes(text.replace("\n", "\r\n").encode())
    assert read_structures(path)[0].energy == -1
    path.write_bytes(text.encode("latin-1"))
    refused(path, r"line 2: the byte 0xc5 is not UTF-8 \(Latin-1 or Windows-1252, where it is 'Å'\?\).*iconv")
    path.write_bytes(text.encode("utf-16"))
    refused(path, "UTF-16")
    path.write_bytes(bytes(range(256)) * 4)
    refused(path, "not a text file")
    with gzip.open(tmp_path / "t.xyz.gz", "wt") as file:
        file.write(text)
    assert read_structures(tmp_path / "t.xyz.gz")[0].energy == -1
    whole = (tmp_path / "t.xyz.gz").read_bytes()
    (tmp_path / "t.xyz.gz").write_bytes(whole[:-20])
    refused(tmp_path / "t.xyz.gz", "not a complete gz file|truncated")


def test_plain_files_read_as_ase_reads_them(tmp_path):
    images = []
    for seed in range(5):
        atoms = bulk("CuZn", "zincblende", a=4.1) if seed % 2 else molecule("CH3CH2OH")
        atoms.rattle(0.1, seed=seed)
        atoms.info |= {"number": seed, "vector": np.arange(5) / 3, "words": 'with "quotes" and = signs', "truth": True}
        atoms.info["nested"] = {"a": [1, 2, {"b": "c d"}]}
        atoms.info["matrix"] = np.arange(6.0).reshape(2, 3)
        atoms.arrays["spin"] = np.linspace(-1, 1, len(atoms))
        results = {"energy": -seed / 3, "forces": np.random.default_rng(seed).normal(size=(len(atoms), 3))}
        if seed % 2:
            results["stress"] = np.arange(6) / 100
        atoms.calc = SinglePointCalculator(atoms, **results)
        images.append(atoms)
    ase_write(tmp_path / "a.extxyz", images)
    for frame, atoms in zip(
        read_structures(tmp_path / "a.extxyz", require=("energy",)), ase_read(tmp_path / "a.extxyz", ":")
    ):
        assert (frame.numbers == atoms.numbers).all()
        assert (frame.positions == atoms.positions).all()
        assert (frame.cell == atoms.cell.array).all()
        assert frame.energy == atoms.get_potential_energy()
        assert (frame.forces == atoms.get_forces()).all()


# --------------------------------------------------------------------------------------------------------- the labels

VOIGT = np.array([[1, 6, 5], [6, 2, 4], [5, 4, 3]])


@pytest.mark.parametrize(("key", "factor"), [("stress", 1.0), ("virial", -1 / 64), ("REF_virial", -1 / 64)])
@pytest.mark.parametrize("text", ["1 2 3 4 5 6", "1 6 5 6 2 4 5 4 3", "[[1,6,5],[6,2,4],[5,4,3]]"])
def test_stress_in_every_form(tmp_path, key, factor, text):
    path = xyz(tmp_path, f'Lattice="{CELL}" {COLUMNS} energy=-1 {key}="{text}"'.replace('"[', "[").replace(']"', "]"))
    assert read_structures(path, require=ALL)[0].stress == pytest.approx(factor * VOIGT)


def test_stress_and_virial_that_contradict_each_other(tmp_path):
    stress, virial = "0.1 0 0 0 0.1 0 0 0 0.1", "{0} 0 0 0 {0} 0 0 0 {0}"
    head = f'Lattice="{CELL}" {COLUMNS} energy=-1.0 stress="{stress}" virial="{virial}"'
    assert read_structures(xyz(tmp_path, head.format(-6.4)), require=ALL)[0].stress[0, 0] == pytest.approx(0.1)
    path = xyz(tmp_path, head.format(6.4))
    refused(path, "'stress' and 'virial' both look like stress and differ: set data.keys.stress", require=ALL)
    assert read_structures(path, KeysConfig(stress="virial"), require=ALL)[0].stress[0, 0] == pytest.approx(-0.1)
    notes = []
    assert read_structures(path, notes=notes)[0].stress is None  # nobody needs it
    assert notes == [f"{path}, frame 0: stress left out: 'stress' and 'virial' both look like stress and differ: "
                     "set data.keys.stress to one of them"]  # fmt: skip


def test_equal_labels_of_other_shape_or_rounding(tmp_path):
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=1)
    atoms.calc = EMT()
    atoms.info["REF_energy"] = atoms.get_potential_energy() + 3e-8
    atoms.arrays["REF_forces"] = atoms.get_forces().astype(np.float32)
    atoms.info["REF_stress"] = atoms.get_stress(voigt=False)
    ase_write(tmp_path / "t.xyz", atoms)
    (frame,) = read_structures(tmp_path / "t.xyz", require=ALL)
    assert frame.stress == pytest.approx(atoms.get_stress(voigt=False), abs=1e-8)
    primitive = bulk("Cu")
    primitive.calc = EMT()
    primitive.get_stress()
    ase_write(tmp_path / "one.xyz", primitive)  # ASE writes energies [1] beside energy
    assert read_structures(tmp_path / "one.xyz")[0].energy == pytest.approx(primitive.get_potential_energy(), abs=1e-9)


def test_labels_that_nobody_needs_do_not_stop_a_run(tmp_path):
    notes = []
    rows = "".join(line + " 1" * 9 + "\n" for line in ROWS.splitlines())
    path = xyz(tmp_path, f'Lattice="{CELL}" {COLUMNS}:virial:R:9 energy=-1', rows)
    assert read_structures(path, notes=notes)[0].energy == -1
    assert "stress left out: a stress of shape (2, 9)" in notes[0]
    path = xyz(tmp_path, f'Lattice="{CELL}" {COLUMNS} energy=-1 stress="{"nan " * 8}nan"')
    assert read_structures(path, notes=notes)[0].stress is None
    assert "stress left out: stress: not finite" in notes[1]
    refused(path, "stress: not finite", require=ALL)
    refused(path, "stress: not finite", keys=KeysConfig(stress="stress"))


def test_energy_that_forces_belong_to(tmp_path):
    """VASP: energy at no smearing and free energy; forces are derivatives of the free energy."""
    atoms = bulk("Cu")
    atoms.calc = SinglePointCalculator(atoms, energy=-3.70, free_energy=-3.72, forces=np.zeros((1, 3)))
    for name in ("a.xyz", "a.traj", "a.db"):
        notes = []
        ase_write(tmp_path / name, atoms)
        assert read_structures(tmp_path / name, notes=notes)[0].energy == -3.72
        assert "energy read from 'free_energy'" in notes[0]
        assert read_structures(tmp_path / name, KeysConfig(energy="energy"))[0].energy == -3.70


def test_one_calculator_for_several_atoms():
    calculator, frames = EMT(), [bulk("Cu", cubic=True) for _ in range(3)]
    for seed, atoms in enumerate(frames):
        atoms.rattle(0.1 * seed, seed=seed)
        atoms.calc = calculator
        atoms.get_forces()
    assert Structure.from_ase(frames[2]).energy == frames[2].get_potential_energy()
    for atoms in frames[:2]:
        with pytest.raises(DataError, match="results belong to other atoms"):
            Structure.from_ase(atoms)
    assert Structure.from_ase(frames[0], {"energy": 1.0, "forces": None, "stress": None}).energy == 1
    forgetful = Calculator()
    forgetful.results = {"energy": 2.0}
    frames[0].calc = forgetful
    assert Structure.from_ase(frames[0]).energy == 2


# ------------------------------------------------------------------------------------------------------------- arrays

WATER = {"R": np.random.default_rng(0).normal(size=(3, 3, 3)), "z": np.array([8, 1, 1]), "E": np.arange(3.0)}
WATER["F"] = np.random.default_rng(1).normal(size=(3, 3, 3))


def npz(tmp_path, **changes):
    np.savez(tmp_path / "a.npz", **(WATER | changes))
    return tmp_path / "a.npz"


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (WATER["E"] + 0j, "complex numbers"),
        (np.array(["2024-01-01"] * 3, dtype="datetime64[D]"), "dates"),
        (np.array([True, False, True]), "truth values"),
        (np.array(["1.0", "2.0", "3.0"]), "text"),
    ],
)
def test_arrays_that_are_no_real_numbers(tmp_path, values, kind):
    refused(npz(tmp_path, E=values), f"'E' does not hold numbers but {kind}")
    refused(npz(tmp_path, F=np.broadcast_to(values[:, None, None], (3, 3, 3))), f"'F' does not hold numbers but {kind}")
    refused(npz(tmp_path, R=np.broadcast_to(values[:, None, None], (3, 3, 3))), f"does not hold numbers but {kind}")


def test_lengths_of_three_boxes_are_no_matrix(tmp_path):
    lengths = np.array([[10, 11, 12.0], [10.1, 11, 12], [10.2, 11, 12.5]])
    refused(npz(tmp_path, cell=lengths), r"'cell' of shape \(3, 3\) for 3 frames: one cell, or lengths of three boxes")
    refused(npz(tmp_path, cell=lengths[0]), "one cell, or lengths of three boxes")
    assert read_structures(npz(tmp_path, cell=lengths[:, None] * np.eye(3)))[1].cell[0, 0] == 10.1
    triclinic = np.array([[5, 0, 0], [1, 5, 0], [1, 1, 5.0]])
    assert (read_structures(npz(tmp_path, cell=triclinic))[2].cell == triclinic).all()


def test_units_that_an_npz_names(tmp_path):
    kcal = units.kcal / units.mol
    notes = []
    path = npz(tmp_path, e_unit="kcal/mol", r_unit="Ang")
    frame = read_structures(path, notes=notes)[2]
    assert frame.energy == pytest.approx(2 * kcal)
    assert frame.forces == pytest.approx(WATER["F"][2] * kcal)
    assert notes == [f"{path}, frame 0: units as the file names them: energy kcal/mol, length Ang"]
    assert read_structures(path, units=UnitsConfig(energy="kcal/mol"))[2].energy == pytest.approx(2 * kcal)
    refused(path, "says that its energy is in kcal/mol, data.units.energy says eV", units=UnitsConfig(energy="eV"))
    assert read_structures(npz(tmp_path, e_unit=np.bytes_(b"Hartree")))[1].energy == pytest.approx(units.Hartree)


def test_units_that_a_database_names(tmp_path):
    import ase.db

    with ase.db.connect(tmp_path / "a.db") as database:
        database.metadata = {
            "_distance_unit": "Bohr",
            "_property_unit_dict": {"energy": "Hartree", "forces": "Hartree/Bohr"},
        }
        database.write(
            Atoms("H2", [[0, 0, 0], [0, 0, 1.4]]), data={"energy": np.array([-1.0]), "forces": np.ones((2, 3))}
        )
    (frame,) = read_structures(tmp_path / "a.db")
    assert frame.energy == pytest.approx(-units.Hartree)
    assert frame.positions[1, 2] == pytest.approx(1.4 * units.Bohr)
    assert frame.forces == pytest.approx(np.full((2, 3), units.Hartree / units.Bohr))


def test_files_that_are_no_npz(tmp_path):
    path = tmp_path / "a.npz"
    with path.open("wb") as file:
        np.save(file, WATER["R"])
    refused(path, "one array \\(npy\\) under the name of an npz file")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(path, "a zip file with 'readme.txt' in it")
    header = (
        b"\x93NUMPY\x01\x00v\x00"
        + f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({2**40},), }}".ljust(117).encode()
        + b"\n"
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("R.npy", header + bytes(80))
    refused(path, r"'R' in it cannot be read")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("R.npy", header + bytes(80))
    content = path.read_bytes().replace((len(header) + 80).to_bytes(4, "little"), (2**31).to_bytes(4, "little"))
    path.write_bytes(content)
    refused(path, "not a complete npz file")


def test_mixed_type_of_deepmd(tmp_path):
    folder = tmp_path / "set.000"
    folder.mkdir()
    (tmp_path / "type.raw").write_text("0\n0\n0\n")
    (tmp_path / "type_map.raw").write_text("O\nH\n")
    (tmp_path / "nopbc").touch()
    for name in ("coord", "force"):
        np.save(folder / f"{name}.npy", WATER["R"].reshape(3, 9))
    np.save(folder / "energy.npy", WATER["E"])
    np.save(folder / "real_atom_types.npy", np.array([[0, 1, 1], [1, 1, 0], [0, 1, -1]]))
    read = read_structures(tmp_path)
    assert [frame.numbers.tolist() for frame in read] == [[8, 1, 1], [1, 1, 8], [8, 1]]
    assert (read[2].forces == WATER["R"][2, :2]).all()
    for wrong in ([[0, 1, 2]] * 3, [[0, 1, -2]] * 3, [[0, 1]] * 3, [[0.0, 1.0, 1.0]] * 3):
        np.save(folder / "real_atom_types.npy", np.array(wrong))
        refused(tmp_path, "real_atom_types.npy: (expected whole numbers from -1 to 1|shape)")
    (folder / "real_atom_types.npy").unlink()
    (tmp_path / "type.raw").write_text("0\n-1\n1\n")  # an index from the end, to Python
    refused(tmp_path, "type.raw: expected whole numbers from 0 to 1")
    (tmp_path / "type.raw").write_text("0 1 1")
    np.save(folder / "energy.npy", np.arange(3.0).reshape(1, 3))
    refused(tmp_path, r"energy.npy: shape \(1, 3\) for 3 frames")


def pymatgen(**changes):
    sites = [{"species": [{"element": "H", "occu": 1}], "xyz": [0.0, 0.0, float(z)]} for z in range(2)]
    entry = {"structure": {"lattice": {"matrix": (np.eye(3) * 9).tolist()}, "sites": sites},
             "outputs": {"energy": -1.0, "forces": [[0.0, 0, 0], [0, 0, 0]]}}  # fmt: skip
    return json.dumps([entry])


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("-1.0", "1" + "0" * 400, "'energy' does not hold numbers"),
        ("-1.0", "true", "'energy' does not hold numbers but truth values"),
        ("-1.0", "null", "no energy|'energy' does not hold numbers"),
        ("[0.0, 0.0, 1.0]", "[0.0, true, 1.0]", "'positions' does not hold numbers"),
        ("[0.0, 0.0, 1.0]", "[0.0, 1.0]", "'positions' does not hold numbers in one shape"),
        ("[0.0, 0.0, 1.0]", "[1e400, 0, 0]", "positions of atom 1: not finite"),
        ("[0.0, 0.0, 1.0]", '"far"', "'positions' does not hold numbers"),
        ('"energy"', '"forces"', "the key 'forces' is given twice"),
        ('"H"', '"Q"', "'Q' is missing or an unknown element"),
        ('"sites": [', '"sites": [{"species": [{"element": "H"}, {"element": "He"}], "xyz": [0, 0, 0]}, ', "shared by"),
        ('"sites": [', '"sites": 5, "more": [', "not a pymatgen structure"),
        ("[{", "[" * 100000 + "{", "nested too deeply"),
        ("}]", "}", "not valid JSON"),
    ],
)  # fmt: skip
def test_json_that_is_not_what_it_seems(tmp_path, old, new, match):
    path = tmp_path / "a.json"
    assert old in pymatgen()
    path.write_text(pymatgen())
    assert len(read_structures(path)) == 1
    path.write_text(pymatgen().replace(old, new, 1))
    refused(path, match)


# ------------------------------------------------------------------------------------------------------ other formats


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ani.h5", b"\x89HDF\r\n\x1a\n" + bytes(200)),
        ("ani.data", b"\x89HDF\r\n\x1a\n" + bytes(200)),
        ("s2ef.lmdb", bytes(200)),
        ("omat.aselmdb", bytes(200)),
        ("a.npy", b"\x93NUMPY"),
        ("MPtrj.json", b'{"mp-1": {"0": {"structure": {}, "force": []}}}'),
        ("notes.txt", b"some words\n"),
    ],
)
def test_foreign_formats_name_those_that_are_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    message = refused(tmp_path / name, "extended XYZ .*npz")
    assert len(message) < 500


def test_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "a.xyz")
    refused(tmp_path / "a.xyz", "a pipe or a device")


def test_escape_sequences_are_spelled_out(tmp_path):
    path = xyz(tmp_path, f"{COLUMNS} energy=-1 config_type=\x1b[31mred")
    assert read_structures(path)[0].config_type == "\\x1b[31mred"
    path = xyz(tmp_path, f"{COLUMNS} enrgy\x1b[2J=-1")
    assert "\x1b" not in refused(path, r"no energy under 'energy'; found .*enrgy\\x1b")
