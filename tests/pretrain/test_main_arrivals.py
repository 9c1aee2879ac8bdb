"""Every flag of pretraining arrives where it works: each is given a value of its own."""

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from moco_det.common.errors import UserError
from pretrain.engine.optimization import LARS
from pretrain.engine.trainer import RunSettings
from pretrain.flags.launch import loading, run_settings
from pretrain.flags.pretraining import parse_pretraining
from pretrain.moco.end_to_end import EndToEnd
from pretrain.moco.losses import NCE, InfoNCE
from pretrain.moco.memory_bank import MemoryBank
from pretrain.moco.momentum_contrast import MoCo
from pretrain.moco.nearest_neighbours import NearestNeighbourMoCo
from pretrain.run import build_model, build_source, build_task, check_backbone

CPU = torch.device("cpu")
FLAGS = ["-a", "resnet18w0.25x", "-b", "8", "-j", "0", "--moco-dim", "12", "--moco-k", "30",
         "--amp", "none"]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for part in ("train", "val"):
        (root / part / "a").mkdir(parents=True)
        for i in range(20):
            cv2.imwrite(str(root / part / "a" / f"{i}.png"), np.full((9, 9, 3), i, np.uint8))
    return root


@pytest.fixture
def parse(images):
    return lambda *flags: parse_pretraining([str(images), *FLAGS, *flags])


# -- model ----------------------------------------------------------------------------------------


def test_the_flags_of_momentum_contrast(parse):
    args = parse("--moco-m", "0.7", "--moco-t", "0.3", "--bn-groups", "4", "--no-shuffle-bn")
    model = build_model(args, samples=20)
    assert type(model) is MoCo
    assert (model.momentum, model.temperature) == (0.7, 0.3)
    assert model.queue.shape == (12, 30)
    assert (model.bn_groups, model.shuffle_bn) == (4, False)
    assert model.encoder_q.bn1.groups == model.encoder_k.bn1.groups == 4
    assert model.encoder_q.fc.out_features == 12
    assert build_model(parse(), samples=20).shuffle_bn is True


def test_the_flags_of_nearest_neighbours(parse, task_of):
    model = build_model(parse("--nearest-neighbours"), samples=20)
    assert type(model) is NearestNeighbourMoCo
    assert (model.neighbours, model.queue_backbone.shape) == (20, (128, 30))
    flags = ("--nearest-neighbours", "7", "--nn-weight", "0.2", "--nn-from-epoch", "5")
    task = task_of(*flags)
    assert (task.model.neighbours, task.auxiliary_weight) == (7, 0.2)
    assert task.auxiliary_from == 5 * 2  # epochs of 20 images in batches of 8
    off = build_model(parse("--nearest-neighbours", "--nearest-neighbours", "0"), samples=20)
    assert type(off) is MoCo


def test_the_flags_of_the_memory_bank(parse):
    flags = ("--bank-momentum", "0.2", "--moco-m", "0.7", "--moco-t", "0.3", "--bn-groups", "4")
    model = build_model(parse("--mechanism", "memory-bank", *flags), samples=20)
    assert type(model) is MemoryBank
    assert (model.momentum, model.temperature, model.negatives) == (0.2, 0.3, 30)
    assert model.bank.shape == (20, 12)
    assert (model.bn_groups, model.shuffle_bn) == (4, False)


@pytest.mark.parametrize("shuffled", [True, False])
def test_the_flags_of_end_to_end(parse, shuffled):
    flags = (
        "--moco-t",
        "0.3",
        "--bn-groups",
        "4",
        "--shuffle-bn" if shuffled else "--no-shuffle-bn",
    )
    model = build_model(parse("--mechanism", "end-to-end", *flags), samples=20)
    assert type(model) is EndToEnd
    assert (model.temperature, model.bn_groups, model.shuffle_bn) == (0.3, 4, shuffled)


def test_the_flags_of_the_encoder(parse):
    plain = build_model(parse(), samples=20).encoder_q
    assert (plain.conv1.kernel_size, plain.conv1.stride) == ((7, 7), (2, 2))
    assert isinstance(plain.maxpool, nn.MaxPool2d)
    other = build_model(parse("--mlp", "--small-stem"), samples=20).encoder_q
    assert (other.conv1.kernel_size, other.conv1.stride) == ((3, 3), (1, 1))
    assert isinstance(other.maxpool, nn.Identity)
    assert [type(layer) for layer in other.fc] == [nn.Linear, nn.ReLU, nn.Linear]
    assert other.fc[2].out_features == 12
    wide = build_model(parse("-a", "resnet18"), samples=20).encoder_q
    assert wide.conv1.out_channels == 4 * plain.conv1.out_channels


def test_a_backbone_is_tried_at_the_size_of_small_crops_too(parse):
    args = parse("--image-size", "32", "--multi-crop", "1", "--small-size", "16")
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8))
    with pytest.raises(UserError, match="does not take images of 2 x 3 x 16 x 16"):
        check_backbone(args, backbone, {})


# -- data -----------------------------------------------------------------------------------------


def test_the_flags_of_the_data(parse):
    flags = ("--image-size", "40", "--aug-plus", "--color-strength", "0.8")
    args = parse(*flags, "--max-unreadable", "0.3", "--crop-min", "0.4")
    source = build_source(args, CPU, seed=11)
    dataset = source.loader.dataset
    assert len(dataset.crops.augmentations) == 2
    for augmentation in dataset.crops.augmentations:
        assert (augmentation.size, augmentation.aug_plus) == (40, True)
        assert (augmentation.color_strength, augmentation.crop_min) == (0.8, 0.4)
    assert (dataset.seed, source.sampler.seed, source.sampler.batch_size) == (11, 11, 8)
    assert (source.samples, source.steps_per_epoch) == (20, 2)
    assert source.unreadable.tolerated == 0.3
    plain = build_source(parse("--mechanism", "memory-bank"), CPU, seed=11).loader.dataset
    assert [a.aug_plus for a in plain.crops.augmentations] == [False]


def test_a_list_is_trained_on_alone(parse, images, tmp_path):
    names = [f"{part}/a/{i}.png" for part in ("train", "val") for i in range(0, 20, 2)]
    (tmp_path / "list.txt").write_text("\n".join(names))
    source = build_source(parse("--list", str(tmp_path / "list.txt")), CPU, seed=11)
    dataset = source.loader.dataset
    assert [path.decode() for path in dataset.paths] == sorted(names)
    assert dataset[0, 3].unreadable == []
    assert source.describe() == f"20 images of {tmp_path}/list.txt"
    assert source.state() != build_source(parse(), CPU, seed=11).state()
    (tmp_path / "list.txt").write_text("\n".join(names[:7]))
    with pytest.raises(UserError, match=r"7 images of .*list.txt are fewer than the global batch"):
        build_source(parse("--list", str(tmp_path / "list.txt")), CPU, seed=11)
    with pytest.raises(UserError, match="--list is about image files"):
        parse_pretraining(["a.tar", "--list", "list.txt", "--iterations", "3"])


def test_the_flags_of_views(parse):
    flags = ("--multi-crop", "3", "--small-size", "20", "--small-scale", "0.1", "0.3")
    flags += ("--constrained", "0.4", "--min-iou", "0.1", "--max-iou", "0.6", "--aug-plus")
    args = parse("--image-size", "40", *flags, "--strong-aug", "mix", "--crop-min", "0.3")
    crops = build_source(args, CPU, seed=11).loader.dataset.crops
    assert (crops.share, crops.ious) == (0.4, (0.1, 0.6))
    query, key, *small = crops.augmentations
    assert len(small) == 3
    for view, size, area, strong in (
        (query, 40, (0.3, 1.0), 0.5),
        (key, 40, (0.3, 1.0), 0.0),
        *[(view, 20, (0.1, 0.3), 0.5) for view in small],
    ):
        assert (view.size, view.aug_plus, view.strong) == (size, True, strong)
        assert (view.crop_min, view.crop_max) == area
    crops = build_source(parse("--multi-crop", "1", "--constrained"), CPU, seed=11)
    assert crops.loader.dataset.crops.share == 0.1
    strong = build_source(parse("--strong-aug", "autoaugment"), CPU, seed=11)
    assert [view.strong for view in strong.loader.dataset.crops.augmentations] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("flags", "samples"),
    [(("--samples-per-epoch", "24"), 24), (("--iterations", "5"), 40)],
)
def test_the_flags_of_shards(tmp_path, flags, samples):
    for i in range(2):
        (tmp_path / f"{i}.tar").touch()
    argv = [f"{tmp_path}/{{0..1}}.tar", *FLAGS, *flags, "--shuffle-buffer", "17"]
    source = build_source(parse_pretraining(argv), CPU, seed=11)
    assert (source.samples, source.steps_per_epoch) == (samples, samples // 8)
    assert (source.layout["shuffle_buffer"], source.layout["seed"]) == (17, 11)


def test_workers_are_this_process_s_share(parse):
    found = loading(parse("-j", "3", "--max-unreadable", "0.2"), CPU, seed=4)
    assert (found.workers, found.seed, found.batch_size) == (3, 4, 8)
    assert (found.pin_memory, found.max_unreadable) == (False, 0.2)
    assert loading(parse(), torch.device("cuda"), seed=4).pin_memory is True


# -- training -------------------------------------------------------------------------------------


@pytest.fixture
def task_of(parse):
    """Function: flags -> the task that they ask for."""

    def make(*flags):
        args = parse(*flags)
        return build_task(args, build_model(args, 20), build_source(args, CPU, 3), seed=3)

    return make


def test_the_flags_of_the_optimizer(task_of):
    task = task_of("--lr", "0.7", "--momentum", "0.6", "--wd", "0.003", "--schedule", "3", "5")
    (group,) = task.optimizer.sgd.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.7, 0.6, 0.003)
    assert group["nesterov"] is False
    trained = {id(p) for p in group["params"] if p.requires_grad}
    assert trained == {id(p) for p in task.model.encoder_q.parameters()}
    rates = []
    for epoch in (0, 2, 3, 5):
        task.optimizer.set_rate(epoch, 0)
        rates.append(task.optimizer.rate)
    assert rates == pytest.approx([0.7, 0.7, 0.07, 0.007])


@pytest.mark.parametrize(
    ("flags", "at", "factor"),
    [
        (("--cos", "--epochs", "8"), (2, 999), 0.5 * (1 + 0.5**0.5)),
        (("--cos", "--iterations", "8"), (0, 2), 0.5 * (1 + 0.5**0.5)),
        (("--lr-decay-every", "4", "--lr-decay", "0.5"), (0, 9), 0.25),
        (
            (
                "--lr-decay-every",
                "4",
            ),
            (0, 9),
            0.81,
        ),
    ],
)
def test_the_flags_of_the_schedule(task_of, flags, at, factor):
    assert task_of(*flags).optimizer.schedule(*at) == pytest.approx(factor)


def test_the_flag_of_the_kind_of_optimizer(task_of):
    assert type(task_of("--optimizer", "lars").optimizer.sgd) is LARS
    assert type(task_of().optimizer.sgd) is torch.optim.SGD


@pytest.mark.parametrize(
    ("flag", "dtype", "scaled"),
    [("none", None, False), ("bf16", torch.bfloat16, False), ("fp16", torch.float16, True)],
)
def test_the_flag_of_mixed_precision(task_of, flag, dtype, scaled):
    task = task_of("--amp", flag)
    assert task.dtype is dtype
    assert task.optimizer.scaler.is_enabled() is scaled


def test_the_flags_of_what_is_kept_and_watched(task_of, images):
    task = task_of("--keep", "5", "--save-every", "4", "--knn-every", "3", "--image-size", "40")
    assert (task.keep, task.save_every, task.knn_every, task.seed) == (5, 4, 3, 3)
    monitor = task.monitor.__self__
    assert (monitor.data, monitor.image_size, monitor.workers) == (images, 40, 0)
    assert (monitor.k, monitor.temperature) == (200, 0.07)
    assert task_of("--knn-every", "0").monitor is None


def test_the_flags_of_the_loss(task_of):
    assert type(task_of().loss) is InfoNCE
    assert type(task_of("--loss", "nce").loss) is NCE


@pytest.mark.parametrize(
    ("flags", "trackers"),
    [((), ("tensorboard",)), (("wandb", "mlflow"), ("wandb", "mlflow")), (("none",), ())],
)
def test_the_flag_of_what_shows_a_run(images, flags, trackers):
    argv = [*FLAGS, *(["--log", *flags] if flags else []), "--", str(images)]
    assert run_settings(parse_pretraining(argv), seed=5).trackers == trackers


def test_the_flags_of_the_run(parse, tmp_path):
    flags = ("--epochs", "9", "--start-epoch", "2", "-p", "3", "--save-steps", "6")
    args = parse(*flags, "--output", str(tmp_path))
    found = run_settings(args, seed=5)
    assert found == RunSettings(
        output=tmp_path,
        arch="resnet18w0.25x",
        config=vars(args) | {"seed": 5},
        batch_size=8,
        epochs=9,
        start_epoch=2,
        print_freq=3,
        save_steps=6,
    )
