"""Class activation maps: their mean is the logit less its bias, on networks and by hand."""

import numpy as np
import pytest
import torch
from noisy_colours import write_checkpoint
from small_classifier import ARCH, write_classifier

from moco_det.common.errors import UserError
from pretrain.evaluation.class_activation import (
    class_activation_maps,
    load_image_classifier,
    resized,
)
from pretrain.evaluation.features import extract


@pytest.fixture
def classifier(tmp_path):
    return load_image_classifier(write_classifier(tmp_path / "checkpoint_best.pth.tar"))


def test_maps_are_weighted_sums_of_channels():
    features = torch.tensor([[[1.0, 2.0]], [[3.0, 5.0]]])  # two channels, one row of two places
    maps = class_activation_maps(features, torch.tensor([[1.0, 0.0], [2.0, -1.0]]))
    assert maps.tolist() == [[[1.0, 2.0]], [[-1.0, -1.0]]]


@pytest.mark.parametrize("size", [(32, 32), (40, 90)])
def test_a_map_s_mean_is_the_logit_less_the_bias(classifier, size):
    """The network's own forward pass, on the whole image, is the oracle."""
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    view = torch.from_numpy(resized(image, 32))[None]
    logits = extract(classifier.encoder, view)[0]
    for index, name in enumerate(classifier.classes):
        found, probability, heat = classifier.explain(image, name)
        assert found == name
        assert heat.shape == tuple(-(-side // 8) for side in view.shape[1:3])
        bias = classifier.encoder.fc.bias[index]
        assert heat.mean().item() == pytest.approx((logits[index] - bias).item(), abs=1e-5)
        assert probability == pytest.approx(logits.softmax(0)[index].item(), abs=1e-6)
    assert classifier.explain(image)[0] == classifier.classes[int(logits.argmax())]


def test_the_whole_image_is_seen_at_the_size_of_the_evaluation():
    image = np.zeros((60, 120, 3), np.uint8)
    assert resized(image, 32).shape == (37, 74, 3)  # 256 / 224 of 32
    assert resized(image[:32], 32).shape == (32, 120, 3)  # as the crops of images of that size


def test_what_is_no_classifier_is_named(tmp_path, classifier):
    assert classifier.image_size == 32
    with pytest.raises(UserError, match="has no class bea; did you mean bee"):
        classifier.check_class("bea")
    path = write_checkpoint(tmp_path / "moco.pth.tar", ARCH)
    with pytest.raises(UserError, match=r"moco\.pth\.tar is no classifier: .*linear\.py"):
        load_image_classifier(path)
    for changes, message in (
        ({"classes": ["ape"]}, "has 3 outputs, and not a name for each"),
        ({"config": {"image_size": "x", "small_stem": True}}, "config.image_size is 'x'"),
        ({"config": {"small_stem": False}}, "is no classifier of this data"),
        ({"arch": "resnet9000"}, "unknown --arch resnet9000"),
    ):
        with pytest.raises(UserError, match=message):
            load_image_classifier(write_classifier(tmp_path / "other.pth.tar", **changes))


def test_classes_without_names_go_by_their_numbers(tmp_path):
    path = write_classifier(tmp_path / "old.pth.tar", classes=None)
    state = torch.load(path, weights_only=True)
    del state["classes"]
    torch.save(state, path)
    assert load_image_classifier(path).classes == ["0", "1", "2"]
