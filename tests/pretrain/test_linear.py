"""The linear protocol as a user runs it: oracle, launches, resumes, bad input."""

import itertools
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from commands import IN_FLOAT64, Command, python, run_as_torchrun
from float64 import ROUNDING, assert_equal_but_for_rounding, in_float64
from noisy_colours import slow_features, write_checkpoint
from paths import REPOSITORY
from pretraining_runs import checkpoint, values
from sklearn.linear_model import LogisticRegression
from torchvision.models import resnet18
from torchvision_layouts import write_cifar10

from moco_det.common.errors import EXIT_INTERRUPTED, UserError
from pretrain.engine.checkpoints import LAST
from pretrain.evaluation.classification import BEST
from pretrain.flags.evaluation import parse_knn, parse_linear
from pretrain.knn import classify as classify_by_neighbours
from pretrain.linear import build_encoder, classify

CPU = torch.device("cpu")
FLAGS = [
    "-a", "resnet18", "--image-size", "32", "-b", "16", "--epochs", "3", "--schedule", "2",
    "-j", "0", "--seed", "7", "-p", "1", "--lr", "0.1",
]  # fmt: skip
STEPS = 9  # 3 epochs of 3 steps: 50 images in batches of 16


# A small one: what is saved and resumed does not depend on its width.
NARROW = "resnet18w0.25x"


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("narrow") / "checkpoint.pth.tar", NARROW)


def test_a_classifier_begins_as_the_official_one():
    """Normal, of deviation 0.01, and no bias; fine-tuning's as torch makes it. 512,000 values give
    a deviation to 0.1 % and a kurtosis to 0.007."""
    found = {}
    for mode in ("", "--finetune"):
        flags = ["images", *FLAGS, "--pretrained", "random", *mode.split()]
        fc = build_encoder(parse_linear(flags), 1000, None).fc
        weight = fc.weight.double()
        kurtosis = ((weight / weight.std()) ** 4).mean().item()
        found[mode] = weight.std().item(), kurtosis, fc.bias.abs().max().item()
    assert found[""] == (pytest.approx(0.01, rel=0.005), pytest.approx(3, abs=0.05), 0)
    bound = 512**-0.5  # uniform within it
    uniform = pytest.approx(bound / 3**0.5, rel=0.005), pytest.approx(1.8, abs=0.02)
    assert found["--finetune"] == (*uniform, pytest.approx(bound, rel=0.05))


def train(images, pretrained, output, *flags):
    argv = [str(images), *FLAGS, "--pretrained", str(pretrained), "--output", str(output), *flags]
    classify(parse_linear(argv), CPU)


def command(images, pretrained, output, *flags):
    data = images, "--pretrained", pretrained, "--output", output
    return REPOSITORY / "pretrain/linear.py", *data, *FLAGS, *flags


@pytest.fixture(scope="module")
def whole_run(images, pretrained, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    train(images, pretrained, output)
    return output


def test_a_run_writes_what_a_person_and_a_program_want(whole_run, pretrained):
    state = checkpoint(whole_run)
    assert (state["epoch"], state["step"], state["arch"]) == (3, STEPS, "resnet18")
    encoder = torch.load(pretrained, weights_only=True)["state_dict"]
    for name, value in state["state_dict"].items():
        if ".fc." not in name:  # frozen, the batch statistics included
            assert torch.equal(value, encoder[name.replace("module.", "module.encoder_q.")]), name
    assert state["state_dict"]["module.fc.weight"].shape == (2, 512)
    assert list(whole_run.glob("events.out.tfevents.*"))
    assert values(whole_run, "lr")[::3] == pytest.approx([0.1, 0.1, 0.01])
    accuracies = values(whole_run, "val_acc1")
    assert len(accuracies) == 3
    assert state["best_acc1"] == max(accuracies)
    best = checkpoint(whole_run, BEST)
    assert best["epoch"] == 1 + accuracies.index(max(accuracies))


@pytest.mark.usefixtures("one_thread")
def test_the_probe_reaches_the_optimum_of_logistic_regression(images, pretrained, tmp_path):
    """To 1e-4 of the objective and 1 % in every logit; scikit-learn's penalty is 1 / (C M).

    Our weight decay, as SGD's, holds for the bias as well: a column of ones, no intercept.
    """
    decay, x, y = 0.1, *slow_features(pretrained, images / "train")
    flags = "--cache-features -b 50 --epochs 1500 --schedule --lr 0.03 --eval-every 1500 -p 500"
    train(images, pretrained, tmp_path, *flags.split(), "--wd", str(decay))
    state = checkpoint(tmp_path)["state_dict"]
    weight, bias = (state[f"module.fc.{name}"].double().numpy() for name in ("weight", "bias"))

    ones = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    # Of two classes scikit-learn learns one vector w, ours are w / 2 and -w / 2: half the penalty.
    optimum = LogisticRegression(
        C=2 / (decay * len(x)), fit_intercept=False, tol=1e-8, max_iter=9999
    )
    expected = ones @ optimum.fit(ones, y).coef_[0]
    ours = x @ (weight[1] - weight[0]) + bias[1] - bias[0]

    def objective(margins, squares):
        return np.log1p(np.exp(-np.where(y, margins, -margins))).mean() + decay / 2 * squares

    reached = objective(ours, (weight**2).sum() + (bias**2).sum())
    best = objective(expected, (optimum.coef_**2).sum() / 2)
    assert reached == pytest.approx(best, rel=1e-4)
    assert best < 0.9 * np.log(2)  # there is something to learn
    np.testing.assert_allclose(ours, expected, atol=0.01 * np.abs(expected).max())


@pytest.mark.parametrize("cache", [(), ("--cache-features",)], ids=["crops", "cached"])
def test_two_processes_train_as_one_does(images, pretrained, tmp_path, cache):
    two = command(images, pretrained, tmp_path / "two", "-j", "2", *cache)
    done = run_as_torchrun(*IN_FLOAT64, *two)
    assert done.returncode == 0, done.stdout
    with in_float64():
        train(images, pretrained, tmp_path / "one", *cache)
    one, two = (checkpoint(tmp_path / name)["state_dict"] for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        assert_equal_but_for_rounding(two[name], one[name], name)
    for name in ("loss", "acc1", "val_loss", "val_acc1"):
        one, two = (values(tmp_path / output, name) for output in ("one", "two"))
        np.testing.assert_allclose(two, one, rtol=ROUNDING)


@pytest.mark.usefixtures("one_thread")  # as the command's process has: the same sums
@pytest.mark.parametrize(
    ("cache", "by", "code"),
    [
        ((), signal.SIGKILL, -signal.SIGKILL),
        ((), signal.SIGTERM, EXIT_INTERRUPTED),
        (("--cache-features",), signal.SIGKILL, -signal.SIGKILL),
    ],
    ids=["crops", "sigterm", "cached"],
)
def test_a_stopped_run_resumes_to_the_same_bits(images, narrow, tmp_path, cache, by, code):
    flags = ("-a", NARROW, "--save-steps", "2", "--epochs", "6", *cache)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(images, narrow, whole, *flags)
    with Command(*command(images, narrow, killed, *flags)) as process:
        steps = (line for line in process.stdout if "loss" in line)
        assert len(list(itertools.islice(steps, 3))) == 3
        os.kill(process.pid, by)
        process.stdout.read()
        assert process.wait() == code
    assert checkpoint(killed)["step"] >= 2
    train(images, narrow, killed, *flags, "--resume", "auto")
    for name in (LAST, BEST):
        one, two = checkpoint(whole, name), checkpoint(killed, name)
        momentum = [state["optimizer"]["state"][0]["momentum_buffer"] for state in (one, two)]
        assert torch.equal(*momentum)
        for key in one["state_dict"]:
            assert torch.equal(one["state_dict"][key], two["state_dict"][key]), (name, key)
        assert (one["step"], one["best_acc1"]) == (two["step"], two["best_acc1"])
    assert values(killed, "loss") == values(whole, "loss")
    assert values(killed, "val_acc1") == values(whole, "val_acc1")


def test_evaluation_alone_repeats_the_accuracy(images, whole_run, capsys):
    log = (whole_run / "metrics.jsonl").read_text()
    best = str(whole_run / BEST)
    argv = [str(images), *FLAGS, "--output", str(whole_run), "-e", "--resume", best]
    classify(parse_linear(argv), CPU)
    assert f"val top-1 {max(values(whole_run, 'val_acc1')):.2f} %" in capsys.readouterr().out
    assert (whole_run / "metrics.jsonl").read_text() == log


def test_an_unreadable_image_is_left_out(images, pretrained, tmp_path, capsys):
    data = tmp_path / "data"
    for part in ("train", "val"):
        for label in "ab":
            (data / part / label).mkdir(parents=True)
            for path in (images / part / label).iterdir():
                (data / part / label / path.name).write_bytes(path.read_bytes())
    (data / "train" / "a" / "03.png").write_bytes(b"broken")
    flags = ("--epochs", "1", "-b", "50")
    train(data, pretrained, tmp_path / "output", *flags, "--max-unreadable", "0.02")
    printed = capsys.readouterr().out
    assert printed.count("03.png") == 1
    assert "warning: unreadable image, left out" in printed
    with pytest.raises(UserError, match="1 of 50 images are unreadable.*03.png"):
        train(data, pretrained, tmp_path / "output", *flags, "--overwrite")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-a", "resnet34"], "holds a resnet18, not a resnet34: pass -a resnet18"),
        (["--small-stem"], "does not fit: check -a resnet18 and --small-stem; .*conv1"),
        (["--pretrained", "absent"], "no checkpoint at absent"),
        (["--pretrained", ""], "pass --pretrained"),
        (["-b", "64"], "at most the 50 images"),
        (["-e"], "pass --resume"),
        (["--resume", "PRETRAINED"], "is no classifier of this data"),
        (["--lr", "nan"], "--lr nan: it takes numbers from 0"),
        (["--dataset", "pets"], "does not hold Oxford-IIIT Pets: Dataset not found"),
        (["--train-share", "0"], "--train-share must be above 0 and at most 1"),
        (["--train-share", "0.5", "--list", "a"], "pass one of them"),
        (["--list", "absent.txt"], r"cannot read absent\.txt"),
    ],
    ids=[
        "arch",
        "stem",
        "absent",
        "none",
        "batch",
        "evaluate",
        "resume",
        "nan",
        "dataset",
        "share",
        "list",
        "no list",
    ],
)
def test_bad_input_is_named(images, pretrained, tmp_path, flags, message):
    flags = [str(pretrained) if flag == "PRETRAINED" else flag for flag in flags]
    with pytest.raises(UserError, match=message):
        train(images, pretrained, tmp_path, *flags)


def test_a_run_of_another_backbone_is_not_resumed(images, whole_run, tmp_path):
    with pytest.raises(UserError, match="another backbone than --pretrained random"):
        train(images, "random", tmp_path, "--resume", str(whole_run / LAST))


def test_a_checkpoint_of_another_layout_is_read_and_of_none_is_refused(images, tmp_path, capsys):
    encoder = resnet18()
    torch.save({"state_dict": encoder.state_dict()}, tmp_path / "supervised.pth")
    train(images, tmp_path / "supervised.pth", tmp_path / "run", "--epochs", "1")
    assert "supervised.pth: torchvision state_dict, ResNet-18; 1 part" in capsys.readouterr().out
    trained = checkpoint(tmp_path / "run")["state_dict"]
    assert torch.equal(trained["module.conv1.weight"], encoder.conv1.weight)
    torch.save({"state_dict": {"blocks.0.attn.weight": torch.ones(1)}}, tmp_path / "vit.pth")
    with pytest.raises(UserError, match=r"vit\.pth: its names \(blocks\.0\.attn\.weight"):
        train(images, tmp_path / "vit.pth", tmp_path)


def test_a_missing_val_is_one_line_without_traceback(images, pretrained, tmp_path):
    done = python(*command(images / "train", pretrained, tmp_path))
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert "DATA needs train/CLASS and val/CLASS" in done.stderr


def test_a_data_set_of_torchvision_and_a_part_of_its_labels(narrow, tmp_path, monkeypatch, capsys):
    """The class names come with it; a share of its labels is drawn by the seed, a list is read."""
    write_cifar10(tmp_path, monkeypatch)
    flags = ["-a", NARROW, "-b", "1", "--epochs", "1", "--dataset", "cifar10", "--schedule"]
    train(tmp_path, narrow, tmp_path / "run", *flags, "--train-share", "0.5")
    assert checkpoint(tmp_path / "run")["classes"] == ["airplane", "cat"]
    out = capsys.readouterr().out
    assert "features of 2 images of test" in out
    assert "2 images of 2 classes, 2 steps an epoch" in out  # of two cats one, and the airplane
    (tmp_path / "list.txt").write_text("train/00001\n")
    again = [*flags, "--list", str(tmp_path / "list.txt")]
    train(tmp_path, narrow, tmp_path / "listed", *again)
    assert "1 images of 2 classes" in capsys.readouterr().out
    knn = ["--pretrained", str(narrow), "-a", NARROW, "--dataset", "cifar10", "-j", "0"]
    classify_by_neighbours(parse_knn([str(tmp_path), *knn, "-k", "3", "--image-size", "32"]), CPU)
    assert "kNN top-1 " in capsys.readouterr().out


def test_a_classifier_keeps_the_names_of_its_classes(images, narrow, tmp_path):
    """What is hidden is no class; a folder of other classes is refused, also in another order."""
    data, output = shutil.copytree(images, tmp_path / "data"), tmp_path / "output"
    for part in ("train", "val"):
        (data / part / ".ipynb_checkpoints").mkdir()
    flags = (*FLAGS, "-a", NARROW, "--output", str(output), "--pretrained", str(narrow))
    classify(parse_linear([str(data), *flags, "--epochs", "1"]), CPU)
    assert checkpoint(output)["classes"] == ["a", "b"]
    for part in ("train", "val"):
        (data / part / "b").rename(data / part / "c")
    done = python(
        "pretrain/linear.py", data, *flags, "--evaluate", "--resume", output / BEST
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "2 classes, DATA 2, and they are not the same: the checkpoint alone has b" in line
    for part in ("train", "val"):
        (data / part / "c").rename(data / part / "b")
    classify(parse_linear([str(data), *flags, "-e", "--resume", str(output / BEST)]), CPU)


def test_images_that_changed_since_the_checkpoint_are_refused(images, narrow, tmp_path):
    data, output = shutil.copytree(images, tmp_path / "data"), tmp_path / "output"
    flags = [*FLAGS, "-a", NARROW, "--output", str(output), "--pretrained", str(narrow)]
    classify(parse_linear([str(data), *flags, "--epochs", "1"]), CPU)
    (data / "train" / "a" / "00.png").rename(data / "train" / "b" / "99.png")
    resumed = [str(data), *flags, "--epochs", "2", "--resume", "auto"]
    with pytest.raises(UserError, match=r"images 50 hash .*, here images 50 .*--restart-epoch"):
        classify(parse_linear(resumed), CPU)
    classify(parse_linear([*resumed, "--restart-epoch"]), CPU)
    assert checkpoint(output)["epoch"] == 2
