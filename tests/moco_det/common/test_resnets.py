"""Wider and narrower ResNets, by their shapes and by torchvision's own network."""

import pytest
import torch
from torchvision.models import resnet

from moco_det.common.resnets import WidenedResNet


@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.Bottleneck])
@pytest.mark.parametrize("factor", [0.25, 2])
def test_every_layer_has_that_many_times_the_channels(block, factor):
    layers = [1, 2, 1, 1]
    with torch.device("meta"):
        plain = resnet.ResNet(block, layers).state_dict()
        wide = WidenedResNet(factor, block, layers).state_dict()
    assert wide.keys() == plain.keys()
    for name, value in plain.items():
        channels = [int(side * factor) for side in value.shape[:2]]
        if name == "conv1.weight":
            channels[1] = 3  # the image's
        elif name.startswith("fc."):
            channels[0] = 1000  # the classes
        assert wide[name].shape == (*channels[: value.dim()], *value.shape[2:]), name


def test_factor_1_is_torchvisions_network():
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plain = resnet.resnet18(num_classes=5).eval()
    ours = WidenedResNet(1, resnet.BasicBlock, [2, 2, 2, 2], num_classes=5).eval()
    ours.load_state_dict(plain.state_dict())
    assert torch.equal(ours(image), plain(image))
