"""The ResNet of a file: recognised, whole, and as Detectron2 calls its arrays."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models import resnet

from moco_det.common.errors import UserError
from moco_det.common.processes import print_on_main
from moco_det.common.resnets import BLOCKS, Architecture, infer_architecture
from moco_det.common.weight_checks import describe_stripping, shorten, unwrapped
from moco_det.common.weight_layouts import (
    MOCO,
    Backbone,
    Layout,
    find_backbone,
    find_wrapped_layout,
    name_map,
    rename,
)
from moco_det.common.weight_sources import read_state_dict


@dataclass(frozen=True)
class Source:
    """The ResNet of one file; `weights` has the names of `layout.vocabulary`."""

    backbone: Backbone
    architecture: Architecture
    weights: dict[str, Tensor]
    metadata: Mapping[str, Any]  # of the file

    def kind(self) -> str:
        """What the file is: "MoCo checkpoint, ResNet-50"."""
        return self.backbone.kind(self.architecture, self.metadata)

    @property
    def layout(self) -> Layout:
        return self.backbone.layout

    @property
    def dropped(self) -> tuple[str, ...]:
        return self.backbone.dropped


def find_resnet(weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Source:
    """Take the ResNet out of a file's arrays, checked against what torchvision's network holds.

    Args:
        weights, metadata: as `read_state_dict` returns them.

    Raises:
        UserError: an unknown layout, a small stem, another architecture than `metadata["arch"]`, or
            arrays that are unexpected, missing, of the wrong shape or not finite, with names.
    """
    backbone = find_backbone(weights, metadata)
    resnet, layout = backbone.arrays(weights), backbone.layout
    _refuse_small_stem(resnet, layout, metadata)
    architecture = _decide_architecture(resnet, layout, metadata)
    _check_arrays(resnet, layout, architecture)
    return Source(backbone, architecture, resnet, metadata)


def _refuse_small_stem(weights, layout: Layout, metadata) -> None:
    conv = weights.get(name_map("torchvision", layout.vocabulary)["conv1.weight"])
    config = metadata.get("config")
    flagged = isinstance(config, Mapping) and config.get("small_stem")
    if flagged or (conv is not None and tuple(conv.shape[2:]) == (3, 3)):
        small = "--small-stem" if layout is MOCO else "a small stem"
        raise UserError(
            f"pretrained with {small} (a 3x3 convolution of stride 1 without max-pooling): the "
            "stem of a Detectron2 ResNet is a 7x7 convolution of stride 2 and a max-pooling, so "
            f"these weights do not fit any detector; pretrain without {small}"
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


# -- for Detectron2 -------------------------------------------------------------------------------


def detectron2_file(source: Source) -> dict[str, Any]:
    """What a file for Detectron2 holds: a ResNet under its names, and the config that it needs."""
    return {
        "model": rename(source.weights, source.layout.vocabulary, "detectron2"),
        "__author__": source.layout.author,
        "matching_heuristics": True,  # lets Detectron2 put prefixes such as backbone.bottom_up.
        "requires": source.architecture.config(),  # Detectron2 ignores it
    }


def detectron2_weights(source: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arrays of MODEL.WEIGHTS under Detectron2's names, from a file of any layout; said so.

    Args:
        source: as for `read_state_dict`. Of a Detectron2 or Caffe2 file all arrays are taken, and
            those whose names are unknown; of others the backbone.

    Returns:
        weights, metadata: as `read_state_dict` returns them; where a backbone was taken out of a
            file of another layout, metadata "requires" has the config keys that it needs.

    Raises:
        UserError: the file is unreadable, or not a whole ResNet.
    """
    weights, metadata = read_state_dict(source)
    layout, names = find_wrapped_layout(weights)
    if layout is not None and layout.vocabulary != "detectron2":
        try:
            found = find_resnet(weights, metadata)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        print_on_main(f"{source}: {found.backbone.describe(found.architecture, metadata)}")
        converted = detectron2_file(found)
        return converted.pop("model"), metadata | converted
    if layout is None or all(name.startswith("module.") for name in weights):
        names = unwrapped(weights)
    stripping = describe_stripping(names)
    if stripping:
        print_on_main(f"{source}: {stripping}")
    return {names[name]: value for name, value in weights.items()}, metadata
