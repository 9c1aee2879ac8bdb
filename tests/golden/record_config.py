"""Record the defaults of Detectron2's config.

    PYTHONPATH=DETECTRON2 python tests/golden/record_config.py

A value is kept as its `repr`, so that tuples stay apart from lists, and 1 from 1.0.
"""

from recording import write

from moco_det.config.loading import leaves


def record():
    from detectron2.config import get_cfg

    return {"defaults": {key: repr(value) for key, value in sorted(leaves(get_cfg()))}}


if __name__ == "__main__":
    write("config", record())
