"""Threads for kernels: those that PyTorch uses.

PyTorch's OpenMP threads stay awake for a while after each of its own parallel loops. Threads of another pool would
fight with them for the cores, so tasks are handed to the same ones, by way of the OpenMP library that is loaded
already. Where that library cannot be found a pool of Python threads takes the tasks.

A process made by ``fork`` gets a copy of the memory but not the threads, and OpenMP would wait for them for ever, in
PyTorch's own loops as well as here. So such a process is told to use one thread, if kernels had been made before it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from llvmlite import ir

from steradian.compiler.lanes import I32, I64, Lanes
from steradian.compiler.native import FUNCTION, function_of, is_in_use

__all__ = ["run_tasks"]

#: Numbers at the head of the table that :func:`member_text` reads.
HEAD = 4


@dataclass(frozen=True)
class _OpenMP:
    parallel: Callable
    thread_number: int
    num_threads: int


@cache
def _openmp() -> _OpenMP | None:
    """The OpenMP library in this process, or None."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return None
    files = {line.split(maxsplit=5)[5] for line in maps.splitlines() if len(line.split(maxsplit=5)) == 6}
    found = [path for path in sorted(files) if Path(path).name.startswith(("libgomp", "libiomp5", "libomp"))]
    if len(found) != 1:
        return None
    try:
        library = ctypes.CDLL(found[0])
        parallel = library.GOMP_parallel
        number, count = (
            ctypes.cast(getattr(library, name), ctypes.c_void_p).value
            for name in ("omp_get_thread_num", "omp_get_num_threads")
        )
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return _OpenMP(parallel, number or 0, count or 0)


@cache
def _member(count: int) -> int:
    """Address of what each thread runs, for kernels of ``count`` arguments."""
    return address_of(function_of("threads", member_text, (count,), 1))


def member_text(count: int) -> str:
    """LLVM's text of what each thread runs: tasks thread, thread + threads, ...

    The table it is given holds the kernel, the functions that return the thread's number and the number of threads, the
    number of tasks, and each task's ``count`` arguments.
    """
    lanes = Lanes(FUNCTION, 1, 8)
    b, (table,) = lanes.b, lanes.function.args
    kernel, number, threads, tasks = (lanes.integer_at(table, place) for place in range(HEAD))
    asking = ir.FunctionType(I32, [])
    me, together = (b.sext(b.call(lanes.at(address, asking), []), I64) for address in (number, threads))
    turns = b.sdiv(b.add(b.sub(tasks, me), b.sub(together, I64(1))), together)
    with lanes.loop(0, turns) as turn:
        task = b.add(me, b.mul(turn.index, together))
        start = b.add(b.mul(task, I64(count)), I64(HEAD))
        arguments = [lanes.integer_at(table, b.add(start, I64(place))) for place in range(count)]
        b.call(lanes.at(kernel, ir.FunctionType(ir.VoidType(), [I64] * count)), arguments)
    return lanes.finish()


def address_of(function: Callable) -> int:
    """Where the machine code of a ctypes function begins."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


_forked = False


def _after_fork() -> None:
    global _forked
    if is_in_use():
        _forked = True
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run_tasks(function: Callable, tasks: Sequence[tuple[int, ...]], threads: int) -> None:
    """Call a kernel once per task (its int64 arguments), the tasks in any order and side by side."""
    if _forked:
        _say_forked()
        for task in tasks:
            function(*task)
        return
    library = _openmp()
    if library is None:
        for future in [_pool(threads).submit(function, *task) for task in tasks]:
            future.result()
        return
    head = (address_of(function), library.thread_number, library.num_threads, len(tasks))
    table = np.array([*head, *(number for task in tasks for number in task)], dtype=np.int64)
    library.parallel(_member(len(tasks[0])), table.ctypes.data, min(threads, len(tasks)), 0)


@cache
def _say_forked() -> None:
    print(
        "steradian: kernels use one thread in a process forked after they were used; start processes by 'spawn' for"
        " more",
        file=sys.stderr,
    )


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="steradian")
