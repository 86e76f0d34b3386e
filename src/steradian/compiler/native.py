"""Machine code: made by LLVM on first use, kept on disk, loaded by later processes.

Code is keyed by what it is made of: the text of every module of this package that its maker imports, the arguments of
the maker, and the processor. So changed makers make new code, and nobody has to remember to say so. The cache is
``$STERADIAN_CACHE`` or ``~/.cache/steradian``, or a private folder among the system's temporary files where that cannot
be written. What is read from it will be executed, so a file counts only if this user (or root) alone can have written
it; it is written whole or not at all, and carries a checksum over its key and its content.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import re
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir

from steradian.compiler.cache import cache_folder
from steradian.compiler.lanes import I32, I64, Lanes

__all__ = [
    "Code",
    "cache_folder",
    "code_of",
    "function_of",
    "is_in_use",
    "keep_freed_memory",
    "run_tasks",
]

#: Name of the function in every module.
FUNCTION = "run"
#: Seconds of work after which the user is told.
WORTH_A_LINE = 1.0
#: Imports of this package in the text of a module, and what is imported from there, in brackets or on one line.
IMPORT = re.compile(r"^\s*(?:from|import) +(steradian[.\w]*)(?: +import +(\([^)]*\)|[\w ,]*))?", re.MULTILINE)
# LLVM's code generator is one object that serves one thread at a time.
_LOCK = threading.RLock()
_ENGINES: list[Any] = []
_seconds = 0.0


@dataclass
class Code:
    """A function in machine code.

    Attributes:
        call: takes int64 numbers, returns nothing.
        new: made in this process, and not kept yet: nobody has seen what it computes.
    """

    call: Callable
    key: str
    content: bytes
    new: bool

    def keep(self) -> None:
        """Keep new code for later processes."""
        if self.new:
            _write(self.key, self.content)
            self.new, self.content = False, b""


def function_of(name: str, maker: Callable[..., str], arguments: tuple, num_arguments: int) -> Callable:
    """The function ``run`` of what a maker returns for arguments that ``repr`` describes; see :func:`code_of`."""
    code = code_of(name, maker, arguments, num_arguments, repr(arguments))
    code.keep()
    return code.call


def code_of(name: str, maker: Callable[..., str], arguments: tuple, num_arguments: int, description: str) -> Code:
    """Machine code of a module in LLVM's language.

    Args:
        name: what it computes, for messages.
        maker: returns the text, of a module with a function ``run`` of int64 arguments; not called where the code is at
            hand.
        arguments: of the maker.
        num_arguments: of the function.
        description: all that the text depends on besides the source of the maker.
    """
    with _LOCK:
        key = key_of(maker, description)
        known = _read(key)
        content = _compile(name, lambda: maker(*arguments)) if known is None else known
        call = _load(content, num_arguments)
        return Code(call, key, content, True) if known is None else Code(call, key, b"", False)


def is_in_use() -> bool:
    """Whether this process has machine code."""
    return bool(_ENGINES)


# ----------------------------------------------------------------------------------------------------------------- keys


def key_of(maker: Callable[..., str], description: str) -> str:
    """What identifies code: its maker with all of its source, what it was asked for, LLVM, and the processor."""
    _, target = _target()
    whole = (target, maker.__module__, maker.__qualname__, source_of(maker.__module__), description)
    return hashlib.sha256("\0".join(whole).encode()).hexdigest()


@cache
def source_of(module: str) -> str:
    """A hash over the text of a module and of all modules of this package that it imports, directly or not."""
    found: dict[str, bytes] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = _text_of(name)
            for parent, names in IMPORT.findall(found[name].decode("utf-8", "replace")):
                # what is imported from a package may be a module
                waiting += [parent, *(f"{parent}.{one}" for one in re.findall(r"\w+", names))]
    whole = hashlib.sha256()
    for name in sorted(found):
        whole.update(hashlib.sha256(name.encode() + b"\0" + found[name]).digest())
    return whole.hexdigest()


def _text_of(module: str) -> bytes:
    """The source of a module of this package; nothing for what is no module."""
    try:
        specification = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a name in a module that is no package
        return b""
    if specification is None or not specification.origin:
        return b""
    loader: Any = specification.loader
    text: bytes = loader.get_data(specification.origin)  # from archives, too; compiled, where there is nothing else
    return text


# ------------------------------------------------------------------------------------------------------------ the cache


@cache
def _folders(chosen: str | None) -> tuple[tuple[Path, ...], Path | None]:
    """Folders that code is read from, and the one it is written to, for a value of ``STERADIAN_CACHE``."""
    readable: tuple[Path, ...] = ()
    try:
        folder = cache_folder() / "kernels"
        readable = (folder,)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK | os.X_OK):
            return readable, folder
        reason = f"{folder} cannot be written"
    except OSError as error:
        reason = f"{folder}: {error.strerror}"
    except RuntimeError:
        reason = "there is no home folder"
    own = _private_folder()
    where = "is made anew in every process" if own is None else f"is kept in {own}"
    print(f"steradian: machine code {where} ({reason}; STERADIAN_CACHE names another place)", file=sys.stderr)
    return (readable, None) if own is None else ((*readable, own), own)


def _private_folder() -> Path | None:
    """A folder of this user alone among the temporary files, which everybody can write to; None where another user was
    first to take its name."""
    user = os.getuid() if hasattr(os, "getuid") else "code"
    with contextlib.suppress(OSError):
        folder = Path(tempfile.gettempdir()) / f"steradian-{user}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = os.lstat(folder)
        if stat.S_ISDIR(status.st_mode) and _is_ours(status):  # and no link to somewhere else
            return folder
    return None


def _is_ours(status: os.stat_result) -> bool:
    """Whether nobody else can have written a file or folder, where the system knows owners."""
    if not hasattr(os, "geteuid"):
        return True
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _read(key: str) -> bytes | None:
    # no link to somebody else's file, and no pipe that never answers
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    for folder in _folders(os.environ.get("STERADIAN_CACHE"))[0]:
        with contextlib.suppress(OSError):
            with os.fdopen(os.open(folder / f"{key}.o", flags), "rb") as stream:
                status = os.fstat(stream.fileno())
                content = stream.read() if stat.S_ISREG(status.st_mode) and _is_ours(status) else b""
            if content[:32] == _checksum(key, content[32:]):
                return content[32:]
    return None


def _write(key: str, content: bytes) -> None:
    """Write a file under a name that cannot be foreseen, and give it its own when it is complete."""
    folder = _folders(os.environ.get("STERADIAN_CACHE"))[1]
    if folder is None:
        return
    with contextlib.suppress(OSError):  # a full disk, say: code is made again by the next process
        handle, temporary = tempfile.mkstemp(dir=folder)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(_checksum(key, content) + content)
            os.replace(temporary, folder / f"{key}.o")
        except OSError:
            os.unlink(temporary)


def _checksum(key: str, content: bytes) -> bytes:
    # with the key: a file under another file's name is not taken for it
    return hashlib.sha256(key.encode() + content).digest()


# ----------------------------------------------------------------------------------------------------------------- LLVM


@cache
def _target() -> tuple[Any, str]:
    """LLVM's code generator for this processor, and a description of both."""
    import llvmlite
    import llvmlite.binding as llvm

    keep_freed_memory()  # here begins the fast path, for which it matters
    with contextlib.suppress(RuntimeError):  # newer versions do this by themselves and say so by an error
        llvm.initialize()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(cpu=name, features=features, opt=2, reloc="pic", codemodel="small")
    return machine, f"{llvmlite.__version__} {target.triple} {name} {features}"


def _compile(name: str, make: Callable[[], str]) -> bytes:
    import llvmlite.binding as llvm

    global _seconds
    started = time.perf_counter()
    machine, _ = _target()
    code: bytes = machine.emit_object(llvm.parse_assembly(make()))
    before, _seconds = _seconds, _seconds + time.perf_counter() - started
    if before < WORTH_A_LINE <= _seconds:
        print("steradian: making machine code for this model (once; kept for later runs)", file=sys.stderr)
    if os.environ.get("STERADIAN_VERBOSE_KERNELS"):
        print(f"steradian: {name}: {time.perf_counter() - started:.2f} s, {len(code)} bytes", file=sys.stderr)
    return code


def _load(code: bytes, num_arguments: int) -> Callable:
    import llvmlite.binding as llvm

    machine, _ = _target()
    # Code reads its constants at a distance of 32 bits. LLVM's own memory manager asks the system for code and for
    # constants one after the other, and in a process with large libraries they may come to lie further apart, which
    # ends it. llvmlite's takes one block for both.
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine, use_lmm=True)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _ENGINES.append(engine)  # the code lives as long as its engine
    signature = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * num_arguments)
    return signature(engine.get_function_address(FUNCTION))


# -------------------------------------------------------------------------------------------------------------- memory


# of malloc.h
# By default large blocks go back to the system when they are freed. Every step takes the same ones again, and the
# system hands them out as empty pages, one fault each.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
#: Most that glibc takes as a threshold: blocks above it always come from the system and go back to it.
LARGEST_KEPT = 32 * 2**20
MOST_KEPT = 2**30


@cache
def keep_freed_memory() -> bool:
    """Let the C library keep up to 1 GiB of freed blocks of up to 32 MiB; whether it does.

    Only glibc can be told. ``STERADIAN_KEEP_MEMORY=0`` leaves the process as it is, and so does a user's own setting
    (``MALLOC_...`` or ``GLIBC_TUNABLES`` in the environment).
    """
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if chosen or os.environ.get("STERADIAN_KEEP_MEMORY", "1") == "0":
        return False
    try:
        library = ctypes.CDLL(None)
        _ = library.gnu_get_libc_version
        return bool(library.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and library.mallopt(M_TRIM_THRESHOLD, MOST_KEPT))
    except (OSError, AttributeError, TypeError):  # another C library, or none that can be asked
        return False


# ------------------------------------------------------------------------------------------------------------- threads


#: Numbers at the head of the table that :func:`thread_text` reads.
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
    # PyTorch's own threads are used: a second set would compete with them for the cores. Of two libraries nobody can
    # tell which one PyTorch calls.
    found = [path for path in sorted(files) if Path(path).name.startswith(("libgomp", "libiomp5", "libomp"))]
    if len(found) != 1:
        return None
    try:
        library = ctypes.CDLL(found[0])
        # GNU's entry point, which Intel's and LLVM's libraries have too
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
def _code_of_threads(count: int) -> int:
    """Address of what each thread runs, for kernels of ``count`` arguments."""
    return address_of(function_of("threads", thread_text, (count,), 1))


def thread_text(count: int) -> str:
    """LLVM's text of what each thread runs: tasks thread, thread + threads, ...

    The table it is given holds the kernel, the functions that return the thread's number and the number of threads, the
    number of tasks, and each task's ``count`` arguments.
    """
    lanes = Lanes(FUNCTION, 1, 8)
    b, (table,) = lanes.b, lanes.function.args
    kernel, number, threads, tasks = (lanes.integer_at(table, place) for place in range(HEAD))
    asking = ir.FunctionType(I32, [])
    me, together = (b.sext(b.call(lanes.at(address, asking), []), I64) for address in (number, threads))
    # dealt out by the number of threads that came, which may be smaller than the one asked for
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
    # a child has the thread that forked and no other; OpenMP would wait for the rest for ever
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
    library.parallel(_code_of_threads(len(tasks[0])), table.ctypes.data, min(threads, len(tasks)), 0)


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
