"""From a checkpoint to Detectron2 weights, and back: every key accounted for, the result proved."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.feature_extraction import create_feature_extractor

from moco_det.common.errors import UserError
from moco_det.common.resnets import Architecture
from moco_det.common.weight_checks import describe_stripping
from moco_det.common.weight_layouts import DETECTRON2, TORCHVISION, name_map, rename
from moco_det.common.weight_sources import is_remote, read_state_dict
from moco_det.weights import SUFFIXES
from moco_det.weights.files import write_weights
from moco_det.weights.resnet import Source, detectron2_file, find_resnet

TOLERANCE = 1e-5  # of the features of the two networks, absolute


@dataclass(frozen=True)
class Target:
    """A library that is to load the new file.

    `pack` makes the file's content from the arrays under the names of `vocabulary`; `needs` is what
    its user has to know, for a network. SUFFIXES are of files that it reads.
    """

    vocabulary: str
    pack: Callable[[Source, dict[str, Tensor]], Mapping[str, Any]]
    needs: Callable[[Architecture], Mapping[str, object]]


def _normalisation(architecture: Architecture) -> dict[str, object]:
    return {"images": "RGB in [0, 1]", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def _mmdetection(architecture: Architecture) -> dict[str, object]:
    config = architecture.config()
    return {
        "data_preprocessor.mean": config["MODEL.PIXEL_MEAN"],
        "data_preprocessor.std": config["MODEL.PIXEL_STD"],
        "data_preprocessor.bgr_to_rgb": True,
        "backbone.depth": architecture.depth,
        "backbone.style": "'pytorch'",  # the stride in the 3x3 convolution
        "backbone.init_cfg": "dict(type='Pretrained', checkpoint='OUT')",
    }


def _bare(source: Source, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights


TARGETS = {
    "detectron2": Target(
        "detectron2", lambda source, _: detectron2_file(source),
        lambda architecture: architecture.config(),
    ),
    "torchvision": Target("torchvision", _bare, _normalisation),
    "timm": Target("torchvision", _bare, _normalisation),
    "safetensors": Target("torchvision", _bare, _normalisation),
    "mmdetection": Target(
        "torchvision",
        lambda source, weights: {"state_dict": weights, "author": source.layout.author},
        _mmdetection,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Conversion:
    """A file that was converted and checked."""

    source: Source
    names: dict[str, str]  # name in the source file -> name in the new one
    difference: float  # see `feature_difference`

    def describe(self, verbose: bool = False) -> str:
        """What became of every key: one line for each part of the network, or for each key."""
        mapped, dropped = self.names.items(), self.source.dropped
        if verbose:
            rows = [f"  {old} -> {new}" for old, new in mapped], [f"  {old}" for old in dropped]
        else:
            pairs = (f"{_part(old)} -> {_part(new)}" for old, new in mapped)
            rows = _counted(pairs), _counted(map(_part, dropped))
        stripping = describe_stripping(self.source.backbone.stripped)
        lines = [
            self.source.kind(),
            *([stripping] if stripping else []),
            f"{len(mapped)} keys mapped",
            *rows[0],
            f"{len(dropped)} keys dropped",
            *rows[1],
            f"largest difference of the features res2 to res5: {self.difference:.1e}",
        ]
        return "\n".join(lines)


def _part(name: str) -> str:
    """The top of a name: "module.encoder_q.layer1.0.bn1.bias" -> "module.encoder_q.layer1"."""
    parts = name.split(".")
    depth = next((i for i, p in enumerate(parts) if p not in ("module", "encoder_q", "stem")), 0)
    return ".".join(parts[: depth + 1])


def _counted(parts: Iterable[str]) -> list[str]:
    return [f"  {part}: {count}" for part, count in Counter(parts).items()]


def convert_file(
    source_path: str | Path,
    path: str | Path,
    target: str,
    build_backbone: Callable[[Architecture], nn.Module],
) -> Conversion:
    """Convert a weight file; the new one appears only after its features equal the old one's.

    Args:
        source_path: as for `read_state_dict`.
        path: the new file. For Detectron2 with the entry "requires", the config that the weights
            need.
        target: one of TARGETS.
        build_backbone: returns a network with Detectron2's names, normalised by BN, and as stride
            in a bottleneck that of the 3x3; its output is {"res2": ..., ..., "res5": ...}.

    Raises:
        UserError: the source is not a whole ResNet, the features differ, or `path` cannot be
            written.
    """
    _check_paths(source_path, Path(path), target)
    weights, metadata = read_state_dict(source_path)
    try:
        source = _convertible(weights, metadata, target)
    except UserError as error:
        raise UserError(f"{source_path}: {error}") from error
    vocabulary, wanted = source.layout.vocabulary, TARGETS[target].vocabulary
    build = {"torchvision": Architecture.build, "detectron2": build_backbone}

    def check(written: Path) -> float:
        before = _loaded(build[vocabulary](source.architecture), source.weights)
        after = _loaded(build[wanted](source.architecture), read_state_dict(written)[0])
        difference = feature_difference(before, after)
        if not difference <= TOLERANCE:
            raise UserError(
                f"{source_path}: features differ by {difference:.1e} after the conversion, more "
                f"than {TOLERANCE}; {path} was not written"
            )
        return difference

    content = TARGETS[target].pack(source, rename(source.weights, vocabulary, wanted))
    difference = write_weights(path, content, check)
    spelling = name_map(vocabulary, wanted)
    names = {old: spelling[stripped] for old, stripped in source.backbone.kept.items()}
    return Conversion(source, names, difference)


def _check_paths(source_path: str | Path, path: Path, target: str) -> None:
    suffixes = SUFFIXES[target]
    if path.suffix not in suffixes:
        raise UserError(f"{path}: a file for {target} ends in {' or '.join(suffixes)}")
    here = not is_remote(source_path) and Path(source_path).exists()
    if here and path.exists() and path.samefile(source_path):
        raise UserError(f"{path} would replace the file it is made from: give it another name")


def _convertible(weights, metadata, target: str) -> Source:
    if metadata.get("__author__") == "Caffe2":
        raise UserError(
            "a Caffe2 file: Detectron2 and the native engine read it as it is, and torchvision has "
            "no network for it (BGR input, stride in the first 1x1 convolution)"
        )
    own = {"torchvision": TORCHVISION, "detectron2": DETECTRON2}.get(target)
    source = find_resnet(weights, metadata)
    if source.layout is own:
        raise UserError(f"already a {source.layout.title}: nothing to convert")
    return source


def _loaded(network: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    network.load_state_dict(weights, strict=False)  # only torchvision's network has an `fc`
    return network


@torch.inference_mode()
def feature_difference(before: nn.Module, after: nn.Module) -> float:
    """Largest absolute difference of res2..res5 of two networks on the same image.

    Computed in float64, where two orders of summation differ by less than 1e-10: what is left is a
    difference of the networks, not of the arithmetic.

    Args:
        before, after: torchvision's ResNet, or a module (1, 3, H, W) -> {"res2": ..., ...}. Both
            are left in float64 and in evaluation mode.
    """
    image = torch.randn(1, 3, 160, 224, generator=torch.Generator().manual_seed(0)).double()
    features = [_features(network.double().eval(), image) for network in (before, after)]
    # A tensor's `max`, unlike Python's, keeps NaN: NaN features do not agree.
    return torch.stack([(x - y).abs().max() for x, y in zip(*features, strict=True)]).max().item()


def _features(network: nn.Module, image: Tensor) -> list[Tensor]:
    if isinstance(network, resnet.ResNet):
        stages = {f"layer{s}": f"res{s + 1}" for s in (1, 2, 3, 4)}
        network = create_feature_extractor(network, stages)
    outputs = network(image)
    return [outputs[f"res{s}"] for s in (2, 3, 4, 5)]
