"""Feature maps at stride 8: torchvision's dilated ResNets, and stages built without stride."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet

from moco_det.common.errors import UserError
from moco_det.common.resnets import WidenedResNet
from pretrain.evaluation.spatial_features import SpatialFeatures
from pretrain.moco.encoders import build_encoder


@pytest.fixture(autouse=True)
def images():
    torch.manual_seed(0)
    return torch.randn(1, 3, 40, 56)


def body(network, images):
    """Up to the last stage."""
    return nn.Sequential(*list(network.children())[:-2])(images)


def test_dilated_stages_are_torchvision_s(images):
    encoder = build_encoder("resnet50w0.25x", 8).eval()
    dilated = WidenedResNet(
        0.25, resnet.Bottleneck, [3, 4, 6, 3], 8,
        replace_stride_with_dilation=[False, True, True],
    ).eval()  # fmt: skip
    dilated.load_state_dict(encoder.state_dict())
    before = body(encoder, images)
    found = SpatialFeatures(encoder, "layer4", dilated=True).eval()(images)
    assert found.shape == (1, 512, 5, 7)
    torch.testing.assert_close(found, body(dilated, images))
    torch.testing.assert_close(body(encoder, images), before)  # the encoder keeps its strides


@pytest.mark.parametrize("arch", ["resnet18w0.25x", "resnet50w0.25x"])
def test_stage_3_without_dilation_is_one_built_with_stride_1(images, arch):
    encoder = build_encoder(arch, 8).eval()
    other = build_encoder(arch, 8)
    other.inplanes, block = encoder.layer3[0].conv1.in_channels, type(encoder.layer3[0])
    plain = other._make_layer(block, 256, len(encoder.layer3), stride=1).eval()
    plain.load_state_dict(encoder.layer3.state_dict())
    earlier = nn.Sequential(*list(encoder.children())[:6])(images)
    found = SpatialFeatures(encoder, "layer3", dilated=False).eval()(images)
    assert found.shape[2:] == (5, 7)
    torch.testing.assert_close(found, plain(earlier))


def test_another_kind_of_network_is_named():
    with pytest.raises(UserError, match="Linear is no ResNet: .* pass a ResNet as -a"):
        SpatialFeatures(nn.Linear(2, 2), "layer3", dilated=False)
