import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real raw files; the test is skipped where there is none."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("RECSYS_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip("no real data: set RECSYS_SHARED_DATA")
    return folder
