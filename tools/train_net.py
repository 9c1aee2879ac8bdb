#!/usr/bin/env python
"""Train and evaluate a detector from a Detectron2 YAML, with Detectron2's command line.

python tools/train_net.py --config-file configs/X.yaml --num-gpus 8
python tools/train_net.py --config-file configs/X.yaml SOLVER.BASE_LR 0.001 OUTPUT_DIR out
python tools/train_net.py --config-file configs/X.yaml --eval-only MODEL.WEIGHTS model_final.pth
torchrun --nproc-per-node 8 tools/train_net.py --config-file configs/X.yaml
"""

from moco_det.common.ending import start_command

if __name__ == "__main__":
    start_command()  # before the imports that take seconds

import argparse
import os

import torch

from moco_det.common.ending import EXIT_CTRL_C
from moco_det.common.errors import EXIT_INTERRUPTED, UserError, command_parser, exit_cleanly
from moco_det.common.files import claimed
from moco_det.common.images import allow_pixels
from moco_det.common.launch import launch, torchrun_started_this
from moco_det.config.loading import add_config_arguments, as_written, load_config
from moco_det.engines import ENGINES, RUN_FILES, choose_engine
from moco_det.evaluation import verify_results


def parse_args(argv=None) -> argparse.Namespace:
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
    add("--num-gpus", type=int, default=1, help="processes per machine")
    add("--num-machines", type=int, default=1)
    add("--machine-rank", type=int, default=0, help="number of this machine")
    add("--dist-url", default="auto", help="tcp://HOST:PORT of machine 0 (default: a free port)")
    add("--engine", choices=ENGINES, default="auto", help="auto: detectron2 where it is installed")
    add("--allow-missing", action="store_true",
        help="keep the random values of backbone arrays that MODEL.WEIGHTS lacks")  # fmt: skip
    return parser.parse_args(argv)


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
        device = load_config(args.config_file, args.opts).MODEL.DEVICE
    else:  # whose own reader turns it into "cpu" where there is no GPU
        device = as_written(args.config_file, args.opts, "MODEL.DEVICE", "cuda")
    if args.num_gpus > 1 and device != "cpu" and not torch.cuda.is_available():
        raise UserError(
            f"--num-gpus {args.num_gpus}: torch finds no GPU here; with MODEL.DEVICE cpu the run "
            "has so many processes on the CPU"
        )


if __name__ == "__main__":
    with exit_cleanly():
        arguments = parse_args()
        engine, reason = choose_engine(arguments.engine)
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"engine: {engine} ({reason})", flush=True)
        check(arguments, engine)
        machines = arguments.num_machines, arguments.machine_rank
        launch(main, arguments.num_gpus, *machines, arguments.dist_url, args=(arguments, engine))
