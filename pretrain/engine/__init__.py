"""One training loop for every task, and what it leaves: checkpoints, metrics, a diagnosis.

Start with `trainer.py`, whose `Trainer` drives a `Task`; `pretraining.py` is the task of the
papers (classifiers are in `pretrain/evaluation`), and `device.py` has what a GPU is asked for:
precision, determinism, compiled encoders. `watching.py` has what a person sees of a run, and
`trackers.py` where: TensorBoard, Weights & Biases, MLflow. What a step computes from views belongs
into `moco`, where batches come from into `data`.
"""
