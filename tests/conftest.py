import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # before anything imports Triton: its own functions are interpreted or not from then on
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    # wrong machine code is replaced by plain PyTorch with a warning, which would hide it from every other test
    config.addinivalue_line("filterwarnings", "error:machine code of:UserWarning")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small tests run faster on one thread, and sums come out the same every time."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the benchmark data beside the checkout; tests that ask for it are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("benchmark data not found in ../shared/data")
    return folder
