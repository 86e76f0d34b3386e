import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from steradian.graph import neighbors
from steradian.graph.neighbors import make_graph, neighbor_pairs
from steradian.graph.structures import DataError, Structure

TRICLINIC = np.array([[3.1, 0.0, 0.0], [1.3, 2.7, 0.0], [-0.9, 0.8, 3.4]])


def brute_force(positions, cell, pbc, cutoff):
    """Every pair with every image in a box of shifts that surely holds the cutoff sphere."""
    spread = np.linalg.norm(positions.max(axis=0) - positions.min(axis=0))
    ranges = []
    for axis in range(3):
        if not pbc[axis]:
            ranges.append([0])
            continue
        others = cell[[k for k in range(3) if k != axis and pbc[k]]]
        vector = cell[axis].copy()
        if len(others):
            basis = np.linalg.qr(others.T)[0]
            vector = vector - basis @ (basis.T @ vector)
        reach = int(np.ceil((cutoff + spread) / np.linalg.norm(vector))) + 1
        ranges.append(range(-reach, reach + 1))
    found = set()
    for shift in itertools.product(*ranges):
        for i, j in itertools.product(range(len(positions)), repeat=2):
            if i == j and shift == (0, 0, 0):
                continue
            if np.linalg.norm(positions[j] + np.array(shift) @ cell - positions[i]) <= cutoff:
                found.add((i, j, *shift))
    return found


def as_set(receivers, senders, shifts):
    return {(int(i), int(j), *map(int, shift)) for i, j, shift in zip(receivers, senders, shifts)}


@pytest.mark.parametrize("pbc", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("cutoff", [2.0, 5.0])
def test_pairs_equal_brute_force(pbc, cutoff):
    rng = np.random.default_rng(sum(pbc))
    positions = rng.uniform(-2, 5, (5, 3))  # some atoms lie outside the cell
    pairs = neighbor_pairs(positions, TRICLINIC, np.array(pbc), cutoff)
    expected = brute_force(positions, TRICLINIC, pbc, cutoff)
    assert len(pairs[0]) == len(expected)  # none listed twice
    assert as_set(*pairs) == expected


def test_left_handed_cell_and_flat_cell():
    rng = np.random.default_rng(1)
    positions = rng.uniform(0, 3, (4, 3))
    for cell in (TRICLINIC[[1, 0, 2]], np.array([[30.0, 0, 0], [0, 1.2, 0], [0.3, 0.4, 2.0]])):
        pairs = neighbor_pairs(positions, cell, np.array([True] * 3), 3.0)
        assert as_set(*pairs) == brute_force(positions, cell, (True,) * 3, 3.0)


def test_directions_that_are_not_periodic_need_no_lattice_vector():
    positions = np.random.default_rng(2).uniform(0, 3, (4, 3))
    full = TRICLINIC.copy()
    full[2] = [0.0, 0.0, 50.0]
    slab = full.copy()
    slab[2] = 0
    pbc = np.array([True, True, False])
    assert as_set(*neighbor_pairs(positions, slab, pbc, 4.0)) == brute_force(positions, full, pbc, 4.0)


def test_large_system_equals_the_small_path():
    rng = np.random.default_rng(3)
    positions = rng.uniform(0, 30, (2100, 3))
    cell = np.eye(3) * 30.0
    receivers, senders, shifts = neighbor_pairs(positions, cell, np.array([True] * 3), 3.0)
    delta = positions[None, :, :] - positions[:, None, :]
    delta -= 30.0 * np.round(delta / 30.0)
    close = np.linalg.norm(delta, axis=-1) <= 3.0
    np.fill_diagonal(close, False)
    assert set(zip(receivers, senders)) == set(zip(*np.nonzero(close)))
    vectors = positions[senders] + shifts @ cell - positions[receivers]
    np.testing.assert_allclose(vectors, delta[receivers, senders], atol=1e-12)


def test_order_is_fixed_and_sorted_by_receiver():
    positions = np.random.default_rng(4).uniform(0, 3, (6, 3))
    receivers, senders, shifts = neighbor_pairs(positions, TRICLINIC, np.array([True] * 3), 5.0)
    rows = np.column_stack([receivers, senders, shifts])
    assert (rows[np.lexsort(rows.T[::-1])] == rows).all()


def test_graph_vectors_and_labels():
    positions = np.random.default_rng(5).uniform(0, 3, (4, 3))
    forces = np.arange(12.0).reshape(4, 3)
    structure = Structure(
        [1, 6, 8, 1],
        positions,
        TRICLINIC,
        [True] * 3,
        energy=-3.0,
        forces=forces,
        stress=np.eye(3),
        config_type="a",
        weight=2,
    )
    graph = make_graph(structure, 4.0, dtype=torch.float32)
    vectors = (
        graph.positions[graph.senders]
        + graph.shifts.to(torch.float32) @ graph.cell[0]
        - graph.positions[graph.receivers]
    )
    lengths = vectors.norm(dim=1)
    assert lengths.min() > 0.1
    assert lengths.max() < 4.0
    assert graph.shifts.dtype == torch.int64
    assert graph.positions.dtype == graph.forces.dtype == graph.cell.dtype == torch.float32
    assert graph.energy.dtype == torch.float64
    assert graph.energy.tolist() == [-3.0]
    assert graph.forces.tolist() == forces.tolist()
    assert graph.stress.shape == (1, 3, 3)
    assert graph.weight.tolist() == [2.0]
    assert graph.config_type == ("a",)
    assert make_graph(structure, 3.0, skin=1.0).num_edges == graph.num_edges


def test_labels_are_copies():
    structure = Structure([1, 1], [[0, 0, 0], [0, 0, 1.0]], forces=np.zeros((2, 3)))
    graph = make_graph(structure, 4.0)
    graph.positions.add_(1)
    graph.forces.add_(1)
    assert structure.positions.max() == 1.0
    assert structure.forces.max() == 0.0


@pytest.mark.parametrize("pbc", [[False] * 3, [True] * 3])
def test_one_atom(pbc):
    structure = Structure([18], [[0.0, 0, 0]], np.eye(3) * 4, pbc)
    graph = make_graph(structure, 3.0)
    assert graph.num_edges == 0
    assert graph.senders.dtype == graph.receivers.dtype == torch.int64
    assert graph.shifts.shape == (0, 3)
    expected = 6 if pbc[0] else 0
    assert make_graph(structure, 4.5).num_edges == expected


def test_mistakes_are_told_in_one_line():
    good = np.array([[0.0, 0, 0], [0, 0, 1.0]])
    bad = good.copy()
    bad[1, 2] = np.nan
    pbc = np.zeros(3, bool)
    with pytest.raises(DataError, match="position of atom 1 is not finite"):
        neighbor_pairs(bad, np.zeros((3, 3)), pbc, 3.0)
    with pytest.raises(DataError, match=r"atoms [01] and [01] are at the same place"):
        neighbor_pairs(good * 0, np.zeros((3, 3)), pbc, 3.0)
    with pytest.raises(DataError, match="cutoff"):
        neighbor_pairs(good, np.zeros((3, 3)), pbc, 0.0)
    with pytest.raises(DataError, match="no volume"):
        Structure([1, 1], good, np.zeros((3, 3)), [True] * 3)


# ------------------------------------------------------------------------------------------- far atoms, every geometry


@pytest.mark.parametrize("search", ["chosen", "tree"])
@pytest.mark.parametrize("seed", range(30))
def test_random_boxes_equal_brute_force(seed, search, monkeypatch):
    """Triclinic and left-handed cells, every periodicity, lattice vectors left out, atoms outside the cell."""
    if search == "tree":
        monkeypatch.setattr(neighbors, "_is_too_wide", lambda *_: True)
    rng = np.random.default_rng(seed)
    cell = np.diag(rng.uniform(2, 5, 3)) @ (np.eye(3) + 0.4 * rng.normal(size=(3, 3)))
    cell = cell[[1, 0, 2]] if seed % 3 == 0 else cell
    pbc = np.array([seed & 1, seed & 2, seed & 4], dtype=bool)
    positions = rng.uniform(-4, 8, (rng.integers(2, 7), 3))
    given = np.where(pbc[:, None], cell, 0.0) if seed % 2 else cell
    pairs = neighbor_pairs(positions, given, pbc, 3.5)
    assert as_set(*pairs) == brute_force(positions, cell, pbc, 3.5)
    rows = np.column_stack(pairs)
    assert (rows[np.lexsort(rows.T[::-1])] == rows).all()


NEAR = np.array([[0, 0, 0], [0, 0, 2.3], [0, 2.3, 0], [2.3, 0, 0]])
FAR = """
import json, sys
import numpy as np
from steradian.graph.neighbors import neighbor_pairs
for positions, cell, pbc in json.loads(sys.stdin.read()):
    pairs = neighbor_pairs(np.array(positions), np.array(cell), np.array(pbc), 4.0)
    print(len(pairs[0]), max(map(int, abs(pairs[2]).ravel()), default=0))
"""


def test_far_atoms_kill_no_process():
    """In a process of its own: vesin ends with a floating-point exception where a side has less than one cell."""
    none, slab = np.zeros((3, 3)), np.diag([10.0, 10.0, 0])
    cases = [
        ([3e3, 3e3, 0], none, [False] * 3),
        ([1e5, 1e5, 0], none, [False] * 3),
        ([0, 0, 1e6], none, [False] * 3),
        ([0, 0, 1e6], slab, [True, True, False]),
        ([5e5, 5, 5], np.diag([1e6, 10, 10]), [True] * 3),
        ([5e5, 5e5, 5], np.diag([1e6, 1e6, 10]), [True, False, True]),
        ([1e4, -1e4, 3e5], np.array([[3.0, 0, 0], [-2950, 421121, 0], [-74, 115, 399]]), [False, True, True]),
    ]
    given = [[np.vstack([NEAR, far]).tolist(), np.asarray(cell).tolist(), pbc] for far, cell, pbc in cases]
    done = subprocess.run(
        [sys.executable, "-c", FAR], input=json.dumps(given), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [int(line.split()[0]) for line in done.stdout.splitlines()[:6]] == [12] * 6
    assert len(done.stdout.splitlines()) == len(cases)


def test_atoms_many_cells_away_keep_their_neighbours():
    """Shifts beyond 32 bits, which vesin loses."""
    far = np.array([[0.0, 0, 0], [0, 0, 4.0 * 2**34 + 1]])
    receivers, _, shifts = neighbor_pairs(far, np.eye(3) * 4, np.ones(3, bool), 2.0)
    assert receivers.tolist() == [0, 1]
    assert shifts[:, 2].tolist() == [-(2**34), 2**34]
    with pytest.raises(DataError, match="beyond 1e"):
        neighbor_pairs(far * 1e10, np.eye(3) * 4, np.ones(3, bool), 2.0)
