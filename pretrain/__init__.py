"""Images to checkpoint: self-supervised pretraining, and what its encoder is worth by itself.

Start with `main.py`: it reads the flags, builds what they name and trains. From there a step goes
through `data` (files to views), `moco` (views to logits) and `engine` (logits to a checkpoint).

    main linear knn embed doctor   commands: flags, then what they ask for; nobody imports a command
    flags/                   their flags, recipes and launch: the last to see an argparse.Namespace
    data/                    images to batches
    moco/                    the papers' algorithms
    engine/                  the training loop and what it leaves on the disk
    evaluation/              kNN, the linear protocol, fine-tuning

Of `moco_det` only `moco_det.common` is known here: the checkpoint is the interface to detection.
"""
