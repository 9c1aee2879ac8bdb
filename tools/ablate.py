#!/usr/bin/env python
"""Run a grid of pretraining settings and seeds, and print one table of means and deviations.

    python tools/ablate.py configs/ablations/momentum.yaml --data DATA
    python tools/ablate.py configs/ablations/imagenet_momentum.yaml --data DATA --nproc-per-node 8

DATA is an ImageFolder root with train/CLASS and val/CLASS. What is finished is not run again, and
what was interrupted continues, so the same command goes on after a kill. A failed run is reported,
the others go on, and the command ends with code 1. moco_det/benchmark/jobs/ablation.py says
what the file holds.
"""

import argparse
from pathlib import Path

try:
    from moco_det.common.errors import at_least, command_parser, exit_cleanly, start_command
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: pip install -e . in the folder of moco_det") from None
from moco_det.common.installation import yaml_path


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("ablation", type=lambda text: Path(yaml_path(text)), metavar="YAML",
        help="one of configs/ablations/")  # fmt: skip
    add("--data", type=Path, required=True, metavar="DIR", help="ImageFolder root")
    add("--output", type=Path, metavar="DIR", help="default: output/ablations/NAME-OF-YAML")
    add("--seeds", type=int, metavar="N", help="runs of each row (default: as in the file)")
    add("-j", "--workers", type=at_least(0, 1024), metavar="N",
        help="data loading processes of a run (default: as of pretrain/main.py)")  # fmt: skip
    add("--nproc-per-node", type=at_least(1, 1024), default=1, metavar="N",
        help="processes of a run; more than 1: through torchrun")  # fmt: skip
    add("--dry-run", action="store_true", help="list the runs; print the table so far")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    start_command(parse)  # --help and mistakes end here, before the imports that take seconds

import sys

from moco_det.benchmark.jobs import ablation
from moco_det.benchmark.jobs.job import provenance
from moco_det.benchmark.jobs.runner import exit_on_signals
from moco_det.benchmark.report.tables import ablation_table, means_table, write_ablation
from moco_det.common.files import make_folder


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    source = Path(args.ablation)
    output = (args.output or Path("output/ablations", source.stem)).resolve()
    with exit_cleanly(), exit_on_signals(f"stopping; the same command goes on from {output}"):
        trials = ablation.plan_trials(
            ablation.read_ablation(source), args.seeds, output, args.nproc_per_node,
            source=source, data=args.data, workers=args.workers,
        )  # fmt: skip
        if args.dry_run:
            print(f"{ablation.listing(trials)}\n\n{means_table(ablation_table(trials, {}))}")
            return
        make_folder(output, "--output")
        failures = ablation.run_trials(trials)
        title = f"{source.stem}: mean ± standard deviation over n seeds; accuracies in percent"
        about = {"ablation": source.read_text(), "provenance": provenance()}
        about |= {"failures": failures}
        print(f"\n{write_ablation(trials, failures, title, about, output)}", flush=True)
        print(f"table: {output / 'table.md'}, .csv, .json")
    if failures:
        print(f"error: {len(failures)} of {len(trials)} runs failed:", file=sys.stderr)
        for name, reason in failures.items():
            print(f"  {name}: {reason}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
