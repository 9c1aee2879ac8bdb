"""Record which images Detectron2 trains on, how often, in which order and in which batches.

PYTHONPATH=DETECTRON2 python tests/golden/record_sampling.py
"""

from itertools import islice

import numpy as np
from recording import write

SEED, COUNT, BATCH_SIZE = 7, 120, 3
# (REPEAT_THRESHOLD, REPEAT_SQRT)
REPEATS = [(0.5, True), (0.5, False), (0.05, True)]


def records():
    """30 records of what matters here. Class 0 is common, class 4 rare; some images are empty."""
    random = np.random.RandomState(0)
    made = []
    for image_id in range(30):
        width, height = random.randint(2, 5, 2).tolist()
        labels = random.choice(5, random.randint(0, 4), p=[0.5, 0.3, 0.12, 0.06, 0.02]).tolist()
        annotations = []
        for label in labels:
            visible = random.randint(0, 3, 3).tolist()
            keypoints = [number for v in visible for number in (1.5, 1.5, v)]
            crowd = int(random.rand() < 0.3)
            annotations.append({"category_id": label, "iscrowd": crowd, "keypoints": keypoints})
        size = {"image_id": image_id, "width": width, "height": height}
        made.append(size | {"annotations": annotations})
    return made


def record():
    from detectron2.data import DatasetCatalog, get_detection_dataset_dicts
    from detectron2.data.common import AspectRatioGroupedDataset
    from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler

    def left(**options):
        kept = get_detection_dataset_dicts("golden", check_consistency=False, **options)
        return [record["image_id"] for record in kept]

    repeats = []
    for threshold, sqrt in REPEATS:
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records(), threshold, sqrt=sqrt
        )
        order = list(islice(RepeatFactorTrainingSampler(factors, seed=SEED), COUNT))
        repeats.append({"factors": factors.tolist(), "order": order})
    order = list(islice(TrainingSampler(len(records()), seed=SEED), COUNT))
    batches = AspectRatioGroupedDataset([records()[index] for index in order], BATCH_SIZE)
    batches = [[item["image_id"] for item in batch] for batch in batches]
    DatasetCatalog.register("golden", records)
    try:
        kept = {
            "not_empty": left(filter_empty=True),
            "two_keypoints": left(filter_empty=False, min_keypoints=2),
        }
    finally:
        DatasetCatalog.remove("golden")
    return {"repeats": repeats, "order": order, "batches": batches, "kept": kept}


if __name__ == "__main__":
    write("sampling", record())
