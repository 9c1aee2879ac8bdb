"""The encoders against the paper's parameter counts and torchvision's shapes."""

import pytest
import torch
import torchvision

from pretrain.moco.encoders import build_encoder

# Table 1 of arXiv:1911.05722, in millions, "of the feature extractor": without the head.
TABLE_1 = {"resnet50": 24, "resnext50_32x8d": 46, "resnet50w2x": 94, "resnet50w4x": 375}


def on_meta(arch: str, **options) -> torch.nn.Module:
    with torch.device("meta"):
        return build_encoder(arch, **options)


@pytest.mark.parametrize("arch", TABLE_1)
def test_parameter_counts_are_those_of_table_1(arch):
    encoder = on_meta(arch)
    head = sum(p.numel() for p in encoder.fc.parameters())
    millions = (sum(p.numel() for p in encoder.parameters()) - head) / 1e6
    assert round(millions) == TABLE_1[arch]
    if arch != "resnet50":  # its 23.5 are 24 to the precision of the table only
        assert millions == pytest.approx(TABLE_1[arch], rel=0.01)


@pytest.mark.parametrize(
    ("arch", "plain", "factor"),
    [("resnet50w2x", "resnet50", 2), ("resnet50w4x", "resnet50", 4),
     ("resnet18w0.25x", "resnet18", 0.25)],
)  # fmt: skip
def test_every_channel_is_widened(arch, plain, factor):
    with torch.device("meta"):
        standard = torchvision.models.get_model(plain).state_dict()
    widened = on_meta(arch, dim=1000).state_dict()
    assert list(widened) == list(standard)
    for name, value in standard.items():
        fixed = {"conv1.weight": [1], "fc.weight": [0], "fc.bias": [0]}.get(name, [])
        channels = [i for i in range(value.dim()) if i < 2 and i not in fixed]
        wanted = [n * factor if i in channels else n for i, n in enumerate(value.shape)]
        assert list(widened[name].shape) == wanted, name


def test_resnext50_32x8d_is_between_torchvisions_resnexts():
    """Widths of resnext101_32x8d, blocks of resnext50_32x4d."""
    with torch.device("meta"):
        wide = torchvision.models.resnext101_32x8d().state_dict()
        short = torchvision.models.resnext50_32x4d().state_dict()
    ours = on_meta("resnext50_32x8d", dim=1000).state_dict()
    assert list(ours) == list(short)
    assert all(value.shape == wide[name].shape for name, value in ours.items())


def test_a_widened_encoder_is_initialised_as_torchvisions():
    """He's initialisation with fan-out; the stem is made anew and must not differ."""
    torch.manual_seed(0)
    encoder = build_encoder("resnet50w2x", dim=16, mlp=True)
    for name in ("conv1.weight", "layer1.0.conv2.weight"):
        weight = encoder.get_parameter(name)
        fan_out = weight.shape[0] * weight.shape[2] * weight.shape[3]
        assert float(weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)
    assert encoder(torch.randn(2, 3, 64, 64)).shape == (2, 16)
    assert encoder.fc[0].weight.shape == (4096, 4096)


def test_a_small_stem_keeps_the_width():
    encoder = on_meta("resnet50w2x", small_stem=True)
    assert encoder.conv1.weight.shape == (128, 3, 3, 3)


def official_head(encoder: torch.nn.Module, mlp: bool) -> torch.nn.Module:
    """As facebookresearch/moco's builder makes it, written from the papers: v2 hacks in an MLP."""
    if mlp:
        width = encoder.fc.weight.shape[1]
        encoder.fc = torch.nn.Sequential(
            torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 16)
        )
    return encoder


@pytest.mark.parametrize("mlp", [False, True])
def test_heads_are_the_official_builders(mlp):
    """The same keys and shapes, and the same outputs under the same weights."""
    torch.manual_seed(0)
    official = official_head(torchvision.models.resnet18(num_classes=16), mlp).eval()
    ours = build_encoder("resnet18", 16, mlp).eval()
    shapes = [
        {name: value.shape for name, value in model.state_dict().items()}
        for model in (ours, official)
    ]
    assert list(shapes[0].items()) == list(shapes[1].items())
    ours.load_state_dict(official.state_dict())
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), official(images))
        # Before and after the ReLU the features differ: it is there, and it is a ReLU.
        if mlp:
            features = torch.randn(5, 512)
            hidden = torch.nn.functional.linear(features, ours.fc[0].weight, ours.fc[0].bias)
            wanted = hidden.clamp(min=0) @ ours.fc[2].weight.T + ours.fc[2].bias
            torch.testing.assert_close(ours.fc(features), wanted)
