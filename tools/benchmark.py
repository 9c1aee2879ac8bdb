#!/usr/bin/env python
r"""Measure speed beside a reference that is timed in the same run.

python tools/benchmark.py all --output output/benchmark
python tools/benchmark.py pretrain-step --arch resnet50 --batch-size 16 --device cpu
python tools/benchmark.py pretrain-step --batch-size 256 --amp none fp16 bf16 --bn-groups 1 2 8 \
    --compile off graphs on --deterministic
python tools/benchmark.py data-path --images DIR
python tools/benchmark.py pretrain-cost
python tools/benchmark.py knn-bank --images 1281167
python tools/benchmark.py annotation-memory --images 118000 --objects 828000
python tools/benchmark.py detector-step --config-file configs/voc_R50_C4_24k_moco.yaml
python tools/benchmark.py evaluation --config-file configs/coco_R50_FPN_1x_moco.yaml
python tools/benchmark.py detector-step --config-file configs/coco_R50_FPN_1x_moco.yaml \\
    --image-size 800 1216 --batch-size 2 16 --device cuda
"""

from moco_det.common.ending import start_command

if __name__ == "__main__":
    start_command()  # before the imports that take seconds

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tabulate import tabulate

from moco_det.benchmark import data_speed, everything, pretrain_step, speed
from moco_det.benchmark.cost import COLUMNS, IMAGENET, Setting, measure, ratios, table_rows
from moco_det.benchmark.evaluation_speed import evaluation_rates
from moco_det.benchmark.jobs.job import cores, processor
from moco_det.benchmark.pretrain_step import NAMES
from moco_det.common.errors import CommandParser, UserError, at_least, exit_cleanly
from moco_det.common.files import make_folder
from moco_det.config.loading import add_config_arguments
from moco_det.engines import ENGINES, choose_engine, require_detectron2
from pretrain.engine.optimization import AMP_DTYPES
from pretrain.moco import MECHANISMS

COUNT, MANY = at_least(1, 10**6), at_least(1, 10**8)


def main() -> None:
    args = parse_args()
    print(f"machine: {machine(getattr(args, 'device', 'cpu'))}", flush=True)
    with exit_cleanly():
        args.report(args)


def parse_args() -> argparse.Namespace:
    parser = CommandParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    step = commands.add_parser("pretrain-step", help="one MoCo v2 step against the official code's")
    step.add_argument("--arch", default="resnet50")
    step.add_argument("--batch-size", type=COUNT, default=16)
    step.add_argument("--image-size", type=COUNT, default=224)
    step.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    step.add_argument("--amp", nargs="+", default=["none", "bf16"], choices=AMP_DTYPES,
        help="a row each; the last is that of other rows, here and below")  # fmt: skip
    step.add_argument("--bn-groups", nargs="+", type=COUNT, default=[], help="default: main.py's")
    step.add_argument("--compile", nargs="+", default=["off"], choices=pretrain_step.COMPILED,
        help="of the encoders; graphs: as CUDA graphs")  # fmt: skip
    step.add_argument("--deterministic", action="store_true", help="a row with such kernels, too")
    step.add_argument("--rounds", type=COUNT, default=5)
    step.set_defaults(report=report_step)

    data = commands.add_parser("data-path", help="two v2 views of a file against torchvision + PIL")
    data.add_argument("--images", type=Path, required=True, metavar="DIR")
    data.add_argument("--image-size", type=COUNT, default=224)
    data.add_argument("--batch-size", type=COUNT, default=256, help="of the device's part")
    data.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    data.add_argument("--rounds", type=COUNT, default=5)
    data.set_defaults(report=report_data)

    bank = commands.add_parser("knn-bank", help="the kNN monitor on a bank of drawn features")
    bank.add_argument("--images", type=MANY, default=100_000, help="ImageNet has 1,281,167")
    bank.add_argument("--dim", type=COUNT, default=2048)
    bank.add_argument("--queries", type=COUNT, default=256)
    bank.add_argument("--classes", type=COUNT, default=1000)
    bank.add_argument("--neighbours", type=COUNT, default=200)
    bank.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    bank.set_defaults(report=report_bank)

    file = commands.add_parser("annotation-memory", help="a drawn COCO file in several processes")
    file.add_argument("--images", type=MANY, default=11_800, help="COCO has 118,000")
    file.add_argument("--objects", type=MANY, default=82_800, help="COCO has 828,000")
    file.add_argument("--processes", type=COUNT, default=8)
    file.set_defaults(report=report_annotations)

    cost = commands.add_parser("pretrain-cost", help="memory and hours: Table 3 of MoCo v2")
    cost.add_argument("--mechanisms", nargs="+", default=["moco", "end-to-end"], choices=MECHANISMS)
    cost.add_argument("--batch-sizes", type=COUNT, nargs="+", default=[256, 4096], help="global")
    cost.add_argument("--arch", default="resnet50")
    cost.add_argument("--image-size", type=COUNT, default=224)
    cost.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    cost.add_argument("--processes", type=COUNT, default=max(1, torch.cuda.device_count()),
        help="one GPU each")  # fmt: skip
    cost.add_argument("--amp", default="none", choices=AMP_DTYPES)
    cost.add_argument("--steps", type=COUNT, default=5, help="number of timed steps")
    cost.set_defaults(report=report_cost)

    detector = commands.add_parser("detector-step", help="a detector's iteration, engine by engine")
    add_config_arguments(detector)
    detector.add_argument("--engine", default="native", choices=ENGINES[1:])
    detector.add_argument("--versus", default="detectron2", choices=ENGINES[1:])
    detector.add_argument(
        "--image-size", type=COUNT, nargs=2, default=(480, 640), metavar=("H", "W")
    )
    detector.add_argument("--batch-size", type=COUNT, nargs="+", default=[2])
    detector.add_argument("--amp", nargs="+", default=["none", "bf16"], choices=("none", "bf16"))
    detector.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    detector.add_argument("--rounds", type=COUNT, default=3)
    detector.add_argument("--compile", action="store_true", help="--engine's backbone")
    detector.set_defaults(report=report_detector)

    test = commands.add_parser("evaluation", help="a detector's evaluation, from files to metrics")
    add_config_arguments(test)
    test.add_argument("--engine", default="native", choices=ENGINES[1:])
    test.add_argument("--versus", default="detectron2", choices=ENGINES[1:])
    test.add_argument("--images", type=COUNT, default=100, help="of the shorter of two runs")
    test.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    test.set_defaults(report=report_evaluation)

    whole = commands.add_parser("all", help="all of these, to a JSON file and a page")
    whole.add_argument("--output", type=Path, required=True, metavar="DIR")
    whole.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    whole.add_argument("--images", type=Path, metavar="DIR",
        help="photographs for data-path; without, some are drawn")  # fmt: skip
    whole.add_argument("--minutes", type=at_least(1, 10_000), default=8,
        help="what does not fit into them is left out")  # fmt: skip
    whole.set_defaults(report=report_all)
    return parser.parse_args()


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


if __name__ == "__main__":
    main()
