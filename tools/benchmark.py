#!/usr/bin/env python
r"""Measure speed beside a reference that is timed in the same run.

python tools/benchmark.py all --output output/benchmark
python tools/benchmark.py pretrain-step --arch resnet50 --batch-size 16 --device cpu
python tools/benchmark.py pretrain-step --batch-size 256 --amp none fp16 bf16 --bn-groups 1 2 8 \
    --compile off graphs on --deterministic
python tools/benchmark.py crops --arch resnet18 --batch-size 8
python tools/benchmark.py data-path --images DIR
python tools/benchmark.py pretrain-cost
python tools/benchmark.py knn-bank --images 1281167
python tools/benchmark.py annotation-memory --images 118000 --objects 828000
python tools/benchmark.py detector-step --config-file configs/voc_R50_C4_24k_moco.yaml
python tools/benchmark.py evaluation --config-file configs/coco_R50_FPN_1x_moco.yaml
python tools/benchmark.py detector-step --config-file configs/coco_R50_FPN_1x_moco.yaml \\
    --image-size 800 1216 --batch-size 2 16 --device cuda
"""

import argparse
from pathlib import Path

try:
    from moco_det.common.errors import (
        CommandParser,
        UserError,
        at_least,
        exit_cleanly,
        start_command,
    )
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: pip install -e . in the folder of moco_det") from None
from moco_det.config.flags import add_config_arguments
from moco_det.engines import ENGINES, choose_engine, require_detectron2
from pretrain.flags.common import AMP
from pretrain.flags.pretraining import MECHANISMS

COUNT, MANY = at_least(1, 10**6), at_least(1, 10**8)
COMPILED = ("off", "on", "graphs")  # of `pretrain_step`: encoders; the last as CUDA graphs


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, (add_flags, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about)
        add_flags(command)
        if name not in ON_THE_CPU:
            command.add_argument("--device",
                help="what computes (default: cuda where there is a GPU)")  # fmt: skip
    return parser.parse_args(arguments)


def add_step_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--arch", default="resnet50", help="the encoder")
    add("--batch-size", type=COUNT, default=16, help="images")
    add("--image-size", type=COUNT, default=224, help="side of a view in pixels")
    add("--amp", nargs="+", default=["none", "bf16"], choices=AMP,
        help="a row each; the last is that of other rows, here and below")  # fmt: skip
    add("--bn-groups", nargs="+", type=COUNT, default=[], metavar="N",
        help="a row each for N groups of batch norm (default: main.py's)")  # fmt: skip
    add("--compile", nargs="+", default=["off"], choices=COMPILED,
        help="of the encoders, a row each; graphs: as CUDA graphs")  # fmt: skip
    add("--deterministic", action="store_true", help="a row with such kernels, too")
    add("--rounds", type=COUNT, default=5, help="times that each row is timed, in turn")


def add_crop_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--arch", default="resnet50", help="the encoder")
    add("--batch-size", type=COUNT, default=16, help="images")
    add("--amp", default="none", choices=AMP, help="mixed precision of the encoders")
    add("--moco-k", type=MANY, default=65536, help="keys in the queue")
    add("--rounds", type=COUNT, default=5, help="times that each row is timed, in turn")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="a folder of photographs")
    add("--image-size", type=COUNT, default=224, help="side of a view in pixels")
    add("--batch-size", type=COUNT, default=256, help="images, of the device's part")
    add("--rounds", type=COUNT, default=5, help="times that each row is timed, in turn")


def add_bank_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--images", type=MANY, default=100_000, help="of the bank; ImageNet has 1,281,167")
    add("--dim", type=COUNT, default=2048, help="of a feature")
    add("--queries", type=COUNT, default=256, help="images to classify")
    add("--classes", type=COUNT, default=1000, help="of the images")
    add("--neighbours", type=COUNT, default=200, help="that vote")


def add_annotation_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--images", type=MANY, default=11_800, help="of the file; COCO has 118,000")
    add("--objects", type=MANY, default=82_800, help="of the file; COCO has 828,000")
    add("--processes", type=COUNT, default=8, help="that share it")


def add_cost_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--mechanisms", nargs="+", default=["moco", "end-to-end"], choices=MECHANISMS,
        help="a row each for every batch size")  # fmt: skip
    add("--batch-sizes", type=COUNT, nargs="+", default=[256, 4096], help="images, global")
    add("--arch", default="resnet50", help="the encoder")
    add("--image-size", type=COUNT, default=224, help="side of a view in pixels")
    add("--processes", type=COUNT, help="one GPU each (default: the GPUs that there are, or 1)")
    add("--amp", default="none", choices=AMP, help="mixed precision of the encoders")
    add("--steps", type=COUNT, default=5, help="number of timed steps")


def add_detector_flags(parser: argparse.ArgumentParser) -> None:
    add_engine_flags(parser)
    add = parser.add_argument
    add("--image-size", type=COUNT, nargs=2, default=(480, 640), metavar=("H", "W"), help="pixels")
    add("--batch-size", type=COUNT, nargs="+", default=[2], help="images, a row each")
    add("--amp", nargs="+", default=["none", "bf16"], choices=("none", "bf16"), help="a row each")
    add("--rounds", type=COUNT, default=3, help="times that each row is timed, in turn")
    add("--compile", action="store_true", help="--engine's backbone")


def add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    add_engine_flags(parser)
    parser.add_argument("--images", type=COUNT, default=100, help="of the shorter of two runs")


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    add = parser.add_argument
    add("--engine", default="native", choices=ENGINES[1:], help="the one to time")
    add("--versus", default="detectron2", choices=ENGINES[1:], help="the one to time it against")


def add_all_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the file and the page")
    add("--images", type=Path, metavar="DIR",
        help="photographs for data-path (default: some are drawn)")  # fmt: skip
    add("--minutes", type=at_least(1, 10_000), default=8,
        help="what does not fit into them is left out")  # fmt: skip


# What is measured -> its flags, and what it is.
COMMANDS = {
    "pretrain-step": (add_step_flags, "one MoCo v2 step against the official code's"),
    "crops": (add_crop_flags, "multi-crop against what its pixels let one expect"),
    "data-path": (add_data_flags, "two v2 views of a file against torchvision + PIL"),
    "knn-bank": (add_bank_flags, "the kNN monitor on a bank of drawn features"),
    "annotation-memory": (add_annotation_flags, "a drawn COCO file in several processes"),
    "pretrain-cost": (add_cost_flags, "memory and hours: Table 3 of MoCo v2"),
    "detector-step": (add_detector_flags, "a detector's iteration, engine by engine"),
    "evaluation": (add_evaluation_flags, "a detector's evaluation, from files to metrics"),
    "all": (add_all_flags, "all of these, to a JSON file and a page"),
}
ON_THE_CPU = ("annotation-memory",)

if __name__ == "__main__":
    start_command(parse)  # --help and mistakes end here, before the imports that take seconds

from tempfile import TemporaryDirectory

import torch
from tabulate import tabulate

from moco_det.benchmark import crop_cost, data_speed, everything, pretrain_step, speed
from moco_det.benchmark.cost import COLUMNS, IMAGENET, Setting, measure, ratios, table_rows
from moco_det.benchmark.evaluation_speed import evaluation_rates
from moco_det.benchmark.jobs.job import cores, processor
from moco_det.benchmark.pretrain_step import NAMES
from moco_det.common.files import make_folder


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    gpus = torch.cuda.device_count()
    if args.command not in ON_THE_CPU and args.device is None:
        args.device = "cuda" if gpus else "cpu"
    if args.command == "pretrain-cost" and args.processes is None:
        args.processes = max(1, gpus)
    print(f"machine: {machine(getattr(args, 'device', 'cpu'))}", flush=True)
    with exit_cleanly():
        REPORTS[args.command](args)


def report_all(args: argparse.Namespace) -> None:
    """Each benchmark at a size that suits the device, Detectron2 beside ours where it is."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is available here; pass --device cpu")
    make_folder(args.output, "--output")
    images = args.images or everything.draw_photographs(args.output / "photographs")
    versus = "detectron2" if choose_engine("auto")[0] == "detectron2" else "native"
    todo = everything.commands(args.device, images, versus)
    measured = everything.measure_all(todo, args.minutes)
    print(everything.write_measured(measured, machine(args.device), args.output))


def report_step(args: argparse.Namespace) -> None:
    """Every form of the official code, and of ours."""
    setting = pretrain_step.Setting(args.arch, args.batch_size, args.image_size, args.device)
    forms = pretrain_step.candidates(
        setting, args.amp, args.bn_groups, args.compile, args.deterministic
    )
    timings = pretrain_step.time_steps(setting, forms, args.rounds)
    print(f"MoCo v2, {args.arch}, batch {args.batch_size}, {args.image_size} px")
    rows = pretrain_step.table_rows(setting, timings)
    print(tabulate(rows, pretrain_step.COLUMNS, tablefmt="pipe", disable_numparse=True))


def report_crops(args: argparse.Namespace) -> None:
    """Two crops of 224 pixels, the paper's six, and these with nearest neighbours."""
    settled = args.arch, args.batch_size, args.device, args.amp, args.rounds, args.moco_k
    seconds = crop_cost.time_crops(crop_cost.PAPER, *settled)
    print(f"MoCo v2, {args.arch}, batch {args.batch_size}, {NAMES[args.amp]}, K = {args.moco_k}")
    rows = crop_cost.table_rows(seconds)
    print(tabulate(rows, crop_cost.COLUMNS, tablefmt="pipe", disable_numparse=True))
    print("pixels: of queries forward and backward (3), of keys forward (1); on a CPU one thread")


def report_data(args: argparse.Namespace) -> None:
    """Two views of an image: by torchvision, by ours in the workers, by ours with the device."""
    seconds = data_speed.data_path(args.images, args.image_size, args.rounds)
    labels = {
        "reference": "torchvision + PIL",
        "cpu": "ours, --augment-on cpu",
        "device": "ours, --augment-on device: the workers",
    }
    for name, label in labels.items():
        ratio = seconds["reference"] / seconds[name]
        print(f"{label:40s} {1 / seconds[name]:8.1f} images/s and core   ratio {ratio:.2f}")
    batch = args.batch_size
    whole = data_speed.looks(args.image_size, batch, args.device, args.rounds)
    for name, value in whole.items():
        label = f"the device ({args.device}), {name}"
        rate = f"{batch / value:8.1f} images/s   {value * 1e3:.1f} ms a batch of {batch}"
        print(f"{label:40s} {rate}")


def report_bank(args: argparse.Namespace) -> None:
    sizes = args.images, args.dim, args.queries, args.classes, args.neighbours
    cost = data_speed.knn_bank(*sizes, args.device)
    print(f"bank of {args.images:,} images x {args.dim}")
    print(f"{'float32, on every process':40s} {cost.float32 / 2**30:8.2f} GiB")
    ratio = cost.float32 / cost.held
    print(f"{'ours, in one process':40s} {cost.held / 2**30:8.2f} GiB   ratio {ratio:.2f}")
    print(
        f"{'ours, in each of eight':40s} {cost.held / 8 / 2**30:8.2f} GiB   ratio {8 * ratio:.2f}"
    )
    print(f"{'search':40s} {args.queries / cost.seconds:8.1f} queries/s")
    print(f"{'classes as by float32':40s} {100 * cost.agreement:8.2f} %")


def report_annotations(args: argparse.Namespace) -> None:
    """One process, then several: all memory is beyond that of processes that have read nothing."""
    with data_speed.drawn_annotations(args.images, args.objects) as file:
        size = file.stat().st_size / 2**20
        print(f"{args.images:,} images, {args.objects:,} objects, {size:.0f} MiB", flush=True)
        one, several = (data_speed.annotation_memory(file, n) for n in (1, args.processes))
    for processes, cost in ((1, one), (args.processes, several)):
        print(
            f"{processes} process(es), all together: {cost.peak / 2**20:8.0f} MiB at most, "
            f"{cost.held / 2**20:6.0f} MiB held, {cost.seconds:6.1f} s"
        )
    print(f"ratio {several.peak / one.peak:.2f} at most, {several.held / one.held:.2f} held")


def report_cost(args: argparse.Namespace) -> None:
    """Each mechanism at each batch size; what does not fit the memory is n/a."""
    settled = (args.arch, args.image_size, args.device, args.processes, args.amp)
    costs = {
        (mechanism, batch_size): measure(Setting(mechanism, batch_size, *settled), args.steps)
        for batch_size in args.batch_sizes
        for mechanism in args.mechanisms
    }
    each, memory = "process", "peak RSS of a process, the libraries included"
    if args.device == "cuda":
        each, memory = "GPU", "a GPU's peak"
    print(f"{args.arch}, {args.image_size} px, {NAMES[args.amp]}, {args.processes} x {each}")
    print(tabulate(table_rows(costs), COLUMNS, tablefmt="pipe", disable_numparse=True))
    print(f"memory: {memory}; hours: of the steps alone, for ImageNet's {IMAGENET:,} images")
    print("paper: MoCo v2, Table 3: ResNet-50, 224 px, 8 x V100 16G; its 93.0 is an estimate")
    print(*ratios(costs), sep="\n")


def report_detector(args: argparse.Namespace) -> None:
    """Both engines in turn; --engine's figures as ratios to those of --versus."""
    if "detectron2" in (args.engine, args.versus):
        require_detectron2()
    opts = (*args.opts, "MODEL.DEVICE", args.device)
    engines, rows = (args.versus, args.engine), []
    for batch_size in args.batch_size:
        task = speed.DetectorTask(args.config_file, opts, *args.image_size, batch_size)
        times = speed.compare_detectors(engines, task, args.amp, args.rounds, args.compile)
        rows += [row.cells() for row in times]
    units = ("ms", "GiB", "waits")
    columns = [f"{engine}, {unit}" for unit in units for engine in engines]
    columns = ["batch", "step", "amp", *columns[:2], "ratio", *columns[2:4], "ratio", *columns[4:]]
    print(tabulate(rows, columns, tablefmt="pipe", disable_numparse=True))
    print("ms: of a whole batch; GiB: at most, in training; waits: of the host for the device")


def report_evaluation(args: argparse.Namespace) -> None:
    """Both engines on the same drawn scenes, one after the other."""
    engines = tuple(dict.fromkeys((args.versus, args.engine)))
    if "detectron2" in engines:
        require_detectron2()
    opts = (*args.opts, "MODEL.DEVICE", args.device)
    with TemporaryDirectory() as folder:
        rates = evaluation_rates(engines, args.config_file, opts, args.images, Path(folder))
    theirs = rates[args.versus]
    rows = [(engine, f"{rate:.2f}", f"{theirs / rate:.2f}") for engine, rate in rates.items()]
    columns = ("engine", "images/s", "time ratio")
    print(tabulate(rows, columns, tablefmt="pipe", disable_numparse=True))


def machine(device: str) -> str:
    """Processor, cores, vector instructions and versions: what a figure depends on."""
    on_gpu = device == "cuda" and torch.cuda.is_available()
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{torch.cuda.get_device_name() if on_gpu else processor()}, {cores()} cores "
        f"({capability}), "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )


REPORTS = {
    "pretrain-step": report_step,
    "crops": report_crops,
    "data-path": report_data,
    "knn-bank": report_bank,
    "annotation-memory": report_annotations,
    "pretrain-cost": report_cost,
    "detector-step": report_detector,
    "evaluation": report_evaluation,
    "all": report_all,
}

if __name__ == "__main__":
    main()
