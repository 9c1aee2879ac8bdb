"""Weights: the ResNet of any checkpoint, into detectors and into the files of other libraries.

What fills a detector or writes a file of arrays belongs here; a run's whole state does not (the
engines' checkpoints), nor whether weights fit a config (`moco_det.config.checks`). What pretraining
shares is in `moco_det.common`: `weight_layouts.py`, the names that each kind of file has for its
arrays, is where to start; `weight_sources.py` finds, downloads and reads a file. Here `resnet.py`
takes a whole ResNet out of one, `files.py` fills a detector and writes, and `conversion.py` makes
one kind of file from another.
"""

# What loads a converted file -> how the file's name may end.
SUFFIXES = {
    "detectron2": (".pkl", ".pth"),
    "torchvision": (".pth", ".pt"),
    "timm": (".safetensors", ".pth"),
    "safetensors": (".safetensors",),
    "mmdetection": (".pth",),
}
