"""Where the tests find the repository and the small real data sets."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "configs"
# MOCO_DET_TEST_DATA names another folder that holds them.
SHARED_DATA = Path(os.environ.get("MOCO_DET_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
