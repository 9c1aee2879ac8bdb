#!/usr/bin/env python
"""Run a grid of pretraining settings and seeds, and print one table of means and deviations.

    python tools/ablate.py configs/ablations/momentum.yaml --data DATA
    python tools/ablate.py configs/ablations/imagenet_momentum.yaml --data DATA --nproc-per-node 8

DATA is an ImageFolder root with train/CLASS and val/CLASS. What is finished is not run again, and
what was interrupted continues, so the same command goes on after a kill. A failed run is reported,
the others go on, and the command ends with code 1. pretrain/ablation.py says what the file holds.
"""

import argparse
import dataclasses
import re
import signal
import sys
from pathlib import Path

from moco_det.benchmark.jobs.ablation import Ablation, Run, read_ablation
from moco_det.benchmark.jobs.provenance import provenance
from moco_det.benchmark.jobs.steps import Step
from moco_det.benchmark.jobs.trials import Trial, run_trials
from moco_det.benchmark.report.trial_table import collect, markdown, write_table
from moco_det.common.errors import UserError, exit_cleanly

REPOSITORY = Path(__file__).resolve().parents[1]
EXPECTED = {"pretrain": 120, "knn": 15, "linear": 20}  # seconds; the first guess of an ETA


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("ablation", type=Path, metavar="YAML", help="one of configs/ablations/")
    add("--data", type=Path, required=True, metavar="DIR", help="ImageFolder root")
    add("--output", type=Path, metavar="DIR", help="default: output/ablations/NAME-OF-YAML")
    add("--seeds", type=int, help="runs of each row, instead of the file's")
    add("-j", "--workers", type=int, help="data loading processes of a run")
    add("--nproc-per-node", type=int, default=1, metavar="N", help="more than 1: through torchrun")
    add("--dry-run", action="store_true", help="list the runs; print the table so far")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with exit_cleanly():
        ablation = read_ablation(args.ablation)
        if args.seeds is not None:
            ablation = dataclasses.replace(ablation, seeds=args.seeds)
        output = (args.output or Path("output/ablations", args.ablation.stem)).resolve()
        trials = plan(ablation, args, output)
        if args.dry_run:
            list_trials(trials)
            return
        run(trials, args, output)


def plan(ablation: Ablation, args: argparse.Namespace, output: Path) -> list[Trial]:
    """All runs, a seed of every row after another: a table cut short has all its rows.

    Raises UserError before anything is run.
    """
    if args.seeds is not None and args.seeds < 1:
        raise UserError("--seeds must be at least 1")
    if not (args.data / "train").is_dir() or not (args.data / "val").is_dir():
        raise UserError(f"--data {args.data} needs train/CLASS and val/CLASS: both are read")
    trials = []
    for seed in range(ablation.seeds):
        for row in ablation.rows:
            folder = output / re.sub(r"[^\w.]+", "_", row.name).strip("_") / f"seed{seed}"
            place = (folder, ablation, args.ablation, args.data.resolve(), args.workers)
            one = Run(row, seed, *place)
            steps = [
                Step(name, name, [*launcher(args), *command], EXPECTED[name])
                for name, command in one.commands().items()
            ]
            trials.append(Trial(row.name, seed, folder, one.settings(), steps, one.measures))
    return trials


def launcher(args: argparse.Namespace) -> list[str]:
    if args.nproc_per_node == 1:
        return [sys.executable]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    return [sys.executable, *torchrun, str(args.nproc_per_node)]


def list_trials(trials: list[Trial]) -> None:
    """Print the state and the commands of each, and the table of what is done."""
    for trial in trials:
        print(f"{trial.state():5s}  {trial.name}")
        for step in trial.steps:
            print(f"         {step.as_typed()}")
    print(f"\n{markdown(collect(trials, {}))}")


def run(trials: list[Trial], args: argparse.Namespace, output: Path) -> None:
    """Run, write the table of what finished, print it. Exits with code 1 if a run failed."""
    try:
        failures = run_trials(trials)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from {output}", file=sys.stderr)
        sys.exit(130)
    title = f"{args.ablation.stem}: mean ± standard deviation over n seeds; accuracies in percent"
    about = {"ablation": args.ablation.read_text(), "provenance": provenance(REPOSITORY)}
    rows = collect(trials, failures)
    print(f"\n{write_table(rows, title, about | {'failures': failures}, output)}", flush=True)
    print(f"table: {output / 'table.md'}, .csv, .json")
    if failures:
        print(f"error: {len(failures)} of {len(trials)} runs failed:", file=sys.stderr)
        for name, reason in failures.items():
            print(f"  {name}: {reason}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
