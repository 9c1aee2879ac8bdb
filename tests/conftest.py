"""How many threads the tests have, and where they find the small real datasets."""

import os
from pathlib import Path

import pytest
import torch

# Threads of several test processes would wait for each other's cores. The second line is for the
# commands that tests start.
THREADS = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
torch.set_num_threads(THREADS)
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = Path(os.environ.get("MOCO_DET_TEST_DATA", REPOSITORY.parent / "shared" / "data"))


@pytest.fixture
def shared_data():
    """Function: folder name -> its path; the test is skipped where the folder is absent."""

    def find(name: str) -> Path:
        folder = SHARED_DATA / name
        if not folder.is_dir():
            pytest.skip(f"{folder} is absent (set MOCO_DET_TEST_DATA to the folder that holds it)")
        return folder

    return find


@pytest.fixture
def repository() -> Path:
    return REPOSITORY
