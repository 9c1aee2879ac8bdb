"""A detector in use: on its test sets, and opened up for comparison and timing.

evaluate_model   predictions of all processes, metrics on the main one
Probe            every stage of the computation: see `moco_det.parity.probe`
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import nn

from moco_det.common.gpus import HostCopy
from moco_det.common.processes import (
    gather_objects,
    is_main,
    print_on_main,
    synchronize,
    world_size,
)
from moco_det.config.loading import load_config, on_available_device
from moco_det.datasets import Dataset, get_dataset
from moco_det.datasets.sharing import PackedList, shared_list
from moco_det.evaluation import evaluate, print_table
from moco_det.evaluation.predictions import prediction_record, save_predictions
from moco_det.native.data.loader import build_test_loader, without_annotations
from moco_det.native.engine.solver import build_optimizer
from moco_det.native.modeling.meta_arch import build_model
from moco_det.parity.probe import EngineProbe

REPORT_SECONDS = 10.0  # between two progress lines


def evaluate_model(
    cfg, model: nn.Module, show: Callable[[Dataset, list[dict]], None] | None = None
) -> dict:
    """Evaluate `model` on every set of DATASETS.TEST and print the tables.

    The mode of `model` (training or evaluation) is left as it was.

    Args:
        show: is given each set and its predictions, on the main process.

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
        records = shared_list(partial(_test_records, dataset))
        print_on_main(f"evaluating on {name}: {len(records)} images")
        share = math.ceil(len(records) / world_size())
        with closing(build_test_loader(cfg, records)) as batches:
            predictions = predict(model, batches, share)
        if is_main():
            save_predictions(cfg.OUTPUT_DIR, name, predictions)
            results[name] = evaluate(dataset, predictions, cfg.TEST.KEYPOINT_OKS_SIGMAS)
            print_table(results[name])
            if show:
                show(dataset, predictions)
        synchronize()
    model.train(training)
    return next(iter(results.values())) if len(results) == 1 else results


def _test_records(dataset: Dataset) -> PackedList:
    return PackedList.of(map(without_annotations, dataset.records()))


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
        outputs = model(batch)
        if "sem_seg" not in outputs[0]:  # of whose many scores the best are found on the device
            # In one go, not field by field and mask by mask.
            outputs = HostCopy(outputs).wait()
        for item, output in zip(batch, outputs, strict=True):
            predictions.append(prediction_record(item["image_id"], output))
        now = time.perf_counter()
        if now - reported > REPORT_SECONDS:
            reported, done = now, len(predictions)
            eta = timedelta(seconds=int((now - start) / done * (images - done)))
            print_on_main(
                f"inference: {done}/{images}  {(now - start) / done:.4f} s/image  eta: {eta}"
            )
    return [found for share in gather_objects(predictions) for found in share]


class Probe(EngineProbe):
    """The model of a YAML, on its MODEL.DEVICE or else the CPU, at its random initialisation."""

    def __init__(self, config_file: str, opts: Sequence[str] = ()):
        cfg = on_available_device(load_config(config_file, opts))
        model = build_model(cfg)
        super().__init__(model, build_optimizer(cfg, model))

    def proposals(self, items: list[dict], stages: dict[str, Any]) -> tuple[list, list]:
        # Once more, as the RPN returns no scores.
        rpn = self.model.proposal_generator
        _, sizes = self.model.preprocess(items)
        return rpn.propose(*rpn.predict(stages["backbone"]), sizes)

    def detections(self, results: list, stages: dict[str, Any]) -> tuple[list[dict], list[dict]]:
        in_boxes, _ = stages["roi_heads"]
        if "roi_heads.keypoint_head" in stages:
            counts = [len(x["boxes"]) for x in in_boxes]
            heatmaps = stages["roi_heads.keypoint_head"].split(counts)
            pairs = zip(in_boxes, heatmaps, strict=True)
            in_boxes = [x | {"keypoint_heatmaps": of_image} for x, of_image in pairs]
        return results, in_boxes
