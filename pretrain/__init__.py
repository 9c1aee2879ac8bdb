"""Images to checkpoint: self-supervised pretraining, and what its encoder is worth by itself.

    from pretrain import MoCo, add_head, pretrain    # the algorithm, and a run of any backbone

Start with `run.py`: it builds what the flags of `main.py`, or a program's arguments, name, and
trains. From there a step goes through `data` (files to views), `moco` (views to logits) and
`engine` (logits to a checkpoint).

    main linear knn voc_svm segment_retrieval davis summary embed doctor subset crop_overlap
                             commands: flags, then what they ask for; nobody imports a command,
                             but for summary, which runs linear as a user would
    run.py                   one run of pretraining, for main.py and for Python programs
    flags/                   their flags, recipes and launch: the last to see an argparse.Namespace
    data/                    images to batches
    moco/                    the papers' algorithms
    engine/                  the training loop and what it leaves on the disk
    evaluation/              kNN, the linear protocol, fine-tuning, feature maps

Of `moco_det` only `moco_det.common` is known here: the checkpoint is the interface to detection.
"""

import importlib

# Imported when they are first asked for: torch takes seconds.
_HOMES = {
    "MoCo": "pretrain.moco.momentum_contrast",
    "add_head": "pretrain.moco.encoders",
    "pretrain": "pretrain.run",
}
__all__ = ["MoCo", "add_head", "pretrain"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'pretrain' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
