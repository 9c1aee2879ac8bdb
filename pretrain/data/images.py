"""Image files to batches of two views, the same on any number of processes and workers."""

import os
import signal
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS

from moco_det.common.errors import UserError
from pretrain.data.augmentations import MoCoAugmentation

# So many unreadable images one after another are no accident: the run ends.
UNREADABLE_IN_A_ROW = 100


class UnreadableImage(Exception):
    """The file is no image, or ends too early."""


def find_images(folder: Path) -> np.ndarray:
    """Sorted paths, relative to `folder`, of all images below it; links are followed.

    A byte array rather than a list of str: forked workers then share the memory of 10^6 paths
    instead of copying it piece by piece as reference counts change.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder} (DATA is a folder of images)")

    def fail(error: OSError):
        raise UserError(f"cannot read folder {error.filename}: {error.strerror}")

    paths = [
        os.path.relpath(os.path.join(parent, name), folder)
        for parent, _, names in os.walk(folder, onerror=fail, followlinks=True)
        for name in names
        if name.lower().endswith(IMG_EXTENSIONS)
    ]
    if not paths:
        hint = f"; for its shards pass '{folder}/*.tar'" if any(folder.glob("*.tar")) else ""
        raise UserError(f"no images below {folder} (looked for {', '.join(IMG_EXTENSIONS)}){hint}")
    return np.array(sorted(os.fsencode(p) for p in paths), dtype=np.bytes_)


def training_folder(data: Path) -> Path:
    """DATA/train of an ImageFolder root, else DATA itself."""
    return data / "train" if (data / "train").is_dir() else data


def read_image(path: str) -> np.ndarray:
    """RGB uint8 (H, W, 3). EXIF orientation is ignored, as PIL does in the papers' code.

    Raises UnreadableImage also for a JPEG or PNG cut short, which OpenCV would fill with grey.
    """
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise UnreadableImage(f"{path}: {error.strerror}") from error
    return decode_image(data.tobytes(), path)


def decode_image(data: bytes, name: str) -> np.ndarray:
    """The content of an image file, as `read_image` gives it; `name` is for the message."""
    if _is_truncated(data):
        raise UnreadableImage(f"{name}: truncated file")
    try:
        coded = np.frombuffer(data, dtype=np.uint8)
        image = cv2.imdecode(coded, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        image = None
    if image is None:
        raise UnreadableImage(f"{name}: not an image that OpenCV can decode")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _is_truncated(data: bytes) -> bool:
    if data.startswith(b"\xff\xd8"):
        # The end marker must follow the last scan: an EXIF thumbnail brings one of its own earlier.
        return data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-32:]
    return False


class TwoViews(Dataset):
    """(epoch, index) -> two random views of image `index`, decoded once; one without `keys`.

    The draws are a function of (seed, epoch, index) alone. An unreadable image is replaced by the
    next readable one, so that the replacement, too, does not depend on who loads it.
    """

    def __init__(
        self, folder: Path, paths: np.ndarray, view: MoCoAugmentation, seed: int, keys: bool = True
    ):
        self.folder = os.fsencode(folder)
        self.paths = paths
        self.view = view
        self.seed = seed
        self.keys = keys

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]):
        """query (S, S, 3) uint8, key (S, S, 3) uint8 or None, messages on unreadable files."""
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        unreadable = []
        for offset in range(len(self.paths)):
            path = self.paths[(index + offset) % len(self.paths)]
            try:
                image = read_image(os.fsdecode(os.path.join(self.folder, path)))
            except UnreadableImage as error:
                unreadable.append(str(error))
                if len(unreadable) == UNREADABLE_IN_A_ROW:
                    break
                continue
            query = self.view(image, rng)
            return query, self.view(image, rng) if self.keys else None, unreadable
        return None, None, unreadable


def collate_views(samples: list):
    """Stack to query (N, S, S, 3), key (N, S, S, 3) or None, and all messages.

    NHWC uint8 is a quarter of the floats' traffic, and its NCHW view is channels_last for nothing.
    """
    unreadable = [message for _, _, messages in samples for message in messages]
    if any(q is None for q, _, _ in samples):
        return None, None, unreadable
    queries = torch.from_numpy(np.stack([q for q, _, _ in samples]))
    keys = [k for _, k, _ in samples if k is not None]
    return queries, torch.from_numpy(np.stack(keys)) if keys else None, unreadable


class DistributedBatchSampler(Sampler):
    """This process's slice of every global batch of an epoch, as lists of (epoch, index).

    The epoch's order is a function of (seed, epoch). Global batch t is its slice [tB, (t+1)B);
    of that, process r of W takes the r-th of W equal parts. The last, incomplete batch is dropped.
    """

    def __init__(self, samples: int, batch_size: int, rank: int, world_size: int, seed: int):
        self.samples = samples
        self.batch_size = batch_size
        self.local = batch_size // world_size
        self.rank = rank
        self.seed = seed
        self.start(0)

    def start(self, epoch: int, step: int = 0) -> None:
        """The next iteration begins at batch `step` of `epoch`."""
        self.epoch = epoch
        self.first_step = step
        self.order = np.random.default_rng((self.seed, epoch)).permutation(self.samples)

    def global_batch(self, step: int) -> np.ndarray:
        """The indices of batch `step` of the epoch, those of all processes."""
        return self.order[step * self.batch_size : (step + 1) * self.batch_size]

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.batch_size

    def __len__(self) -> int:
        return self.steps_per_epoch - self.first_step

    def __iter__(self):
        mine = slice(self.rank * self.local, (self.rank + 1) * self.local)
        for step in range(self.first_step, self.steps_per_epoch):
            yield [(self.epoch, int(i)) for i in self.global_batch(step)[mine]]


def build_loader(dataset: Dataset, workers: int, pin_memory: bool, **kwargs) -> DataLoader:
    """A DataLoader whose workers use one thread each; with a batch sampler they outlive epochs.

    It has a generator of its own, so that it takes no draw from the process's.
    """
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0 and "batch_sampler" in kwargs,
        worker_init_fn=_prepare_worker,
        generator=torch.Generator(),
        **kwargs,
    )


def _prepare_worker(worker: int) -> None:
    cv2.setNumThreads(0)
    # A SIGTERM to the whole process group must not kill the workers under a loop that is about to
    # save its state; they end with the loop that they work for.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
