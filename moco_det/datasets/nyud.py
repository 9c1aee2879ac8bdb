"""NYU Depth v2 (Silberman et al., ECCV 2012): label maps of 40 classes, and depth.

Below $DETECTRON2_DATASETS nyud_v2_sem_seg_{train,val} and nyud_v2_depth_{train,val}, or
`nyud_sem_seg:ROOT:SPLIT` and `nyud_depth:ROOT:SPLIT` in a folder of its layout:
    NYUD_MT/images/ID.jpg
    NYUD_MT/segmentation/ID.png     grey or palette images: 0 void, 1 to 40 the classes
    NYUD_MT/depth/ID.npy            floats in metres, 0 where nothing was measured
    NYUD_MT/gt_sets/SPLIT.txt       795 lines in train.txt, 654 in val.txt, which is NYU's test set

NYU hands out a file of MATLAB. The folder NYUD_MT is made from it by the authors of the multi-task
benchmark (github.com/SimonVandenhende/Multi-Task-Learning-PyTorch), who are of the group that
reports these two tasks in arXiv:2106.05967.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from moco_det.datasets.dataset import NOTHING, Record, SplitLayout, Wanted
from moco_det.datasets.depth import DepthDataset
from moco_det.datasets.problems import Problems
from moco_det.datasets.semantic import SemanticDataset, existing
from moco_det.datasets.voc import read_split

# The 40 classes of Gupta et al. (CVPR 2013), in the order of their labels, which begin with 1.
# fmt: off
NYUD_CLASSES = (
    "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf",
    "picture", "counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror",
    "floor mat", "clothes", "ceiling", "books", "refrigerator", "television", "paper", "towel",
    "shower curtain", "box", "whiteboard", "person", "night stand", "toilet", "sink", "lamp",
    "bathtub", "bag", "otherstructure", "otherfurniture", "otherprop",
)
# fmt: on


class NyudLayout(SplitLayout):
    """A split of that folder, for a `MappedDataset`.

    `maps`: the folder and the ending of its maps; `maps_are`: as a problem calls them.
    """

    maps: ClassVar[tuple[str, str]]
    maps_are: ClassVar[str]

    @property
    def required(self) -> tuple[Path, ...]:
        return self.image_dir, self.split_file, self.map_dir

    @property
    def image_dir(self) -> Path:
        return self.root / "images"

    @property
    def split_file(self) -> Path:
        return self.root / "gt_sets" / f"{self.split}.txt"

    @property
    def map_dir(self) -> Path:
        return self.root / self.maps[0]

    def pairs(self, problems: Problems | None = None) -> list[tuple[str, Path, Path]]:
        """(image id, image, map), as in the list.

        Raises:
            UserError: an image or a map is missing; none is listed.
        """
        problems, ending = problems or Problems(), self.maps[1]
        ids = read_split(self.split_file, problems)
        problems.listed(len(ids))
        if not ids:
            text = f"dataset {self.name}: no image in {self.root}, split {self.split}"
            problems.refuse("list", text)
        paths = [
            (word, self.image_dir / f"{word}.jpg", self.map_dir / f"{word}{ending}") for word in ids
        ]
        folders = self.image_dir, self.map_dir
        return existing(paths, self.split_file, folders, problems, self.maps_are)


@dataclass(frozen=True)
class SemanticNyudDataset(NyudLayout, SemanticDataset):
    """Its label maps."""

    all_classes: ClassVar[tuple[str, ...]] = NYUD_CLASSES
    maps: ClassVar[tuple[str, str]] = ("segmentation", ".png")
    maps_are: ClassVar[str] = "labels"

    def records(self, problems: Problems | None = None, wanted: Wanted = NOTHING) -> list[Record]:
        """See `MappedDataset.records`; class 0 is label 1 of the files."""
        return [{**record, "first_label": 1} for record in super().records(problems, wanted)]


@dataclass(frozen=True)
class DepthNyudDataset(NyudLayout, DepthDataset):
    """Its depth maps."""

    all_classes: ClassVar[tuple[str, ...]] = ()
    maps: ClassVar[tuple[str, str]] = ("depth", ".npy")
    maps_are: ClassVar[str] = "depth"
