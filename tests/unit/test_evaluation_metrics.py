"""Figures of merit: against numpy by hand, over any batches, merged, bootstrapped."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steradian.evaluation.metrics import (
    METRICS,
    ErrorAccumulator,
    ErrorSample,
    bootstrap_counts,
    bootstrap_intervals,
    error_statistics,
    force_error_statistics,
)
from steradian.graph import Graph, Prediction, batch_graphs
from steradian.graph.neighbors import make_graph
from tests.unit.evaluation_fakes import PairPotential, molecules


def accumulated(structures, sizes, potential=None) -> ErrorAccumulator:
    potential = potential or PairPotential()
    graphs = [make_graph(structure, potential.cutoff) for structure in structures]
    found = ErrorAccumulator()
    start = 0
    for size in sizes:
        batch = batch_graphs(graphs[start : start + size])
        found.update(potential(batch), batch)
        start += size
    assert start == len(structures)
    return found


def errors_by_hand(structures, potential):
    energy, forces = [], []
    for structure in structures:
        found = potential(make_graph(structure, potential.cutoff))
        energy.append(float(found.energy[0]) - structure.energy)
        forces.append(found.forces.numpy() - structure.forces)
    return np.array(energy), forces


def test_force_figures_are_those_of_the_definition():
    vectors = np.array([[3.0, 0.0, 4.0], [0.0, 0.0, 0.0], [-1.0, 2.0, -2.0], [0.0, 12.0, 5.0]])
    found = force_error_statistics(torch.from_numpy(vectors))
    assert found["forces_mae"] == pytest.approx(29 / 12)
    assert found["forces_rmse"] == pytest.approx(np.sqrt((9 + 16 + 1 + 4 + 4 + 144 + 25) / 12))
    assert found["forces_vector_mae"] == pytest.approx((5 + 0 + 3 + 13) / 4)
    assert found["forces_vector_rmse"] == pytest.approx(np.sqrt((25 + 9 + 169) / 4))
    assert found["forces_max"] == 13
    assert found["forces_component_max"] == 12
    assert found["forces_q95"] == pytest.approx(5 + 0.85 * 8)  # norms 0 3 5 13, position 0.95 * 3 = 2.85
    assert found["forces_q99"] == pytest.approx(np.quantile([0, 3, 5, 13], 0.99))
    assert found["forces_component_q95"] == pytest.approx(np.quantile(np.abs(vectors), 0.95))
    assert set(found) == {name for name in METRICS if name.startswith("forces")}


def test_force_figures_refuse_another_shape():
    with pytest.raises(ValueError, match=r"\[N, 3\], not \[3, 4\]"):
        force_error_statistics(np.zeros((3, 4)))


def test_figures_of_a_set_against_numpy():
    structures, potential = molecules(12), PairPotential()
    found = accumulated(structures, [5, 7]).compute("validation/")
    energy, forces = errors_by_hand(structures, potential)
    atoms = np.array([len(structure.numbers) for structure in structures])
    joined = np.concatenate(forces)
    assert found["validation/energy_mae"] == pytest.approx(np.abs(energy).mean())
    assert found["validation/energy_rmse"] == pytest.approx(np.sqrt((energy**2).mean()))
    assert found["validation/energy_per_atom_mae"] == pytest.approx(np.abs(energy / atoms).mean())
    assert found["validation/energy_per_atom_max"] == pytest.approx(np.abs(energy / atoms).max())
    assert found["validation/forces_mae"] == pytest.approx(np.abs(joined).mean())
    assert found["validation/forces_q99"] == pytest.approx(np.quantile(np.linalg.norm(joined, axis=1), 0.99))
    assert not any("stress" in name for name in found)
    assert {name.removeprefix("validation/") for name in found} <= set(METRICS)


def test_figures_do_not_depend_on_batches_or_order():
    structures = molecules(12)
    single = accumulated(structures, [1] * 12).arrays()
    reordered = single.select(np.random.default_rng(1).permutation(12))
    for size in ([12], [1, 11], [3, 4, 5]):
        found = accumulated(structures, size)
        # The potential itself may round differently in another batch; the figures of the same errors may not differ.
        assert found.compute() == pytest.approx(accumulated(structures, [1] * 12).compute(), rel=1e-12)
    assert {k: v.statistics() for k, v in reordered.samples().items()} == {
        k: v.statistics() for k, v in single.samples().items()
    }


def test_merging_processes_is_one_process():
    structures = molecules(10)
    whole = accumulated(structures, [4, 6])
    parts = [accumulated(structures[:4], [4]), accumulated(structures[4:], [6]), ErrorAccumulator()]
    assert ErrorAccumulator.from_states(part.state() for part in parts).compute() == whole.compute()
    parts[1].merge(parts[0])
    assert parts[1].compute() == whole.compute()
    assert len(parts[1]) == 10
    parts[1].reset()
    with pytest.raises(ValueError, match="empty"):
        parts[1].compute()


def test_labels_that_are_missing_are_left_out():
    structures, potential = molecules(6), PairPotential()
    graphs = [make_graph(structure, potential.cutoff) for structure in structures]
    from dataclasses import replace

    found = ErrorAccumulator()
    for index, graph in enumerate(graphs):
        seen = replace(graph, forces=None) if index < 3 else replace(graph, energy=None)
        found.update(potential(seen), seen)
    energy, forces = errors_by_hand(structures, potential)
    figures = found.compute()
    assert figures["energy_mae"] == pytest.approx(np.abs(energy[:3]).mean())
    assert figures["forces_mae"] == pytest.approx(np.abs(np.concatenate(forces[3:])).mean())


def test_forces_that_were_not_predicted_are_a_mistake():
    graph = make_graph(molecules(1)[0], 3.0)
    zero = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="forces=True"):
        ErrorAccumulator().update(Prediction(zero, zero, zero), graph)


def test_stress_counts_nine_components_of_labelled_systems():
    graph = make_graph(molecules(1)[0], 3.0)
    stress = torch.arange(9, dtype=torch.float64).view(1, 3, 3)
    labelled = Graph(**{**vars(graph), "stress": stress})
    zero = torch.zeros(1, dtype=torch.float64)
    found = ErrorAccumulator()
    found.update(Prediction(zero, zero, zero, graph.forces, torch.zeros(1, 3, 3)), labelled)
    assert found.compute()["stress_mae"] == 4
    assert found.compute()["stress_max"] == 8


def test_nan_shows_in_every_figure():
    found = error_statistics([1.0, float("nan"), 2.0])
    assert all(np.isnan(value) for value in found.values())
    assert all(np.isnan(value) for value in error_statistics([]).values())


def test_weighted_statistics_are_those_of_repeated_values():
    generator = np.random.default_rng(3)
    owner = generator.integers(0, 8, size=57)
    errors = generator.normal(size=57)
    sample = ErrorSample(errors, owner, 8)
    for counts in bootstrap_counts(8, 20, seed=1):
        assert counts.sum() == 8
        repeated = np.repeat(errors, counts[owner])
        assert sample.statistics(counts) == pytest.approx(error_statistics(repeated), rel=1e-12)


def test_bootstrap_is_deterministic_and_covers_the_mean():
    generator = np.random.default_rng(0)
    sample = {"energy": ErrorSample(generator.normal(size=200), np.arange(200), 200)}
    first = bootstrap_intervals(sample, num_samples=400, seed=7)
    assert first == bootstrap_intervals(sample, num_samples=400, seed=7)
    assert first != bootstrap_intervals(sample, num_samples=400, seed=8)
    low, high = first["energy_mae"]
    values = sample["energy"].values
    assert low < values.mean() < high
    # width of a normal interval of the mean
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(200), rel=0.15)


def test_selected_structures_keep_their_atoms():
    arrays = accumulated(molecules(9), [4, 5]).arrays()
    order = np.array([7, 2, 2, 0])
    found = arrays.select(order)
    for place, index in enumerate(order):
        old, new = arrays.structure_of_atom == index, found.structure_of_atom == place
        assert np.array_equal(found.force_error[new], arrays.force_error[old])
        assert np.array_equal(found.numbers[new], arrays.numbers[old])


@pytest.mark.parametrize("quantity", ["energy", "energy_per_atom", "forces_component", "forces_vector"])
def test_every_error_belongs_to_its_structure(quantity):
    arrays = accumulated(molecules(9), [4, 5]).arrays()
    for index in range(9):
        only = np.eye(9, dtype=np.int64)[index]
        alone = arrays.select([index]).sample(quantity).statistics()
        assert arrays.sample(quantity).statistics(only) == pytest.approx(alone, rel=1e-12)
