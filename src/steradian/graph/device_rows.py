"""Row indices sorted on their device, without waiting for it.

A sum over the rows of the work that share a target runs through them one target after the other, so it needs the rows
in order of their target and where each target begins. Both are made by operations of fixed shape on the device, and
kept as long as the index lives and does not change.

A CUDA graph replays what was recorded while the contents of its buffers change. So a recorded step
(:mod:`steradian.compiler.capture`) sorts every index anew, once, in the graph; except for indices that
:func:`keep_rows` was called for: their sorted form lies in buffers of its own, which :func:`update_rows` fills again,
outside the graph, whenever the index has new contents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from steradian.compiler.capture import capturing, step_number

__all__ = ["SortedRows", "keep_rows", "sorted_rows", "update_rows"]


@dataclass(frozen=True)
class SortedRows:
    """Rows of the work in order of their target.

    Attributes:
        order: ``[B]`` the rows in order; None where they are in order as they are.
        bounds: ``[num_rows + 1]`` where the rows of each target begin.
    """

    order: Tensor | None
    bounds: Tensor


@dataclass(frozen=True)
class _Entry:
    num_rows: int
    ascending: bool
    state: tuple[int, ...] | None  # None: kept up to date by the caller
    rows: SortedRows


_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def sorted_rows(index: Tensor, num_rows: int, ascending: bool = False) -> SortedRows:
    """The sorted form of an index ``[B]`` with values below ``num_rows``.

    Args:
        index: int64.
        num_rows: number of targets.
        ascending: the caller's promise that the index is in order; checked on the device without waiting.

    Raises:
        RuntimeError: on a CPU at once, on a GPU at some later call: an index said to ascend does not.
    """
    known = _KNOWN.get(index)
    if known is not None and known.num_rows == num_rows:
        kept = known.state is None
        if kept or (known.ascending == ascending and known.state == _state(index)):
            return known.rows
    rows = _sort(index, num_rows, ascending)
    if step_number() or not _recording(index):  # a recording that nobody announced cannot be told from the next one
        _KNOWN[index] = _Entry(num_rows, ascending, _state(index), rows)
    return rows


def keep_rows(index: Tensor, num_rows: int, ascending: bool = False) -> None:
    """Sort an index whose buffer will get new contents; call :func:`update_rows` whenever it has.

    Meant for the static buffers of CUDA graphs: the sorted form lies in static buffers too, and is not made anew at
    every replay.
    """
    _KNOWN[index] = _Entry(num_rows, ascending, None, _sort(index, num_rows, ascending))


def update_rows(index: Tensor) -> None:
    """Sort the new contents of an index into the buffers that :func:`keep_rows` made.

    Raises:
        KeyError: the index was not kept.
    """
    entry = _KNOWN.get(index)
    if entry is None or entry.state is not None:
        raise KeyError("keep_rows was not called for this index")
    new = _sort(index, entry.num_rows, entry.ascending)
    entry.rows.bounds.copy_(new.bounds)
    if entry.rows.order is not None and new.order is not None:
        entry.rows.order.copy_(new.order)


def _sort(index: Tensor, num_rows: int, ascending: bool) -> SortedRows:
    index = index.detach()
    targets = torch.arange(num_rows + 1, dtype=index.dtype, device=index.device)
    if ascending:
        if not capturing():
            torch._assert_async((index[1:] >= index[:-1]).all(), "row index said to ascend does not")
        return SortedRows(None, torch.searchsorted(index.contiguous(), targets))
    in_order, order = torch.sort(index, stable=True)
    return SortedRows(order, torch.searchsorted(in_order, targets))


def _state(index: Tensor) -> tuple[int, ...]:
    """Where a sorted form is valid: contents change unseen from one step of a recorded graph to the next."""
    version = -1 if index.is_inference() else index._version
    return version, index.data_ptr(), step_number(), _recording(index)


def _recording(index: Tensor) -> bool:
    return index.is_cuda and torch.cuda.is_current_stream_capturing()
