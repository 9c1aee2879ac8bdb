"""The training loop, its checkpoints, its metrics, and the diagnosis of a run."""
