"""Where what was compiled is kept; imports nothing, so that it can be asked at once."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """Where this user's code is kept; it need not exist.

    Raises:
        RuntimeError: there is no home folder.
    """
    chosen = os.environ.get("STERADIAN_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "steradian"
