"""What the arrays of a ResNet are called, and where each kind of file keeps them.

NAMES is how torchvision, Detectron2 and Caffe2 spell an array's name. LAYOUTS are the files of MoCo
and of those who publish other weights: the prefix before the backbone's names, the other names by
which such a file is recognised, and which of them are left out. `find_backbone` reads both tables;
to know another kind of file is to add a row.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from moco_det.common.errors import UserError, one_line
from moco_det.common.weight_checks import describe_stripping, shorten, unwrapped

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
        for spellings in itertools.product(*(FIELDS[field] for field in fields)):
            spelt = dict(zip(fields, spellings, strict=True))
            old = row[s].format(**{field: spelling[s] for field, spelling in spelt.items()})
            names[old] = row[t].format(**{field: spelling[t] for field, spelling in spelt.items()})
    return names


def rename(weights: Mapping[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """The same arrays under the names of another vocabulary; every name must be a ResNet's."""
    names = name_map(source, target)
    return {names[name]: value for name, value in weights.items()}


# -- kinds of files --------------------------------------------------------------------------------

# Where the arrays are in the file, the first of these that it has; else the file is the arrays.
# With it which network that is, where the file has several.
ENTRIES = {
    ("classy_state_dict", "base_model", "model", "trunk"): "",  # VISSL
    ("model_state_dict",): "",  # a trunk of VISSL
    ("teacher",): "its teacher, the moving average that its own evaluation takes",  # DINO
    ("online_network_state_dict",): "its online network",  # PyTorch-BYOL
    ("model",): "",  # Detectron2, Barlow Twins, VICReg, PixPro
    ("state_dict",): "",  # MoCo and most that followed it, Lightning, OpenMMLab
    ("blobs",): "",  # Detectron1
}

NETWORK = "__network__"  # the note on the entry, among the metadata of what was read

# The children of torchvision's ResNet by their position in an nn.Sequential of them, which is how
# lightly builds its backbones. Activation and pooling have no arrays.
CHILDREN = {"0": "conv1", "1": "bn1", "9": "fc"} | {str(s + 3): f"layer{s}" for s in (1, 2, 3, 4)}


@dataclass(frozen=True)
class Layout:
    """Where one kind of file keeps its ResNet, and which other names it is known to hold.

    Names are compared without the `module.` that DistributedDataParallel puts before them.
    """

    title: str
    author: str  # Detectron2's "__author__" of a file with these weights
    prefixes: tuple[str, ...]
    marks: tuple[str, ...] = ()  # regular expressions; each begins a name of such a file
    dropped: str = ""  # of the names beside the ResNet's; "": see `drops`
    vocabulary: str = "torchvision"
    sequential: bool = False  # the ResNet's children are numbered, see CHILDREN
    note: str = ""  # which network is taken, where the file has several

    def strip(self, name: str) -> str | None:
        """`name` as the layout's vocabulary has it, or None where it is not the ResNet's."""
        known = name_map(self.vocabulary, "torchvision")
        return next((inner for inner in self._inner(name) if inner in known), None)

    def _inner(self, name: str) -> Iterator[str]:
        """What is left of a name behind the layout's prefixes."""
        name = name.removeprefix("module.")
        for prefix in self.prefixes:
            if name.startswith(prefix):
                child, dot, rest = name[len(prefix) :].partition(".")
                yield (CHILDREN.get(child, "") if self.sequential else child) + dot + rest

    def drops(self, name: str) -> bool:
        """Whether a name that is not the ResNet's is known to be none of it.

        Without an expression that is all that has not its prefix, and a classifier that has.
        """
        if self.dropped:
            return re.fullmatch(self.dropped, name.removeprefix("module.")) is not None
        return all(re.match(r"fc\d*\.", inner) for inner in self._inner(name))

    def fits(self, names: Iterable[str]) -> bool:
        """Whether a file of these names is of this kind."""
        names = tuple(names)
        bare = [name.removeprefix("module.") for name in names]
        marked = all(any(re.match(mark, name) for name in bare) for mark in self.marks)
        return marked and any(self.strip(name) for name in names)


MOCO = Layout(
    "MoCo checkpoint",
    "MOCO",
    ("encoder_q.",),
    dropped=r"encoder_k\..+|encoder_q\.fc\..+|queue|queue_ptr|queue_backbone|bank",
)
TORCHVISION = Layout("torchvision state_dict", "torchvision", ("",), dropped=r"fc\..+")
DETECTRON2 = Layout(
    "Detectron2 file",
    "Detectron2",
    ("backbone.bottom_up.", "backbone.", "roi_heads.", ""),  # a C4 model's res5 is a head
    dropped=r"stem\.fc\..+|backbone\.(fpn_|reduce\.).+|"
    r"(proposal_generator|roi_heads|sem_seg_head)\..+|pixel_.+",
    vocabulary="detectron2",
    note="taken as trained on RGB, with the stride in the 3x3 convolution",
)

_BACKBONE = ("backbone.",)
_SOLO = (r"classifier\.(weight|bias)", r"(momentum_)?(projector|head|backbone)\.|prototypes\.")
_LIGHTLY = r"((student_|key_|teacher_)?projection_head|prediction_head|online_classifier)[._]"
_OPENMMLAB = r"(neck|head|(encoder_k|target_net|momentum_encoder)\.module|data_preprocessor)\."
_VISSL = ("_feature_blocks.", "base_model._feature_blocks.", "trunk._feature_blocks.")

# In this order: what has marks of its own, before what a prefix alone tells.
LAYOUTS = (
    Layout("ReSim checkpoint", "ReSim", ("encoder_q.",), (r"encoder_q\.fpn_lateral",),
           dropped=rf"{MOCO.dropped}|encoder_q\.fpn_.+"),
    Layout("Lightning Bolts MoCo checkpoint", "Bolts", ("encoder_q.",),
           (r"queue\.representations",)),
    MOCO,
    Layout("MoCo v3 checkpoint", "MoCo-v3", ("base_encoder.",)),
    # The backbone of these two is there twice: by itself, and as the first part of an encoder.
    Layout("DenseCL checkpoint", "DenseCL", _BACKBONE, (r"queue2$",)),
    Layout("OpenSelfSup checkpoint", "OpenSelfSup", _BACKBONE, (r"(encoder_q|online_net)\.0\.",)),
    Layout("solo-learn checkpoint", "solo-learn", _BACKBONE, _SOLO),
    Layout("DINO checkpoint", "DINO", _BACKBONE, (r"head\.last_layer\.",)),
    Layout("Barlow Twins checkpoint", "BarlowTwins", _BACKBONE,
           (r"projector\.\d", r"bn\.running_mean")),
    Layout("VICReg checkpoint", "VICReg", _BACKBONE, (r"projector\.\d",)),
    Layout("lightly checkpoint", "lightly", ("teacher_backbone.",), sequential=True,
           note="its teacher"),
    Layout("lightly checkpoint", "lightly", ("teacher_backbone.",), (r"teacher_head\.",),
           note="its teacher"),
    Layout("lightly checkpoint", "lightly", _BACKBONE, sequential=True),
    Layout("lightly checkpoint", "lightly", _BACKBONE, (_LIGHTLY,)),
    Layout("OpenMMLab checkpoint", "OpenMMLab", _BACKBONE, (_OPENMMLAB,)),
    # The method's own heads and keys, of whatever name, are no part of the backbone.
    Layout("Lightning checkpoint", "MOCO", _BACKBONE),
    Layout("PixPro checkpoint", "PixPro", ("encoder.",), (r"encoder_k\.", r"projector\.linear1\.")),
    Layout("SimSiam checkpoint", "SimSiam", ("encoder.",), (r"encoder\.fc\.", r"predictor\.")),
    Layout("solo-learn checkpoint", "solo-learn", ("encoder.",), _SOLO[:1]),  # its older versions
    Layout("Lightning Bolts SimCLR checkpoint", "Bolts", ("encoder.",), (r"projection\.model\.",)),
    Layout("Lightning checkpoint", "MOCO", ("encoder.",)),
    Layout("Lightning Bolts BYOL or SimSiam checkpoint", "Bolts", ("online_network.encoder.",),
           note="its online network"),
    Layout("byol-pytorch checkpoint", "BYOL", ("online_encoder.net.",), note="its online network"),
    Layout("PyTorch-BYOL checkpoint", "BYOL", ("encoder.",), sequential=True),
    Layout("VISSL checkpoint", "VISSL", _VISSL),
    Layout("SwAV checkpoint", "SwAV", ("",), (r"(prototypes|projection_head)\.",),
           dropped=r"(prototypes|projection_head)\..+"),
    TORCHVISION,
    DETECTRON2,
    Layout("torchvision ResNet in an nn.Sequential", "torchvision", ("",), dropped=r"9\..+",
           sequential=True),
)  # fmt: skip


# -- the backbone in a file ------------------------------------------------------------------------


@dataclass(frozen=True)
class Backbone:
    """Which names of a file are its ResNet's.

    `kept` gives for each of them what `layout.strip` makes of it; `dropped` are the file's other
    names; `stripped` are its names that a wrapper (torch.compile, DataParallel, Lightning) had
    lengthened, each with the name as it was taken.
    """

    layout: Layout
    kept: dict[str, str]
    dropped: tuple[str, ...]
    stripped: dict[str, str]

    def arrays(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The ResNet's, under the names of the layout's vocabulary."""
        return {new: weights[old] for old, new in self.kept.items()}

    def kind(self, network: object, metadata: Mapping[str, object]) -> str:
        """The kind of file, the network, and which of the file's it is; see `describe`."""
        note = metadata.get(NETWORK) or self.layout.note
        return f"{self.layout.title}, {network}" + (f" ({note})" if note else "")

    def describe(self, network: object, metadata: Mapping[str, object]) -> str:
        """One line: the kind of file, the network, and what of the file is not used.

        Args:
            network: its name.
            metadata: of the file, as `read_state_dict` returns it.
        """
        said = [self.kind(network, metadata)]
        parts = list(dict.fromkeys(map(self._part, self.dropped)))
        parts += [str(name) for name, entry in metadata.items() if _holds_weights(entry)]
        if parts:
            said.append(f"{len(parts)} part{'s' * (len(parts) > 1)} dropped: {shorten(parts)}")
        said += filter(None, [describe_stripping(self.stripped)])
        return one_line("; ".join(said), 600)  # the names are the file's

    def _part(self, name: str) -> str:
        """The module of the file that a name is in: "encoder.fc", "predictor"."""
        name = self.stripped.get(name, name).removeprefix("module.")
        depth = max((p.count(".") for p in self.layout.prefixes if name.startswith(p)), default=0)
        return ".".join(name.split(".")[: depth + 1])


def _holds_weights(entry: object) -> bool:
    """Whether an entry of a file is another network, such as a student or an average."""
    values = entry.values() if isinstance(entry, Mapping) else ()
    return any(isinstance(value, Tensor) and value.dim() > 1 for value in values)


def find_layout(names: Iterable[str]) -> Layout | None:
    """The first layout that fits the names, or None."""
    names = tuple(names)
    return next((layout for layout in LAYOUTS if layout.fits(names)), None)


def find_wrapped_layout(names: Iterable[str]) -> tuple[Layout | None, dict[str, str]]:
    """`find_layout`, behind the prefixes of wrappers too; each name with the one that it knows."""
    names = tuple(names)
    layout = find_layout(names)
    if layout is not None:
        return layout, {name: name for name in names}
    inner = unwrapped(names)
    return find_layout(inner.values()), inner


def given_backbone(metadata: Mapping[str, object]) -> str:
    """The class of the network that a Python program had pretrained here in place of a ResNet of a
    known name, as `pretrain.pretrain` notes it in a checkpoint's flags; "" in other files."""
    flags = metadata.get("config")
    given = flags.get("backbone") if isinstance(flags, Mapping) else None
    return one_line(given, 100) if isinstance(given, str) else ""


def find_backbone(names: Iterable[str], metadata: Mapping[str, object] | None = None) -> Backbone:
    """Which of a file's names are its ResNet's.

    Args:
        metadata: of the file, as `read_state_dict` returns it.

    Raises:
        UserError: an unknown layout, names that such a file does not have, or two ResNets.
    """
    try:
        return _find_backbone(tuple(names))
    except UserError as error:
        given = given_backbone(metadata or {})
        if not given:
            raise
        raise UserError(
            f"it holds the backbone of a Python program, a {given}, and only a program with that "
            "network can load it (pretrain/README.md, From Python): commands know ResNets"
        ) from error


def _find_backbone(names: tuple[str, ...]) -> Backbone:
    layout, inner = find_wrapped_layout(names)
    if layout is None:
        raise UserError(unknown_layout(names))
    kept = {name: layout.strip(new) for name, new in inner.items()}
    kept = {name: stripped for name, stripped in kept.items() if stripped}
    dropped = tuple(name for name in names if name not in kept)
    unexpected = [name for name in dropped if not layout.drops(inner[name])]
    # A module of Lightning has parts beside the backbone whose names nobody knows.
    wrapped = any(old != new for old, new in inner.items())
    if unexpected and not wrapped:
        raise UserError(f"unexpected keys in a {layout.title}: {shorten(unexpected)}")
    if len(set(kept.values())) < len(kept):
        raise UserError("it holds two ResNets: some of its names differ only in their prefix")
    if layout.prefixes == _BACKBONE:  # a word that says little of what it is before
        inner |= {
            name: inner[name].removeprefix("module.").removeprefix("backbone.") for name in kept
        }
    stripped = {old: new for old, new in inner.items() if old != new}
    return Backbone(layout, kept, dropped, stripped)


def unknown_layout(names: Iterable[str]) -> str:
    """What to say of a file of no known layout: its first names, and the layouts."""
    some = ", ".join(one_line(name, 60) for name in itertools.islice(names, 10))
    known = ", ".join(dict.fromkeys(x.title.removesuffix(" checkpoint") for x in LAYOUTS))
    return f"its names ({some}, ...) are not those of a known kind of file: {known}"
