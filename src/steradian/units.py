"""Conversion factors to the units used inside the package (eV, Å, amu, fs); applied in readers and writers only."""

from __future__ import annotations

import difflib

from ase import units as ase_units

__all__ = ["KCAL_PER_MOL", "energy_factor", "force_factor", "length_factor", "stress_factor"]

KCAL_PER_MOL = ase_units.kcal / ase_units.mol  # [eV]

ENERGY = {
    "eV": 1.0,
    "meV": 1e-3,
    "Hartree": ase_units.Hartree,
    "Rydberg": ase_units.Rydberg,
    "kcal/mol": KCAL_PER_MOL,
    "kJ/mol": ase_units.kJ / ase_units.mol,
}
LENGTH = {"Angstrom": 1.0, "Bohr": ase_units.Bohr, "nm": 10.0}
STRESS = {
    "eV/Angstrom^3": 1.0,
    "GPa": ase_units.GPa,
    "kbar": 0.1 * ase_units.GPa,
    "bar": 1e-4 * ase_units.GPa,
    "Hartree/Bohr^3": ase_units.Hartree / ase_units.Bohr**3,
}
ALIASES = {
    "ev": "eV", "mev": "meV", "hartree": "Hartree", "ha": "Hartree", "rydberg": "Rydberg", "ry": "Rydberg",
    "kcal/mol": "kcal/mol", "kj/mol": "kJ/mol", "angstrom": "Angstrom", "angstroms": "Angstrom", "a": "Angstrom",
    "å": "Angstrom", "ang": "Angstrom",
    "bohr": "Bohr", "a0": "Bohr", "nm": "nm", "gpa": "GPa", "kbar": "kbar", "bar": "bar",
    "ev/angstrom^3": "eV/Angstrom^3", "ev/a^3": "eV/Angstrom^3", "ev/å^3": "eV/Angstrom^3", "ev/ang^3": "eV/Angstrom^3",
    "hartree/bohr^3": "Hartree/Bohr^3", "ha/bohr^3": "Hartree/Bohr^3",
}  # fmt: skip


def _lookup(table: dict[str, float], unit: str, what: str) -> float:
    key = ALIASES.get(unit.strip().lower(), unit.strip())
    if key not in table:
        near = difflib.get_close_matches(unit, [*table], n=1, cutoff=0.4)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"unknown unit of {what} '{unit}' (known: {', '.join(table)}){hint}")
    return table[key]


def energy_factor(unit: str) -> float:
    """Electronvolts per unit of energy. Raises ValueError, naming the nearest known unit."""
    return _lookup(ENERGY, unit, "energy")


def length_factor(unit: str) -> float:
    """Ångströms per unit of length. Raises ValueError, naming the nearest known unit."""
    return _lookup(LENGTH, unit, "length")


def stress_factor(unit: str) -> float:
    """eV/Å^3 per unit of stress. Raises ValueError, naming the nearest known unit."""
    return _lookup(STRESS, unit, "stress")


def force_factor(unit: str) -> float:
    """eV/Å per unit of force, which is written ``ENERGY/LENGTH``, as in ``kcal/mol/Angstrom`` or ``Hartree/Bohr``."""
    energy, slash, length = unit.rpartition("/")
    if not slash:
        raise ValueError(
            f"a unit of force is ENERGY/LENGTH, such as 'eV/Angstrom' or 'kcal/mol/Angstrom', not '{unit}'"
        )
    return energy_factor(energy) / length_factor(length)


# Per kind: factors by name, and the function that looks one up.
UNITS = {"energy": (ENERGY, energy_factor), "length": (LENGTH, length_factor), "stress": (STRESS, stress_factor)}
