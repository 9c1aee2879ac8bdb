"""Dense pose as geometry: points on a body's surface, the template body, how alike two poses are.

What needs no detector belongs here; the head and its loss do not (`moco_det.native.modeling`), nor
reading annotations (`moco_det.datasets.coco`) or scoring (`moco_det.evaluation.densepose`).
Start with `points.py`, the two forms of a dense pose; then `body.py`, the template body
and distances on it.
"""
