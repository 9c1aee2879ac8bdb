#!/usr/bin/env python
"""Train and evaluate a detector from a Detectron2 YAML, with Detectron2's command line.

python tools/train_net.py --config-file configs/X.yaml --num-gpus 8
python tools/train_net.py --config-file configs/X.yaml SOLVER.BASE_LR 0.001 OUTPUT_DIR out
python tools/train_net.py --config-file configs/X.yaml --eval-only MODEL.WEIGHTS model_final.pth
torchrun --nproc-per-node 8 tools/train_net.py --config-file configs/X.yaml
"""

import argparse
import importlib.util

from moco_det.config import load_config
from moco_det.errors import UserError, exit_cleanly
from moco_det.native import comm
from moco_det.native.inference import verify_results
from moco_det.native.launch import launch
from moco_det.native.trainer import evaluate_weights, train


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 done; 1 an error, in one line; 75 SIGTERM, a checkpoint is saved",
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML config")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, no more")
    parser.add_argument(
        "--resume", action="store_true", help="go on from OUTPUT_DIR's last checkpoint, if any"
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="processes per machine")
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0, help="number of this machine")
    parser.add_argument(
        "--dist-url", default="auto", help="tcp://HOST:PORT of machine 0 (default: a free port)"
    )
    parser.add_argument("--engine", choices=("auto", "native", "detectron2"), default="auto")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys to override"
    )
    return parser.parse_args(argv)


def announce_engine(engine: str) -> None:
    """Say which engine runs and why."""
    if engine == "detectron2":
        raise UserError("--engine detectron2 is not available in this version; use --engine native")
    installed = importlib.util.find_spec("detectron2") is not None
    reasons = {
        "native": "asked for",
        "auto": "the detectron2 engine is not available in this version"
        if installed
        else "detectron2 is not installed",
    }
    comm.say(f"engine: native ({reasons[engine]})")


def main(args: argparse.Namespace) -> None:
    """One process of the run."""
    announce_engine(args.engine)
    cfg = load_config(args.config_file, args.opts)
    results = (evaluate_weights if args.eval_only else train)(cfg, args.resume)
    if comm.is_main():
        verify_results(cfg.TEST.EXPECTED_RESULTS, results)


if __name__ == "__main__":
    with exit_cleanly():
        arguments = parse_args()
        launch(
            main,
            arguments.num_gpus,
            arguments.num_machines,
            arguments.machine_rank,
            arguments.dist_url,
            args=(arguments,),
        )
