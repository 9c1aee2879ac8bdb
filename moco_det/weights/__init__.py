"""Weights: what their arrays are called, the files they come in, loading and conversion.

What reads or writes a file of arrays belongs here; a run's whole state does not (the engines'
checkpoints), nor whether weights fit a config (`moco_det.config.checks`). Start with `names.py`,
the one map between the names of torchvision, Detectron2 and Caffe2; then `files.py` reads (by way
of `moco_det.common.checkpoint_files`, the checked reader that pretraining shares) and fills a
detector, and `conversion.py` makes one kind of file from another.
"""
