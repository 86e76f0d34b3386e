"""What commands share: options, input, output that any terminal can show, progress, signals."""

from __future__ import annotations

import codecs
import contextlib
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steradian.config import KeysConfig, UnitsConfig
from steradian.config.precision import PRESETS
from steradian.evaluation.tables import Table, plain

if TYPE_CHECKING:
    from ase import Atoms

    from steradian.graph.structures import Structure
    from steradian.potential import Potential

__all__ = [
    "Progress",
    "RotationAverage",
    "Stopped",
    "check_json",
    "load",
    "parsed_units",
    "read",
    "read_atoms",
    "results",
    "say",
    "show",
]

BUNDLED = "bundled:"
DATA_HELP = "Labelled structures: extxyz, npz and others, or bundled:malonaldehyde (its test frames)."
Model = Annotated[Path, typer.Argument(help="Model file or folder of a run.", show_default=False)]
EnergyKey = Annotated[str | None, typer.Option(help="Name of the energies in the file.", show_default="usual names")]
ForcesKey = Annotated[str | None, typer.Option(help="Name of the forces in the file.", show_default="usual names")]
StressKey = Annotated[str | None, typer.Option(help="Name of the stress in the file.", show_default="usual names")]
TypeKey = Annotated[str, typer.Option(help="Name of the configuration types in the file.")]
Units = Annotated[
    str,
    typer.Option(
        metavar="ENERGY,LENGTH",
        help="Units of the file, such as kcal/mol,Angstrom.",
        show_default="what the file says, else eV,Angstrom",
    ),
]
EnergyOnly = Annotated[bool, typer.Option("--energy-only", help="The structures carry no forces.")]
Batch = Annotated[int, typer.Option(min=1, help="Structures predicted at once.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Precision = Annotated[
    str | None,
    typer.Option("--precision", "--dtype", help="float64, float32, mixed, half or tf32.", show_default="as trained"),
]
RotationAverage = Annotated[
    int | None,
    typer.Option(
        help="Average over 4, 12, 24 or 60 rotations, for models tied to the laboratory axes.", show_default="none"
    ),
]
Worst = Annotated[int, typer.Option(min=1, help="How many of the worst structures are listed.")]
Seed = Annotated[int, typer.Option(help="Of random numbers: rotations, bootstrap, velocities.")]
Results = Annotated[Path | None, typer.Option(help="Folder for report.html, pictures, JSON and npz.")]

#: letters that a terminal without Unicode gets instead
SPELLED = str.maketrans(
    {"Å": "A", "−": "-", "–": "-", "…": "...", "→": "->", "±": "+-", "∞": "inf", "·": ".", "α": "a"}
)


# ----------------------------------------------------------------------------------------------------------- input


def load(path: Path, device: str, precision: str | None, rotation_average: int | None = None) -> Potential:
    """A potential for inference.

    Raises:
        ValueError: no such device, precision or average, or a file that is no model.
    """
    import torch

    from steradian.build import load_potential

    if precision is not None and precision not in PRESETS:
        raise ValueError(f"--precision {precision}: choose {', '.join(PRESETS)}")
    try:
        place = torch.device(device)
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {device}: not available here; try --device cpu") from None
    potential = load_potential(path, device=place, precision=precision)
    return potential.for_inference(radial_table=False, rotation_average=rotation_average)


def read(data: str, keys: KeysConfig, units: UnitsConfig, require: tuple[str, ...]) -> list[Structure]:
    """Structures of a file, or the test frames of a bundled set.

    Raises:
        ValueError: what is wrong with the file, and which option mends it.
    """
    from steradian.data.files import read_structures
    from steradian.data.load import bundled_file
    from steradian.graph.structures import DataError

    if data.startswith(BUNDLED):
        return read_structures(bundled_file(data, "test"), require=require)
    try:
        return read_structures(Path(data), keys, units, require=require)
    except DataError as error:  # readers name the keys of a configuration; here they are options
        text = re.sub(r"data\.keys\.(\w+):? ?", lambda key: f"--{key[1].replace('_', '-')}-key ", str(error))
        raise DataError(re.sub(r"data\.units\.\w+:? ?", "--units ", text)) from None


def read_atoms(source: str | Path) -> Atoms:
    """The first structure of any file that ASE reads.

    Raises:
        ValueError: it cannot be read.
    """
    import ase.io

    if not Path(source).is_file():
        raise ValueError(f"{source}: no such file")
    try:
        atoms: Any = ase.io.read(source, index=0)
    except Exception as error:
        raise ValueError(f"{source}: ASE cannot read it ({' '.join(str(error).split())})") from None
    return atoms


def parsed_units(text: str) -> UnitsConfig:
    """Units from "ENERGY,LENGTH" or "ENERGY"."""
    energy, comma, length = (part.strip() for part in text.partition(","))
    return UnitsConfig(energy=energy or None, length=length if comma and length else None)


# ---------------------------------------------------------------------------------------------------------- output


@contextlib.contextmanager
def results(*folders: Path | None) -> Iterator[None]:
    """Make folders for results before the work, so that it is not lost for want of one; empty ones go again.

    Raises:
        ValueError: one cannot be made or written to.
    """
    from steradian.checkpoint import made_folder

    with contextlib.ExitStack() as made:
        for folder in folders:
            if folder is not None:
                try:
                    made.enter_context(made_folder(folder))
                except OSError as error:
                    raise ValueError(f"{folder}: cannot be used for the results ({error.strerror})") from None
        yield


def check_json(path: Path | None) -> Path | None:
    """The folder of a JSON file to be written.

    Raises:
        ValueError: the name is that of a folder.
    """
    if path is not None and path.is_dir():
        raise ValueError(f"--json {path}: is a folder; give the name of a file")
    return None if path is None else path.parent


def write_text(path: Path, content: str | Mapping[str, Any]) -> None:
    """Write text, or plain data as JSON, whole or not at all."""
    import json

    from steradian.checkpoint import write_atomically

    text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode())


def say(text: str, err: bool = False) -> None:
    """Print a line; control characters in names are shown, not obeyed."""
    typer.echo(plain(text), err=err)


def show(tables: list[Table]) -> None:
    """Print tables: with rules and weights in a terminal, as plain text into a file or pipe."""
    if sys.stdout.isatty():
        import rich

        for table in tables:
            rich.print(table.rich())
    else:
        typer.echo("\n".join(table.text() for table in tables))


def speak_any_encoding() -> None:
    """Print also where the terminal, or the file that output goes to, has no Unicode."""
    codecs.register_error("spelled", _spelled)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # streams of other kinds in tests and notebooks
            stream.reconfigure(errors="spelled")  # type: ignore[union-attr]


def _spelled(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(SPELLED)
    return "".join(letter if ord(letter) < 128 else "?" for letter in text), error.end


class Progress:
    """One bar per task on a terminal; elsewhere nothing, or what the caller prints where there are no bars.

    Args:
        totals: name of a task and its length, None where that is not known yet.
        unit: of the length.
        err: on standard error, and gone at the end.
    """

    def __init__(self, totals: Mapping[str, int | None], unit: str, err: bool = False) -> None:
        self.bars: Any = None
        self.started = time.monotonic()
        if (sys.stderr if err else sys.stdout).isatty():
            from rich import progress
            from rich.console import Console

            def column(text: str) -> Any:
                return progress.TextColumn(text, markup=False)

            self.bars = progress.Progress(
                *([column("{task.description:10}")] if len(totals) > 1 else []),
                progress.BarColumn(),
                column("{task.completed}/{task.total} " + unit),
                progress.TimeElapsedColumn(),
                column("left"),
                progress.TimeRemainingColumn(),
                column("{task.fields[note]}"),
                console=Console(stderr=err),
                transient=err,
            )
            self.tasks = {name: self.bars.add_task(name, total=total, note="") for name, total in totals.items()}

    def __enter__(self) -> Progress:
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars is not None:
            self.bars.stop()

    def update(self, name: str, completed: int, note: str, total: int | None = None) -> None:
        """Move a bar, where there are bars."""
        if self.bars is not None:
            self.bars.update(self.tasks[name], completed=completed, note=plain(note), total=total)


# --------------------------------------------------------------------------------------------------------- signals


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end; goes the way of Ctrl-C, so all that Ctrl-C saves is saved.

    Attributes:
        last: number of the signal that was raised last, or None.
    """

    last: int | None = None


def stop_on_signals() -> None:
    """SIGTERM (schedulers, ``kill``) and SIGHUP (a closed terminal) end a command as Ctrl-C does, with a line."""

    def stop(number: int, _: object) -> None:
        Stopped.last = number
        raise Stopped(signal.Signals(number).name)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, stop)
