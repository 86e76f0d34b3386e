"""What follows from numbers, systems and edges alone, prepared once and handed down to every layer.

Kernels need row indices in order of their target, maps per element need the atoms of each element together, attention
between all atoms needs the systems apart. All of this is a :class:`Topology`: made when a list of neighbours is made,
or at the first call for a graph, and carried by :class:`~steradian.graph.Graph` and :class:`~steradian.graph.Edges`.
Nothing is looked up by the identity of a tensor. An edit in place afterwards is seen: PyTorch counts the changes of a
tensor, the counts are compared before a topology is used again, and where they differ it is made anew.

A *static* topology belongs to tensors of fixed shape whose contents change (padded graphs, lists of neighbours on a
GPU). A step over it may be recorded, so nothing asks the device for a number: facts such as the atoms of every system
are given by whoever made the tensors, and :meth:`Topology.refresh` sorts new contents into the same buffers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "OnTopology",
    "Pairs",
    "Rows",
    "Topology",
    "find_pairs",
    "rows_of",
]

#: From so many pairs per edge on, work that is shared by opposite edges saves too little.
WORTH_PAIRING = 0.75
ATOMIC_NUMBERS = 119


class Rows:
    """A row index and how it sorts the work, for gathers by it and for sums at it.

    Args:
        index: ``[B]`` int64, the row of each piece of work.
        num_rows: of what it indexes.
        ascending: the caller's promise that the index is in order (checked on a CPU, on a GPU without waiting).
        static: its contents will change in place, so a sorted form has the same tensors whatever they are.
        counts: work per row, on the host, where it is known.

    """

    def __init__(
        self,
        index: Tensor,
        num_rows: int,
        *,
        ascending: bool = False,
        static: bool = False,
        counts: tuple[int, ...] | None = None,
    ) -> None:
        self.index = index.contiguous()
        self.num_rows, self.ascending, self.static = num_rows, ascending, static
        self._counts = counts
        self._sorted: tuple[Tensor | None, Tensor] | None = None
        self._inverse: Tensor | None = None
        self._looked = False

    def __len__(self) -> int:
        return len(self.index)

    @property
    def order(self) -> Tensor | None:
        """``[B]`` the work in order of its row; None where it is in order as it is."""
        return self._in_order()[0]

    @property
    def bounds(self) -> Tensor:
        """``[num_rows + 1]`` where the work of each row begins."""
        return self._in_order()[1]

    @property
    def inverse(self) -> Tensor:
        """``[B]`` place of each piece of work in the order."""
        if self._inverse is None:
            order = self.order
            places = torch.arange(len(self.index), device=self.index.device) if order is None else torch.argsort(order)
            self._inverse = places
        return self._inverse

    @property
    def counts(self) -> tuple[int, ...] | None:
        """Work per row on the host; None where it is not known and must not be asked for."""
        if self._counts is None and not self.static:
            self._counts = tuple(self.bounds.diff().tolist())
        return self._counts

    def look(self) -> Rows:
        """The rows themselves, after a look at them on a CPU: machine code follows an index without asking.

        Raises:
            IndexError: a row that does not exist.
        """
        if not self._looked and self.index.device.type == "cpu" and len(self.index):
            low, high = int(self.index.min()), int(self.index.max())
            if low < 0 or high >= self.num_rows:
                raise IndexError(f"row index out of range: {low}..{high} for {self.num_rows} rows")
        self._looked = True
        return self

    def _in_order(self) -> tuple[Tensor | None, Tensor]:
        if self._sorted is None:
            self._sorted = self._sort()
        return self._sorted

    def _sort(self) -> tuple[Tensor | None, Tensor]:
        with torch.no_grad():
            if self.static or self.index.device.type != "cpu":
                return self._sort_on_device()
            return self.look()._sort_on_host()

    def _sort_on_host(self) -> tuple[Tensor | None, Tensor]:
        array = self.index.numpy()
        in_order = bool((array[1:] >= array[:-1]).all())
        if self.ascending and not in_order:
            raise RuntimeError("row index said to ascend does not")
        bounds = np.zeros(self.num_rows + 1, dtype=np.int64)
        np.cumsum(np.bincount(array, minlength=self.num_rows), out=bounds[1:])
        # stable: edges of one atom keep their order, so their sum has the same bits however it was sorted
        order = None if in_order else torch.from_numpy(np.argsort(array, kind="stable"))
        return order, torch.from_numpy(bounds)

    def _sort_on_device(self) -> tuple[Tensor | None, Tensor]:
        # operations of fixed shape only: this may be part of a recorded step
        targets = torch.arange(self.num_rows + 1, dtype=self.index.dtype, device=self.index.device)
        if self.ascending:
            if not self.static:
                torch._assert_async((self.index[1:] >= self.index[:-1]).all(), "row index said to ascend does not")
            return None, torch.searchsorted(self.index, targets)
        in_order, order = torch.sort(self.index, stable=True)
        return order, torch.searchsorted(in_order, targets)

    def refresh(self) -> None:
        """Sort new contents of the index into the same tensors."""
        self._looked = False
        if self._sorted is None:
            return
        for kept, new in zip(self._sorted, self._sort()):
            if kept is not None and new is not None:
                kept.copy_(new)
        if self._inverse is not None:
            assert self.order is not None
            self._inverse.copy_(torch.argsort(self.order))


def rows_of(index: Tensor | Rows, num_rows: int, *, ascending: bool = False) -> Rows:
    """The rows of an index; what is prepared stays as it is.

    Raises:
        ValueError: prepared for another number of rows.
    """
    if not isinstance(index, Rows):
        return Rows(index, num_rows, ascending=ascending)
    if index.num_rows != num_rows:
        raise ValueError(f"rows prepared for {index.num_rows} rows are used with {num_rows}")
    return index


@dataclass(frozen=True)
class Pairs:
    """Unordered pairs of a neighbour list: what depends on the distance alone is computed once for both directions.

    Attributes:
        first: ``[Q]`` an edge of each pair.
        of_edge: ``[E]`` the pair that an edge belongs to.
    """

    first: Tensor
    of_edge: Tensor

    @property
    def count(self) -> int:
        return len(self.first)

    @cached_property
    def rows(self) -> Rows:
        """``of_edge`` for gathers of what belongs to pairs."""
        return Rows(self.of_edge, len(self.first))


class Topology:
    """What is known of a graph without its positions.

    Args:
        numbers: ``[N]``; system: ``[N]``; senders, receivers: ``[E]``; shifts: ``[E, 3]``; pbc: ``[S, 3]``: tensors of
            the graph, see :class:`~steradian.graph.Graph`. None where there are none (edges of other packages).
        num_atoms, num_systems: N, S.
        is_static: see the head of this module; what follows must then be given where it is needed.
        sizes: atoms of every system, on the host.
        periodic: whether any system is periodic.
        composition: ``(atomic number, atoms)`` of the elements present.
        pairs: of opposite edges; looked for on a CPU where they are not given.
        real: ``[S]`` bool, False for systems that only fill up a bucket.
    """

    def __init__(
        self,
        senders: Tensor,
        receivers: Tensor,
        num_atoms: int,
        *,
        numbers: Tensor | None = None,
        system: Tensor | None = None,
        num_systems: int = 1,
        shifts: Tensor | None = None,
        pbc: Tensor | None = None,
        is_static: bool = False,
        sizes: tuple[int, ...] | None = None,
        periodic: bool | None = None,
        composition: tuple[tuple[int, int], ...] | None = None,
        pairs: Pairs | None = None,
        real: Tensor | None = None,
    ) -> None:
        self.senders, self.receivers, self.num_atoms = senders, receivers, num_atoms
        self.system = senders.new_zeros(num_atoms) if system is None else system
        self.numbers, self.shifts, self.pbc, self.num_systems = numbers, shifts, pbc, num_systems
        self.is_static, self.composition, self.real = is_static, composition, real
        self._sizes, self._periodic, self._pairs = sizes, periodic, pairs
        self._looked_for_pairs = pairs is not None or is_static or senders.device.type != "cpu"
        self._species: dict[Hashable, tuple[Tensor, Rows]] = {}
        self._prepared: dict[Hashable, Any] = {}
        self._seen = [_seen(tensor) for tensor in self._tensors()]

    def _tensors(self) -> list[Tensor | None]:
        return [self.numbers, self.system, self.senders, self.receivers, self.shifts, self.pbc]

    def holds_for(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it was made for these tensors (numbers, system, senders, receivers, shifts, pbc) as they are now."""
        return all(
            given is own and _unchanged(given, seen)
            for given, own, seen in zip(tensors, self._tensors(), self._seen, strict=True)
        )

    def of_copies(
        self,
        numbers: Tensor,
        system: Tensor,
        senders: Tensor,
        receivers: Tensor,
        shifts: Tensor,
        pbc: Tensor,
        *,
        pairs: Pairs | None,
        real: Tensor | None,
    ) -> Topology:
        """The topology of copies of its tensors; what was known on the host stays known."""
        # asked here, where it costs nothing
        sizes = self.sizes if self.senders.device.type == "cpu" and self.knows_sizes else self._sizes
        return Topology(
            senders,
            receivers,
            self.num_atoms,
            numbers=numbers,
            system=system,
            num_systems=self.num_systems,
            shifts=shifts,
            pbc=pbc,
            is_static=self.is_static,
            sizes=sizes,
            periodic=self.is_periodic,
            composition=self.composition,
            pairs=pairs,
            real=real,
        )

    # ------------------------------------------------------------------------------------------------ rows and edges

    @property
    def num_edges(self) -> int:
        return self.senders.shape[0]

    @cached_property
    def by_receiver(self) -> Rows:
        """Edges in order of the atom that they end at, as they are listed."""
        return Rows(self.receivers, self.num_atoms, ascending=True, static=self.is_static)

    @cached_property
    def by_sender(self) -> Rows:
        """Edges in order of the atom that they start from."""
        return Rows(self.senders, self.num_atoms, static=self.is_static)

    @property
    def pairs(self) -> Pairs | None:
        """Opposite edges; None where they are not known or would save little."""
        if not self._looked_for_pairs:
            self._looked_for_pairs = True
            self._pairs = find_pairs(self.senders, self.receivers, self.shifts, self.num_atoms)
        return self._pairs

    def without_pairs(self) -> Topology:
        """The same, in which no edge is known to be the opposite of another one."""
        alike = copy.copy(self)
        alike._pairs, alike._looked_for_pairs, alike._prepared = None, True, {}
        return alike

    # ----------------------------------------------------------------------------------------------- systems, elements

    @property
    def is_periodic(self) -> bool:
        """Whether any system is periodic."""
        if self._periodic is None:
            self._periodic = self.pbc is not None and bool(self.pbc.any())
        return self._periodic

    @property
    def knows_sizes(self) -> bool:
        """Whether :attr:`sizes` can be had without asking a device that must not be asked."""
        return self._sizes is not None or not self.is_static

    @property
    def sizes(self) -> tuple[int, ...]:
        """Atoms of every system, on the host.

        Raises:
            RuntimeError: a static topology whose maker did not say.
        """
        if self._sizes is None:
            if self.is_static:
                raise RuntimeError(
                    "the atoms of every system are needed here, and a recorded step must not ask for them"
                )
            self._sizes = tuple(torch.bincount(self.system, minlength=self.num_systems).tolist())
        return self._sizes

    def species(self, elements: tuple[int, ...], table: Tensor) -> Rows:
        """``[N]`` index of each atom's element, with the atoms of each element together.

        Args:
            elements: atomic numbers in the order of the indices.
            table: ``[119]`` atomic number to index, -1 for others; a function of ``elements``.

        Raises:
            IndexError: an element that the table lacks (not looked for in a static topology).
        """
        key = (elements, table.device)
        if key not in self._species:
            counts = None
            if self.composition is not None:
                atoms_of = dict(self.composition)
                counts = tuple(atoms_of.get(number, 0) for number in elements)
            index = _species(self.numbers, table, self.is_static)
            self._species[key] = table, Rows(index, len(elements), static=self.is_static, counts=counts)
        return self._species[key][1]

    def prepared(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """``make()``, which may depend on this topology alone; made once. Not for contents of a static topology."""
        if key not in self._prepared:
            self._prepared[key] = make()
        return self._prepared[key]

    # --------------------------------------------------------------------------------------------------------- changes

    def refresh(self) -> None:
        """Take over new contents of the tensors of a static topology; no shape and no tensor changes."""
        for table, rows in self._species.values():
            rows.index.copy_(_species(self.numbers, table, True))
        for rows in [rows for _, rows in self._species.values()]:
            rows.refresh()
        for name in ("by_receiver", "by_sender"):
            if name in self.__dict__:
                getattr(self, name).refresh()
        if self._pairs is not None and "rows" in self._pairs.__dict__:
            self._pairs.rows.refresh()
        self._seen = [_seen(tensor) for tensor in self._tensors()]


class OnTopology:
    """What stands on a ``topology`` names its atoms and edges as that does."""

    topology: Topology

    @property
    def senders(self) -> Tensor:
        """``[E]`` index j of the neighbour."""
        return self.topology.senders

    @property
    def receivers(self) -> Tensor:
        """``[E]`` index i of the centre, ascending."""
        return self.topology.receivers

    @property
    def num_atoms(self) -> int:
        return self.topology.num_atoms

    @property
    def system(self) -> Tensor:
        """``[N]`` index of the system of each atom."""
        return self.topology.system

    @property
    def num_systems(self) -> int:
        return self.topology.num_systems


def _species(numbers: Tensor | None, table: Tensor, is_static: bool) -> Tensor:
    assert numbers is not None
    numbers = numbers.to(table.device)
    if is_static:
        return table.index_select(0, numbers)
    inside = (numbers >= 0) & (numbers < ATOMIC_NUMBERS)
    return torch.where(inside, table[numbers.clamp(0, ATOMIC_NUMBERS - 1)], -1)


def _seen(tensor: Tensor | None) -> int | Tensor | None:
    """What tells later whether a tensor has changed: its count of changes, or a copy where PyTorch keeps none."""
    if tensor is None:
        return None
    return tensor.clone() if tensor.is_inference() else int(tensor._version)


def _unchanged(tensor: Tensor, seen: int | Tensor | None) -> bool:
    if isinstance(seen, Tensor):
        return torch.equal(tensor, seen)
    return tensor._version == seen


def find_pairs(senders: Tensor, receivers: Tensor, shifts: Tensor | None, num_atoms: int) -> Pairs | None:
    """Opposite edges of a list on a CPU; an edge whose opposite is not listed is a pair of its own.

    None where they would save little.
    """
    if not len(senders):
        return None
    from_, to = senders.numpy(), receivers.numpy()
    key = np.minimum(from_, to).astype(np.int64) * num_atoms + np.maximum(from_, to)
    whole = np.zeros((len(from_), 3), np.int64) if shifts is None else np.rint(shifts.numpy()).astype(np.int64)
    if whole.any():
        width = 2 * int(np.abs(whole).max()) + 1
        # the number of a pair and its shift has to fit into 63 bits
        if num_atoms**2 * width**3 >= 2**62:
            return None
        # one number for a shift, its negative for the opposite one; within the same atom the larger one names the pair
        code = (whole[:, 0] * width + whole[:, 1]) * width + whole[:, 2]
        code = np.where(from_ < to, -code, code)
        code = np.where(from_ == to, np.abs(code), code)
        key = key * width**3 + code + width**3 // 2
    _, first, of_edge = np.unique(key, return_index=True, return_inverse=True)
    if len(first) > WORTH_PAIRING * len(key):
        return None
    return Pairs(torch.from_numpy(first), torch.from_numpy(of_edge.reshape(-1)))
