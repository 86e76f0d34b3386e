"""A few of the kills of ``tests/faults/kills.py``, which is run by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kills.py")
JOBS = ("train-overwrite", "md-device", "dataset-npz", "evaluate")  # one of every kind


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forks")
def test_killed_commands_go_on_as_if_nothing_had_happened():
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), "--only", *JOBS, "--count", "2", "--operations", "1", "--seed", "5"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count(" killed") >= 3, ended.stdout
