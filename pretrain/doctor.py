#!/usr/bin/env python
"""Say in plain words what is wrong with a pretraining run, from its log.

    python pretrain/doctor.py output/moco

A run says the same by itself, at the step where it shows; this reads `metrics.jsonl` again.
"""

import argparse
import sys
from pathlib import Path

try:
    from moco_det.common.errors import command_parser, exit_cleanly, start_command
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: pip install -e . in the folder of moco_det") from None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, "0 no problem; 1 problems, or an error")
    parser.add_argument("output", type=Path, metavar="DIR", help="the --output of a run")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    start_command(parse)  # --help and mistakes end here, before the imports that take seconds

from pretrain.engine.diagnosis import examine


def main(arguments: list[str] | None = None) -> None:
    findings = examine(parse(arguments).output)
    for finding in findings:
        print(f"step {finding.step}: {finding}")
    problems = sum(finding.problem for finding in findings)
    print(f"{problems or 'no'} problem{'s' * (problems != 1)}")
    sys.exit(problems > 0)


if __name__ == "__main__":
    with exit_cleanly():
        main()
