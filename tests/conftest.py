"""Where the tests find the small real datasets that are not part of the project."""

import os
from pathlib import Path

import pytest

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
