"""The pretraining command as a user runs it: launches, resumes, bad input."""

import contextlib
import itertools
import os
import re
import resource
import shutil
import signal
import time
from functools import partial

import cv2
import numpy as np
import pytest
import torch
from commands import IN_FLOAT64, Command, python, run, run_as_torchrun
from devices import DEVICES
from float64 import ROUNDING, assert_equal_but_for_rounding
from paths import REPOSITORY
from pretraining_runs import checkpoint, records, values
from same_bits import assert_same_bits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moco_det.common.errors import EXIT_INTERRUPTED, UserError
from moco_det.common.launch import free_local_url
from pretrain.engine import checkpoints, pretraining
from pretrain.engine.checkpoints import LAST
from pretrain.engine.device import compile_encoders
from pretrain.evaluation import knn
from pretrain.flags.pretraining import parse_pretraining
from pretrain.main import pretrain
from pretrain.moco.instance_discrimination import InstanceDiscrimination

FLAGS = [
    "-a", "resnet18w0.25x", "--image-size", "32", "-b", "16", "--moco-k", "40", "--moco-dim", "16",
    "--mlp", "--aug-plus", "--cos", "--epochs", "3", "-j", "1", "--seed", "7", "-p", "1",
]  # fmt: skip
EPOCHS = 3
STEPS = 9  # 3 epochs of 3 steps: 50 images in batches of 16


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """50 small noisy images, and DATA/val so that the kNN monitor runs."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for part, count in (("train", 25), ("val", 4)):
        for label in ("a", "b"):
            folder = root / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                cv2.imwrite(str(folder / f"{i}.png"), rng.integers(0, 256, (40, 40, 3)))
    return root


def command(images, output, *flags):
    return REPOSITORY / "pretrain/main.py", images, *FLAGS, "--output", output, *flags


@pytest.fixture(scope="module")
def whole_run(images, tmp_path_factory):
    """One uninterrupted run in one process with two BN groups: its output folder."""
    output = tmp_path_factory.mktemp("whole")
    done = run(*command(images, output, "--knn-every", "2"))
    assert done.returncode == 0, done.stderr
    return output


def test_a_run_writes_what_a_person_and_a_program_want(whole_run):
    state = checkpoint(whole_run)
    assert state["epoch"] == 3
    assert state["step"] == STEPS
    assert state["arch"] == "resnet18w0.25x"
    assert int(state["state_dict"]["module.queue_ptr"]) == STEPS * 16 % 40
    assert list(whole_run.glob("events.out.tfevents.*"))
    kept = sorted(path.name for path in whole_run.glob("checkpoint_0*"))
    assert kept == ["checkpoint_0001.pth.tar", "checkpoint_0002.pth.tar"]
    lines = records(whole_run)
    assert [line["epoch"] for line in lines if "knn_top1" in line] == [0, 2, 3]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert steps[0]["chance_loss"] == pytest.approx(np.log(41))
    assert [line["queue_fill"] for line in steps[:3]] == [0.4, 0.8, 1.0]
    assert all(-1 <= line["positive_similarity"] <= 1 for line in steps)
    assert all(0 <= line["data_wait"] <= 1 for line in steps)
    assert [line["lr"] for line in steps[::3]] == pytest.approx([0.03, 0.0225, 0.0075])


def test_two_processes_train_as_two_groups_do(images, tmp_path):
    flags = ("--epochs", "1", "--knn-every", "1")
    for output, launch in ((tmp_path / "one", run), (tmp_path / "two", run_as_torchrun)):
        done = launch(*IN_FLOAT64, *command(images, output, *flags))
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = (checkpoint(tmp_path / output)["state_dict"] for output in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        assert_equal_but_for_rounding(two[name], one[name], name)
    one, two = (values(tmp_path / output, "loss") for output in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=ROUNDING)


def test_the_official_launch_flags_run_on_a_cpu(images, tmp_path, whole_run):
    official = "--dist-url tcp://localhost:0 --multiprocessing-distributed --world-size 1 --rank 0"
    done = run(*command(images, tmp_path, "--knn-every", "2", *official.split()))
    assert done.returncode == 0, done.stderr
    assert_same_bits(
        checkpoint(tmp_path)["state_dict"], checkpoint(whole_run)["state_dict"], "state_dict"
    )


def test_views_finished_on_the_device_are_those_of_the_loading_processes(
    images, tmp_path, monkeypatch
):
    """To rounding, with any number of workers, also where a resumed run changes the way."""
    seen, inputs = [], InstanceDiscrimination.inputs

    def recorded(self, views, indices, seed, step):
        seen.extend(views)
        return inputs(self, views, indices, seed, step)

    monkeypatch.setattr(InstanceDiscrimination, "inputs", recorded)

    def views(name: str, workers: str, *ways: str) -> torch.Tensor:
        """Of a run whose epochs get their looks in these ways."""
        seen.clear()
        flags = [*FLAGS, "--output", str(tmp_path / name), "--knn-every", "0", "-j", workers]
        for epochs, way in enumerate(ways, start=1):
            flags += ["--epochs", str(epochs), "--augment-on", way]
            resume = ["--resume", "auto"] if epochs > 1 else []
            pretrain(parse_pretraining([str(images), *flags, *resume]), torch.device("cpu"))
        return torch.cat(seen).float()

    expected = views("cpu", "0", "cpu", "auto")  # on a CPU auto is cpu
    on_device = views("device", "1", "device", "device")
    assert 0 < (on_device - expected).abs().mean() < 0.2
    both = views("both", "0", "device", "cpu")
    half = len(both) // 2
    assert torch.equal(both[:half], on_device[:half])
    assert torch.equal(both[half:], expected[half:])


def test_a_monitor_without_memory_does_not_end_a_run(images, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 10.50 GiB")

    monkeypatch.setattr(knn, "nearest", fail)
    flags = [*FLAGS, "--output", str(tmp_path), "--epochs", "1", "--knn-every", "1", "-j", "0"]
    pretrain(parse_pretraining([str(images), *flags, "--knn-bank", "30"]), torch.device("cpu"))
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "kNN monitor is switched off: out of memory" in warnings[0]
    assert "--knn-bank N" in warnings[0]
    assert checkpoint(tmp_path)["epoch"] == 1


def wait_for_steps(process, count: int) -> None:
    """Read the run's output until `count` steps were reported."""
    steps = (line for line in process.stdout if line.startswith("epoch") and "loss" in line)
    assert len(list(itertools.islice(steps, count))) == count


def test_a_killed_run_resumes_to_the_same_bits(images, tmp_path, whole_run):
    flags = ("--knn-every", "2", "--save-steps", "2")
    whole = tmp_path / "whole"
    assert run(*command(images, whole, *flags)).returncode == 0
    killed = tmp_path / "killed"
    rng = np.random.default_rng()
    with Command(*command(images, killed, *flags)) as process:
        wait_for_steps(process, int(rng.integers(3, STEPS)))  # step 2 was saved before step 3
        time.sleep(float(rng.uniform(0, 0.2)))
    stopped_at = checkpoint(killed)["step"]
    assert 0 < stopped_at <= STEPS

    done = run(*command(images, killed, *flags, "--resume", "auto"))
    assert done.returncode == 0, done.stderr
    assert_same_bits(checkpoint(killed), checkpoint(whole))
    assert values(killed, "loss") == values(whole, "loss") == values(whole_run, "loss")


def die_before_the_last_epoch_is_kept():
    """Before a command."""
    keep = checkpoints.keep_epoch

    def kept(output, epoch, *others):
        if epoch == EPOCHS:
            os.kill(os.getpid(), signal.SIGKILL)
        keep(output, epoch, *others)

    checkpoints.keep_epoch = kept


def test_a_kill_at_the_end_of_an_epoch_loses_none_of_its_files(images, tmp_path, whole_run):
    arguments = command(images, tmp_path, "--knn-every", "2", "--resume", "auto")
    killed = run(*arguments, before=die_before_the_last_epoch_is_kept)
    assert killed.returncode == -signal.SIGKILL
    assert checkpoint(tmp_path)["epoch"] == EPOCHS
    for _ in range(2):  # the second time, nothing is missing
        assert run(*arguments).returncode == 0
        names = sorted(path.name for path in tmp_path.glob("checkpoint_*"))
        assert names == sorted(path.name for path in whole_run.glob("checkpoint_*"))
        assert_same_bits(checkpoint(tmp_path, names[-2]), checkpoint(whole_run))
        assert values(tmp_path, "knn_top1") == values(whole_run, "knn_top1")


def test_sigterm_saves_and_resumes_to_the_same_bits(images, tmp_path, whole_run):
    with Command(*command(images, tmp_path, "--knn-every", "2")) as process:
        wait_for_steps(process, 4)  # within the second epoch
        os.killpg(process.pid, signal.SIGTERM)  # the loader's workers hear it too
        process.stdout.read()
        assert process.wait() == EXIT_INTERRUPTED
    assert 4 <= checkpoint(tmp_path)["step"] < STEPS
    done = run(*command(images, tmp_path, "--knn-every", "2", "--resume", "auto"))
    assert done.returncode == 0, done.stderr
    assert_same_bits(checkpoint(tmp_path), checkpoint(whole_run))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("amp", ["auto", "fp16"])
def test_a_deterministic_run_resumes_to_the_same_bits_on_any_device(images, tmp_path, amp, device):
    flags = ["--deterministic", "--amp", amp, "--lr", "0.002", "--knn-every", "0", "-j", "0"]

    def train(name, *more):
        argv = [str(images), *FLAGS, *flags, "--output", str(tmp_path / name), *more]
        pretrain(parse_pretraining(argv), torch.device(device))

    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    try:
        train("whole")
        half = tmp_path / "whole" / "checkpoint_0001.pth.tar"
        train("resumed", "--resume", str(half))
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before
        torch.use_deterministic_algorithms(False)
    assert torch.load(half, weights_only=True)["step"] == 6
    states = [checkpoint(tmp_path / name) for name in ("resumed", "whole")]
    configs = [state.pop("config") for state in states]
    assert_same_bits(*states)
    precision = {"fp16": "fp16", "auto": "bf16" if device == "cuda" else "none"}[amp]
    assert [config["amp"] for config in configs] == [precision, precision]


def test_a_run_with_compiled_encoders_is_one_without(images, tmp_path, monkeypatch, capsys):
    """Its numbers to rounding, its files to their names; with the program of a CPU's compiler,
    which itself would take minutes."""
    monkeypatch.setattr(pretraining, "compile_encoders", partial(compile_encoders, backend="eager"))
    for choice in ("on", "off"):
        argv = [str(images), *FLAGS, "--epochs", "1", "-j", "0", "--compile", choice]
        argv += ["--output", str(tmp_path / choice), "--knn-every", "1"]
        pretrain(parse_pretraining(argv), torch.device("cpu"))
        printed = capsys.readouterr().out
        assert ("compiling the encoders" in printed) == (choice == "on")
    on, off = (checkpoint(tmp_path / choice)["state_dict"] for choice in ("on", "off"))
    assert on.keys() == off.keys()
    found, wanted = (values(tmp_path / choice, "loss") for choice in ("on", "off"))
    np.testing.assert_allclose(found[:2], wanted[:2], rtol=0.02)
    assert len(values(tmp_path / "on", "knn_top1")) == 2


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


def test_a_full_disk_leaves_the_previous_checkpoint(images, tmp_path):
    assert run(*command(images, tmp_path, "--epochs", "1")).returncode == 0
    before = (tmp_path / LAST).read_bytes()
    done = run(*command(images, tmp_path, "--resume", "auto"), before=limit_file_size)
    assert done.returncode == 1
    assert "could not save" in done.stderr
    assert "is intact" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / LAST).read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))


def test_official_layout_resumes(images, tmp_path, whole_run):
    """A file as main_moco.py writes it: four entries, no position within the epoch."""
    ours = checkpoint(whole_run)
    official = {key: ours[key] for key in ("arch", "state_dict", "optimizer")} | {"epoch": 2}
    torch.save(official, tmp_path / "checkpoint_0001.pth.tar")
    done = run(*command(images, tmp_path, "--resume", tmp_path / "checkpoint_0001.pth.tar"))
    assert done.returncode == 0, done.stderr
    assert "epoch 2, step 6" in done.stdout
    assert checkpoint(tmp_path)["epoch"] == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bn-groups", "1"], "at least two BN groups"),
        (["-b", "64"], "50 images .* fewer than the global batch of 64"),
        (["--lr", "1e30"], "the loss is nan at step .* none is saved yet"),
        (["--resume", "absent.pth.tar"], "no checkpoint at absent.pth.tar"),
        (["-a", "resnet1"], "unknown --arch resnet1"),
    ],
    ids=["groups", "batch", "nan", "resume", "arch"],
)
def test_bad_input_is_named(images, tmp_path, flags, message):
    argv = [str(images), *FLAGS, "-j", "0", "--knn-every", "0", "--output", str(tmp_path), *flags]
    with pytest.raises(UserError, match=message):
        pretrain(parse_pretraining(argv), torch.device("cpu"))


def test_an_error_is_one_line_without_traceback(tmp_path):
    done = python(*command(tmp_path / "absent", tmp_path / "output"))
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: no such folder")


def test_a_checkpoint_of_another_architecture_is_refused(images, tmp_path, whole_run):
    flags = ["-a", "resnet34", "--resume", str(whole_run / LAST), "--output", str(tmp_path)]
    with pytest.raises(UserError, match="holds a resnet18w0.25x, not a resnet34"):
        pretrain(parse_pretraining([str(images), *FLAGS, *flags]), torch.device("cpu"))


def test_corrupt_images_are_replaced_up_to_a_share(images, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for i, path in enumerate(sorted((images / "train").rglob("*.png"))):
        content = path.read_bytes()
        (data / f"{i:02d}.png").write_bytes(content if i else content[:300])
    argv = [str(data), *FLAGS, "--epochs", "1", "-b", "25", "--bn-groups", "5", "-j", "0"]
    argv += ["--output", str(tmp_path / "output")]
    pretrain(parse_pretraining([*argv, "--max-unreadable", "0.02"]), torch.device("cpu"))
    printed = capsys.readouterr().out
    assert "warning: unreadable image 1: " in printed
    assert "00.png: truncated file" in printed
    with pytest.raises(UserError, match="1 of 50 images .* than --max-unreadable 0.01 allows"):
        pretrain(parse_pretraining([*argv, "--overwrite"]), torch.device("cpu"))


# -- data as people have it -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def half_run(images, tmp_path_factory):
    """Stopped within its second epoch: its output folder."""
    output = tmp_path_factory.mktemp("half")
    flags = ["--knn-every", "0", "--iterations", "5", "--save-steps", "5"]
    done = run(*command(images, output, *flags))
    assert done.returncode == 0, done.stderr
    assert checkpoint(output)["step_in_epoch"] == 2
    return output


@pytest.mark.parametrize("change", ["fewer", "others"])
def test_images_that_changed_since_the_checkpoint_are_refused(images, half_run, tmp_path, change):
    """With half of the images the run ended with code 0 and without a step."""
    data = shutil.copytree(images, tmp_path / "data")
    paths = sorted((data / "train").rglob("*.png"))
    for path in paths[:25] if change == "fewer" else paths[:1]:
        path.unlink() if change == "fewer" else path.rename(path.with_name("other.png"))
    output = shutil.copytree(half_run, tmp_path / "run")
    flags = [*command(data, output, "--knn-every", "0", "--keep", "3", "--resume", "auto")]
    done = run(*flags)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    count = 25 if change == "fewer" else 50
    for word in (LAST, "images 50 hash", f"here images {count} hash", "--restart-epoch"):
        assert word in line
    done = run(*flags, "--restart-epoch")
    assert done.returncode == 0, done.stderr
    assert "at epoch 1, step 5" in done.stdout
    state = checkpoint(output)
    assert (state["epoch"], state["step_in_epoch"]) == (3, 0)
    assert state["step"] == 5 + 2 * (count // 16)
    assert state["data"]["images"] == count
    assert checkpoint(output, "checkpoint_0000.pth.tar")["step"] == 3  # is still its own


def test_the_same_images_elsewhere_and_earlier_checkpoints_go_on(images, half_run, tmp_path):
    data = shutil.copytree(images, tmp_path / "data")
    bits = []
    for name in ("now", "before"):
        output = shutil.copytree(half_run, tmp_path / name)
        state = checkpoint(output)
        if name == "before":  # as an earlier version wrote it
            state["data"] = {}
            torch.save(state, output / LAST)
        argv = [str(data), *FLAGS, "-j", "0", "--knn-every", "0", "--output", str(output)]
        pretrain(parse_pretraining([*argv, "--resume", "auto"]), torch.device("cpu"))
        bits.append(checkpoint(output)["state_dict"])
    assert_same_bits(bits[1], bits[0])
    state["step_in_epoch"] = 4
    torch.save(state, output / LAST)
    with pytest.raises(UserError, match="after step 4 of an epoch, which has 3 steps"):
        pretrain(parse_pretraining([*argv, "--resume", "auto"]), torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: (data / "train/a/0.png").unlink(), "process 1 sees other data .* images 49 "),
        (lambda data: (data / "val/a/0.png").unlink(), "no kNN monitor: process 1 sees other data"),
        (lambda data: shutil.rmtree(data / "val"), "no kNN monitor: .* lacks class folders"),
        (shutil.rmtree, "no such folder"),
    ],
    ids=["fewer", "val", "no val", "nothing"],
)
def test_processes_that_see_other_data_are_told(images, tmp_path, change, message):
    """They waited for each other for ever."""
    other = shutil.copytree(images, tmp_path / "other")
    change(other)
    flags = ["--world-size", "2", "--dist-url", free_local_url(), "--epochs", "1", "-j", "0"]
    with contextlib.ExitStack() as stack:
        pair = [
            stack.enter_context(
                Command(*command(data, tmp_path / "output", *flags, "--rank", rank))
            )
            for rank, data in enumerate((images, other))
        ]
        printed = [process.stdout.read() for process in pair]
        codes = [process.wait(60) for process in pair]
    stays = "no kNN monitor" in message
    assert codes == ([0, 0] if stays else [1, 1]), printed
    for text in printed[:1] if stays else printed:
        assert re.search(message, text), text
        assert "Traceback" not in text


@pytest.mark.parametrize("steps", [2, 5], ids=["before a checkpoint", "after one"])
def test_tensorboard_shows_each_step_once_after_a_kill(images, tmp_path, steps):
    arguments = command(images, tmp_path, "--knn-every", "1", "--resume", "auto")
    with Command(*arguments) as process:
        wait_for_steps(process, steps)
        process.kill()
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    shown = [event.step for event in board.Scalars("features/knn_top1")]
    assert shown == [0, 3, 6, 9]
    assert sorted({event.step for event in board.Scalars("pretext/loss")}) == list(
        range(1, STEPS + 1)
    )
    assert len(board.Scalars("pretext/loss")) == STEPS


def test_the_knn_monitor_never_stops_a_run(images, tmp_path):
    """Classes that train lacks; nothing in val that can be read."""
    odd, broken = (shutil.copytree(images, tmp_path / name) for name in ("odd", "broken"))
    (odd / "val" / "b").rename(odd / "val" / "c")
    for path in (broken / "val").rglob("*.png"):
        path.write_bytes(b"broken")
    for data, said in (
        (odd, "warning: no kNN monitor: .*val has class folder.*'c'"),
        (broken, "warning: the kNN monitor is switched off: no image in .*val can be read"),
    ):
        flags = ["--epochs", "1", "--knn-every", "1"]
        done = run(*command(data, tmp_path / f"{data.name}_run", *flags))
        assert done.returncode == 0, done.stderr
        assert len(re.findall(said, done.stdout)) == 1, done.stdout
        assert values(tmp_path / f"{data.name}_run", "knn_top1") == []


def test_folders_as_people_have_them(images, tmp_path):
    """Hidden files, a loop of links, names that are not UTF-8, of which one is unreadable."""
    data = shutil.copytree(images, tmp_path / os.fsdecode(b"caf\xe9"))
    for name in (".ipynb_checkpoints/0.png", "a/._0.png"):
        (data / "train" / name).parent.mkdir(exist_ok=True)
        (data / "train" / name).write_bytes(b"no image")
    (data / "train" / "a" / "loop").symlink_to(data / "train")
    os.rename(data / "train" / "b", os.fsencode(data / "train") + b"/\xff")
    os.rename(data / "val" / "b", os.fsencode(data / "val") + b"/\xff")
    unreadable = os.fsencode(data / "train") + b"/\xff/\xfe.png"
    with open(unreadable, "wb") as file:
        file.write(b"no image")
    flags = ["--epochs", "1", "--knn-every", "1", "--max-unreadable", "0.05", "-b", "50"]
    flags += ["--bn-groups", "5"]
    done = run(*command(data, tmp_path / os.fsdecode(b"out\xe9"), *flags))
    assert done.returncode == 1
    assert "name is not UTF-8" in done.stderr
    assert "Traceback" not in done.stderr
    output = tmp_path / "output"
    done = run(*command(data, output, *flags))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "51 images" in done.stdout
    assert "\\udcff/\\udcfe.png: not an image" in done.stdout
    assert done.stdout.count("left out below") == 1
    assert values(output, "knn_top1")


def test_the_limit_on_pixels_is_a_flag(images, tmp_path):
    argv = [str(images), *FLAGS, "--epochs", "1", "-j", "0", "--output", str(tmp_path)]
    with pytest.raises(UserError, match=r"images are unreadable.*more than 1,598 pixels"):
        pretrain(parse_pretraining([*argv, "--max-image-pixels", "1598"]), torch.device("cpu"))
    pretrain(parse_pretraining([*argv, "--max-image-pixels", "1600"]), torch.device("cpu"))
