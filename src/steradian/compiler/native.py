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
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

__all__ = [
    "Code",
    "cache_folder",
    "code_of",
    "function_of",
    "is_in_use",
    "keep_freed_memory",
]

#: Name of the function in every module.
FUNCTION = "run"
#: Seconds of work after which the user is told.
WORTH_A_LINE = 1.0
#: Imports of this package in the text of a module, and what is imported from there, in brackets or on one line.
IMPORT = re.compile(r"^\s*(?:from|import) +(steradian[.\w]*)(?: +import +(\([^)]*\)|[\w ,]*))?", re.MULTILINE)
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


def cache_folder() -> Path:
    """Where this user's code is kept; it need not exist.

    Raises:
        RuntimeError: there is no home folder.
    """
    chosen = os.environ.get("STERADIAN_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "steradian"


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
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
#: Most that glibc takes as a threshold: blocks above it always come from the system and go back to it.
LARGEST_KEPT = 32 * 2**20
MOST_KEPT = 2**30


@cache
def keep_freed_memory() -> bool:
    """Let the C library keep up to 1 GiB of freed blocks of up to 32 MiB; whether it does.

    Only glibc can be told. ``STERADIAN_KEEP_MEMORY=0`` leaves the process as it is, and so does a user's own choice
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
