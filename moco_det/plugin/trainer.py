"""Train and evaluate through Detectron2: its trainer, loaders and evaluators."""

import os
import weakref
from argparse import Namespace

from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, default_setup, hooks
from detectron2.evaluation import DatasetEvaluators
from detectron2.utils import comm

from moco_det.batch_plan import plan_batch
from moco_det.errors import UserError
from moco_det.plugin import dense_pose
from moco_det.plugin.accumulation import AccumulatingTrainer
from moco_det.plugin.checkpoint import StrictCheckpointer
from moco_det.plugin.configuration import load_config
from moco_det.plugin.datasets import check_classes, register_datasets
from moco_det.plugin.evaluators import build_evaluator
from moco_det.plugin.hooks import SamePreciseBN
from moco_det.plugin.semantic_mapper import build_semantic_mapper, build_semantic_test_loader
from moco_det.tasks import check_input, check_metric_files, is_semantic

__all__ = ["Trainer", "evaluate_weights", "load_config", "train"]


class Trainer(DefaultTrainer):
    """Detectron2's DefaultTrainer with strict weights, equal PreciseBN and gradient accumulation.

    Args:
        cfg: of `moco_det.plugin.load_config`.
        allow_missing: let backbone arrays that MODEL.WEIGHTS lacks keep their initial values.
    """

    def __init__(self, cfg, allow_missing: bool = False):
        super().__init__(cfg)
        solver = self.cfg.SOLVER
        on_cpu = self.cfg.MODEL.DEVICE == "cpu"
        if solver.GRADIENT_ACCUMULATION_STEPS > 1 or (solver.AMP.ENABLED and on_cpu):
            self._trainer = AccumulatingTrainer(
                self._trainer.model,
                self._trainer.data_loader,
                self._trainer.optimizer,
                solver.GRADIENT_ACCUMULATION_STEPS,
                solver.AMP.ENABLED,
            )
        # For loading; the hook that saves keeps Detectron2's own.
        self.checkpointer = StrictCheckpointer(
            self.model, self.cfg.OUTPUT_DIR, self.cfg, allow_missing, trainer=weakref.proxy(self)
        )

    def build_hooks(self) -> list:
        """Detectron2's, with its PreciseBN exchanged for one that is equal on every process."""
        found = super().build_hooks()
        return [self._precise_bn() if isinstance(h, hooks.PreciseBN) else h for h in found]

    def _precise_bn(self) -> SamePreciseBN:
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        model = self.model.module if comm.get_world_size() > 1 else self.model
        batches = cfg.TEST.PRECISE_BN.NUM_ITER * cfg.SOLVER.GRADIENT_ACCUMULATION_STEPS
        return SamePreciseBN(cfg.TEST.EVAL_PERIOD, model, self.build_train_loader(cfg), batches)

    @classmethod
    def build_train_loader(cls, cfg):
        """Detectron2's, in batches of one forward pass."""
        accumulation = cfg.SOLVER.GRADIENT_ACCUMULATION_STEPS
        images = cfg.SOLVER.IMS_PER_BATCH // accumulation
        if cfg.MODEL.DENSEPOSE_ON:
            return dense_pose.build_train_loader(cfg, images)
        mapper = build_semantic_mapper(cfg) if is_semantic(cfg) else None
        return build_detection_train_loader(cfg, mapper=mapper, total_batch_size=images)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name: str):
        build = build_semantic_test_loader if is_semantic(cfg) else build_detection_test_loader
        return build(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name: str) -> DatasetEvaluators:
        return build_evaluator(cfg, dataset_name)


def train(cfg, resume: bool = False, allow_missing: bool = False) -> dict:
    """Train the detector that `cfg` describes and evaluate it; every process of a run calls it.

    Args:
        cfg: of `moco_det.plugin.load_config`.
        resume: go on from OUTPUT_DIR's last checkpoint, where there is one.
        allow_missing: let backbone arrays that MODEL.WEIGHTS lacks keep their initial values.

    Returns:
        The final results on the main process, {} on the others.

    Raises:
        UserError: bad settings, data or weights; a loss that is not finite.
    """
    prepare(cfg, eval_only=False)
    cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
    plan = plan_batch(cfg, comm.get_world_size())
    if comm.is_main_process():
        print(plan.describe(cfg.SOLVER.BASE_LR), flush=True)
    try:
        trainer = Trainer(cfg, allow_missing)
        trainer.resume_or_load(resume)
        trainer.train()
    except FloatingPointError as error:
        raise UserError(f"{error} Lower SOLVER.BASE_LR or lengthen WARMUP_ITERS") from error
    except FileNotFoundError as error:
        raise UserError(missing_file(error)) from error
    return getattr(trainer, "_last_eval_results", None) or {}


def evaluate_weights(cfg, resume: bool = False, allow_missing: bool = False) -> dict:
    """Evaluate MODEL.WEIGHTS or, with `resume`, OUTPUT_DIR's last checkpoint where there is one.

    Takes, returns and raises as `train`.
    """
    prepare(cfg, eval_only=True)
    model = Trainer.build_model(cfg)
    checkpointer = StrictCheckpointer(model, cfg.OUTPUT_DIR, cfg, allow_missing)
    try:
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
        return Trainer.test(cfg, model) or {}
    except FileNotFoundError as error:
        raise UserError(missing_file(error)) from error


def prepare(cfg, eval_only: bool) -> None:
    """Detectron2's set-up of a process, and the checks that it leaves out.

    Raises:
        UserError: several processes without GPUs; data sets that are absent or do not fit.
    """
    processes = comm.get_world_size()
    if processes > 1:
        if cfg.MODEL.DEVICE == "cpu":
            raise UserError(
                f"{processes} processes on CPUs: Detectron2's trainer needs a GPU for each; "
                "use --engine native"
            )
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    check_input(cfg, crops_objects=True)
    register_datasets((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    check_classes(cfg)
    check_metric_files(cfg)
    try:
        default_setup(cfg, Namespace(eval_only=eval_only))
    except OSError as error:
        raise UserError(f"cannot write to OUTPUT_DIR {cfg.OUTPUT_DIR}: {error}") from error


def missing_file(error: FileNotFoundError) -> str:
    """A message that says where the data were looked for."""
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    return f"{error}; data sets are expected below DETECTRON2_DATASETS, now {root}"
