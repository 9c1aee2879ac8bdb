#!/usr/bin/env python
"""Checkpoint in, the papers' tables out: fine-tune, evaluate, repeat, report.

    python tools/reproduce.py --weights output/moco/checkpoint_last.pth.tar --tables 2b 5
    python tools/reproduce.py --weights output/moco/checkpoint_last.pth.tar --tables 1 A6 A7
    python tools/reproduce.py --weights moco_in1m=A.pth.tar memory_bank=B.pth.tar --tables 3
    python tools/reproduce.py --weights dense=densecl.pth moco=moco_v2_200ep --tables 2b
    python tools/reproduce.py --weights ... --dry-run      what would run, and for how long
    python tools/reproduce.py --weights ... --status       how far it is
    python tools/reproduce.py --weights ... --gpus-per-run 8 --launcher slurm --slurm partition=gpu
    python tools/reproduce.py --quick                      a toy of it all, on a CPU, without data

Run the same command again to continue: what is finished is not run again, what was interrupted
resumes from its checkpoint. The NAME of --weights is the paper's row that the checkpoint is
compared with (default: moco_in1m); other names become rows of their own.
"""

import argparse
from pathlib import Path

try:
    from moco_det.common.errors import (
        UserError,
        at_least,
        command_parser,
        exit_cleanly,
        start_command,
    )
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: pip install -e . in the folder of moco_det") from None
from moco_det.config.flags import add_config_option
from moco_det.engines import ENGINES, choose_engine

QUICK_JOBS = 2
MOST_TRIALS = 1000


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser(
        __doc__,
        "0 all runs are finished; 1 an error, problems found before the first run, or runs that "
        "failed; 130 and 143 stopped; the same command continues",
    )
    add = parser.add_argument
    add("--weights", nargs="+", default=[], metavar="[NAME=]CKPT",
        help="a row for each: all that tools/convert_to_d2.py takes (default: none)")  # fmt: skip
    add("--tables", nargs="+", default=[], metavar="N",
        help="2a, 2b, 3, ... or 2, 5, 6 (default: all)")  # fmt: skip
    add("--trials", type=int, metavar="N", help="runs of each row (default: as in the paper)")
    add("--output", type=Path, metavar="DIR", help="default: output/reproduce, or output/quick")
    add("--engine", choices=ENGINES, default="auto", help="as in tools/train_net.py")
    add("--launcher", choices=("local", "slurm"), default="local",
        help="runs on this machine, or a job for each")  # fmt: skip
    add("--slurm", nargs="+", default=[], metavar="NAME=VALUE",
        help="for submitit: nodes=2 timeout_min=2880 partition=gpu account=... (default: "
        "submitit's)")  # fmt: skip
    add("--gpus-per-run", type=at_least(1, 1024), default=1, metavar="N",
        help="processes of a run, per machine")  # fmt: skip
    add("--jobs", type=at_least(1, 1024), metavar="N",
        help="runs at a time (default: as the GPUs allow; on a CPU 1, with --quick 2)")  # fmt: skip
    add("--retries", type=at_least(0), default=1, metavar="N", help="runs again after a failure")
    add("--quick", action="store_true", help="toy experiments on drawn images: minutes on a CPU")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="list what would run, run nothing")
    mode.add_argument("--status", action="store_true", help="list the state of every run")
    mode.add_argument("--report", action="store_true", help="report what is there, run nothing")
    add("--linear", nargs="+", default=[], metavar="NAME=VALUE",
        help="flags of pretrain/linear.py, for every classifier: amp=bf16 workers=16 (default: "
        "the protocol's)")  # fmt: skip
    add_config_option(parser, help="config keys, for every detector")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    start_command(parse)  # --help and mistakes end here, before the imports that take seconds

import sys

from moco_det.benchmark.jobs import reproduction
from moco_det.benchmark.jobs.classifiers import parse_flags
from moco_det.benchmark.jobs.grid import ClassifierExperiment, load_grid
from moco_det.benchmark.jobs.job import Job
from moco_det.benchmark.jobs.runner import exit_on_signals
from moco_det.benchmark.jobs.runs import Settings, named_checkpoints
from moco_det.benchmark.jobs.slurm import parse_parameters
from moco_det.common.files import make_folder


def make_plan(args: argparse.Namespace) -> reproduction.Reproduction:
    """Raises UserError for arguments that cannot be."""
    if len(args.opts) % 2:
        raise UserError("--opts takes pairs of a key and a value")
    if args.trials is not None and not 1 <= args.trials <= MOST_TRIALS:
        raise UserError(f"--trials must be at least 1 and at most {MOST_TRIALS}")
    output = (args.output or Path("output/quick" if args.quick else "output/reproduce")).resolve()
    grid = reproduction.quick_grid(output) if args.quick else load_grid()
    nothing_runs = args.dry_run or args.status or args.report
    checkpoints = named_checkpoints(args.weights, download=not nothing_runs)
    if args.quick and not checkpoints:
        checkpoints = reproduction.quick_checkpoint(output)
    tables, flags = grid.select(args.tables), parse_flags(args.linear)
    parts = [part for table in tables for part in table.parts]
    if flags and not any(isinstance(part.experiment, ClassifierExperiment) for part in parts):
        raise UserError("--linear is for classifiers, of which these --tables have none")
    engine, reason = choose_engine(args.engine)
    print(f"engine: {engine} ({reason})", flush=True)
    plan = reproduction.Reproduction(
        grid=grid,
        tables=tables,
        checkpoints=checkpoints,
        trials=range(1, args.trials + 1) if args.trials else None,
        options=args.opts,
        settings=Settings(output, engine, args.gpus_per_run, args.retries),
        flags=flags,
    )
    for name in plan.rows_in_no_table():
        known = [row for row in tables[0].rows(()) if grid.rows[row].pretrain]
        others = ", ".join([*known, "or one of your own"])
        print(f"note: --weights {name}=...: these tables have no such row; name {others}")
    return plan


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    plan = make_plan(args)
    if args.dry_run:
        print(reproduction.dry_run(plan), flush=True)
        found_problems(args, plan, ahead=True)
        return 0
    if args.status:
        print(reproduction.status(plan))
        return 0
    output, failed = plan.settings.output, False
    if args.report or args.quick:
        make_folder(output, "--output")
    if not args.report:
        if args.quick:
            reproduction.prepare_quick(output, pretraining=not args.weights)
        if found_problems(args, plan):
            return 1
        make_folder(output, "--output")
        failed = bool(carry_out(args, plan))
    print(f"report: {reproduction.write_report(plan)}")
    return int(failed)


def found_problems(
    args: argparse.Namespace, plan: reproduction.Reproduction, ahead: bool = False
) -> bool:
    """Whether something keeps the runs from a good end; prints what.

    `ahead`: before anything is drawn or downloaded.
    """
    found = reproduction.problems(plan, args.launcher == "local", args.quick, ahead)
    if found:
        print(reproduction.listed(found), file=sys.stderr, flush=True)
    return bool(found)


def carry_out(args: argparse.Namespace, plan: reproduction.Reproduction) -> list[Job]:
    """Returns the runs that failed."""
    if args.launcher == "local":
        return reproduction.reproduce(plan, args.jobs or (QUICK_JOBS if args.quick else None))
    jobs = reproduction.submit_to_slurm(plan, parse_parameters(args.slurm))
    print(f"submitted {len(jobs)} jobs: {' '.join(jobs)}" if jobs else "nothing to submit")
    print("--status tells how far they are, --report writes the report of what is there")
    return []


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    with exit_cleanly(), exit_on_signals("stopping; the same command goes on from here"):
        code = run(args)
    sys.exit(code)


if __name__ == "__main__":
    main()
