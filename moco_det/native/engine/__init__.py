"""Training, evaluation, optimisation and checkpoints of a detector."""
