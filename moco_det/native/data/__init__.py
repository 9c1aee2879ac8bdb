"""Records of `moco_det.datasets` to batches of model inputs, reproducible from seed and position.

    transforms   the geometry of augmentation
    mapper       one record -> one model input
    loader       which records make which batch; worker processes: start here, at the end

Not here: reading image files (`moco_det.common.images`) and annotation files (`moco_det.datasets`),
normalising and padding images to a batch (the model does that).
"""
