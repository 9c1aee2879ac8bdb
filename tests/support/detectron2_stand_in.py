"""A stand-in for the part of Detectron2 that the plugin is written against.

It lets the plugin be imported, and its own code be tested, where Detectron2 is not installed. What
the plugin relies on does here what it does in Detectron2, in as few lines; models and optimizers
are the native engine's, which are held to Detectron2's elsewhere. Everything else that is imported
is a `Placeholder`, which only keeps its arguments. The tests that use it run with Detectron2 itself
as well, where it is installed: that keeps the stand-in honest.
"""

import enum
import functools
import inspect
import sys
import types
from collections import UserDict
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist
from fvcore.common.checkpoint import Checkpointer
from fvcore.common.config import CfgNode
from fvcore.common.registry import Registry
from fvcore.nn.precise_bn import get_bn_modules
from PIL import Image
from torch import nn

from moco_det.config.checks import scaled_to_processes
from moco_det.config.loading import KEYS
from moco_det.config.loading import get_cfg as native_cfg
from moco_det.native.engine.solver import build_lr_scheduler, build_optimizer
from moco_det.native.modeling.backbones import build_resnet
from moco_det.native.modeling.layers import get_norm
from moco_det.native.modeling.meta_arch import build_model


class Placeholder:
    """Keeps what it was made with."""

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs


# -- config, layers, modeling ---------------------------------------------------------------------


def get_cfg() -> CfgNode:
    """The native defaults without the keys that the plugin adds."""
    cfg = CfgNode(native_cfg())
    for key in KEYS["own"] + KEYS["densepose"]:
        *sections, name = key.split(".")
        del functools.reduce(lambda node, part: node[part], sections, cfg)[name]
    return cfg


def configurable(init):
    @functools.wraps(init)
    def wrapped(self, *args, **kwargs):
        if args and isinstance(args[0], CfgNode):
            names = inspect.signature(type(self).from_config).parameters
            more = {name: kwargs.pop(name) for name in list(kwargs) if name not in names}
            kwargs, args = type(self).from_config(*args, **kwargs) | more, ()
        init(self, *args, **kwargs)

    return wrapped


@dataclass
class ShapeSpec:
    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None


class Backbone(nn.Module):
    size_divisibility = 0


def build_resnet_backbone(cfg, input_shape):
    resnet = build_resnet(cfg)
    shapes = {
        n: ShapeSpec(channels=c, stride=resnet.strides[n]) for n, c in resnet.channels.items()
    }
    resnet.output_shape = lambda: shapes
    return resnet


class SemanticSegmentor(Placeholder, nn.Module):
    pass


class Res5ROIHeads(nn.Module):
    @classmethod
    def _build_res5_block(cls, cfg):
        channels = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 8
        return nn.Sequential(nn.Conv2d(channels // 2, channels, 1)), channels


# -- data -----------------------------------------------------------------------------------------


class DatasetCatalog(UserDict):
    def register(self, name, function):
        assert name not in self
        self[name] = function

    def get(self, name):
        return self[name]()


class Metadata(types.SimpleNamespace):
    def set(self, **fields):
        for name, value in fields.items():
            assert getattr(self, name, value) == value  # it may not be changed
        vars(self).update(fields)
        return self

    def get(self, key, default=None):
        return getattr(self, key, default)

    def as_dict(self):
        return dict(vars(self))


class MetadataCatalog(UserDict):
    def get(self, name):
        return self.setdefault(name, Metadata(name=name))

    def remove(self, name):
        del self[name]


def read_image(file_name, format=None):
    with Image.open(file_name) as image:
        return convert_PIL_to_numpy(image, format)


def convert_PIL_to_numpy(image, format):
    if format is not None:
        image = image.convert("RGB" if format == "BGR" else format)
    pixels = np.asarray(image)
    return {"BGR": pixels[..., ::-1], "L": pixels[..., None]}.get(format, pixels)


def check_image_size(record, image):
    assert image.shape[:2] == (record["height"], record["width"])


def build_augmentation(cfg, is_train):
    resize = ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN)
    return [resize, RandomFlip()] if cfg.INPUT.RANDOM_FLIP != "none" else [resize]


class Augmentation:
    def _init(self, arguments):
        vars(self).update((k, v) for k, v in arguments.items() if k not in ("self", "__class__"))

    def _rand_range(self, low, high):
        return np.random.uniform(low, high)


class ResizeShortestEdge(Augmentation, Placeholder):
    pass


class Resize(Augmentation, Placeholder):
    pass


class RandomFlip(Augmentation):
    def get_transform(self, image):
        return HFlip() if self._rand_range(0, 1) < 0.5 else None


class HFlip:
    def apply_image(self, image, nearest=False):
        return image[:, ::-1]


class RandomCrop(Augmentation):
    def __init__(self, crop_type, crop_size):
        self.crop_type, self.crop_size = crop_type, crop_size

    def get_transform(self, image):
        sides = zip(image.shape, self.crop_size, strict=False)
        starts = [int(self._rand_range(0, max(side - size, 0) + 1)) for side, size in sides]
        rows, columns = (slice(a, a + b) for a, b in zip(starts, self.crop_size, strict=True))
        crop = types.SimpleNamespace()
        crop.apply_image = lambda image, nearest=False: image[rows, columns]
        return crop


@dataclass
class ResizeTransform:
    h: int
    w: int
    new_h: int
    new_w: int
    interp: int

    def apply_image(self, image, nearest=False):
        method = Image.NEAREST if nearest else self.interp
        return np.asarray(Image.fromarray(image).resize((self.new_w, self.new_h), method))


@dataclass
class AugInput:
    image: np.ndarray
    sem_seg: np.ndarray | None = None


class AugmentationList:
    def __init__(self, augmentations):
        self.augmentations = augmentations

    def __call__(self, data):
        for augmentation in self.augmentations:
            transform = augmentation.get_transform(data.image)
            if transform is not None:
                data.image = transform.apply_image(data.image)
                if hasattr(transform, "apply_segmentation"):
                    data.sem_seg = transform.apply_segmentation(data.sem_seg)
                else:
                    data.sem_seg = transform.apply_image(data.sem_seg, nearest=True)


# -- structures and evaluators --------------------------------------------------------------------


class BoxMode(enum.IntEnum):
    XYXY_ABS = 0
    XYWH_ABS = 1


class Boxes:
    def __init__(self, tensor):
        self.tensor = tensor

    def __len__(self):
        return len(self.tensor)


class Instances:
    def __init__(self, image_size, **fields):
        self.image_size = image_size
        vars(self).update(fields)

    def has(self, name):
        return hasattr(self, name)

    def get(self, name):
        return getattr(self, name)


class Keypoints:
    def __init__(self, keypoints):
        self.tensor = keypoints


class PolygonMasks:
    def __init__(self, polygons):
        self.polygons = polygons


class BitMasks:
    def __init__(self, tensor):
        self.tensor = tensor


class DatasetEvaluators:
    def __init__(self, evaluators):
        self._evaluators = evaluators


# -- processes, trainers, checkpoints -------------------------------------------------------------


def get_world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process():
    return not dist.is_initialized() or dist.get_rank() == 0


def gather(data):
    return [data]  # of one process


def nothing(*args, **kwargs):
    pass


@contextmanager
def event_storage():
    yield


class TrainerBase:
    def __init__(self):
        self._hooks = []

    def register_hooks(self, hooks):
        self._hooks += [hook for hook in hooks if hook is not None]

    def state_dict(self):
        return {"iteration": self.iter}


class DefaultTrainer(TrainerBase):
    @staticmethod
    def auto_scale_workers(cfg, num_workers):
        return scaled_to_processes(cfg, num_workers)

    @classmethod
    def build_model(cls, cfg):
        return build_model(cfg)

    @classmethod
    def build_optimizer(cls, cfg, model):
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def test(cls, cfg, model):
        return {}

    def build_hooks(self):
        test = self.cfg.TEST
        period, batches = test.EVAL_PERIOD, test.PRECISE_BN.NUM_ITER
        loader = self.build_train_loader(self.cfg)
        precise = PreciseBN(period, self.model, loader, batches)
        return [Placeholder(), precise if test.PRECISE_BN.ENABLED else None, Placeholder()]

    @property
    def model(self):
        return self._trainer.model


class SimpleTrainer(TrainerBase):
    def __init__(self, model, data_loader, optimizer):
        super().__init__()
        model.train()
        self.model, self.data_loader, self.optimizer = model, data_loader, optimizer
        self.iter = 0

    @functools.cached_property
    def _data_loader_iter(self):
        return iter(self.data_loader)

    def state_dict(self):
        return {"iteration": self.iter, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.iter = state["iteration"]
        self.optimizer.load_state_dict(state["optimizer"])


class AMPTrainer(SimpleTrainer):
    pass


class PreciseBN:
    def __init__(self, period, model, data_loader, num_iter):
        self._disabled = not get_bn_modules(model)
        if not self._disabled:
            self._model, self._data_loader = model, data_loader
            self._num_iter, self._period, self._data_iter = num_iter, period, None


class DetectionCheckpointer(Checkpointer):
    pass


# -- as modules -----------------------------------------------------------------------------------

CONTENT = {
    "config": [CfgNode, configurable, get_cfg],
    "layers": [ShapeSpec, get_norm],
    "modeling": [Backbone, SemanticSegmentor, build_resnet_backbone, build_model],
    "modeling.roi_heads": [Res5ROIHeads],
    "data": [],
    "data.detection_utils": [
        read_image, convert_PIL_to_numpy, check_image_size, build_augmentation,
    ],
    "data.transforms": [
        Augmentation, AugInput, AugmentationList, RandomCrop, Resize, ResizeTransform,
        ResizeShortestEdge,
    ],
    "evaluation": [DatasetEvaluators],
    "structures": [BoxMode, Boxes, Instances, Keypoints, PolygonMasks, BitMasks],
    "utils": [],
    "utils.comm": [get_world_size, is_main_process, gather],
    "utils.events": [],
    "checkpoint": [DetectionCheckpointer],
    "engine": [TrainerBase, DefaultTrainer, SimpleTrainer, AMPTrainer],
    "engine.hooks": [PreciseBN],
    "solver": [build_optimizer, build_lr_scheduler],
}  # fmt: skip
# Classes and functions whose arguments are all that matters.
PLACEHOLDERS = {
    "data": ["DatasetMapper", "build_detection_test_loader", "build_detection_train_loader",
             "get_detection_dataset_dicts"],
    "data.transforms": ["Transform"],
    "evaluation": ["COCOEvaluator", "PascalVOCDetectionEvaluator", "DatasetEvaluator"],
}  # fmt: skip


def modules() -> dict[str, types.ModuleType]:
    """Fresh ones, by the names of Detectron2's."""
    found = {"detectron2": types.ModuleType("detectron2")}
    for name, content in CONTENT.items():
        module = found[f"detectron2.{name}"] = types.ModuleType(f"detectron2.{name}")
        vars(module).update((entry.__name__, entry) for entry in content)
        for entry in PLACEHOLDERS.get(name, ()):
            setattr(module, entry, type(entry, (Placeholder,), {}))
    for name in sorted(found, reverse=True):
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(found[parent], child, found[name])
    modeling, heads = found["detectron2.modeling"], found["detectron2.modeling.roi_heads"]
    modeling.BACKBONE_REGISTRY, modeling.SEM_SEG_HEADS_REGISTRY = Registry("b"), Registry("s")
    modeling.META_ARCH_REGISTRY = Registry("m")
    heads.ROI_HEADS_REGISTRY = Registry("r")
    data = found["detectron2.data"]
    data.DatasetCatalog, data.MetadataCatalog = DatasetCatalog(), MetadataCatalog()
    found["detectron2.utils.events"].EventStorage = event_storage
    found["detectron2.utils.events"].has_event_storage = lambda: False
    found["detectron2.utils.events"].get_event_storage = nothing
    found["detectron2.utils.comm"].synchronize = nothing
    found["detectron2.utils.comm"].create_local_process_group = nothing
    found["detectron2.engine"].create_ddp_model = lambda model, **options: model
    found["detectron2.engine"].default_setup = nothing
    return found


@contextmanager
def detectron2(real: bool):
    """While open, `detectron2` and `moco_det.plugin` are those of the stand-in, or the `real` ones.

    What was imported before is put back.
    """
    import moco_det

    def ours() -> dict:
        rooms = ("detectron2", "moco_det.plugin")
        return {n: m for n, m in sys.modules.items() if n.startswith(rooms)}

    if real:
        yield
        return
    before, attribute = ours(), vars(moco_det).get("plugin")
    for name in before:
        del sys.modules[name]
    sys.modules.update(modules())
    try:
        yield
    finally:
        for name in ours():
            del sys.modules[name]
        sys.modules.update(before)
        vars(moco_det).pop("plugin", None)
        if attribute is not None:
            moco_det.plugin = attribute
