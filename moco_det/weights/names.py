"""What the arrays of a ResNet are called: by torchvision, by Detectron2, by Caffe2.

A MoCo checkpoint holds torchvision's names under the prefix `encoder_q.`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product

from torch import Tensor
from torchvision.models import resnet

from moco_det.common.resnets import BLOCKS, WidenedResNet
from moco_det.common.weight_checks import unwrapped

VOCABULARIES = ("torchvision", "detectron2", "caffe2")

# One row for each kind of array, one column for each vocabulary. The first two columns are the rule
# of MoCo's and of Detectron2's own converters, to be read in either direction. {s}: stage,
# {b}: block, {c}: convolution, {n}: what it is of a norm.
NAMES = (
    ("conv1.weight", "stem.conv1.weight", "conv1_w"),
    ("bn1.{n}", "stem.conv1.norm.{n}", "res_conv1_bn_{n}"),
    ("{s}.{b}.conv{c}.weight", "{s}.{b}.conv{c}.weight", "{s}_{b}_branch2{c}_w"),
    ("{s}.{b}.bn{c}.{n}", "{s}.{b}.conv{c}.norm.{n}", "{s}_{b}_branch2{c}_bn_{n}"),
    ("{s}.{b}.downsample.0.weight", "{s}.{b}.shortcut.weight", "{s}_{b}_branch1_w"),
    ("{s}.{b}.downsample.1.{n}", "{s}.{b}.shortcut.norm.{n}", "{s}_{b}_branch1_bn_{n}"),
)

NORM = ("weight", "bias", "running_mean", "running_var")

# How each vocabulary spells the fields of NAMES. Caffe2 files come with either of two spellings.
FIELDS = {
    "s": tuple((f"layer{s}", f"res{s + 1}", f"res{s + 1}") for s in (1, 2, 3, 4)),
    "b": tuple((str(b),) * 3 for b in range(36)),  # ResNet-152 has 36 blocks in its res4
    "c": (("1", "1", "a"), ("2", "2", "b"), ("3", "3", "c")),
    "n": (
        *zip(NORM, NORM, ("s", "b", "rm", "riv"), strict=True),
        *zip(NORM, NORM, ("gamma", "beta", "running_mean", "running_var"), strict=True),
        ("num_batches_tracked",) * 3,
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
    author: str  # Detectron2's "__author__" of a file with these weights
    vocabulary: str
    prefixes: tuple[str, ...]
    dropped: str  # regular expression of the names that do not belong to the ResNet

    def strip(self, name: str) -> str | None:
        """`name` without the layout's prefix, or None where it is not an array of the ResNet."""
        known = name_map(self.vocabulary, "torchvision")
        stripped = (name[len(p) :] for p in self.prefixes if name.startswith(p))
        return next((s for s in stripped if s in known), None)


MOCO = Layout(
    "MoCo checkpoint",
    "MOCO",
    "torchvision",
    ("module.encoder_q.", "encoder_q."),
    r"(module\.)?(encoder_k\..+|encoder_q\.fc\..+|queue|queue_ptr|bank)",
)
TORCHVISION = Layout(
    "torchvision state_dict", "torchvision", "torchvision", ("module.", ""), r"(module\.)?fc\..+"
)
# The method's own heads and keys, of whatever name, are no part of the backbone.
LIGHTNING = Layout("Lightning checkpoint", "MOCO", "torchvision", ("backbone.",), r".+")
DETECTRON2 = Layout(
    "Detectron2 file",
    "Detectron2",
    "detectron2",
    ("backbone.bottom_up.", "backbone.", "roi_heads.", ""),  # a C4 model's res5 is a head
    r"stem\.fc\..+|backbone\.(fpn_|reduce\.).+|"
    r"(proposal_generator|roi_heads|sem_seg_head)\..+|pixel_.+",
)


def find_layout(names: Iterable[str]) -> Layout | None:
    """The first layout that knows at least one of the names, or None."""
    names = tuple(names)
    layouts = (MOCO, TORCHVISION, DETECTRON2, LIGHTNING)
    return next((x for x in layouts if any(x.strip(name) for name in names)), None)


def find_wrapped_layout(names: Iterable[str]) -> tuple[Layout | None, dict[str, str]]:
    """`find_layout`, behind the prefixes of wrappers too; each name with the one that it knows."""
    names = tuple(names)
    layout = find_layout(names)
    if layout is not None:
        return layout, {name: name for name in names}
    inner = unwrapped(names)
    return find_layout(inner.values()), inner


@dataclass(frozen=True)
class Architecture:
    """A ResNet as torchvision and Detectron2 both parametrise it.

    `width_per_group` is Detectron2's, of res2's 3x3 convolutions. `widening` is the factor of all
    other channels, the stem's and the stages': the MoCo paper's R50w2x is (50, 1, 128, 2), where
    torchvision's wide_resnet50_2 is (50, 1, 128, 1). Below 1 it narrows.
    """

    depth: int
    groups: int = 1
    width_per_group: int = 64
    widening: float = 1

    def __str__(self) -> str:
        name = f"ResNet-{self.depth}" + (f"w{self.widening:g}x" if self.widening != 1 else "")
        special = (self.groups, self.width_per_group) != (1, 64 * self.widening)
        extra = f" with {self.groups} groups of width {self.width_per_group}" if special else ""
        return name + extra

    @property
    def bottleneck(self) -> bool:
        return self.depth >= 50

    @property
    def stem_channels(self) -> int:
        return int(64 * self.widening)

    @property
    def res2_channels(self) -> int:
        return int((256 if self.bottleneck else 64) * self.widening)

    def build(self) -> resnet.ResNet:
        """The network of torchvision, with an `fc` layer and random weights."""
        block = resnet.Bottleneck if self.bottleneck else resnet.BasicBlock
        layers = list(BLOCKS[self.depth])
        width = int(self.width_per_group / self.widening)  # torchvision's: of 64 planes
        return WidenedResNet(
            self.widening, block, layers, groups=self.groups, width_per_group=width
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
            "MODEL.RESNETS.STEM_OUT_CHANNELS": self.stem_channels,
            "MODEL.RESNETS.RES2_OUT_CHANNELS": self.res2_channels,
        }
        if self.bottleneck:
            needs["MODEL.RESNETS.NUM_GROUPS"] = self.groups
            needs["MODEL.RESNETS.WIDTH_PER_GROUP"] = self.width_per_group
            needs["MODEL.RESNETS.STRIDE_IN_1X1"] = False
        return needs


def infer_architecture(weights: Mapping[str, Tensor]) -> Architecture | None:
    """The ResNet that arrays under torchvision's names belong to; a whole stage may be absent.

    None where the numbers of blocks are not those of a known ResNet.
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
            if not bottleneck:
                return Architecture(depth)
            width, width_per_group = _conv_shape(weights, "layer1.0.conv2.weight", (64, 64))
            out_channels, _ = _conv_shape(weights, "layer1.0.conv3.weight", (256, 64))
            groups = max(width // width_per_group, 1)
            return Architecture(depth, groups, width_per_group, out_channels / 256 or 1)
    return None


def _conv_shape(weights: Mapping[str, Tensor], name: str, usual: tuple[int, int]):
    """Output channels and input channels of a group; `usual` where there is no such array."""
    conv = weights.get(name)
    return usual if conv is None or conv.dim() != 4 else tuple(conv.shape[:2])
