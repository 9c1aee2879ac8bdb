"""`moco-det COMMAND ...` and `python -m moco_det COMMAND ...`: the scripts, wherever one stands."""

import ast
import runpy
import sys

import moco_det
from moco_det.common import ending
from moco_det.common.errors import exit_cleanly
from moco_det.common.installation import own_file

# What a user calls it -> the script; in the order of the way from images to a table.
COMMANDS = {
    "quickstart": "tools/quickstart.py",
    "subset": "pretrain/subset.py",
    "crop-overlap": "pretrain/crop_overlap.py",
    "pretrain": "pretrain/main.py",
    "linear": "pretrain/linear.py",
    "knn": "pretrain/knn.py",
    "voc-svm": "pretrain/voc_svm.py",
    "summary": "pretrain/summary.py",
    "segment-retrieval": "pretrain/segment_retrieval.py",
    "davis": "pretrain/davis.py",
    "embed": "pretrain/embed.py",
    "doctor": "pretrain/doctor.py",
    "convert": "tools/convert_to_d2.py",
    "check-data": "tools/check_data.py",
    "train": "tools/train_net.py",
    "visualize": "tools/visualize.py",
    "compare": "tools/compare.py",
    "reproduce": "tools/reproduce.py",
    "ablate": "tools/ablate.py",
    "check-parity": "tools/check_parity.py",
    "benchmark": "tools/benchmark.py",
}


def main() -> None:
    """Run the script of the first argument with the others, as if it had been called itself."""
    ending.prepare_end()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    with exit_cleanly():
        if name in ("-h", "--help"):
            usage = "usage: moco-det COMMAND ...; moco-det COMMAND --help lists its flags"
            print(f"{usage}\n\n{listing()}")
        elif name == "--version":
            print(moco_det.__version__)
        elif name not in COMMANDS:
            sys.exit(f"error: unknown command {name!r}; there are {', '.join(COMMANDS)}")
        else:
            script = str(own_file(COMMANDS[name]))
            sys.argv = [script, *sys.argv[2:]]
            runpy.run_path(script, run_name="__main__")


def listing() -> str:
    """A line for each command: the first of its script, which is not imported for it."""
    lines = []
    for name, script in COMMANDS.items():
        about = ast.get_docstring(ast.parse(own_file(script).read_text())).splitlines()[0]
        lines.append(f"  {name:19s}{about}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
