"""What data costs at its real size, in time and memory, on data that are drawn where need be.

data_path           from an image file to two views, beside torchvision's with PIL
looks               what is left of it to the device that trains
knn_bank            the kNN monitor's memory and search
annotation_memory   an annotation file in one process and in several
"""

import contextlib
import json
import multiprocessing
import random
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision import transforms

from moco_det.benchmark.speed import alternate
from moco_det.common.errors import UserError
from moco_det.common.launch import free_local_url, process_group
from moco_det.datasets import get_dataset, read_categories_together
from moco_det.datasets.sharing import PackedList, shared_list
from pretrain.data.augmentations import MoCoAugmentation, MoCoCrop
from pretrain.data.batched_augmentations import apply_looks, compiled_looks, finished
from pretrain.data.images import ImageViews, LoadedViews, collate_views
from pretrain.data.listing import find_images
from pretrain.data.multi_crop import MultiCrop
from pretrain.evaluation.knn import HALF_FROM, nearest, votes
from pretrain.moco.instance_discrimination import PIXEL_MEAN, PIXEL_STD

IMAGES = 200  # of those in the folder, at most

# -- from a file to two views ---------------------------------------------------------------------


def data_path(images: Path, image_size: int, rounds: int) -> dict[str, float]:
    """Median seconds of a core per image, decoding and two MoCo v2 views, alternated.

    Returns:
        "reference": torchvision + PIL; "cpu" and "device": ours with --augment-on, of the latter
        the part that is left to the loading processes.
    """
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    found = np.random.default_rng(0).permutation(find_images(images))[:IMAGES]
    transform = official_transform(image_size)

    def reference():
        for path in found:
            with open(images / path.decode(), "rb") as file:
                image = Image.open(file).convert("RGB")
            transform(image), transform(image)

    ours = {
        "cpu": _loading(images, found, MoCoAugmentation(image_size, aug_plus=True)),
        "device": _loading(images, found, MoCoCrop(image_size, aug_plus=True)),
    }
    seconds = alternate(ours | {"reference": reference}, rounds, clock=time.process_time)
    return {name: value / len(found) for name, value in seconds.items()}


def _loading(folder: Path, paths: np.ndarray, augmentation: MoCoAugmentation):
    """What a loading process does to load each image once."""
    dataset = ImageViews(folder, paths, MultiCrop([augmentation] * 2), seed=0)

    def load():
        for index in range(len(dataset)):
            if unreadable := dataset[0, index].unreadable:
                raise UserError(f"unreadable image in --images: {unreadable[0]}")

    return load


def looks(image_size: int, batch_size: int, device: str, rounds: int) -> dict[str, float]:
    """Median seconds in which `device` gives the two views of `batch_size` images their looks.

    Returns:
        "plain" and, on a GPU, "compiled".
    """
    rng = np.random.default_rng(0)
    crop = MoCoCrop(image_size, aug_plus=True)
    image = rng.integers(0, 256, (image_size, image_size, 3), dtype=np.uint8)
    samples = [
        LoadedViews([crop(image, rng), crop(image, rng)], [False] * 2, [])
        for _ in range(batch_size)
    ]
    views = collate_views(samples).views
    on_gpu = device == "cuda"
    if on_gpu:
        views = [type(view)(*(part.pin_memory() for part in view)) for view in views]
    ways = {"plain": apply_looks} | ({"compiled": compiled_looks()} if on_gpu else {})
    candidates = {
        name: lambda apply=apply: [finished(view, torch.device(device), apply) for view in views]
        for name, apply in ways.items()
    }
    return alternate(candidates, rounds, torch.cuda.synchronize if on_gpu else None)


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


# -- the kNN monitor's bank -----------------------------------------------------------------------


@dataclass(frozen=True)
class BankCost:
    """Args:
    held: bytes of one process's part of the bank.
    float32: bytes of all of it in float32, as each process held it before.
    seconds: of the search.
    agreement: share of the queries that get the class of a search in float32.
    """

    held: int
    float32: int
    seconds: float
    agreement: float


@torch.inference_mode()
def knn_bank(images: int, dim: int, queries: int, classes: int, k: int, device: str) -> BankCost:
    """Of a bank of `images` drawn features around class means, kept as the monitor keeps it."""
    generator = torch.Generator(device).manual_seed(0)
    means = torch.randn(classes, dim, device=device, generator=generator)

    def drawn(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(0, classes, (count,), device=device, generator=generator)
        noise = torch.randn(count, dim, device=device, generator=generator)
        return torch.nn.functional.normalize(means[labels] + 6 * noise, dim=1), labels

    asked, _ = drawn(queries)
    dtype = torch.float16 if images * dim * 4 > HALF_FROM else torch.float32
    bank = torch.empty(images, dim, dtype=dtype, device=device)
    labels = torch.empty(images, dtype=torch.int64, device=device)
    exact, step = [], 2**14
    for start in range(0, images, step):
        some, their_labels = drawn(min(step, images - start))
        bank[start : start + step], labels[start : start + step] = some, their_labels
        exact.append(nearest(some, their_labels, asked, k))
    cosines, found = (torch.cat(parts, dim=1) for parts in zip(*exact, strict=True))
    cosines, places = cosines.topk(k, dim=1)
    expected = votes(cosines, found.gather(1, places), classes, 0.07).argmax(1)
    begun = time.perf_counter()
    ours = votes(*nearest(bank, labels, asked, k), classes, 0.07).argmax(1).cpu()
    seconds = time.perf_counter() - begun
    agreement = float((ours == expected.cpu()).double().mean())
    return BankCost(bank.nbytes, images * dim * 4, seconds, agreement)


# -- an annotation file ---------------------------------------------------------------------------


@dataclass(frozen=True)
class AnnotationCost:
    """Of all processes together, in bytes beyond what they have before they read.

    Memory that several share counts once.

    Args:
        peak: at most while they read.
        held: afterwards, when all of it was looked at by all.
        seconds: until the last one has it.
    """

    peak: int
    held: int
    seconds: float


def annotation_memory(file: Path, processes: int) -> AnnotationCost:
    """What it takes to have the records of a COCO file in each process of a run."""
    context = multiprocessing.get_context("spawn")
    url, readers = free_local_url(), []
    for number in range(processes):
        ours, theirs = context.Pipe()
        arguments = theirs, url, number, processes, str(file)
        readers.append((context.Process(target=_read_annotations, args=arguments), ours))
        readers[-1][0].start()
    try:
        for _, pipe in readers:
            pipe.recv()  # it has started
        before = peak = _memory(readers)
        begun = time.perf_counter()
        for _, pipe in readers:
            pipe.send("read")
        while not all(pipe.poll() for _, pipe in readers):
            peak = max(peak, _memory(readers))
            time.sleep(0.2)  # a look takes some of it
        seconds = time.perf_counter() - begun
        errors = [error for _, pipe in readers if (error := pipe.recv())]
        if errors:
            raise UserError(errors[0])
        return AnnotationCost(peak - before, _memory(readers) - before, seconds)
    except EOFError as error:
        raise UserError("a process that read annotations has ended: it may have been killed") from (
            error
        )
    finally:
        for process, _ in readers:
            process.kill()
            process.join()


def _read_annotations(pipe, url: str, number: int, processes: int, file: str) -> None:
    with process_group(url, number, processes, local_rank=number):
        pipe.send(None)
        pipe.recv()
        name = f"coco:{file}:{Path(file).parent}"
        error = None
        try:
            read_categories_together([name])
            records = shared_list(lambda: PackedList.of(get_dataset(name).records()))
            np.frombuffer(records.block, np.uint8).max()  # looked at
        except UserError as failure:
            error = str(failure)
        pipe.send(error)
        with contextlib.suppress(EOFError):
            pipe.recv()  # until it is ended


def _memory(readers: list) -> int:
    """Bytes of all of them; a page that n processes share is an n-th of each."""
    total = 0
    for process, _ in readers:
        status = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        total += 1024 * int(re.search(r"^Pss: +(\d+) kB", status, re.MULTILINE)[1])
    return total


@contextlib.contextmanager
def drawn_annotations(images: int, objects: int) -> Iterator[Path]:
    """While open, a file of COCO's form and density: polygons of 4 to 50 corners, 80 classes."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instances.json"
        with open(path, "w") as file:
            classes = [
                {"id": n, "name": f"class {n}", "supercategory": "any"} for n in range(1, 81)
            ]
            file.write(f'{{"categories": {json.dumps(classes)}, "images": [')
            file.write(", ".join(_image(number) for number in range(1, images + 1)))
            file.write('], "annotations": [')
            for number in range(1, objects + 1):
                file.write(", " * (number > 1) + _object(number, images, rng))
            file.write("]}")
        yield path


def _image(number: int) -> str:
    name = f"{number:012d}.jpg"
    urls = {"coco_url": f"http://images.cocodataset.org/train2017/{name}"}
    urls["flickr_url"] = f"http://farm9.staticflickr.com/8186/{number:010d}_4e622c8349_z.jpg"
    taken = {"date_captured": "2013-11-14 17:02:52", "license": 3}
    size = {"height": 480, "width": 640}
    return json.dumps({"id": number, "file_name": name} | size | urls | taken)


def _object(number: int, images: int, rng: np.random.Generator) -> str:
    points = (100 * rng.uniform(10, 450, (int(rng.integers(4, 50)), 2))).round() / 100
    low, high = points.min(0), points.max(0)
    entry = {
        "id": number,
        "image_id": int(rng.integers(1, images + 1)),
        "category_id": int(rng.integers(1, 81)),
        "segmentation": [points.flatten().tolist()],
        "bbox": [*low.tolist(), *(high - low).round(2).tolist()],
        "area": round(float((high - low).prod()) / 2, 4),
        "iscrowd": 0,
    }
    return json.dumps(entry)
