"""A checkpoint's page: each of its numbers is that of a command's own run; finished ones stay."""

import json

import pytest
import torch
from noisy_colours import write_checkpoint
from pretraining_runs import values

from moco_det.common.errors import UserError
from pretrain import linear, summary
from pretrain.flags.evaluation import STAGES, parse_knn, parse_linear, parse_summary
from pretrain.knn import classify as knn
from pretrain.summary import TRAININGS, summarize

CPU, ARCH = torch.device("cpu"), "resnet18w0.25x"
TINY = ["-a", ARCH, "--image-size", "32", "-j", "0"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("narrow") / "checkpoint.pth.tar", ARCH)


def run(images, narrow, output, *flags):
    argv = [str(images), "--pretrained", str(narrow), "--output", str(output), *TINY, *flags]
    summarize(parse_summary(argv), CPU)
    return json.loads((output / "summary.json").read_text())


@pytest.fixture(scope="module")
def page(images, narrow, tmp_path_factory):
    output = tmp_path_factory.mktemp("page")
    (output / "list.txt").write_text("a/03.png\nb/07.png")
    lists = ("--lists", f"1={output / 'list.txt'}")
    return output, run(images, narrow, output, "--epochs", "1", "-b", "16", *lists)


def test_the_numbers_are_those_of_the_commands(page, images, narrow, tmp_path):
    output, found = page
    expected = {}
    for k in (20, 200):
        argv = [str(images), "--pretrained", str(narrow), *TINY, "-k", str(k)]
        knn(parse_knn([*argv, "--output", str(tmp_path / "knn.json")]), CPU)
        expected[f"knn_{k}_top1"] = json.loads((tmp_path / "knn.json").read_text())["knn_top1"]
    flags = f"--epochs 1 -b 16 --schedule 1 --lr {30 * 16 / 256} --seed 0".split()
    argv = [str(images), "--pretrained", str(narrow), *TINY, *flags]
    linear.classify(parse_linear([*argv, "--output", str(tmp_path / "linear")]), CPU)
    (expected["linear_top1"],) = values(tmp_path / "linear", "val_acc1")
    for name in TRAININGS:
        for top in "15":
            (accuracy,) = values(output / name, f"val_acc{top}")
            expected.setdefault(f"{name}_top{top}", accuracy)
    assert found == expected


def test_stages_train_on_their_part_of_the_labels(page):
    """Two are listed; 10 % of 25 images of a class are two."""
    output, _ = page
    config, data = {}, {}
    for name in TRAININGS:
        state = torch.load(output / name / "checkpoint_last.pth.tar", weights_only=True)
        config[name], data[name] = state["config"], state["data"]["images"]
    assert data == {"linear": 50, "finetune_1": 2, "finetune_10": 4, "finetune_100": 50}
    assert {n: c["batch_size"] for n, c in config.items()} == {
        "linear": 16, "finetune_1": 2, "finetune_10": 4, "finetune_100": 16,
    }  # fmt: skip
    assert config["finetune_10"]["lr"] == pytest.approx(0.05 * 4 / 256)
    assert config["finetune_100"]["lr"] == pytest.approx(0.03 * 16 / 256)
    assert [c["finetune"] for c in config.values()] == [False, True, True, True]


def test_the_table_has_a_row_for_each(page):
    output, found = page
    head, line, *rows = (output / "summary.md").read_text().splitlines()
    assert head.split("|")[1].strip() == "evaluation"
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert cells[0] == ["kNN, k = 20", f"{found['knn_20_top1']:.2f}", ""]
    assert cells[2][:2] == ["linear classifier, 1 epochs", f"{found['linear_top1']:.2f}"]
    assert len(cells) == 2 + len(TRAININGS)


def test_what_is_finished_is_not_run_again_and_the_rest_goes_on(
    images, narrow, tmp_path, monkeypatch
):
    """A stage is ended by a signal; the same command goes on with it."""
    flags = ("--epochs", "1", "-b", "16", "--stages", "linear", "finetune_10")
    classify, ran = linear.classify, []

    def ended(args, device):
        ran.append(args.output)
        if len(ran) == 2:
            raise SystemExit(75)
        classify(args, device)

    monkeypatch.setattr(linear, "classify", ended)
    with pytest.raises(SystemExit):
        run(images, narrow, tmp_path, *flags)
    assert not (tmp_path / "summary.json").exists()
    # What a kill between its two checkpoints leaves.
    (tmp_path / "finetune_10").mkdir()
    (tmp_path / "finetune_10" / "checkpoint_best.pth.tar").write_bytes(b"")
    found = run(images, narrow, tmp_path, *flags)
    assert [path.rpartition("/")[2] for path in ran] == ["linear", "finetune_10", "finetune_10"]
    assert run(images, narrow, tmp_path, *flags) == found
    assert len(ran) == 3
    assert found.keys() == {f"{n}_top{k}" for n in ("linear", "finetune_10") for k in "15"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lists", "5=a"], "--lists 5: write 1=FILE or 10=FILE"),
        (["--lists", "1=a", "1=b"], "--lists 1=a 1=b: a stage has one list"),
        (["--lists", "1=a", "--stages", "knn"], "--lists 1=a: --stages lacks finetune_1"),
        (["--lists", "1=absent.txt"], r"cannot read absent\.txt"),
        (["--lists", "1=ONE"], r"one\.txt of .* fewer than two images .* leave finetune_1 out"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--dataset", "cars"], "does not hold Stanford Cars"),
    ],
)
def test_bad_input_is_named_before_the_work(images, narrow, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(summary, "neighbours", lambda *args: pytest.fail("work"))
    (tmp_path / "one.txt").write_text("a/03.png")
    flags = [flag.replace("ONE", str(tmp_path / "one.txt")) for flag in flags]
    with pytest.raises(UserError, match=message):
        run(images, narrow, tmp_path, *flags)
    assert not (tmp_path / "settings.json").exists()  # so other flags may follow


def test_a_folder_of_another_checkpoint_is_refused(page, images, narrow):
    output, _ = page
    lists = ("--lists", f"1={output / 'list.txt'}")
    for pretrained, flags, message in (
        ("random", ["--epochs", "1", "-b", "16", *lists], "another weights"),
        (narrow, ["--epochs", "2", "-b", "16", *lists], "another epochs, 1: pass another --output"),
    ):
        with pytest.raises(UserError, match=message):
            run(images, pretrained, output, *flags)
    (output / "knn.json").write_text("{}")
    with pytest.raises(UserError, match=r"knn\.json does not hold knn_20_top1"):
        run(images, narrow, output, "--epochs", "1", "-b", "16", *lists)


def test_the_stages_are_those_of_the_flags():
    assert ["knn", *TRAININGS] == list(STAGES)
