"""Tensors that stay where they are while their contents change, and the few steps that are kept ready."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import fields
from typing import Generic, TypeVar

import torch
from torch import Tensor

from steradian.execution.graphs import say
from steradian.graph import Graph

__all__ = ["GraphBuffers", "StepCache", "tensors_of"]

T = TypeVar("T")


def tensors_of(graph: Graph) -> dict[str, Tensor]:
    """The tensors of a graph by name, those of its pairs included."""
    found = {each.name: getattr(graph, each.name) for each in fields(graph)}
    found = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    pairs = graph.prepared().pairs
    if pairs is not None:
        found |= {"pairs.first": pairs.first, "pairs.of_edge": pairs.of_edge}
    return found


class GraphBuffers:
    """A padded graph of its own tensors, into which graphs of the same sizes are written.

    Args:
        graph: the first one; cloned.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph.mapped(lambda tensor: tensor.detach().clone())
        self._own = tensors_of(self.graph)
        self._source: list[tuple[Tensor, int]] = []

    def follow(self, source: Graph, padded: Callable[[], Graph]) -> None:
        """Take over a graph of which ``padded`` makes the contents; does nothing where its tensors are the last ones.

        Args:
            source: as it was given. Its tensors are kept, and changes in place are seen.
        """
        given = [value for _, value in sorted(tensors_of(source).items())]
        same = len(given) == len(self._source) and all(
            value is before and _version(value) == version for value, (before, version) in zip(given, self._source)
        )
        if not same:
            self.write(padded())
            self._source = [(value, _version(value)) for value in given]

    def write(self, graph: Graph) -> None:
        """Take over the contents of a graph on any device.

        Raises:
            ValueError: it has other tensors or other sizes.
        """
        given = tensors_of(graph)
        if given.keys() != self._own.keys():
            raise ValueError(f"the graph differs in {', '.join(sorted(given.keys() ^ self._own.keys()))}")
        for name, value in given.items():
            if value.shape != self._own[name].shape:
                raise ValueError(f"{name}: {list(value.shape)} does not fit {list(self._own[name].shape)}")
        with torch.no_grad():
            for name, value in given.items():
                self._own[name].copy_(value, non_blocking=True)
        assert self.graph.topology is not None
        self.graph.topology.refresh()


def _version(value: Tensor) -> int:
    """Grows with every change in place; never the same for a tensor that does not count them."""
    if value.is_inference():
        return next(_UNCOUNTED)
    return int(value._version)


_UNCOUNTED = itertools.count(start=-1, step=-1)


class StepCache(Generic[T]):
    """The steps last used; the one not used for the longest time makes room.

    Args:
        keep: how many.
        what: for the message, such as "training steps".
    """

    def __init__(self, keep: int, what: str) -> None:
        if keep < 1:
            raise ValueError(f"at least one step must be kept, not {keep}")
        self.keep, self.what = keep, what
        self.made = 0
        self._warned = False
        self._steps: OrderedDict[Hashable, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._steps)

    def clear(self) -> None:
        """Forget all steps: the weights, their format or their device have changed."""
        self._steps.clear()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The step of a key, made where it is not known."""
        if key in self._steps:
            self._steps.move_to_end(key)
            return self._steps[key]
        while len(self._steps) >= self.keep:
            self._steps.popitem(last=False)
        self._steps[key] = step = make()
        self.made += 1
        if self.made > 4 * self.keep and not self._warned:
            self._warned = True
            say(
                f"{self.what}: {self.made} different sizes so far, of which {self.keep} are kept ready; most of the"
                " time goes into preparing them. Use batches of more equal size (data.batch.max_atoms and max_edges) or"
                " training.execution=eager"
            )
        return step
