"""How fast the data path and a detector are, each beside a reference that is timed in the same run.

The references are the ones that users come from: the torchvision + PIL pipeline, and, for a
detector, the other engine. A pretraining step's is in `pretrain_step.py`.
"""

import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms

from moco_det.benchmark.cost import peak_memory_of_process
from moco_det.common.errors import UserError
from moco_det.common.images import UnreadableImage, read_image
from moco_det.config.loading import load_config
from moco_det.engines import probe_class
from moco_det.parity import comparison as parity
from moco_det.parity.probe import EngineProbe
from pretrain.data.augmentations import MoCoAugmentation
from pretrain.data.images import find_images
from pretrain.moco.instance_discrimination import PIXEL_MEAN, PIXEL_STD


def alternate(
    candidates: dict[str, Callable], rounds: int, synchronize: Callable | None = None
) -> dict[str, float]:
    """Median seconds of each candidate over `rounds` rounds in turn, after one untimed round.

    Turns rather than blocks, so that a machine that slows down slows down all candidates.
    """
    times = {name: [] for name in candidates}
    for round_number in range(rounds + 1):
        for name, candidate in candidates.items():
            begun = time.perf_counter()
            candidate()
            if synchronize:
                synchronize()
            if round_number:
                times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in times.items()}


# -- the data path --------------------------------------------------------------------------------


def data_path(images: Path, image_size: int, rounds: int) -> dict[str, float]:
    """Median seconds per image on one core, decoding and two MoCo v2 views, alternated."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    random.seed(0)
    torch.manual_seed(0)
    paths = [str(images / p.decode()) for p in rng.permutation(find_images(images))[:200]]
    augment, transform = MoCoAugmentation(image_size, aug_plus=True), official_transform(image_size)

    def ours():
        for path in paths:
            image = read_image(path)
            augment(image, rng), augment(image, rng)

    def reference():
        for path in paths:
            with open(path, "rb") as file:
                image = Image.open(file).convert("RGB")
            transform(image), transform(image)

    try:
        seconds = alternate({"reference": reference, "ours": ours}, rounds)
    except UnreadableImage as error:
        raise UserError(f"unreadable image in --images: {error}") from error
    return {name: value / len(paths) for name, value in seconds.items()}


def official_transform(image_size: int) -> transforms.Compose:
    """MoCo v2's augmentation as torchvision on PIL images does it, to a normalised tensor."""

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(image_size, scale=(0.2, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([blur], p=0.5),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([m / 255 for m in PIXEL_MEAN], [s / 255 for s in PIXEL_STD]),
        ]
    )


# -- a detector, engine by engine: same weights, same images --------------------------------------


@dataclass(frozen=True)
class DetectorTask:
    """What is timed: the detector of a YAML on drawn images, the largest `height` x `width`."""

    config_file: str
    opts: tuple[str, ...]
    height: int
    width: int
    batch_size: int

    def items(self) -> list[dict]:
        """A training batch; see `moco_det.parity.probe`."""
        cfg = load_config(self.config_file, self.opts)
        return parity.build_items(cfg, self.height, self.width, self.batch_size, seed=0)

    def weights(self) -> dict[str, Tensor]:
        """Random ones with which there are proposals and detections to be handled."""
        torch.manual_seed(0)
        model = probe_class("native")(self.config_file, self.opts).model
        parity.randomize_for_parity(model, self.items(), model.state_dict().keys(), seed=0)
        return model.state_dict()


def detector_steps(
    engine: str, task: DetectorTask, weights: Mapping[str, Tensor], precisions: list[str]
) -> dict[tuple[str, str], Callable]:
    """("train" or "infer", "none" or "bf16") -> what does it once."""
    probe, items = _build_probe(engine, task, weights), task.items()
    return {
        ("train", amp): lambda amp=amp: probe.train_step(items, amp != "none") for amp in precisions
    } | {("infer", amp): lambda amp=amp: probe.infer(items[0], amp != "none") for amp in precisions}


def detector_memory(
    engine: str, task: DetectorTask, weights: Mapping[str, Tensor], amp: str
) -> int:
    """Bytes that a process of its own, or its GPU memory, takes at most for two iterations."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        state = {name: value.cpu().numpy() for name, value in weights.items()}
        return pool.apply(_detector_peak, (engine, task, state, amp))


def _detector_peak(engine: str, task: DetectorTask, state: dict, amp: str) -> int:
    weights = {name: torch.from_numpy(value) for name, value in state.items()}
    probe, items = _build_probe(engine, task, weights), task.items()
    for _ in range(2):  # the second also holds the optimizer's momentum
        probe.train_step(items, amp != "none")
    return peak_memory_of_process(next(probe.model.parameters()).device)


def _build_probe(engine: str, task: DetectorTask, weights: Mapping[str, Tensor]) -> EngineProbe:
    probe = probe_class(engine)(task.config_file, task.opts)
    probe.model.load_state_dict(weights)
    for group in probe.optimizer.param_groups:
        group["lr"] = 0.0  # the weights stay, and with them the work
    return probe
