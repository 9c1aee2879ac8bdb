"""Where the repository is, and what the tests look for beside it."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "configs"

# Small real data sets, and the papers' numbers; the variables name other places.
_SHARED = REPOSITORY.parent / "shared"
SHARED_DATA = Path(os.environ.get("MOCO_DET_TEST_DATA", _SHARED / "data"))
EXPERIMENTS = Path(os.environ.get("MOCO_DET_EXPERIMENTS", _SHARED / "experiments.yaml"))
