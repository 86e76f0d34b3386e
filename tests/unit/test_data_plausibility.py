"""Labels against what is usual in eV and Å: each undeclared unit is named."""

import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from typer.testing import CliRunner

from steradian.cli.dataset import app
from steradian.config import KeysConfig, UnitsConfig
from steradian.data.files import read_structures, write_structures
from steradian.data.labels import RawFrame, to_structures
from steradian.data.load import bundled_file
from steradian.data.summary import plausibility
from steradian.graph.structures import Structure


@pytest.fixture(scope="module")
def bundled():
    return read_structures(bundled_file("bundled:malonaldehyde"))[:100]


@pytest.fixture(scope="module")
def metal():
    frames = []
    for seed in range(8):
        atoms = bulk("Cu", cubic=True, a=3.6 + 0.02 * seed)
        atoms.rattle(0.1, seed=seed)
        atoms.calc = EMT()
        atoms.get_stress()
        frames.append(Structure.from_ase(atoms))
    return frames


def as_if_written_in(frames, **units):
    """The frames as they read where a file is in other units and nobody says so."""
    found = []
    for frame in frames:
        ones = RawFrame("", frame.numbers, np.ones((len(frame), 3)), np.eye(3), True,
                        {"energy": 1.0, "forces": np.ones((len(frame), 3)), "stress": np.eye(3)})  # fmt: skip
        (one,) = to_structures([ones], KeysConfig(), UnitsConfig(**units))
        found.append(
            Structure(
                frame.numbers,
                frame.positions / one.positions[0, 0],
                frame.cell / one.positions[0, 0],
                frame.pbc,
                energy=frame.energy / one.energy,
                forces=frame.forces / one.forces[0, 0],
                stress=None if frame.stress is None else frame.stress / one.stress[0, 0],
            )
        )
    return found


def test_right_units_raise_no_doubt(bundled, metal):
    for frames in (bundled, metal):
        found = plausibility(frames)
        assert found.warnings == []
        assert "RMS force [eV/Å]" in dict(found.rows)
    assert "GPa" in dict(plausibility(metal).rows)["stress [eV/Å^3]"]
    assert dict(plausibility(bundled).rows)["RMS force [eV/Å]"].startswith("H 0.6")
    assert plausibility([]).rows == []


@pytest.mark.parametrize("unit", ["kcal/mol", "kJ/mol", "meV"])
def test_energies_and_forces_in_another_unit(bundled, unit):
    found = plausibility(as_if_written_in(bundled, energy=unit))
    assert any(f"data.units.forces={unit}/Angstrom" in warning for warning in found.warnings)
    declared = plausibility(as_if_written_in(bundled, energy=unit), declared=True)
    assert any("unusually large" in warning for warning in declared.warnings)
    assert not any(f"={unit}" in warning for warning in declared.warnings)


@pytest.mark.parametrize("unit", ["Bohr", "nm"])
def test_positions_in_another_unit(bundled, metal, unit):
    for frames in (bundled, metal) if unit == "Bohr" else (bundled,):
        found = plausibility(as_if_written_in(frames, length=unit, forces="eV/Angstrom"))
        assert any(f"data.units.length={unit}" in warning for warning in found.warnings), found
    everything = as_if_written_in(bundled, energy="Hartree", length="Bohr")
    assert any("length=Bohr" in warning for warning in plausibility(everything).warnings)


@pytest.mark.parametrize("unit", ["GPa", "kbar"])
def test_stress_in_another_unit(metal, unit):
    found = plausibility(as_if_written_in(metal, stress=unit))
    assert [w for w in found.warnings if "stress" in w and f"data.units.stress={unit}" in w], found


@pytest.mark.parametrize("unit", ["kcal/mol", "Hartree", "kJ/mol", "meV", "Rydberg"])
def test_all_electron_energies_give_their_unit_away(unit):
    """Ethanol with PBE: -4215.4 eV with all electrons (a value near -154.9 Hartree)."""
    atoms = molecule("CH3CH2OH")
    frames = [Structure(atoms.numbers, atoms.positions, energy=-4215.4 + 0.1 * k) for k in range(4)]
    assert plausibility(frames).warnings == []
    there = [Structure(f.numbers, f.positions, energy=f.energy / UNIT[unit]) for f in frames]
    assert plausibility(there).warnings == [
        f"the energies equal total energies of all electrons in {unit}, not in eV: set data.units.energy={unit}"
    ]


UNIT = {"kcal/mol": 0.0433641, "Hartree": 27.2114, "kJ/mol": 0.01036427, "meV": 1e-3, "Rydberg": 13.6057}


def test_reference_energies_of_another_level_of_theory(bundled):
    good = {1: -11.0, 6: -50.0, 8: -110.0}
    shift = np.mean([f.energy - sum(good[z] for z in f.numbers) for f in bundled]) / 9 + 4.5
    good = {z: energy + shift for z, energy in good.items()}  # atoms bound by 4.5 eV each
    found = plausibility(bundled, good)
    assert found.warnings == []
    assert dict(found.rows)["interaction energy [eV/atom]"].startswith("-4.5")
    for wrong in ({1: -13.6, 6: -1029.0, 8: -2041.0}, dict.fromkeys((1, 6, 8), 0.0)):
        (warning,) = plausibility(bundled, wrong).warnings
        assert "another level of theory" in warning
    mixed = [
        Structure([1, 1], [[0, 0, 0], [0, 0, 0.8]], energy=-10.0),
        Structure([1, 8], [[0, 0, 0], [0, 0, 1.0]], energy=-15.0),
    ]
    assert dict(plausibility(mixed, {1: -4.0, 8: -9.0}).rows)["E0 given minus fitted [eV]"] == "H +1, O +1"


def test_info_names_the_likely_unit(bundled, tmp_path):
    write_structures(tmp_path / "kcal.npz", as_if_written_in(bundled, energy="kcal/mol"))
    result = CliRunner().invoke(app, ["info", str(tmp_path / "kcal.npz")])
    assert result.exit_code == 0, result.output
    assert "kcal/mol" in result.output
    assert "nothing suspicious" not in result.output
    result = CliRunner().invoke(app, ["info", str(tmp_path / "kcal.npz"), "--energy-unit", "kcal/mol"])
    assert "RMS force" in result.output
    assert "suspicious: the" not in result.output
