"""What is kept of a model's outputs on a whole data set; what is compared of a segmentor."""

import json
from types import SimpleNamespace

import pytest
import torch
from pycocotools import mask as coco_mask
from tiny_semantic import write_tiny_segmentor
from torch import nn

from moco_det.config.loading import get_cfg, load_config
from moco_det.evaluation.predictions import save_predictions
from moco_det.native.engine import inference
from moco_det.native.engine.inference import Probe, evaluate_model, predict
from moco_det.parity.comparison import build_items, randomize_for_parity


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


class Watched(Stub):
    """Notes how it is run."""

    def forward(self, batch):
        self.seen = (self.training, torch.is_grad_enabled())
        return super().forward(batch)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("names", [("a",), ("a", "b"), ()])
def test_a_model_is_evaluated_on_each_test_set_and_left_as_it_was(
    tmp_path, monkeypatch, capsys, training, names
):
    records = [{"image_id": number, "height": 4, "width": 6} for number in (2, 0, 1)]
    scored = []

    def evaluate(dataset, predictions, sigmas):
        scored.append((dataset.name, [x["image_id"] for x in predictions], list(sigmas)))
        return {"bbox": {"AP": float(len(scored))}}

    def dataset_of(name):
        return SimpleNamespace(name=name, records=lambda: records)

    monkeypatch.setattr(inference, "get_dataset", dataset_of)
    monkeypatch.setattr(inference, "build_test_loader", lambda cfg, found: ([x] for x in found))
    monkeypatch.setattr(inference, "evaluate", evaluate)
    cfg, model = get_cfg(), Watched().train(training)
    cfg.DATASETS.TEST, cfg.OUTPUT_DIR = names, str(tmp_path)
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1, 0.2]
    results = evaluate_model(cfg, model)
    assert model.training is training
    assert scored == [(name, [2, 0, 1], [0.1, 0.2]) for name in names]
    expected = {name: {"bbox": {"AP": float(i)}} for i, name in enumerate(names, start=1)}
    assert results == (expected["a"] if len(names) == 1 else expected)
    assert sorted(path.stem for path in (tmp_path / "inference").glob("*")) == list(names)
    if names:
        assert model.seen == (False, False)
        assert "copypaste: Task: bbox" in capsys.readouterr().out
    else:
        assert "DATASETS.TEST is empty" in capsys.readouterr().out


# -- the probe, without Detectron2 ---------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path):
    """The config of a data set that is not needed here."""
    return str(write_tiny_segmentor(tmp_path / "tiny.yaml", tmp_path / "voc"))


@pytest.fixture
def items(tiny):
    return build_items(load_config(tiny), 64, 96, 2, seed=0)


def test_items_have_label_maps_of_the_drawn_rectangles(items):
    assert [tuple(x["sem_seg"].shape) for x in items] == [(64, 96), (56, 84)]
    for item in items:
        assert item.keys() == {"image", "height", "width", "sem_seg"}
        labels = item["sem_seg"]
        assert labels.dtype == torch.int64
        assert (labels[-len(labels) // 8 :] == 255).all()
        assert labels[: -len(labels) // 8].max() < 21
        assert (labels == 0).any()
        shown = labels.unique().tolist()
        # A rectangle is of one colour, and no noise has that.
        for label in set(shown) - {0, 255}:
            colours = item["image"][:, labels == label].unique(dim=1)
            assert colours.shape[1] <= 3


def test_quantities(tiny, items):
    torch.manual_seed(0)
    probe = Probe(tiny, ["SOLVER.BASE_LR", "0.001"])
    randomize_for_parity(probe.model, items, probe.model.state_dict().keys(), seed=0)
    before = {name: value.clone() for name, value in probe.model.state_dict().items()}
    found = probe.quantities(items, seed=0)
    shapes = {name: [tuple(x.shape) for x in values] for name, values in found.items()}
    assert shapes["features res4"] == [(2, 256, 4, 6)]
    assert shapes["pixel logits"] == [(2, 21, 64, 96)]
    assert shapes["pixel scores"] == [(21, 128, 192), (21, 112, 168)]
    assert shapes["loss_sem_seg"] == [()]
    assert found["pixel logits"][0].std() > 1  # there is something to compare
    assert all(torch.equal(value, before[name]) for name, value in probe.model.state_dict().items())
    probe.train_step(items, amp=True)
    assert len(probe.infer(items[:1], amp=False)) == 1
