"""MoCo pretraining: images to checkpoint."""
