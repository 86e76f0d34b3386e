"""Freed memory kept for the next step.

A training step takes and frees the same tensors as the one before. By default the C library hands blocks of more than
some megabytes back to the system when they are freed, and the system clears every page when it is touched again: some
ten thousand page faults a step, a tenth of its time.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

__all__ = ["keep_freed_memory"]

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
