"""Train and evaluate through Detectron2: its trainer, loaders and evaluators.

    train: prepare -> Trainer (AccumulatingTrainer, SamePreciseBN, StrictCheckpointer) -> evaluators

The three parts take the place of Detectron2's own, which cannot accumulate gradients, or leave the
paper's numbers to chance.
"""

import os
import weakref
from argparse import Namespace
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
    default_setup,
    hooks,
)
from detectron2.evaluation import DatasetEvaluators
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from moco_det.common.documents import mend_last_line
from moco_det.common.errors import UserError
from moco_det.common.resume_state import (
    check_count,
    check_dict,
    check_optimizer,
    entries_of,
    newest_whole,
)
from moco_det.common.weight_sources import read_state_dict
from moco_det.config.checks import (
    BatchPlan,
    check_input,
    check_metric_files,
    check_scoring,
    check_solver,
    check_weights,
    is_per_pixel,
    plan_batch,
    wanted_of,
)
from moco_det.datasets import read_categories_together
from moco_det.datasets.sharing import once_per_machine
from moco_det.native.modeling.layers import accumulate_gradients, precise_bn, sync_on_cpu
from moco_det.plugin.data import (
    build_dense_pose_loader,
    build_evaluator,
    check_classes,
    check_voc_scoring,
    is_ours,
    register_datasets,
    shared_records,
)
from moco_det.plugin.extensions import build_lr_scheduler, build_optimizer, load_config
from moco_det.plugin.pixel_data import build_pixel_mapper, build_semantic_test_loader
from moco_det.weights.files import load_backbone_weights

__all__ = ["Trainer", "evaluate_weights", "load_config", "train"]


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
        UserError: data sets that are absent or do not fit.
    """
    if comm.get_world_size() > 1:
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    check_input(cfg, crops_objects=True)
    check_solver(cfg)
    names = *cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST
    read_categories_together(filter(is_ours, names))
    register_datasets(names, wanted_of(cfg))
    for name in cfg.DATASETS.TEST:
        check_voc_scoring(name)
    check_classes(cfg)
    check_metric_files(cfg)
    once_per_machine(check_scoring, cfg, [n for n in cfg.DATASETS.TEST if is_ours(n)])
    try:
        default_setup(cfg, Namespace(eval_only=eval_only))
        if comm.is_main_process():
            mend_last_line(Path(cfg.OUTPUT_DIR) / "metrics.json")  # a kill leaves half
    except OSError as error:
        raise UserError(f"cannot write to OUTPUT_DIR {cfg.OUTPUT_DIR}: {error}") from error


def missing_file(error: FileNotFoundError) -> str:
    """A message that says where the data were looked for."""
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    return f"{error}; data sets are expected below DETECTRON2_DATASETS, now {root}"


# -- the trainer and its parts ---------------------------------------------------------------------


class Trainer(DefaultTrainer):
    """Detectron2's DefaultTrainer with strict weights, equal PreciseBN and gradient accumulation.

    Its processes may be several on a CPU, too.

    Args:
        cfg: of `moco_det.plugin.load_config`.
        allow_missing: let backbone arrays that MODEL.WEIGHTS lacks keep their initial values.
    """

    def __init__(self, cfg, allow_missing: bool = False):
        TrainerBase.__init__(self)  # DefaultTrainer's own asks for a GPU for each process
        self.cfg = cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        # In Detectron2's order, on which the random draws depend.
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        self._trainer = self._build_steps(model, loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        # The hook that saves keeps Detectron2's own checkpointer; ours is for loading.
        files = self.model, cfg.OUTPUT_DIR
        self.checkpointer = DetectionCheckpointer(*files, trainer=weakref.proxy(self))
        self.register_hooks(self.build_hooks())
        self.checkpointer = StrictCheckpointer(
            *files, cfg, allow_missing, trainer=weakref.proxy(self)
        )

    def _build_steps(self, model, loader, optimizer) -> SimpleTrainer:
        amp, on_cpu = self.cfg.SOLVER.AMP.ENABLED, self.cfg.MODEL.DEVICE == "cpu"
        devices = {"device_ids": None} if on_cpu else {}  # Detectron2's default is a GPU
        model = create_ddp_model(model, broadcast_buffers=False, **devices)
        if self.plan.accumulation > 1 or (amp and on_cpu):
            return AccumulatingTrainer(model, loader, optimizer, self.plan.accumulation, amp)
        return (AMPTrainer if amp else SimpleTrainer)(model, loader, optimizer)

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        if cfg.MODEL.DEVICE == "cpu" and comm.get_world_size() > 1:
            sync_on_cpu(model)
        return model

    @classmethod
    def build_optimizer(cls, cfg, model):
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        return build_lr_scheduler(cfg, optimizer)

    @property
    def plan(self) -> BatchPlan:
        return plan_batch(self.cfg, comm.get_world_size())

    def build_hooks(self) -> list:
        """Detectron2's, with its PreciseBN exchanged for one that is equal on every process."""
        found = super().build_hooks()
        return [self._precise_bn() if isinstance(h, hooks.PreciseBN) else h for h in found]

    def _precise_bn(self) -> "SamePreciseBN":
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        model = self.model.module if comm.get_world_size() > 1 else self.model
        batches = cfg.TEST.PRECISE_BN.NUM_ITER * self.plan.accumulation
        return SamePreciseBN(cfg.TEST.EVAL_PERIOD, model, self.build_train_loader(cfg), batches)

    @classmethod
    def build_train_loader(cls, cfg):
        """Detectron2's, in batches of one forward pass."""
        plan = plan_batch(cfg, comm.get_world_size())
        images = plan.images_per_forward * plan.processes
        if cfg.MODEL.DENSEPOSE_ON:
            return build_dense_pose_loader(cfg, images)
        mapper = build_pixel_mapper(cfg) if is_per_pixel(cfg) else None
        records = shared_records(cfg)
        return build_detection_train_loader(
            cfg, mapper=mapper, dataset=records, total_batch_size=images
        )

    @classmethod
    def build_test_loader(cls, cfg, dataset_name: str):
        build = build_semantic_test_loader if is_per_pixel(cfg) else build_detection_test_loader
        return build(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name: str) -> DatasetEvaluators:
        return build_evaluator(cfg, dataset_name)


class AccumulatingTrainer(SimpleTrainer):
    """SimpleTrainer whose step is the mean gradient of `accumulation` batches of its loader.

    Args:
        model, data_loader, optimizer: as for SimpleTrainer.
        accumulation: forward passes of one step.
        amp: float16 with loss scaling on CUDA (Detectron2's), bfloat16 on a CPU.
    """

    def __init__(self, model, data_loader, optimizer, accumulation: int, amp: bool):
        super().__init__(model, data_loader, optimizer)
        self.accumulation = accumulation
        on_gpu = next(model.parameters()).is_cuda
        self.precision = (torch.float16 if on_gpu else torch.bfloat16) if amp else None
        self.grad_scaler = torch.amp.GradScaler("cuda", enabled=amp and on_gpu)

    def run_step(self) -> None:
        assert self.model.training, "the model was changed to eval mode"
        self.optimizer.zero_grad()
        losses, waited = accumulate_gradients(
            self.model, self._data_loader_iter, self.grad_scaler, self.accumulation, self.precision
        )
        self._write_metrics(losses, waited)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict:
        return super().state_dict() | {"grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


class SamePreciseBN(hooks.PreciseBN):
    """PreciseBN that ends with the same statistics on every process.

    Detectron2's estimates them on each process from its own images alone, so that processes
    evaluate different models and the saved one is rank 0's (its issues 5398 and 5409).
    """

    def update_stats(self) -> None:
        if self._disabled:
            return
        if self._data_iter is None:
            self._data_iter = iter(self._data_loader)
        with EventStorage():  # what the model logs here is no part of the training
            precise_bn(self._model, self._data_iter, self._num_iter)


class StrictCheckpointer(DetectionCheckpointer):
    """Every file through our checked readers; initial weights through `weights.files`, and what
    is resumed goes where Detectron2 puts it.

    Detectron2 only warns of backbone arrays that a file lacks, and looks at neither the channel
    order nor the place of the stride that its weights were trained with.

    Args:
        cfg: that the weights must not contradict.
        allow_missing: let arrays of the backbone that the file lacks keep their initial values.
    """

    def __init__(self, model, save_dir, cfg, allow_missing: bool = False, **checkpointables):
        super().__init__(model, save_dir, **checkpointables)
        self.cfg = cfg
        self.allow_missing = allow_missing

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict:
        """Raises UserError for initial weights that do not fill the backbone or do not fit cfg."""
        if not path or checkpointables != []:  # [] is what `resume_or_load` asks of other weights
            try:
                return super().load(path, checkpointables)
            except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
                why = str(error).splitlines()[0][:120]
                raise UserError(f"{path} is from another configuration: {why}") from error
        model = self.model
        if isinstance(model, DistributedDataParallel):
            model = model.module
        report = load_backbone_weights(model, path, self.allow_missing)
        check_weights(self.cfg, report.metadata)
        return {}

    def get_checkpoint_file(self) -> str:
        """The last checkpoint or, where it is damaged, the newest whole one, with a warning.

        Raises UserError for one outside of the folder."""
        folder = Path(self.save_dir)
        others = folder.glob("model_*.pth")
        found = newest_whole(folder / "last_checkpoint", others, read_state_dict)
        return str(found[0]) if found else ""

    def _load_file(self, filename: str) -> dict:
        weights, metadata = read_state_dict(filename)
        if "trainer" in metadata and "trainer" in self.checkpointables:
            with entries_of(filename):
                _check_trainer(metadata["trainer"], self.checkpointables["trainer"])
        return {"model": weights, **metadata}


def _check_trainer(saved: object, trainer: Trainer) -> None:
    """The state of Detectron2's DefaultTrainer. Raises StateFault."""
    saved = check_dict("trainer", saved)
    check_count("trainer.iteration", saved.get("iteration"))
    check_dict("trainer.hooks", saved.get("hooks", {}))
    inner = check_dict("trainer._trainer", saved.get("_trainer"))
    check_count("trainer._trainer.iteration", inner.get("iteration"))
    # float16 leaves out steps, with which the first momentum may be still to come.
    stepped = not inner.get("grad_scaler")
    check_optimizer(inner.get("optimizer"), trainer._trainer.optimizer, stepped)
