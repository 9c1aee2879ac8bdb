"""The ablation command: what it lists, and whole grids on commands that only pretend, and real."""

import json
import re
import signal
import time

import cv2
import numpy as np
import pytest
from commands import Command, load_command, python
from commands import run as run_command

from moco_det.benchmark.jobs import ablation

main = load_command("tools/ablate.py").main
BASE = {"arch": "resnet18w0.25x", "image_size": 32}

# Stand-ins for main.py, knn.py and linear.py that do nothing but leave numbers.
PRETEND = """
import json, sys
from pathlib import Path
flags = dict(zip(sys.argv[2:], sys.argv[3:]))
output = Path(flags["--output"])
print("pretending", *sys.argv)
"""
PRETRAIN = """
(output / "runs").open("a").write("x")
if flags["--moco-m"] == "0.9":
    sys.exit("error: the loss is nan")
m = float(flags["--moco-m"])
seed = int(flags["--seed"])
(output / "metrics.jsonl").write_text(json.dumps({"loss": 4 - m, "acc1": 10 * m + seed}))
"""
KNN = """
output.write_text(json.dumps({"knn_top1": 30 + 2 * int(flags["--seed"])}))
"""
LINEAR = """
output.mkdir(exist_ok=True)
(output / "metrics.jsonl").write_text(json.dumps({"val_acc1": 40 + int(flags["--seed"])}))
"""


@pytest.fixture
def pretending(tmp_path, monkeypatch):
    """Commands that only pretend."""
    folder = tmp_path / "commands"
    folder.mkdir()
    for name, code in (("main.py", PRETRAIN), ("knn.py", KNN), ("linear.py", LINEAR)):
        (folder / name).write_text(PRETEND + code)
    monkeypatch.setattr(ablation, "FOLDER", folder)


@pytest.fixture
def data(tmp_path):
    """Two classes of 16 training and 4 validation images of noise."""
    root = tmp_path / "data"
    rng = np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 4)):
        for label, level in (("a", 80), ("b", 160)):
            folder = root / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                noise = rng.normal(level, 40, (32, 32, 3)).clip(0, 255)
                cv2.imwrite(str(folder / f"{i:02d}.png"), noise.astype(np.uint8))
    return root


def write(folder, **content):
    path = folder / "tiny.yaml"
    path.write_text(json.dumps({"base": BASE} | content))  # JSON is YAML
    return path


def cells(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def run(*arguments) -> int:
    """The exit code of the command in this process."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def test_a_grid_becomes_one_table_and_runs_once(pretending, data, tmp_path, capfd):
    path = write(tmp_path, grid={"moco_m": [0, 0.5]}, seeds=3, untrained=True)
    output = tmp_path / "out"
    assert run(path, "--data", data, "--output", output, "--seeds", 2) == 0
    table = (output / "table.md").read_text()
    assert table in capfd.readouterr().out
    # Two seeds each: the deviation of 30 and 32 is sqrt(2).
    assert cells(table) == [
        ["varied", "n", "pretext loss", "pretext top-1", "kNN top-1", "linear top-1"],
        ["untrained", "2", "", "", "31.0 ± 1.4", "40.5 ± 0.7"],
        ["--moco-m 0", "2", "4.0 ± 0.0", "0.5 ± 0.7", "31.0 ± 1.4", "40.5 ± 0.7"],
        ["--moco-m 0.5", "2", "3.5 ± 0.0", "5.5 ± 0.7", "31.0 ± 1.4", "40.5 ± 0.7"],
    ]
    # A third seed beside them, with another number of workers: only it is run.
    assert run(path, "--data", data, "--output", output, "-j", 1) == 0
    assert (output / "moco_m_0/seed0/runs").read_text() == "x"
    assert [row[1] for row in cells((output / "table.md").read_text())[1:]] == ["3"] * 3
    kept = json.loads((output / "table.json").read_text())
    assert kept["provenance"]["code"]["commit"]
    assert kept["ablation"] == path.read_text()


def test_a_failed_run_is_reported_and_the_others_go_on(pretending, data, tmp_path, capfd):
    path = write(tmp_path, grid={"moco_m": [0.9, 0.5]}, seeds=1)
    assert run(path, "--data", data, "--output", tmp_path / "out") == 1
    said = capfd.readouterr()
    assert "error: 1 of 2 runs failed:\n  --moco-m 0.9, seed 0: error: the loss is nan" in said.err
    failed, finished = cells(said.out)[1:]
    assert failed == ["--moco-m 0.9", "0, 1 failed", "", "", "", ""]
    assert finished[:2] == ["--moco-m 0.5", "1"]


def test_a_dry_run_lists_the_runs(pretending, data, tmp_path, capfd):
    path = write(tmp_path, rows=[{"moco_m": 0}], seeds=2)
    output = tmp_path / "out"
    run(path, "--data", data, "--output", output, "--seeds", 1)
    capfd.readouterr()
    assert run(path, "--data", data, "--output", output, "--dry-run", "--nproc-per-node", 2) == 0
    said = capfd.readouterr().out
    lines = said.splitlines()
    assert [line for line in lines if line.startswith(("done", "begun", "to do"))] == [
        "done   --moco-m 0, seed 0",
        "to do  --moco-m 0, seed 1",
    ]
    assert cells(said)[1][:2] == ["--moco-m 0", "1, 1 missing"]
    assert sum("torch.distributed.run --standalone --nproc_per_node 2" in li for li in lines) == 6
    assert not (output / "moco_m_0/seed1").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "absent"], "--data absent needs train/CLASS and val/CLASS"),
        (["--data", "{data}", "--seeds", "0"], "--seeds must be at least 1"),
        (["--data", "{data}", "--seeds", "1001"], "--seeds must be at least 1 and at most 1000"),
        (["--data", "{data}"], "row '--moco-m 1.5' of .*tiny.yaml: --moco-m must be in"),
    ],
)
def test_bad_input_is_one_line(data, tmp_path, arguments, message, capsys):
    path = write(tmp_path, rows=[{"moco_m": 1.5}])
    with pytest.raises(SystemExit) as end:
        main([str(path), *(text.format(data=data) for text in arguments)])
    said = capsys.readouterr().err or str(end.value)
    assert len(said.strip().splitlines()) == 1
    assert re.match(f"error: {message}", said)


@pytest.mark.slow
def test_a_killed_grid_ends_with_the_same_table(data, tmp_path):
    """The real commands: pretraining is stopped after a few steps, and goes on from there."""
    base = BASE | {
        "batch_size": 8, "bn_groups": 2, "epochs": 12, "moco_k": 16, "moco_dim": 8,
        "knn_every": 0, "print_freq": 4, "save_steps": 1,
    }  # fmt: skip
    probe = {"cache_features": True, "epochs": 2, "batch_size": 8, "lr": 0.1}
    path = write(tmp_path, base=base, rows=[{}], seeds=1, knn={"neighbours": 5}, linear=probe)
    command = ("tools/ablate.py", path, "-j", "0", "--data", data, "--output")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = python(*command, whole)
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 600
    checkpoint = killed / "base/seed0/checkpoint_last.pth.tar"
    with Command(*command, killed) as process:
        while not checkpoint.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
        assert process.wait(120) == 143
    assert not (killed / "base/seed0/knn.json").exists()
    done = run_command(*command, killed)
    assert done.returncode == 0, done.stderr
    assert "resumed" in (killed / "base/seed0/log.txt").read_text()
    assert (killed / "table.md").read_text() == (whole / "table.md").read_text()
    one, two = (json.loads((o / "base/seed0/run.json").read_text()) for o in (whole, killed))
    assert one["measures"] == two["measures"]
