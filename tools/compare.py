#!/usr/bin/env python
"""Print finished detector runs side by side; a name given several times collects trials.

python tools/compare.py moco=output/voc random=output/voc_random
"""

import argparse

try:
    from moco_det.common.errors import UserError, command_parser, exit_cleanly, start_command
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: pip install -e . in the folder of moco_det") from None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="NAME=DIR", help="a row and an OUTPUT_DIR")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    start_command(parse)  # --help and mistakes end here, before the imports that take seconds

from collections import defaultdict
from pathlib import Path

from moco_det.benchmark.report.tables import compare_runs, means_table


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    with exit_cleanly():
        runs = defaultdict(list)
        for run in args.runs:
            name, equals, folder = run.partition("=")
            if not equals:
                raise UserError(f"'{run}' is not of the form NAME=DIR")
            runs[name].append(Path(folder))
        table = compare_runs(runs)
        print("\n".join([means_table(table), *table.notes]))


if __name__ == "__main__":
    main()
