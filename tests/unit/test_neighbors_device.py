"""Neighbour lists of fixed shape against vesin's, and what happens where the shape is too small."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from steradian.graph.neighbors import neighbor_pairs
from steradian.graph.neighbors_device import Boxes, has_nvalchemi, make_search
from steradian.graph.structures import DataError

TRICLINIC = np.array([[3.1, 0.0, 0.0], [1.3, 2.7, 0.0], [-0.9, 0.8, 3.4]])
KINDS = ["brute", "cells", "vesin", "nvalchemi"]


def search_for(kind, *arguments, **options):
    if kind == "nvalchemi" and not has_nvalchemi():
        pytest.skip("optional package: pip install nvalchemi-toolkit-ops")
    return make_search(kind, *arguments, **options)[0]


def pairs(rows, atoms=slice(None)):
    """``[E, 5]`` receiver, sender, shift as listed."""
    counts = rows.counts[atoms].tolist()
    assert max(counts, default=0) <= rows.senders.shape[1]
    found = [
        [receiver, int(rows.senders[atoms][receiver, place]), *rows.shifts[atoms][receiver, place].tolist()]
        for receiver, count in enumerate(counts)
        for place in range(count)
    ]
    return np.array(found, dtype=np.int64).reshape(-1, 5)


def expected(positions, cell, pbc, cutoff):
    receivers, senders, shifts = neighbor_pairs(positions, cell, pbc, cutoff)
    return np.column_stack([receivers, senders, shifts])


def check(kind, positions, cell, pbc, cutoff, width=200, dtype=torch.float64, crowd=32):
    boxes = Boxes(cell[None], np.asarray(pbc)[None], (len(positions),))
    x = torch.tensor(positions, dtype=dtype)
    rows = search_for(kind, boxes, cutoff, x, width=width, crowd=crowd)(x)
    truth = expected(x.double().numpy(), cell, np.asarray(pbc), cutoff)
    assert len(truth) > 0
    assert int(rows.crowding) <= crowd
    np.testing.assert_array_equal(pairs(rows), truth)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pbc", list(itertools.product([False, True], repeat=3)))
def test_small_triclinic_cell_and_every_periodicity(kind, pbc):
    positions = np.random.default_rng(sum(pbc)).uniform(-4, 7, (12, 3))  # some atoms lie cells away
    check(kind, positions, TRICLINIC, pbc, 3.9)


@pytest.mark.parametrize("kind", KINDS)
def test_molecule_without_a_cell(kind):
    positions = np.random.default_rng(1).uniform(0, 9, (40, 3))
    check(kind, positions, np.zeros((3, 3)), (False,) * 3, 3.0)
    check(kind, positions, np.zeros((3, 3)), (False,) * 3, 3.0, dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pbc", [(True, True, True), (True, True, False), (False, False, True)])
def test_large_boxes(kind, pbc):
    generator = np.random.default_rng(2)
    cell = np.array([[18.0, 0, 0], [0, 15.0, 0], [0, 0, 21.0]])
    for box in (cell, cell + np.array([[0, 2.0, -1.0], [3.0, 0, 1.0], [-2.0, 0.5, 0]])):
        positions = generator.uniform(-0.7, 1.6, (400, 3)) @ box
        check(kind, positions, box, pbc, 4.0)


def test_slab_whose_third_vector_is_missing():
    cell = np.array([[6.0, 0, 0], [1.0, 7.0, 0], [0, 0, 0]])
    positions = np.random.default_rng(3).uniform(0, 7, (30, 3))
    for kind in ("brute", "cells", "vesin"):
        check(kind, positions, cell, (True, True, False), 4.5)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_of_unequal_systems(kind):
    generator = np.random.default_rng(4)
    sizes = (5, 60, 1, 20)
    cells = np.stack([TRICLINIC, 11.0 * np.eye(3), np.zeros((3, 3)), np.zeros((3, 3))])
    pbc = np.array([[True] * 3, [True, False, True], [False] * 3, [False] * 3])
    parts = [generator.uniform(-1, 8, (size, 3)) for size in sizes]
    if kind == "nvalchemi":  # a missing cell has to be filled in for it
        cells = Boxes(cells, pbc, sizes).complete
    x = torch.tensor(np.concatenate(parts))
    rows = search_for(kind, Boxes(cells, pbc, sizes), 3.5, x, width=120)(x)
    start = 0
    for part, cell, periodic, size in zip(parts, cells, pbc, sizes):
        found = pairs(rows, slice(start, start + size))
        found[:, 1] -= start
        np.testing.assert_array_equal(found, expected(part, cell, periodic, 3.5))
        start += size


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_row_is_told(kind):
    positions = np.random.default_rng(5).uniform(0, 4, (30, 3))
    boxes = Boxes(4.0 * np.eye(3)[None], np.array([[True] * 3]), (30,))
    x = torch.tensor(positions)
    whole, cut = (search_for(kind, boxes, 3.0, x, width=width)(x) for width in (200, 7))
    assert int(whole.counts.max()) > 7
    assert torch.equal(whole.counts, cut.counts)


def test_a_crowded_cell_is_told():
    positions = np.random.default_rng(6).uniform(0, 20, (300, 3))
    positions[:50] = np.random.default_rng(7).uniform(0, 2, (50, 3))
    boxes = Boxes(20.0 * np.eye(3)[None], np.array([[True] * 3]), (300,))
    x = torch.tensor(positions)
    rows = make_search("cells", boxes, 4.0, x, width=100, crowd=16)[0](x)
    assert int(rows.crowding) >= 50
    check("cells", positions, 20.0 * np.eye(3), (True,) * 3, 4.0, crowd=64)


def test_atoms_that_leave_the_grid_of_a_cell_list_keep_their_neighbours():
    generator = np.random.default_rng(8)
    positions = generator.uniform(0, 15, (200, 3))
    boxes = Boxes(np.zeros((1, 3, 3)), np.zeros((1, 3), dtype=bool), (200,))
    search = make_search("cells", boxes, 3.0, torch.tensor(positions), width=100, crowd=100)[0]
    later = positions * 1.3 - 5.0
    np.testing.assert_array_equal(
        pairs(search(torch.tensor(later))), expected(later, np.zeros((3, 3)), np.zeros(3, dtype=bool), 3.0)
    )


def test_rows_in_pieces_equal_rows_at_once(monkeypatch):
    from steradian.graph import neighbors_device

    monkeypatch.setattr(neighbors_device, "PAIRS_AT_ONCE", 1000)
    positions = np.random.default_rng(9).uniform(0, 12, (150, 3))
    for kind in ("brute", "cells"):
        check(kind, positions, 12.0 * np.eye(3), (True,) * 3, 4.0)


def test_mistakes():
    boxes = Boxes(np.zeros((1, 3, 3)), np.zeros((1, 3), dtype=bool), (2,))
    x = torch.zeros(2, 3)
    with pytest.raises(DataError, match="search 'magic' is not known"):
        make_search("magic", boxes, 3.0, x, width=4)
    with pytest.raises(DataError, match="must be positive"):
        make_search("brute", boxes, 0.0, x, width=4)
    if not has_nvalchemi():
        with pytest.raises(DataError, match="pip install nvalchemi-toolkit-ops"):
            make_search("nvalchemi", boxes, 3.0, x, width=4)
