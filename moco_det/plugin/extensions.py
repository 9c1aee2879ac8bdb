"""What Detectron2 lacks, added to it: config keys, and the paper's modules in its registries.

The modules are those of `native.modeling` with Detectron2's norms:

- ROI_HEADS: `Res5ROIHeadsExtraNorm`, the C4 head with a norm after res5;
- BACKBONE: `build_resnet_dilated_c5_backbone`, dilated res5 with a 3x3 reduction
  (MODEL: {BACKBONE: {NAME: build_resnet_dilated_c5_backbone}, RESNETS: {RES5_DILATION: 2}});
- SEM_SEG_HEADS: `FCN16Head`, for label maps on a dilated res5
  (MODEL: {META_ARCHITECTURE: SemanticSegmentor, SEM_SEG_HEAD: {NAME: FCN16Head,
  COMMON_STRIDE: 16}}), and `FCNDepthHead`, for depth maps;
- META_ARCH: `DepthEstimator`, a SemanticSegmentor of depths.

And what SOLVER.OPTIMIZER and WarmupPolyLR name: `build_optimizer`, `build_lr_scheduler`.
"""

import re
from collections.abc import Sequence
from functools import partial

from detectron2 import solver
from detectron2.config import CfgNode, configurable, get_cfg
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    Backbone,
    SemanticSegmentor,
    build_resnet_backbone,
)
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn, random
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from moco_det.common.errors import UserError, one_line
from moco_det.config import loading as native_config
from moco_det.config.checks import check_dilated_c5
from moco_det.config.loading import (
    KEYS,
    as_written,
    check_value,
    leaves,
    nearest,
    on_available_device,
)
from moco_det.native.modeling import backbones, semantic_head
from moco_det.native.modeling.layers import Norm

# -- config ---------------------------------------------------------------------------------------


def add_moco_config(cfg: CfgNode) -> None:
    """Add the `own` keys of moco_det/config/keys.yaml, with their defaults, to a Detectron2 config.

    Also its `densepose` ones, where the DensePose project has not added them: this project's YAMLs
    say only there that they are of use, and can be read without it.
    """
    for key in KEYS["own"] + KEYS["densepose"]:
        section, _, name = key.rpartition(".")
        node, default = cfg, native_config.get_cfg()
        for part in filter(None, section.split(".")):
            node, default = node[part], default[part]
        if name not in node:
            value = default[name]
            node[name] = CfgNode(value) if isinstance(value, dict) else value


def add_dense_pose_config(cfg: CfgNode) -> None:
    """Add all keys of Detectron2's DensePose project, and its heads to the registries.

    Raises:
        UserError: it, or a package that it needs, is not there.
    """
    try:
        from densepose import add_densepose_config
    except ImportError as error:
        raise UserError(
            f"MODEL.DENSEPOSE_ON True needs Detectron2's DensePose project ({error}): pip install "
            "'git+https://github.com/facebookresearch/detectron2.git#subdirectory=projects/"
            "DensePose', or use --engine native"
        ) from error
    add_densepose_config(cfg)


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """A YAML file over Detectron2's defaults, then the `KEY VALUE ...` list `opts` over both.

    Frozen. MODEL.DEVICE becomes "cpu" where it asks for CUDA and there is none.

    Raises:
        UserError: an unreadable file, an unknown key (with the nearest known one), a wrong type;
            dense pose, and the DensePose project is not installed.
    """
    cfg = get_cfg()
    try:
        if as_written(config_file, opts, "MODEL.DENSEPOSE_ON", False) == "True":
            add_dense_pose_config(cfg)
        add_moco_config(cfg)
        cfg.merge_from_file(config_file, allow_unsafe=False)
        cfg.merge_from_list(list(opts))
    except (KeyError, ValueError, AssertionError, OSError) as error:
        message = " ".join(str(error).replace("'", "").split())
        unknown = re.search(r"Non-existent (?:config )?key: (\S+)", message)
        if unknown:
            close = nearest(unknown[1], [key for key, _ in leaves(cfg)])
            message = f"unknown key {unknown[1]}; the nearest is {close}"
        raise UserError(one_line(f"config {config_file}: {message}", 290)) from error
    for key, value in leaves(cfg):
        check_value(key, value, config_file)
    cfg = on_available_device(cfg)
    cfg.freeze()
    return cfg


# -- modules --------------------------------------------------------------------------------------


def detectron2_norm(name: str) -> Norm:
    """Detectron2's normalisation of this name, "" for none, as native layers take it."""
    return partial(get_norm, name) if name else ""


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """res5 as box head, followed by a norm, as `roi_heads.res5.norm`.

    MoCo v1, Sec. 4.2 and appendix: with BN trained, the head's output must be normalised as well.
    The name and the parameter's name are those of facebookresearch/moco's detection code.
    """

    @classmethod
    def _build_res5_block(cls, cfg):
        res5, channels = super()._build_res5_block(cfg)
        res5.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
        return res5, channels


class DilatedC5(backbones.DilatedC5, Backbone):
    """The native backbone as one of Detectron2's, around Detectron2's own ResNet."""

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(channels=self.channels[name], stride=self.strides[name])
            for name in self.channels
        }


@BACKBONE_REGISTRY.register()
def build_resnet_dilated_c5_backbone(cfg, input_shape: ShapeSpec) -> DilatedC5:
    """Called by Detectron2 where MODEL.BACKBONE.NAME is this function's name.

    Raises:
        UserError: the ResNet of the config has no dilated res5.
    """
    check_dilated_c5(cfg)
    resnet = build_resnet_backbone(cfg, input_shape)
    res5 = resnet.output_shape()["res5"]
    norm = detectron2_norm(cfg.MODEL.RESNETS.NORM)
    return DilatedC5(resnet, res5.channels, res5.stride, norm)


class _Head:
    """A native head of pixels by Detectron2's convention for heads."""

    @configurable
    def __init__(self, **arguments):
        with random.fork_rng(devices=[]):
            super().__init__(**arguments)
        # Drawn layer by layer, unlike natively: so a seed gives what it has always given here.
        for conv in (self.conv1, self.conv2):
            conv.reset_parameters()
            c2_msra_fill(conv)
        self.predictor.reset_parameters()
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        """UserError where the backbone has not the feature that the config names."""
        channels = {name: shape.channels for name, shape in input_shape.items()}
        strides = {name: shape.stride for name, shape in input_shape.items()}
        arguments = semantic_head.semantic_head_arguments(cfg, channels, strides)
        return arguments | {"norm": detectron2_norm(arguments["norm"])}

    def forward(self, features: dict[str, Tensor], targets: Tensor | None = None):
        """
        Args:
            features: the one of `in_feature` is (N, C, h, w).
            targets: maps (N, H, W) of labels or depths, needed in training.

        Returns:
            In training (None, the losses by name). In inference (logits or depths, {}), these
            (N, K, stride * h, stride * w), of which SemanticSegmentor cuts out the images.
        """
        found = super().forward(features)
        return (None, self.losses(found, targets)) if self.training else (found, {})


@SEM_SEG_HEADS_REGISTRY.register()
class FCN16Head(_Head, semantic_head.FCN16Head):
    """Of label maps."""


@SEM_SEG_HEADS_REGISTRY.register()
class FCNDepthHead(_Head, semantic_head.FCNDepthHead):
    """Of depth maps."""


@META_ARCH_REGISTRY.register()
class DepthEstimator(SemanticSegmentor):
    """Detectron2's SemanticSegmentor, whose maps are of depths: "depth" of inputs and results."""

    def forward(self, batched_inputs: list[dict]):
        """{"loss_depth"} in training, in inference {"depth": metres (height, width)} per image."""
        named = [{**x, "sem_seg": x["depth"]} if "depth" in x else x for x in batched_inputs]
        found = super().forward(named)
        return found if self.training else [{"depth": x["sem_seg"][0]} for x in found]


# -- solver ---------------------------------------------------------------------------------------


def build_optimizer(cfg, model: nn.Module) -> Optimizer:
    """Detectron2's, or Adam over the same groups of parameters where SOLVER.OPTIMIZER says so."""
    if cfg.SOLVER.OPTIMIZER != "Adam":
        return solver.build_optimizer(cfg, model)
    from detectron2.solver.build import maybe_add_gradient_clipping

    groups = solver.get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
    )
    decay = cfg.SOLVER.WEIGHT_DECAY
    return maybe_add_gradient_clipping(cfg, Adam(groups, cfg.SOLVER.BASE_LR, weight_decay=decay))


def build_lr_scheduler(cfg, optimizer: Optimizer) -> LRScheduler:
    """Detectron2's; WarmupPolyLR is in its DeepLab project."""
    if cfg.SOLVER.LR_SCHEDULER_NAME != "WarmupPolyLR":
        return solver.build_lr_scheduler(cfg, optimizer)
    try:
        from detectron2.projects.deeplab.lr_scheduler import WarmupPolyLR
    except ImportError as error:
        raise UserError(
            f"SOLVER.LR_SCHEDULER_NAME WarmupPolyLR needs Detectron2's DeepLab project ({error}): "
            "install Detectron2 from its repository, or use --engine native"
        ) from error
    return WarmupPolyLR(
        optimizer,
        cfg.SOLVER.MAX_ITER,
        warmup_factor=cfg.SOLVER.WARMUP_FACTOR,
        warmup_iters=cfg.SOLVER.WARMUP_ITERS,
        warmup_method=cfg.SOLVER.WARMUP_METHOD,
        power=cfg.SOLVER.POLY_LR_POWER,
    )
