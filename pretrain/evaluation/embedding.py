"""Features of any images, with their names, as a file; and a sheet of which images lie near which.

Shape legend:
    N: images     D: pooled features     Q: queries     K: neighbours     S: side of a crop
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import IterableDataset, get_worker_info

from moco_det.common.errors import UserError, import_optional
from moco_det.common.files import replacing
from moco_det.common.images import UnreadableImage, decode_image, read_image
from moco_det.common.processes import all_objects, is_main, print_on_main, rank, world_size
from pretrain.data import is_shards, sheets
from pretrain.data.images import Loading, UnreadableImages, build_loader
from pretrain.data.labelled import LabelledSplit, centre_crop
from pretrain.data.listing import find_images, fingerprint, seen_alike
from pretrain.data.multi_crop import MultiCrop
from pretrain.data.shards import BrokenShard, Position, Stream, find_shards
from pretrain.evaluation.features import SplitFeatures, extract


@dataclass(frozen=True)
class Embedding:
    """Features N x D, float32, and the N names of their images."""

    names: list[str]
    features: torch.Tensor


def embed(
    backbone: nn.Module,
    data: str,
    image_size: int,
    loading: Loading,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Embedding:
    """The pooled features of centre crops of all readable images, sorted by name. Collective.

    Args:
        data: a folder, whose images are named by their paths within it, or shards (SHARD/FILE).
        dtype: of mixed precision; None for float32.

    Raises:
        UserError: too many images are unreadable, or a shard is broken.
    """
    embed_all = _embed_shards if is_shards(data) else _embed_folder
    return embed_all(backbone, data, image_size, loading, device, dtype)


def _embed_folder(backbone, data, image_size, loading, device, dtype) -> Embedding:
    folder = Path(data)
    paths = seen_alike(lambda: find_images(folder), fingerprint)
    names = [path.decode(errors="surrogateescape") for path in paths]
    # Their own numbers as labels, so that it is known which were readable.
    split = LabelledSplit(str(folder), folder, names, np.arange(len(names)))
    found = SplitFeatures(split, image_size, loading, device, dtype)
    features, numbers = found.compute(backbone)
    return Embedding([names[number] for number in numbers.tolist()], features.cpu())


def _embed_shards(backbone, data, image_size, loading, device, dtype) -> Embedding:
    shards = find_shards(data)
    crop, workers = partial(centre_crop, size=image_size), max(1, loading.workers)
    crops = ShardCrops(shards, crop, world_size() * workers, rank() * workers)
    options = {"batch_size": 128, "collate_fn": _named_batch}
    print_on_main(f"features of the images of {len(shards)} shards")
    names, features, unreadable = [], [], []
    for images, some, messages, broken in build_loader(
        crops, loading.workers, loading.pin_memory, **options
    ):
        if broken:
            raise UserError(broken)
        names += some
        unreadable += messages
        if some:
            features.append(extract(backbone, images.to(device), dtype).cpu().numpy())
    # Of every process: arrays, since tensors would be handed over as files.
    shares = all_objects((names, features, unreadable))
    names, features, unreadable = (sum(parts, []) for parts in zip(*shares, strict=True))
    tally = UnreadableImages(len(names) + len(unreadable), loading.max_unreadable, left_out=True)
    tally.add(unreadable, warn=is_main(), fatal=not names)
    order = sorted(range(len(names)), key=names.__getitem__)
    return Embedding([names[i] for i in order], torch.from_numpy(np.concatenate(features)[order]))


class ShardCrops(IterableDataset):
    """(name, crop (S, S, 3) uint8, "") of each image of some shards, once; or (name, None, reason).

    What breaks a shard is told as a reason without a name: an exception would lose it on its way
    out of a worker process.

    Args:
        streams: loading processes that share the shards, those of the run.
        first: the number of this process's first among them.
    """

    def __init__(
        self,
        shards: list[str],
        crop: Callable[[np.ndarray], np.ndarray],
        streams: int = 1,
        first: int = 0,
    ):
        self.shards = shards
        self.crop = crop
        self.streams = streams
        self.first = first

    def __iter__(self) -> Iterator[tuple[str, np.ndarray | None, str]]:
        worker = get_worker_info()
        number = self.first + (worker.id if worker else 0)
        stream = Stream(self.shards, self.streams, number, MultiCrop([]), 0, 1, Position())
        try:
            for sample in stream.read_pass(0) if stream.share(0) else ():
                extension = next(name for name in sample if not name.startswith("__"))
                name = f"{Path(sample['__url__']).name}/{sample['__key__']}.{extension}"
                try:
                    yield name, self.crop(decode_image(sample[extension], name)), ""
                except UnreadableImage as error:
                    yield name, None, error.reason
        except BrokenShard as error:
            yield "", None, str(error)


def _named_batch(samples: list) -> tuple[torch.Tensor | None, list[str], list[str], str]:
    """Crops (n, S, S, 3) and names of the readable images; messages on others; a broken shard's."""
    crops = [crop for _, crop, _ in samples if crop is not None]
    names = [name for name, crop, _ in samples if crop is not None]
    unreadable = [f"{name}: {reason}" for name, crop, reason in samples if name and crop is None]
    broken = next((reason for name, _, reason in samples if not name), "")
    return (torch.from_numpy(np.stack(crops)) if crops else None), names, unreadable, broken


def write_embedding(path: Path, embedding: Embedding) -> None:
    """As .npz (`names`, `features`) or .parquet (a row for each image); whole or not at all.

    Raises UserError where pyarrow, which writes the latter, is absent.
    """
    names, features = list(map(_text, embedding.names)), embedding.features.numpy()
    with replacing(path) as temporary:
        if path.suffix == ".npz":
            with open(temporary, "wb") as file:
                np.savez(file, names=np.array(names), features=features)
        else:
            arrow = import_optional("pyarrow", "writing .parquet", "pyarrow")
            parquet = import_optional("pyarrow.parquet", "writing .parquet", "pyarrow")
            rows = arrow.FixedSizeListArray.from_arrays(features.ravel(), features.shape[1])
            parquet.write_table(arrow.table({"name": names, "feature": rows}), temporary)


def _text(name: str) -> str:
    """A file's name; bytes of it that are no UTF-8 as escapes."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


# -- a sheet of neighbours ------------------------------------------------------------------------


def nearest(
    features: torch.Tensor, queries: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosines Q x K of images to those nearest to them, themselves left out, and their numbers.

    Args:
        features: N x D.
        queries: Q numbers of images.
    """
    features = F.normalize(features, dim=1)
    cosines = features[queries] @ features.T
    cosines[torch.arange(len(queries)), queries] = -torch.inf
    return cosines.topk(min(k, len(features) - 1), dim=1)


def draw_sheet(data: str, embedding: Embedding, queries: int, k: int, seed: int) -> Image.Image:
    """A row for each of some images, drawn by `seed`: itself, then the `k` nearest to it."""
    some = np.random.default_rng(seed).permutation(len(embedding.names))[:queries]
    rows = torch.from_numpy(np.sort(some))
    cosines, near = nearest(embedding.features, rows, k)
    wanted = torch.cat([rows[:, None], near], dim=1).tolist()
    captions = [[f"{cosine:.3f}" for cosine in row] for row in cosines.tolist()]
    pixels = _pictures(data, {embedding.names[i] for row in wanted for i in row})

    def tile(number: int, said: str) -> sheets.Tile:
        name = embedding.names[number]
        return pixels[name], f"{said}\n{sheets.ending(name)}"

    tiles = [
        [tile(query, "query")] + [tile(*found) for found in zip(others, said, strict=True)]
        for (query, *others), said in zip(wanted, captions, strict=True)
    ]
    return sheets.draw_sheet(tiles)


def _pictures(data: str, names: set[str]) -> dict[str, np.ndarray]:
    """Name -> its centre crop as a tile, read once more."""
    tile = partial(centre_crop, size=sheets.TILE)
    if is_shards(data):
        return {n: crop for n, crop, _ in ShardCrops(find_shards(data), tile) if n in names}
    return {name: tile(read_image(str(Path(data, name)))) for name in names}
