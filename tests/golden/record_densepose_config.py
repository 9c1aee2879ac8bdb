"""Record what the DensePose project adds to Detectron2's config, and its baseline.

    PYTHONPATH=DETECTRON2:DETECTRON2/projects/DensePose \\
        python tests/golden/record_densepose_config.py

DETECTRON2 is a checkout: no package holds the project's YAMLs. As in record_config.py and
record_baselines.py a value is kept as its `repr`, and of the baseline what differs from the
defaults; MODEL.DENSEPOSE_ON, which is True by default there and False here, always.
"""

from pathlib import Path

from recording import write

from moco_det.config.loading import leaves

BASELINE = "densepose_rcnn_R_50_FPN_s1x_legacy"


def record() -> dict[str, dict[str, str]]:
    import densepose
    from detectron2.config import get_cfg

    cfg = get_cfg()
    core = {key for key, _ in leaves(cfg)}
    densepose.add_densepose_config(cfg)
    defaults = {key: repr(value) for key, value in leaves(cfg)}
    configs = Path(densepose.__file__).parents[1] / "configs"
    cfg.merge_from_file(str(configs / f"{BASELINE}.yaml"))
    found = {key: repr(value) for key, value in leaves(cfg)}
    changed = {key for key in found if found[key] != defaults[key]} | {"MODEL.DENSEPOSE_ON"}
    return {
        "defaults": {key: defaults[key] for key in sorted(defaults.keys() - core)},
        BASELINE: {key: found[key] for key in found if key in changed},
    }


if __name__ == "__main__":
    write("densepose_config", record())
