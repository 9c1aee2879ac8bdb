"""How the images of one optimizer step are divided, and how that differs from the paper."""

from dataclasses import dataclass

from moco_det.common.errors import UserError
from moco_det.common.processes import print_on_main
from moco_det.config.checks import is_semantic

# MoCo v1, Sec. 4.2: Detectron2's recipe of 8 GPUs with 2 images each, BN synchronised over all.
PAPER_IMAGES = 16
PAPER_LR = 0.02


@dataclass(frozen=True)
class BatchPlan:
    """How `images`, the batch of one optimizer step, are divided.

    Args:
        images: over all processes and forward passes.
        processes: that share them.
        accumulation: forward passes whose gradients are added up for one step.
        norm: MODEL.RESNETS.NORM.
        paper_lr: that of the paper's recipe; None where it is each data set's own.
    """

    images: int
    processes: int
    accumulation: int
    norm: str
    paper_lr: float | None = PAPER_LR

    @property
    def images_per_forward(self) -> int:
        """Images of one process in one forward pass."""
        return self.images // (self.processes * self.accumulation)

    @property
    def bn_group(self) -> int:
        """Images whose BN statistics are computed together; 0 where BN is frozen or absent."""
        synchronised = ("SyncBN", "naiveSyncBN")
        processes = self.processes if self.norm in synchronised else int(self.norm == "BN")
        return processes * self.images_per_forward

    def differences(self, lr: float) -> list[str]:
        """What differs from the paper's fine-tuning recipe, at this base learning rate."""
        found = []
        if self.paper_lr is not None:
            linear = self.paper_lr * self.images / PAPER_IMAGES
            if abs(lr - linear) > 1e-6 * linear:
                found.append(
                    f"learning rate {lr:g} (the paper's for {self.images} images would be "
                    f"{linear:g})"
                )
        if self.images != PAPER_IMAGES:
            found.append(f"a step of {self.images} images (the paper: {PAPER_IMAGES})")
        if self.bn_group == 0:
            found.append(f"NORM {self.norm!r} (the paper: trained, synchronised BN)")
        elif self.bn_group != PAPER_IMAGES:
            found.append(f"BN statistics over {self.bn_group} images (the paper: {PAPER_IMAGES})")
        return found

    def describe(self, lr: float) -> str:
        """One line: the effective batch, the BN group, and what differs from the paper."""
        groups = f"BN over {self.bn_group} images" if self.bn_group else "no batch statistics"
        differences = "; ".join(self.differences(lr)) or "nothing"
        return (
            f"batch {self.images} = {self.processes} process(es) x {self.images_per_forward} "
            f"images x {self.accumulation} accumulated; {groups} ({self.norm or 'no norm'}); "
            f"not as in the paper: {differences}"
        )


def plan_batch(cfg, processes: int) -> BatchPlan:
    """The plan of a config (of either engine) on `processes` processes.

    Raises:
        UserError: the batch does not divide.
    """
    images, accumulation = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.GRADIENT_ACCUMULATION_STEPS
    parts = processes * accumulation
    if accumulation < 1 or images < 1 or images % parts:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {images} is the batch of one optimizer step: set it to a "
            f"multiple of {processes} process(es) x SOLVER.GRADIENT_ACCUMULATION_STEPS "
            f"{accumulation}"
        )
    # Of semantic segmentation 0.003 on VOC, 0.01 on Cityscapes (appendix A.5).
    paper_lr = None if is_semantic(cfg) else PAPER_LR
    return BatchPlan(images, processes, accumulation, cfg.MODEL.RESNETS.NORM, paper_lr)


def scaled_to_processes(cfg, processes: int):
    """`cfg` with its recipe moved from SOLVER.REFERENCE_WORLD_SIZE processes to `processes`.

    Batch and learning rate grow with the processes, iterations and periods shrink, so that one
    process sees as many images per step as in the recipe (Detectron2's `auto_scale_workers`). Off,
    and `cfg` itself, where SOLVER.REFERENCE_WORLD_SIZE is 0.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference in (0, processes):
        return cfg
    if cfg.SOLVER.IMS_PER_BATCH % reference:
        raise UserError(
            f"SOLVER.REFERENCE_WORLD_SIZE {reference} does not divide "
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH}"
        )
    cfg = cfg.clone()
    cfg.defrost()
    solver, scale = cfg.SOLVER, processes / reference
    solver.IMS_PER_BATCH = round(solver.IMS_PER_BATCH * scale)
    solver.BASE_LR *= scale
    solver.STEPS = tuple(round(step / scale) for step in solver.STEPS)
    for section, key in (
        (solver, "MAX_ITER"),
        (solver, "WARMUP_ITERS"),
        (solver, "CHECKPOINT_PERIOD"),
        (cfg.TEST, "EVAL_PERIOD"),
    ):
        section[key] = round(section[key] / scale)
    solver.REFERENCE_WORLD_SIZE = processes
    print_on_main(
        f"recipe scaled to {processes} processes: batch {solver.IMS_PER_BATCH}, learning rate "
        f"{solver.BASE_LR:g}, {solver.MAX_ITER} iterations, steps {solver.STEPS}"
    )
    cfg.freeze()
    return cfg
