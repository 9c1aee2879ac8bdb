#!/usr/bin/env python
"""Train and evaluate a detector from a Detectron2 YAML, with Detectron2's command line.

python tools/train_net.py --config-file configs/X.yaml --num-gpus 8
python tools/train_net.py --config-file configs/X.yaml SOLVER.BASE_LR 0.001 OUTPUT_DIR out
python tools/train_net.py --config-file configs/X.yaml --eval-only MODEL.WEIGHTS model_final.pth
torchrun --nproc-per-node 8 tools/train_net.py --config-file configs/X.yaml
"""

import argparse

try:
    from moco_det.common.errors import (
        EXIT_INTERRUPTED,
        UserError,
        command_parser,
        exit_cleanly,
        start_command,
    )
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: pip install -e . in the folder of moco_det") from None
from moco_det.common.ending import EXIT_CTRL_C
from moco_det.config.flags import add_config_arguments
from moco_det.engines import ENGINES, choose_engine


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    codes = (
        f"0 done; 1 an error, in one line; {EXIT_INTERRUPTED} SIGTERM and {EXIT_CTRL_C} Ctrl-C, a "
        "checkpoint is saved"
    )
    parser = command_parser(__doc__, codes)
    add_config_arguments(parser)
    add = parser.add_argument
    add("--eval-only", action="store_true", help="only evaluate MODEL.WEIGHTS")
    add("--resume", action="store_true", help="continue from OUTPUT_DIR's last checkpoint, if any")
    add("--overwrite", action="store_true", help="delete the run that OUTPUT_DIR holds")
    add("--num-gpus", type=int, default=1, help="processes per machine, a GPU each")
    add("--num-machines", type=int, default=1, help="machines of the run")
    add("--machine-rank", type=int, default=0, help="number of this machine")
    add("--dist-url", default="auto", help="tcp://HOST:PORT of machine 0 (default: a free port)")
    add("--engine", choices=ENGINES, default="auto", help="auto: detectron2 where it is installed")
    add("--allow-missing", action="store_true",
        help="keep the random values of backbone arrays that MODEL.WEIGHTS lacks")  # fmt: skip
    return parser.parse_args(arguments)


if __name__ == "__main__":
    start_command(parse)  # --help and mistakes end here, before the imports that take seconds

import os

import torch

from moco_det.common.images import allow_pixels
from moco_det.common.launch import launch, torchrun_started_this
from moco_det.common.run_folders import RunFiles, claimed
from moco_det.config.loading import as_written, load_config
from moco_det.evaluation import verify_results

# What training leaves in OUTPUT_DIR with either engine.
RUN_FILES = RunFiles(
    marks=("last_checkpoint",),
    others=("model_*.pth", "metrics.json", "events.out.tfevents.*"),
    flag="OUTPUT_DIR",
    resume="--resume",
)


def main(args: argparse.Namespace, engine: str) -> None:
    """One process of the run."""
    if engine == "detectron2":
        from moco_det.plugin import trainer
    else:
        from moco_det.native.engine import trainer
    cfg = trainer.load_config(args.config_file, args.opts)
    allow_pixels(cfg.INPUT.MAX_IMAGE_PIXELS)
    train = (args.resume, args.allow_missing)
    if args.eval_only:
        results = trainer.evaluate_weights(cfg, *train)
    else:
        reads = [cfg.MODEL.WEIGHTS]
        with claimed(cfg.OUTPUT_DIR, RUN_FILES, not args.resume, args.overwrite, reads):
            results = trainer.train(cfg, *train)
    if results:  # the main process alone has them
        verify_results(cfg.TEST.EXPECTED_RESULTS, results)


def check(args: argparse.Namespace, engine: str) -> None:
    """Raises UserError for what is wrong before any process starts."""
    if args.resume and args.overwrite:
        raise UserError("--resume goes on from a run and --overwrite deletes it: pass one of them")
    if torchrun_started_this():
        return
    if engine == "native":
        load_config(args.config_file, args.opts)
    device = as_written(args.config_file, args.opts, "MODEL.DEVICE", "cuda")
    if args.num_gpus > 1 and device != "cpu" and not torch.cuda.is_available():
        raise UserError(
            f"--num-gpus {args.num_gpus}: torch finds no GPU here; with MODEL.DEVICE cpu the run "
            "has so many processes on the CPU"
        )


if __name__ == "__main__":
    with exit_cleanly():
        arguments = parse()
        engine, reason = choose_engine(arguments.engine)
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"engine: {engine} ({reason})", flush=True)
        check(arguments, engine)
        machines = arguments.num_machines, arguments.machine_rank
        launch(main, arguments.num_gpus, *machines, arguments.dist_url, args=(arguments, engine))
