"""Real photographs, learnt by heart: targets, losses, inference and the evaluators fit together.

The YAMLs of configs/quick that do this for whole folders take minutes each; here they see one or
two of the images.
"""

import json
from pathlib import Path

import pytest

from moco_det.config import load_config
from moco_det.native.trainer import train

pytestmark = pytest.mark.slow


@pytest.fixture
def overfit(tmp_path, repository):
    """Function: YAML, data set, iterations, further options -> results on the training images."""

    def run(name, dataset, iterations, *opts):
        chosen = {
            "DATASETS.TRAIN": f"('{dataset}',)",
            "DATASETS.TEST": f"('{dataset}',)",
            "SOLVER.MAX_ITER": str(iterations),
            "SOLVER.STEPS": f"({iterations * 4 // 5},)",
            "SOLVER.WARMUP_ITERS": "10",
            "SOLVER.IMS_PER_BATCH": "2",
            "INPUT.MIN_SIZE_TRAIN": "(160,)",
            "INPUT.MIN_SIZE_TEST": "160",
            "MODEL.ANCHOR_GENERATOR.SIZES": "[[8], [16], [32], [64], [128]]",
            "DATALOADER.NUM_WORKERS": "0",
            "TEST.PRECISE_BN.NUM_ITER": "4",
            "OUTPUT_DIR": str(tmp_path / "output"),
            "SEED": "0",
        }
        pairs = [text for pair in chosen.items() for text in pair]
        path = str(repository / "configs" / "quick" / f"{name}.yaml")
        return train(load_config(path, [*pairs, *opts]))

    return run


def subset(json_file: Path, target: Path, image_ids: tuple[int, ...]) -> Path:
    """The annotations of a few images, written to `target`."""
    content = json.loads(json_file.read_text())
    for section, key in (("images", "id"), ("annotations", "image_id")):
        content[section] = [x for x in content[section] if x[key] in image_ids]
    target.write_text(json.dumps(content))
    return target


def test_boxes_and_masks_of_coco(overfit, shared_data, tmp_path):
    folder = shared_data("coco_mini")
    annotations = folder / "annotations" / "instances_train2017.json"
    chosen = subset(annotations, tmp_path / "two.json", (332078, 418049))
    results = overfit("coco_mini_R18_FPN_mask", f"coco:{chosen}:{folder / 'train2017'}", 120)
    assert results["bbox"]["AP50"] > 80
    assert results["segm"]["AP50"] > 80


def test_keypoints_of_coco(overfit, shared_data, tmp_path):
    folder = shared_data("coco_mini")
    annotations = folder / "annotations" / "person_keypoints_train2017.json"
    chosen = subset(annotations, tmp_path / "two.json", (37666, 84533))
    results = overfit("coco_mini_R18_FPN_keypoint", f"coco:{chosen}:{folder / 'train2017'}", 120)
    assert results["bbox"]["AP50"] > 80
    assert results["keypoints"]["AP50"] > 80


def test_boxes_and_masks_of_lvis(overfit, shared_data, tmp_path):
    pytest.importorskip("lvis")
    folder = shared_data("lvis_v0.5_val100")
    chosen = subset(folder / "lvis_val_10_with_images.json", tmp_path / "two.json", (6894, 11813))
    results = overfit("lvis10_R18_FPN", f"lvis:{chosen}:{folder / 'val2017_10images'}", 120)
    assert results["bbox"]["AP50"] > 80
    assert results["segm"]["AP50"] > 80
