"""The quickstart's plan, its refusals, and one run of the whole chain on a handful of images."""

import json
import sys

import pytest
from commands import python, run

from moco_det.benchmark.jobs import quickstart, runner
from moco_det.benchmark.jobs.job import JobFolder
from moco_det.benchmark.jobs.quickstart import (
    MARK,
    detector_slots,
    make_plan,
    preparation,
    prepare_output,
    voc_splits,
)
from moco_det.benchmark.synthetic import images as synthetic_images
from moco_det.common.errors import UserError

TOOL = "tools/quickstart.py"

RECIPE = """
arch: resnet18
image_size: 32
batch_size: 16
bn_groups: 2
epochs: 1
lr: 0.03
mlp: true
aug_plus: true
cos: true
moco_k: 32
knn_every: 1
workers: 1
"""

CONFIG = """
_BASE_: "{base}"
INPUT:
  MIN_SIZE_TRAIN: (64,)
  MIN_SIZE_TEST: 64
DATALOADER:
  NUM_WORKERS: 0
SOLVER:
  IMS_PER_BATCH: 2
  MAX_ITER: 2
  STEPS: (1,)
TEST:
  PRECISE_BN:
    NUM_ITER: 1
"""


@pytest.fixture
def small(tmp_path, repository):
    """A few drawn images, and a recipe and a config that do next to nothing."""
    synthetic_images.write_image_folder(tmp_path, "train", seed=0, per_class=4)
    synthetic_images.write_image_folder(tmp_path, "val", seed=0, per_class=1)
    synthetic_images.write_voc_scenes(tmp_path, "train", seed=0, count=4)
    synthetic_images.write_voc_scenes(tmp_path, "test", seed=0, count=3)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    base = repository / "configs/quick/quickstart_R18_FPN.yaml"
    (tmp_path / "config.yaml").write_text(CONFIG.format(base=base))
    return tmp_path


def plan_for(repository, root, **changes):
    arguments = {
        "output": root / "out",
        "recipe": repository / "configs/pretrain/quickstart_r18.yaml",
        "config_file": repository / "configs/quick/quickstart_R18_FPN.yaml",
        "seed": 3,
        "seeds": 2,
    }
    return make_plan(**arguments | changes)


def test_embedded_chain(repository, tmp_path):
    jobs = preparation(plan_for(repository, tmp_path))
    assert [job.name for job in jobs] == ["draw", "pretrain"]
    (draw,), (pretrain,) = (job.commands for job in jobs)
    assert draw.argv[0] == pretrain.argv[0] == sys.executable
    assert draw.seconds + pretrain.seconds < 300
    assert draw.argv[draw.argv.index("--train-scenes") + 1] == str(quickstart.LABELLED_SCENES)


def test_pairs_of_detectors_differ_in_their_first_weights_only(repository, tmp_path):
    plan = plan_for(repository, tmp_path)
    runs = plan.runs()
    assert [(run.row, run.trial) for run in runs] == [
        ("moco", 3), ("random", 3), ("moco", 4), ("random", 4),
    ]  # fmt: skip
    moco, random = (plan.settings.command(run) for run in runs[:2])
    differing = [(a, b) for a, b in zip(moco, random, strict=True) if a != b]
    folder = tmp_path.resolve() / "out"
    assert differing == [
        (str(folder / "weights/moco.pkl"), ""),
        (
            str(folder / "runs/quickstart/moco/trial3"),
            str(folder / "runs/quickstart/random/trial3"),
        ),
    ]
    commands = [plan.settings.command(run) for run in runs]
    assert [c[c.index("SEED") + 1] for c in commands] == ["3", "3", "4", "4"]


@pytest.mark.parametrize(
    ("cores", "seeds", "threads"),
    [(1, 4, ["1"]), (2, 4, ["1", "1"]), (64, 4, ["16"] * 4), (8, 1, ["4", "4"])],
)
def test_detectors_share_the_cores(repository, tmp_path, monkeypatch, cores, seeds, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(runner, "_visible_gpus", list)
    for module in (quickstart, runner):
        monkeypatch.setattr(module, "cores", lambda: cores)
    slots = detector_slots(plan_for(repository, tmp_path, seeds=seeds))
    assert [slot["OMP_NUM_THREADS"] for slot in slots] == threads


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        (("train", "val", "trainval", "test"), ("trainval", "test")),
        (("train", "test"), ("train", "test")),
        (("train", "val", "trainval"), ("train", "val")),  # trainval would hold the test images
        (("train", "val", "test"), ("train", "test")),
    ],
)
def test_splits(tmp_path, present, chosen):
    folder = tmp_path / "ImageSets/Main"
    folder.mkdir(parents=True)
    for name in present:
        (folder / f"{name}.txt").write_text("a\n")
    assert voc_splits(tmp_path) == chosen


def test_missing_splits_are_named(tmp_path):
    with pytest.raises(UserError, match="needs train.txt"):
        voc_splits(tmp_path)


@pytest.mark.parametrize("names", [("images",), ("voc",)])
def test_half_of_the_users_data_is_refused(repository, tmp_path, names):
    with pytest.raises(UserError, match="--images and --voc go together"):
        plan_for(repository, tmp_path, **dict.fromkeys(names, tmp_path))


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain/precious.txt").write_text("x")
    with pytest.raises(UserError, match="holds other files"):
        prepare_output(tmp_path)
    assert (tmp_path / "pretrain/precious.txt").exists()
    assert not (tmp_path / MARK).exists()


def test_an_earlier_quickstart_is_cleared_but_nothing_else(tmp_path):
    prepare_output(tmp_path)
    for folder in ("pretrain", "data/images", "runs/quickstart/moco/trial0", "mine"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "metrics.json").write_text("old")
    (tmp_path / "report.html").write_text("old")
    prepare_output(tmp_path)
    left = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {MARK, "mine/metrics.json"}


def test_a_folder_that_is_still_written_is_left_alone(tmp_path):
    """As where an earlier quickstart was killed and its pretraining goes on."""
    prepare_output(tmp_path)
    lock = JobFolder("pretrain", tmp_path / "pretrain").claimed()
    with lock, pytest.raises(UserError, match="pretrain is still being written"):
        prepare_output(tmp_path)
    prepare_output(tmp_path)
    assert not (tmp_path / "pretrain").exists()


def test_bad_input_is_one_line_and_a_code(tmp_path):
    done = python(TOOL, "--output", tmp_path / "o", "--images", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: --images and --voc go together: unlabelled images, and annotated ones"
    ]


def test_absurd_counts_are_refused(tmp_path):
    for flags in (("--seeds", 2**62), ("--seed", 2**80)):
        done = run(TOOL, "--output", tmp_path / "o", *flags)
        assert done.returncode == 1
        assert done.stderr.startswith("error: --seeds must be at least 1, and --seed at least 0")
        assert len(done.stderr.splitlines()) == 1


def test_a_mistake_in_the_config_is_told_before_anything_is_made(small):
    (small / "config.yaml").write_text("SOLVER: {BASE_LR: .nan}\n")
    done = run(TOOL, "--output", small / "out", "--config-file", small / "config.yaml")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {small}/config.yaml: SOLVER.BASE_LR is nan")
    assert not (small / "out").exists()


def test_a_failing_step_ends_the_run_with_its_code(small):
    (small / "recipe.yaml").write_text("no_such_flag: 1\n")
    done = run(
        TOOL, "--output", small / "out", "--images", small / "images", "--voc",
        small / "scenes", "--recipe", small / "recipe.yaml",
    )  # fmt: skip
    assert done.returncode == 1
    assert "no_such_flag" in done.stdout
    assert done.stderr.startswith("error: step 'pretrain' failed with exit code 1")
    assert len(done.stderr.splitlines()) == 1
    assert not (small / "out/report.html").exists()


@pytest.mark.slow
def test_the_whole_chain_on_a_handful_of_images(small):
    done = run(
        TOOL, "--output", small / "out", "--images", small / "images", "--voc",
        small / "scenes", "--recipe", small / "recipe.yaml", "--config-file",
        small / "config.yaml", "--seed", 3, "--seeds", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((small / "out/report.json").read_text())
    assert report["seconds"] > 0
    for value in (*report["knn_top1"].values(), *report["ap50"].values()):
        assert 0 <= value <= 100
    assert [run["seed"] for run in report["detection"]] == [3]
    page = (small / "out/report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2 * 3
    assert done.stdout.splitlines()[-1] == f"report: {(small / 'out').resolve() / 'report.html'}"
