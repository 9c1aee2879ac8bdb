"""The flags of pretrain's commands, their checks, the recipes that hold them, and the launch.

    common.py        what several commands take, how recipes are read, ranges of numbers
    pretraining.py   the flags of main.py
    evaluation.py    the flags of the commands that judge a checkpoint
    dense.py         those of the commands that judge its feature maps
    launch.py        from flags to processes; what the training commands make of theirs

All but launch.py import nothing that takes seconds: --help and mistakes are answered at once.
What lies deeper gets explicit arguments: an `argparse.Namespace` is passed to commands only.
"""
