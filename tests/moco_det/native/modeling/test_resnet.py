"""ResNet, FPN and the norms, against torchvision's networks and torch's own layers."""

import re

import pytest
import torch
import torch.multiprocessing as mp
import torchvision
from torch import nn

from moco_det.common.errors import UserError
from moco_det.config.loading import get_cfg
from moco_det.native.modeling.backbones import FPN, ResNet, build_resnet
from moco_det.native.modeling.layers import FrozenBatchNorm2d, SyncBatchNorm, get_norm, sync_on_cpu

ALL = ["res2", "res3", "res4", "res5"]


def from_torchvision(network: nn.Module) -> dict[str, torch.Tensor]:
    """A torchvision ResNet's weights under Detectron2's names, by rules written for this test."""
    state = {}
    for name, value in network.state_dict().items():
        if name.startswith("fc."):
            continue
        name = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", name)
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
        state[name if name.startswith("res") else f"stem.{name}"] = value
    return state


def torchvision_features(network: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    features = {}
    for index in range(1, 5):
        x = features[f"res{index + 1}"] = getattr(network, f"layer{index}")(x)
    return features


def randomise_norms(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.8)
            nn.init.uniform_(module.bias, -0.3, 0.3)
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("depth", "norm"), [(18, "BN"), (34, "BN"), (50, "BN"), (50, "FrozenBN")])
def test_features_of_torchvision(depth, norm):
    torch.manual_seed(0)
    reference = getattr(torchvision.models, f"resnet{depth}")(weights=None).eval()
    randomise_norms(reference)
    width = 64 if depth < 50 else 256
    model = ResNet(depth, out_features=ALL, norm=norm, freeze_at=0, res2_channels=width).eval()
    state = from_torchvision(reference)
    if norm == "FrozenBN":
        state = {k: v for k, v in state.items() if "num_batches_tracked" not in k}
    model.load_state_dict(state, strict=True)
    x = torch.randn(2, 3, 70, 64)
    with torch.no_grad():
        expected, features = torchvision_features(reference, x), model(x)
    for name in ALL:
        torch.testing.assert_close(features[name], expected[name])
        assert features[name].shape[1] == model.channels[name]
        assert features[name].shape[3] == 64 // model.strides[name]


@pytest.mark.usefixtures("float64")
def test_dilated_res5_dilates_all_its_blocks():
    torch.manual_seed(0)
    reference = torchvision.models.resnet50(
        weights=None, replace_stride_with_dilation=[False, False, True]
    ).eval()
    randomise_norms(reference)
    # torchvision leaves the first block of the stage undilated; Detectron2 does not.
    reference.layer4[0].conv2.dilation = reference.layer4[0].conv2.padding = (2, 2)
    model = ResNet(50, out_features=["res5"], norm="BN", freeze_at=0, res5_dilation=2).eval()
    model.load_state_dict(from_torchvision(reference), strict=True)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected, features = torchvision_features(reference, x), model(x)
    torch.testing.assert_close(features["res5"], expected["res5"])
    assert model.strides == {"res5": 16}


def test_stride_in_1x1():
    strides = {}
    for flag in (True, False):
        model = ResNet(50, out_features=ALL, norm="BN", freeze_at=0, stride_in_1x1=flag)
        strides[flag] = [
            (m[0].conv1.stride[0], m[0].conv2.stride[0]) for m in (model.res2, model.res5)
        ]
    assert strides == {True: [(1, 1), (2, 1)], False: [(1, 1), (1, 2)]}


def test_only_the_stages_in_use_are_built():
    model = ResNet(18, out_features=["res3"], norm="BN", freeze_at=0, res2_channels=64)
    assert [name for name, _ in model.named_children()] == ["stem", "res2", "res3"]
    assert set(model(torch.zeros(1, 3, 32, 32))) == {"res3"}


def test_frozen_stages_do_not_learn():
    model = ResNet(18, out_features=ALL, norm="SyncBN", freeze_at=2, res2_channels=64)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(("stem.", "res2.")), name
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()(torch.randn(2, 3, 64, 64))
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved
    assert all(k.startswith(("res3.", "res4.", "res5.")) and "norm." in k for k in moved)
    # Freezing changes no key, so that a checkpoint loads whatever FREEZE_AT is.
    unfrozen = ResNet(18, out_features=ALL, norm="SyncBN", freeze_at=0, res2_channels=64)
    assert set(model.state_dict()) == set(unfrozen.state_dict())


def test_config_that_no_resnet_fits():
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = 18
    with pytest.raises(UserError, match="RES2_OUT_CHANNELS is 256; ResNet-18 .* needs 64"):
        build_resnet(cfg)
    cfg.MODEL.RESNETS.DEPTH = 50
    cfg.MODEL.RESNETS.RES5_DILATION = 3
    with pytest.raises(UserError, match="RES5_DILATION is 3"):
        build_resnet(cfg)


def test_fpn_by_hand():
    """Identity convolutions on two levels: p3 = c3, p2 = c2 + upsampled c3, p4 = every other p3."""

    class BottomUp(nn.Module):
        channels = {"res2": 1, "res3": 1}
        strides = {"res2": 4, "res3": 8}

        def forward(self, x):
            return {"res2": x, "res3": 10 * x[..., ::2, ::2]}

    fpn = FPN(BottomUp(), ["res2", "res3"], out_channels=1, norm="")
    for name, parameter in fpn.named_parameters():
        nn.init.zeros_(parameter)
        if name.endswith("weight"):
            middle = parameter.shape[-1] // 2
            parameter.data[..., middle, middle] = 1
    x = torch.arange(16.0).view(1, 1, 4, 4)
    pyramid = fpn(x)
    coarse = torch.tensor([[0.0, 20.0], [80.0, 100.0]])
    assert torch.equal(pyramid["p3"][0, 0], coarse)
    upsampled = coarse.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(pyramid["p2"][0, 0], x[0, 0] + upsampled)
    assert pyramid["p4"].flatten().tolist() == [0.0]
    assert fpn.strides == {"p2": 4, "p3": 8, "p4": 16}
    assert fpn.size_divisibility == 8


def test_fpn_levels_must_double_the_stride():
    bottom_up = ResNet(18, out_features=ALL, norm="BN", freeze_at=0, res2_channels=64)
    with pytest.raises(ValueError, match="do not double"):
        FPN(bottom_up, ["res2", "res4"], 8, "")


@pytest.mark.parametrize("needs_grad", [False, True])
def test_frozen_batch_norm_is_batch_norm_in_eval_mode(needs_grad):
    torch.manual_seed(0)
    reference = nn.BatchNorm2d(5).eval()
    randomise_norms(reference)
    frozen = FrozenBatchNorm2d.from_batch_norm(reference)
    x = torch.randn(2, 5, 3, 4, requires_grad=needs_grad)
    torch.testing.assert_close(frozen(x), reference(x), rtol=1e-5, atol=1e-6)
    assert list(frozen.parameters()) == []
    fresh = FrozenBatchNorm2d(5)
    torch.testing.assert_close(fresh(x), x, rtol=0, atol=1e-6)
    assert fresh(x.bfloat16()).dtype == torch.bfloat16


def test_unknown_norm():
    assert get_norm("", 4) is None
    with pytest.raises(UserError, match="unknown normalisation 'BatchNorm'.*SyncBN"):
        get_norm("BatchNorm", 4)


def test_sync_batch_norm_alone_is_batch_norm():
    torch.manual_seed(0)
    ours, reference = SyncBatchNorm(4), nn.BatchNorm2d(4)
    x = torch.randn(3, 4, 5, 6)
    assert torch.equal(ours(x), reference(x))
    assert torch.equal(ours.running_var, reference.running_var)
    assert torch.equal(ours.eval()(x), reference.eval()(x))


def union_batches() -> list[torch.Tensor]:
    """What each process holds: other numbers of rows and of positions, far from mean 0."""
    generator = torch.Generator().manual_seed(4)
    shapes = [(5, 3, 2, 4), (1, 3, 3, 2)]
    return [30 + torch.randn(*s, generator=generator).double() for s in shapes]


def loss_of(y: torch.Tensor, process: int) -> torch.Tensor:
    return (y**3).sum() * (process + 1)


def _sync_batch_norm_process(process: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=process, world_size=2
    )
    layers = nn.Sequential(nn.SyncBatchNorm(3))
    nn.init.constant_(layers[0].weight, 1.5)
    sync_on_cpu(layers)
    norm = layers[0]
    results = {}
    for step in range(2):
        x = (union_batches()[process] + step).float().requires_grad_()
        y = norm(x)
        loss_of(y, process).backward()
        results[step] = (y.detach(), x.grad)
    results["norm"] = [b.clone() for b in norm.buffers()]
    # A process without any region takes part all the same.
    results["empty"] = norm(x.detach()[: 1 - process]).detach()
    before = [b.clone() for b in norm.buffers()]
    norm.zero_grad()
    norm(x.detach()[:0]).sum().backward()  # and where no process has one, nothing is learnt
    results["nothing learnt"] = all(map(torch.equal, before, norm.buffers()))
    results["gradients"] = [p.grad for p in norm.parameters()]
    torch.save(results, f"{folder}/{process}.pt")
    torch.distributed.destroy_process_group()


def test_sync_batch_norm_of_two_processes_is_batch_norm_over_the_union(tmp_path):
    mp.spawn(_sync_batch_norm_process, (str(tmp_path),), nprocs=2)
    processes = [torch.load(tmp_path / f"{p}.pt") for p in (0, 1)]

    reference = nn.BatchNorm1d(3).double()
    nn.init.constant_(reference.weight, 1.5)
    for step in range(2):
        xs = [(x + step).requires_grad_() for x in union_batches()]
        rows = torch.cat([x.permute(0, 2, 3, 1).reshape(-1, 3) for x in xs])
        outputs = reference(rows).split([x.numel() // 3 for x in xs])
        sum(loss_of(y, p) for p, y in enumerate(outputs)).backward()
        for p, (x, y) in enumerate(zip(xs, outputs, strict=True)):
            y = y.view(x.shape[0], *x.shape[2:], 3).permute(0, 3, 1, 2)
            torch.testing.assert_close(processes[p][step][0].double(), y, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(processes[p][step][1].double(), x.grad, rtol=1e-4, atol=1e-4)
    for result in processes:
        assert result["nothing learnt"]
        assert [g.abs().sum() for g in result["gradients"]] == [0, 0]
        mean, var, steps = result["norm"]
        torch.testing.assert_close(mean.double(), reference.running_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(var.double(), reference.running_var, rtol=1e-4, atol=1e-4)
        assert steps == 2
    assert processes[0]["empty"].shape == (1, 3, 2, 4)
    assert processes[0]["empty"].isfinite().all()
    assert processes[1]["empty"].shape == (0, 3, 3, 2)
