"""Flags, recipes and their checks, without running anything."""

import argparse

import pytest
import torch

from moco_det.common.errors import UserError
from pretrain.flags.common import RANGES, as_flags
from pretrain.flags.dense import davis_parser, segment_retrieval_parser
from pretrain.flags.evaluation import (
    knn_parser,
    linear_parser,
    parse_knn,
    parse_linear,
    voc_svm_parser,
)
from pretrain.flags.launch import launch, loading, run_settings
from pretrain.flags.pretraining import parse_keywords, parse_pretraining, pretraining_parser


def test_a_flag_beside_a_recipe_wins(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("arch: resnet18\nbatch_size: 64\nlr: 0.06\nmlp: true\nschedule: [1, 2]\n")
    args = parse_pretraining(["DATA", "--recipe", str(recipe), "-b", "32", "--no-mlp"])
    assert (args.arch, args.batch_size, args.lr, args.mlp) == ("resnet18", 32, 0.06, False)
    assert args.schedule == [1, 2]


def test_an_unknown_recipe_key_names_the_nearest(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("moco_kk: 64\n")
    with pytest.raises(UserError, match="unknown key 'moco_kk'.*did you mean moco-k"):
        parse_pretraining(["DATA", "--recipe", str(recipe)])


def test_the_recipes_of_the_repository_parse(repository):
    recipes = sorted((repository / "configs" / "pretrain").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        parse_pretraining(["DATA", "--recipe", str(recipe)])


def test_the_published_commands_parse():
    v1 = (
        "-a resnet50 --lr 0.03 --batch-size 256 --dist-url tcp://localhost:10001 "
        "--multiprocessing-distributed --world-size 1 --rank 0 DATA"
    )
    args = parse_pretraining(v1.split())
    assert (args.arch, args.lr, args.batch_size, args.schedule) == (
        "resnet50",
        0.03,
        256,
        [120, 160],
    )
    assert (args.moco_k, args.moco_m, args.moco_t, args.moco_dim) == (65536, 0.999, 0.07, 128)
    v2 = parse_pretraining((v1 + " --mlp --moco-t 0.2 --aug-plus --cos").split())
    assert v2.mlp
    assert v2.aug_plus
    assert v2.cos
    assert v2.moco_t == 0.2


def test_two_schedules_are_refused():
    with pytest.raises(UserError, match="--cos and --lr-decay-every are two schedules"):
        parse_pretraining(["DATA", "--cos", "--lr-decay-every", "10"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--constrained", "--constrained is about small crops: pass --multi-crop N as well"),
        ("--multi-crop 4 --constrained 1.5", "--constrained 1.5: it takes numbers from 0 to 1"),
        ("--multi-crop -1", "--multi-crop -1: it takes numbers from 0 to 100"),
        ("--multi-crop 4 --small-size 0", "--small-size must be at least 1"),
        ("--small-scale 0.2 0.1", "--small-scale 0.2 0.1: it takes the least and the largest"),
        ("--small-scale 0 0.1", "--small-scale 0 0.1: it takes"),
        ("--multi-crop 4 --mechanism memory-bank", "belongs to --mechanism moco"),
        ("--strong-aug mix --mechanism memory-bank", "has a single view of an image"),
        ("--max-iou 0.5 --mechanism memory-bank", "has a single view of an image"),
        ("--min-iou 0.6 --max-iou 0.5", "--min-iou 0.6 is above --max-iou 0.5"),
        ("--min-iou 1", "--min-iou 1: two random crops are never the same"),
        ("--max-iou 0.3 --crop-min 0.7", "--max-iou 0.3 cannot be met: .* an IoU of 0.4 at least"),
        ("--min-iou nan", "--min-iou nan: it takes numbers from 0 to 1"),
    ],
)
def test_views_that_cannot_be_drawn_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        parse_pretraining(["DATA", *words.split()])


def test_a_recipe_constrains_crops_and_a_flag_beside_it_sets_them_free(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    for text, share in (("true", 0.1), ("0.3", 0.3)):
        recipe.write_text(f"multi_crop: 4\nconstrained: {text}\nsmall_scale: [0.1, 0.2]\n")
        argv = ["DATA", "--recipe", str(recipe)]
        args = parse_pretraining(argv)
        assert (args.multi_crop, args.constrained, args.small_scale) == (4, share, [0.1, 0.2])
        assert parse_pretraining([*argv, "--constrained", "0"]).constrained == 0
    for given, share in ((True, 0.1), (0.3, 0.3), (None, 0.0)):
        assert parse_keywords("DATA", {"multi_crop": 4, "constrained": given}).constrained == share


def test_the_published_command_parses_and_the_defaults_are_the_papers():
    published = (
        "-a resnet50 --lr 30.0 --batch-size 256 --pretrained checkpoint_0199.pth.tar DATA "
        "--dist-url tcp://localhost:10001 --multiprocessing-distributed --world-size 1 --rank 0"
    )
    for argv in (published.split(), ["DATA"]):
        args = parse_linear(argv)
        assert (args.lr, args.weight_decay, args.momentum, args.epochs) == (30, 0, 0.9, 100)
        assert (args.schedule, args.batch_size, args.image_size) == ([60, 80], 256, 224)


def test_defaults_of_fine_tuning_are_the_papers_and_flags_win_over_recipes(repository):
    args = parse_linear(["DATA", "--finetune"])
    assert (args.lr, args.weight_decay, args.schedule, args.epochs) == (0.03, 1e-4, [70, 90], 100)
    assert args.output == "output/finetune"
    recipes = repository / "configs" / "finetune"
    for name, lr in (("imagenet_r50", 0.03), ("inaturalist2018_r50", 0.025)):
        args = parse_linear(["DATA", "--recipe", str(recipes / f"{name}.yaml")])
        assert args.finetune
        assert (args.arch, args.lr, args.batch_size) == ("resnet50", lr, 256)
        assert (args.weight_decay, args.schedule, args.epochs) == (1e-4, [70, 90], 100)
    assert (
        parse_linear(["DATA", "--recipe", str(recipes / f"{name}.yaml"), "--lr", "0.1"]).lr == 0.1
    )
    assert parse_linear(["DATA"]).lr == 30


@pytest.mark.parametrize(
    ("parser", "parse"),
    [
        (pretraining_parser, parse_pretraining),
        (linear_parser, parse_linear),
        (knn_parser, lambda argv: parse_knn([*argv, "--pretrained", "random"])),
    ],
    ids=["pretraining", "linear", "knn"],
)
def test_every_command_has_the_flags_of_the_launch_and_no_abbreviations(parser, parse, capsys):
    args = parse(["DATA", "--gpu", "3", "--world-size", "2", "--rank", "1"])
    assert (args.gpu, args.world_size, args.rank) == (3, 2, 1)
    assert parser().format_help()  # a stray % in a help text breaks it
    with pytest.raises(SystemExit):
        parse(["DATA", "--image", "32"])
    assert "unrecognized arguments: --image" in capsys.readouterr().err


def test_a_mapping_becomes_flags_that_argparse_reads_back():
    values = {"moco_k": 64, "mlp": True, "cos": False, "schedule": [3, 5], "batch-size": 8}
    parser = pretraining_parser()
    given = as_flags(values, parser, "here")
    assert given[:4] == ["--moco-k", "64", "--mlp", "--no-cos"]
    args = parser.parse_args(["DATA", *given])
    assert (args.moco_k, args.mlp, args.cos, args.batch_size) == (64, True, False, 8)
    assert args.schedule == [3, 5]
    with pytest.raises(UserError, match="unknown key 'recipe' in here"):  # recipes do not nest
        as_flags({"recipe": "other.yaml"}, parser, "here")


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1]", "must map keys to values"), ("a: [", "is not valid YAML"), (None, "No such file")],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    if content:
        path.write_text(content)
    with pytest.raises(UserError, match=f"recipe.yaml.*{message}"):
        parse_pretraining(["DATA", "--recipe", str(path)])


def test_settings_of_a_run_are_those_of_its_flags():
    args = parse_pretraining(["images", "-b", "32", "-j", "4", "--output", "out", "--epochs", "3"])
    settings = run_settings(args, seed=5)
    assert (str(settings.output), settings.batch_size, settings.epochs) == ("out", 32, 3)
    assert settings.config == vars(args) | {"seed": 5}
    batches = loading(args, torch.device("cpu"), seed=5)
    assert (batches.batch_size, batches.seed, batches.workers) == (32, 5, 4)
    assert not batches.pin_memory


def test_a_launch_passes_flags_and_device_and_ends_with_an_exit_code(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["command", "DATA"])
    ran = []

    def parse(argv):
        return argparse.Namespace(argv=argv, dist_url=None, gpu=None, world_size=-1, rank=-1,
                                  multiprocessing_distributed=False)  # fmt: skip

    def fail(args, device):
        ran.append((args.argv, device.type))
        raise UserError("nothing there")

    with pytest.raises(SystemExit) as ended:
        launch(fail, parse)
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: nothing there\n"
    assert ran == [(["DATA"], "cpu")]


@pytest.mark.parametrize(
    ("parse", "words"),
    [
        (parse_pretraining, "--lr nan"),
        (parse_pretraining, "--lr inf"),
        (parse_pretraining, "--lr=-0.5"),
        (parse_pretraining, "--wd=-1"),
        (parse_pretraining, "--momentum nan"),
        (parse_pretraining, "--moco-k 2147483648"),
        (parse_pretraining, "--iterations 1000000000000000000000000000000"),
        (parse_pretraining, "--workers 9223372036854775808"),
        (parse_pretraining, "--schedule 120 -5"),
        (parse_pretraining, "--max-unreadable nan"),
        (parse_linear, "--lr nan"),
        (parse_linear, "--eval-every 99999999"),
        (lambda argv: parse_knn([*argv, "--pretrained", "random"]), "--workers 4096"),
        (lambda argv: parse_knn([*argv, "--pretrained", "random"]), "-t inf"),
    ],
)
def test_a_number_out_of_its_range_is_refused_with_its_flag(parse, words):
    flag = {"--wd=-1": "--weight-decay", "-t inf": "--temperature"}.get(words, words.split()[0])
    with pytest.raises(UserError, match=f"^{flag.partition('=')[0]} .*: it takes .* to "):
        parse(["DATA", *words.split()])


def test_every_number_has_a_range():
    parsers = (pretraining_parser(), linear_parser(), knn_parser())
    parsers += (voc_svm_parser(), segment_retrieval_parser(), davis_parser())
    numbers = {a.dest for p in parsers for a in p._actions if a.type in (int, float)}
    assert numbers == RANGES.keys()


def test_a_recipe_s_number_is_refused_with_its_key(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    for text, message in (
        ("lr: .nan\n", "--lr nan"),
        ("weight_decay: -1.0\n", "--weight-decay -1.0"),
        ("moco_k: 2147483648\n", "--moco-k 2147483648"),
        ("lr: 2020-99-99\n", "lr: '2020-99-99' is a date"),
        (f"lr: 0o{'7' * 5000}\n", "lr in --recipe .*: no flag takes that"),
    ):
        recipe.write_text(text)
        with pytest.raises(UserError, match=message) as refused:
            parse_pretraining(["DATA", "--recipe", str(recipe)])
        assert len(str(refused.value)) < 300
