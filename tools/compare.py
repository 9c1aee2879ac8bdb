#!/usr/bin/env python
"""Print finished detector runs side by side; a name given several times collects trials.

python tools/compare.py moco=output/voc random=output/voc_random
"""

from moco_det.common.ending import start_command

if __name__ == "__main__":
    start_command()  # before the imports that take seconds

from collections import defaultdict
from pathlib import Path

from moco_det.benchmark.report.tables import compare_runs, means_table
from moco_det.common.errors import UserError, command_parser, exit_cleanly


def main(arguments: list[str] | None = None) -> None:
    parser = command_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="NAME=DIR", help="a row and an OUTPUT_DIR")
    with exit_cleanly():
        runs = defaultdict(list)
        for run in parser.parse_args(arguments).runs:
            name, equals, folder = run.partition("=")
            if not equals:
                raise UserError(f"'{run}' is not of the form NAME=DIR")
            runs[name].append(Path(folder))
        table = compare_runs(runs)
        print("\n".join([means_table(table), *table.notes]))


if __name__ == "__main__":
    main()
