"""What is found before the first run: each kind of problem once, with the runs that it is about."""

import dataclasses
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from noisy_colours import write_checkpoint, write_images
from tiny_voc import write_tiny_config, write_tiny_voc

from moco_det.benchmark.jobs import preflight as module
from moco_det.benchmark.jobs.grid import ClassifierExperiment, ClassifierRun, Experiment, Run
from moco_det.benchmark.jobs.preflight import checkpoint_bytes, preflight
from moco_det.benchmark.jobs.runs import Settings
from moco_det.config.loading import load_config
from moco_det.native.modeling.meta_arch import build_model
from pretrain.moco.encoders import build_encoder

EXPERIMENT = Experiment("voc", "A detector", iterations=100, batch=2, trials=2)


@pytest.fixture
def config(tmp_path):
    root = write_tiny_voc(tmp_path / "voc", images=3)
    return Path(write_tiny_config(tmp_path / "detector.yaml", root))


@pytest.fixture
def settings(tmp_path):
    return Settings(tmp_path / "output", "native")


@pytest.fixture
def planned(config):
    """Function: options -> two runs of the tiny config with them."""

    def runs(*options):
        options = ("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *options)
        return [Run(EXPERIMENT, "moco", trial, config, options) for trial in (1, 2)]

    return runs


def test_runs_that_can_begin_have_no_problem(planned, settings):
    assert preflight(planned(), settings) == []
    assert not settings.output.exists()


def test_a_missing_data_set_is_named_once_for_all_runs(planned, settings):
    (line,) = preflight(planned("DATASETS.TEST", "('voc_2007_test',)"), settings)
    assert line.startswith("dataset voc_2007_test: expected ")
    assert line.endswith("(voc/moco/trial1 and 1 more)")


def test_data_that_does_not_fit_the_model(planned, settings):
    (line,) = preflight(planned("MODEL.ROI_HEADS.NUM_CLASSES", "7"), settings)
    assert line.startswith("MODEL.ROI_HEADS.NUM_CLASSES is 7, but ")


def test_all_kinds_are_one_list(planned, settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runs = planned("MODEL.WEIGHTS", "/no/such.pkl", "DATASETS.TRAIN", "voc_2012_trainval")
    folder = settings.folder(runs[1])
    folder.make()
    (folder.path / "run.json").write_bytes(bytes(40))
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000))
    other = dataclasses.replace(planned("SOLVER.BASE_LR", "-1")[0], row="other")
    found = preflight([runs[0], other, runs[1]], settings)
    assert [line.partition(":")[0].partition(" is ")[0] for line in found] == [
        "the command line",
        f"cannot read the record {folder.path}/run.json",
        "dataset voc_2012_trainval",
        "no weight file at /no/such.pkl (voc/moco/trial1)",
        f"the checkpoints of 1 runs take about 0.0 GB, and {settings.output} has 0.0 GB left",
    ]


def test_a_run_that_asks_for_a_gpu_needs_one(planned, settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runs = planned("MODEL.DEVICE", "cuda")
    (line,) = preflight(runs, settings)
    assert line.startswith("no CUDA device, and MODEL.DEVICE is cuda")
    assert preflight(runs, settings, toy=True) == []  # it is made for CPUs
    assert preflight(runs, settings, local=False) == []  # other machines carry it out


def test_more_gpus_than_there_are(planned, settings, monkeypatch):
    def refuse(gpus, at_a_time):
        raise module.UserError(f"--gpus-per-run {gpus}: only 1 are visible")

    monkeypatch.setattr(module, "gpu_slots", refuse)
    assert preflight(planned(), settings) == ["--gpus-per-run 1: only 1 are visible"]


def test_what_is_made_or_drawn_first_is_not_missed(planned, settings):
    runs = planned("MODEL.WEIGHTS", "made.pkl", "DATASETS.TRAIN", "('voc:nowhere:train',)")
    assert preflight(runs, settings, made={"made.pkl"}, toy=True, ahead=True) == []
    assert len(preflight(runs, settings, made={"made.pkl"}, toy=True)) == 1


def test_nothing_is_downloaded_ahead(planned, settings, monkeypatch):
    runs = planned("MODEL.WEIGHTS", "detectron2://ImageNetPretrained/MSRA/R-50.pkl")
    asked = []

    def read(path):
        asked.append(path)
        raise module.UserError("cannot download it")

    monkeypatch.setattr(module, "detectron2_weights", read)
    assert preflight(runs, settings, ahead=True) == [] == asked
    assert preflight(runs, settings) == ["cannot download it (voc/moco/trial1 and 1 more)"]
    assert len(asked) == 1


def test_a_finished_run_needs_nothing(planned, settings):
    runs = planned("DATASETS.TEST", "('voc_2007_test',)")
    folder = settings.folder(runs[0])
    folder.write_record({"state": "finished"})
    (folder.path / "metrics.json").write_text('{"iteration": 9, "bbox/AP": 1.0}\n')
    (folder.path / "config.yaml").write_text("SOLVER: {MAX_ITER: 9, IMS_PER_BATCH: 2}\n")
    (line,) = preflight(runs, settings)
    assert line.endswith("(voc/moco/trial2)")


def test_the_disk_is_asked_for_what_is_not_there_yet(planned, settings, config, monkeypatch):
    runs = planned("SOLVER.MAX_ITER", "10", "SOLVER.CHECKPOINT_PERIOD", "5")
    cfg = load_config(str(config), runs[0].options)
    one = checkpoint_bytes(cfg)
    assert one == 8 * sum(p.numel() for p in build_model(cfg).parameters())
    usage = namedtuple("usage", "free")
    for free, count in ((6 * one, 0), (6 * one - 1, 1)):  # two runs of two and a final checkpoint
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(free))
        assert len(preflight(runs, settings)) == count
    folder = settings.folder(runs[0])
    folder.make()
    (folder.path / "model_0000004.pth").write_bytes(bytes(one))
    assert preflight(runs, settings) == []


# -- classifiers ----------------------------------------------------------------------------------

LINEAR = ClassifierExperiment("linear", "A classifier", "imagenet", epochs=10, trials=2)
ARCH = "resnet18w0.25x"


@pytest.fixture
def labelled(tmp_path, monkeypatch):
    """50 training images and 41 of val, and a checkpoint of an encoder; its path."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    write_images(tmp_path / "datasets/imagenet")
    return write_checkpoint(tmp_path / "c.pth.tar", ARCH)


def classifiers(pretrained, cpu=True, **flags):
    """Two runs."""
    flags = {"arch": ARCH, "pretrained": str(pretrained), "batch_size": 16} | flags
    return [ClassifierRun(LINEAR, "moco", trial, flags, cpu=cpu) for trial in (1, 2)]


def test_classifiers_that_can_begin_have_no_problem(labelled, settings):
    assert preflight(classifiers(labelled), settings) == []
    assert preflight(classifiers("random", finetune=True), settings) == []
    assert not settings.output.exists()


def test_labelled_images_are_looked_for_once(labelled, settings, monkeypatch, tmp_path):
    shutil.rmtree(tmp_path / "datasets/imagenet/val")
    (line,) = preflight(classifiers(labelled), settings)
    assert "val has no class folders" in line
    assert f"link the data set as {tmp_path}/datasets/imagenet, or set DETECTRON2_DATASETS" in line
    assert line.endswith("(linear/moco/trial1 and 1 more)")
    monkeypatch.setattr(module, "find_dataset", lambda *_: pytest.fail("a toy's is not drawn yet"))
    assert preflight(classifiers(labelled), settings, toy=True, ahead=True) == []


def test_a_data_set_of_torchvision_is_looked_for_as_such(labelled, settings, tmp_path):
    """It is the flag, or the recipe, that says which one the folder has to hold."""
    recipe = tmp_path / "cifar10.yaml"
    recipe.write_text("dataset: cifar10\n")
    for flags in ({"dataset": "cifar10"}, {"recipe": str(recipe)}):
        (line,) = preflight(classifiers(labelled, **flags), settings)
        assert f"{tmp_path}/datasets/imagenet does not hold CIFAR-10" in line
        assert "DATA needs cifar-10-batches-py/" in line and "; link the data set as" in line


@pytest.mark.parametrize(("batch", "gpus"), [(64, 1), (15, 2)])
def test_images_that_do_not_fill_a_batch(labelled, settings, batch, gpus, monkeypatch):
    monkeypatch.setattr(module, "gpu_slots", lambda gpus, at_a_time: [])
    settings = dataclasses.replace(settings, gpus=gpus)
    (line,) = preflight(classifiers(labelled, batch_size=batch), settings)
    assert line.startswith(
        f"batch_size {batch} must be a multiple of --gpus-per-run {gpus} and at most the 50 images"
    )


def test_a_checkpoint_of_another_encoder(labelled, settings):
    (line,) = preflight(classifiers(labelled, arch="resnet18"), settings)
    assert f"holds a {ARCH}, not a resnet18" in line and line.endswith("and 1 more)")
    (line,) = preflight(classifiers("/no/such.pth.tar"), settings)
    assert line.startswith("no checkpoint at /no/such.pth.tar")
    made = {"/no/such.pth.tar"}
    assert preflight(classifiers("/no/such.pth.tar"), settings, made) == []


def test_supervised_weights_are_not_downloaded_ahead(labelled, settings, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "load_encoder", lambda *encoder: asked.append(encoder))
    assert preflight(classifiers("supervised"), settings, ahead=True) == [] == asked
    assert preflight(classifiers("supervised"), settings) == []
    assert asked == [("supervised", ARCH, 1, False)]


def test_a_flag_that_the_command_refuses(labelled, settings):
    first, second = preflight(classifiers(labelled, epochs="ten"), settings)
    assert "argument --epochs: invalid int value: 'ten'" in first and "trial2" in second


def test_a_classifier_needs_a_gpu_but_where_told_otherwise(labelled, settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (line,) = preflight(classifiers(labelled, cpu=False), settings)
    assert line.startswith("no CUDA device") and "(linear/moco/trial1 and 1 more)" in line


def test_a_finished_classifier_of_other_settings_is_refused(labelled, settings):
    run, _ = classifiers(labelled)
    identity = settings.job(run).identity
    folder = settings.folder(run)
    folder.write_record({"state": "finished", "identity": identity})
    line = {"step": 1, "epoch": 1, "val_acc1": 1.0, "val_acc5": 2.0}
    (folder.path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert preflight([run], settings) == []
    (found,) = preflight([classifiers(labelled, schedule=["6", "8"])[0]], settings)
    assert "holds a trial with other settings (flags was" in found


def test_the_disk_is_asked_for_the_two_checkpoints_of_classifiers(labelled, settings, monkeypatch):
    parameters = sum(p.numel() for p in build_encoder(ARCH, 1000).parameters())
    usage = namedtuple("usage", "free")
    for finetune, one in ((False, 4 * parameters), (True, 8 * parameters)):
        runs = classifiers(labelled, finetune=finetune) if finetune else classifiers(labelled)
        for free, count in ((4 * one, 0), (4 * one - 1, 1)):
            monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(free))
            assert len(preflight(runs, settings)) == count
    folder = settings.folder(runs[0])
    folder.make()
    (folder.path / "checkpoint_last.pth.tar").write_bytes(bytes(one))
    assert preflight(runs, settings) == []
