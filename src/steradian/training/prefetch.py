"""Batches made and copied to the device by a thread while the device works on the one before."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from steradian.graph import Graph

__all__ = ["prefetched", "to_device"]


def prefetched(make: Callable[[int], Any], count: int, ahead: int = 2) -> Iterator[Any]:
    """``make(0), make(1), ...``, made by a thread that is at most ``ahead`` of whoever takes them.

    An error in the thread is raised where its batch is taken. Leaving the loop early ends the thread.
    """
    line: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=max(1, ahead))
    stopped = threading.Event()

    def work() -> None:
        for index in range(count):
            try:
                item = (True, make(index))
            except BaseException as error:
                item = (False, error)
            while not stopped.is_set():
                try:
                    line.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if stopped.is_set() or not item[0]:
                return

    thread = threading.Thread(target=work, daemon=True, name="batches")
    thread.start()
    try:
        for _ in range(count):
            good, item = line.get()
            if not good:
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


def to_device(graph: Graph, device: torch.device, stream: Any = None) -> Graph:
    """The graph with its pairs on the device; copied from pinned memory on a stream of its own, which is waited for.

    Args:
        stream: ``torch.cuda.Stream`` to copy on; None copies as usual.
    """
    graph.prepared()
    if device.type != "cuda" or stream is None:
        return graph.to(device)
    pinned = graph.mapped(lambda value: value.pin_memory())
    with torch.cuda.device(device), torch.cuda.stream(stream):
        moved = pinned.mapped(lambda value: value.to(device, non_blocking=True))
        # this thread waits, not the one that trains; the copy is then complete for every stream
        stream.synchronize()
    return moved
