"""A topology is prepared once and never used for tensors that have changed; the caller's state changes nothing."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from steradian.graph import batch_graphs
from steradian.graph.graph import Graph
from steradian.graph.neighbors import make_graph
from steradian.graph.topology import Rows, Topology
from steradian.interfaces.ase import SteradianCalculator
from tests import cases


def fresh(graph: Graph) -> Graph:
    """The same contents in tensors that nothing was prepared for."""
    copied = graph.mapped(lambda tensor: tensor.clone())
    return replace(copied, topology=None)


def reversed_edges(graph: Graph) -> None:
    senders = graph.senders.clone()
    graph.senders.copy_(graph.receivers.flip(0))
    graph.receivers.copy_(senders.flip(0))
    order = torch.argsort(graph.receivers, stable=True)
    graph.senders.copy_(graph.senders[order])
    graph.receivers.copy_(graph.receivers[order])
    graph.shifts.copy_(-graph.shifts.flip(0)[order])


EDITS = {
    "numbers": lambda graph: graph.numbers.__setitem__(0, 8),
    "numbers, one system of two": lambda graph: graph.numbers.__setitem__(-1, 6),
    "senders": lambda graph: graph.senders.__setitem__(0, 5),
    "senders and receivers": reversed_edges,
    "receivers": lambda graph: graph.receivers.copy_(graph.receivers.clamp(min=1)),
    "shifts": lambda graph: graph.shifts.__setitem__(-1, graph.shifts[-1] + torch.tensor([1, 0, 0])),
    "system": lambda graph: graph.system.__setitem__(9, 0),
    "positions": lambda graph: graph.positions.__setitem__((0, 0), graph.positions[0, 0] + 0.1),
    "cell": lambda graph: graph.cell.mul_(1.01),
    "pbc": lambda graph: graph.pbc.__setitem__(1, torch.zeros(3, dtype=torch.bool)),
}


@pytest.mark.parametrize("operator", ["none", "mara", "mara-channel-all"])
@pytest.mark.parametrize("host", cases.HOSTS)
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_in_place_gives_the_new_answer(host: str, operator: str, edit: str) -> None:
    potential = cases.potential(host, operator)
    graph = cases.batch(cases.ethanol(), cases.crystal())
    before = potential(graph, stress=True)
    EDITS[edit](graph)
    found, expected = potential(graph, stress=True), potential(fresh(graph), stress=True)
    for name in ("energy", "forces", "stress"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert any(not torch.equal(getattr(found, name), getattr(before, name)) for name in ("energy", "forces"))


def test_tensors_without_a_count_of_changes_are_compared() -> None:
    with torch.inference_mode():
        graph = fresh(cases.graph(cases.ethanol()))
    assert graph.numbers.is_inference()
    potential = cases.potential()
    before = potential(graph).energy
    with torch.inference_mode():
        graph.numbers[0] = 8
    assert not torch.equal(potential(graph).energy, before)
    assert torch.equal(potential(graph).energy, potential(fresh(graph)).energy)


def test_one_topology_serves_until_something_changes() -> None:
    graph = cases.graph(cases.ethanol())
    known = graph.prepared()
    assert graph.prepared() is known
    assert replace(graph, positions=graph.positions + 1).prepared() is known
    assert graph.to(dtype=torch.float32).prepared() is known
    assert replace(graph, numbers=graph.numbers.clone()).prepared() is not known
    graph.numbers.add_(0)
    assert graph.prepared() is not known


def test_rows_out_of_range_and_out_of_order_are_refused() -> None:
    with pytest.raises(IndexError, match=r"0\.\.5 for 4 rows"):
        Rows(torch.tensor([0, 5]), 4).look()
    with pytest.raises(RuntimeError, match="said to ascend"):
        _ = Rows(torch.tensor([2, 1]), 4, ascending=True).bounds
    topology = Topology(torch.tensor([0]), torch.tensor([1]), 2, is_static=True)
    with pytest.raises(RuntimeError, match="must not ask"):
        _ = topology.sizes


def test_a_batch_loses_nothing() -> None:
    first = replace(cases.graph(cases.ethanol()), weight=None, config_type=())
    second = cases.graph(cases.ethanol(1))
    second = replace(second, weight=torch.tensor([2.0], dtype=torch.float64), config_type=("hot",))
    dipoles = [torch.randn(graph.num_atoms, 3, dtype=torch.float64) for graph in (first, second)]
    first, second = (replace(graph, dipoles=dipole) for graph, dipole in zip((first, second), dipoles))
    batch = batch_graphs([first, second])
    assert batch.weight.tolist() == [1.0, 2.0]
    assert batch.config_type == ("", "hot")
    assert torch.equal(batch.dipoles, torch.cat(dipoles))
    with pytest.raises(ValueError, match="forces is known for 1 of 2"):
        batch_graphs([replace(first, forces=torch.zeros_like(first.positions)), replace(second, forces=None)])


# ------------------------------------------------------------------------------------------------- the caller's state


@pytest.mark.parametrize("host", cases.HOSTS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_forces_do_not_depend_on_gradient_modes(host: str, mode: type) -> None:
    potential, graph = cases.potential(host, "both" if host == "mace" else "mara"), cases.graph(cases.ethanol())
    expected = potential(graph, stress=True)
    with mode():
        found = potential(graph, stress=True)
        inside = potential(make_graph(cases.ethanol(), potential.cutoff), stress=True)
    for prediction in (found, inside):
        assert torch.equal(prediction.energy, expected.energy)
        assert torch.equal(prediction.forces, expected.forces)
    assert float(expected.forces.abs().max()) > 1e-3
    crystal = cases.graph(cases.crystal())
    plain = cases.potential(host)
    with mode():
        assert torch.equal(plain(crystal, stress=True).stress, plain(crystal, stress=True).stress)
        assert float(plain(crystal, stress=True).stress.abs().max()) > 1e-6


@pytest.mark.parametrize("host", cases.HOSTS)
def test_autocast_and_default_dtype_change_nothing(host: str) -> None:
    potential = cases.potential(host, "mara").to(torch.float32)
    graph = cases.graph(cases.ethanol())
    expected = potential(graph)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = potential(graph)
    assert torch.equal(found.forces, expected.forces)
    torch.set_default_dtype(torch.float64)
    try:
        found = potential(make_graph(cases.ethanol(), potential.cutoff))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.forces, expected.forces)
    assert torch.equal(found.energy, expected.energy)


def test_unwrapped_atoms_have_the_forces_of_wrapped_ones_in_float32() -> None:
    potential = cases.potential().to(torch.float32)
    structure = cases.crystal()
    expected = potential(cases.graph(structure)).forces
    shifts = np.random.default_rng(0).integers(-300, 300, (len(structure), 3))
    moved = replace(structure, positions=structure.positions + shifts @ structure.cell)
    assert np.abs(moved.positions).max() > 500
    found = potential(cases.graph(moved)).forces
    assert float((found - expected).abs().max()) < 2e-5 * max(1.0, float(expected.abs().max()))


def test_potential_and_calculator_are_copied_and_pickled() -> None:
    potential = cases.potential("mace", "mara")
    atoms = cases.ethanol().to_ase()
    atoms.calc = SteradianCalculator(potential, skin=0.5)
    expected = atoms.get_forces()
    for copied in (copy.deepcopy(atoms.calc), pickle.loads(pickle.dumps(atoms.calc))):
        other = cases.ethanol().to_ase()
        other.calc = copied
        assert np.array_equal(other.get_forces(), expected)
    together = pickle.loads(pickle.dumps(atoms))
    assert np.array_equal(together.get_forces(), expected)


def _forces(atoms):
    return atoms.get_forces()


def test_atoms_with_a_calculator_go_to_a_spawned_pool() -> None:
    atoms = cases.ethanol().to_ase()
    atoms.calc = SteradianCalculator(cases.potential())
    expected = atoms.get_forces()
    moved = atoms.copy()
    moved.calc = atoms.calc
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (found,) = pool.map(_forces, [moved])
    assert np.allclose(found, expected, atol=1e-12)
