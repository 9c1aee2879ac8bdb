"""Record the defaults of Detectron2's config.

    PYTHONPATH=DETECTRON2 python tests/golden/record_config.py

Recorded from commit 02b5c4e295e990042a714712c21dc79b731e8833. A value is kept as its `repr`, so
that tuples stay apart from lists, and 1 from 1.0.
"""

import json
from pathlib import Path

from detectron2.config import get_cfg

from moco_det.config import leaves

defaults = {key: repr(value) for key, value in leaves(get_cfg())}
target = Path(__file__).with_name("detectron2_config.json")
target.write_text(json.dumps(defaults, indent=1, sort_keys=True) + "\n")
