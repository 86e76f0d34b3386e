"""What the plugin calls: a model is attached by ``pair_coeff``, and computes in every step.

Structures and functions are those of ``pair_steradian.cpp``; :data:`PROTOCOL` counts their changes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import CFUNCTYPE, POINTER, c_char, c_char_p, c_double, c_int, c_int32, c_int64, c_void_p
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor

from steradian.build import load_potential
from steradian.config.precision import PRESETS
from steradian.graph import Graph
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure
from steradian.interfaces.lammps.exchange import Exchange, Link, Widths
from steradian.operators.base import declares
from steradian.potential import Potential
from steradian.units import KCAL_PER_MOL

__all__ = ["PROTOCOL", "Session", "attach", "exchanged_bytes", "refusals"]

PROTOCOL = 1
MESSAGE = 2048
#: eV in the unit of energy
EV = {"metal": 1.0, "real": 1.0 / KCAL_PER_MOL}


class Step(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("num_owned", "num_atoms", "num_edges", "num_processes", "wants_virials")),
        ("types", c_void_p),
        ("tags", c_void_p),
        ("positions", c_void_p),
        ("receivers", c_void_p),
        ("senders", c_void_p),
        ("shifts", c_void_p),
        ("cell", c_double * 9),
        ("periodic", c_int64 * 3),
        ("energies", c_void_p),
        ("forces", c_void_p),
        ("virial", c_void_p),
        ("virials", c_void_p),
        ("centroid_virials", c_void_p),
        ("message", c_char * MESSAGE),
    ]


FORWARD = CFUNCTYPE(None, c_void_p, c_void_p, c_int64)
REVERSE = SUM = CFUNCTYPE(None, c_void_p, c_void_p, c_int64, c_int64)
STEP = CFUNCTYPE(c_int, POINTER(Step))
RELEASE = CFUNCTYPE(None)


class Setup(ctypes.Structure):
    _fields_ = [
        ("protocol", c_int64),
        ("pair", c_void_p),
        ("model", c_char_p),
        ("precision", c_char_p),
        ("threads", c_int64),
        ("num_types", c_int64),
        ("elements", POINTER(c_char_p)),
        ("periodic", c_int64 * 3),
        ("forward", FORWARD),
        ("reverse", REVERSE),
        ("sum", SUM),
        ("step", STEP),
        ("release", RELEASE),
        ("cutoff", c_double),
        ("unit", c_double),
        ("doubles", c_int64),
        ("summary", c_char * MESSAGE),
        ("message", c_char * MESSAGE),
        ("unit_style", c_char_p),
    ]


#: Sessions of the pair styles of this process, by address; C++ holds nothing that Python would know of.
_SESSIONS: dict[int, Session] = {}


def attach(address: int) -> None:
    """Read the model of a pair style and lend it the functions that compute.

    Args:
        address: of its ``SteradianSetup``.

    Raises:
        ValueError: what cannot be, in one line.
    """
    setup = Setup.from_address(address)
    if setup.protocol != PROTOCOL:
        raise ValueError("the plugin is that of another version of steradian: give 'steradian lammps build' again")
    torch.set_num_threads(int(setup.threads))
    name, precision = setup.model.decode(), setup.precision.decode() or None
    if precision is not None and precision not in PRESETS:
        raise ValueError(f"precision {precision}: choose {', '.join(PRESETS)}")
    potential = load_potential(Path(name), precision=precision).for_inference()
    symbols = [setup.elements[number].decode() for number in range(setup.num_types)]
    numbers = numbers_of_types(symbols, potential)
    wrong = refusals(potential, tuple(bool(each) for each in setup.periodic))
    if wrong:
        raise ValueError(f"{name}: {wrong[0]}")
    session = Session(potential, numbers, link_of(setup))
    pair = int(setup.pair)
    step, release = STEP(session.guarded), RELEASE(partial(_SESSIONS.pop, pair, None))
    session.kept = (step, release)
    _SESSIONS[pair] = session
    widths = exchanged_bytes(potential)
    setup.step, setup.release, setup.cutoff = step, release, potential.cutoff
    setup.unit = EV[setup.unit_style.decode()]
    setup.doubles = max((-(-width // 8) for width in widths), default=0)
    setup.summary = described(name, potential, widths).encode()[: MESSAGE - 1]


def described(name: str, potential: Potential, widths: Sequence[int]) -> str:
    """The line that LAMMPS prints."""
    host = potential.config.host
    test = potential.self_test
    return (
        f"steradian: {name}: {host.kind}, {host.num_layers} layers, {potential.num_parameters} parameters, cutoff "
        f"{potential.cutoff:g} A, {potential.policy.name}; {len(widths)} exchanges of {sum(widths)} bytes per atom; "
        + (f"self-test of {test.source} passed" if test is not None else "no self-test (steradian lammps export)")
    )


def numbers_of_types(symbols: Sequence[str], potential: Potential) -> Tensor:
    """Atomic number of every type of LAMMPS, from 1; 0 for ``NULL``.

    Raises:
        ValueError: no element, or one that the model was not trained on.
    """
    unknown = [symbol for symbol in symbols if symbol != "NULL" and symbol not in atomic_numbers]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)} is no element symbol; pair_coeff * * MODEL names one for every atom type"
        )
    numbers = torch.tensor([0] + [0 if symbol == "NULL" else atomic_numbers[symbol] for symbol in symbols])
    potential.check_elements(numbers[numbers > 0])
    return numbers


def refusals(potential: Potential, periodic: tuple[bool, ...] | None = None) -> list[str]:
    """Why LAMMPS cannot use a model, in a box that is periodic along some axes (None: in any)."""
    found = []
    if getattr(potential.config.host, "dipole_embedding", False):
        found.append("the model embeds atomic dipoles, which LAMMPS does not have")
    if declares(potential, "is_global") and periodic is not None and any(periodic):
        if not all(periodic):
            found.append("attention between all atoms needs a box that is periodic in all directions or in none")
        elif not all(getattr(module, "supports_pbc", True) for module in potential.modules()):
            found.append(
                "its attention was built for molecules, and the box is periodic; train with global_mixer.periodic=true"
            )
    return found


def exchanged_bytes(potential: Potential) -> list[int]:
    """Bytes per atom of every exchange of a step, in the order of the exchanges."""
    structure = Structure(
        np.array([potential.elements[0]] * 2), np.array([[0.0, 0, 0], [0, 0, 0.5 * potential.cutoff]])
    )
    graph = make_graph(structure, potential.cutoff)
    share = Widths(torch.ones(2, dtype=torch.bool))
    potential(replace(graph, share=share), forces=False)
    return share.found


def link_of(setup: Setup) -> Link:
    """LAMMPS' communication."""
    pair, forward, reverse, add = setup.pair, setup.forward, setup.reverse, setup.sum

    def width(values: Tensor) -> int:
        return int(np.prod(values.shape[1:], dtype=np.int64))

    return Link(
        lambda rows: forward(pair, rows.data_ptr(), width(rows) * rows.element_size()),
        lambda rows: reverse(pair, rows.data_ptr(), width(rows), int(rows.dtype == torch.float32)),
        lambda values: add(pair, values.data_ptr(), values.numel(), int(values.dtype == torch.float32)),
    )


class Session:
    """A model in use by one pair style.

    Args:
        potential: for inference.
        numbers: ``[types + 1]`` atomic number of every type of LAMMPS.
        link: to the other processes.
    """

    def __init__(self, potential: Potential, numbers: Tensor, link: Link) -> None:
        self.potential, self.numbers, self.link = potential, numbers, link
        self.kept: tuple[Any, ...] = ()

    def guarded(self, pointer: Any) -> int:
        """:meth:`compute`; 1 where it failed, with the reason in the step's message."""
        step = pointer.contents
        try:
            self.compute(step)
            return 0
        except BaseException as error:
            text = " ".join(str(error).split()) or type(error).__name__
            step.message = text.encode()[: MESSAGE - 1]
            return 1

    def compute(self, step: Step) -> None:
        """Energies, forces and virials of a step.

        Raises:
            FloatingPointError: one that is not finite; names the atom.
        """
        own, count = int(step.num_owned), int(step.num_atoms)
        graph = self.graph_of(step)
        found = self.potential(graph, stress=True, virials=bool(step.wants_virials))
        energies, forces = found.atom_energies[:own].double(), found.forces[:count].double()
        self.check_finite(step, energies, forces)
        _array(step.energies, c_double, own)[:] = energies.numpy()
        _array(step.forces, c_double, count, 3)[:] = forces.numpy()
        _array(step.virial, c_double, 3, 3)[:] = found.virial[0].double().numpy()
        if step.wants_virials:
            _array(step.virials, c_double, count, 9)[:] = found.virials[:count].reshape(-1, 9).numpy()
            _array(step.centroid_virials, c_double, count, 9)[:] = found.centroid_virials[:count].reshape(-1, 9).numpy()

    def graph_of(self, step: Step) -> Graph:
        """The atoms of a process; one copy of nobody where it has none, which takes part in all exchanges."""
        count, edges = int(step.num_atoms), int(step.num_edges)
        read: Callable[..., Tensor] = lambda *given: torch.from_numpy(_array(*given))  # noqa: E731
        numbers = self.numbers[read(step.types, c_int32, count).long()]
        positions = read(step.positions, c_double, count, 3)
        owned = torch.arange(count) < int(step.num_owned)
        if not count:
            numbers, positions = torch.tensor([self.potential.elements[0]]), torch.zeros((1, 3), dtype=torch.float64)
            owned = torch.zeros(1, dtype=torch.bool)
        periodic = torch.tensor([[bool(each) for each in step.periodic]])
        cell = torch.tensor(list(step.cell), dtype=torch.float64).view(1, 3, 3)
        return Graph(
            positions=positions,
            numbers=numbers,
            system=torch.zeros(len(numbers), dtype=torch.int64),
            senders=read(step.senders, c_int64, edges),
            receivers=read(step.receivers, c_int64, edges),
            shifts=read(step.shifts, c_int64, edges, 3),
            cell=cell if periodic.any() else torch.zeros_like(cell),
            pbc=periodic,
            num_systems=1,
            # alone there are no copies, and the model sees what the ASE calculator sees
            share=None if step.num_processes == 1 else Exchange(owned, link=self.link),
        )

    def check_finite(self, step: Step, energies: Tensor, forces: Tensor) -> None:
        """Refuse what is no number; see :meth:`compute`."""
        broken = ~torch.isfinite(forces).all(1)
        broken[: len(energies)] |= ~torch.isfinite(energies)
        if broken.any():
            row = int(broken.nonzero()[0])
            tag, kind = _array(step.tags, c_int64, len(forces))[row], _array(step.types, c_int32, len(forces))[row]
            symbol = chemical_symbols[int(self.numbers[int(kind)])]
            raise FloatingPointError(
                f"energy or force of atom {tag} ({symbol}, type {kind}) is not finite: are atoms too close, or is the "
                "time step too long?"
            )


def _array(pointer: int | None, kind: Any, *shape: int) -> np.ndarray:
    """Memory of C++; no copy."""
    if not pointer or 0 in shape:
        return np.zeros(shape, dtype=np.dtype(kind))
    return np.ctypeslib.as_array(ctypes.cast(pointer, POINTER(kind)), shape)
