"""Ablations as data: what a file becomes, what is refused, and the files of the repository."""

import json
from pathlib import Path

import pytest
import yaml

from moco_det.benchmark.jobs.ablation import Row, Run, read_ablation
from moco_det.common.errors import UserError
from pretrain import knn, linear, main

REPOSITORY = Path(__file__).resolve().parents[4]
FILES = sorted((REPOSITORY / "configs" / "ablations").glob("*.yaml"))
DATA = Path("DATA")


def ablation(folder, **content):
    path = folder / "ablation.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return read_ablation(path)


def runs(path, seed=0):
    """One run of each row."""
    content = read_ablation(path)
    return [Run(row, seed, Path("OUT"), content, path, DATA) for row in content.rows]


def test_a_grid_is_a_row_for_each_combination(tmp_path):
    content = ablation(
        tmp_path,
        base={"arch": "resnet18", "schedule": [3, 4]},
        grid={"moco_m": [0, 0.9], "shuffle_bn": [True, False]},
        seeds=5,
    )
    base = ["--arch", "resnet18", "--schedule", "3", "4"]
    assert content.rows == [
        Row("--moco-m 0 --shuffle-bn", [*base, "--moco-m", "0", "--shuffle-bn"]),
        Row("--moco-m 0 --no-shuffle-bn", [*base, "--moco-m", "0", "--no-shuffle-bn"]),
        Row("--moco-m 0.9 --shuffle-bn", [*base, "--moco-m", "0.9", "--shuffle-bn"]),
        Row("--moco-m 0.9 --no-shuffle-bn", [*base, "--moco-m", "0.9", "--no-shuffle-bn"]),
    ]
    assert content.seeds == 5


def test_rows_are_what_they_say(tmp_path):
    content = ablation(tmp_path, rows=[{}, {"mlp": True}], untrained=True)
    assert [row.name for row in content.rows] == ["untrained", "(base)", "--mlp"]
    assert [row.trained for row in content.rows] == [False, True, True]
    assert content.seeds == 3


def test_a_run_is_three_commands_with_what_they_share(tmp_path):
    (tmp_path / "recipe.yaml").write_text("arch: resnet34\nimage_size: 48\nsmall_stem: true\n")
    path = tmp_path / "sub" / "a.yaml"
    path.parent.mkdir()
    path.write_text(
        "recipe: ../recipe.yaml\nbase: {image_size: 40}\nrows: [{moco_k: 64}]\n"
        "knn: {neighbours: 5}\nlinear: {lr: 0.1, cache_features: true}\n"
    )
    content = read_ablation(path)
    run = Run(content.rows[0], 7, tmp_path / "out", content, path, DATA, workers=2)
    commands = run.commands()
    assert [Path(c[0]).name for c in commands.values()] == ["main.py", "knn.py", "linear.py"]
    assert all(Path(command[0]).is_file() for command in commands.values())
    pretrain = main.parse(commands["pretrain"][1:])
    assert (pretrain.arch, pretrain.image_size, pretrain.moco_k) == ("resnet34", 40, 64)
    assert (pretrain.seed, pretrain.resume, pretrain.workers) == (7, "auto", 2)
    checkpoint = str(tmp_path / "out" / "checkpoint_last.pth.tar")
    for args in (knn.parse(commands["knn"][1:]), linear.parse(commands["linear"][1:])):
        assert (args.pretrained, args.arch, args.image_size) == (checkpoint, "resnet34", 40)
        assert args.small_stem
        assert (args.seed, args.workers, args.data) == (7, 2, "DATA")
    assert knn.parse(commands["knn"][1:]).k == 5
    probe = linear.parse(commands["linear"][1:])
    assert (probe.lr, probe.cache_features, probe.resume) == (0.1, True, "auto")
    assert linear.parse(commands["linear"][1:]).output == str(tmp_path / "out" / "linear")


def test_an_untrained_encoder_is_evaluated_only(tmp_path):
    content = ablation(tmp_path, rows=[{}], untrained=True)
    run = Run(content.rows[0], 1, tmp_path, content, tmp_path, DATA)
    assert list(run.commands()) == ["knn", "linear"]
    assert knn.parse(run.commands()["knn"][1:]).pretrained == "random"


def test_measures_are_read_from_what_the_commands_leave(tmp_path):
    content = ablation(tmp_path, rows=[{}])
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 5.0, "acc1": 1.0}\n{"step": 9, "loss": 4.0, "acc1": 30.0}\n'
        '{"step": 9, "knn_top1": 12.0}\n'
    )
    (tmp_path / "knn.json").write_text('{"knn_top1": 34.5}')
    (tmp_path / "linear").mkdir()
    (tmp_path / "linear" / "metrics.jsonl").write_text(
        '{"step": 1, "val_acc1": 50.0}\n{"step": 2, "val_acc1": 40.0}\n{"step": 2, "loss": 1.0}\n'
    )
    run = Run(content.rows[0], 0, tmp_path, content, tmp_path, DATA)
    assert run.measures() == {
        "pretext loss": 4.0,
        "pretext top-1": 30.0,
        "kNN top-1": 34.5,
        "linear top-1": 40.0,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rows": [{}], "seed": 3}, "unknown key 'seed' in .*; did you mean seeds"),
        ({"rows": [{"moco_kk": 3}]}, "unknown key 'moco_kk' in .*; did you mean moco-k"),
        ({"rows": [{}], "base": {"epoch": 3}}, "'epoch' in 'base' of .*; did you mean epochs"),
        (
            {"rows": [{}], "knn": {"neighbors": 3}},
            "'neighbors' in 'knn' of .*; did you mean neighbours",
        ),
        ({"rows": [{}], "linear": {"lrr": 3}}, "unknown key 'lrr' in 'linear' of .*mean lr"),
        ({"rows": [{}], "grid": {"mlp": [True]}}, "needs one of 'grid' .* and 'rows'"),
        ({"base": {"mlp": True}}, "needs one of 'grid' .* and 'rows'"),
        ({"grid": {"moco_m": 0.9}}, "'moco_m' in 'grid' of .* must be a list"),
        ({"rows": {"mlp": True}}, "'rows' of .* must be a list"),
        ({"rows": [{}, {}]}, r"has two rows '\(base\)'"),
        ({"rows": [{}], "seeds": 0}, "'seeds' in .* must be a number of at least 1, not 0"),
        ({"rows": [{}], "base": ["mlp"]}, "'base' of .* must map flags to values"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        ablation(tmp_path, **content)


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([{"moco_m": 1}], {}, r"row '--moco-m 1' of .*: --moco-m must be in \[0, 1\)"),
        ([{"lr": "fast"}], {}, "row '--lr fast' of .*: argument --lr.*invalid float"),
        ([{}], {"knn": {"neighbours": 0}}, "row '.base.' of .*: --neighbours and --image-size"),
        ([{}], {"linear": {"epochs": 0}}, "row '.base.' of .*: --epochs must be at least 1"),
    ],
)
def test_a_flag_that_its_command_refuses_is_named_with_the_row(tmp_path, rows, more, message):
    content = ablation(tmp_path, rows=rows, **more)
    run = Run(content.rows[0], 0, tmp_path, content, tmp_path / "ablation.yaml", DATA)
    with pytest.raises(UserError, match=message):
        run.commands()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot read ablation .*absent.yaml: No such file"):
        read_ablation(tmp_path / "absent.yaml")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_commands_accept_the_flags_of_the_repository_s_files(path):
    for run in runs(path):
        assert run.commands()
        assert json.loads(json.dumps(run.settings())) == run.settings()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_headers_say_how_long_it_takes_and_what_to_expect(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for field in ("Command:", "Time:", "Expected:"):
        assert any(line.startswith(f"# {field}") for line in header), field
    command = next(line for line in header if line.startswith("# Command:"))
    assert f"tools/ablate.py configs/ablations/{path.name} --data" in command


def varied(name: str, flag: str) -> list:
    """The values of `flag` over the trained rows of an ablation of the repository."""
    path = REPOSITORY / "configs" / "ablations" / name
    commands = [run.commands()["pretrain"] for run in runs(path) if run.row.trained]
    return [getattr(main.parse(command[1:]), flag) for command in commands]


def test_the_ablations_vary_what_the_paper_varies():
    """Section 4.1, appendix A.9; MoCo v2's Table 1 and its search for tau."""
    for name in ("mechanisms.yaml", "imagenet_mechanisms.yaml"):
        pairs = set(zip(varied(name, "mechanism"), varied(name, "shuffle_bn"), strict=True))
        assert pairs >= {
            ("moco", True), ("moco", False), ("end-to-end", True), ("end-to-end", False),
            ("memory-bank", True),
        }  # fmt: skip
    assert varied("momentum.yaml", "moco_m") == [0, 0.9, 0.99, 0.999]
    assert varied("imagenet_momentum.yaml", "moco_m") == [0, 0.9, 0.99, 0.999, 0.9999]
    assert set(varied("imagenet_momentum.yaml", "moco_k")) == {4096}
    assert varied("imagenet_temperature.yaml", "moco_t") == [0.07, 0.1, 0.2, 0.3, 0.4, 0.5] * 2
    assert varied("imagenet_temperature.yaml", "mlp") == [False] * 6 + [True] * 6
    switches = [varied("imagenet_v2.yaml", flag) for flag in ("mlp", "aug_plus", "cos")]
    assert list(zip(*switches, strict=True)) == [
        (False, False, False), (True, False, False), (False, True, False), (True, True, False),
        (True, True, True), (True, True, True),
    ]  # fmt: skip
    assert varied("imagenet_v2.yaml", "epochs") == [200] * 5 + [800]
