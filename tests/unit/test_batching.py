from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from steradian.config import BatchConfig
from steradian.graph.batches import BatchSampler, GraphDataset, collate
from steradian.graph.structures import DataError, Structure


def dataset(count=23, seed=0):
    rng = np.random.default_rng(seed)
    frames = []
    for index in range(count):
        size = int(rng.integers(1, 8))
        frames.append(
            Structure(np.full(size, 1), rng.uniform(0, 4, (size, 3)), energy=index, forces=np.zeros((size, 3)))
        )
    return GraphDataset(frames, 3.0)


@pytest.fixture(scope="module")
def data():
    return dataset()


BUDGETS = [
    BatchConfig(graphs=4),
    BatchConfig(graphs=None, max_atoms=16),
    BatchConfig(graphs=None, max_edges=60),
    BatchConfig(graphs=3, max_atoms=14, max_edges=60),
    BatchConfig(graphs=4, balanced=True),
    BatchConfig(graphs=None, max_atoms=16, balanced=True),
    BatchConfig(graphs=5, max_atoms=20, max_edges=80, balanced=True),
]


@pytest.mark.parametrize("config", BUDGETS)
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_frame_once_and_within_budget(data, config, shuffle):
    batches = list(BatchSampler(data, config, shuffle=shuffle))
    assert sorted(chain.from_iterable(batches)) == list(range(len(data)))
    for batch in batches:
        assert config.graphs is None or len(batch) <= config.graphs
        assert config.max_atoms is None or data.num_atoms[batch].sum() <= config.max_atoms
        assert config.max_edges is None or data.num_edges[batch].sum() <= config.max_edges
    if not shuffle and not config.balanced:
        assert list(chain.from_iterable(batches)) == list(range(len(data)))


def test_balanced_batches_are_of_one_size():
    frames = dataset(count=300, seed=4)

    def spread(balanced):
        sampler = BatchSampler(frames, BatchConfig(graphs=10, balanced=balanced), seed=1)
        first, second = sampler.batches(0), sampler.batches(1)
        assert len(first) == 30
        assert max(map(len, first)) <= 10
        assert first != second
        edges = np.array([frames.num_edges[batch].sum() for batch in first])
        return (edges.max() - edges.min()) / edges.mean()

    assert spread(True) < 0.1 < 0.5 < spread(False)


def test_balanced_batches_are_as_few_as_the_budget_allows():
    frames = dataset(count=200, seed=5)
    total = frames.num_atoms.sum()
    batches = BatchSampler(frames, BatchConfig(graphs=None, max_atoms=40, balanced=True)).batches(0)
    packed = BatchSampler(frames, BatchConfig(graphs=None, max_atoms=40)).batches(0)
    assert len(batches) <= min(len(packed), -(-total // 40) + 1)


def test_order_depends_on_seed_and_epoch_only(data):
    def order(seed, epoch):
        sampler = BatchSampler(data, BatchConfig(graphs=4), seed=seed)
        sampler.set_epoch(epoch)
        torch.manual_seed(seed + epoch + 12)  # must not matter
        return list(sampler)

    assert order(1, 3) == order(1, 3)
    assert order(1, 3) != order(1, 4)
    assert order(1, 3) != order(2, 3)


@pytest.mark.parametrize("replicas", [2, 3, 4, 5])
@pytest.mark.parametrize("config", BUDGETS)
def test_ranks_share_frames_without_loss(data, replicas, config):
    for shuffle in (True, False):
        shards = [
            list(BatchSampler(data, config, shuffle=shuffle, rank=rank, num_replicas=replicas))
            for rank in range(replicas)
        ]
        assert len({len(shard) for shard in shards}) == 1
        assert sorted(index for shard in shards for batch in shard for index in batch) == list(range(len(data)))


@pytest.mark.parametrize("shuffle", [True, False])
def test_fewer_frames_than_ranks(shuffle):
    data = dataset(3)
    shards = [
        list(BatchSampler(data, BatchConfig(graphs=2), shuffle=shuffle, rank=r, num_replicas=4)) for r in range(4)
    ]
    seen = Counter(index for shard in shards for batch in shard for index in batch)
    if shuffle:  # every rank takes a step
        assert [len(shard) for shard in shards] == [1, 1, 1, 1]
        assert set(seen) == {0, 1, 2}
    else:  # no frame twice
        assert seen == {0: 1, 1: 1, 2: 1}


@pytest.mark.parametrize("stop", [0, 2, 5, 6])
def test_resume_continues_exactly(data, stop):
    config = BatchConfig(graphs=4)
    whole = BatchSampler(data, config, seed=7)
    expected = []
    for epoch in range(3):
        whole.set_epoch(epoch)
        expected += list(whole)
    first = BatchSampler(data, config, seed=7)
    first.set_epoch(1)
    done = [batch for _, batch in zip(range(stop), iter(first))]
    state = first.state_dict(batches_done=stop)
    second = BatchSampler(data, config, seed=7)
    second.load_state_dict(state)
    rest = list(second)
    while second.epoch < 2:
        second.set_epoch(second.epoch + 1)
        rest += list(second)
    assert expected[6:] == done + rest


def test_resume_with_workers_that_fetch_ahead(data):
    config = BatchConfig(graphs=4)

    def energies(sampler):
        return [
            graph.energy.tolist()
            for graph in DataLoader(data, batch_sampler=sampler, collate_fn=collate, num_workers=1)
        ]

    sampler = BatchSampler(data, config, seed=3)
    expected = energies(sampler)
    state = sampler.state_dict(batches_done=2)
    other = BatchSampler(data, config, seed=3)
    other.load_state_dict(state)
    assert energies(other) == expected[2:]
    assert energies(other) == expected  # the pass after it is a whole one


def test_a_broken_off_pass_does_not_shift_the_next(data):
    sampler = BatchSampler(data, BatchConfig(graphs=4), shuffle=False)
    for _ in sampler:
        break
    assert next(iter(sampler))[0] == 0


def test_state_of_other_data_is_refused(data):
    state = BatchSampler(data, BatchConfig(graphs=4)).state_dict()
    with pytest.raises(ValueError, match="graphs was 4 and is 5 now"):
        BatchSampler(data, BatchConfig(graphs=5)).load_state_dict(state)
    with pytest.raises(ValueError, match="num_frames was 23 and is 7 now"):
        BatchSampler(dataset(7), BatchConfig(graphs=4)).load_state_dict(state)


def test_mistakes(data):
    with pytest.raises(DataError, match=r"frame \d+ has \d atoms: raise data.batch.max_atoms"):
        BatchSampler(data, BatchConfig(graphs=None, max_atoms=2))
    with pytest.raises(DataError, match="no frames"):
        BatchSampler(GraphDataset([], 3.0), BatchConfig())
    same_place = GraphDataset([Structure([1, 1], [[0, 0, 0], [0, 0, z]]) for z in (1.0, 0.0)], 3.0)
    with pytest.raises(DataError, match="frame 1: atoms"):
        _ = same_place.num_edges


def test_a_batch_equals_its_graphs(data):
    batch = collate([data[index] for index in (3, 0, 5)])
    assert batch.energy.tolist() == [3.0, 0.0, 5.0]
    assert batch.num_edges == sum(data[index].num_edges for index in (3, 0, 5))
    assert (batch.system[batch.senders] == batch.system[batch.receivers]).all()
    assert (batch.receivers.diff() >= 0).all()
    assert data[3] is data[3]  # kept
