"""A trained detector on its test sets: predictions of all processes, metrics on the main one."""

import math
import time
from contextlib import closing
from datetime import timedelta

import torch
from torch import nn

from moco_det.common.processes import (
    gather_objects,
    is_main,
    print_on_main,
    synchronize,
    world_size,
)
from moco_det.datasets import get_dataset
from moco_det.evaluation import evaluate, print_table
from moco_det.evaluation.predictions import prediction_record, save_predictions
from moco_det.native.data.loader import build_test_loader

REPORT_SECONDS = 10.0  # between two progress lines


def evaluate_model(cfg, model: nn.Module) -> dict:
    """Evaluate `model` on every set of DATASETS.TEST and print the tables.

    The mode of `model` (training or evaluation) is left as it was.

    Returns:
        On the main process {"bbox": {"AP", ...}}, or {set: {"bbox": ...}} where there are several
        sets (Detectron2's form); {} on the others.
    """
    if not cfg.DATASETS.TEST:
        print_on_main("DATASETS.TEST is empty: nothing is evaluated")
    training = model.training
    model.eval()
    results = {}
    for name in cfg.DATASETS.TEST:
        dataset = get_dataset(name)
        records = dataset.records()
        print_on_main(f"evaluating on {name}: {len(records)} images")
        share = math.ceil(len(records) / world_size())
        with closing(build_test_loader(cfg, records)) as batches:
            predictions = predict(model, batches, share)
        if is_main():
            save_predictions(cfg.OUTPUT_DIR, name, predictions)
            results[name] = evaluate(dataset, predictions, cfg.TEST.KEYPOINT_OKS_SIGMAS)
            print_table(results[name])
        synchronize()
    model.train(training)
    return next(iter(results.values())) if len(results) == 1 else results


@torch.no_grad()
def predict(model: nn.Module, batches, images: int) -> list[dict]:
    """What is found in all images, on the main process; an empty list on the others.

    Args:
        model: a detector in evaluation mode.
        batches: lists of model inputs, this process's share.
        images: how many there are in this process's share (for the ETA).

    Returns:
        The `prediction_record` of each image. Masks are encoded as soon as they are there: those of
        a whole data set would not fit in memory.
    """
    predictions, start = [], time.perf_counter()
    reported = start
    for batch in batches:
        for item, output in zip(batch, model(batch), strict=True):
            predictions.append(prediction_record(item["image_id"], output))
        now = time.perf_counter()
        if now - reported > REPORT_SECONDS:
            reported, done = now, len(predictions)
            eta = timedelta(seconds=int((now - start) / done * (images - done)))
            print_on_main(
                f"inference: {done}/{images}  {(now - start) / done:.4f} s/image  eta: {eta}"
            )
    return [found for share in gather_objects(predictions) for found in share]
