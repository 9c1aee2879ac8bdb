"""tools/reproduce.py as a command: refusals, plans, and tables that no kill changes."""

import contextlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import time

import pytest
import torch
from commands import Command, load_command, python, run
from foreign_checkpoints import write_foreign
from noisy_colours import write_checkpoint, write_images
from pretraining_runs import records
from torchvision.models import resnet50

from moco_det.benchmark.jobs import preflight
from moco_det.benchmark.synthetic import tasks
from moco_det.common.resnets import Architecture
from moco_det.common.weight_layouts import rename
from pretrain.flags.evaluation import parse_linear
from pretrain.linear import classify

main = load_command("tools/reproduce.py").main

TOOL = "tools/reproduce.py"
SMALL = [
    *("SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "(3,)", "SOLVER.CHECKPOINT_PERIOD", "1"),
    *("SOLVER.IMS_PER_BATCH", "2", "TEST.PRECISE_BN.NUM_ITER", "1", "INPUT.CROP.SIZE", "[65,65]"),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of Detectron2's for the toy experiments: nothing to convert."""
    architecture = Architecture(50, 1, 16, 0.25)
    state = architecture.build().state_dict()
    state = {k: v.numpy() for k, v in state.items() if not k.startswith("fc.")}
    content = {
        "model": rename(state, "torchvision", "detectron2"),
        "__author__": "test",
        "matching_heuristics": True,
        "requires": architecture.config(),
    }
    path = tmp_path_factory.mktemp("weights") / "r50.pkl"
    path.write_bytes(pickle.dumps(content))
    return path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tables", "9"], "no table '9'"),
        (["--trials", "0"], "--trials must be at least 1"),
        (["--trials", str(2**62)], "--trials must be at least 1 and at most 1000"),
        (["--opts", "SOLVER.MAX_ITER"], "pairs of a key and a value"),
        (["--weights", "a=b=c"], "is not a file"),
        (["--weights", f"random={__file__}"], "cannot name a row"),
        (["--linear", "epoch=3"], "unknown key 'epoch' in --linear"),
        (["--linear", "epochs=3", "--tables", "2b"], "--linear is for classifiers, of which these"),
    ],
)
def test_bad_input_is_one_line(arguments, words):
    done = run(TOOL, *arguments, "--dry-run")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ") and words in done.stderr


def test_dry_run_lists_runs_and_hours(weights, tmp_path):
    arguments = ["--weights", weights, "--tables", "2", "--output", tmp_path, "--trials", 1]
    done = python(TOOL, *arguments, "--dry-run")
    assert done.returncode == 0
    listed = [line.split() for line in done.stdout.splitlines() if "/trial" in line]
    lines = {line[0]: line[1] for line in listed}
    rows = ("random", "supervised", "moco_in1m")
    # 24000 x 0.537 s x 8 GPUs / 3600
    assert lines == {f"voc_R50_DC5_24k/{row}/trial1": "unknown" for row in rows} | {
        f"voc_R50_C4_24k/{row}/trial1": "28.6" for row in rows
    }
    assert "6 runs to do: 86 GPU hours, and 3 runs whose time is unknown" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_row_for_each_named_file_address_or_official_name(tmp_path, monkeypatch):
    """Nothing is downloaded for a plan; what is run needs it, and says where to put it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network, whatever the machine
    write_foreign(tmp_path / "densecl.pth", "DenseCL", resnet50())
    given = ["--weights", f"dense={tmp_path / 'densecl.pth'}", "moco=moco_v2_200ep"]
    given += ["--tables", "2b", "--trials", 1, "--output", tmp_path / "out"]
    done = run(TOOL, *given, "--dry-run")
    assert done.returncode == 0, done.stderr
    rows = [line.split()[0].split("/")[1] for line in done.stdout.splitlines() if "/trial" in line]
    assert rows == ["random", "supervised", "dense", "moco"]
    done = run(TOOL, *given)
    assert done.returncode == 1
    place = tmp_path / "hub/hub/checkpoints/moco_v2_200ep_pretrain.pth.tar"
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "cannot download moco_v2_200ep (" in line
    assert f"put it at {place}, or name the local file" in line


def children(pid):
    tasks = f"/proc/{pid}/task"
    return [int(child) for task in os.listdir(tasks) for child in _read(f"{tasks}/{task}/children")]


def _read(path):
    with open(path) as file:
        return file.read().split()


def kill(process, with_runs: bool) -> None:
    """SIGKILL for it, and for the runs that it has begun; nothing where it has ended by then."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for pid in [*(children(process.pid) if with_runs else []), process.pid]:
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the runs' processes in /proc")
def test_killed_at_random_moments_it_ends_with_the_same_table(weights, tmp_path):
    def arguments(name):
        root = tmp_path / name
        tasks.write_scenes(root / "data", "train", 0, 4)
        tasks.write_scenes(root / "data", "test", 0, 2)
        (root / "draw.done").touch()
        return [
            "--quick", "--tables", "6-semantic", "--trials", 1, "--weights", f"moco={weights}",
            "--output", root, "--opts", *SMALL,
        ]  # fmt: skip

    begin = time.monotonic()
    done = run(TOOL, *arguments("whole"))
    seconds = time.monotonic() - begin
    assert done.returncode == 0, done.stdout + done.stderr

    killed = arguments("killed")
    for with_runs in (True, False):
        with Command(TOOL, *killed) as process:
            while process.poll() is None and not list((tmp_path / "killed").rglob("run.json")):
                time.sleep(0.1)
            moment = random.uniform(0, seconds / 2)
            print(f"killed {moment:.1f} s after the first run has begun")  # if the test fails
            time.sleep(moment)
            kill(process, with_runs)
            process.wait()  # a run may outlive it
    done = run(TOOL, *killed)
    assert done.returncode == 0, done.stdout + done.stderr

    reports = {name: (tmp_path / name / "report.csv").read_text() for name in ("whole", "killed")}
    assert reports["whole"] == reports["killed"]
    assert reports["whole"].count("Shortened schedule") == 2
    tables = json.loads((tmp_path / "killed/report.json").read_text())["tables"]
    assert [row["cells"][0][0]["n"] for row in tables[0]["rows"]] == [1, 1]

    done = run(TOOL, *killed, "--status")
    assert done.returncode == 0 and "2 finished" in done.stdout
    done = run(TOOL, *killed)  # nothing is run again
    assert done.returncode == 0 and "2 of 2 runs are finished" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the runs' processes in /proc")
def test_classifiers_killed_and_resumed_end_with_the_numbers_of_whole_runs(tmp_path, monkeypatch):
    """A row of Table 2 of MoCo v2 (linear) and of A.7 (fine-tuning), from a tiny encoder."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    write_images(tmp_path / "datasets/imagenet")
    checkpoint = write_checkpoint(tmp_path / "c.pth.tar", "resnet18w0.25x")
    flags = {
        "arch": "resnet18w0.25x", "image_size": 32, "batch_size": 16, "epochs": 8, "workers": 0,
        "schedule": 6,
    }  # fmt: skip
    output = tmp_path / "output"
    arguments = [
        "--weights", f"v2_mlp_aug_cos={checkpoint}", f"moco_ig1b={checkpoint}", "--output", output,
        "--tables", "v2-2", "A7", "--jobs", 2, "--linear", *(f"{k}={v}" for k, v in flags.items()),
        "--opts", "MODEL.DEVICE", "cpu",
    ]  # fmt: skip
    rows = {
        "imagenet_linear/v2_mlp_aug_cos": ["--pretrained", checkpoint],
        "imagenet_finetune/moco_ig1b": ["--pretrained", checkpoint, "--finetune"],
    }
    folders = [output / "runs" / row / "trial1" for row in rows]
    scratch = output / "runs/imagenet_finetune/random/trial1"  # the third row is finished
    scratch.mkdir(parents=True)
    (scratch / "run.json").write_text('{"state": "finished"}')
    (scratch / "metrics.jsonl").write_text(
        '{"step": 24, "epoch": 8, "val_acc1": 50, "val_acc5": 99}'
    )
    with Command(TOOL, *arguments) as process:
        while not all((folder / "checkpoint_last.pth.tar").exists() for folder in folders):
            assert process.poll() is None
            time.sleep(0.02)
        kill(process, with_runs=True)
        process.wait()
    assert any(validations(folder)[-1]["epoch"] < 8 for folder in folders)
    done = run(TOOL, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr

    tables = json.loads((output / "report.json").read_text())["tables"]
    cells = {row["row"]: row["cells"][0][0] for table in tables for row in table["rows"]}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the runs have
    for (row, words), folder in zip(rows.items(), folders, strict=True):
        whole = tmp_path / "whole" / row
        words = [tmp_path / "datasets/imagenet", *words, "--seed", 1, "--output", whole]
        words += [word for k, v in flags.items() for word in (f"--{k.replace('_', '-')}", v)]
        classify(parse_linear(list(map(str, words))), torch.device("cpu"))
        assert validations(folder) == validations(whole)
        cell = cells[row.partition("/")[2]]
        assert cell["values"] == {"1": validations(whole)[-1]["val_acc1"]}
        assert "resumed" in (folder / "log.txt").read_text()
    torch.set_num_threads(threads)
    assert cells["v2_mlp_aug_cos"]["published"] == 67.5 and cells["moco_ig1b"]["published"] == 77.3
    gap = cells["moco_ig1b"]["from_reference"]["value"]
    assert gap == pytest.approx(cells["moco_ig1b"]["values"]["1"] - 50)

    done = run(TOOL, *arguments)  # nothing is run again
    assert done.returncode == 0 and "3 of 3 runs are finished" in done.stdout


def validations(folder) -> list[dict]:
    return [record for record in records(folder) if "val_acc1" in record]


def test_a_dry_run_says_how_rows_without_a_checkpoint_are_pretrained(capsys, tmp_path):
    code, out, _ = start(capsys, "--tables", "v2-1-linear", "--output", tmp_path, "--dry-run")
    assert code == 0 and "0 runs to do" in out
    assert (
        "  torchrun --nproc_per_node 8 pretrain/main.py IMAGENET --recipe "
        "configs/pretrain/moco_v1_r50.yaml --mlp --moco-t 0.2 --output output/pretrain/v2_mlp\n"
    ) in out
    assert out.count("torchrun") == 6


def test_runs_of_the_first_version_are_read(weights, repository, tmp_path, capsys):
    """See record_folders.py: row random is finished there."""
    output = tmp_path / "output"
    shutil.copytree(repository / "tests/golden/previous_version/reproduce", output)
    run = output / "runs/voc_R50_FCN16/random/trial1"
    for path in (run / "run.json", run / "config.yaml"):
        path.write_text(path.read_text().replace("{output}", str(output)))
    options = json.loads((run / "run.json").read_text())["identity"]["options"].items()
    changed = [word for key, value in options if "DATASETS" not in key for word in (key, value)]
    arguments = [
        "--quick", "--tables", "6-semantic", "--trials", "1", "--weights", f"moco={weights}",
        "--output", str(output), "--opts", *changed,
    ]  # fmt: skip

    def start(*more):
        with pytest.raises(SystemExit) as end:
            main([*arguments, *more])
        return end.value.code, *capsys.readouterr()

    code, out, _ = start("--status")
    assert code == 0 and out.splitlines()[-1] == "1 finished, 1 to do"
    assert start("--report")[0] == 0
    report = json.loads((output / "report.json").read_text())
    assert report["runs"][0]["results"]["sem_seg/mIoU"] == pytest.approx(0.5606581240881428)
    # It is finished with these settings only; nothing is drawn, for draw.done is there.
    arguments[arguments.index("SOLVER.MAX_ITER") + 1] = "3"
    code, out, err = start()
    assert code == 1 and "[1/" not in out
    assert "holds a trial with other settings (options was" in err


@pytest.mark.slow
def test_a_failed_run_is_reported_with_the_end_of_its_log(weights, tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        tasks.write_scenes(tmp_path / "data", split, 0, count)
    for path in (tmp_path / "data/scenes/JPEGImages").iterdir():
        path.write_bytes(path.read_bytes()[:300])  # the header is whole, the image is not
    (tmp_path / "draw.done").touch()
    done = run(
        TOOL, "--quick", "--tables", "6-semantic", "--trials", 1, "--weights", f"moco={weights}",
        "--output", tmp_path, "--retries", 2, "--opts", *SMALL,
    )  # fmt: skip
    assert done.returncode == 1
    assert "voc_R50_FCN16/random/trial1: exit code 1; the end of" in done.stdout
    assert re.search(r"\.jpg cannot be decoded: ", done.stdout)
    assert "2 failed" in (tmp_path / "report.md").read_text()
    assert "trying again" not in done.stdout  # it would be refused again
    record = tmp_path / "runs/voc_R50_FCN16/random/trial1/run.json"
    assert len(json.loads(record.read_text())["attempts"]) == 1


def start(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(list(map(str, arguments)))
    return end.value.code, *capsys.readouterr()


def test_problems_are_one_list_before_the_first_run(weights, tmp_path, capsys):
    for write in (tasks.write_scenes, tasks.write_hearts):
        write(tmp_path / "data", "test", 0, 2)  # no training images
    (tmp_path / "draw.done").touch()
    arguments = ["--quick", "--tables", "6-semantic", "5a", "--weights", f"moco={weights}"]
    arguments += ["--output", tmp_path, "--opts", *SMALL]
    code, out, err = start(capsys, *arguments)
    assert code == 1
    head, *lines = err.splitlines()
    assert head == "error: 2 problems to put right before any run is begun:"
    assert all(line.startswith("  ") and line.endswith(" more)") for line in lines)
    text = "\n".join(lines)
    assert "train.txt, which does not exist" in text and "keypoints_train.json" in text
    assert "(voc_R50_FCN16/random/trial1 and 3 more)" in text
    assert not (tmp_path / "runs").exists() and "report:" not in out


def test_a_dry_run_tells_the_same_problems(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = ["--tables", "2b", "--weights", weights, "--output", tmp_path / "out"]
    nothing = ({}, {})  # some are remote
    monkeypatch.setattr(preflight, "detectron2_weights", lambda path: nothing)
    code, _, listed = start(capsys, *arguments, "--dry-run")
    assert code == 0
    code, _, err = start(capsys, *arguments)
    assert code == 1 and err == listed
    assert "problems to put right before any run is begun:\n" in listed
    assert "no CUDA device" in listed
    assert "nowhere/VOC2007/JPEGImages, which does not exist" in listed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["--status", "--report", "--dry-run"])
@pytest.mark.parametrize("name", ["run.json", "metrics.json", "config.yaml"])
def test_one_damaged_folder_blocks_nothing(weights, tmp_path, capsys, mode, name):
    runs = [tmp_path / f"runs/voc_R50_FCN16/{row}/trial1" for row in ("random", "moco")]
    for folder in runs:
        folder.mkdir(parents=True)
        (folder / "run.json").write_text('{"state": "finished", "attempts": [], "seconds": 1}')
        (folder / "metrics.json").write_text('{"iteration": 3, "sem_seg/mIoU": 41.5}\n')
        (folder / "config.yaml").write_text("SOLVER: {MAX_ITER: 3, IMS_PER_BATCH: 2}\n")
    (runs[0] / name).write_bytes(bytes(64))
    arguments = ["--quick", "--tables", "6-semantic", "--trials", 1, "--output", tmp_path]
    code, out, err = start(capsys, *arguments, "--weights", f"moco={weights}", mode)
    assert code == 0
    if mode == "--report":
        text = (tmp_path / "report.md").read_text()
        assert "41.5" in text and "voc_R50_FCN16/random/trial1: unreadable: " in text
        return
    assert f"{runs[0] / name}" in (out if mode == "--status" else err)
    if mode == "--status":
        assert "1 unreadable, 1 finished" in out.splitlines()[-1]
        assert "voc_R50_FCN16/random/trial1: unreadable: " in out
