"""Classifiers' runs: the command, what its log tells, what is refused, and which run is which."""

import json
import sys

import pytest
from paths import REPOSITORY

from moco_det.benchmark.jobs.classifiers import (
    ClassifierFolder,
    classifier_job,
    identity,
    parse_flags,
)
from moco_det.benchmark.jobs.grid import ClassifierExperiment, ClassifierRun
from moco_det.benchmark.jobs.runs import Settings
from moco_det.common.errors import UserError
from pretrain.flags.evaluation import parse_linear

EXPERIMENT = ClassifierExperiment("linear", "A classifier", "imagenet", epochs=10, trials=2)


def make(tmp_path, trial=1, cpu=False, **flags) -> ClassifierFolder:
    given = {"arch": "resnet18", "pretrained": "random"} | flags
    return ClassifierFolder(ClassifierRun(EXPERIMENT, "moco", trial, given, cpu=cpu), tmp_path)


def write_log(folder, *lines):
    folder.path.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder.path / "metrics.jsonl").write_text(text)


def step(number, loss):
    return {"step": number, "epoch": number / 4, "loss": loss, "acc1": 50.0}


def validated(epoch, top1):
    return {"step": 4 * epoch, "epoch": epoch, "val_loss": 1.0, "val_acc1": top1, "val_acc5": 90.0}


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    return tmp_path / "datasets/imagenet"


def test_the_command_is_that_of_the_protocol(tmp_path, data):
    """Read back by the command's own parser: the flags of the run, and where it goes on."""
    folder = make(tmp_path, trial=3, lr=0.1, schedule=[4, 6], cache_features=True)
    python, script, *words = classifier_job(folder, gpus=1).commands[0].argv
    assert (python, script) == (sys.executable, str(REPOSITORY / "pretrain/linear.py"))
    args = parse_linear(words)
    assert (args.data, args.output) == (str(data), str(tmp_path / "runs/linear/moco/trial3"))
    assert (args.seed, args.resume, args.pretrained) == (3, "auto", "random")
    assert (args.lr, args.schedule, args.cache_features) == (0.1, [4, 6], True)
    assert not args.multiprocessing_distributed


def test_several_gpus_and_several_machines(tmp_path, data):
    folder = make(tmp_path)
    spawned = classifier_job(folder, gpus=8).commands[0].argv
    assert "--multiprocessing-distributed" in spawned
    launch = ["python", "-m", "torch.distributed.run"]
    launched = classifier_job(folder, gpus=8, launch=launch).commands[0].argv
    assert launched[:4] == [*launch, str(REPOSITORY / "pretrain/linear.py")]
    assert "--multiprocessing-distributed" not in launched


def test_a_run_on_the_cpu_sees_no_gpu(tmp_path, data):
    argv = classifier_job(make(tmp_path, cpu=True), gpus=1).commands[0].argv
    assert argv[:2] == ["env", "CUDA_VISIBLE_DEVICES="]


def test_settings_make_such_jobs_too(tmp_path, data):
    settings, folder = Settings(tmp_path, "native", gpus=2), make(tmp_path)
    job = settings.job(folder.run)
    assert isinstance(settings.folder(folder.run), ClassifierFolder)
    assert job.about == {"engine": "pretrain", "seed": 1, "gpus": 2}
    assert job.read_result() is None  # nothing was validated: a failure


def test_flags_from_the_command_line():
    words = ["epochs=3", "schedule=6,8", "cache_features=true", "batch-size=64"]
    assert parse_flags(words) == {
        "epochs": "3",
        "schedule": ["6", "8"],
        "cache_features": True,
        "batch_size": "64",
    }


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("epochs", "write NAME=VALUE"),
        ("epochs=", "write NAME=VALUE"),
        ("epoch=3", "unknown key 'epoch' in --linear.*epochs"),
        ("recipe=x.yaml", "unknown key 'recipe'"),
        ("finetune=true", "finetune is each run's own"),
        ("seed=3", "seed is each run's own"),
    ],
)
def test_flags_that_are_refused(word, reason):
    with pytest.raises(UserError, match=reason):
        parse_flags([word])


def test_values_are_refused_as_the_command_would(tmp_path, data):
    with pytest.raises(UserError, match="linear/moco/trial1: argument --epochs: invalid int"):
        identity(make(tmp_path, epochs="ten").run)
    with pytest.raises(UserError, match="linear/moco/trial1: --eval-every must be at least 1"):
        identity(make(tmp_path, eval_every=0).run)


# -- which run it is ------------------------------------------------------------------------------


def test_numbers_depend_on_settings_weights_and_seed(tmp_path, data):
    one, two = tmp_path / "one.pth.tar", tmp_path / "two.pth.tar"
    one.write_bytes(b"a")
    two.write_bytes(b"a")
    first = identity(make(tmp_path, pretrained=str(one)).run)
    assert first["flags"] == {"arch": "resnet18"}
    assert first["weights"].startswith("sha256:") and first["seed"] == 1
    same = identity(make(tmp_path, pretrained=str(two), workers=0, print_freq=5).run)
    assert same == first  # the same content, elsewhere; faster, and with more lines
    two.write_bytes(b"b")
    assert identity(make(tmp_path, pretrained=str(two)).run)["weights"] != first["weights"]
    assert identity(make(tmp_path, lr=0.5).run)["flags"] == {"arch": "resnet18", "lr": 0.5}
    assert identity(make(tmp_path).run)["weights"] == "random"


def test_a_recipe_is_known_by_its_values(tmp_path, data):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("finetune: true\nlr: 0.25\n")
    flags = identity(make(tmp_path, recipe=str(recipe)).run)["flags"]
    # With --finetune, A.6's drops and weight decay are no defaults of the linear protocol's.
    assert flags == {
        "arch": "resnet18",
        "finetune": True,
        "lr": 0.25,
        "schedule": [70, 90],
        "weight_decay": 1e-4,
    }


# -- what the log tells ---------------------------------------------------------------------------


def test_the_last_epoch_counts_not_the_best(tmp_path):
    folder = make(tmp_path)
    assert folder.results() == {} and folder.progress() == "epoch 0"
    write_log(folder, step(4, 2.0), validated(1, 61.0), step(8, 1.0), validated(2, 60.0))
    assert folder.results() == {"classification/top1": 60.0, "classification/top5": 90.0}
    assert folder.progress() == "epoch 2"
    assert folder.losses() == [(4, 2.0), (8, 1.0)]
    assert folder.shortened() == "linear ran 2 epochs, 20 % of the paper's 10"
    write_log(folder, validated(10, 60.0))
    assert folder.shortened() is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no validation"),
        (b'{"step": 1, "loss": 2.0}\n', "holds no validation"),
        (b'{"step": 4, "epoch": 1, "val_acc1": "x", "val_acc5": 1}\n', "line 1: val_acc1 is 'x'"),
        (b'{"step": 4, "epoch": true}\n', "line 1: epoch is True"),
        (b"\xb8\n", "line 1 is no JSON"),
    ],
)
def test_a_finished_run_whose_log_is_damaged_is_unreadable(tmp_path, content, message):
    folder = make(tmp_path)
    write_log(folder, validated(1, 60.0))
    folder.write_record({"state": "finished"})
    assert folder.look().state == "finished"
    (folder.path / "metrics.jsonl").write_bytes(content)
    found = folder.look()
    assert found.state == "unreadable" and message in found.problem


def test_a_best_checkpoint_without_a_last_one_is_removed(tmp_path):
    """A kill between the two would keep the run from beginning again."""
    folder = make(tmp_path)
    best, last = (folder.path / f"checkpoint_{name}.pth.tar" for name in ("best", "last"))
    folder.make()
    best.touch()
    last.touch()
    folder.repair()
    assert best.exists()
    last.unlink()
    folder.repair()
    assert not best.exists()
