"""Video object segmentation on DAVIS 2017 without training: masks by label propagation, J and F.

Masks that are written stay: a run that was killed takes up those of the sequences that it has
finished, if encoder and settings are the same.

Shape legend:
    H, W: sides of a feature map     L: labels, the background first     N: objects
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from moco_det.common.documents import read_json
from moco_det.common.errors import UserError
from moco_det.common.files import evenly_spaced, replacing, write_json
from moco_det.common.images import label_colour, read_image
from moco_det.common.processes import all_objects, rank, world_size
from pretrain.data.davis import VOID, Video, palette_of, read_mask
from pretrain.evaluation.label_propagation import Propagation
from pretrain.evaluation.overlays import captioned_row, painted
from pretrain.evaluation.region_measures import measure_frame
from pretrain.evaluation.spatial_features import SpatialFeatures, unit_features

SETTINGS = "settings.json"  # of a folder of masks
STRIP = 6  # frames of a row of the sheet


@dataclass(frozen=True)
class VideoSegmenter:
    """Follows the objects of a video's first mask through it.

    Args:
        backbone: frozen, in evaluation mode, on `device`.
        image_size: short side that frames are resized to; None: as they are.
        threads: that read and measure.
    """

    backbone: SpatialFeatures
    propagation: Propagation
    device: torch.device
    image_size: int | None = None
    threads: int = 1

    @torch.inference_mode()
    def masks(self, video: Video) -> list[np.ndarray]:
        """A mask for each frame, uint8 of the frames' size; the first is the one given."""
        given = first_mask(video)
        frames = map(self._features, self._read(video.frames))
        start = next(frames)
        first = _one_hot(torch.from_numpy(given).to(self.device))
        # Without antialiasing, as OpenCV does it in STC's code.
        first = F.interpolate(first[None], start.shape[1:], mode="bilinear")[0]
        labels = self.propagation.through(start, frames, first)
        return [given, *(_hardened(soft, given.shape) for soft in labels)]

    def _read(self, paths: list[Path]) -> Iterator[np.ndarray]:
        """The frames, each thread's next one ahead: a video may be long."""
        with ThreadPoolExecutor(self.threads) as threads:
            for start in range(0, len(paths), self.threads):
                yield from threads.map(read_image, paths[start : start + self.threads])

    def _features(self, pixels: np.ndarray) -> Tensor:
        """D x H x W of a frame."""
        if self.image_size is not None:
            scale = self.image_size / min(pixels.shape[:2])
            size = tuple(max(1, round(scale * side)) for side in pixels.shape[1::-1])
            pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        images = torch.from_numpy(pixels)[None].to(self.device)
        return unit_features(self.backbone, images)[0]


def measure(video: Video, masks: list[np.ndarray], threads: int = 1) -> np.ndarray:
    """Mean J and F of each object of a video's masks, N x 2."""
    objects = int(first_mask(video).max())
    with ThreadPoolExecutor(threads) as pool:
        # Neither the first frame, which is given, nor the last.
        true = pool.map(read_mask, video.masks[1:-1])
        frames = pool.map(partial(measure_frame, objects=objects), masks[1:-1], true)
        return np.mean(list(frames), axis=0)


def first_mask(video: Video) -> np.ndarray:
    """The mask that is given, without void pixels."""
    mask = read_mask(video.masks[0])
    mask[mask == VOID] = 0
    return mask


def _one_hot(mask: Tensor) -> Tensor:
    """L x H x W, float, of the objects 0 to L - 1."""
    numbers = torch.arange(int(mask.max()) + 1, device=mask.device)
    return (mask[None] == numbers[:, None, None]).float()


def _hardened(labels: Tensor, size: tuple[int, int]) -> np.ndarray:
    """The likeliest label of each pixel, uint8, of soft labels L x H x W."""
    full = F.interpolate(labels[None], size, mode="bilinear")[0]
    return full.argmax(dim=0).to(torch.uint8).cpu().numpy()


# -- masks on the disk ----------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskFolder:
    """FOLDER/SEQUENCE/00000.png, as the official davis2017-evaluation reads results."""

    folder: Path

    def prepare(self, segmenter: VideoSegmenter) -> None:
        """Note whose masks these are.

        Raises:
            UserError: the folder has masks of other weights or settings.
        """
        wanted = {
            "weights": hash_of(segmenter.backbone),
            "image_size": segmenter.image_size,
            **asdict(segmenter.propagation),
        }
        path = self.folder / SETTINGS
        if not path.exists():
            if any(self.folder.glob("*/*.png")):
                raise UserError(f"--masks {self.folder} holds masks of others: name another folder")
            write_json(path, wanted)
            return
        held = read_json(path, "--masks")
        held = held if isinstance(held, dict) else {}
        unlike = [name for name in wanted if held.get(name) != wanted[name]]
        if unlike:
            raise UserError(
                f"--masks {self.folder} holds masks of another run: its {', '.join(unlike)} differ "
                f"({path}); name another folder, or delete it"
            )

    def read(self, video: Video) -> list[np.ndarray] | None:
        """A video's masks; None where they are not all there, or are those of another video."""
        paths = [self._path(video, frame) for frame in video.frames]
        if not all(path.is_file() for path in paths):
            return None
        masks = [read_mask(path) for path in paths]
        given = first_mask(video)
        alike = np.array_equal(masks[0], given) and all(m.shape == given.shape for m in masks)
        return masks if alike else None

    def write(self, video: Video, masks: list[np.ndarray]) -> None:
        """In the palette of the video's own masks."""
        palette = palette_of(video.masks[0]) or [c for n in range(256) for c in label_colour(n)]
        (self.folder / video.name).mkdir(exist_ok=True)
        for frame, mask in zip(video.frames, masks, strict=True):
            image = Image.fromarray(mask)
            image.putpalette(palette)
            with replacing(self._path(video, frame)) as temporary:
                image.save(temporary, "PNG")

    def _path(self, video: Video, frame: Path) -> Path:
        return self.folder / video.name / f"{frame.stem}.png"


def hash_of(network: nn.Module) -> str:
    """Of a network's weights, whichever file they came from."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


# -- a whole list ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Followed:
    """A video that is done: J and F of its objects, N x 2, and its row of the sheet, if any."""

    name: str
    measures: np.ndarray
    strip: np.ndarray | None = None


def follow_all(
    segmenter: VideoSegmenter, videos: list[Video], folder: MaskFolder | None, drawn: int
) -> list[Followed]:
    """All videos, in their order. Collective: each process takes every W-th.

    Args:
        folder: keeps the masks, and gives those that it has.
        drawn: how many videos have a row on the sheet.
    """
    names = {video.name for video in evenly_spaced(videos, drawn)}
    done = []
    for number, video in list(enumerate(videos, 1))[rank() :: world_size()]:
        masks = folder.read(video) if folder else None
        kept = masks is not None
        if masks is None:
            masks = segmenter.masks(video)
            if folder:
                folder.write(video, masks)
        measures = measure(video, masks, segmenter.threads)
        strip = draw_strip(video, masks, measures) if video.name in names else None
        done.append(Followed(video.name, measures, strip))
        j, f = 100 * measures.mean(axis=0)
        print(
            f"{video.name} ({number} of {len(videos)}): J {j:.1f}  F {f:.1f}, "
            f"{len(measures)} objects, {len(masks)} frames{', kept masks' * kept}",
            flush=True,
        )
    found = {followed.name: followed for part in all_objects(done) for followed in part}
    return [found[video.name] for video in videos]


def mean_measures(followed: list[Followed]) -> dict[str, float]:
    """J, F and their mean over all objects of all videos, in percent."""
    j, f = (100 * np.concatenate([video.measures for video in followed]).mean(axis=0)).tolist()
    return {"davis_j_mean": j, "davis_f_mean": f, "davis_jf_mean": (j + f) / 2}


def draw_strip(video: Video, masks: list[np.ndarray], measures: np.ndarray) -> np.ndarray:
    """Some frames of a video in a row, the masks painted on them, the true ones outlined."""
    chosen = evenly_spaced(range(len(masks)), STRIP)
    tiles = [
        painted(read_image(video.frames[i]), masks[i], read_mask(video.masks[i])) for i in chosen
    ]
    j, f = 100 * measures.mean(axis=0)
    captions = [f"frame {i}" for i in chosen]
    captions[0] = f"{video.name}: J {j:.1f}, F {f:.1f}; {captions[0]}, given"
    return captioned_row(tiles, captions)
