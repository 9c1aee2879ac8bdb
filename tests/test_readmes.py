"""The READMEs and the headers of configs/: every command parses, every file and key exists.

Each command is read by the parser of the tool that it calls, configs are loaded with its overrides,
recipes and grids are read. What is cheap is run as well, on tiny data: the six commands of the
first page.
"""

import contextlib
import io
import re
import runpy
import shlex
import signal
from functools import cache
from pathlib import Path
from unittest.mock import patch
from xml.dom import minidom

import numpy as np
import pytest
import setuptools
import torch
from PIL import Image
from readme_commands import CONFIGS, READMES, REPOSITORY, header_commands, parse, readme_commands
from tiny_voc import write_tiny_voc

import pretrain
from moco_det.benchmark.jobs.ablation import read_ablation
from moco_det.benchmark.jobs.classifiers import parse_flags
from moco_det.benchmark.jobs.grid import ClassifierExperiment, Experiment, load_grid
from moco_det.benchmark.jobs.slurm import parse_parameters
from moco_det.benchmark.report.pages import dumbbell_chart, line_chart
from moco_det.common.errors import UserError
from moco_det.config.loading import load_config
from moco_det.datasets import get_dataset

HEADERS = {path: header_commands(path) for path in CONFIGS}
SHOWN = {path: readme_commands(path) for path in READMES}
COMMANDS = [command for group in (SHOWN, HEADERS) for found in group.values() for command in found]
FIELDS = ("Command", "Hardware", "Time", "Expected", "Source")
# A word of the user's own: DATA, CHECKPOINT.pth.tar, SHARDS/train-{000000..000146}.tar.
OWN = re.compile(r"[A-Z][A-Z0-9_]*([./].*)?$")
FILE = re.compile(r"/|\.(yaml|json|pkl|pth|tar)$")


# -- what a command names -------------------------------------------------------------------------


def options(command) -> dict[str, str]:
    """KEY VALUE pairs of a config."""
    opts = getattr(namespace(command), "opts", [])
    return dict(zip(opts[::2], opts[1::2], strict=True))


def namespace(command):
    return _parsed(command.script, tuple(command.arguments))


@cache
def _parsed(script: Path, arguments: tuple[str, ...]):
    return parse(script, list(arguments))


def writes(command) -> set[str]:
    """What a command of ours leaves; a "/" at the end stands for all that is in the folder."""
    if command.script is None:
        return set()
    args, script = namespace(command), command.script.name
    if script == "convert_to_d2.py":
        return {args.out}
    if script == "train_net.py":
        folder = options(command).get("OUTPUT_DIR", "output")
        return {folder, f"{folder}/model_final.pth"}
    output = str(getattr(args, "output", None) or "output/quick")
    if script in ("main.py", "linear.py"):
        return {output, f"{output}/checkpoint_last.pth.tar"}
    if script in ("quickstart.py", "reproduce.py", "images.py", "tasks.py"):
        return {output, f"{output}/"}
    return {output}


def reads(command) -> list[str]:
    """The files and folders that a command's words name, but for those that it writes."""
    found = []
    for name, value in vars(namespace(command)).items():
        for word in value if isinstance(value, list | tuple) else [value]:
            if name in ("runs", "weights") and isinstance(word, str):
                word = word.rpartition("=")[2]
            if isinstance(word, str | Path) and FILE.search(str(word)) and "://" not in str(word):
                found.append(str(word))
    opts = options(command)
    unread = {value for key, value in opts.items() if key != "MODEL.WEIGHTS"} | writes(command)
    return [word for word in found if word not in unread]


@cache
def written() -> set[str]:
    found = set()
    for command in COMMANDS:
        with contextlib.suppress(Exception, SystemExit):  # `check` says what is wrong with it
            found |= writes(command)
    return found


def exists(word: str) -> bool:
    if OWN.match(word) or word in written() or (REPOSITORY / word).exists():
        return True
    # Data sets of a config that the user has put there, which the header tells of.
    return word.startswith("datasets/") or any(
        word.startswith(folder) for folder in written() if folder.endswith("/")
    )


# -- every command, dry ---------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def at_the_top(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize("path", [*SHOWN, *HEADERS], ids=str)
def test_commands_parse_and_name_what_exists(path):
    for command in (SHOWN | HEADERS)[path]:
        try:
            check(command)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{command}: {error}") from error


def check(command) -> None:
    """Raises an exception of any kind where a word of it is wrong."""
    if command.script is None:
        check_program(*command.words)
        return
    assert (REPOSITORY / command.script).is_file()
    args = namespace(command)
    shortened = {word for word in command.arguments if word.startswith("--")} - flags(command)
    assert not shortened, "argparse would take them, but these are not the flags' names"
    assert [word for word in reads(command) if not exists(word)] == []
    if getattr(args, "config_file", None):
        check_config(str(args.config_file), args.opts if hasattr(args, "opts") else [])
    if hasattr(args, "ablation"):
        read_ablation(args.ablation)
    if hasattr(args, "tables"):
        load_grid().select(args.tables)
        parse_parameters(args.slurm)
        parse_flags(args.linear)


def flags(command) -> set[str]:
    """All long flags of a command, or of the subcommand that is its first word."""
    named = command.script.name == "benchmark.py" or command.arguments[:1] == ["cam"]
    subcommand = command.arguments[:1] if named else []
    return _flags(command.script, *subcommand)


@cache
def _flags(script: Path, *subcommand: str) -> set[str]:
    with contextlib.redirect_stdout(io.StringIO()) as help_text, contextlib.suppress(SystemExit):
        parse(script, [*subcommand, "--help"])
    return set(re.findall(r"--[a-z][a-z0-9-]*", help_text.getvalue()))


def check_config(path: str, opts: list[str]) -> None:
    """It can be loaded, and its data sets are named in a form that is known."""
    cfg = load_config(path, opts)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        try:
            get_dataset(name)
        except UserError as error:  # that its files are absent, but not that it is no name
            assert not re.search("no dataset|is written", str(error)), error


@cache
def extras() -> dict[str, list[str]]:
    found = {}
    with patch.object(setuptools, "setup", lambda **arguments: found.update(arguments)):
        runpy.run_path(str(REPOSITORY / "setup.py"))
    return found["extras_require"]


def check_program(program: str, *words: str) -> None:
    if program == "pip":
        assert words[:2] == ("install", "-e")
        wanted = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[2])
        assert set((wanted[1] or "").split(",")) - {""} <= extras().keys()
    elif program == "tensorboard":
        assert words[0] == "--logdir"
        assert exists(words[1])
    else:
        assert (program, words) == ("pytest", ())


def test_wrong_commands_are_found(tmp_path):
    """Each of these differs from a right one in a word."""
    for wrong in (
        "python tools/train_nets.py --config-file configs/voc_R50_C4_24k_moco.yaml",
        "python tools/train_net.py --config configs/voc_R50_C4_24k_moco.yaml --num-gpu 8",
        "python tools/train_net.py --config-file configs/voc_R50_C4_25k_moco.yaml",
        "python tools/train_net.py --config-file configs/voc_R50_C4_24k_moco.yaml MODEL.WEIGHT x",
        "python tools/train_net.py --config-file configs/Base-RCNN-C4-BN.yaml DATASETS.TRAIN v:x:y",
        "python tools/convert_to_d2.py output/moko/checkpoint_last.pth.tar output/moco_r50.pkl",
        "python tools/compare.py moco=output/voc_typo",
        "python tools/reproduce.py --weights CHECKPOINT.pth.tar --tables 2c",
        "python tools/reproduce.py --weights CHECKPOINT.pth.tar --slurm partition",
        "python tools/reproduce.py --weights CHECKPOINT.pth.tar --linear epoch=3",
        "python tools/ablate.py configs/ablations/momenta.yaml --data DATA",
        "python pretrain/main.py DATA --recipe configs/pretrain/moco_v3_r50.yaml",
        "python pretrain/main.py DATA --moco-queue 4",
        "torchrun --nproc_per_node 8 pretrain/main.py DATA --mechanism moko",
        "python tools/benchmark.py pretrain-steps",
    ):
        readme = tmp_path / "README.md"
        readme.write_text(f"```bash\n{wrong}\n```\n")
        (command,) = readme_commands(readme)
        with pytest.raises((Exception, SystemExit)):
            check(command)


# -- the text around them -------------------------------------------------------------------------


def prose(path: Path) -> str:
    """A README without its blocks."""
    return re.sub(r"^```.*?^```", "", (REPOSITORY / path).read_text(), flags=re.S | re.M)


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)", prose(path.relative_to(REPOSITORY)), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", READMES, ids=str)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", prose(path)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = (REPOSITORY / path.parent / file).resolve() if file else REPOSITORY / path
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("path", READMES, ids=str)
def test_files_named_in_the_text_exist(path):
    spans = re.findall(r"`([^`\n]+)`", prose(path))
    for span in spans:
        if re.match(r"(moco_det|pretrain|configs|tools|tests)/[\w./*-]*$", span):
            assert list(REPOSITORY.glob(span.rstrip("/"))), span


def test_flags_named_in_the_text_exist():
    known = set().union(*(flags(command) for command in COMMANDS if command.script))
    for path in READMES:
        for span in re.findall(r"`(-[^`\n]+)`", prose(path)):
            for flag in re.findall(r"--[a-z][a-z0-9-]*", span):
                assert flag in known, f"{path}: {span}"


def test_the_first_page_is_short_and_its_tree_is_the_folders():
    text = (REPOSITORY / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    (tree,) = re.findall(r"^```\n(pretrain/.*?)^```", text, flags=re.S | re.M)
    assert len(tree.splitlines()) <= 15
    top = ""
    for line in tree.splitlines():
        names = re.match(r" *((\w+/ *)+)", line)[1].split()
        top = top if line.startswith(" ") else ""
        assert [name for name in names if not (REPOSITORY / top / name).is_dir()] == []
        top = top or names[0]


def test_pictures_are_small():
    for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (REPOSITORY / "README.md").read_text()):
        assert (REPOSITORY / picture).stat().st_size < 60_000


# -- configs/README.md ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_a_config_opens_with_command_hardware_time_result_and_source(path):
    comment = re.match(r"(#.*\n)+", (REPOSITORY / path).read_text())[0]
    assert [name for name in FIELDS if not re.search(rf"^# {name}: +\S", comment, flags=re.M)] == []
    assert any(str(path) in command.words or "recipe" in comment for command in HEADERS[path])


REVISITING = "revisiting_"  # how the names of tables begin that have a section of their own


def published(kind: type) -> dict[tuple[str, str], list[float]]:
    """(experiment of a kind, row's label) -> the papers' numbers of metrics that a run has."""
    grid, found = load_grid(), {}
    tables = [table for name, table in grid.tables.items() if not name.startswith(REVISITING)]
    parts = [part for table in tables for part in table.parts]
    for part in [part for part in parts if isinstance(part.experiment, kind)]:
        for row, numbers in part.published.items():
            pairs = zip(numbers, part.columns.values(), strict=True)
            key = part.experiment.name, grid.rows[row].label
            found[key] = [number for number, metric in pairs if metric]
    return found


def test_the_tables_hold_the_papers_numbers_and_every_experiment():
    text = (REPOSITORY / "configs/README.md").read_text()
    rows = re.findall(r"^\|[^|]+\| \[([^\]]+)\]\((\w+)\.yaml\) \|(.*)\|[^|]+\|$", text, re.M)
    shown = {}
    for label, file, cells in rows:
        experiment = re.sub(r"_(moco|random|supervised|supervised_frozen_bn)$", "", file)
        shown[experiment, label] = [float(cell) for cell in cells.split("|")]
    assert shown == published(Experiment)
    assert {file for _, file, _ in rows} == {p.stem for p in CONFIGS if len(p.parts) == 2}


def test_the_tables_hold_the_papers_classifiers():
    text = (REPOSITORY / "configs/README.md").read_text()
    linear = text.split("### Linear classification of ImageNet")[1].split("\n## ")[0]
    cells = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| [^|]+ \|$", linear, re.M)
    shown = {("imagenet_linear", label): [float(number)] for label, number in cells}
    names = {
        "MoCo on IG-1B": "MoCo IG-1B", "MoCo on ImageNet": "MoCo IN-1M", "on IG-1B": "MoCo IG-1B",
        "on ImageNet": "MoCo IN-1M", "supervised": "super. IN-1M", "from scratch": "random init.",
    }  # fmt: skip
    rows = re.findall(r"^\| \[(\w+)_r50\]\(finetune/\S+ \| ([^|]+) \| ([^|]+) \|$", text, re.M)
    for name, starts, numbers in rows:
        for start, number in zip(starts.split(" / "), numbers.split(" / "), strict=True):
            shown[f"{name}_finetune", names[start]] = [float(number)]
    papers = published(ClassifierExperiment)
    assert shown == {key: numbers for key, numbers in papers.items() if numbers != [None]}
    assert len(rows) == 2 and len(cells) == 32


def test_the_tables_of_revisiting_are_the_grid_s():
    """Rows, names for --weights and numbers, and the command that fills each."""
    text = (REPOSITORY / "configs/README.md").read_text()
    section = text.split("\n## Revisiting Contrastive Methods\n")[1].split("\n## ")[0]
    grid, shown = load_grid(), re.split(r"^### Table (\d): ", section, flags=re.M)[1:]
    tables = {name: table for name, table in grid.tables.items() if name.startswith(REVISITING)}
    assert [f"{REVISITING}{number}" for number in shown[::2]] == list(tables)
    for table, block in zip(tables.values(), shown[1::2], strict=True):
        lines = [line[1:-1].split("|") for line in block.splitlines() if line[:1] == "|"]
        heads, _, *rows = [[cell.strip() for cell in line] for line in lines]
        columns = [f"{p.heading} {c}".strip() for p in table.parts for c in p.columns]
        assert heads == ["features of", "`--weights`", *columns]
        for name, (label, given, *cells) in zip(table.rows(()), rows, strict=True):
            row = grid.rows[name]
            assert (label, given) == (row.label, f"`{name}`" * bool(row.pretrain))
            found = [float(cell) if cell else None for cell in cells]
            assert found == [number for part in table.parts for number in part.published[name]]
        assert f"--tables {table.name}\n" in block


def test_the_picture_is_made_of_a_report(tmp_path, monkeypatch):
    """The script that is shown there, on a page with the report's own charts and colours."""
    (sheet,) = (REPOSITORY / "moco_det/benchmark/report").rglob("report.css")
    page = [
        f"<style>\n{sheet.read_text()}</style>",
        line_chart("kNN top-1", "", [("moco", [(0, 1.0), (1, 2.0)])], "epoch", "%"),
        dumbbell_chart("AP50", "", [("mean", 1.0, 2.0)]),
        *['<svg class="photo" viewBox="0 0 9 9"><image/></svg>'] * 12,
    ]
    (tmp_path / "output/quickstart").mkdir(parents=True)
    (tmp_path / "output/quickstart/report.html").write_text("".join(page))
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path)
    (script,) = re.findall(
        r"```python\n(.*?)```", (REPOSITORY / "configs/README.md").read_text(), re.S
    )
    exec(script, {})
    picture = (tmp_path / "configs/quickstart.svg").read_text()
    assert minidom.parseString(picture).documentElement.tagName == "svg"
    assert [picture.count(part) for part in ("<polyline", 'class="joint"', "<image")] == [1, 1, 6]
    assert ".photo rect" in picture


# -- the six commands, for real -------------------------------------------------------------------

# What is passed before and after the words of a command, so that it takes seconds.
TINY = {
    "main.py": (
        "--arch resnet50w0.25x --image-size 32 --batch-size 4 --moco-k 8 --moco-dim 8 --epochs 1 "
        "--workers 0 --knn-every 0",
        "",
    ),
    "train_net.py": (
        "--engine native",
        "MODEL.DEVICE cpu MODEL.RESNETS.STEM_OUT_CHANNELS 16 MODEL.RESNETS.WIDTH_PER_GROUP 16 "
        "MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 8 "
        "MODEL.RPN.POST_NMS_TOPK_TRAIN 20 MODEL.RPN.POST_NMS_TOPK_TEST 5 INPUT.MIN_SIZE_TEST 48 "
        "INPUT.MIN_SIZE_TRAIN (48,) DATALOADER.NUM_WORKERS 0 SOLVER.MAX_ITER 1 SOLVER.STEPS () "
        "SOLVER.IMS_PER_BATCH 2 TEST.PRECISE_BN.NUM_ITER 1 DATASETS.TRAIN ('voc_2007_train',) "
        "DATASETS.TEST ('voc_2007_test',)",
    ),
}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a few images, a tiny VOC 2007, and the repository's configs/."""
    rng = np.random.default_rng(0)
    (tmp_path / "DATA").mkdir()
    for number in range(8):
        pixels = rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "DATA" / f"{number}.png")
    voc = write_tiny_voc(tmp_path / "datasets" / "VOC2007", images=6)
    for path in (voc / "Annotations").iterdir():
        text = path.read_text().replace(">bar<", ">bottle<").replace(">square<", ">tvmonitor<")
        path.write_text(text)
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command) -> None:
    """In this process, on one CPU instead of 8 GPUs, made tiny."""
    before, after = (words.split() for words in TINY.get(command.script.name, ("", "")))
    shown = [word for word in command.arguments if word not in ("--num-gpus", "8")]
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with patch("sys.argv", [str(command.script), *before, *shown, *after]):
            runpy.run_path(str(REPOSITORY / command.script), run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, command
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_the_six_commands_lead_from_images_to_a_table(workplace, capsys):
    section = (REPOSITORY / "README.md").read_text().split("# 1. pretrain")[1].split("```")[0]
    story = [c for c in SHOWN[Path("README.md")] if shlex.join(c.words)[:40] in section]
    assert len(story) == 7  # the sixth is two
    for command in story:
        if command.script:
            run(command)
        else:
            assert list((workplace / command.words[-1]).glob("**/events.out.tfevents.*"))
    table = capsys.readouterr().out.splitlines()[-6:]
    assert any("moco" in line for line in table), table
    assert any("random" in line for line in table), table


# -- examples in Python, for real -----------------------------------------------------------------

PYTHON = [
    (path, code)
    for path in (Path("README.md"), Path("pretrain/README.md"))
    for code in re.findall(r"```python\n(.*?)```", (REPOSITORY / path).read_text(), re.S)
]
TINY_RUN = {
    "image_size": 32, "batch_size": 4, "moco_k": 8, "moco_dim": 8, "epochs": 1, "workers": 0,
    "knn_every": 0, "log": "none", "lr": 1e-5, "seed": 0,
}  # fmt: skip


@pytest.mark.parametrize(("path", "code"), PYTHON)
def test_examples_in_python_run(workplace, monkeypatch, path, code):
    """Made tiny by arguments that they do not give, or that a reader would choose otherwise."""
    run_whole = pretrain.pretrain
    monkeypatch.setattr(
        pretrain,
        "pretrain",
        lambda data, backbone=None, **flags: run_whole(data, backbone, **TINY_RUN, **flags),
        raising=False,
    )
    shown = {}
    exec(code, shown)
    if "run" in shown:
        assert shown["run"].checkpoint.is_file()
    if "fresh" in shown:
        trained = shown["run"].backbone.state_dict()
        for name, value in shown["fresh"].state_dict().items():
            assert torch.equal(value, trained[f"backbone.{name}"]), name
    if "model" in shown:
        assert int(shown["model"].queue_ptr) == 16
    if "cfg" in shown:
        assert shown["cfg"].MODEL.RESNETS.DEPTH == 50


def test_every_example_in_python_is_found():
    assert len(PYTHON) == 4
    for path, code in PYTHON:
        assert len(code.splitlines()) <= 20, path
