import json

import numpy as np
import pytest

from steradian.config import ReferenceEnergiesConfig
from steradian.data.statistics import DatasetStatistics, compute_statistics, reference_energies
from steradian.graph.structures import DataError, Structure

E0 = {1: -13.6, 6: -1030.0, 8: -2043.5}


def frame(numbers, energy=None, seed=0, **kwargs):
    positions = np.random.default_rng(seed).normal(size=(len(numbers), 3)) * 3
    if energy is None:
        energy = sum(E0[z] for z in numbers)
    return Structure(numbers, positions, energy=energy, **kwargs)


def mixed():
    return [frame(n, seed=i) for i, n in enumerate([[1, 1], [6, 1, 1], [8, 6], [8, 1, 1, 6, 6]])]


def test_least_squares_is_exact_where_energies_are_additive():
    references, report, frames = reference_energies(mixed(), ReferenceEnergiesConfig())
    assert references == pytest.approx(E0, abs=1e-9)
    assert "residual 0.000 meV/atom" in report
    assert "under-determined" not in report
    assert len(frames) == 4


def test_one_composition_is_reported_as_under_determined():
    frames = [frame([8, 1, 1], energy=-100.0 + delta) for delta in (-0.3, 0.0, 0.3)]
    references, report, _ = reference_energies(frames, ReferenceEnergiesConfig())
    assert references[8] + 2 * references[1] == pytest.approx(-100.0)
    assert "fix 1 of 2 elements" in report
    assert f"residual {1000 * 0.1 * np.sqrt(2 / 3):.3f} meV/atom" in report


def test_isolated_atoms_leave_the_training_set():
    frames = [*mixed(), frame([1]), frame([6]), frame([8])]
    statistics, rest = compute_statistics(frames, 5.0, ReferenceEnergiesConfig(kind="isolated_atoms"))
    assert statistics.atom_references == E0
    assert len(rest) == statistics.num_frames == 4
    assert "isolated atoms" in statistics.reference_report


def test_isolated_atoms_serve_by_default_and_the_other_elements_are_fitted():
    frames = [*mixed(), frame([1]), frame([6])]
    statistics, rest = compute_statistics(frames, 5.0)
    assert statistics.atom_references == pytest.approx(E0, abs=1e-9)
    assert statistics.atom_references[1] == E0[1]  # as it stands in the file
    assert len(rest) == 4
    assert "isolated atoms in the training data: H, C; the others: least squares" in statistics.reference_report
    explicit, rest = compute_statistics(frames, 5.0, ReferenceEnergiesConfig(kind="least_squares"))
    assert len(rest) == 6
    assert "isolated" not in explicit.reference_report


@pytest.mark.parametrize("kind", ["auto", "isolated_atoms"])
def test_an_element_of_isolated_atoms_only_is_not_learnt(kind):
    frames = [*mixed(), frame([1]), frame([6]), frame([8]), frame([7], energy=-1480.0)]
    statistics, _ = compute_statistics(frames, 5.0, ReferenceEnergiesConfig(kind=kind))
    assert statistics.elements == (1, 6, 8)
    assert statistics.atom_references == E0
    assert "N in no other frame, so not an element of the model" in statistics.reference_report


def test_frames_without_neighbours_are_an_error():
    with pytest.raises(DataError, match=r"no atom .* within 0\.001 Å .* or set data\.units\.length"):
        compute_statistics(mixed(), 0.001)
    with pytest.raises(DataError, match="nothing but isolated atoms"):
        compute_statistics([frame([1]), frame([8])], 5.0)


def test_a_frame_whose_neighbours_cannot_be_found_is_named():
    both = Structure([1, 1], np.zeros((2, 3)), energy=0.0, where="cu.xyz, frame 3")
    with pytest.raises(DataError, match=r"cu.xyz, frame 3: atoms [01] and [01] are at the same place"):
        compute_statistics([*mixed(), both], 5.0)


def test_isolated_atoms_from_a_file(tmp_path):
    path = tmp_path / "atoms.xyz"
    path.write_text(
        "".join(
            f"1\nProperties=species:S:1:pos:R:3 energy={E0[z]}\n{s} 0 0 0\n" for s, z in (("H", 1), ("C", 6), ("O", 8))
        )
    )
    for kind in ("isolated_atoms", "auto"):
        config = ReferenceEnergiesConfig(kind=kind, file=path)
        references, report, rest = reference_energies([*mixed(), frame([1])], config)
        assert references == E0
        assert len(rest) == 4
        assert "atoms.xyz" in report
        assert "1 frames of one atom left out" in report


def test_a_boxed_atom_that_is_named_isolated_counts_as_such():
    atoms = [frame([z], cell=np.eye(3) * 20, pbc=True, config_type="IsolatedAtom") for z in E0]
    references, _, rest = reference_energies([*mixed(), *atoms], ReferenceEnergiesConfig(kind="isolated_atoms"))
    assert references == E0
    assert len(rest) == 4


def test_one_atom_in_a_periodic_cell_is_a_crystal():
    crystal = frame([6], cell=np.eye(3) * 2, pbc=True)
    with pytest.raises(DataError, match="no isolated atoms"):
        reference_energies([crystal], ReferenceEnergiesConfig(kind="isolated_atoms"))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (
            ReferenceEnergiesConfig(kind="given", values={"H": -1.0, "C": -2.0}),
            r"no reference energy for O \(known: H, C\)",
        ),
        (ReferenceEnergiesConfig(kind="given", values={"Xq": -1.0}), "unknown element 'Xq'"),
        (ReferenceEnergiesConfig(kind="isolated_atoms"), "no isolated atoms in the training data"),
    ],
)
def test_missing_elements_are_errors(config, match):
    with pytest.raises(DataError, match=match):
        reference_energies(mixed(), config)


def test_two_energies_of_one_atom_are_an_error():
    frames = [*mixed(), frame([1]), frame([1], energy=-13.0)]
    with pytest.raises(DataError, match="two energies of the isolated atom H"):
        reference_energies(frames, ReferenceEnergiesConfig(kind="isolated_atoms"))


def test_given_average_zero():
    given = ReferenceEnergiesConfig(kind="given", values={"H": -1.0, "C": -2.0, "O": -3.0})
    assert reference_energies(mixed(), given)[0] == {1: -1.0, 6: -2.0, 8: -3.0}
    assert reference_energies(mixed(), ReferenceEnergiesConfig(kind="zero"))[0] == {1: 0.0, 6: 0.0, 8: 0.0}
    frames = [frame([1, 1], -4.0), frame([6, 8], -8.0)]
    assert reference_energies(frames, ReferenceEnergiesConfig(kind="average"))[0] == {1: -3.0, 6: -3.0, 8: -3.0}


def test_statistics_values():
    water = np.array([[0.0, 0, 0], [0, 0, 1.0], [0, 1.0, 0]])
    far = np.array([[0.0, 0, 0], [0, 0, 50.0], [0, 50.0, 0]])
    forces = np.arange(9.0).reshape(3, 3)
    frames = [
        Structure([8, 1, 1], water, energy=-10.0, forces=forces),
        Structure([8, 1, 1], far, energy=-4.0, forces=-forces),
    ]
    config = ReferenceEnergiesConfig(kind="given", values={"O": -1.0, "H": -1.5})
    statistics, _ = compute_statistics(frames, 2.0, config)
    assert statistics.elements == (1, 8)
    assert statistics.avg_num_neighbors == 1.0  # six edges, six atoms
    assert statistics.energy_shift == pytest.approx(-1.0)  # (-6 - 0) / 3 / 2
    assert statistics.energy_std == pytest.approx(1.0)
    assert statistics.force_rms == pytest.approx(np.sqrt(np.mean(np.arange(9.0) ** 2)))
    assert compute_statistics(frames, 2.0, config, num_edges=[6, 0])[0] == statistics
    assert DatasetStatistics.from_dict(json.loads(json.dumps(statistics.to_dict()))) == statistics


def test_frames_without_energy_are_an_error():
    frames = [*mixed(), Structure([1, 1], [[0, 0, 0], [0, 0, 1.0]])]
    with pytest.raises(DataError, match="1 of 5 training frames have no energy"):
        compute_statistics(frames, 5.0)


def test_energy_only_sets_have_a_usable_scale():
    statistics, _ = compute_statistics(mixed(), 5.0)
    assert statistics.force_rms == 1.0
