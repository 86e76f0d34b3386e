"""Freed memory stays with the process: large tensors come and go at every step, and fetching pages anew costs time."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from functools import cache

__all__ = ["keep_freed_memory"]

# names and numbers of GNU malloc.h; larger blocks than this are always fetched and given back one by one
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT, LARGEST = 1 << 30, 32 << 20


@cache
def keep_freed_memory() -> bool:
    """Ask GNU's C library to keep up to 1 GiB of freed memory, once; whether it agreed.

    Other C libraries are left alone, and so is a process whose user has set this up (``MALLOC_...`` or
    ``GLIBC_TUNABLES`` in the environment, or ``STERADIAN_KEEP_MEMORY=0``).
    """
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if chosen or os.environ.get("STERADIAN_KEEP_MEMORY") == "0" or not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 (raises AttributeError where it is another library)
        return bool(library.mallopt(M_MMAP_THRESHOLD, LARGEST)) and bool(library.mallopt(M_TRIM_THRESHOLD, KEPT))
    return False
