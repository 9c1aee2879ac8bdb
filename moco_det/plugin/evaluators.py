"""Who scores what Detectron2's models find, and the records that both engines leave."""

from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
)
from detectron2.utils import comm

from moco_det.common.errors import UserError
from moco_det.datasets import get_dataset
from moco_det.evaluation import evaluate, print_table
from moco_det.evaluation.predictions import prediction_record, save_predictions
from moco_det.plugin import dense_pose

# Detectron2's evaluators of these do not run: LVIS's ends in the np.float that NumPy no longer has,
# Cityscapes' imports a package that is not public; of label maps, Detectron2 reads trainIds only;
# DensePose's takes its body model from the net alone.
# So `moco_det.evaluation` scores them, for both engines, with the same official tools.
_SCORED_HERE = ("lvis", "cityscapes_instance", "sem_seg", "densepose")


def build_evaluator(cfg, dataset_name: str) -> DatasetEvaluators:
    """The metric of the data set, and the predictions saved as the native engine saves them.

    Raises:
        UserError: a kind of data set that has no metric here.
    """
    kind = MetadataCatalog.get(dataset_name).evaluator_type
    records = PredictionRecords(cfg.OUTPUT_DIR, dataset_name, scored=kind in _SCORED_HERE)
    if kind in _SCORED_HERE:
        return DatasetEvaluators([records])
    if kind == "pascal_voc":
        official = PascalVOCDetectionEvaluator(dataset_name)
    elif kind == "coco":
        official = COCOEvaluator(
            dataset_name,
            output_dir=f"{cfg.OUTPUT_DIR}/inference",
            kpt_oks_sigmas=list(cfg.TEST.KEYPOINT_OKS_SIGMAS),
        )
    else:
        raise UserError(f"data set {dataset_name}: no evaluator for the kind {kind!r}")
    # The records first: on a CPU, COCOEvaluator moves the keypoints by half a pixel where they lie.
    return DatasetEvaluators([records, official])


class PredictionRecords(DatasetEvaluator):
    """Saves the predictions in the form in which the native engine does.

    Args:
        output_dir: they go to its folder `inference`.
        dataset_name: of `moco_det.datasets`, where they are scored.
        scored: also return the metrics of `moco_det.evaluation`.
    """

    def __init__(self, output_dir: str, dataset_name: str, scored: bool = False):
        self.output_dir = output_dir
        self.dataset_name = dataset_name
        self.scored = scored
        self.reset()

    def reset(self) -> None:
        self.records = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for item, output in zip(inputs, outputs, strict=True):
            if "instances" in output:
                output = fields_of(output["instances"])
            self.records.append(prediction_record(item["image_id"], output))

    def evaluate(self) -> dict | None:
        """The metrics, where `scored`, on the main process; None otherwise."""
        shares = comm.gather(self.records)
        if not comm.is_main_process():
            return None
        records = sum(shares, [])
        save_predictions(self.output_dir, self.dataset_name, records)
        if not self.scored:
            return None
        results = evaluate(get_dataset(self.dataset_name), records)
        print_table(results)
        return results


def fields_of(instances) -> dict:
    """Detectron2's Instances as the native model's output; see `prediction_record`."""
    output = {
        "boxes": instances.pred_boxes.tensor,
        "scores": instances.scores,
        "classes": instances.pred_classes,
    }
    for name in ("masks", "keypoints"):
        if instances.has(f"pred_{name}"):
            output[name] = instances.get(f"pred_{name}")
    if instances.has("pred_densepose"):
        output["densepose"] = dense_pose.surfaces(instances)
    return output
