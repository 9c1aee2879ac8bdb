"""End-to-end fine-tuning as a user runs it."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
from float64 import ROUNDING, assert_equal_but_for_rounding, in_float64
from fork_server import run_in_two_processes
from pretraining_runs import checkpoint, values
from same_bits import assert_same_bits
from torchvision.models import resnet18

from moco_det.common.errors import UserError
from pretrain.evaluation.classification import (
    BEST,
    check_frozen,
    correct_within,
    frozen_state,
)
from pretrain.flags.evaluation import parse_linear
from pretrain.linear import classify

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
FLAGS = [
    "--finetune", "-a", "resnet18", "--image-size", "32", "-b", "16", "--epochs", "3", "-j", "0",
    "--seed", "7", "-p", "1", "--lr", "1e-3",
]  # fmt: skip


def run(images, pretrained, output, *flags) -> None:
    argv = [str(images), *FLAGS, "--pretrained", str(pretrained), "--output", str(output), *flags]
    classify(parse_linear(argv), CPU)


def train(images, pretrained, output, *flags) -> dict:
    run(images, pretrained, output, *flags)
    return checkpoint(output)


def query_encoder(pretrained) -> dict:
    state = torch.load(pretrained, weights_only=True)["state_dict"]
    return {name.replace("encoder_q.", ""): value for name, value in state.items()}


def test_gradients_reach_every_weight_and_decay_holds_for_all(images, pretrained, tmp_path):
    """The first step of SGD: w - lr v, where v is the gradient and the decay of w."""
    flags = ("--epochs", "1", "-b", "50", "--bn-groups", "1", "--wd", "0.01", "--lr", "0.1")
    state = train(images, pretrained, tmp_path, *flags)["state_dict"]
    start = query_encoder(pretrained)
    momenta = [s["momentum_buffer"] for s in checkpoint(tmp_path)["optimizer"]["state"].values()]
    names = [name for name, _ in resnet18(num_classes=2).named_parameters()]
    assert len(momenta) == len(names)
    for name, momentum in zip(names, momenta, strict=True):
        if name.startswith("fc."):
            continue
        before = start[f"module.{name}"]
        torch.testing.assert_close(state[f"module.{name}"], before - 0.1 * momentum, msg=name)
        assert (momentum - 0.01 * before).abs().max() > 1e-6, name
    statistics = "module.bn1.running_mean", "module.bn1.num_batches_tracked"
    assert not torch.equal(state[statistics[0]], start[statistics[0]])
    assert state[statistics[1]] == 1 + start[statistics[1]]


def test_a_handful_of_photographs_is_learnt_by_heart(shared_data, tmp_path):
    """Four classes of five images, evaluated on themselves."""
    for label in sorted((shared_data("cifar10_mini") / "train").iterdir())[:4]:
        for image in sorted(label.iterdir())[:5]:
            for part in ("train", "val"):
                target = tmp_path / part / label.name / image.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(image, target)
    flags = ["-b", "20", "--epochs", "150", "--schedule", "120", "--eval-every", "150"]
    flags += ["-a", "resnet18w0.25x", "--lr", "0.03", "-p", "50"]
    train(tmp_path, "random", tmp_path / "output", *flags)
    assert values(tmp_path / "output", "loss")[0] == pytest.approx(np.log(4), abs=1)
    assert values(tmp_path / "output", "val_acc1")[-1] > 94  # at most one of twenty is wrong


def run_two(rank: int, images, pretrained, folder) -> None:
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    with in_float64():
        run(images, pretrained, folder / "two", "--epochs", "1", "--bn-groups", "1")
    dist.destroy_process_group()


def test_two_processes_train_as_two_groups_do(images, pretrained, tmp_path):
    run_in_two_processes(run_two, images, pretrained, tmp_path)
    with in_float64():
        one = train(images, pretrained, tmp_path / "one", "--epochs", "1", "--bn-groups", "2")
    two = checkpoint(tmp_path / "two")
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        assert_equal_but_for_rounding(two["state_dict"][name], value, name)
    for name, state in one["optimizer"]["state"].items():  # sums of the gradients of all steps
        found = two["optimizer"]["state"][name]["momentum_buffer"]
        assert_equal_but_for_rounding(found, state["momentum_buffer"], name)
    for name in ("loss", "val_loss"):
        first, second = (values(tmp_path / output, name) for output in ("one", "two"))
        np.testing.assert_allclose(second, first, rtol=ROUNDING)


def test_a_stopped_run_resumes_to_the_same_bits(images, pretrained, tmp_path):
    """Stopped within the second epoch: what it saved there is all that the rest may depend on."""
    whole = train(images, pretrained, tmp_path / "whole", "--save-steps", "5")

    class Stop(Exception):
        pass

    def stop(state, path):
        torch.save(state, path)
        if state["step"] == 5:
            raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr("pretrain.engine.checkpoints.save", stop)
        train(images, pretrained, tmp_path / "stopped", "--save-steps", "5")
    flags = ("--save-steps", "5", "--resume", "auto")
    resumed = train(images, pretrained, tmp_path / "stopped", *flags)
    assert_same_bits(resumed, whole)
    for name in ("loss", "val_acc1"):
        assert values(tmp_path / "stopped", name) == values(tmp_path / "whole", name)


def test_evaluation_alone_repeats_the_accuracy(images, pretrained, tmp_path, capsys):
    train(images, pretrained, tmp_path)
    best = ["-e", "--resume", str(tmp_path / BEST), "--output", str(tmp_path)]
    classify(parse_linear([str(images), *FLAGS, *best]), CPU)
    printed = capsys.readouterr().out.splitlines()[-1]
    assert f"val top-1 {max(values(tmp_path, 'val_acc1')):.2f} %" in printed


def test_supervised_weights_are_torchvisions(images, tmp_path, monkeypatch):
    """From the folder that torchvision keeps its downloads in."""
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(4)
    weights = resnet18().state_dict()
    torch.save(weights, tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    state = train(images, "supervised", tmp_path / "output", "--lr", "0", "--epochs", "1")
    assert state["state_dict"]["module.fc.weight"].shape == (2, 512)
    for name, value in weights.items():
        if not (name.startswith("fc.") or "running" in name or "tracked" in name):
            assert torch.equal(state["state_dict"][f"module.{name}"], value), name


def test_the_lists_of_inaturalist_train_as_class_folders_do(images, tmp_path):
    """The same images in the same order under the official layout: the same run."""
    (tmp_path / "train_val2018").symlink_to(images)
    for part in ("train", "val"):
        paths = sorted(path.relative_to(images) for path in (images / part).rglob("*.png"))
        content = {
            "images": [{"id": i, "file_name": f"train_val2018/{p}"} for i, p in enumerate(paths)],
            "annotations": [
                {"image_id": i, "category_id": 10 + "ab".index(path.parent.name)}
                for i, path in enumerate(paths)
            ],
            "categories": [{"id": 10}, {"id": 11}],
        }
        (tmp_path / f"{part}2018.json").write_text(json.dumps(content))
    for data, output in ((images, "folders"), (tmp_path, "lists")):
        run(data, "random", tmp_path / output, "--epochs", "1", "-j", "1")
    for name in ("loss", "val_loss", "val_acc1"):
        assert values(tmp_path / "lists", name) == values(tmp_path / "folders", name)


def test_the_two_protocols_do_not_resume_each_other(images, pretrained, tmp_path):
    train(images, pretrained, tmp_path, "--epochs", "1", "--lr", "0")
    argv = [str(images), *FLAGS[1:], "--output", str(tmp_path), "--resume", "auto"]
    with pytest.raises(UserError, match="of another"):
        classify(parse_linear([*argv, "--pretrained", str(pretrained)]), CPU)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--finetune", "--cache-features"], "--cache-features belongs to a frozen backbone"),
        (["--bn-groups", "2"], "--bn-groups belongs to --finetune"),
        (["--pretrained", "supervised", "-a", "resnext50_32x8d"], "no supervised weights for -a"),
        (["--finetune", "-b", "16", "--bn-groups", "5"], "cannot be split into 5 BN groups"),
    ],
    ids=["cache", "groups", "weights", "split"],
)
def test_bad_input_is_named(images, pretrained, tmp_path, flags, message):
    argv = [str(images), "-a", "resnet18", "--image-size", "32", "-j", "0", "--output"]
    with pytest.raises(UserError, match=message):
        classify(parse_linear([*argv, str(tmp_path), "--pretrained", str(pretrained), *flags]), CPU)


def test_hits_among_the_first_and_the_first_five():
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4]])
    assert correct_within(logits, torch.tensor([0, 4, 5])).tolist() == [1, 2]
    assert correct_within(logits[:, :3], torch.tensor([0, 2, -1])).tolist() == [1, 2]


def test_a_backbone_that_changed_is_noticed():
    encoder = resnet18(num_classes=2)
    frozen = frozen_state(encoder)
    torch.nn.init.ones_(encoder.fc.weight)
    check_frozen(encoder, frozen)
    encoder.train()(torch.randn(2, 3, 32, 32))  # moves batch statistics only
    with pytest.raises(RuntimeError, match="bn1.running_mean"):
        check_frozen(encoder, frozen)
