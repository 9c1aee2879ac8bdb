"""What runs a model of `native.modeling`: training, evaluation, and a view into it.

    trainer      `train` and `evaluate_weights`, the way from a config to results: start here
    solver       optimizer and learning-rate schedule
    inference    predictions on the test sets, and their metrics; the model opened up by a `Probe`
    output_dir   checkpoints and metrics of a run

Not here: the metrics themselves (`moco_det.evaluation`) and weight files (`moco_det.weights`).
"""
