from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def efa_fixtures() -> Path:
    """Folder of numbers of the published JAX implementation, beside the checkout; skips where it is absent."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "efa"
    if not folder.is_dir():
        pytest.skip("reference numbers not found in ../shared/fixtures/efa")
    return folder
