"""How fast training and the data path are, each beside a reference that is timed in the same run.

The references are the ones that users come from: the paper's Algorithm 1 as a plain PyTorch program
on NCHW float images, the torchvision + PIL pipeline, and, for a detector, the other engine.
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
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torchvision import transforms

from moco_det.benchmark.cost import peak_memory_of_process
from moco_det.common.errors import UserError
from moco_det.common.images import UnreadableImage, read_image
from moco_det.common.launch import free_local_url, process_group
from moco_det.config.loading import load_config
from moco_det.engines import probe_class
from moco_det.parity import comparison as parity
from moco_det.parity.probe import EngineProbe
from pretrain.data.augmentations import MoCoAugmentation
from pretrain.data.images import find_images
from pretrain.engine.optimization import AMP_DTYPES, ScheduledSGD
from pretrain.engine.pretraining import contrastive_step
from pretrain.moco.encoders import build_encoder
from pretrain.moco.grouped_batchnorm import choose_bn_groups
from pretrain.moco.instance_discrimination import PIXEL_MEAN, PIXEL_STD, shuffle_index
from pretrain.moco.losses import InfoNCE
from pretrain.moco.momentum_contrast import MoCo


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


# -- a pretraining step ---------------------------------------------------------------------------


class PlainMoCo(nn.Module):
    """Algorithm 1 with shuffled BN over processes, written down plainly: the reference.

    NCHW fp32, one loop over parameters for the momentum update, `all_gather` of the images, of the
    keys for the unshuffle and of the keys for the queue, and a copy of the queue in every step.
    """

    def __init__(self, arch: str, dim: int = 128, queue_size: int = 65536, m=0.999, tau=0.2):
        super().__init__()
        self.m, self.tau = m, tau
        self.f_q = build_encoder(arch, dim, mlp=True)
        self.f_k = build_encoder(arch, dim, mlp=True).requires_grad_(False)
        self.f_k.load_state_dict(self.f_q.state_dict())
        self.register_buffer("queue", F.normalize(torch.randn(dim, queue_size), dim=0))
        self.position = 0

    def step(self, optimizer: torch.optim.Optimizer, x_q: Tensor, x_k: Tensor) -> float:
        """One iteration on float views N x 3 x H x W."""
        q = F.normalize(self.f_q(x_q), dim=1)
        with torch.no_grad():
            for p_q, p_k in zip(self.f_q.parameters(), self.f_k.parameters(), strict=True):
                p_k.data = p_k.data * self.m + p_q.data * (1.0 - self.m)
            order = torch.randperm(len(x_k), device=x_k.device)
            dist.broadcast(order, 0)
            k = F.normalize(self.f_k(_all_gather(x_k)[order]), dim=1)
            k = _all_gather(k)[torch.argsort(order)]
        l_pos = torch.einsum("nc,nc->n", q, k)[:, None]
        l_neg = torch.einsum("nc,ck->nk", q, self.queue.clone().detach())
        logits = torch.cat([l_pos, l_neg], dim=1) / self.tau
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        keys = _all_gather(k)
        self.queue[:, self.position : self.position + len(keys)] = keys.T
        self.position = (self.position + len(keys)) % self.queue.shape[1]
        return loss.item()


def _all_gather(tensor: Tensor) -> Tensor:
    gathered = [torch.ones_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return torch.cat(gathered)


def pretrain_step(
    arch: str, batch_size: int, image_size: int, device: str, precisions: list[str], rounds: int
) -> dict[str, float]:
    """Median seconds per step of the reference and of ours in each precision, alternated.

    Args:
        precisions: keys of AMP_DTYPES, e.g. ["none", "bf16"].
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is available here; pass --device cpu")
    torch.manual_seed(0)
    shape = (batch_size, image_size, image_size, 3)
    im_q, im_k = (torch.randint(0, 256, shape, dtype=torch.uint8, device=device) for _ in "qk")
    backend = "nccl" if device == "cuda" else None
    with process_group(free_local_url(), 0, 1, local_rank=0, backend=backend):
        steps = {"reference": _plain_step(arch, im_q, im_k)}
        for precision in precisions:
            steps[precision] = _our_step(arch, im_q, im_k, precision)
        return alternate(steps, rounds, torch.cuda.synchronize if device == "cuda" else None)


def _plain_step(arch: str, im_q: Tensor, im_k: Tensor) -> Callable:
    device = im_q.device
    model = PlainMoCo(arch).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    mean = torch.tensor(PIXEL_MEAN, device=device).view(3, 1, 1)
    std = torch.tensor(PIXEL_STD, device=device).view(3, 1, 1)
    # The reference's workers normalise; it receives NCHW floats, and that is not timed.
    x_q, x_k = (((x.permute(0, 3, 1, 2) - mean) / std).contiguous() for x in (im_q, im_k))
    return lambda: model.step(optimizer, x_q, x_k)


def _our_step(arch: str, im_q: Tensor, im_k: Tensor, precision: str) -> Callable:
    device = im_q.device
    groups = choose_bn_groups(len(im_q), 1)
    model = MoCo(build_encoder(arch, mlp=True), temperature=0.2, bn_groups=groups)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = ScheduledSGD(model, 0.03, 0.9, 1e-4, scale_gradients=precision == "fp16")
    inputs, loss = (im_q, im_k, shuffle_index(0, 0, len(im_q)).to(device)), InfoNCE()
    return lambda: contrastive_step(model, loss, optimizer, inputs, AMP_DTYPES[precision])


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
