"""What is kept of a model's outputs on a whole data set."""

import json

import torch
from pycocotools import mask as coco_mask
from torch import nn

from moco_det.evaluation.predictions import save_predictions
from moco_det.native.engine.inference import predict


class Stub(nn.Module):
    """Finds, in every image, as many objects as its image_id says."""

    def forward(self, batch):
        return [self.find(x["image_id"], x["height"], x["width"]) for x in batch]

    def find(self, count, height, width):
        masks = torch.zeros((count, height, width), dtype=torch.bool)
        masks[:, 1, 1:3] = True
        return {
            "boxes": torch.full((count, 4), 1.5),
            "scores": torch.linspace(1, 0, count),
            "classes": torch.arange(count),
            "masks": masks,
            "keypoints": torch.full((count, 2, 3), 0.5),
        }


def test_predictions_are_records_that_go_into_a_file(tmp_path):
    batches = [
        [{"image_id": 2, "height": 4, "width": 6}],
        [{"image_id": 0, "height": 5, "width": 3}, {"image_id": 1, "height": 5, "width": 3}],
    ]
    found = predict(Stub(), batches, images=3)
    assert [x["image_id"] for x in found] == [2, 0, 1]
    assert [len(x["boxes"]) for x in found] == [2, 0, 1]
    assert found[0]["keypoints"].shape == (2, 2, 3)
    assert "masks" not in found[0]  # 1 byte a pixel, for as long as the whole data set takes
    for record in found:
        assert len(record["segmentations"]) == len(record["boxes"])
        for shape in record["segmentations"]:
            assert isinstance(shape["counts"], str)
            assert coco_mask.decode(shape).nonzero()[1].tolist() == [1, 2]
    save_predictions(str(tmp_path), "name", found)
    (written,) = (tmp_path / "inference").iterdir()
    assert json.loads(written.read_text())[2]["segmentations"] == found[2]["segmentations"]
