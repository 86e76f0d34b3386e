"""``steradian demo``: the main job on the data that comes with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

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
    from steradian.cli.attend import attend
    from steradian.cli.evaluate import compare

    out.mkdir(parents=True, exist_ok=True)
    runs = train_side_by_side(out / "runs", epochs, fresh)
    typer.echo("\ncomparing on 500 test frames of a second trajectory")
    compare([runs["MACE"], runs["MACE-MARA"]], data="bundled:malonaldehyde", out=out)
    attend(runs["MACE-MARA"], "bundled:malonaldehyde", out=out / "attention")
    model = runs["MACE-MARA"] / "model.safetensors"
    typer.echo(
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
    import subprocess
    import threading

    from steradian.config import load_config

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
        reader = threading.Thread(target=follow, args=(processes[label], label, board, runs[label]), daemon=True)
        reader.start()
        readers.append(reader)
    try:
        with board:
            codes = {label: process.wait() for label, process in processes.items()}
            for reader in readers:
                reader.join()
    except KeyboardInterrupt:
        for process in processes.values():  # a terminal sends Ctrl-C to them too; they save and end
            process.wait()
        typer.echo("\ninterrupted; the same command goes on from here", err=True)
        raise
    for label, code in codes.items():
        if code:
            raise ValueError(f"training {label} failed: {board.last[label]}")
    return runs


def config_path(name: str) -> Path:
    from importlib import resources

    return Path(str(resources.files("steradian.configs") / name))


def command(file: str, run: Path, epochs: int | None, fresh: bool) -> list[str]:
    """The command line that starts a training, or goes on with one."""
    import sys

    call = [sys.executable, "-m", "steradian", "train"]
    if (run / "last.ckpt").exists() and not fresh:
        call += ["--resume", str(run)]
    else:
        call += [str(config_path(file)), "--set", f"output={run.parent}", "--set", f"name={run.name}", "--overwrite"]
    call += ["--set", "training.threads=1"]
    if epochs is not None:
        call += ["--set", f"training.max_epochs={epochs}"]
    return call


def follow(process: Any, label: str, board: Board, run: Path) -> None:
    """Pass the lines of a training on to the board."""
    for line in process.stdout:
        if line.strip():
            board.show(label, line.rstrip())


class Board:
    """Progress of several trainings: bars on a terminal, plain lines elsewhere."""

    def __init__(self, epochs: dict[str, int]) -> None:
        import sys

        self.last = dict.fromkeys(epochs, "no output")
        self.bars: Any = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self.bars = Progress(
                TextColumn("{task.description:10}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} epochs"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self.tasks = {label: self.bars.add_task(label, total=total, note="") for label, total in epochs.items()}

    def __enter__(self) -> Board:
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars is not None:
            self.bars.stop()

    def show(self, label: str, line: str) -> None:
        self.last[label] = line
        if self.bars is None:
            typer.echo(f"{label:10} {line}")
            return
        import re

        found = re.match(r"epoch (\d+)/", line)
        if found:
            note = " ".join(re.findall(r"F mae \S+ \S+|E mae \S+ \S+", line))
            self.bars.update(self.tasks[label], completed=int(found.group(1)), note=note)
