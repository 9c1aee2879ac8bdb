"""The encoders f_q and f_k: a ResNet, or any other network, with the head of MoCo v1 or v2.

An encoder has its head as attribute `fc`, torchvision's name; all below it is the backbone.

Shape legend:
    N: images     H, W: their height and width     D: features of the backbone     C: of the head
"""

import copy
from functools import partial

import torch
import torchvision
from torch import nn
from torchvision.models import resnet

from moco_det.common.errors import UserError, one_line
from moco_det.common.processes import print_on_main
from moco_det.common.resnets import WidenedResNet
from moco_det.common.weight_checks import shorten

TORCHVISION = torchvision.models.list_models(
    module=torchvision.models, include=["resnet*", "resnext*", "wide_resnet*"]
)

# Encoders of Table 1 that torchvision does not know by name, and two small ones.
R50, R18 = (resnet.Bottleneck, [3, 4, 6, 3]), (resnet.BasicBlock, [2, 2, 2, 2])
BUILDERS = {
    "resnext50_32x8d": partial(resnet.ResNet, *R50, groups=32, width_per_group=8),
    "resnet50w2x": partial(WidenedResNet, 2, *R50),
    "resnet50w4x": partial(WidenedResNet, 4, *R50),
    "resnet18w0.25x": partial(WidenedResNet, 0.25, *R18),
    "resnet50w0.25x": partial(WidenedResNet, 0.25, *R50),
}
ARCHITECTURES = sorted([*TORCHVISION, *BUILDERS])


def build_encoder(
    arch: str, dim: int = 128, mlp: bool = False, small_stem: bool = False
) -> nn.Module:
    """A ResNet whose last layer gives `dim` features.

    Args:
        arch: one of ARCHITECTURES, e.g. "resnet50".
        mlp: MoCo v2's two-layer head, hidden layer as wide as the pooled features, ReLU between.
        small_stem: for 32-pixel images: a 3x3 convolution of stride 1 and no max-pooling, as in
            CIFAR ResNets. Such weights do not fit detectors.
    """
    if arch not in ARCHITECTURES:
        raise UserError(f"unknown --arch {arch}; known: {', '.join(ARCHITECTURES)}")
    if arch in BUILDERS:
        encoder = BUILDERS[arch](num_classes=dim)
    else:
        encoder = torchvision.models.get_model(arch, weights=None, num_classes=dim)
    if mlp:
        encoder.fc = mlp_head(encoder.fc)
    if small_stem:
        channels = encoder.conv1.out_channels
        encoder.conv1 = nn.Conv2d(3, channels, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    return encoder


def mlp_head(last: nn.Linear) -> nn.Sequential:
    """MoCo v2's head, D -> C, which ends with v1's."""
    return nn.Sequential(nn.Linear(last.in_features, last.in_features), nn.ReLU(), last)


def with_fc(encoder: nn.Module, fc: nn.Module) -> nn.Module:
    """The same network with another `fc`: the weights below are shared, and `encoder` stays."""
    other = copy.copy(encoder)
    other._modules = {**encoder._modules, "fc": fc}
    return other


# -- any network as a backbone --------------------------------------------------------------------


class BackboneWithHead(nn.Module):
    """A backbone and the head on its features.

    Args:
        backbone: images (N, 3, H, W) -> features (N, D).
        fc: D -> C.
        strided: whether the backbone takes images that lie in memory as channels_last; those that
            call `view` on them take the other kind only.
    """

    def __init__(self, backbone: nn.Module, fc: nn.Module, strided: bool = True):
        super().__init__()
        self.backbone = backbone
        self.fc = fc
        self.strided = strided

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> (N, C)."""
        features = self.backbone(images if self.strided else images.contiguous())
        check_features(features, len(images))  # in training too: some networks give more then
        return self.fc(features)


def add_head(
    backbone: nn.Module, dim: int = 128, mlp: bool = False, image_size: int = 224
) -> nn.Module:
    """An encoder for the mechanisms: `backbone`, itself and not a copy, with a new head as `fc`.

    The width of its features is found by a dry run in evaluation mode. Where the backbone ends with
    an `fc` that was replaced by nn.Identity, as torchvision's and timm's ResNets do, the head takes
    that place, so that the encoder's arrays are called as those of `build_encoder`; others become
    the part `backbone` of a BackboneWithHead.

    Args:
        dim, mlp: as for `build_encoder`.
        image_size: side of the images of the dry run.

    Raises:
        UserError: it does not take such images, or gives anything but N x D features.
    """
    width, strided = dry_run(backbone, image_size)
    fc = nn.Linear(width, dim)
    if mlp:
        fc = mlp_head(fc)
    weight = next(backbone.parameters(), fc.get_parameter("2.weight" if mlp else "weight"))
    fc.to(weight.device)
    encoder = BackboneWithHead(backbone, fc, strided)
    if strided and isinstance(getattr(backbone, "fc", None), nn.Identity):
        in_place = with_fc(backbone, fc)
        if _outputs(in_place, image_size).shape == (2, dim):
            encoder = in_place
    _freeze_unused(encoder, image_size)
    return encoder


def _freeze_unused(encoder: nn.Module, image_size: int) -> None:
    """Ask for no gradient of what has no part in the features, and say so.

    DistributedDataParallel would wait for it in every step.
    """
    wanted = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    before = {name: parameter.grad for name, parameter in wanted.items()}
    for parameter in wanted.values():
        parameter.grad = None
    _outputs(encoder, image_size, gradients=True).sum().backward()
    unused = [name for name, parameter in wanted.items() if parameter.grad is None]
    for name, parameter in wanted.items():
        parameter.grad = before[name]
        parameter.requires_grad_(name not in unused)
    if unused:
        print_on_main(f"not trained, for want of any part in the features: {shorten(unused)}")


def dry_run(backbone: nn.Module, image_size: int) -> tuple[int, bool]:
    """D, and whether the backbone takes images that lie in memory as channels_last.

    Raises:
        UserError: it does not take images of this size, or gives anything but N x D features.
    """
    if not isinstance(backbone, nn.Module):
        raise UserError(f"the backbone is a {type(backbone).__name__}, not a torch.nn.Module")
    if any(array.is_meta for array in backbone.parameters()):
        raise UserError("the backbone is on the device meta, without weights: give it some first")
    for layer in backbone.modules():
        if isinstance(layer, torch.jit.ScriptModule):
            raise UserError(
                "the backbone is TorchScript, of which no second one can be made for "
                "the keys: pass the network that it was made of"
            )
        if isinstance(layer, nn.SyncBatchNorm):
            raise UserError(
                "the backbone has SyncBatchNorm, which normalises the global batch: shuffled BN "
                "needs groups of it, so pass the network with plain BatchNorm"
            )
    try:
        features, strided = _outputs(backbone, image_size), True
    except RuntimeError as error:
        if "view" not in str(error):
            raise _unfit(image_size, error) from error
        try:
            features, strided = _outputs(backbone, image_size, torch.contiguous_format), False
        except Exception as again:
            raise _unfit(image_size, again) from again
    except Exception as error:  # a network of the user's may raise anything
        raise _unfit(image_size, error) from error
    check_features(features, 2)
    layout = torch.channels_last if strided else torch.contiguous_format
    check_features(_outputs(backbone, image_size, layout, training=True), 2)  # may have more heads
    return features.shape[1], strided


def _outputs(
    network: nn.Module,
    image_size: int,
    memory_format: torch.memory_format = torch.channels_last,
    training: bool = False,
    gradients: bool = False,
) -> object:
    """Of two black images; the network and the generators are left as they were."""
    weight = next(network.parameters(), torch.empty(0))
    images = torch.zeros(2, 3, image_size, image_size, device=weight.device)
    modes = {module: module.training for module in network.modules()}
    gpus = [weight.device] if weight.is_cuda else []
    with torch.random.fork_rng(gpus), torch.set_grad_enabled(gradients):
        network.train(training)
        buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
        try:
            return network(images.contiguous(memory_format=memory_format))
        finally:
            for module, before in modes.items():
                module.training = before
            for buffer, before in buffers:
                if not torch.equal(buffer, before):  # others may be needed for gradients
                    buffer.copy_(before)


def _unfit(image_size: int, error: Exception) -> UserError:
    shape = f"2 x 3 x {image_size} x {image_size}"
    why = one_line(str(error) or type(error).__name__, 150)
    return UserError(f"the backbone does not take images of {shape}: {why}")


def check_features(features: object, images: int) -> None:
    """Raises UserError for anything but features N x D of so many images."""
    wanted = "features must be a tensor N x C"
    if not isinstance(features, torch.Tensor):
        raise UserError(f"the backbone gives a {type(features).__name__}: {wanted}")
    if features.ndim != 2 or len(features) != images:
        shape = " x ".join(map(str, features.shape))
        raise UserError(
            f"the backbone gives {shape} for {images} images: {wanted}; pool and flatten them "
            "(timm: num_classes=0)"
        )
