"""Records of `moco_det.datasets` to batches of model inputs, reproducible from seed and position.

    transforms   decoding, and the geometry of augmentation
    mapper       one record -> one model input
    loader       which records make which batch; worker processes: start here, at the end

Not here: reading annotation files (`moco_det.datasets`), normalising and padding images to a batch
(the model does that).
"""
