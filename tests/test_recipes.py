"""The recipes of configs/pretrain, configs/finetune and configs/linear, value by value.

`PAPERS` has every flag that decides what a run computes, as the papers give it; a recipe's flags
and the commands' defaults together must come to exactly these. The papers' numbers are read from
experiments.yaml too, where that lies beside the repository.
"""

import math

import cv2
import numpy as np
import pytest
import torch
import yaml
from paths import CONFIGS, EXPERIMENTS

from pretrain.flags.evaluation import parse_linear
from pretrain.flags.pretraining import parse_pretraining
from pretrain.run import train

# Sections 3 and 4 of MoCo v1, the official code for what they leave open. They have float32, "auto"
# takes bf16 on GPUs.
V1 = {
    "arch": "resnet50", "image_size": 224, "small_stem": False, "batch_size": 256,
    "epochs": 200, "start_epoch": 0, "iterations": None, "samples_per_epoch": None,
    "lr": 0.03, "schedule": [120, 160], "cos": False, "lr_decay": 0.9, "lr_decay_every": None,
    "momentum": 0.9, "weight_decay": 1e-4, "amp": "auto",
    "mechanism": "moco", "loss": "infonce", "shuffle_bn": True, "bn_groups": None,
    "moco_dim": 128, "moco_k": 65536, "moco_m": 0.999, "moco_t": 0.07, "bank_momentum": 0.5,
    "mlp": False, "aug_plus": False, "color_strength": 0.5, "crop_min": 0.2,
    "optimizer": "sgd", "warmup_epochs": 0,
    "nearest_neighbours": 0, "nn_weight": 0.4, "nn_from_epoch": 0,
    "multi_crop": 0, "small_size": 96, "small_scale": [0.05, 0.14], "constrained": 0.0,
    "strong_aug": "none", "min_iou": 0.0, "max_iou": 1.0,
}  # fmt: skip
V2 = V1 | {"cos": True, "mlp": True, "aug_plus": True, "moco_t": 0.2}
# Sections 2.2, 2.3 and A of SimCLR; the loss and the BN are MoCo's.
SIMCLR = V2 | {
    "mechanism": "end-to-end", "optimizer": "lars", "lr": 0.3, "warmup_epochs": 10,
    "weight_decay": 1e-6, "moco_t": 0.1, "color_strength": 1.0, "crop_min": 0.08,
}  # fmt: skip
# Section 4 of "Revisiting Contrastive Methods", and its public code.
REVISITING_MOCO = V2 | {"lr": 0.3}
REVISITING_MULTICROP = REVISITING_MOCO | {"image_size": 160, "multi_crop": 4}
REVISITING = REVISITING_MULTICROP | {
    "constrained": 0.1, "moco_m": 0.995, "strong_aug": "mix", "nearest_neighbours": 20,
}  # fmt: skip
IG1B = V1 | {
    "batch_size": 1024, "iterations": 1250000, "lr": 0.12, "lr_decay": 0.9,
    "lr_decay_every": 62500,
}  # fmt: skip
# A.6 and A.7: the learning rates are the papers', the rest is "the typical ResNet implementation".
FINETUNING = {
    "arch": "resnet50", "image_size": 224, "small_stem": False, "batch_size": 256, "epochs": 100,
    "start_epoch": 0, "lr": 0.03, "schedule": [70, 90], "momentum": 0.9, "weight_decay": 1e-4,
    "amp": "auto", "finetune": True, "bn_groups": None, "cache_features": False,
    "dataset": "folders", "train_share": None,
}  # fmt: skip
LINEAR = FINETUNING | {"lr": 30.0, "schedule": [60, 80], "weight_decay": 0.0, "finetune": False}

# Not the paper's, which gives none: MoCo's of ImageNet.
TRANSFER = {
    f"linear/{name}_r50": LINEAR | {"dataset": name}
    for name in ("cifar10", "cars", "food101", "pets", "places365", "sun397")
}
TRANSFER["linear/places365_r50"] |= {"epochs": 14, "schedule": [8, 11]}

PAPERS = {
    "pretrain/moco_v1_r50": V1,
    "pretrain/moco_v2_r50": V2,
    "pretrain/moco_v1_r50_ig1b": IG1B,
    "pretrain/simclr_r50": SIMCLR,
    "pretrain/revisiting_moco_r50": REVISITING_MOCO,
    "pretrain/revisiting_multicrop_r50": REVISITING_MULTICROP,
    "pretrain/revisiting_r50": REVISITING,
    "finetune/imagenet_r50": FINETUNING,
    "finetune/inaturalist2018_r50": FINETUNING | {"lr": 0.025},
}

# Small runs of our own: where they differ from MoCo v2.
SMALL = {
    "pretrain/bccd_r18": {
        "arch": "resnet18", "image_size": 64, "batch_size": 32, "epochs": 60, "lr": 0.004,
        "moco_k": 64, "moco_m": 0.99, "moco_t": 0.1,
    },
    "pretrain/cifar10_mini_r18": {
        "arch": "resnet18", "image_size": 32, "batch_size": 128, "epochs": 10,
        "moco_k": 256, "moco_m": 0.99, "moco_t": 0.1,
    },
    "pretrain/cifar10_mini_r18w0.25x": {
        "arch": "resnet18w0.25x", "image_size": 32, "batch_size": 64, "bn_groups": 4, "epochs": 4,
        "moco_dim": 64, "moco_k": 64, "moco_m": 0.99, "moco_t": 0.1,
    },
    "pretrain/quickstart_r18": {
        "arch": "resnet18", "image_size": 32, "batch_size": 64, "epochs": 10, "lr": 0.015,
        "moco_k": 128, "moco_m": 0.99, "moco_t": 0.1,
    },
    "pretrain/reproduce_quick_r50": {
        "arch": "resnet50w0.25x", "image_size": 32, "batch_size": 64, "epochs": 15, "lr": 0.015,
        "moco_k": 128, "moco_m": 0.99, "moco_t": 0.1,
    },
}  # fmt: skip
EXPECTED = PAPERS | TRANSFER | {name: V2 | changes for name, changes in SMALL.items()}

# Flags of where a run reads and writes and of how fast it is, which its numbers do not depend on.
NO_NUMBER = {
    "data", "recipe", "output", "resume", "workers", "print_freq", "save_steps", "max_unreadable",
    "seed", "deterministic", "compile", "list",
    "world_size", "rank", "dist_url", "dist_backend", "gpu", "multiprocessing_distributed",
    "overwrite", "restart_epoch", "max_image_pixels", "augment_on", "knn_bank",
    "keep", "save_every", "knn_every", "eval_every", "shuffle_buffer", "pretrained", "evaluate",
    "download", "log",
}  # fmt: skip


def recipes() -> set[str]:
    return {
        f"{folder}/{path.stem}"
        for folder in ("pretrain", "finetune", "linear")
        for path in (CONFIGS / folder).glob("*.yaml")
    }


def effective(name: str) -> dict:
    """Every flag that decides on numbers, of a command run with the recipe alone."""
    parse = parse_pretraining if name.startswith("pretrain/") else parse_linear
    args = parse(["DATA", "--recipe", str(CONFIGS / f"{name}.yaml")])
    return {flag: value for flag, value in vars(args).items() if flag not in NO_NUMBER}


def test_every_recipe_is_held_to_its_values():
    assert recipes() == EXPECTED.keys()


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_recipe_comes_to_these_values(name):
    assert effective(name) == EXPECTED[name]


def test_the_commands_alone_are_the_papers_v1_and_linear_protocol():
    def values(args):
        return {flag: value for flag, value in vars(args).items() if flag not in NO_NUMBER}

    assert values(parse_pretraining(["DATA"])) == V1
    assert values(parse_linear(["DATA"])) == LINEAR


@pytest.fixture(scope="module")
def published():
    if not EXPERIMENTS.is_file():
        pytest.skip(f"{EXPERIMENTS} is absent")
    return yaml.safe_load(EXPERIMENTS.read_text())


# Names in experiments.yaml -> flags.
PUBLISHED = {
    "arch": "arch", "batch": "batch_size", "lr": "lr", "epochs": "epochs", "K": "moco_k",
    "lr_steps": "schedule", "sgd_momentum": "momentum", "weight_decay": "weight_decay",
    "m": "moco_m", "tau": "moco_t", "dim": "moco_dim", "crop": "image_size",
    "aug_plus": "aug_plus", "iterations": "iterations", "lr_decay": "lr_decay",
    "decay_every_iterations": "lr_decay_every",
}  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "entries"),
    [
        ("moco_v1_r50", ["moco_v1_in1m"]),
        ("moco_v2_r50", ["moco_v1_in1m", "moco_v2_in1m_200"]),
        ("moco_v1_r50_ig1b", ["moco_v1_in1m", "moco_v1_ig1b"]),
    ],
)
def test_pretraining_is_as_published(published, recipe, entries):
    """Later entries build on earlier ones."""
    values = {}
    for entry in entries:
        values |= published["pretrain"][entry]
    found = effective(f"pretrain/{recipe}")
    compared = {name: values[name] for name in PUBLISHED if name in values}
    assert len(compared) >= 12
    assert {name: found[PUBLISHED[name]] for name in compared} == compared
    assert found["mlp"] == ("mlp" in values["head"])
    assert found["cos"] == (values.get("schedule") == "cosine")


def test_revisiting_is_as_published(published):
    """Its entry has the baseline; what was added, in the other two; the code's settings."""
    entry, protocol = published["pretrain"]["rc_coco"], published["revisiting"]["protocol"]
    moco, crops, whole = (
        effective(f"pretrain/revisiting_{name}r50") for name in ("moco_", "multicrop_", "")
    )
    for found in (moco, crops, whole):
        for name in ("arch", "batch", "lr", "tau"):
            assert found[PUBLISHED[name]] == entry[name]
        assert found["epochs"] == entry["epochs"][0]
        assert found["cos"] and found["mlp"]
    assert (moco["moco_m"], whole["moco_m"]) == (entry["m"], entry["m_with_multicrop"])
    large, small = entry["crops"]["large"], entry["crops"]["small"]
    for found in (crops, whole):
        assert (found["image_size"], found["crop_min"]) == (large["px"], large["area"][0])
        assert (found["multi_crop"], found["small_size"]) == (small["n"], small["px"])
        assert found["small_scale"] == small["area"]
    neighbours = protocol["nearest_neighbours"]
    assert (whole["nearest_neighbours"], whole["nn_weight"]) == (
        neighbours["k"], neighbours["weight"],
    )  # fmt: skip


# What the first lines of such a run say of its method.
SAID = {
    "moco_r50": "",
    "multicrop_r50": ", 4 small crops of 12 px",
    "r50": ", 4 small crops of 12 px, at least 10% of each within the key's, positives "
    "augmented also by AutoAugment, 20 nearest neighbours of weight 0.4",
}


@pytest.mark.parametrize("name", SAID)
def test_a_recipe_of_revisiting_takes_a_step(name, tmp_path, capsys):
    """At a size for a second: a narrow encoder on images of 24 and 12 pixels."""
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (40, 40, 3), np.uint8)
        cv2.imwrite(str(tmp_path / f"{number}.png"), noise)
    recipe = str(CONFIGS / f"pretrain/revisiting_{name}.yaml")
    argv = [str(tmp_path), "--recipe", recipe, "--output", str(tmp_path / "run")]
    argv += ["-a", "resnet18w0.25x", "-b", "4", "--image-size", "24", "--small-size", "12"]
    argv += ["--moco-k", "24", "--iterations", "1", "--seed", "0", "-j", "0"]
    done = train(parse_pretraining(argv), torch.device("cpu"))
    assert 0 < done.metrics["loss"] < 10 * math.log(25)
    assert ("loss_nn" in done.metrics) == (name == "r50")
    printed = capsys.readouterr().out
    assert "epoch 1/1 [1/1]  loss" in printed
    assert f"moco, infonce, with shuffled BN{SAID[name]}\n" in printed


def test_the_linear_protocol_is_as_published(published):
    protocol = published["linear_protocol"]
    args = parse_linear(["DATA"])
    names = {"lr": "lr", "weight_decay": "weight_decay", "epochs": "epochs", "batch": "batch_size"}
    assert {name: getattr(args, flag) for name, flag in names.items()} == {
        name: protocol[name] for name in names
    }
