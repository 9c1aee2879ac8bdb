"""Record the configs of Detectron2's own baselines, which the paper's experiments start from.

    PYTHONPATH=DETECTRON2 python tests/golden/record_baselines.py

Of each only what differs from Detectron2's defaults, and each value as its `repr`.
"""

from pathlib import Path

from recording import write

from moco_det.config.loading import leaves

BASELINES = (
    "PascalVOC-Detection/faster_rcnn_R_50_C4",
    "COCO-Detection/faster_rcnn_R_50_DC5_1x",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x",
    "LVISv0.5-InstanceSegmentation/mask_rcnn_R_50_FPN_1x",
    "Cityscapes/mask_rcnn_R_50_FPN",
)


def folder() -> Path:
    """Detectron2's configs: in the package where it is installed, beside it in a checkout."""
    import detectron2

    package = Path(detectron2.__file__).parent
    installed = package / "model_zoo" / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def record() -> dict[str, dict[str, str]]:
    from detectron2.config import get_cfg

    defaults = dict(leaves(get_cfg()))
    found = {}
    for name in BASELINES:
        cfg = get_cfg()
        cfg.merge_from_file(str(folder() / f"{name}.yaml"))
        found[name] = {k: repr(v) for k, v in leaves(cfg) if repr(v) != repr(defaults[k])}
    return found


if __name__ == "__main__":
    write("baselines", record())
