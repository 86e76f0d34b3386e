import json

import numpy as np
import pytest

from steradian.config import DataConfig, SplitConfig
from steradian.data.files import write_structures
from steradian.data.load import bundled_file, load_dataset, split_indices
from steradian.graph.structures import DataError, Structure


def some_frames(count, seed, numbers=(8, 1, 1)):
    rng = np.random.default_rng(seed)
    shape = (len(numbers), 3)
    return [
        Structure(np.array(numbers), rng.normal(size=shape), energy=rng.normal(), forces=rng.normal(size=shape))
        for _ in range(count)
    ]


@pytest.fixture
def files(tmp_path):
    for name, count, seed in (("a", 20, 1), ("b", 10, 2), ("test", 7, 3)):
        write_structures(tmp_path / f"{name}.npz", some_frames(count, seed))
    return tmp_path


def config(**values):
    return DataConfig.model_validate(values)


@pytest.mark.parametrize(
    ("split", "sizes"),
    [
        ({}, (19, 1, 0)),
        ({"validation": 5, "test": 3}, (12, 5, 3)),
        ({"train": 10, "validation": 5, "test": 3}, (10, 5, 3)),
        ({"train": 0.5, "validation": 0.25, "test": 0.25}, (10, 5, 5)),
        ({"train": 20, "validation": 0}, (20, 0, 0)),
        ({"validation": 0.001}, (19, 1, 0)),
    ],
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_splits_are_disjoint_and_of_the_asked_size(split, sizes, shuffle):
    parts = split_indices(20, SplitConfig(**split, shuffle=shuffle))
    assert tuple(len(parts[name]) for name in ("train", "validation", "test")) == sizes
    joined = [index for part in parts.values() for index in part]
    assert len(set(joined)) == len(joined)
    assert set(joined) <= set(range(20))
    if not shuffle:
        assert parts["train"] == list(range(sizes[0]))


def test_split_depends_on_its_seed_only():
    first, again, other = (split_indices(100, SplitConfig(validation=20, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_learning_curves_share_their_test_frames():
    small, large = (split_indices(100, SplitConfig(train=n, validation=10, test=20)) for n in (20, 50))
    assert small["test"] == large["test"]
    assert small["validation"] == large["validation"]
    assert set(small["train"]) < set(large["train"])


@pytest.mark.parametrize(
    ("split", "match"),
    [
        ({"validation": 30}, "asks for 30 validation and 0 test frames of 20"),
        ({"train": 15, "validation": 6}, "asks for 15 training, 6 validation and 0 test frames of 20"),
        ({"validation": 1.0}, "neither a whole number of frames nor a fraction"),
        ({"test": -1}, "data.split.test: -1"),
    ],
)
def test_impossible_splits(split, match):
    with pytest.raises(DataError, match=match):
        split_indices(20, SplitConfig(**split))


@pytest.mark.parametrize("kind", ["json", "npz"])
def test_index_files(files, kind):
    path = files / f"split.{kind}"
    parts = {"train": [3, 1, 2], "validation": [0, 5], "test": [4]}
    if kind == "json":
        path.write_text(json.dumps(parts))
    else:
        np.savez(path, **{name: np.array(part) for name, part in parts.items()})
    data = load_dataset(config(train=files / "a.npz", split={"index_file": path}))
    assert (len(data.train), len(data.validation), len(data.test)) == (3, 2, 1)
    assert data.provenance["indices"] == {"train": [1, 2, 3], "validation": [0, 5], "test": [4]}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"train": [0, 1], "validation": [1]}', "frame 1 stands in 'train' and in 'validation'"),
        ('{"train": [0, 0]}', "frame 0 stands twice in 'train'"),
        ('{"train": [0, 20]}', "index 20 of 'train' is outside 0 to 19"),
        ('{"train": [0, -1]}', "index -1"),
        ('{"train": [0.5]}', "whole numbers"),
        ('{"training": [0]}', r"no 'train' \(found: training\)"),
        ('{"train": [0', "neither npz nor JSON"),
        ('{"train": [0], "train": [1]}', "the key 'train' is given twice"),
        ('{"train": [true]}', "whole numbers"),
        ("[1]", "no 'train'"),
    ],
)
def test_bad_index_files(files, content, match):
    path = files / "split.json"
    path.write_text(content)
    with pytest.raises(DataError, match=match):
        load_dataset(config(train=files / "a.npz", split={"index_file": path}))


def test_missing_index_file(files):
    with pytest.raises(DataError, match="cannot be read"):
        load_dataset(config(train=files / "a.npz", split={"index_file": files / "none.json"}))


def test_several_files_and_provenance(files):
    data = load_dataset(
        config(train=[files / "a.npz", files / "b.npz"], test=files / "test.npz", split={"validation": 6})
    )
    assert (len(data.train), len(data.validation), len(data.test)) == (24, 6, 7)
    provenance = json.loads(json.dumps(data.provenance))
    assert [(file["role"], file["frames"]) for file in provenance["files"]] == [
        ("train", 20),
        ("train", 10),
        ("test", 7),
    ]
    assert all(len(file["sha256"]) == 64 for file in provenance["files"])
    assert provenance["counts"] == {"train": 24, "validation": 6, "test": 7}
    assert sorted(provenance["indices"]["train"] + provenance["indices"]["validation"]) == list(range(30))
    assert provenance["indices"]["test"] == []
    assert provenance["warnings"] == []


def test_own_validation_file_leaves_the_training_file_whole(files):
    data = load_dataset(config(train=files / "a.npz", validation=files / "b.npz"))
    assert (len(data.train), len(data.validation)) == (20, 10)


def test_the_same_file_twice_is_an_error_even_under_another_name(files):
    (files / "copy.npz").write_bytes((files / "a.npz").read_bytes())
    for name in ("a.npz", "copy.npz"):
        with pytest.raises(DataError, match=r"given twice, as data\.train and as data\.test"):
            load_dataset(config(train=files / "a.npz", test=files / name))


def test_copies_of_frames_across_files_are_noted(files):
    write_structures(files / "leak.npz", [*some_frames(20, 1)[:3], *some_frames(4, 9)])
    data = load_dataset(config(train=[files / "a.npz"], validation=files / "b.npz", test=files / "leak.npz"))
    assert data.provenance["warnings"] == ["test: 3 of 7 frames are exact copies of frames of train"]
    data = load_dataset(config(train=[files / "a.npz", files / "leak.npz"], validation=files / "b.npz"))
    assert data.provenance["warnings"] == ["train: 3 of 27 frames are exact copies of others"]


def test_an_element_only_in_test_is_an_error(files):
    write_structures(files / "other.npz", some_frames(3, 5, (17, 1, 1)))
    with pytest.raises(DataError, match="Cl occurs in the test frames but not in training"):
        load_dataset(config(train=files / "a.npz", test=files / "other.npz"))


@pytest.mark.parametrize("kind", ["auto", "isolated_atoms", "least_squares"])
def test_isolated_atoms_stay_in_training(files, kind):
    atoms = [Structure([z], [[0.0, 0, 0]], energy=-z, forces=np.zeros((1, 3))) for z in (1, 8)]
    write_structures(files / "with_atoms.xyz", [*some_frames(4, 1), *atoms])
    for seed in range(5):
        split = {"validation": 2, "seed": seed}
        data = load_dataset(config(train=files / "with_atoms.xyz", split=split, reference_energies={"kind": kind}))
        assert sum(len(frame) == 1 for frame in data.train) == 2
        assert [len(frame) for frame in data.validation] == [3, 3]


def test_an_element_that_only_an_isolated_atom_has_is_not_learnt(files):
    write_structures(files / "atoms.xyz", [*some_frames(4, 1), Structure([7], [[0.0, 0, 0]], energy=-7.0)])
    write_structures(files / "n.xyz", some_frames(2, 3, (7, 1, 1)))
    with pytest.raises(DataError, match="N occurs in the validation frames but not in training"):
        load_dataset(config(train=files / "atoms.xyz", validation=files / "n.xyz"))


def test_too_few_frames_to_split_say_what_helps(files):
    write_structures(files / "one.xyz", some_frames(1, 1))
    with pytest.raises(DataError, match=r"one frame cannot be split.*more frames.*data\.validation"):
        load_dataset(config(train=files / "one.xyz"))
    assert len(load_dataset(config(train=files / "one.xyz", validation=files / "a.npz")).train) == 1
    write_structures(files / "atom.xyz", [Structure([7], [[0.0, 0, 0]], energy=-7.0, forces=np.zeros((1, 3)))])
    with pytest.raises(DataError, match="1 isolated atoms and no other frame"):
        load_dataset(config(train=files / "atom.xyz"))


def test_patterns_and_folders_are_files(files):
    expected = load_dataset(config(train=[files / "a.npz", files / "b.npz", files / "test.npz"]))
    for source in (files / "*.npz", files):
        data = load_dataset(config(train=source))
        assert data.provenance["files"] == expected.provenance["files"]
        assert [frame.energy for frame in data.train] == [frame.energy for frame in expected.train]
    with pytest.raises(DataError, match="no file matches"):
        load_dataset(config(train=files / "*.xyz"))


def test_what_a_reader_leaves_out_is_noted(files):
    path = files / "nan.xyz"
    columns = "Properties=species:S:1:pos:R:3:forces:R:3"
    text = f'1\nLattice="9 0 0 0 9 0 0 0 9" {columns} energy={{}} stress="{{}}"\nH 0 0 0 0 0 0\n'
    path.write_text("".join(text.format(-k, " ".join(["nan"] * 9)) for k in range(5)))
    data = load_dataset(config(train=path))
    assert data.provenance["warnings"][0] == (
        f"train: {path}, frame 0: stress left out: stress: not finite (NaN or infinity) (and 4 more frames)"
    )


def test_energy_only_test_sets_are_allowed_and_noted(files):
    bare = [Structure(frame.numbers, frame.positions, energy=frame.energy) for frame in some_frames(4, 8)]
    write_structures(files / "bare.xyz", bare)
    data = load_dataset(config(train=files / "a.npz", test=files / "bare.xyz"))
    assert data.provenance["warnings"] == ["test: no forces; the errors of forces are left out"]
    with pytest.raises(DataError, match="no forces"):
        load_dataset(config(train=files / "bare.xyz"))


def test_keys_and_units_reach_the_reader(files):
    frames = some_frames(5, 4)
    np.savez(
        files / "units.npz",
        R=np.array([frame.positions for frame in frames]),
        z=frames[0].numbers,
        u=np.array([frame.energy for frame in frames]) * 1000,
        f=np.array([frame.forces for frame in frames]) * 1000,
    )
    keys, units = {"energy": "u", "forces": "f"}, {"energy": "meV"}
    data = load_dataset(
        config(train=files / "units.npz", keys=keys, units=units, split={"validation": 0, "shuffle": False})
    )
    assert [frame.energy for frame in data.train] == pytest.approx([frame.energy for frame in frames])
    assert data.provenance["keys"]["energy"] == "u"
    with pytest.raises(DataError, match=r"did you mean data\.keys\.energy"):
        load_dataset(config(train=files / "units.npz", keys={"energy": "U"}))


def test_bundled_set():
    data = load_dataset(
        config(train="bundled:malonaldehyde", test="bundled:malonaldehyde", keys={"energy": "nonsense"})
    )
    assert len(data.train) + len(data.validation) >= 1000
    assert len(data.test) >= 500
    assert data.provenance["warnings"] == []
    for frame in (*data.train, *data.test):
        assert sorted(frame.numbers.tolist()) == [1, 1, 1, 1, 6, 6, 6, 8, 8]
        assert np.abs(frame.forces.sum(axis=0)).max() < 1e-3
    sizes = [bundled_file("bundled:malonaldehyde", role).stat().st_size for role in ("train", "test")]
    assert sum(sizes) < 2_000_000
    with pytest.raises(DataError, match="no such data set"):
        load_dataset(config(train="bundled:benzene"))
