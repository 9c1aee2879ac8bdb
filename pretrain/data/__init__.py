"""Images to batches: files, tar shards and labelled folders, augmented and sampled.

Start with `images.py`; `multi_crop.py` draws the views of an image, of windows (`crops.py`) and
looks (`augmentations.py`), and `batched_augmentations.py` has what can be left to the device that
trains. `listing.py` says which images there are, `subsets.py` which to take. `davis.py` and
`segmented.py` read the two data sets that feature maps are judged on. A source of batches,
whichever it is, has
    steps_per_epoch
    start(epoch, step)  the next iteration begins at batch `step` of `epoch`
    iteration           this process's share of each global batch; unreadable images are dealt with
and those of pretraining, `FolderSource` and `ShardSource`, which give a ViewBatch, also
    samples             images of an epoch
    state()             what a checkpoint needs beside epoch and step; collective
    resume(state, path)
    describe()          the data, for the first line of a run

Batches are functions of the seed alone: they depend neither on the number of processes nor on the
speed of workers, and on where views get their looks to rounding only. What else is computed on a
batch is no business of this folder.
"""

import re
from pathlib import Path


def is_shards(data: str) -> bool:
    """Whether DATA names tar files: by a pattern, a URL, or a command after `pipe:`."""
    return not Path(data).is_dir() and bool(re.search(r"^pipe:|://|\.(tar|tgz)\b", data))
