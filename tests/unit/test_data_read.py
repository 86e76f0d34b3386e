import json
import warnings

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write as ase_write
from ase.units import Bohr, GPa, Hartree

from steradian.config import KeysConfig, UnitsConfig
from steradian.data.files import read_structures, write_structures
from steradian.graph.structures import DataError, Structure
from steradian.units import KCAL_PER_MOL

RNG = np.random.default_rng(0)
POSITIONS = RNG.normal(size=(4, 3, 3))
FORCES = RNG.normal(size=(4, 3, 3))
ENERGIES = np.array([-10.0, -11.0, -12.5, -13.0])
NUMBERS = np.array([8, 1, 1])


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def frames(**changes):
    return [
        Structure(NUMBERS, positions, **{"energy": energy, "forces": forces, **changes})
        for positions, energy, forces in zip(POSITIONS, ENERGIES, FORCES)
    ]


def check(read, tolerance=1e-7, energy=1.0, length=1.0):
    assert len(read) == 4
    for frame, positions, value, forces in zip(read, POSITIONS, ENERGIES, FORCES):
        assert frame.numbers.tolist() == NUMBERS.tolist()
        assert frame.positions == pytest.approx(positions * length, abs=tolerance)
        assert frame.energy == pytest.approx(value * energy, abs=tolerance)
        assert frame.forces == pytest.approx(forces * energy / length, abs=tolerance)
        assert not frame.periodic


# ------------------------------------------------------------------------------------------------------------ formats


@pytest.mark.parametrize("name", ["a.xyz", "a.extxyz", "a.npz"])
def test_written_files_read_back(tmp_path, name):
    write_structures(tmp_path / name, frames(config_type="hot", weight=2.0))
    read = read_structures(tmp_path / name)
    check(read)
    assert {frame.config_type for frame in read} == {"hot"}
    assert {frame.weight for frame in read} == {2.0}
    assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing half-written is left


@pytest.mark.parametrize("name", ["a.extxyz", "a.npz"])
def test_periodic_frames_of_different_sizes_read_back(tmp_path, name):
    cell = np.array([[4.0, 0, 0], [1, 4, 0], [0, 0.5, 5]])
    stress = np.array([[1.0, 0.1, 0.2], [0.1, 2.0, 0.3], [0.2, 0.3, 3.0]])
    written = [
        Structure(NUMBERS, POSITIONS[0], cell, [True, True, False], energy=1.0, forces=FORCES[0], stress=stress),
        Structure(
            [1], [[0.0, 0, 0.1]], cell * 2, [True, True, False], energy=2.0, forces=[[0, 0, 0.5]], stress=-stress
        ),
    ]
    write_structures(tmp_path / name, written)
    for frame, expected in zip(read_structures(tmp_path / name, require=("energy", "forces", "stress")), written):
        assert frame.numbers.tolist() == expected.numbers.tolist()
        for part in ("positions", "cell", "forces", "stress"):
            assert getattr(frame, part) == pytest.approx(getattr(expected, part), abs=1e-7)
        assert frame.pbc.tolist() == [True, True, False]
    assert not any(frame.periodic for frame in read_structures(tmp_path / name, ignore_cell=True))


@pytest.mark.parametrize(
    "names",
    [
        ("coords", "nuclear_charges", "energies", "forces"),  # rMD17
        ("R", "z", "E", "F"),  # MD17, MD22
        ("positions", "atomic_numbers", "energy", "forces"),
        ("pos", "Z", "energy", "force"),
    ],
)
@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("column", [False, True])
def test_npz_styles(tmp_path, names, per_frame, column):
    numbers = np.tile(NUMBERS, (4, 1)).astype(float) if per_frame else NUMBERS.astype(np.uint8)
    energies = ENERGIES[:, None] if column else ENERGIES
    values = dict(zip(names, (POSITIONS, numbers, energies, FORCES)))
    np.savez(tmp_path / "a.npz", **values, name=np.array("ethanol"), old_energies=ENERGIES - 1, type=np.array("d"))
    check(read_structures(tmp_path / "a.npz"))


def test_npz_with_other_names_and_units(tmp_path):
    np.savez(tmp_path / "a.npz", x=POSITIONS / Bohr, species_numbers=NUMBERS, u=ENERGIES / Hartree, minus_grad=FORCES)
    keys = KeysConfig(positions="x", numbers="species_numbers", energy="u", forces="minus_grad")
    units = UnitsConfig(energy="Hartree", length="Bohr", forces="eV/Angstrom")
    check(read_structures(tmp_path / "a.npz", keys, units))


def test_one_frame_npz(tmp_path):
    np.savez(tmp_path / "a.npz", R=POSITIONS[0], z=NUMBERS, E=ENERGIES[0], F=FORCES[0])
    (frame,) = read_structures(tmp_path / "a.npz")
    assert frame.energy == ENERGIES[0]
    assert (frame.forces == FORCES[0]).all()


def test_padded_npz(tmp_path):
    numbers = np.tile(NUMBERS, (4, 1))
    mask = np.ones((4, 3), dtype=bool)
    mask[2, 2] = False
    np.savez(tmp_path / "a.npz", R=POSITIONS, z=numbers, E=ENERGIES, F=FORCES, node_mask=mask)
    read = read_structures(tmp_path / "a.npz")
    assert [len(frame) for frame in read] == [3, 3, 2, 3]
    assert (read[2].forces == FORCES[2, :2]).all()


@pytest.mark.parametrize("flat", [True, False])
def test_deepmd_folders(tmp_path, flat):
    for name in ("first", "second"):
        system = tmp_path / name
        folder = system if flat else system / "set.000"
        folder.mkdir(parents=True)
        (system / "type.raw").write_text("1\n0\n0\n")
        (system / "type_map.raw").write_text("H\nO\n")
        np.save(folder / "coord.npy", POSITIONS.reshape(4, 9))
        np.save(folder / "energy.npy", ENERGIES)
        np.save(folder / "force.npy", FORCES.reshape(4, 9))
        np.save(folder / "box.npy", np.tile(np.eye(3).ravel() * 5, (4, 1)))
        np.save(folder / "virial.npy", np.tile(np.eye(3).ravel() * 250, (4, 1)))
    read = read_structures(tmp_path, require=("energy", "forces", "stress"))
    assert len(read) == 8
    assert read[0].stress == pytest.approx(-2 * np.eye(3))  # virial is minus stress times volume
    assert read[7].cell.tolist() == (np.eye(3) * 5).tolist()
    check(read_structures(tmp_path / "first", ignore_cell=True))
    (tmp_path / "first" / "nopbc").touch()
    check(read_structures(tmp_path / "first"))


def test_ase_database_and_trajectory(tmp_path):
    import ase.db

    with ase.db.connect(tmp_path / "plain.db") as plain, ase.db.connect(tmp_path / "data.db") as packed:
        for frame in frames():
            plain.write(frame.to_ase())
            packed.write(
                Atoms(frame.numbers, frame.positions), data={"energy": np.array([frame.energy]), "forces": frame.forces}
            )
    check(read_structures(tmp_path / "plain.db"))
    check(read_structures(tmp_path / "data.db"))
    ase_write(tmp_path / "a.traj", [frame.to_ase() for frame in frames()])
    check(read_structures(tmp_path / "a.traj"))


def test_pymatgen_json(tmp_path):
    sites = [
        {"species": [{"element": symbol, "occu": 1}], "xyz": list(position)}
        for symbol, position in zip(["O", "H", "H"], POSITIONS[0].tolist())
    ]
    entry = {
        "structure": {"lattice": {"matrix": (np.eye(3) * 6).tolist()}, "sites": sites},
        "outputs": {"energy": -1.0, "forces": FORCES[0].tolist(), "virial_stress": [1, 2, 3, 4, 5, 6]},
        "group": "melt",
    }
    (tmp_path / "a.json").write_text(json.dumps([entry]))
    (frame,) = read_structures(tmp_path / "a.json")
    assert frame.config_type == "melt"
    assert frame.periodic
    assert frame.stress is None
    assert frame.forces == pytest.approx(FORCES[0])


# ------------------------------------------------------------------------------------------------------ keys and units


@pytest.mark.parametrize("where", ["calculator", "info"])
def test_labels_in_calculator_or_info(tmp_path, where):
    """ASE from 3.23 on moves energy and forces into the calculator; other names stay in info and arrays."""
    images = []
    for frame in frames():
        atoms = Atoms(frame.numbers, frame.positions)
        if where == "calculator":
            atoms.calc = SinglePointCalculator(atoms, energy=frame.energy, forces=frame.forces)
        else:
            atoms.info["my_energy"] = frame.energy
            atoms.arrays["my_forces"] = frame.forces
        images.append(atoms)
    ase_write(tmp_path / "a.xyz", images, format="extxyz")
    keys = KeysConfig() if where == "calculator" else KeysConfig(energy="my_energy", forces="my_forces")
    check(read_structures(tmp_path / "a.xyz", keys))


def test_usual_names_are_found(tmp_path):
    images = []
    for frame in frames():
        atoms = Atoms(frame.numbers, frame.positions, info={"REF_energy": frame.energy})
        atoms.arrays["REF_forces"] = frame.forces
        images.append(atoms)
    ase_write(tmp_path / "a.xyz", images, format="extxyz")
    check(read_structures(tmp_path / "a.xyz"))


def test_units_are_converted(tmp_path):
    np.savez(tmp_path / "a.npz", R=POSITIONS, z=NUMBERS, E=ENERGIES, F=FORCES)
    check(read_structures(tmp_path / "a.npz", units=UnitsConfig(energy="kcal/mol")), energy=KCAL_PER_MOL)
    check(
        read_structures(tmp_path / "a.npz", units=UnitsConfig(energy="Hartree", length="Bohr")),
        energy=Hartree,
        length=Bohr,
    )


def test_stress_and_virial_have_the_calculators_sign(tmp_path):
    crystal = bulk("Ar", "fcc", a=4.9, cubic=True)
    crystal.rattle(0.1, seed=1)
    crystal.calc = LennardJones(sigma=3.4, epsilon=0.01, rc=8.0, smooth=True)
    voigt = crystal.get_stress()
    energy, forces, volume = crystal.get_potential_energy(), crystal.get_forces(), crystal.get_volume()
    # what the sign means: minus dE/dlnV of a small uniform strain is the pressure, minus the trace of the stress over 3
    energies = []
    for scale in (1 - 1e-4, 1 + 1e-4):
        strained = crystal.copy()
        strained.set_cell(crystal.cell * scale, scale_atoms=True)
        strained.calc = crystal.calc
        energies.append(strained.get_potential_energy())
    assert (energies[1] - energies[0]) / 2e-4 / volume == pytest.approx(voigt[:3].sum(), rel=1e-3)

    xx, yy, zz, yz, xz, xy = voigt
    matrix = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])

    def read(unit="eV/Angstrom^3", key=None, **labels):
        arrays = {"R": crystal.positions[None], "z": crystal.numbers, "E": [energy], "F": forces[None]}
        np.savez(tmp_path / "a.npz", **arrays, cell=crystal.cell.array, **labels)
        require = ("energy", "forces", "stress")
        return read_structures(tmp_path / "a.npz", KeysConfig(stress=key), UnitsConfig(stress=unit), require=require)[
            0
        ].stress

    assert read(stress=voigt[None]) == pytest.approx(matrix, rel=1e-12)
    assert read(stress=matrix[None]) == pytest.approx(matrix, rel=1e-12)
    assert read(stress=matrix.reshape(1, 9)) == pytest.approx(matrix, rel=1e-12)
    assert read(stress=matrix[None] / GPa, unit="GPa") == pytest.approx(matrix, rel=1e-12)
    assert read(virial=-matrix[None] * volume) == pytest.approx(matrix, rel=1e-12)
    assert read(my_virials=-matrix.reshape(1, 9) * volume, key="my_virials") == pytest.approx(matrix, rel=1e-12)
    frozen = crystal.copy()
    frozen.calc = SinglePointCalculator(frozen, energy=energy, forces=forces, stress=voigt)
    ase_write(tmp_path / "a.extxyz", frozen)
    (frame,) = read_structures(tmp_path / "a.extxyz", require=("energy", "forces", "stress"))
    assert frame.stress == pytest.approx(matrix, abs=1e-8)


def test_symmetry_fills_in_zeros_only_where_they_are_exact(tmp_path):
    (tmp_path / "a.xyz").write_text("1\nProperties=species:S:1:pos:R:3 energy=-13.6\nH 0 0 0\n")
    (frame,) = read_structures(tmp_path / "a.xyz", require=("energy", "forces", "stress"))
    assert frame.forces.tolist() == [[0, 0, 0]]
    assert not frame.stress.any()
    (tmp_path / "b.xyz").write_text(
        '1\nLattice="2 0 0 0 2 0 0 0 2" Properties=species:S:1:pos:R:3 energy=-13.6\nH 0 0 0\n'
    )
    (crystal,) = read_structures(tmp_path / "b.xyz")
    assert crystal.forces.tolist() == [[0, 0, 0]]  # one atom and its images: translation
    with pytest.raises(DataError, match="no stress"):
        read_structures(tmp_path / "b.xyz", require=("energy", "forces", "stress"))
    (tmp_path / "b.xyz").write_text(
        '1\nLattice="20 0 0 0 20 0 0 0 20" Properties=species:S:1:pos:R:3 energy=-1 config_type=IsolatedAtom\nH 0 0 0\n'
    )
    (alone,) = read_structures(tmp_path / "b.xyz", require=("energy", "forces", "stress"))
    assert not alone.stress.any()


def test_optional_labels_of_some_frames_are_dropped(tmp_path):
    mixed = frames()
    mixed[2] = Structure(NUMBERS, POSITIONS[2], energy=ENERGIES[2])
    write_structures(tmp_path / "a.xyz", mixed)
    assert all(frame.forces is None for frame in read_structures(tmp_path / "a.xyz", require=("energy",)))
    with pytest.raises(DataError, match=r"frame 2: no forces under 'forces' \(1 of 4 frames lack it\)"):
        read_structures(tmp_path / "a.xyz")


# ----------------------------------------------------------------------------------------------------------- mistakes

GOOD = "2\nProperties=species:S:1:pos:R:3:forces:R:3 energy=-1.0\nH 0 0 0 0.1 0 0\nH 0 0 0.7 -0.1 0 0\n"

BAD_XYZ = {
    "empty": ("", "the file is empty"),
    "blank": ("\n\n", "no frames; the file is empty"),
    "prose": ("hello world\n", r"frame 0 \(line 1\): expected the number of atoms, found 'hello world'"),
    "truncated frame": (GOOD + GOOD[:-22], r"frame 1 \(line 5\): the file is truncated: 2 atoms announced, 1 found"),
    "truncated line": (GOOD + GOOD[:-8], r"frame 1 \(line 8\): not valid extended XYZ: 5 columns; Properties names 7"),
    "truncated header": (GOOD + "2\n", r"frame 1 \(line 5\): the file is truncated"),
    "nan label": (GOOD + GOOD.replace("-0.1", "nan"), r"frame 1: forces of atom 1: not finite"),
    "inf position": (GOOD.replace("0.7", "inf"), "frame 0: positions of atom 1: not finite"),
    "nan energy": (GOOD.replace("-1.0", "nan"), "frame 0: energy: not finite"),
    "element": (GOOD.replace("H 0 0 0.7", "Xx 0 0 0.7"), "frame 0.*unknown element 'Xx'"),
    "dummy atom": (GOOD.replace("H 0 0 0.7", "X 0 0 0.7"), "frame 0: unknown element: atomic number 0 of atom 1"),
    "no energy": (GOOD.replace("energy=-1.0", "enrgy=-1.0"),
                  "no energy under 'energy'; found .*'enrgy'.*did you mean data.keys.energy: enrgy"),
    "no forces": (GOOD.replace("forces", "frc"), "no forces under 'forces'; found .*'frc'"),
    "text": (GOOD.replace("-0.1", "abc"), "not valid extended XYZ"),
    "two energies": (GOOD.replace("energy=-1.0", "energy=-1.0 REF_energy=-2.0"),
                     "'energy' and 'REF_energy' both look like energy and differ"),
    "flat cell": (GOOD.replace("energy", 'Lattice="1 0 0 1 0 0 0 0 1" energy'), "frame 0: the cell has no volume"),
    "no atoms": ("0\nenergy=1\n", "frame 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_XYZ)
def test_bad_xyz_is_told_in_one_line(tmp_path, case):
    text, match = BAD_XYZ[case]
    path = tmp_path / "bad.xyz"
    path.write_text(text)
    with pytest.raises(DataError, match=match) as caught:
        read_structures(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def npz(tmp_path, **changes):
    arrays = {"R": POSITIONS, "z": NUMBERS, "E": ENERGIES, "F": FORCES, **changes}
    np.savez(tmp_path / "bad.npz", **{name: value for name, value in arrays.items() if value is not None})
    return tmp_path / "bad.npz"


def with_value(array, index, value):
    array = array.copy()
    array[index] = value
    return array


BAD_NPZ = {
    "forces of another count": ({"F": FORCES[:3]}, r"'F' of shape \(3, 3, 3\) for 4 frames of 3 atoms"),
    "forces of fewer atoms": ({"F": FORCES[:, :2]}, r"frame 0: forces of shape \(2, 3\) for 3 atoms"),
    "energies of another count": ({"E": ENERGIES[:2]}, r"'E' of shape \(2,\) for 4 frames"),
    "energies per atom": ({"E": FORCES[..., 0]}, "no energy under 'energy'"),
    "numbers of another count": ({"z": NUMBERS[:2]}, r"atomic numbers of shape \(2,\)"),
    "positions flat": ({"R": POSITIONS.reshape(-1)}, r"positions of shape \(36,\); expected \[frames, N, 3\]"),
    "no positions": ({"R": None}, "no positions under 'positions'; found"),
    "no numbers": ({"z": None}, "no numbers under 'numbers'"),
    "no frames": ({"R": POSITIONS[:0], "E": ENERGIES[:0], "F": FORCES[:0]}, "no frames"),
    "element": ({"z": np.array([8, 1, 119])}, "frame 0: unknown element: atomic number 119 of atom 2"),
    "half an element": ({"z": np.array([8, 1, 1.5])}, "not whole"),
    "nan": ({"F": with_value(FORCES, (2, 1, 0), np.nan)}, "frame 2: forces of atom 1: not finite"),
    "inf": ({"R": with_value(POSITIONS, (3, 2, 0), np.inf)}, "frame 3: positions of atom 2: not finite"),
    "nan energy": ({"E": with_value(ENERGIES, 1, np.nan)}, "frame 1: energy: not finite"),
    "objects": ({"z": np.array([8, 1, None])}, r"Python objects \(pickle\)"),
    "words": ({"E": np.array(["a", "b", "c", "d"])}, "frame 0: 'E' does not hold numbers"),
    "cell": ({"cell": np.zeros((2, 2))}, r"'cell' of shape \(2, 2\)"),
    "flat cell": ({"cell": np.zeros((3, 3))}, "frame 0: the cell has no volume"),
    "stress": ({"cell": np.eye(3) * 5, "stress": np.zeros((4, 5))}, r"frame 0: a stress of shape \(5,\)"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_bad_npz_is_told_in_one_line(tmp_path, case):
    changes, match = BAD_NPZ[case]
    path = npz(tmp_path, **changes)
    with pytest.raises(DataError, match=match) as caught:
        read_structures(path, require=("energy", "forces", *(["stress"] if "stress" in changes else [])))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [10, 200, -30])
def test_truncated_npz(tmp_path, size):
    path = npz(tmp_path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match="not a complete npz file"):
        read_structures(path)


def test_damaged_npz_member(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", R=POSITIONS, z=NUMBERS, E=ENERGIES, F=FORCES)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[150:180] = bytes(30)
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match="not a complete npz file"):
        read_structures(tmp_path / "a.npz")


def test_wrong_names_and_places(tmp_path):
    path = tmp_path / "water_train.xyz"
    path.write_text(GOOD)
    with pytest.raises(DataError, match=r"no such file or folder; did you mean '.*water_train.xyz'"):
        read_structures(tmp_path / "water_trian.xyz")
    with pytest.raises(DataError, match="there is no folder"):
        read_structures(tmp_path / "nowhere" / "a.xyz")
    with pytest.raises(DataError, match="a folder without DeePMD data"):
        read_structures(tmp_path)
    with pytest.raises(DataError, match=r"no energy under 'energie'; found .*did you mean data.keys.energy: energy\?"):
        read_structures(path, KeysConfig(energy="energie"))
    with pytest.raises(DataError, match=r"data.units.energy: unknown unit of energy 'kcal'.*did you mean 'kcal/mol'\?"):
        read_structures(path, units=UnitsConfig(energy="kcal"))
    with pytest.raises(DataError, match=r"data\.units\.forces"):
        read_structures(path, units=UnitsConfig(forces="eV"))
    with pytest.raises(ValueError, match="unknown label 'force'"):
        read_structures(path, require=("force",))


@pytest.mark.parametrize("name", ["a.db", "a.json", "a.traj", "a.cif", "a.xyz", "a.npz", "a.unknown"])
def test_garbage_in_any_format_is_one_line(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(bytes(range(128, 256)) * 20)
    with pytest.raises(DataError) as caught:
        read_structures(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda folder: (folder / "type_map.raw").unlink(), "no type_map.raw"),
        (lambda folder: (folder / "type_map.raw").write_text("H Xx"), "unknown element 'Xx'"),
        (lambda folder: (folder / "type.raw").write_text("0 1 7"), "expected whole numbers from 0 to 1"),
        (lambda folder: (folder / "coord.npy").unlink(), "no coord.npy"),
        (lambda folder: (folder / "coord.npy").write_bytes(b"\x93NUMPY"), "coord.npy: not a complete npy file"),
        (lambda folder: np.save(folder / "force.npy", FORCES[:3]), r"force.npy: shape \(3, 3, 3\) for 4 frames"),
        (lambda folder: (folder / "energy.npy").unlink(), "no energy under 'energy'"),
    ],
)
def test_bad_deepmd(tmp_path, change, match):
    (tmp_path / "type.raw").write_text("1 0 0")
    (tmp_path / "type_map.raw").write_text("H O")
    for name, values in (("coord", POSITIONS), ("energy", ENERGIES), ("force", FORCES)):
        np.save(tmp_path / f"{name}.npy", values.reshape(4, -1))
    check(read_structures(tmp_path))
    change(tmp_path)
    with pytest.raises(DataError, match=match):
        read_structures(tmp_path)


@pytest.mark.parametrize("name", ["a.npz", "a.xyz"])
def test_data_are_written_through_no_link(tmp_path, name):
    (tmp_path / f"{name}.tmp").symlink_to(tmp_path / "victim")  # a name that could be guessed
    frame = Structure(np.array([1]), np.zeros((1, 3)), energy=1.0)
    write_structures(tmp_path / name, [frame])
    with pytest.raises(DataError):  # what fails leaves the file as it was
        write_structures(tmp_path / name, [])
    assert not (tmp_path / "victim").exists()
    assert read_structures(tmp_path / name, require=("energy",))[0].energy == 1.0
    assert {file.name for file in tmp_path.iterdir()} == {name, f"{name}.tmp"}


def test_bad_writing(tmp_path):
    with pytest.raises(DataError, match="no frames to write"):
        write_structures(tmp_path / "a.xyz", [])
    with pytest.raises(DataError, match="cannot write this format"):
        write_structures(tmp_path / "a.docx", frames())
    with pytest.raises(DataError, match="there is no folder"):
        write_structures(tmp_path / "nowhere" / "a.xyz", frames())
    with pytest.raises(DataError, match="forces is known for 4 of 5 frames"):
        write_structures(tmp_path / "a.npz", [*frames(), Structure(NUMBERS, POSITIONS[0], energy=1.0)])
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------- benchmark data


@pytest.mark.parametrize(
    ("name", "count", "energy_unit", "force_rms"),
    [
        ("3bpa/train_300K.xyz", 500, "eV", 0.948),
        ("3bpa/test_300K.npz", 1669, "eV", None),
        ("rmd17/rmd17_ethanol_train_01.npz", 1000, "kcal/mol", None),
        ("ethanol_ccsd_t/ethanol_ccsd_t-train.npz", 1000, "kcal/mol", None),
        ("efa/3D_cluster_16_atoms_radius_2point5.npz", 2500, "eV", None),
        ("efa/cumulene_profile.npz", 1000, "eV", None),
        ("water/data_1", 160, "eV", None),
        ("lips20/Li3P", 1000, "eV", None),
        ("ag3/ase_ag3_2200.db", 2200, "eV", None),
        ("elemental/Li_test.json", 29, "eV", None),
        ("dimers_charged/charge-charge.xyz", 130, "eV", None),
    ],
)
def test_benchmark_sets(shared_data, name, count, energy_unit, force_rms):
    read = read_structures(shared_data / name, units=UnitsConfig(energy=energy_unit))
    assert len(read) == count
    rms = np.sqrt(np.mean(np.concatenate([frame.forces for frame in read]) ** 2))
    assert 1e-5 < rms < 10
    if force_rms:
        assert rms == pytest.approx(force_rms, abs=1e-3)
