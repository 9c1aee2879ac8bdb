"""One ResNet under three vocabularies (torchvision, Detectron2, Caffe2): names, shapes, proof.

Everything here works on dictionaries of tensors; `moco_det.weights` reads and writes the files.
A MoCo checkpoint holds torchvision's names under the prefix `encoder_q.`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.feature_extraction import create_feature_extractor

from moco_det.errors import UserError

VOCABULARIES = ("torchvision", "detectron2", "caffe2")

# One row for each kind of array, one column for each vocabulary. The first two columns are the rule
# of MoCo's and of Detectron2's own converters, to be read in either direction.
NAMES = (
    ("conv1.weight", "stem.conv1.weight", "conv1_w"),
    ("bn1.{norm}", "stem.conv1.norm.{norm}", "res_conv1_bn_{norm}"),
    (
        "{stage}.{block}.conv{conv}.weight",
        "{stage}.{block}.conv{conv}.weight",
        "{stage}_{block}_branch2{conv}_w",
    ),
    (
        "{stage}.{block}.bn{conv}.{norm}",
        "{stage}.{block}.conv{conv}.norm.{norm}",
        "{stage}_{block}_branch2{conv}_bn_{norm}",
    ),
    (
        "{stage}.{block}.downsample.0.weight",
        "{stage}.{block}.shortcut.weight",
        "{stage}_{block}_branch1_w",
    ),
    (
        "{stage}.{block}.downsample.1.{norm}",
        "{stage}.{block}.shortcut.norm.{norm}",
        "{stage}_{block}_branch1_bn_{norm}",
    ),
)

# How each vocabulary spells the fields of NAMES. Caffe2 files come with either of two spellings.
FIELDS = {
    "stage": tuple((f"layer{s}", f"res{s + 1}", f"res{s + 1}") for s in (1, 2, 3, 4)),
    "block": tuple((str(b),) * 3 for b in range(36)),  # ResNet-152 has 36 blocks in its res4
    "conv": (("1", "1", "a"), ("2", "2", "b"), ("3", "3", "c")),
    "norm": (
        ("weight", "weight", "s"),
        ("bias", "bias", "b"),
        ("running_mean", "running_mean", "rm"),
        ("running_var", "running_var", "riv"),
        ("weight", "weight", "gamma"),
        ("bias", "bias", "beta"),
        ("running_mean", "running_mean", "running_mean"),
        ("running_var", "running_var", "running_var"),
        ("num_batches_tracked", "num_batches_tracked", "num_batches_tracked"),
    ),
}


@cache
def name_map(source: str, target: str) -> dict[str, str]:
    """Every name that `source` has for an array of a ResNet -> the name that `target` has."""
    s, t = VOCABULARIES.index(source), VOCABULARIES.index(target)
    names = {}
    for row in NAMES:
        fields = [field for field in FIELDS if f"{{{field}}}" in row[s]]
        for spellings in product(*(FIELDS[field] for field in fields)):
            spelt = dict(zip(fields, spellings, strict=True))
            old = row[s].format(**{field: spelling[s] for field, spelling in spelt.items()})
            names[old] = row[t].format(**{field: spelling[t] for field, spelling in spelt.items()})
    return names


def rename(weights: Mapping[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """The same arrays under the names of another vocabulary; every name must be a ResNet's."""
    names = name_map(source, target)
    return {names[name]: value for name, value in weights.items()}


@dataclass(frozen=True)
class Layout:
    """Where one kind of file keeps its ResNet, and which other names it is known to hold."""

    title: str
    vocabulary: str
    prefixes: tuple[str, ...]
    dropped: str  # regular expression of the names that are no part of the ResNet

    def strip(self, name: str) -> str | None:
        """`name` without the layout's prefix, or None where it is no array of the ResNet."""
        known = name_map(self.vocabulary, "torchvision")
        stripped = (name[len(p) :] for p in self.prefixes if name.startswith(p))
        return next((s for s in stripped if s in known), None)


LAYOUTS = (
    Layout(
        "MoCo checkpoint",
        "torchvision",
        ("module.encoder_q.", "encoder_q."),
        r"(module\.)?(encoder_k\..+|encoder_q\.fc\..+|queue|queue_ptr)",
    ),
    Layout("torchvision state_dict", "torchvision", ("module.", ""), r"(module\.)?fc\..+"),
    Layout(
        "Detectron2 file",
        "detectron2",
        (
            "backbone.bottom_up.",
            "backbone.",
            "roi_heads.",
            "",
        ),  # roi_heads. holds res5 of a C4 model
        r"stem\.fc\..+|backbone\.fpn_.+|(proposal_generator|roi_heads|sem_seg_head)\..+|pixel_.+",
    ),
    Layout("Caffe2 file", "caffe2", ("",), r"conv1_b|(fc1000|pred)_[wb]"),
)
DETECTRON2 = next(layout for layout in LAYOUTS if layout.vocabulary == "detectron2")


def find_layout(names: Iterable[str]) -> Layout | None:
    """The first layout that knows at least one of the names, or None."""
    names = tuple(names)
    return next((x for x in LAYOUTS if any(x.strip(name) for name in names)), None)


@dataclass(frozen=True)
class Architecture:
    """A ResNet as torchvision and Detectron2 both parametrise it."""

    depth: int
    groups: int = 1
    width_per_group: int = 64

    def __str__(self) -> str:
        special = (self.groups, self.width_per_group) != (1, 64)
        extra = f" with {self.groups} groups of width {self.width_per_group}" if special else ""
        return f"ResNet-{self.depth}{extra}"

    @property
    def bottleneck(self) -> bool:
        return self.depth >= 50

    def build(self) -> resnet.ResNet:
        """The network of torchvision, with an `fc` layer and random weights."""
        block = resnet.Bottleneck if self.bottleneck else resnet.BasicBlock
        layers = list(BLOCKS[self.depth])
        return resnet.ResNet(
            block, layers, groups=self.groups, width_per_group=self.width_per_group
        )

    def config(self) -> dict[str, object]:
        """Detectron2's config keys that weights of this network, trained as MoCo and torchvision
        train them, need: depth and width, RGB input, ImageNet's mean and deviation, and for
        bottlenecks the stride in the 3x3 convolution."""
        needs = {
            "INPUT.FORMAT": "RGB",
            "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
            "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
            "MODEL.RESNETS.DEPTH": self.depth,
            "MODEL.RESNETS.RES2_OUT_CHANNELS": 256 if self.bottleneck else 64,
        }
        if self.bottleneck:
            needs["MODEL.RESNETS.NUM_GROUPS"] = self.groups
            needs["MODEL.RESNETS.WIDTH_PER_GROUP"] = self.width_per_group
            needs["MODEL.RESNETS.STRIDE_IN_1X1"] = False
        return needs


BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def infer_architecture(weights: Mapping[str, Tensor]) -> Architecture | None:
    """The ResNet that arrays under torchvision's names belong to; a whole stage may be absent.

    None where the numbers of blocks are no known ResNet's.
    """
    blocks = {
        match.groups() for match in map(re.compile(r"layer(\d)\.(\d+)\.").match, weights) if match
    }
    counts = Counter(stage for stage, _ in blocks)
    found = tuple(counts[stage] for stage in "1234")
    bottleneck = any(name.endswith(".conv3.weight") for name in weights)
    for depth, expected in BLOCKS.items():
        same = all(n in (0, m) for n, m in zip(found, expected, strict=True))
        if any(found) and same and bottleneck == (depth >= 50):
            conv = weights.get("layer1.0.conv2.weight")
            if not bottleneck or conv is None or conv.dim() != 4:
                return Architecture(depth)
            width, width_per_group = conv.shape[:2]  # the grouped 3x3 of a stage with 64 planes
            return Architecture(depth, max(width // width_per_group, 1), width_per_group)
    return None


@dataclass(frozen=True)
class Source:
    """The ResNet of one file.

    `weights` has the names of `layout.vocabulary`, without the file's prefix; `kept` gives for each
    used name of the file the name in `weights`; `dropped` are the file's other names.
    """

    layout: Layout
    architecture: Architecture
    weights: dict[str, Tensor]
    kept: dict[str, str]
    dropped: tuple[str, ...]


def find_resnet(weights: Mapping[str, Tensor], metadata: Mapping[str, object]) -> Source:
    """Take the ResNet out of a file's arrays, checked against what torchvision's network holds.

    Args:
        weights, metadata: as `moco_det.weights.read_state_dict` returns them.

    Raises:
        UserError: an unknown layout, a small stem, another architecture than `metadata["arch"]`, or
            arrays that are unexpected, missing, of the wrong shape or not finite, each named.
    """
    layout = find_layout(weights)
    if layout is None:
        known = ", ".join(x.title for x in LAYOUTS)
        some = ", ".join(list(weights)[:3])
        raise UserError(f"the names ({some}, ...) are of no known kind of file: {known}")
    kept = {name: layout.strip(name) for name in weights}
    kept = {name: stripped for name, stripped in kept.items() if stripped}
    dropped = tuple(name for name in weights if name not in kept)
    unexpected = [name for name in dropped if not re.fullmatch(layout.dropped, name)]
    if unexpected:
        raise UserError(f"unexpected keys in a {layout.title}: {', '.join(unexpected)}")
    if len(set(kept.values())) < len(kept):
        raise UserError("the file holds two ResNets: some names differ in nothing but their prefix")
    stripped = {new: weights[old] for old, new in kept.items()}
    _refuse_small_stem(stripped, layout, metadata)
    architecture = _decide_architecture(stripped, layout, metadata)
    _check_arrays(stripped, layout, architecture)
    return Source(layout, architecture, stripped, kept, dropped)


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
        raise UserError("the numbers of blocks in its stages are those of no known ResNet")
    if found is not None and declared is not None and found != declared:
        raise UserError(f"the checkpoint says it holds a {arch}, its arrays are a {found}")
    return found or declared


def _check_arrays(weights, layout: Layout, architecture: Architecture) -> None:
    with torch.device("meta"):
        network = architecture.build().state_dict()
    network = {name: value for name, value in network.items() if not name.startswith("fc.")}
    expected = rename(network, "torchvision", layout.vocabulary)
    faults = [f"{name} is unexpected" for name in weights.keys() - expected.keys()]
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
        raise UserError(f"not a whole {architecture}: {'; '.join(sorted(faults))}")


@torch.inference_mode()
def feature_difference(network: resnet.ResNet, backbone: nn.Module) -> float:
    """Largest absolute difference of res2..res5 of two networks on the same image.

    Computed in float64, where two orders of summation differ by less than 1e-10: what is left is a
    difference of the networks, not of the arithmetic.

    Args:
        network: torchvision's ResNet.
        backbone: module (1, 3, H, W) -> {"res2": ..., ..., "res5": ...}.
    """
    stages = {f"layer{s}": f"res{s + 1}" for s in (1, 2, 3, 4)}
    image = torch.randn(1, 3, 160, 224, generator=torch.Generator().manual_seed(0)).double()
    ours = create_feature_extractor(network.double().eval(), stages)(image)
    theirs = backbone.double().eval()(image)
    # `max` of a tensor, unlike Python's, keeps NaN: a NaN feature is no agreement.
    return torch.stack([(ours[s] - theirs[s]).abs().max() for s in stages.values()]).max().item()
