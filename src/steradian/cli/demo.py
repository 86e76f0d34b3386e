"""``steradian demo``: the main job on the data that comes with the package."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from steradian.cli.attend import attend
from steradian.cli.common import Progress, Stopped, say
from steradian.cli.evaluate import compare
from steradian.config import load_config

__all__ = ["demo"]

MODELS = {"MACE": "demo_mace.yaml", "MACE-MARA": "demo_mace_mara.yaml"}


def demo(
    out: Annotated[Path, typer.Option(help="Folder for runs, pictures and report.")] = Path("demo_output"),
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of each model.", show_default="32")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again instead of going on.")] = False,
) -> None:
    """Train MACE with and without MARA on malonaldehyde, compare them, write report.html.

    Both train side by side, one thread each. An interrupted demo goes on where it stopped.

    steradian demo --out demo_output
    """
    out.mkdir(parents=True, exist_ok=True)
    runs = train_side_by_side(out / "runs", epochs, fresh)
    say("\ncomparing on 500 test frames of a second trajectory")
    compare([runs["MACE"], runs["MACE-MARA"]], data="bundled:malonaldehyde", out=out)
    attend(runs["MACE-MARA"], "bundled:malonaldehyde", out=out / "attention")
    model = runs["MACE-MARA"] / "model.safetensors"
    say(
        f"\nopen {out / 'report.html'}\nnext, for example:\n"
        f"  steradian inspect {model} --rotations bundled:malonaldehyde\n"
        f"  steradian evaluate {model} bundled:malonaldehyde --rotations\n"
        f"  steradian train --data my.xyz"
    )


def train_side_by_side(folder: Path, epochs: int | None, fresh: bool) -> dict[str, Path]:
    """Run one process per model and show their progress; returns the folders of the runs.

    Raises:
        ValueError: a training failed; says where its log is.
        KeyboardInterrupt: passed on once every process has saved its state.
    """
    runs, processes, readers = {}, {}, []
    folder.mkdir(parents=True, exist_ok=True)
    board = Board(
        {label: epochs or load_config(config_path(file)).training.max_epochs for label, file in MODELS.items()}
    )
    for label, file in MODELS.items():
        runs[label] = folder / load_config(config_path(file)).name
        processes[label] = subprocess.Popen(
            command(file, runs[label], epochs, fresh), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        reader = threading.Thread(target=follow, args=(processes[label], label, board), daemon=True)
        reader.start()
        readers.append(reader)
    try:
        with board.progress:
            codes = {label: process.wait() for label, process in processes.items()}
            for reader in readers:
                reader.join()
    except KeyboardInterrupt as error:
        for process in processes.values():
            if isinstance(error, Stopped):  # a terminal sends Ctrl-C to them too; kill does not
                process.terminate()
        for process in processes.values():  # they save and end
            process.wait()
        say("\nstopped; the same command goes on from here", err=True)
        raise
    for label, code in codes.items():
        if code:
            raise ValueError(f"training {label} failed: {board.last[label]}")
    return runs


def config_path(name: str) -> Path:
    return Path(str(resources.files("steradian.data") / "bundled" / name))


def command(file: str, run: Path, epochs: int | None, fresh: bool) -> list[str]:
    """The command line that starts a training, or goes on with one."""
    call = [sys.executable, "-m", "steradian", "train"]
    if (run / "last.ckpt").exists() and not fresh:
        call += ["--resume", str(run)]
    else:
        call += [str(config_path(file)), "--set", f"output={run.parent}", "--set", f"name={run.name}", "--overwrite"]
    call += ["--set", "training.threads=1"]
    if epochs is not None:
        call += ["--set", f"training.max_epochs={epochs}"]
    return call


def follow(process: Any, label: str, board: Board) -> None:
    """Pass the lines of a training on to the board."""
    for line in process.stdout:
        if line.strip():
            board.show(label, line.rstrip())


class Board:
    """Progress of several trainings: bars on a terminal, plain lines elsewhere."""

    def __init__(self, epochs: dict[str, int]) -> None:
        self.last = dict.fromkeys(epochs, "no output")
        self.progress = Progress(epochs, "epochs")

    def show(self, label: str, line: str) -> None:
        """A line that one of them printed."""
        self.last[label] = line
        found = re.match(r"epoch (\d+)/", line)
        if self.progress.bars is None:
            say(f"{label:10} {line}")
        elif found:
            note = " ".join(re.findall(r"F mae \S+ \S+|E mae \S+ \S+", line))
            self.progress.update(label, int(found[1]), note)
