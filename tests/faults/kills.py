"""Kills: commands that are ended by SIGKILL and given again end as if nothing had happened, or are refused in one line.

Run by hand: ``python tests/faults/kills.py [--only train md dataset evaluate] [--count N] [--seed S]``.

Every job runs once undisturbed. Then it is killed at random moments, and at every operation on files (opened for
writing, synchronised, renamed, removed ...) that the undisturbed run counts: just before it, and where something was
being written also with half of that on the disk. A third of the runs are killed once more when they go on. The last
command is never killed: after it the files have the content of the undisturbed run to the last bit (times aside), and
no other files are there.

All runs are forks of one process that has imported everything and uses one thread: no systems without ``fork``.
"""

from __future__ import annotations

import argparse
import builtins
import importlib.util
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"STERADIAN_BACKEND": "reference", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ase.io
import numpy as np
import torch
from ase.build import molecule
from matplotlib.figure import Figure

from steradian.build import build_potential, load_potential, save_potential
from steradian.checkpoint import read_arrays, read_json, read_model_file
from steradian.cli import main as command_line
from steradian.config import MACEConfig, ModelConfig, dump_config
from steradian.evaluation import report
from steradian.simulate import md
from steradian.training.record import RunDirectory, read_state
from tests.systems import STATISTICS
from tests.unit.training_cases import toy_config, toy_file

#: Kills at random moments, per kind of job; shared by the jobs of a kind.
COUNTS = {"train": 60, "md": 60, "dataset": 40, "evaluate": 30}
LONGEST = 120.0  # [s] of one command: longer is a hang
OF_OS = ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "truncate", "fsync")
truncate, kill = os.truncate, os.kill


# ------------------------------------------------------------------------------------------------ operations on files


class Operations:
    """Counts operations on files in a folder, and kills the process just before one of them.

    Args:
        folder: operations elsewhere (caches) do not count.
        at: number of the operation, from 1; 0: none.
        torn: cut what was last written to half of it first, where it was neither synchronised nor renamed since.
    """

    def __init__(self, folder: Path, at: int = 0, torn: bool = False) -> None:
        self.folder, self.at, self.torn = os.path.realpath(folder) + os.sep, at, torn
        self.seen: list[tuple[str, bool]] = []  # name, and whether something was being written
        self.written: tuple[str, int] | None = None  # path, and its length before

    def watch(self) -> None:
        """From now on, in this process, for good."""
        for name in OF_OS:
            setattr(os, name, partial(self._called, name, getattr(os, name)))
        shutil.rmtree = partial(self._called, "rmtree", shutil.rmtree)
        os.open = partial(self._opened_low, os.open)  # type: ignore[assignment]
        io.open = builtins.open = partial(self._opened, io.open)  # type: ignore[assignment]

    def _called(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if isinstance(args[0], int) or kwargs.get("dir_fd") is not None or self._inside(args[0]):
            self._step(name)
        result = function(*args, **kwargs)
        if name in ("fsync", "replace", "rename"):
            self.written = None
        return result

    def _opened_low(self, function: Callable[..., int], path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if not flags & (os.O_WRONLY | os.O_RDWR) or not self._inside(path):
            return function(path, flags, *args, **kwargs)
        self._step("os.open")
        handle = function(path, flags, *args, **kwargs)
        self.written = os.fspath(path), os.fstat(handle).st_size
        return handle

    def _opened(self, function: Callable[..., Any], file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, int) or mode.strip("bt") == "r" or not self._inside(file):
            return function(file, mode, *args, **kwargs)
        self._step("open")
        stream = function(file, mode, *args, **kwargs)
        self.written = os.fspath(file), os.fstat(stream.fileno()).st_size
        return stream

    def _inside(self, path: Any) -> bool:
        return os.path.abspath(os.fspath(path)).startswith(self.folder)

    def _step(self, name: str) -> None:
        path, before = self.written or ("", 0)
        size = os.stat(path).st_size if path and os.path.exists(path) else 0
        self.seen.append((name, size > before))
        if len(self.seen) == self.at:
            if self.torn and size > before:
                truncate(path, before + (size - before) // 2)
            kill(os.getpid(), signal.SIGKILL)


# --------------------------------------------------------------------------------------------------------------- runs


@dataclass
class Ended:
    """How a command ended: exit status (negative: signal), what it printed, seconds, operations on files."""

    status: int
    said: str
    seconds: float
    operations: list[tuple[str, bool]] = field(default_factory=list)


def call(arguments: list[str], folder: Path) -> int:
    """The command in this process, in a folder; its output goes where 1 and 2 go."""
    os.chdir(folder)
    sys.argv = ["steradian", *arguments]
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    status = 0
    try:
        command_line()
    except SystemExit as error:
        status = int(error.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def run(
    arguments: list[str], folder: Path, *, after: float = LONGEST, at: int = 0, torn: bool = False, count: bool = False
) -> Ended:
    """The command in a fork, killed after so many seconds or at an operation."""
    output, counted = folder.with_name(folder.name + ".out"), folder.with_name(folder.name + ".operations")
    started, printed = time.monotonic(), os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if not (child := os.fork()):
        status = 1
        try:
            os.setsid()
            os.dup2(printed, 1)
            os.dup2(printed, 2)
            operations = Operations(folder, at, torn)
            if at or count:
                operations.watch()
            status = call(arguments, folder)
            counted.write_text(json.dumps(operations.seen))
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    os.close(printed)
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() - started > after:
            kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
            break
        time.sleep(0.001)
    seconds = time.monotonic() - started
    assert seconds < LONGEST, f"{arguments} hangs"
    return Ended(
        os.waitstatus_to_exitcode(ended[1]),
        output.read_text(encoding="utf-8"),
        seconds,
        json.loads(counted.read_text()) if count else [],
    )


@dataclass(frozen=True)
class Job:
    """A command, and how one goes on after it was killed.

    Attributes:
        kind: ``train``, ``md``, ``dataset`` or ``evaluate``. name: of the job.
        command: that is killed.
        ways: commands that a user gives afterwards, the next where one is refused.
        content: everything in a folder that has to agree, by file.
        whole: sees that what lies in a folder after a kill can be read; raises.
        before: command that fills the folder first, and whose result may stay where ``command`` is to replace it.
        done: a refusal of the last way in which this stands means that the first command had ended already.
    """

    kind: str
    name: str
    command: list[str]
    ways: list[list[str]]
    content: Callable[[Path], dict[str, Any]]
    whole: Callable[[Path], None]
    before: list[str] | None = None
    done: str | None = None


class Trials:
    """All kills of a job in a folder of their own."""

    def __init__(self, job: Job, folder: Path, draw: random.Random) -> None:
        self.job, self.folder, self.draw = job, folder / job.name, draw
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []
        self.old: Path | None = None
        if job.before is not None:
            self.old = self._fresh("old")
            assert run(job.before, self.old).status == 0
        self._warm()
        self.true = self._fresh("true")
        self._copy_old(self.true)
        ended = run(job.command, self.true, count=True)
        assert ended.status == 0, ended.said
        self.operations, self.seconds = ended.operations, ended.seconds
        assert not self.differences(self.folder / "warm", self.true), "two undisturbed runs differ"

    def _fresh(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(parents=True)
        return path

    def _copy_old(self, folder: Path) -> None:
        if self.old is not None:
            shutil.copytree(self.old, folder, dirs_exist_ok=True)

    def _warm(self) -> None:
        """Fill this process's caches: forks then begin where a second run would."""
        folder = self._fresh("warm")
        self._copy_old(folder)
        kept = [os.dup(number) for number in (1, 2)]
        streams, handlers, place = (sys.stdout, sys.stderr), list(map(signal.getsignal, (1, 2, 15))), os.getcwd()
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        try:
            assert call(self.job.command, folder) == 0
        finally:
            for number, handle in zip((1, 2), kept):
                os.dup2(handle, number)
            (sys.stdout, sys.stderr) = streams
            for number, handler in zip((1, 2, 15), handlers):
                signal.signal(number, handler)
            os.chdir(place)

    def differences(self, folder: Path, true: Path) -> str:
        """What is not as in the undisturbed run: names of files, then their content."""
        names, expected = ({str(file.relative_to(place)) for file in place.rglob("*")} for place in (folder, true))
        if names != expected:
            return f"left: {sorted(names - expected)}, missing: {sorted(expected - names)}"
        found, wanted = self.job.content(folder), self.job.content(true)
        return ", ".join(name for name, value in wanted.items() if found[name] != value)

    def moments(self, count: int, most: int | None) -> list[dict[str, Any]]:
        """When runs are killed: so many times at random, and at every operation, or at so many of them."""
        at_operations = [
            {"at": number + 1, "torn": torn}
            for number, (_, writing) in enumerate(self.operations)
            for torn in ((False, True) if writing else (False,))
        ]
        if most is not None and most < len(at_operations):
            at_operations = self.draw.sample(at_operations, most)
        return [{"after": self.draw.random()} for _ in range(count)] + at_operations

    def killed(self, folder: Path, command: list[str], moment: dict[str, Any]) -> bool:
        """Whether the command was killed, not ended before."""
        if "after" in moment:
            return run(command, folder, after=moment["after"] * self.seconds).status < 0
        return run(command, folder, **moment).status < 0

    def trial(self, number: int, moment: dict[str, Any]) -> None:
        """Kill, go on, compare."""
        folder = self._fresh(str(number))
        self._copy_old(folder)
        where = self._described(moment)
        again = {"after": self.draw.random()} if self.draw.random() < 0.5 else {"at": self.draw.randrange(1, 12)}
        twice = self.draw.random() < 1 / 3
        try:
            killed = self.killed(folder, self.job.command, moment)
            self.outcomes["killed" if killed else "ended before"] += 1
            self.job.whole(folder)
            if twice:
                where += f", again {self._described(again)}"
                self.outcomes["killed twice"] += killed and self.killed(folder, self.job.ways[0], again)
                self.job.whole(folder)
            outcome = self.go_on(folder)
        except (AssertionError, ValueError, OSError) as error:
            self.faults.append(f"{self.job.name} {where} ({folder}): {error}")
            self.outcomes["WRONG"] += 1
            return
        self.outcomes[outcome] += 1
        shutil.rmtree(folder)

    def _described(self, moment: dict[str, Any]) -> str:
        if "after" in moment:
            return f"after {moment['after']:.2f} of its time"
        name = f" ({self.operations[moment['at'] - 1][0]})" if moment["at"] <= len(self.operations) else ""
        return f"at operation {moment['at']}{name}" + (", torn" if moment.get("torn") else "")

    def go_on(self, folder: Path) -> str:
        """Give the commands that a user gives until one is not refused; returns how it went.

        Raises:
            AssertionError: a refusal that is not one clear line, or files that are not those of an undisturbed run.
        """
        refusals = []
        for command in self.job.ways:
            ended = run(command, folder)
            assert "Traceback" not in ended.said, ended.said
            if ended.status == 0:
                break
            errors = [line for line in ended.said.splitlines() if line.startswith("error: ")]
            assert ended.status == 2, (ended.status, ended.said)
            assert len(errors) == 1, ended.said
            assert ended.said.rstrip().endswith(errors[0]), ended.said
            refusals.append(errors[0])
        else:
            assert self.job.done is not None, refusals
            assert self.job.done in refusals[-1], refusals
        difference = self.differences(folder, self.true)
        if difference and self.old is not None and not self.differences(folder, self.old):
            return "the old run stays"
        assert not difference, f"{difference}; refused before: {refusals}"
        return "refused, then equal" if refusals else "equal"


# --------------------------------------------------------------------------------------------------------------- jobs


TIMES = ("elapsed_s", "seconds", "seconds_per_structure", "frames_resumed")


def exact(value: Any) -> Any:
    """Nested data as something that is equal only to the last bit, without times."""
    if isinstance(value, torch.Tensor):
        return exact(value.numpy())
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items() if key not in TIMES}
    if isinstance(value, list | tuple):
        return [exact(item) for item in value]
    return repr(value)


def bytes_of(folder: Path, *names: str) -> dict[str, Any]:
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def training_jobs(work: Path) -> list[Job]:
    """A new run, and one that replaces another."""
    toy_file(work)
    files = {}
    for name, seed in (("new", 0), ("old", 1)):
        changes = (f"training.seed={seed}", "output=runs", "model.host.cutoff_A=3.5", "training.max_epochs=2")
        files[name] = work / f"{name}.yaml"
        files[name].write_text(dump_config(toy_config(work, "run", *changes)), encoding="utf-8")
    new, old = (["train", str(file), "--quiet"] for file in files.values())

    def content(folder: Path) -> dict[str, Any]:
        directory = RunDirectory(folder / "runs" / "run")
        rows = [line.split(",") for line in directory.metrics.read_text().splitlines()]
        return {
            "last.ckpt": exact(read_state(directory.state)),
            "model.safetensors": exact(read_model_file(directory.model)),
            "metrics.csv": [row[:2] + row[3:] for row in rows],
            **bytes_of(directory.path, "config.yaml", "statistics.json"),
        }

    def whole(folder: Path) -> None:
        directory = RunDirectory(folder / "runs" / "run")
        if directory.model.exists():
            load_potential(directory.model)
        if directory.state.exists():
            read_state(directory.state)

    replacing = [*new, "--overwrite"]
    ways = [["train", "--resume", "runs/run", "--quiet"], new, replacing]
    return [
        Job("train", "train", new, ways, content, whole),
        Job("train", "train-overwrite", replacing, ways, content, whole, before=old),
    ]


def simulation_jobs(work: Path) -> list[Job]:
    """Both engines; ASE's also where it replaces another run."""
    ase.io.write(work / "ethanol.xyz", molecule("CH3CH2OH"))
    names = ("trajectory.extxyz", "md.csv", "restart.json", "settings.json", "md.png")

    def whole(folder: Path) -> None:
        for name in ("restart.json", "settings.json"):
            if (folder / "md" / name).exists():
                read_json(folder / "md" / name)

    jobs = []
    for name, engine in (("md-ase", "ase"), ("md-device", "device"), ("md-overwrite", "ase")):
        command = [*("md", str(work / "model.safetensors"), str(work / "ethanol.xyz"), "--engine", engine)]
        command += ["--steps", "50", "--save-every", "10", "--out", "md"]
        replacing = [*command, "--overwrite"]
        ways = [[*command, "--resume"], command, replacing]
        before = [*command, "--seed", "1"] if name == "md-overwrite" else None
        first = replacing if before else command
        jobs.append(Job("md", name, first, ways, lambda folder: bytes_of(folder / "md", *names), whole, before))
    return jobs


def dataset_jobs(_: Path) -> list[Job]:
    """Water by xTB, as npz and as text."""
    jobs = []
    for suffix in ("npz", "xyz"):
        out = f"water.{suffix}"

        def content(folder: Path, out: str = out) -> dict[str, Any]:
            path, recipe = folder / out, folder / f"{out}.recipe.json"
            frames = exact(read_arrays(path)) if out.endswith("npz") else path.read_bytes()
            return {out: frames, recipe.name: exact(json.loads(recipe.read_text()))}

        def whole(folder: Path, out: str = out) -> None:
            if (folder / out).exists():  # it comes last
                content(folder, out)

        command = [*("dataset", "make", "--out", out, "--molecule", "H2O", "--no-progress", "--frames", "12")]
        command += ["--stride", "2", "--equilibration", "5", "--seed", "3"]
        jobs.append(Job("dataset", f"dataset-{suffix}", command, [command], content, whole, done=f"{out} exists"))
    return jobs


def evaluation_jobs(work: Path) -> list[Job]:
    """``evaluate`` and ``compare`` with all that they write."""
    frames = str(toy_file(work, 6))

    def content(folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for file in (file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")):
            if file.suffix == ".npz":
                arrays = read_arrays(file)
                value = exact({**arrays, "meta": json.loads(str(arrays["meta"]))})
            elif file.suffix == ".json":
                value = exact(json.loads(file.read_text()))
            elif file.suffix in (".html", ".txt"):
                text = re.sub(r"[0-9.]+ ms", "", file.read_text(encoding="utf-8"))
                value = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "", text)
                assert "</html>" in text or file.suffix == ".txt", f"{file} is cut"
            else:
                value = file.read_bytes()
            found[str(file.relative_to(folder))] = value
        return found

    def whole(folder: Path) -> None:
        content(folder)

    models = [str(work / "model.safetensors"), str(work / "other.safetensors")]
    evaluate = ["evaluate", models[0], frames, "--out", "out", "--json", "results/all.json"]
    compare = ["compare", *models, "--data", frames, "--out", "out", "--no-rotations"]
    return [
        Job("evaluate", "evaluate", evaluate, [evaluate], content, whole),
        Job("evaluate", "compare", compare, [compare], content, whole),
    ]


def make_cheap() -> None:
    """What takes most of the time and has no part in this: drawing, draws of the bootstrap, 100 steps to a restart."""

    def savefig(figure: Figure, file: Any, **_: Any) -> None:
        file.write(b"a picture" * 100)

    Figure.savefig = savefig  # type: ignore[method-assign, assignment]
    report.compare = partial(report.compare, num_samples=20)  # type: ignore[assignment]
    md.MDSettings = partial(md.MDSettings, restart_every=20)  # type: ignore[assignment, misc]


JOBS = {"train": training_jobs, "md": simulation_jobs, "dataset": dataset_jobs, "evaluate": evaluation_jobs}


def make_models(work: Path) -> None:
    host = MACEConfig(num_channels=4, l_max=1, correlation=2, radial_mlp=[8], cutoff_A=3.5, message_scale="mean")
    for seed, name in enumerate(("model", "other")):
        potential = build_potential(ModelConfig(host=host, precision="float64"), STATISTICS, seed=seed).eval()
        save_potential(work / f"{name}.safetensors", potential)


def kill_job(job: Job, count: int, most: int | None, work: Path, draw: random.Random) -> Trials:
    """All trials of a job, with a line that says how far it is."""
    trials = Trials(job, work, draw)
    moments, started = trials.moments(count, most), time.monotonic()
    for number, moment in enumerate(moments):
        trials.trial(number, moment)
        if sys.stderr.isatty() or (number + 1) % 50 == 0:
            line = f"{job.name}: {number + 1}/{len(moments)}, {len(trials.faults)} wrong "
            print(line, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
    outcomes = ", ".join(f"{number} {name}" for name, number in sorted(trials.outcomes.items()))
    print(
        f"{job.name}: {count} at random, {len(moments) - count} at {len(trials.operations)} operations in "
        f"{time.monotonic() - started:.0f} s (one run {trials.seconds:.2f} s): {outcomes}",
        flush=True,
    )
    for fault in trials.faults:
        print(f"  {fault}", flush=True)
    return trials


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="JOB", default=list(JOBS), help=f"{', '.join(JOBS)}, or one job")
    parser.add_argument("--count", type=int, help="kills at random moments per kind of job")
    parser.add_argument("--operations", type=int, help="operations per job at which it is killed; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="keep the folders of what went wrong")
    options = parser.parse_args()
    torch.set_num_threads(1)
    make_cheap()
    work = Path(tempfile.mkdtemp(prefix="steradian-kills-"))
    wrong = 0
    try:
        make_models(work)
        for kind in JOBS:
            jobs = [job for job in JOBS[kind](work) if {job.kind, job.name} & set(options.only)]
            if jobs and kind == "dataset" and importlib.util.find_spec("tblite") is None:
                print("dataset: not tried, tblite is not installed")
                continue
            count = COUNTS[kind] if options.count is None else options.count
            for index, job in enumerate(jobs):
                share = count // len(jobs) + (index < count % len(jobs))
                draw = random.Random(f"{options.seed} {job.name}")
                wrong += len(kill_job(job, share, options.operations, work, draw).faults)
    finally:
        if not (wrong and options.keep):
            shutil.rmtree(work, ignore_errors=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
