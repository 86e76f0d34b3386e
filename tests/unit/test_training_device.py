"""Training from data on the device: the same batches, losses and gradients as from graphs on the host."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from steradian.capture import static_step
from steradian.data.structures import Structure
from steradian.execution.buffers import tensors_of
from steradian.execution.dataset import DeviceData
from steradian.execution.padding import Buckets, Sizes, pad_graph
from steradian.graph import Graph, batch_graphs
from steradian.kernels import use_backend
from steradian.neighbors import make_graph
from steradian.pairs import with_pairs

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
import cases


def frames(periodic: bool = True) -> list[Graph]:
    structures = [cases.ethanol(0), cases.crystal(0), cases.ethanol(1), cases.crystal(1), cases.ethanol(2)]
    if not periodic:
        structures = structures[::2]
    alone = Structure(numbers=np.array([8]), positions=np.zeros((1, 3)))  # no neighbours at all
    found = []
    for index, structure in enumerate([*structures, alone]):
        generator = np.random.default_rng(index)
        labelled = replace(
            structure,
            energy=float(generator.normal()),
            forces=generator.normal(size=structure.positions.shape),
            stress=generator.normal(size=(3, 3)),
            weight=1.0 + index,
        )
        found.append(make_graph(labelled, cases.CUTOFF))
    return found


@pytest.mark.parametrize("chosen", [[0], [3, 1], [4, 0, 2], [5], [0, 5, 1], [5, 4, 3, 2, 1, 0]])
@pytest.mark.parametrize("pairs", [True, False])
def test_gathered_batches_are_the_padded_ones(chosen: list[int], pairs: bool) -> None:
    graphs = frames()
    data = DeviceData(graphs, "cpu", number=6, cutoff=cases.CUTOFF, pairs=pairs)
    listed = [with_pairs(graphs[index]) if pairs else graphs[index] for index in chosen]
    expected = batch_graphs([replace(graph, pairs=None) for graph in listed])
    sizes = Buckets().choose(data.sizes(chosen))
    assert data.sizes(chosen) == Sizes.of(expected)
    with static_step():
        found = data.batch(data.indices(chosen, sizes), sizes, data.layout(chosen, sizes))
    expected = pad_graph(replace(expected, config_type=()), sizes, number=6, cutoff=cases.CUTOFF)
    assert found.pairs is not None or not pairs
    for name, value in tensors_of(replace(found, pairs=None)).items():
        assert torch.equal(value, tensors_of(expected)[name]), name
        assert value.dtype == tensors_of(expected)[name].dtype, name
    assert found.layout == tuple(found.atoms_per_system.tolist())
    if found.pairs is not None:
        lengths = found.positions[found.senders] - found.positions[found.receivers]
        same = found.pairs.first.index_select(0, found.pairs.of_edge)
        if not found.shifts.any():
            assert torch.allclose(lengths.norm(dim=1), lengths.norm(dim=1)[same])
        assert (torch.bincount(found.pairs.of_edge, minlength=sizes.edges // 2) == 2).all()
        assert torch.equal(found.pairs.of_edge[found.pairs.first], torch.arange(sizes.edges // 2))


def test_pairs_of_gathered_crystals_give_the_same_energies() -> None:
    data = DeviceData(frames(), "cpu", number=6, cutoff=cases.CUTOFF)
    potential = cases.potential()
    sizes = Buckets().choose(data.sizes([1, 3, 0]))
    with use_backend("reference"), static_step():
        graph = data.batch(data.indices([1, 3, 0], sizes), sizes)
        shared, plain = (potential(each) for each in (graph, replace(graph, pairs=None)))
    assert torch.allclose(shared.forces, plain.forces, rtol=0, atol=1e-11)


def test_labels_of_some_frames_are_refused() -> None:
    graphs = frames()
    graphs[2] = replace(graphs[2], forces=None)
    with pytest.raises(ValueError, match="forces is known for 5 of 6"):
        DeviceData(graphs, "cpu", number=6, cutoff=cases.CUTOFF)
