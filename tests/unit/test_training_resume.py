"""An interrupted and resumed run ends with exactly the weights, table and model of an uninterrupted one."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from steradian.training.loop import SIGNAL, Loop
from steradian.training.record import ResumeError, RunDirectory, RunExistsError, read_state
from steradian.training.run import fit
from tests.unit.training_cases import assert_same_run, rows_without_time, start, toy_config, toy_file, wait_for_step

STEPS_PER_EPOCH = 4  # seven batches of three, two to a step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("training")
    toy_file(path)
    return path


@pytest.fixture(scope="module")
def whole(folder: Path) -> RunDirectory:
    """An uninterrupted run."""
    return RunDirectory(fit(toy_config(folder, "whole"), progress=False).run_dir)


@pytest.mark.parametrize("stops", [(2,), (STEPS_PER_EPOCH,), (1, 6), (3, 7, 8, 13)])
def test_stopped_and_resumed_equals_whole(
    whole: RunDirectory, folder: Path, monkeypatch: pytest.MonkeyPatch, stops: tuple[int, ...]
) -> None:
    config = toy_config(folder, f"stopped{'_'.join(map(str, stops))}")
    directory = RunDirectory(config.output / config.name)
    for number, stop in enumerate(stops):

        def due(loop: Loop, interval: float = 0.0, *, stop: int = stop) -> int:
            return SIGNAL if loop.position.step == stop else 0

        monkeypatch.setattr(Loop, "_due", due)
        result = fit(config, resume=directory.path if number else None, progress=False)
        assert (result.reason, result.steps) == ("interrupted", stop)
    monkeypatch.undo()
    torch.manual_seed(99)  # the state of the generators before a resume must not matter
    result = fit(config, resume=directory.path, progress=False)
    assert result.reason == "finished"
    assert_same_run(whole, directory)


def test_random_state_matters(whole: RunDirectory, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: without the generators' states the resumed run has other dropout."""
    config = toy_config(folder, "careless")
    directory = RunDirectory(config.output / config.name)
    monkeypatch.setattr(Loop, "_due", lambda loop, *_: SIGNAL if loop.position.step == 5 else 0)
    fit(config, progress=False)
    monkeypatch.undo()
    monkeypatch.setattr("steradian.training.loop.restore_random_state", lambda state: None)
    fit(config, resume=directory.path, progress=False)
    with pytest.raises(AssertionError):
        assert_same_run(whole, directory)


def test_killed_and_resumed_equals_whole(whole: RunDirectory, folder: Path) -> None:
    process, directory = start(folder, "killed")
    wait_for_step(process, directory, STEPS_PER_EPOCH + 1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    position = read_state(directory.state)["position"]
    assert position["epoch"] < 4
    fit(toy_config(folder, "killed"), resume=directory.path, progress=False)
    assert_same_run(whole, directory)
    assert not list(directory.path.glob(".*.tmp"))


def test_a_finished_run_that_was_killed_at_the_very_end_is_clean(folder: Path) -> None:
    config = toy_config(folder, "end", "training.max_epochs=1")
    directory = RunDirectory(fit(config, progress=False).run_dir)
    names = {file.name for file in directory.path.iterdir()}
    for name in (".lock", ".log.txt.0123456789abcdef.tmp"):
        (directory.path / name).touch()
    directory.staging.mkdir()
    (directory.staging / "config.yaml").touch()  # of a run that was to replace this one
    assert fit(config, resume=directory.path, progress=False).reason == "finished"
    assert {file.name for file in directory.path.iterdir()} == names
    with directory.held(), pytest.raises(RunExistsError, match="another process is training there"):
        fit(config, resume=directory.path, progress=False)


def test_ctrl_c_saves_and_says_how_to_resume(whole: RunDirectory, folder: Path) -> None:
    process, directory = start(folder, "ctrl_c")
    wait_for_step(process, directory, 1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, (out, err)
    assert f"--resume {directory.path}" in out
    assert "Traceback" not in err
    fit(toy_config(folder, "ctrl_c"), resume=directory.path, progress=False)
    assert_same_run(whole, directory)


def test_time_limit_counts_over_resumes(folder: Path) -> None:
    config = toy_config(folder, "limited", "training.max_time_s=0.2", "training.max_epochs=10000")
    result = fit(config, progress=False)
    assert result.reason == "time_limit"
    assert 0.2 <= result.elapsed_s < 5
    with pytest.raises(ResumeError, match="max_time_s"):
        fit(config, resume=result.run_dir, progress=False)
    longer = toy_config(folder, "limited", "training.max_time_s=0.5", "training.max_epochs=10000")
    again = fit(longer, resume=result.run_dir, progress=False)
    assert again.elapsed_s >= 0.5
    assert again.steps > result.steps


def test_other_settings_are_refused(whole: RunDirectory, folder: Path) -> None:
    other = toy_config(folder, "whole", "training.optimizer.learning_rate=0.1")
    with pytest.raises(ResumeError, match=r"training\.optimizer\.learning_rate \(0\.02 -> 0\.1\)"):
        fit(other, resume=whole.path, progress=False)


def test_changed_data_are_refused(tmp_path: Path) -> None:
    file = toy_file(tmp_path)
    config = toy_config(tmp_path, "run", "training.max_epochs=1")
    fit(config, progress=False)
    file.write_text(file.read_text().replace("0.1", "0.2", 1))
    with pytest.raises(ResumeError, match="has changed"):
        fit(
            toy_config(tmp_path, "run", "training.max_epochs=2"),
            resume=config.output / "run",
            progress=False,
        )


def test_existing_run_is_not_overwritten(whole: RunDirectory, folder: Path) -> None:
    before = whole.model.read_bytes()
    with pytest.raises(RunExistsError, match="--resume"):
        fit(toy_config(folder, "whole"), progress=False)
    assert whole.model.read_bytes() == before


def test_a_second_process_in_the_same_folder_is_refused(folder: Path) -> None:
    config = toy_config(folder, "held", "training.max_epochs=1")
    directory = RunDirectory(config.output / config.name)
    with directory.held(), pytest.raises(RunExistsError, match="another process is training there"):
        fit(config, progress=False)
    assert not directory.in_use
    fit(config, progress=False)
    assert not list(directory.path.glob(".*")), "nothing of the lock is left"


def test_damaged_state_is_refused(folder: Path) -> None:
    config = toy_config(folder, "damaged", "training.max_epochs=1")
    directory = RunDirectory(fit(config, progress=False).run_dir)
    content = directory.state.read_bytes()
    directory.state.write_bytes(content[: len(content) // 2])
    with pytest.raises(ResumeError, match="cannot be read"):
        fit(config, resume=directory.path, progress=False)


def test_finished_run_has_nothing_to_do(whole: RunDirectory, folder: Path) -> None:
    rows = rows_without_time(whole)
    result = fit(toy_config(folder, "whole"), resume=whole.path, progress=False)
    assert result.reason == "finished"
    assert result.metrics
    assert rows_without_time(whole) == rows
