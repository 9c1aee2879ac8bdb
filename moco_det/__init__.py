"""MoCo checkpoints to Detectron2 transfer tables."""
