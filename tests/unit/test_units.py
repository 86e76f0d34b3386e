import numpy as np
import pytest

from steradian.units import KCAL_PER_MOL, energy_factor, force_factor, length_factor, stress_factor


def test_values_of_codata():
    """CODATA 2018 values, written out here."""
    assert energy_factor("Hartree") == pytest.approx(27.211386245988, rel=1e-6)
    assert energy_factor("kcal/mol") == pytest.approx(0.0433641, rel=1e-5)
    assert energy_factor("kJ/mol") == pytest.approx(0.01036427, rel=1e-5)
    assert energy_factor("Rydberg") == pytest.approx(27.211386245988 / 2, rel=1e-6)
    assert length_factor("Bohr") == pytest.approx(0.529177210903, rel=1e-6)
    assert stress_factor("GPa") == pytest.approx(1 / 160.21766208, rel=1e-6)
    assert stress_factor("kbar") == pytest.approx(0.1 * stress_factor("GPa"), rel=1e-12)
    assert stress_factor("bar") == pytest.approx(1e-4 * stress_factor("GPa"), rel=1e-12)
    assert energy_factor("kcal/mol") == KCAL_PER_MOL


def test_spelling():
    assert energy_factor("ev") == energy_factor("eV") == energy_factor(" EV ") == 1.0
    assert energy_factor("Ha") == energy_factor("hartree")
    assert length_factor("Å") == length_factor("A") == length_factor("angstrom") == 1.0
    assert stress_factor("eV/A^3") == 1.0


def test_forces_are_energy_over_length():
    assert force_factor("kcal/mol/Angstrom") == pytest.approx(KCAL_PER_MOL)
    assert force_factor("Hartree/Bohr") == pytest.approx(51.42206747, rel=1e-6)
    assert force_factor("meV/Å") == pytest.approx(1e-3)
    assert np.isclose(stress_factor("Hartree/Bohr^3"), energy_factor("Hartree") / length_factor("Bohr") ** 3)


@pytest.mark.parametrize(
    ("function", "unit", "match"),
    [
        (energy_factor, "kcal", r"unknown unit of energy 'kcal'.*did you mean 'kcal/mol'\?"),
        (energy_factor, "Joule per mole", "unknown unit of energy"),
        (length_factor, "Angstrm", r"did you mean 'Angstrom'\?"),
        (stress_factor, "Gpascal", "unknown unit of stress"),
        (force_factor, "eV", "ENERGY/LENGTH"),
        (force_factor, "eV/eV", "unknown unit of length"),
    ],
)
def test_unknown_units(function, unit, match):
    with pytest.raises(ValueError, match=match):
        function(unit)
