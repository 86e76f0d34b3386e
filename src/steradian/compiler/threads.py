"""Threads for kernels: those that PyTorch uses.

PyTorch's OpenMP threads stay awake for a while after each of its own parallel loops. Threads of another pool would
fight with them for the cores, so tasks are handed to the same ones, by way of the OpenMP library that is loaded
already. Where that library cannot be found a pool of Python threads takes the tasks.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

__all__ = ["run_tasks"]

#: LLVM's text of what each thread runs: tasks thread, thread + threads, ... The table it is given holds the kernel, the
#: functions that return the thread's number and the number of threads, the number of tasks, and each task's arguments.
MEMBER = """
define void @run(i64 %table) {{
entry:
  %p = inttoptr i64 %table to ptr
  %kernel_place = getelementptr i64, ptr %p, i64 0
  %kernel_address = load i64, ptr %kernel_place
  %kernel = inttoptr i64 %kernel_address to ptr
  %number_place = getelementptr i64, ptr %p, i64 1
  %number_address = load i64, ptr %number_place
  %number = inttoptr i64 %number_address to ptr
  %threads_place = getelementptr i64, ptr %p, i64 2
  %threads_address = load i64, ptr %threads_place
  %threads = inttoptr i64 %threads_address to ptr
  %tasks_place = getelementptr i64, ptr %p, i64 3
  %tasks = load i64, ptr %tasks_place
  %me32 = call i32 %number()
  %all32 = call i32 %threads()
  %me = sext i32 %me32 to i64
  %all = sext i32 %all32 to i64
  br label %head
head:
  %task = phi i64 [ %me, %entry ], [ %next, %body ]
  %more = icmp slt i64 %task, %tasks
  br i1 %more, label %body, label %done
body:
  %offset = mul i64 %task, {count}
  %start = add i64 %offset, 4
{loads}
  call void %kernel({arguments})
  %next = add i64 %task, %all
  br label %head
done:
  ret void
}}
"""
LOAD = """
  %place{k} = add i64 %start, {k}
  %pointer{k} = getelementptr i64, ptr %p, i64 %place{k}
  %argument{k} = load i64, ptr %pointer{k}
"""


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
    from steradian.compiler.native import compiled_text

    loads = "".join(LOAD.format(k=k) for k in range(count))
    text = MEMBER.format(count=count, loads=loads, arguments=", ".join(f"i64 %argument{k}" for k in range(count)))
    return address_of(compiled_text("threads", text, lambda: text, 1))


def address_of(function: Callable) -> int:
    """Where the machine code of a ctypes function begins."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


def run_tasks(function: Callable, tasks: Sequence[tuple[int, ...]], threads: int) -> None:
    """Call a kernel once per task (its int64 arguments), the tasks in any order and side by side."""
    library = _openmp()
    if library is None:
        pool = _pool(os.getpid(), threads)
        for future in [pool.submit(function, *task) for task in tasks]:
            future.result()
        return
    head = (address_of(function), library.thread_number, library.num_threads, len(tasks))
    table = np.array([*head, *(number for task in tasks for number in task)], dtype=np.int64)
    library.parallel(_member(len(tasks[0])), table.ctypes.data, min(threads, len(tasks)), 0)


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    # one pool per process: the threads of a pool do not survive a fork
    return ThreadPoolExecutor(threads, thread_name_prefix="steradian")
