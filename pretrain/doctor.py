#!/usr/bin/env python
"""Say in plain words what is wrong with a run of pretraining, from its log.

    python pretrain/doctor.py output/moco

A run says the same by itself, at the step where it shows; this reads `metrics.jsonl` again.
"""

import argparse
import json
import sys
from pathlib import Path

from moco_det.common.errors import UserError, exit_cleanly
from pretrain.engine.diagnosis import Doctor, Finding


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
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


def examine(output: Path) -> list[Finding]:
    """All findings on the run of `output`, in the order in which they showed.

    Raises:
        UserError: there is no log of a run.
    """
    path = output / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"no {path}: name the --output folder of a run of pretrain/main.py")
    doctor = Doctor(output)
    return [finding for record in read(path) for finding in doctor.hear(record)]


def read(path: Path) -> list[dict]:
    """The records of a log; a last line that a kill cut short is none."""
    records = []
    for number, line in enumerate(lines := path.read_text().splitlines(), 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number} is no JSON: {error}") from error
    return records


if __name__ == "__main__":
    with exit_cleanly():
        main()
