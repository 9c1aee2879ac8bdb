"""The native engine: Detectron2's detectors, their training and evaluation, in plain torch.

It keeps Detectron2's contract: the config keys and their defaults, the names of parameters and
losses, the checkpoints, the numbers. So a YAML and its weights work in either engine.

    data       records of `moco_det.datasets` -> batches of model inputs
    modeling   model inputs -> losses or detections
    engine     the training loop around both; evaluation, optimizer, output folder

Not here: what both engines share (`config`, `datasets`, `evaluation`, `weights`), and anything that
imports detectron2 (`plugin`). Start reading at `engine/trainer.py`, or for the model at
`modeling/meta_arch.py`.
"""
