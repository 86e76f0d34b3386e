"""Freed memory is kept: a loop that takes and frees the same blocks touches no new pages."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import numpy as np
from steradian.compiler.native import keep_freed_memory

kept = keep_freed_memory()

def step():
    blocks = [np.ones(size) for size in (2**20, 2**19, 2**20)]  # 8, 4 and 8 MiB

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(3):
    step()
before = faults()
for _ in range(10):
    step()
print(kept, faults() - before)
"""


def _faults(keep: str) -> tuple[bool, int]:
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"STERADIAN_KEEP_MEMORY": keep},
        capture_output=True,
        text=True,
        check=True,
    )
    kept, count = out.stdout.split()
    return kept == "True", int(count)


def test_repeated_blocks_touch_no_new_pages() -> None:
    kept, count = _faults("1")
    if not kept:
        pytest.skip("this C library cannot be told")
    assert count < 500
    kept, without = _faults("0")
    assert not kept
    assert without > 10 * max(count, 100)  # 5120 pages a step: the test would notice
