"""What the doctor says of real runs, each of which has one thing wrong with it."""

import json
import math
import re

import cv2
import numpy as np
import pytest
import torch
from pretraining_runs import values
from torch import nn

from moco_det.common.errors import UserError
from pretrain.doctor import main
from pretrain.engine import diagnosis
from pretrain.engine.checkpoints import LAST
from pretrain.engine.diagnosis import Doctor, examine
from pretrain.flags.pretraining import parse_pretraining
from pretrain.main import pretrain

# 48 images in batches of 16 are three steps an epoch. The linear rule gives 0.0019 for that batch.
FLAGS = [
    "-a", "resnet18w0.25x", "--image-size", "32", "-b", "16", "--moco-k", "32", "--moco-dim", "16",
    "--moco-m", "0.9", "--mlp", "--aug-plus", "--color-strength", "0", "--lr", "0.005",
    "--seed", "7", "-j", "0", "-p", "3", "--knn-every", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of plain grey images, 24 of each and 10 in val/: their level is all there is."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 10)):
        for label, darkest in (("dark", 0), ("light", 128)):
            folder = root / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                grey = np.full((40, 40, 3), darkest + rng.integers(128), np.uint8)
                cv2.imwrite(str(folder / f"{i}.png"), grey)
    return root


WAITING = diagnosis.WAITING


@pytest.fixture(autouse=True)
def no_clock(monkeypatch):
    """Beside so small an encoder loading takes long, how long depends on what else is running."""
    monkeypatch.setattr(diagnosis, "WAITING", math.inf)


def run(images, output, *flags) -> None:
    pretrain(
        parse_pretraining([str(images), *FLAGS, "--output", str(output), *flags]),
        torch.device("cpu"),
    )


def conditions(output) -> dict[str, str]:
    return {finding.condition: finding.text for finding in examine(output)}


def said(capsys) -> list[str]:
    """The doctor's lines in the log of the run."""
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith("doctor: ")]


def exit_code(output) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(output)])
    return ended.value.code


def test_a_healthy_run_gives_no_finding(images, tmp_path, capsys):
    run(images, tmp_path, "--iterations", "60")
    # It learns: 32 negatives give ln 33 by chance; single steps scatter by some tenths around 2.6.
    assert np.mean(values(tmp_path, "loss")[-10:]) < math.log(33) - 0.5
    assert said(capsys) == []
    assert examine(tmp_path) == []
    assert exit_code(tmp_path) == 0
    assert capsys.readouterr().out == "no problems\n"


def test_a_filling_queue_is_no_problem(images, tmp_path, capsys):
    run(images, tmp_path, "--moco-k", "128", "--iterations", "9")
    (line,) = said(capsys)
    (finding,) = examine(tmp_path)
    assert line == str(finding)
    assert not finding.problem
    assert finding.text.startswith("the loss is rising (")
    assert "because the queue is 38% real" in finding.text  # 48 of 128 keys
    assert finding.text.endswith("It is full at step 8; judge the loss from step 16 on")
    assert exit_code(tmp_path) == 0


def test_nan_names_the_last_checkpoint_that_is_good(images, tmp_path, capsys):
    """The first step of a huge rate spoils the weights; its loss is a number, so they are saved."""
    run(images, tmp_path, "--iterations", "3")
    (good,) = tmp_path.glob("checkpoint_0000*")
    flags = ("--resume", "auto", "--save-steps", "1", "--iterations", "6", "--lr", "1e30")
    with pytest.raises(UserError, match="the loss is nan at step 5; the last good") as error:
        run(images, tmp_path, *flags)
    assert f"checkpoint is {good}. Likely: --lr 1e+30 is 5.3e+32 times" in str(error.value)
    assert torch.load(tmp_path / LAST)["step"] == 4
    assert conditions(tmp_path).keys() == {"nan", "learning_rate"}
    assert exit_code(tmp_path) == 1


def test_lars_has_a_linear_rule_of_its_own():
    """0.3 at a batch of 256 (arXiv:2002.05709), ten times SGD's."""
    flags = {"lr": 1.2, "batch_size": 512, "optimizer": "lars"}
    assert diagnosis.rate_ratio(flags) == pytest.approx(2)
    assert diagnosis.rate_ratio(flags | {"optimizer": "sgd"}) == pytest.approx(20)
    words = "--lr 1.2 is 2 times the 0.6 that the linear rule (0.3 at a batch of 256) gives for a"
    assert diagnosis.rate_words(flags) == f"{words} batch of 512"


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        ("0.03", "--lr 0.03 is 16 times the 0.0019 that the linear rule .* features may collapse"),
        ("1e-5", "--lr 1e-05 is 0.0053 times the 0.0019 .* training takes that much longer"),
    ],
)
def test_a_rate_that_was_not_scaled_with_the_batch(images, tmp_path, capsys, rate, words):
    run(images, tmp_path, "--lr", rate, "--iterations", "2")
    (line,) = said(capsys)
    assert re.match(f"doctor: {words}", line)


def test_collapse(images, tmp_path):
    """Weights that decay faster than they learn leave a feature that is the same for all images."""
    run(images, tmp_path, "--lr", "0.1", "--wd", "1", "--iterations", "66", "--knn-every", "22")
    found = conditions(tmp_path)
    assert (
        "the features collapse: their standard deviation over a batch is 0.0" in found["collapse"]
    )
    assert "evenly spread ones have 0.250" in found["collapse"]
    assert "--wd 1 is far above the papers' 0.0001" in found["collapse"]
    assert "nothing was learnt that tells the classes apart" in found["no_gain"]
    assert "learning_rate" in found


def test_a_loss_that_rises_again(images, tmp_path):
    """By a schedule that multiplies the rate by 100 where others divide it."""
    schedule = ("--lr-decay-every", "45", "--lr-decay", "100")
    run(images, tmp_path, *schedule, "--iterations", "75")
    found = conditions(tmp_path)
    assert found.keys() <= {"rising", "collapse"}
    assert re.match(r"the loss rises again: .* now .* at lr 0\.5\. Likely: --lr", found["rising"])


class BatchReader(nn.Module):
    """Sees nothing of an image but what its companions in the BN group are like on the average.

    A border of zeros, normalised, shows the group's -mean/deviation. The pooled features, which are
    all but the last layer's, are the same for all images once the statistics are the running ones.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.texture = nn.Sequential(nn.Conv2d(3, 32, 5, 2), nn.ReLU(), nn.ZeroPad2d((0, 1, 0, 0)))
        self.norm = nn.BatchNorm2d(32)
        self.border = nn.Sequential(LastColumn(), nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Sequential(nn.Flatten(), nn.Linear(32, dim))

    def forward(self, pixels):
        return self.fc(self.border(self.norm(self.texture(pixels))))


class LastColumn(nn.Module):
    def forward(self, x):
        return x[..., -1:]


def test_leak_of_batch_statistics(images, tmp_path, monkeypatch):
    """Without shuffling, a query's companions are its key's: they solve the pretext task."""
    monkeypatch.setattr("pretrain.run.build_encoder", lambda arch, dim, *_: BatchReader(dim))
    flags = ["--bn-groups", "4", "--moco-m", "0", "--lr", "0.001", "--iterations", "24"]
    flags += ["--knn-every", "4"]
    run(images, tmp_path / "leaking", *flags, "--no-shuffle-bn")
    text = conditions(tmp_path / "leaking")["leak"]
    assert re.match(r"pretext accuracy is (99|100)\.. % while kNN top-1 stays at 50\.0 %", text)
    assert text.endswith("batch statistics leak. Switch shuffling on: --shuffle-bn")
    run(images, tmp_path / "shuffled", *flags)
    assert "leak" not in conditions(tmp_path / "shuffled")


def test_a_slow_loader(tmp_path, capsys, monkeypatch):
    """Large photographs, loaded between the steps of a small encoder."""
    monkeypatch.setattr(diagnosis, "WAITING", WAITING)
    rng = np.random.default_rng(0)
    (tmp_path / "large").mkdir()
    for i in range(16):
        noise = rng.integers(0, 256, (700, 700, 3)).astype(np.uint8)
        cv2.imwrite(str(tmp_path / "large" / f"{i}.png"), noise)
    run(tmp_path / "large", tmp_path, "--iterations", "8", "-p", "1")
    (line,) = said(capsys)
    assert "of the time goes into waiting for images" in line
    assert "They are loaded between the steps: pass --workers " in line


@pytest.mark.parametrize(
    ("wait", "flags", "words"),
    [
        (0.1, {"workers": 0, "cores": 8}, None),
        (0.5, {"workers": 2, "cores": 8}, "2 of 8 cores load: pass --workers 8"),
        (0.5, {"workers": 8, "cores": 8, "image_size": 224}, "a short side of 512 pixels"),
    ],
)
def test_the_remedy_of_a_slow_loader(tmp_path, monkeypatch, wait, flags, words):
    """By hand: 100 images/s with half of the time spent waiting could be 200."""
    monkeypatch.setattr(diagnosis, "WAITING", WAITING)
    doctor = diagnosis.Doctor(tmp_path)
    doctor.hear({"step": 0, "flags": flags | {"lr": 0.03, "batch_size": 256}})
    report = {"epoch": 0.1, "loss": 5.0, "acc1": 0.0, "chance_loss": 7.0, "lr": 0.03}
    report |= {"images_per_second": 100.0, "data_wait": wait}
    texts = [f.text for step in range(1, 9) for f in doctor.hear({"step": step, **report})]
    assert len(texts) == (words is not None)
    for text in texts:
        assert text.startswith(
            "50% of the time goes into waiting for images: 100 images/s, where 200"
        )
        assert words in text


def test_a_condition_is_told_once_a_start(images, tmp_path, capsys):
    run(images, tmp_path, "--lr", "0.03", "--iterations", "2")
    run(images, tmp_path, "--lr", "0.03", "--iterations", "4", "--resume", "auto")
    assert len(said(capsys)) == 2
    assert [finding.step for finding in examine(tmp_path)] == [0, 2]


def test_pairs_whose_iou_cannot_be_met_are_counted_and_told(images, tmp_path, capsys):
    """Two crops of 45 % of a square are hardly ever disjoint."""
    run(images, tmp_path, "--max-iou", "0", "--crop-min", "0.45", "--iterations", "2")
    assert values(tmp_path, "free_pairs") == [1.0, 1.0]
    (line,) = (line for line in said(capsys) if "pairs" in line)
    assert line.startswith("doctor: 100% of the pairs of large crops have an IoU outside --min-iou")
    assert conditions(tmp_path).keys() >= {"free_pairs"}


def test_a_log_that_a_kill_cut_short(tmp_path):
    lines = [json.dumps({"step": 1, "loss": math.nan, "chance_loss": 3.0}), '{"step": 2, "lo']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (finding,) = examine(tmp_path)
    assert finding.condition == "nan"
    for first in (lines[1], '{"loss": 1.0}', "[]"):
        (tmp_path / "metrics.jsonl").write_text("\n".join([first, lines[0]]))
        with pytest.raises(UserError, match=r"metrics\.jsonl, line 1 is no JSON of a step"):
            examine(tmp_path)


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(UserError, match=r"no .*metrics\.jsonl: name the --output folder"):
        main([str(tmp_path)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 1, "loss": {"x": null}}', "line 2 is no JSON of a step: loss"),
        ('{"step": "1", "loss": 1.0}', "line 2 is no JSON of a step: step '1'"),
        ('{"step": -1}', "line 2 is no JSON of a step: step -1"),
        (f'{{"step": {"9" * 60}}}', "line 2 is no JSON of a step .*more than 64 bits"),
        ('{"step": 1, "flags": [1]}', r"line 2 is no JSON of a step: flags \[1\]"),
        ('{"step": 1, "flags": {"lr": "x"}}', "line 2 is no JSON of a step: lr 'x'"),
        ("\0\0\0", "line 2 is no JSON of a step"),
        ('{"step": 1, "knn_top1": 1.0}', "the record of step 1 cannot be judged .*'epoch'"),
        ('{"step": 1, "flags": {"lr": 1, "batch_size": 0}}', "step 1 cannot be judged .*Zero"),
    ],
)
def test_a_damaged_log_is_one_line(tmp_path, line, message):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=message) as refused:
        examine(tmp_path)
    assert len(str(refused.value)) < 300


def test_a_log_that_is_no_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xff\n")
    with pytest.raises(UserError, match="line 1 is no JSON of a step"):
        examine(tmp_path)


# -- thresholds, on logs written by hand -----------------------------------------------------------

HEALTHY = {
    "loss": 5.0, "epoch": 3.0, "acc1": 50.0, "chance_loss": 10.0, "lr": 0.03, "feature_std": 0.08,
    "positive_similarity": 0.8, "negative_similarity": 0.0, "images_per_second": 100.0,
    "data_wait": 0.0, "queue_fill": 1.0,
}  # fmt: skip


def heard(tmp_path, *reports: dict, lr: float = 0.03) -> set[str]:
    """What is found of a run at batch 256 with 128 features: 40 healthy reports, then these."""
    flags = {"lr": lr, "batch_size": 256, "moco_dim": 128, "moco_m": 0.999, "moco_k": 2560}
    doctor = Doctor(tmp_path)
    found = doctor.hear({"step": 0, "flags": flags | {"mechanism": "moco", "last_step": 10**4}})
    for number, report in enumerate([{}] * 40 + list(reports), start=1):
        found += doctor.hear({"step": 10 * number, **HEALTHY, **report})
    return {finding.condition for finding in found}


@pytest.mark.parametrize(
    ("report", "condition"),
    [
        ({}, None),
        ({"loss": 5.45}, None),  # within 5 % of chance above the lowest
        ({"loss": 5.55}, "rising"),
        ({"feature_std": 0.16 / 128**0.5}, None),  # evenly spread features have 1 / sqrt(dim)
        ({"feature_std": 0.14 / 128**0.5}, "collapse"),
        ({"free_crops": 0.04, "free_pairs": 0.04}, None),
        ({"free_crops": 0.06, "free_pairs": 0.0}, "free_crops"),
        ({"free_pairs": 0.06}, "free_pairs"),
    ],
)
def test_where_health_ends(tmp_path, report, condition):
    assert heard(tmp_path, *[report] * 6) == ({condition} - {None})


@pytest.mark.parametrize(
    ("ratio", "told"),
    [(0.24, True), (0.26, False), (1.0, False), (3.9, False), (4.1, True), (9.9, True),
     (10.0, False), (10.1, True)],  # of which 10 is the rate of a paper on small data
)  # fmt: skip
def test_the_rate_of_a_batch_of_256_is_0_03(tmp_path, ratio, told):
    assert heard(tmp_path, lr=0.03 * ratio) == ({"learning_rate"} if told else set())
