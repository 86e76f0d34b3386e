"""What the CPU backend asks of the C library, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from steradian.kernels.memory import keep_freed_memory
print(int(keep_freed_memory()))
def step():  # 80 MiB in ten tensors, all freed
    return len([torch.ones(2**21) for _ in range(10)])
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def answers(**environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUN"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=clean | environment
    )
    agreed, faults = done.stdout.split()
    return agreed == "1", int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU's C library")
def test_freed_memory_is_used_again_without_fetching_pages():
    agreed, faults = answers()
    if not agreed:
        pytest.skip("another C library")
    assert faults < 1000


def test_the_user_has_the_last_word():
    assert not answers(STERADIAN_KEEP_MEMORY="0")[0]
    agreed, faults = answers(MALLOC_TRIM_THRESHOLD_="131072")
    assert not agreed
    assert faults > 5000  # so the other test measures something
