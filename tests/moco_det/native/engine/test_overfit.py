"""A real photograph learnt by heart: mapper, targets, losses, inference and evaluators together."""

import json

import pytest

from moco_det.native.engine.trainer import load_config, train

IMAGE = 69468  # of COCO train2017: one person, a fifth of the image, 9 keypoints labelled


def write_one_photograph(annotations, path):
    """The file's part that is about IMAGE."""
    content = json.loads(annotations.read_text())
    content["images"] = [x for x in content["images"] if x["id"] == IMAGE]
    content["annotations"] = [x for x in content["annotations"] if x["image_id"] == IMAGE]
    path.write_text(json.dumps(content))


@pytest.mark.slow
def test_it_learns_a_photograph_by_heart(shared_data, tmp_path, repository):
    folder = shared_data("coco_mini")
    annotations = folder / "annotations" / "person_keypoints_train2017.json"
    write_one_photograph(annotations, tmp_path / "person.json")
    name = f"('coco:{tmp_path / 'person.json'}:{folder / 'train2017'}',)"
    cfg = load_config(
        str(repository / "configs" / "quick" / "coco_mini_R18_FPN_keypoint.yaml"),
        [
            *("MODEL.MASK_ON", "True", "SEED", "1", "OUTPUT_DIR", str(tmp_path / "output")),
            *("DATASETS.TRAIN", name, "DATASETS.TEST", name, "DATALOADER.NUM_WORKERS", "0"),
            *("INPUT.MIN_SIZE_TRAIN", "(128,)", "INPUT.MIN_SIZE_TEST", "128"),
            *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "64", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32"),
            *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", "64", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "64"),
            # Box and keypoint AP were 100 and mask AP at least 80 over four seeds.
            *("SOLVER.IMS_PER_BATCH", "1", "SOLVER.MAX_ITER", "100", "SOLVER.STEPS", "(80,)"),
        ],
    )
    results = train(cfg)
    for task in ("bbox", "segm", "keypoints"):
        assert results[task]["AP50"] == pytest.approx(100), task
