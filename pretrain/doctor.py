#!/usr/bin/env python
"""Say in plain words what is wrong with a pretraining run, from its log.

    python pretrain/doctor.py output/moco

A run says the same by itself, at the step where it shows; this reads `metrics.jsonl` again.
"""

from moco_det.common.ending import start_command

if __name__ == "__main__":
    start_command()  # before the imports that take seconds

import argparse
import sys
from pathlib import Path

from moco_det.common.errors import CommandParser, exit_cleanly
from pretrain.engine.diagnosis import examine


def main(argv: list[str] | None = None) -> None:
    parser = CommandParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 no problem; 1 problems, or an error",
    )
    parser.add_argument("output", type=Path, metavar="DIR", help="the --output of a run")
    findings = examine(parser.parse_args(argv).output)
    for finding in findings:
        print(f"step {finding.step}: {finding}")
    problems = sum(finding.problem for finding in findings)
    print(f"{problems or 'no'} problem{'s' * (problems != 1)}")
    sys.exit(problems > 0)


if __name__ == "__main__":
    with exit_cleanly():
        main()
