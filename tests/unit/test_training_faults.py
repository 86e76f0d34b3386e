"""Starts that fail leave nothing, damaged records are refused, a replaced run stays until the new one can go on."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from steradian import fit
from steradian.config import ConfigError, parse_config
from steradian.graph.structures import DataError
from steradian.training import record
from steradian.training.loop import DivergenceError, Loop
from steradian.training.record import FORMAT, MARK, WITHOUT_HASH, ResumeError, RunDirectory, WriteError, read_state
from steradian.training.report import Reporter
from tests.unit.training_cases import assert_same_run, start, toy_config, toy_file, toy_frames, wait_for_step

SMALL = ("model.edge_gate={kind: none}", "training.max_epochs=1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy_file(tmp_path)
    return tmp_path


def labelled(atoms: Atoms, **labels: Any) -> Atoms:
    atoms.calc = SinglePointCalculator(atoms, **{"energy": -1.0, "forces": np.zeros((len(atoms), 3)), **labels})
    return atoms


# --------------------------------------------------------------------------------------------- before anything is made


def test_validation_frame_with_two_atoms_at_one_place(folder: Path) -> None:
    """In the second validation batch, which the first steps would not have seen; file and frame are named."""
    frames = toy_frames(4, seed=5)
    frames[3].positions[1] = frames[3].positions[0]
    write(folder / "check.xyz", frames, format="extxyz")
    settings = ("data.split={}", f"data.validation='{folder}/check.xyz'", "data.validation_batch={graphs: 2}")
    with pytest.raises(DataError, match=r"check\.xyz, frame 3: atoms 0 and 1 are at the same place"):
        fit(toy_config(folder, "run", *SMALL, *settings), progress=False)
    assert not (folder / "runs").exists()


def test_training_frame_with_two_atoms_at_one_place(folder: Path) -> None:
    frames = toy_frames()
    frames[7].positions[2] = frames[7].positions[0]
    write(folder / "toy.xyz", frames, format="extxyz")
    with pytest.raises(DataError, match=r"toy\.xyz, frame 7: atoms 0 and 2 are at the same place"):
        fit(toy_config(folder, "run", *SMALL), progress=False)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_first_batch_that_cannot_be_computed_leaves_everything(
    folder: Path, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(folder, "run", *SMALL)
    path = fit(config, progress=False).run_dir if overwrite else config.output / config.name
    before = {file.name: file.read_bytes() for file in path.iterdir()} if overwrite else {}
    monkeypatch.setattr("steradian.training.loop.Steps.predict", lambda self, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(config, progress=False, overwrite=overwrite)
    assert ({file.name: file.read_bytes() for file in path.iterdir()} if path.exists() else {}) == before


def test_loss_of_the_start_that_is_not_finite(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "steradian.training.loop.Steps.loss_of", lambda *_: (torch.tensor(np.nan), torch.tensor(np.nan))
    )
    with pytest.raises(DivergenceError, match=r"before training; .*nothing was written"):
        fit(toy_config(folder, "run", *SMALL), progress=False)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("atoms", ["Ar2", "Ar"])
@pytest.mark.parametrize("host", ["mace", "nequip"])
def test_frames_without_neighbours(folder: Path, atoms: str, host: str) -> None:
    positions = [[0.0, 0, 0], [0, 0, 6.5]][: len(Atoms(atoms))]
    write(folder / "toy.xyz", [labelled(Atoms(atoms, positions)) for _ in range(8)], format="extxyz")
    config = parse_config(
        {
            "output": str(folder / "runs"),
            "data": {"train": str(folder / "toy.xyz")},
            "model": {"host": {"kind": host, "cutoff_A": 4.0}},
        }
    )
    expected = {
        "Ar2": "no atom .* has a neighbour within 4 Å .*6.5 Å apart.*cutoff_A.*units",
        "Ar": "8 isolated atoms and no other frame: add frames",
    }
    with pytest.raises(DataError, match=expected[atoms]):
        fit(config, progress=False)
    assert not (folder / "runs").exists()


def test_single_frame_says_the_way_out(folder: Path) -> None:
    toy_file(folder, 1)
    for split in ("{}", "{validation: 0}"):
        with pytest.raises(ValueError, match=r"data\.validation.*more frames|more frames.*data\.validation"):
            fit(toy_config(folder, "run", f"data.split={split}", *SMALL), progress=False)


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "..", ".", ""])
def test_names_stay_inside_the_output(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="inside 'output'"):
        toy_config(folder, name)
    assert toy_config(folder, "set/run").name == "set/run"


# ------------------------------------------------------------------------------------------------------- damaged files


def test_flipped_bits_of_a_state_are_refused(folder: Path) -> None:
    config = toy_config(folder, "flipped", *SMALL)
    state = RunDirectory(fit(config, progress=False).run_dir).state
    content = state.read_bytes()
    assert read_state(state)["format"] == FORMAT
    generator = random.Random(0)
    places = [generator.randrange(8 * len(content)) for _ in range(200)]
    places += [8 * (len(content) - back) + 3 for back in range(1, 65 + len(MARK))]  # in the hash and its mark
    for place in places:
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        state.write_bytes(damaged)
        with pytest.raises(ResumeError, match=r"damaged|cannot be read"):
            read_state(state)
    for length in range(0, len(content), len(content) // 40):
        state.write_bytes(content[:length])
        with pytest.raises(ResumeError, match=r"damaged|cannot be read"):
            read_state(state)


def test_state_without_hash_is_taken_with_a_note(folder: Path) -> None:
    config = toy_config(folder, "earlier", *SMALL)
    directory = RunDirectory(fit(config, progress=False).run_dir)
    state = read_state(directory.state)
    torch.save({**state, "format": WITHOUT_HASH}, directory.state)
    rows: list[tuple[str, str]] = []
    longer = toy_config(folder, "earlier", SMALL[0], "training.max_epochs=2")
    assert fit(longer, resume=directory.path, progress=False, show_plan=rows.extend).epochs == 2
    assert any("no check sum" in value for name, value in rows if name == "note")
    assert read_state(directory.state)["format"] == FORMAT


@pytest.mark.parametrize("damage", ["cut", "zeros", "gone"])
def test_table_that_lacks_rows_is_refused(folder: Path, damage: str) -> None:
    config = toy_config(folder, "table", SMALL[0], "training.max_epochs=3")
    directory = RunDirectory(fit(config, progress=False).run_dir)
    lines = directory.metrics.read_bytes().splitlines(keepends=True)
    if damage == "gone":
        directory.metrics.unlink()
    else:
        last = lines[3][:9] if damage == "cut" else b"\0" * (len(lines[3]) - 1) + b"\n"
        directory.metrics.write_bytes(b"".join([*lines[:3], last]))
    longer = toy_config(folder, "table", SMALL[0], "training.max_epochs=4")
    left = 0 if damage == "gone" else 2
    with pytest.raises(ResumeError, match=rf"metrics\.csv: {left} of 3 rows are left"):
        fit(longer, resume=directory.path, progress=False)
    directory.metrics.write_bytes(b"".join(lines) + b"4,half a row")
    assert fit(longer, resume=directory.path, progress=False).epochs == 4
    assert directory.metrics.read_bytes().splitlines(keepends=True)[:4] == lines


# ----------------------------------------------------------------------------------------------- replacing, full disks


def test_replaced_run_stays_until_the_new_one_has_its_state(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy_config(folder, "run", *SMALL)
    directory = RunDirectory(fit(config, progress=False).run_dir)
    (directory.path / "tensorboard").mkdir()
    (directory.path / "notes.md").write_text("mine")
    before = {file.name: file.read_bytes() for file in directory.path.iterdir() if file.is_file()}
    monkeypatch.setattr(Loop, "save", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(config, progress=False, overwrite=True)
    assert {file.name: file.read_bytes() for file in directory.path.iterdir() if file.is_file()} == before
    assert not directory.staging.exists()
    monkeypatch.undo()
    other = toy_config(folder, "run", *SMALL, "training.seed=3")
    fit(other, progress=False, overwrite=True)
    assert directory.read_config() == other
    assert directory.state.read_bytes() != before["last.ckpt"]
    assert (directory.path / "notes.md").read_text() == "mine"
    assert not (directory.path / "tensorboard").exists()
    assert not directory.staging.exists()


@pytest.mark.parametrize("step", range(14))
def test_replacing_cut_short_never_mixes_two_runs(folder: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends at one of the operations on files that put a new run into its place."""
    config = toy_config(folder, "run", *SMALL)
    directory = RunDirectory(fit(config, progress=False).run_dir)
    old = read_state(directory.state)
    done = 0

    class Killed(BaseException): ...

    def counted(original: Any) -> Any:
        def operation(path: Path, *arguments: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done == step + 1:
                raise Killed
            return original(path, *arguments, **options)

        return operation

    settle = RunDirectory.settle

    def watched(self: RunDirectory) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", counted(Path.unlink))
            patch.setattr(Path, "replace", counted(Path.replace))
            settle(self)

    monkeypatch.setattr(RunDirectory, "settle", watched)
    other = toy_config(folder, "run", *SMALL, "training.seed=3")
    try:
        fit(other, progress=False, overwrite=True)
    except Killed:
        if directory.state.exists():
            assert step == 0, "the old state is the first that goes"
            assert directory.read_config() == config
            assert torch.equal(
                read_state(directory.state)["ranks"][0]["random"]["torch"], old["ranks"][0]["random"]["torch"]
            )
        else:
            with pytest.raises(ValueError, match=r"no saved state|cannot be read|other settings"):
                fit(other, resume=directory.path, progress=False)
    else:
        assert directory.read_config() == other
    monkeypatch.undo()
    assert fit(other, progress=False, overwrite=True).reason == "finished"


LIMITED = """
import resource, sys
from steradian.config import load_config
from steradian.training.run import fit
config = load_config(sys.argv[1])
size = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
try:
    fit(config, progress=False)
except ValueError as error:
    sys.exit(f"error: {error}")
"""


def test_disk_that_takes_no_more_names_file_and_way_out(folder: Path) -> None:
    """A limit on the size of files stands for a full disk: the system refuses to write in the same place."""
    from steradian.config import dump_config

    config = toy_config(folder, "full", *SMALL)
    file = folder / "full.yaml"
    file.write_text(dump_config(config))
    size = len(RunDirectory(fit(toy_config(folder, "fits", *SMALL), progress=False).run_dir).state.read_bytes())
    answer = subprocess.run(
        [sys.executable, "-c", LIMITED, str(file), str(size // 2)], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 1, answer.stderr
    assert re.search(r"last\.ckpt: cannot be written \(.*\); make room there and start again$", answer.stderr.strip())
    assert "Traceback" not in answer.stderr
    assert not (folder / "runs/full").exists()


def test_disk_that_fills_up_leaves_a_state_to_go_on_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = RunDirectory(fit(toy_config(folder, "whole"), progress=False).run_dir)
    config = toy_config(folder, "filled")
    directory = RunDirectory(config.output / config.name)
    written = record.RunDirectory.add_row

    def full(self: RunDirectory, row: Any) -> None:
        if row["epoch"] < 3:
            written(self, row)
            return
        with self.writing(self.metrics):
            with open(self.metrics, "a") as file:
                file.write("3,1")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunDirectory, "add_row", full)
    with pytest.raises(WriteError, match=r"metrics\.csv.*No space left.*go on with --resume .*filled"):
        fit(config, progress=False)
    monkeypatch.undo()
    fit(config, resume=directory.path, progress=False)
    assert_same_run(whole, directory)


# -------------------------------------------------------------------------------------- nobody listens, signals, nohup


def test_closed_output_saves_and_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = RunDirectory(fit(toy_config(folder, "whole"), progress=False).run_dir)

    def broken(self: Reporter, position: Any, losses: Any) -> None:
        if position.step == 5:
            raise BrokenPipeError(32, "Broken pipe")

    config = toy_config(folder, "pipe")
    monkeypatch.setattr(Reporter, "step", broken)
    result = fit(config, progress=False)
    assert (result.reason, result.steps) == ("interrupted", 5)
    monkeypatch.undo()
    fit(config, resume=result.run_dir, progress=False)
    assert_same_run(whole, RunDirectory(result.run_dir))


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs POSIX signals")
@pytest.mark.parametrize("ignored", [False, True])
def test_closed_terminal_saves_except_under_nohup(folder: Path, ignored: bool) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN) if ignored else None
    try:
        process, directory = start(folder, "hangup")  # a child inherits that a signal is ignored
    finally:
        if ignored:
            signal.signal(signal.SIGHUP, before)
    wait_for_step(process, directory, 1)
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=120)
    assert process.returncode == (0 if ignored else 130), (out, err)
    assert ("--resume" in out) is not ignored
    assert "Traceback" not in err
    assert read_state(directory.state)["position"]["step"] == (
        16 if ignored else read_state(directory.state)["position"]["step"]
    )


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
@pytest.mark.parametrize("lines", [1, 21])
def test_head_of_the_output(folder: Path, lines: int) -> None:
    """``train | head -1``: the reader leaves in the plan or in the run."""
    from steradian.config import dump_config

    config = toy_config(folder, "head", "training.max_epochs=2000")
    (folder / "head.yaml").write_text(dump_config(config))
    with subprocess.Popen(
        [sys.executable, "-m", "steradian", "train", str(folder / "head.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(lines):
            assert process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=120) in (1, 130), err  # click ends with 1 where a line cannot be printed
    assert err == ""
    directory = RunDirectory(config.output / config.name)
    if directory.path.exists():
        assert read_state(directory.state)["position"]["step"] > 0
        assert not list(directory.path.glob(".*")), "neither a lock nor a file that was being written"


# ------------------------------------------------------------------------------------------------------------- loggers


def test_tensorboard_and_wandb_get_every_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged: list[tuple[int, dict[str, Any]]] = []

    class Wandb:
        """Stands in for the package, which needs an account."""

        __spec__ = object()

        @staticmethod
        def init(**options: Any) -> Any:
            assert options["project"] == "steradian"
            assert Path(options["dir"]).is_dir()
            return Wandb()

        def log(self, figures: dict[str, Any], step: int) -> None:
            logged.append((step, figures))

        def finish(self) -> None:
            logged.append((-1, {}))

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    config = toy_config(
        folder, "loggers", SMALL[0], "training.loggers=[csv, tensorboard, wandb]", "training.max_epochs=3"
    )
    path = fit(config, progress=False).run_dir
    assert [step for step, _ in logged] == [4, 8, 12, -1]
    events = EventAccumulator(str(path / "tensorboard")).Reload()
    for name in ("train/loss", "validation/forces_mae", "learning_rate"):
        points = events.Scalars(name)
        assert [point.step for point in points] == [4, 8, 12]
        for point, (_, figures) in zip(points, logged):
            assert point.value == pytest.approx(figures[name], rel=1e-6)
