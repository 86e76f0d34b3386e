"""Files that are whole or not there, folders that one process holds, and contents that carry a hash. No pickle.

A model is one safetensors file with weights, resolved configuration and dataset statistics. Disks, cables and editors
flip and cut bits without a word, so whatever is read back (models, restart points) carries a SHA-256 of its content;
npz files are checked by the checksums of their zip container.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

try:
    import fcntl
except ImportError:  # not a POSIX system: no locks
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "FORMAT_VERSION",
    "FolderInUseError",
    "ModelFileError",
    "check_entries",
    "explained",
    "held",
    "made_folder",
    "one_line",
    "open_atomically",
    "package_version",
    "read_arrays",
    "read_json",
    "read_model_file",
    "read_tensors",
    "write_atomically",
    "write_json",
    "write_model_file",
    "write_tensors",
]

#: 1: without a hash. 2: with one. 3: the scale of messages and the form of a gate are named; in files before they are
#: the published ones (see :mod:`steradian.config.earlier`).
FORMAT_VERSION = 3

#: Name of a temporary file, of which file it is.
TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp")

WAYS_OUT = {
    errno.ENOSPC: "free some space or write to another disk, then give the command again",
    errno.EDQUOT: "free some space or write to another disk, then give the command again",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder on another disk",
    errno.EEXIST: "choose another name",
    errno.ENOTDIR: "choose another name",
}


class ModelFileError(ValueError):
    """A file that is not a model of this package, or is damaged; the message says which."""


class FolderInUseError(ValueError):
    """Another process writes into a folder."""


def package_version() -> str:
    """Of steradian, or ``unknown`` where it is not installed."""
    try:
        return version("steradian")
    except PackageNotFoundError:
        return "unknown"


def one_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


# ------------------------------------------------------------------------------------------------------- whole files


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Errors of the operating system name the file that was to be written, and the way out.

    Raises:
        OSError: what came, with ``filename`` and ``strerror`` filled in.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        what = error.strerror or str(error)
        advice = WAYS_OUT.get(error.errno or 0)
        raise OSError(error.errno or 0, f"{what}: {advice}" if advice else what, str(path)) from None


@contextlib.contextmanager
def open_atomically(path: Path | str) -> Iterator[BinaryIO]:
    """A stream whose content becomes the file when the block ends well; whatever interrupts, the old file stays.

    The content is written beside the file under a name that cannot be guessed, through no link, and is on the disk
    before it takes the file's name. What killed commands left of the same file is removed first.

    Raises:
        OSError: it cannot be written; names the file and the way out.
    """
    path = Path(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent, path.name)
        temporary, stream = _temporary(path)
        try:
            with stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path | str, content: bytes) -> None:
    """Write a file so that it is either whole or not there; see :func:`open_atomically`."""
    with open_atomically(path) as stream:
        stream.write(content)


def _temporary(path: Path) -> tuple[Path, BinaryIO]:
    """A new file beside ``path``, locked as long as it is open, so that no other process takes it for a left one."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        # O_EXCL: made here and now, so neither a file nor a link of somebody else's
        stream = open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb")  # noqa: SIM115
        _lock(stream.fileno(), wait=True)
        if not fcntl or os.fstat(stream.fileno()).st_nlink:
            return temporary, stream
        stream.close()  # swept between being made and being locked


def _sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left of a file, or of all files: temporary files that nobody holds."""
    for entry in os.scandir(folder):
        left = TEMPORARY.fullmatch(entry.name)
        if left and name in (None, left[1]) and entry.is_file(follow_symlinks=False):
            with contextlib.suppress(OSError), open(entry.path, "rb") as stream:
                if _lock(stream.fileno(), unlockable=False):
                    os.unlink(entry.path)


def _lock(descriptor: int, wait: bool = False, unlockable: bool = True) -> bool:
    """Lock an open file until it is closed; ``unlockable`` is the answer of systems without locks."""
    if fcntl is None:
        return unlockable
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return unlockable
    return True


# ----------------------------------------------------------------------------------------------------------- folders


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder for results and see that it can be written to; if nothing comes into it, it goes again.

    Raises:
        OSError: it cannot be made or written to; names it and the way out.
    """
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder, "probe")
        temporary, stream = _temporary(folder / "probe")
        stream.close()
        temporary.unlink(missing_ok=True)  # another process may have swept it since it is closed
    try:
        yield
    finally:
        for parent in missing:
            with contextlib.suppress(OSError):  # something is in it
                parent.rmdir()


@contextlib.contextmanager
def held(folder: Path, doing: str = "working") -> Iterator[None]:
    """Keep other processes from writing into a folder, which is made; a killed process holds nothing.

    Temporary files that killed processes left in it are removed.

    Args:
        folder: of the results.
        doing: what the other process does there, for the message.

    Raises:
        FolderInUseError: another process holds it.
        OSError: the folder cannot be made or written to.
    """
    file = folder / ".lock"
    with made_folder(folder):
        while True:
            with explained(folder):
                lock = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            try:
                if not _lock(lock):
                    raise FolderInUseError(f"{folder}: another process is {doing} there; wait for it to end")
                # whoever held it before may have removed the file after it was opened here: then it locks nothing
                if not file.exists() or not os.path.samestat(os.fstat(lock), os.stat(file)):
                    continue
                _sweep(folder)
                try:
                    yield
                finally:
                    file.unlink(missing_ok=True)
                return
            finally:
                os.close(lock)


# --------------------------------------------------------------------------------------------- contents with a hash


def write_json(path: Path | str, content: Mapping[str, Any]) -> None:
    """Write plain data with its hash, whole or not at all; see :func:`read_json`."""
    write_atomically(path, json.dumps({"format": FORMAT_VERSION, **content, "sha256": _digest_of(content)}).encode())


def read_json(path: Path | str) -> dict[str, Any]:
    """What :func:`write_json` wrote; files of earlier versions have no hash and are read with a line that says so.

    Raises:
        ValueError: not JSON, or damaged.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no dictionary")
        digest, hashed = content.pop("sha256", None), content.pop("format", None)
        damaged = digest != _digest_of(content) if digest or hashed else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, it cannot be read ({one_line(error)})") from None
    if damaged:
        raise ValueError(f"{path}: damaged, its content is not what was written (the hash differs)")
    if damaged is None:
        _say_unchecked(path)
    return content


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _say_unchecked(path: Path | str) -> None:
    print(f"steradian: {path} was written without a hash, so damage to it cannot be seen", file=sys.stderr)


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], kind: str, header: Mapping[str, Any]) -> None:
    """Write tensors and plain data to a safetensors file with a hash over both.

    Args:
        path: of the file.
        tensors: by name.
        kind: under which name the header stands in the file.
        header: plain data.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = json.dumps({"format_version": FORMAT_VERSION, "steradian_version": package_version(), **header})
    write_atomically(path, save(tensors, metadata={kind: text, "sha256": _digest(text, tensors)}))


def read_tensors(path: Path | str, kind: str, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`write_tensors` wrote.

    Args:
        path: of the file.
        kind: under which name the header stands in the file.
        what: kind of file, for messages.

    Raises:
        ModelFileError: damaged, of another kind, or of a later format.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise ModelFileError(f"{path}: not a safetensors file, or damaged ({one_line(error)})") from None
    if kind not in metadata:
        raise ModelFileError(f"{path}: a safetensors file, but not {what}")
    try:
        header = json.loads(metadata[kind])
        found, written_by = int(header["format_version"]), header.get("steradian_version", "unknown")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFileError(f"{path}: damaged, its header cannot be read ({one_line(error)})") from None
    digest = metadata.get("sha256")
    if digest == _digest(metadata[kind], tensors):
        if found > FORMAT_VERSION:
            raise ModelFileError(f"{path}: written by the newer steradian {written_by}; upgrade steradian to read it")
    elif digest is not None or found != 1:
        raise ModelFileError(f"{path}: damaged, its content is not what was written (the hash differs)")
    else:
        _say_unchecked(path)
    return tensors, header


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the header and of every tensor's name, format, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_entries(stream: BinaryIO) -> None:
    """Refuse a zip container without all of its entries; the stream is left at its start.

    The lengths in its directory have no checksum: where one is damaged, what follows it is skipped without a word.

    Raises:
        ValueError: no zip container, or entries are missing.
        zipfile.BadZipFile: its directory is damaged.
    """
    if not zipfile.is_zipfile(stream):
        raise ValueError("it is no zip container")
    with zipfile.ZipFile(stream) as container:
        found = len(set(container.namelist()))  # one name twice: the other one was damaged
    stream.seek(max(stream.seek(0, os.SEEK_END) - 22 - 65535, 0))
    end = stream.read()
    announced = struct.unpack_from("<H", end, end.rindex(b"PK\x05\x06") + 10)[0]
    if announced not in (found, 0xFFFF):  # with more entries than that their number stands elsewhere
        raise ValueError(f"{found} of {announced} entries are left")
    stream.seek(0)


def read_arrays(path: Path | str) -> dict[str, np.ndarray]:
    """All arrays of an npz file; no pickle.

    Raises:
        ValueError: it cannot be read, or is damaged; one line.
    """
    try:
        with open(path, "rb") as stream:
            check_entries(stream)
            with np.load(stream, allow_pickle=False) as file:  # compares the checksums
                return {name: file[name] for name in file.files}
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or one_line(error)})") from None
    except (
        *(ValueError, KeyError, EOFError, MemoryError, OverflowError, RuntimeError, NotImplementedError),
        *(zipfile.BadZipFile, zlib.error, struct.error),
    ) as error:
        raise ValueError(f"{path}: not an npz file, or damaged ({one_line(error)})") from None


# ------------------------------------------------------------------------------------------------------------ models


def write_model_file(
    path: Path | str,
    weights: Mapping[str, Tensor],
    model: Mapping[str, Any],
    statistics: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> None:
    """Write weights and everything needed to rebuild the model. See :func:`read_model_file`."""
    write_tensors(path, weights, "steradian", {"model": model, "statistics": statistics, "extra": extra})


def read_model_file(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and header (``model``, ``statistics``, ``extra``, ``format_version``, ``steradian_version``).

    Raises:
        ModelFileError: missing, damaged, not a steradian model, or of a later format.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise ModelFileError(f"{path}: no such model file; give a .safetensors file or the folder of a training run")
    weights, header = read_tensors(path, "steradian", "a steradian model")
    missing = [key for key in ("model", "statistics", "extra") if not isinstance(header.get(key), dict)]
    if missing:
        raise ModelFileError(f"{path}: damaged, its header lacks {', '.join(missing)}")
    return weights, header
