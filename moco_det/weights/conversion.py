"""From a checkpoint to Detectron2 weights, and back: every key accounted for, the result proved."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.feature_extraction import create_feature_extractor

from moco_det.common.errors import UserError
from moco_det.common.resnets import BLOCKS
from moco_det.common.weight_checks import describe_stripping, shorten
from moco_det.weights.files import read_state_dict, write_weights
from moco_det.weights.names import (
    DETECTRON2,
    LIGHTNING,
    MOCO,
    TORCHVISION,
    Architecture,
    Layout,
    find_wrapped_layout,
    infer_architecture,
    name_map,
    rename,
)

TOLERANCE = 1e-5  # of the features of the two networks, absolute


@dataclass(frozen=True)
class Source:
    """The ResNet of one file.

    `weights` has the names of `layout.vocabulary`, without the file's prefix; `kept` gives for each
    used name of the file the name in `weights`; `dropped` are the file's other names; `stripped`
    are its names that a wrapper (torch.compile, DataParallel, Lightning) had lengthened, each with
    the name as it was taken.
    """

    layout: Layout
    architecture: Architecture
    weights: dict[str, Tensor]
    kept: dict[str, str]
    dropped: tuple[str, ...]
    stripped: dict[str, str]


def find_resnet(weights: Mapping[str, Tensor], metadata: Mapping[str, object]) -> Source:
    """Take the ResNet out of a file's arrays, checked against what torchvision's network holds.

    Args:
        weights, metadata: as `moco_det.weights.files.read_state_dict` returns them.

    Raises:
        UserError: an unknown layout, a small stem, another architecture than `metadata["arch"]`, or
            arrays that are unexpected, missing, of the wrong shape or not finite, with names.
    """
    layout, inner = find_wrapped_layout(weights)
    if layout is None:
        known = ", ".join(x.title for x in (MOCO, TORCHVISION, DETECTRON2))
        some = shorten(list(weights)[:3])
        raise UserError(f"its names ({some}, ...) are not those of a known kind of file: {known}")
    kept = {name: layout.strip(new) for name, new in inner.items()}
    kept = {name: stripped for name, stripped in kept.items() if stripped}
    dropped = tuple(name for name in weights if name not in kept)
    unexpected = [name for name in dropped if not re.fullmatch(layout.dropped, inner[name])]
    # A module of Lightning has parts beside the backbone whose names nobody knows.
    wrapped = any(old != new for old, new in inner.items())
    if unexpected and not wrapped:
        raise UserError(f"unexpected keys in a {layout.title}: {shorten(unexpected)}")
    if len(set(kept.values())) < len(kept):
        raise UserError("it holds two ResNets: some of its names differ only in their prefix")
    resnet = {new: weights[old] for old, new in kept.items()}
    _refuse_small_stem(resnet, layout, metadata)
    architecture = _decide_architecture(resnet, layout, metadata)
    _check_arrays(resnet, layout, architecture)
    stripped = {o: n for o, n in (inner | (kept if layout is LIGHTNING else {})).items() if o != n}
    return Source(layout, architecture, resnet, kept, dropped, stripped)


def _refuse_small_stem(weights, layout: Layout, metadata) -> None:
    conv = weights.get(name_map("torchvision", layout.vocabulary)["conv1.weight"])
    config = metadata.get("config")
    flagged = isinstance(config, Mapping) and config.get("small_stem")
    if flagged or (conv is not None and tuple(conv.shape[2:]) == (3, 3)):
        raise UserError(
            "pretrained with --small-stem (a 3x3 convolution of stride 1 without max-pooling): the "
            "stem of a Detectron2 ResNet is a 7x7 convolution of stride 2 and a max-pooling, so "
            "these weights do not fit any detector; pretrain without --small-stem"
        )


def _decide_architecture(weights, layout: Layout, metadata) -> Architecture:
    """What the arrays show; what the checkpoint says of itself where they are not conclusive."""
    found = infer_architecture(rename(weights, layout.vocabulary, "torchvision"))
    arch = metadata.get("arch")
    declared = None
    if arch in resnet.__all__ and str(arch).islower():
        with torch.device("meta"):
            declared = infer_architecture(getattr(resnet, arch)().state_dict())
    if found is None and declared is None:
        raise UserError(f"its names are those of no ResNet of depth {', '.join(map(str, BLOCKS))}")
    if found is not None and declared is not None and found != declared:
        raise UserError(f"the checkpoint says it holds a {arch}, its arrays are a {found}")
    return found or declared


def _check_arrays(weights, layout: Layout, architecture: Architecture) -> None:
    with torch.device("meta"):
        network = architecture.build().state_dict()
    network = {name: value for name, value in network.items() if not name.startswith("fc.")}
    expected = rename(network, "torchvision", layout.vocabulary)
    faults = [f"{name} is unexpected" for name in sorted(weights.keys() - expected.keys())]
    for name, value in expected.items():
        if name not in weights:
            # Files older than PyTorch 0.4.1 and frozen BN have no such counter.
            if not name.endswith("num_batches_tracked"):
                faults.append(f"{name} is missing")
        elif weights[name].shape != value.shape:
            shapes = f"{tuple(weights[name].shape)}, not {tuple(value.shape)}"
            faults.append(f"{name} has the shape {shapes}")
        elif not weights[name].isfinite().all():
            faults.append(f"{name} is not finite")
    if faults:
        raise UserError(f"not a whole {architecture}: {shorten(faults)}")


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
        stripping = describe_stripping(self.source.stripped)
        lines = [
            f"{self.source.layout.title}, {self.source.architecture}",
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
        source_path: a MoCo checkpoint, a torchvision ResNet or a Detectron2 file.
        path: the new file. For Detectron2 `.pkl` or `.pth`, with the entry "requires" (the config
            that the weights need; Detectron2 ignores it). For torchvision a bare state_dict.
        target: "detectron2" or "torchvision".
        build_backbone: returns a network with Detectron2's names, normalised by BN, and as stride
            in a bottleneck that of the 3x3; its output is {"res2": ..., ..., "res5": ...}.

    Raises:
        UserError: the source is not a whole ResNet, the features differ, or `path` cannot be
            written.
    """
    _check_paths(Path(source_path), Path(path), target)
    weights, metadata = read_state_dict(source_path)
    try:
        source = _convertible(weights, metadata, target)
    except UserError as error:
        raise UserError(f"{source_path}: {error}") from error
    vocabulary = source.layout.vocabulary
    converted = rename(source.weights, vocabulary, target)
    build = {"torchvision": Architecture.build, "detectron2": build_backbone}

    def check(written: Path) -> float:
        before = _loaded(build[vocabulary](source.architecture), source.weights)
        after = _loaded(build[target](source.architecture), read_state_dict(written)[0])
        difference = feature_difference(before, after)
        if not difference <= TOLERANCE:
            raise UserError(
                f"{source_path}: features differ by {difference:.1e} after the conversion, more "
                f"than {TOLERANCE}; {path} was not written"
            )
        return difference

    content = converted if target == "torchvision" else _detectron2_file(source, converted)
    difference = write_weights(path, content, check)
    spelling = name_map(vocabulary, target)
    names = {old: spelling[stripped] for old, stripped in source.kept.items()}
    return Conversion(source, names, difference)


def _check_paths(source_path: Path, path: Path, target: str) -> None:
    suffixes = (".pkl", ".pth") if target == "detectron2" else (".pth", ".pt")
    if path.suffix not in suffixes:
        raise UserError(f"{path}: a file for {target} ends in {' or '.join(suffixes)}")
    if path.exists() and source_path.exists() and path.samefile(source_path):
        raise UserError(f"{path} would replace the file it is made from: give it another name")


def _convertible(weights, metadata, target: str) -> Source:
    if metadata.get("__author__") == "Caffe2":
        raise UserError(
            "a Caffe2 file: Detectron2 and the native engine read it as it is, and torchvision has "
            "no network for it (BGR input, stride in the first 1x1 convolution)"
        )
    source = find_resnet(weights, metadata)
    if source.layout is (TORCHVISION if target == "torchvision" else DETECTRON2):
        raise UserError(f"already a {source.layout.title}: nothing to convert")
    return source


def _detectron2_file(source: Source, weights: dict[str, Tensor]) -> dict[str, object]:
    return {
        "model": weights,
        "__author__": source.layout.author,
        "matching_heuristics": True,  # lets Detectron2 put prefixes such as backbone.bottom_up.
        "requires": source.architecture.config(),
    }


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
