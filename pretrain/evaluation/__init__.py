"""What a pretrained encoder is worth without a detector: kNN, the linear protocol, fine-tuning.

Start with `features.py`, from a checkpoint to features, and `knn.py`, which classifies them without
training; `classification.py` has the two protocols that train. The loop that they train in is
`engine.trainer`, their data are in `data.labelled`.

Of feature maps: `spatial_features.py`, from an encoder to maps at stride 8; for DAVIS
`label_propagation.py`, `region_measures.py` and `video_segmentation.py`; for VOC's segments
`segments.py`; `overlays.py` draws what they find. Their data are in `data.davis` and
`data.segmented`.
"""
