"""The command line, as a user meets it: exit codes, one-line errors, kill and resume."""

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from commands import Command, load_command, python, run, torchrun
from PIL import Image
from tiny_voc import write_tiny_config, write_tiny_voc

from moco_det.common.errors import UserError

TOOL = "tools/train_net.py"


@pytest.fixture
def command(tmp_path):
    """Function: arguments -> the command on a tiny data set."""
    config = write_tiny_config(tmp_path / "tiny.yaml", write_tiny_voc(tmp_path / "voc"))

    def build(*arguments):
        return TOOL, "--config-file", config, "--engine", "native", *arguments

    return build


def error_lines(done):
    """What a failed command wrote to stderr, without the warnings of other packages."""
    assert "Traceback" not in done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def weights(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)


def wait_for(path, process):
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def identical(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(identical, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_kill_9_then_resume_equals_one_run(command, tmp_path):
    opts = ("DATALOADER.NUM_WORKERS", "1", "SOLVER.MAX_ITER", "8", "SOLVER.STEPS", "(5,)")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = run(*command(*opts, "OUTPUT_DIR", whole))
    assert done.returncode == 0, done.stderr
    first_line = done.stdout.splitlines()[0]
    assert first_line.startswith("engine: native (")
    assert "AP50 |" in done.stdout

    with Command(*command(*opts, "OUTPUT_DIR", parts)) as killed:
        wait_for(parts / "model_0000003.pth", killed)
        killed.kill()
        assert killed.wait() == -signal.SIGKILL
    assert not (parts / "model_final.pth").exists()
    done = run(*command("--resume", *opts, "OUTPUT_DIR", parts))
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    assert identical(weights(whole), weights(parts))


@pytest.mark.parametrize(
    ("number", "name", "code"), [(signal.SIGTERM, "SIGTERM", 75), (signal.SIGINT, "Ctrl-C", 130)]
)
def test_a_stop_saves_and_has_its_exit_code(command, tmp_path, number, name, code):
    opts = ("SOLVER.MAX_ITER", "100000", "SOLVER.CHECKPOINT_PERIOD", "0", "TEST.EVAL_PERIOD", "0")
    with Command(*command(*opts, "OUTPUT_DIR", tmp_path / "out")) as started:
        assert any("iter: 19" in line for line in started.stdout)
        os.kill(started.pid, number)
        output = started.stdout.read()
        assert started.wait() == code
    saved = (tmp_path / "out" / "last_checkpoint").read_text()
    assert f"{name}: saved {tmp_path / 'out' / saved}" in output


def of_group(leader: int) -> list[int]:
    """The processes that the command has started, with those that they have started."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    found = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            if pid != leader and os.getpgid(pid) == leader:
                found.append(pid)
    return found


def test_a_killed_worker_of_the_loader_ends_the_run(command, tmp_path):
    opts = ("SOLVER.MAX_ITER", "100000", "SOLVER.CHECKPOINT_PERIOD", "0", "TEST.EVAL_PERIOD", "0")
    opts += ("DATALOADER.NUM_WORKERS", "2", "OUTPUT_DIR", tmp_path / "out")
    with Command(*command(*opts)) as started:
        assert any("iter: 19" in line for line in started.stdout)
        os.kill(of_group(started.pid)[0], signal.SIGKILL)
        output = started.stdout.read()
        assert started.wait(60) == 1
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "a data loading process" in line
    assert "Traceback" not in output
    assert not of_group(started.pid)


def test_a_killed_process_ends_the_others_and_is_named(command, tmp_path):
    opts = ("SOLVER.MAX_ITER", "100000", "SOLVER.CHECKPOINT_PERIOD", "0", "TEST.EVAL_PERIOD", "0")
    with Command(*command("--num-gpus", "2", *opts, "OUTPUT_DIR", tmp_path / "out")) as started:
        assert any("iter: 19" in line for line in started.stdout)
        first, second = of_group(started.pid)
        os.kill(second, signal.SIGKILL)
        output = started.stdout.read()
        assert started.wait(60) == 1
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert re.match("error: the process of rank [01] was killed by SIGKILL", line)
    assert "Traceback" not in output
    assert not of_group(started.pid)


def test_two_runs_cannot_share_a_folder_and_leftovers_are_removed(command, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    left = output / f".model_0000003.{2**22 + 1}.tmp.pth"  # above the highest process id of Linux
    left.write_text("half of it")
    opts = ("SOLVER.MAX_ITER", "100000", "SOLVER.CHECKPOINT_PERIOD", "0", "TEST.EVAL_PERIOD", "0")
    with Command(*command(*opts, "OUTPUT_DIR", output)) as first:
        assert any("iter: 19" in line for line in first.stdout)
        assert not left.exists()
        for flags in ((), ("--resume",), ("--overwrite",)):
            second = run(*command(*flags, *opts, "OUTPUT_DIR", output))
            assert second.returncode == 1
            (line,) = error_lines(second)
            assert f"OUTPUT_DIR {output} is in use by process {first.pid} on " in line
        assert any("iter: 59" in line for line in first.stdout)  # it goes on


def test_a_new_run_does_not_replace_another_unless_it_is_told_to(command, tmp_path):
    opts = ("SOLVER.MAX_ITER", "1", "TEST.EVAL_PERIOD", "0", "OUTPUT_DIR", tmp_path / "out")
    assert run(*command(*opts)).returncode == 0
    (tmp_path / "out" / "model_0000007.pth").write_text("of the first")
    refused = run(*command(*opts))
    assert refused.returncode == 1
    (line,) = error_lines(refused)
    assert "holds a run (last_checkpoint): go on with --resume, begin anew with --overw" in line
    again = run(*command("--overwrite", *opts))
    assert again.returncode == 0, again.stderr
    assert not (tmp_path / "out" / "model_0000007.pth").exists()
    assert len((tmp_path / "out" / "metrics.json").read_text().splitlines()) == 2
    own = ("MODEL.WEIGHTS", tmp_path / "out" / "model_final.pth")
    doomed = run(*command("--overwrite", *opts, *own))
    assert "--overwrite would delete" in error_lines(doomed)[0]
    assert (tmp_path / "out" / "model_final.pth").exists()
    both = run(*command("--overwrite", "--resume", *opts))
    assert "pass one of them" in error_lines(both)[0]


def test_two_processes_train_evaluate_and_agree_with_torchrun(command, tmp_path):
    opts = ("SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "0", "MODEL.RESNETS.NORM", "SyncBN")
    spawned, joined = tmp_path / "spawned", tmp_path / "joined"
    done = run(*command("--num-gpus", "2", *opts, "OUTPUT_DIR", spawned))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("engine: native") == 1
    assert done.stdout.count("copypaste: Task: bbox") == 1
    done = torchrun(*command(*opts, "OUTPUT_DIR", joined))
    assert done.returncode == 0, done.stderr
    assert identical(weights(spawned), weights(joined))


def test_evaluation_alone_repeats_the_result_and_checks_it(command, tmp_path):
    opts = ("SOLVER.MAX_ITER", "1", "TEST.EVAL_PERIOD", "0", "OUTPUT_DIR", tmp_path / "out")
    done = run(*command(*opts))
    assert done.returncode == 0, done.stderr
    result = done.stdout.splitlines()[-1]
    assert result.startswith("copypaste: ")
    opts = ("--eval-only", *opts, "MODEL.WEIGHTS", tmp_path / "out" / "model_final.pth")
    done = run(*command(*opts, "TEST.EXPECTED_RESULTS", "[['bbox','AP50',50.0,50.0]]"))
    assert done.returncode == 0, done.stderr
    assert result in done.stdout
    done = run(*command(*opts, "TEST.EXPECTED_RESULTS", "[['bbox','AP50',300.0,1.0]]"))
    assert done.returncode == 1
    assert "bbox/AP50" in error_lines(done)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-gpus", "2", "MODEL.ROI_HEADS.NUM_CLASSES", "20"], "set it to 2"),
        (["MODEL.WEIGHTS", "nowhere.pkl"], "nowhere.pkl"),
        (["INPUT.MAX_IMAGE_PIXELS", "1000"], "more than 1,000 pixels: if you trust the file"),
        (
            ["SOLVER.BASE_LR", "1e30", "DATALOADER.NUM_WORKERS", "1"],
            "not finite at iteration",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_told_in_one_line(command, tmp_path, arguments, message):
    done = run(*command(*arguments, "OUTPUT_DIR", tmp_path / "out"))
    assert done.returncode == 1
    assert len(error_lines(done)) == 1
    assert message in error_lines(done)[0]


@pytest.mark.parametrize("engine", ["native", "detectron2"])
def test_processes_without_gpus_are_refused_before_any_starts(tmp_path, monkeypatch, engine):
    """Unless the CPU is asked for."""
    tool = load_command(TOOL)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RANK", raising=False)
    path = tmp_path / "a.yaml"
    path.write_text("MODEL: {MASK_ON: True}\n")
    words = ["--config-file", str(path), "--num-gpus", "8"]
    with pytest.raises(UserError, match="--num-gpus 8: torch finds no GPU here; with MODEL.DEVIC"):
        tool.check(tool.parse(words), engine)
    tool.check(tool.parse([*words, "MODEL.DEVICE", "cpu"]), engine)
    path.write_text("MODEL: {DEVICE: cpu}\n")
    tool.check(tool.parse(words), engine)
    with pytest.raises(UserError, match="torch finds no GPU here"):
        tool.check(tool.parse([*words, "MODEL.DEVICE", "cuda"]), engine)


@pytest.mark.parametrize("engine", ["auto", "detectron2"])
def test_a_detectron2_that_cannot_be_imported_is_explained(command, tmp_path, engine):
    """Compiled for another torch: its own words, and the native engine is there."""
    package = tmp_path / "broken" / "detectron2"
    package.mkdir(parents=True)
    words = "undefined symbol: _ZN3c10"
    (package / "__init__.py").write_text(f"raise ImportError({words!r})")
    opts = ("SOLVER.MAX_ITER", "1", "TEST.EVAL_PERIOD", "0", "OUTPUT_DIR", tmp_path / "out")
    environment = {"PYTHONPATH": str(package.parent)}
    done = python(*command("--engine", engine, *opts), environment=environment)
    why = f"detectron2 is installed but cannot be imported (ImportError: {words})"
    if engine == "auto":
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[0] == f"engine: native ({why})"
    else:
        assert done.returncode == 1
        advice = "the native engine needs no detectron2: --engine native"
        assert error_lines(done) == [f"error: {why}; {advice}"]


def test_a_broken_image_is_named(command, tmp_path):
    for path in (tmp_path / "voc" / "JPEGImages").iterdir():
        path.write_bytes(path.read_bytes()[:400])
    done = run(*command("DATALOADER.NUM_WORKERS", "1", "OUTPUT_DIR", tmp_path / "out"))
    assert done.returncode == 1
    assert ".jpg" in error_lines(done)[0]


def test_photographs_on_their_side_train_where_no_size_is_stated(command, tmp_path):
    """Boxes are those of what is seen: EXIF orientation 6, and 99, which means nothing."""
    voc, exif = tmp_path / "voc", Image.Exif()
    for number, path in enumerate(sorted((voc / "JPEGImages").iterdir())):
        xml = voc / "Annotations" / f"{path.stem}.xml"
        xml.write_text(re.sub("<size>.*</size>", "", xml.read_text()))
        with Image.open(path) as image:
            exif[0x0112] = 6 if number % 3 else 99
            stored = image.rotate(90, expand=True) if number % 3 else image.copy()
        stored.save(path, exif=exif, quality=95)
    opts = ("SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "0", "OUTPUT_DIR", tmp_path / "out")
    done = run(*command(*opts))
    assert done.returncode == 0, done.stderr
    checked = python("tools/check_data.py", "--config-file", tmp_path / "tiny.yaml")
    assert checked.returncode == 0, checked.stdout
