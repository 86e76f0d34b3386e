"""Graphs of a data set, and batches of them that are shuffled, sharded and resumed exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from steradian.config import BatchConfig
from steradian.graph.graph import Graph, batch_graphs
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import DataError, Structure

__all__ = ["BatchSampler", "GraphDataset", "collate"]

BALANCED_BATCHES = 64
"""Batches that are balanced against each other: more would be more even, and less random."""

collate: Callable[[Sequence[Graph]], Graph] = batch_graphs


class GraphDataset(Dataset[Graph]):
    """Frames as graphs, each made on first use and then kept.

    Args:
        structures: frames.
        cutoff: [Å].
        dtype: of the floating-point tensors (energies stay float64).
        cache: keep graphs in memory; without it every access makes the neighbour list anew.
    """

    def __init__(
        self,
        structures: Sequence[Structure],
        cutoff: float,
        *,
        dtype: torch.dtype = torch.float64,
        cache: bool = True,
    ) -> None:
        self.structures = list(structures)
        self.cutoff = float(cutoff)
        self.dtype = dtype
        self.cache = cache
        self._graphs: list[Graph | None] = [None] * len(self.structures)
        self._num_edges: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.structures)

    def __getitem__(self, index: int) -> Graph:
        graph = self._graphs[index]
        if graph is None:
            try:
                graph = make_graph(self.structures[index], self.cutoff, dtype=self.dtype)
            except DataError as error:
                raise DataError(str(error) if self.structures[index].where else f"frame {index}: {error}") from None
            if self.cache:
                self._graphs[index] = graph
        return graph

    @property
    def num_atoms(self) -> np.ndarray:
        """``[frames]`` atoms of every frame."""
        return np.array([len(structure) for structure in self.structures], dtype=np.int64)

    @property
    def num_edges(self) -> np.ndarray:
        """``[frames]`` edges of every frame; makes every neighbour list once."""
        if self._num_edges is None:
            self._num_edges = np.array([self[index].num_edges for index in range(len(self))], dtype=np.int64)
        return self._num_edges


class BatchSampler(Sampler[list[int]]):
    """Lists of frame indices, by count or by a budget of atoms and edges.

    The batches of an epoch are a pure function of (data set, batch settings, seed, epoch): one global list is made,
    the same on every rank, and rank r of R takes its batches r, r + R, ... So a run continues exactly where it
    stopped, on any number of data-loader workers.

    Several ranks: where the number of batches is not a multiple of R, the largest batches are cut in two until it is,
    so that no frame is lost or seen twice. Where there are fewer frames than needed for that: with ``shuffle=True``
    (training) the first batches of the list are used again, because every rank must take the same number of steps;
    with ``shuffle=False`` (evaluation) some ranks get one batch less and no frame is seen twice.

    Args:
        dataset: gives the number of frames and, for budgets, their atoms and edges.
        config: ``graphs`` frames per batch, ``max_atoms`` and ``max_edges`` per batch; what is set holds together. With
            ``balanced`` all batches have nearly the same numbers of these.
        shuffle: a new order every epoch (training), or the order of the files (evaluation).
        seed: of the order.
        rank, num_replicas: this process and the number of processes.

    Raises:
        DataError: no frames, or a single frame above the budget.
    """

    def __init__(
        self,
        dataset: GraphDataset,
        config: BatchConfig,
        *,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        num_replicas: int = 1,
    ) -> None:
        if len(dataset) == 0:
            raise DataError("no frames to make batches of")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank {rank} of {num_replicas} processes")
        self.num_frames = len(dataset)
        self.config = config
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.num_replicas = num_replicas
        self._budgets = [
            (limit, sizes)
            for limit, sizes in (
                (config.graphs, np.ones(len(dataset), dtype=np.int64)),
                (config.max_atoms, dataset.num_atoms),
                (config.max_edges, dataset.num_edges if config.max_edges is not None else np.zeros(0)),
            )
            if limit is not None
        ]
        for limit, name, sizes in (
            (config.max_atoms, "atoms", dataset.num_atoms),
            (config.max_edges, "edges", dataset.num_edges if config.max_edges is not None else np.zeros(0)),
        ):
            if limit is not None and sizes.max() > limit:
                frame = int(np.argmax(sizes))
                raise DataError(f"frame {frame} has {sizes[frame]} {name}: raise data.batch.max_{name} (now {limit})")
        self._loads = np.zeros((0, 2))
        if config.balanced:
            self._loads = np.stack([dataset.num_atoms, dataset.num_edges], axis=1).astype(np.float64)
        self.epoch = 0
        self._start = 0  # where the next pass starts
        self._handed_out = 0
        self._batches: tuple[int, list[list[int]]] | None = None

    # ------------------------------------------------------------------------------------------------ the batches

    def order(self, epoch: int) -> np.ndarray:
        """``[frames]`` order of the frames in an epoch, before it is cut into batches."""
        if not self.shuffle:
            return np.arange(self.num_frames)
        return np.random.default_rng(np.random.SeedSequence([self.seed, epoch])).permutation(self.num_frames)

    def batches(self, epoch: int | None = None) -> list[list[int]]:
        """All batches of this rank in an epoch (default: the current one)."""
        epoch = self.epoch if epoch is None else epoch
        if self._batches is None or self._batches[0] != epoch:
            self._batches = (epoch, self._shared(self._packed(self.order(epoch)))[self.rank :: self.num_replicas])
        return self._batches[1]

    def _packed(self, order: np.ndarray) -> list[list[int]]:
        """Cut the order into batches, each as long as the budgets allow."""
        if self.config.balanced:
            return self._balanced(order)
        batches: list[list[int]] = []
        used = [0] * len(self._budgets)
        for index in order.tolist():
            wanted = [total + int(sizes[index]) for total, (_, sizes) in zip(used, self._budgets)]
            if not batches or any(total > limit for total, (limit, _) in zip(wanted, self._budgets)):
                batches.append([])
                wanted = [int(sizes[index]) for _, sizes in self._budgets]
            batches[-1].append(index)
            used = wanted
        return batches

    def _balanced(self, order: np.ndarray) -> list[list[int]]:
        """Batches of nearly equal numbers of atoms and edges, within the budgets.

        In every stretch of the order the largest frames are placed first, each where it leaves the least full batch
        (Graham 1969, longest processing time). Frames of one size stay in the order, so batches are as random as the
        sizes allow.
        """
        parts = np.stack([values / limit for limit, values in self._budgets], axis=1)  # [frames, budgets]
        needed = math.ceil(parts.sum(axis=0).max() - 1e-9)
        stretches = np.array_split(order, max(1, math.ceil(needed / BALANCED_BATCHES)))
        return [batch for stretch in stretches for batch in self._spread(stretch, parts)]

    def _spread(self, stretch: np.ndarray, parts: np.ndarray) -> list[list[int]]:
        """Frames ``[n]`` on as few batches as hold them; ``[frames, budgets]`` are parts of a batch."""
        loads = self._loads / self._loads[stretch].sum(axis=0).clip(min=1)  # [frames, 2]
        by_size = stretch[np.argsort(-loads[stretch].max(axis=1), kind="stable")]
        count = max(1, math.ceil(parts[stretch].sum(axis=0).max() - 1e-9))
        while True:
            used, load = np.zeros((count, parts.shape[1])), np.zeros((count, 2))
            batches: list[list[int]] = [[] for _ in range(count)]
            for frame in by_size.tolist():
                fits = (used + parts[frame]).max(axis=1) <= 1 + 1e-9
                if not fits.any():
                    break
                place = int(np.argmin(np.where(fits, (load + loads[frame]).max(axis=1), np.inf)))
                used[place] += parts[frame]
                load[place] += loads[frame]
                batches[place].append(frame)
            else:
                return [batch for batch in batches if batch]
            count += max(1, count // 50)

    def _shared(self, batches: list[list[int]]) -> list[list[int]]:
        """Make the number of batches a multiple of the number of ranks; see the class."""
        while len(batches) % self.num_replicas:
            largest = max(range(len(batches)), key=lambda place: len(batches[place]))
            batch = batches[largest]
            if len(batch) == 1:
                break
            half = (len(batch) + 1) // 2
            batches[largest : largest + 1] = [batch[:half], batch[half:]]
        if self.shuffle:
            missing = -len(batches) % self.num_replicas
            batches = batches + [batches[place % len(batches)] for place in range(missing)]
        return batches

    def __len__(self) -> int:
        """Batches of this rank in the current epoch, those already done included."""
        return len(self.batches())

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of the current epoch; the first pass after :meth:`load_state_dict` starts at the stored place."""
        batches = self.batches()
        start, self._start = self._start, 0
        self._handed_out = start
        for place in range(start, len(batches)):
            self._handed_out = place + 1
            yield batches[place]

    # ------------------------------------------------------------------------------------------- epochs and resuming

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; another epoch than the current one starts at its first batch."""
        if epoch != self.epoch:
            self._start = self._handed_out = 0
        self.epoch = epoch

    def state_dict(self, batches_done: int | None = None) -> dict[str, Any]:
        """State to continue from.

        Args:
            batches_done: batches of this epoch that training has finished. Give it where data-loader workers fetch
                ahead; without it, the batches handed out so far.
        """
        done = self._handed_out if batches_done is None else batches_done
        return {"epoch": self.epoch, "batches_done": done, "plan": self._plan()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a stored place.

        Raises:
            ValueError: the state belongs to other data or other batch settings.
        """
        for name, value in self._plan().items():
            if state["plan"].get(name) != value:
                raise ValueError(
                    f"cannot resume inside an epoch: {name} was {state['plan'].get(name)} and is {value} now"
                )
        self.epoch = int(state["epoch"])
        self._start = int(state["batches_done"])
        if self._start >= len(self.batches()):
            self.epoch, self._start = self.epoch + 1, 0
        self._handed_out = self._start

    def _plan(self) -> dict[str, Any]:
        return {
            "num_frames": self.num_frames,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "num_replicas": self.num_replicas,
            **{name: getattr(self.config, name) for name in ("graphs", "max_atoms", "max_edges")},
            **({"balanced": True} if self.config.balanced else {}),
        }
