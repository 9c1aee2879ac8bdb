"""Record Detectron2's learning rate over the iterations of short runs.

PYTHONPATH=DETECTRON2 python tests/golden/record_schedules.py
"""

import torch
from recording import write

# Keys of SOLVER over the default config.
CASES = {
    "multistep": {"MAX_ITER": 60, "STEPS": (40, 52), "WARMUP_ITERS": 10},
    "multistep, constant warm-up": {
        "MAX_ITER": 50, "STEPS": (20, 70), "GAMMA": 0.3, "WARMUP_ITERS": 7, "WARMUP_FACTOR": 0.25,
        "WARMUP_METHOD": "constant",
    },
    "cosine": {
        "LR_SCHEDULER_NAME": "WarmupCosineLR", "MAX_ITER": 60, "BASE_LR": 0.02, "BASE_LR_END": 1e-4,
        "WARMUP_ITERS": 10,
    },
    "cosine, no warm-up": {
        "LR_SCHEDULER_NAME": "WarmupCosineLR", "MAX_ITER": 30, "WARMUP_ITERS": 0,
    },
}  # fmt: skip


def curve(cfg, build_lr_scheduler):
    """The learning rate of each iteration."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(cfg.SOLVER.MAX_ITER):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def record():
    from detectron2.config import get_cfg
    from detectron2.solver import build_lr_scheduler

    curves = {}
    for case, solver in CASES.items():
        cfg = get_cfg()
        cfg.SOLVER.update(solver)
        curves[case] = curve(cfg, build_lr_scheduler)
    return curves


if __name__ == "__main__":
    write("schedules", record())
