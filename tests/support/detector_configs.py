"""The YAMLs of configs/ for tools/train_net.py, not those of pretraining and its protocols."""

from pathlib import Path

from paths import CONFIGS

FILES = sorted([*CONFIGS.glob("*.yaml"), *(CONFIGS / "quick").rglob("*.yaml")])
NAMES = [str(path.relative_to(CONFIGS)) for path in FILES]
RUNS = [name for name in NAMES if not Path(name).name.startswith("Base-")]
