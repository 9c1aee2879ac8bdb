"""What is compared of a segmentor, and on what; without Detectron2."""

import pytest
import torch
from tiny_semantic import write_tiny_segmentor

from moco_det.config.loading import load_config
from moco_det.native.engine.probe import Probe
from moco_det.parity.comparison import build_items, randomize_for_parity


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
    assert len(probe.infer(items[0], amp=False)) == 1
