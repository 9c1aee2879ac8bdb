"""How the commands end: killed workers, signals, folders in use, places that cannot be written to.

Real processes; a test waits for what they print, never for a time.
"""

import errno
import itertools
import os
import re
import resource
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from commands import Command, run
from noisy_colours import write_checkpoint
from paths import CONFIGS, REPOSITORY
from pretraining_runs import checkpoint, values

from moco_det.common import ending
from pretrain.engine import checkpoints, trainer
from pretrain.engine.checkpoints import LAST
from pretrain.evaluation import knn

ARCH = "resnet18w0.25x"
FLAGS = [
    "-a", ARCH, "--image-size", "32", "-b", "16", "--seed", "7", "-p", "1", "-j", "0",
]  # fmt: skip
PRETRAINING = [*FLAGS, "--moco-k", "40", "--moco-dim", "16", "--knn-every", "0"]
NOBODY = 2**22 + 1  # above the highest process id of Linux
SOON = 30  # seconds, for what takes one on an idle machine; nothing here may take for ever


def pretraining(images, output, *flags):
    return "pretrain/main.py", images, *PRETRAINING, "--output", output, *flags


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("narrow") / "checkpoint.pth.tar", ARCH)


def training_commands(images, narrow, output):
    """Each command that trains, never ending, with a loader's two workers."""
    forever = ("--epochs", "100000", "-j", "2", "--output", output)
    return {
        "main": ("pretrain/main.py", images, *PRETRAINING, *forever),
        "linear": ("pretrain/linear.py", images, *FLAGS, "--pretrained", narrow, *forever),
    }


def wait_for_steps(process, count: int) -> None:
    steps = (line for line in process.stdout if "loss" in line and line.startswith("epoch"))
    assert len(list(itertools.islice(steps, count))) == count


def workers_of(process) -> list[int]:
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in text.split()]


def one_error(text: str) -> str:
    """The error, which is one line."""
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    return line


# -- signals and killed processes -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["main", "linear"])
def test_a_killed_worker_ends_the_run(images, narrow, tmp_path, name):
    with Command(*training_commands(images, narrow, tmp_path)[name]) as process:
        wait_for_steps(process, 1)
        os.kill(workers_of(process)[0], signal.SIGKILL)
        printed = process.stdout.read()
        assert process.wait(SOON) == 1
    assert "data loading process" in one_error(printed)
    assert "where memory runs out: pass fewer --workers" in one_error(printed)


def fail_at_third_report():
    """Before a command: a bug, while the loader's workers are there."""
    write = trainer.RunLog.write

    def fail(log, step, record):
        if step == 3:
            raise ZeroDivisionError
        write(log, step, record)

    trainer.RunLog.write = fail


def test_any_other_exception_ends_it_as_well(images, narrow, tmp_path):
    command = training_commands(images, narrow, tmp_path)["main"]
    with Command(*command, before=fail_at_third_report) as process:
        printed = process.stdout.read()
        assert process.wait(SOON) == 1
    assert "ZeroDivisionError" in printed


@pytest.mark.parametrize("name", ["main", "linear"])
@pytest.mark.parametrize("whom", ["process", "group"])
def test_ctrl_c_saves_and_is_130(images, narrow, tmp_path, name, whom):
    """A terminal sends it to the group: the loader's workers hear it too."""
    with Command(*training_commands(images, narrow, tmp_path)[name]) as process:
        wait_for_steps(process, 2)
        send = os.kill if whom == "process" else os.killpg
        send(process.pid, signal.SIGINT)
        printed = process.stdout.read()
        assert process.wait(SOON) == 130
    saved = checkpoint(tmp_path)["step"]
    assert f"Ctrl-C: saved {tmp_path / LAST} at step {saved}" in printed
    assert "Traceback" not in printed


def wait_in_features():
    """Before a command: the images of a split never come."""

    def hang(monitor, encoder):
        print("reading", flush=True)
        while True:
            time.sleep(1)

    knn.KnnMonitor.top1 = hang


def test_ctrl_c_where_there_is_nothing_to_save(images, narrow, tmp_path):
    flags = ["-a", ARCH, "--image-size", "32", "-j", "2", "--pretrained", narrow]
    flags += ["--output", tmp_path / "knn.json"]
    with Command("pretrain/knn.py", images, *flags, before=wait_in_features) as process:
        assert "reading\n" in process.stdout
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.read().splitlines()[-1:] == ["interrupted"]
        assert process.wait(SOON) == 130
    assert list(tmp_path.iterdir()) == []


def hang_at_third_report():
    """Before a command: a step that never ends, as on a file system that does not answer."""

    def hang(log, step, record):
        if step == 3:
            print("hanging", flush=True)
            while True:
                time.sleep(1)

    trainer.RunLog.write = hang


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(images, narrow, tmp_path, number):
    command = training_commands(images, narrow, tmp_path)["main"]
    with Command(*command, before=hang_at_third_report) as process:
        assert "hanging\n" in process.stdout
        workers = workers_of(process)
        os.kill(process.pid, number)
        time.sleep(ending.AGAIN + 0.1)  # nearer ones are one request
        os.kill(process.pid, number)
        assert "ended at once by a second" in process.stdout.read()
        assert process.wait(SOON) == 128 + number
    assert len(workers) == 2
    assert not any(Path(f"/proc/{pid}/fd/0").exists() for pid in workers)


def test_a_killed_process_of_a_launch_is_named(images, tmp_path):
    launch = ("--multiprocessing-distributed", "--world-size", "1", "--rank", "0")
    with Command(*pretraining(images, tmp_path, *launch, "--epochs", "100000")) as process:
        wait_for_steps(process, 1)
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        (rank,) = [pid for pid in pids if pid != process.pid and group_of(pid) == process.pid]
        os.kill(rank, signal.SIGKILL)
        printed = process.stdout.read()
        assert process.wait(SOON) == 1
    assert "the process of rank 0 was killed by SIGKILL" in one_error(printed)


def under_torchrun(script, *arguments) -> Command:
    """The command in two processes of torchrun, which is run itself."""
    launcher = ("torch/distributed/run.py", "--standalone", "--nproc_per_node", "2")
    path = Path(torch.__file__).parent.parent / launcher[0]
    return Command(path, *launcher[1:], REPOSITORY / script, *arguments)


def test_torchrun_has_an_exit_code_of_its_own_when_a_run_was_stopped_and_saved(images, tmp_path):
    with under_torchrun(*pretraining(images, tmp_path, "--epochs", "100000")) as torchrun:
        wait_for_steps(torchrun, 1)
        torchrun.terminate()
        printed = torchrun.stdout.read()
        assert torchrun.wait(SOON) == 1
    said = f"SIGTERM: saved {tmp_path / LAST} at step {checkpoint(tmp_path)['step']}"
    assert printed.splitlines().count(said) == 1
    assert "exitcode" not in printed


def test_torchrun_tells_the_exit_codes_of_processes_that_have_failed():
    with under_torchrun("pretrain/main.py", "no-such-data") as torchrun:
        printed = torchrun.stdout.read()
        assert torchrun.wait(SOON) == 1
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert set(errors) == {"error: no such folder: no-such-data (DATA is a folder of images)"}
    assert "exitcode  : 1 " in printed


def group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


# -- the output folder ----------------------------------------------------------------------------


def test_two_classifiers_cannot_share_a_folder(images, narrow, tmp_path):
    flags = [*FLAGS, "--pretrained", narrow, "--output", tmp_path, "--epochs", "100000"]
    with Command("pretrain/linear.py", images, *flags) as first:
        wait_for_steps(first, 1)
        second = run("pretrain/linear.py", images, *flags, "--resume", "auto")
        assert second.returncode == 1
        assert f"is in use by process {first.pid} on " in one_error(second.stderr)


def test_two_runs_cannot_share_a_folder(images, tmp_path):
    with Command(*pretraining(images, tmp_path, "--epochs", "100000")) as first:
        wait_for_steps(first, 1)
        second = run(*pretraining(images, tmp_path, "--resume", "auto"))
        assert second.returncode == 1
        assert f"is in use by process {first.pid} on " in one_error(second.stderr)
        wait_for_steps(first, 1)  # it goes on
    after = run(*pretraining(images, tmp_path, "--resume", "auto", "--epochs", "1"))
    assert after.returncode == 0, after.stderr


def test_a_new_run_does_not_mix_with_an_earlier_one(images, tmp_path):
    left = tmp_path / f".checkpoint_last.pth.{NOBODY}.tmp.tar"
    left.write_text("half of it")
    assert run(*pretraining(images, tmp_path, "--epochs", "3")).returncode == 0
    assert not left.exists()
    before = sorted(path.name for path in tmp_path.iterdir())

    refused = run(*pretraining(images, tmp_path, "--epochs", "1"))
    assert refused.returncode == 1
    assert "--resume auto, begin anew with --overwrite" in one_error(refused.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == before

    again = run(*pretraining(images, tmp_path, "--epochs", "1", "--overwrite"))
    assert again.returncode == 0, again.stderr
    kept = sorted(path.name for path in tmp_path.glob("checkpoint_*"))
    assert kept == ["checkpoint_0000.pth.tar", LAST]
    assert max(values(tmp_path, "epoch")) == 1
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def test_a_return_to_an_earlier_epoch_prunes_no_later_one(images, tmp_path):
    assert run(*pretraining(images, tmp_path, "--epochs", "4", "--keep", "4")).returncode == 0
    first = tmp_path / "checkpoint_0000.pth.tar"
    flags = ("--epochs", "2", "--keep", "1", "--resume", first)
    done = run(*pretraining(images, tmp_path, *flags))
    assert done.returncode == 0, done.stderr
    numbers = sorted(path.name[11:15] for path in tmp_path.glob("checkpoint_0*"))
    assert numbers == ["0001", "0002", "0003"]


def test_a_run_that_counts_from_1_goes_on_to_do_so(images, tmp_path):
    """As runs did before we took over the official names."""
    assert run(*pretraining(images, tmp_path, "--epochs", "2", "--keep", "1")).returncode == 0
    (tmp_path / "checkpoint_0001.pth.tar").unlink()
    state = checkpoint(tmp_path)
    del state["numbered_from"]
    for name in (LAST, "checkpoint_0002.pth.tar"):
        torch.save(state, tmp_path / name)
    done = run(*pretraining(images, tmp_path, "--epochs", "4", "--resume", "auto"))
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in tmp_path.glob("checkpoint_0*"))
    assert names == ["checkpoint_0003.pth.tar", "checkpoint_0004.pth.tar"]
    flags = ("--resume", tmp_path / names[0], "--epochs", "3")
    assert f"of epoch 3: its run counts from 1 and has {names[1]}" in (
        run(*pretraining(images, tmp_path, *flags)).stdout
    )


def no_hard_links():
    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    checkpoints.os.link = refuse


def test_a_file_system_without_hard_links(images, tmp_path):
    done = run(*pretraining(images, tmp_path, "--epochs", "1"), before=no_hard_links)
    assert done.returncode == 0, done.stderr
    numbered, last = tmp_path / "checkpoint_0000.pth.tar", tmp_path / LAST
    assert numbered.read_bytes() == last.read_bytes()
    assert not numbered.samefile(last)


# -- places that cannot be written to -------------------------------------------------------------


def tiny_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


PLACES = [
    ("pretrain/main.py no-data --output PLACE", "--output"),
    ("pretrain/linear.py no-data --pretrained random --output PLACE", "--output"),
    ("pretrain/knn.py no-data --pretrained random --output PLACE/x.json", "--output"),
    ("tools/train_net.py --engine native --config-file CONFIG OUTPUT_DIR PLACE", "OUTPUT_DIR"),
    ("tools/convert_to_d2.py no-checkpoint PLACE/weights.pkl", "OUT"),
    ("tools/visualize.py --dataset no-data --output PLACE", "--output"),
    ("tools/reproduce.py --quick --tables 6-semantic --output PLACE", "--output"),
    ("tools/quickstart.py --output PLACE", "--output"),
]


def refusal_of(command: str, place: Path, **options) -> str:
    config = str(CONFIGS / "voc_R50_C4_24k_moco.yaml")
    command = command.replace("PLACE", str(place)).replace("CONFIG", config)
    done = run(*command.split(), **options)
    assert done.returncode == 1
    return one_error(done.stderr)


@pytest.mark.parametrize(("command", "flag"), PLACES)
def test_a_full_disk_is_found_before_the_data_is_looked_at(tmp_path, command, flag):
    said = refusal_of(command, tmp_path, before=tiny_disk)
    assert said == f"error: cannot write to {flag} {tmp_path}: File too large"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("command", "flag"), PLACES)
def test_a_place_where_nothing_may_be_made_is_found_first(command, flag):
    """A file system of the kernel, where root may not make a folder either."""
    said = refusal_of(command, Path("/sys/kernel/results"))
    assert said.startswith(f"error: cannot write to {flag} /sys/kernel/results")


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("pretrain/main.py no-data --output PLACE", "--output"),
        ("pretrain/linear.py no-data --pretrained random --output PLACE", "--output"),
        ("pretrain/knn.py no-data --pretrained random --output PLACE", "--output"),
        ("pretrain/knn.py no-data --pretrained random --output nofolder/x.json", "--output"),
        ("tools/train_net.py --engine native --config-file CONFIG OUTPUT_DIR PLACE", "OUTPUT_DIR"),
        ("tools/convert_to_d2.py no-checkpoint PLACE/weights.pkl", "OUT"),
        ("tools/visualize.py --dataset no-data --output PLACE", "--output"),
        ("tools/reproduce.py --quick --tables 6-semantic --output PLACE", "--output"),
        ("tools/quickstart.py --output PLACE", "--output"),
    ],
)
def test_a_path_through_a_file_is_found_first(tmp_path, command, flag):
    (tmp_path / "file").write_text("")
    config = str(CONFIGS / "voc_R50_C4_24k_moco.yaml")
    command = command.replace("PLACE", str(tmp_path / "file" / "x")).replace("CONFIG", config)
    done = run(*command.split())
    assert done.returncode == 1
    assert one_error(done.stderr).startswith(f"error: cannot write to {flag} ")


# -- flags that cannot meet -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("main.py --world-size 2 --rank 0", "--world-size 2 needs --dist-url tcp://HOST:PORT"),
        ("main.py --world-size 2 --dist-url tcp://h:1", "--world-size 2 needs --rank"),
        ("main.py --world-size 2 --rank 2 --dist-url tcp://h:1", "--rank 2: ranks go from 0"),
        ("main.py --world-size 2 --rank 1 --dist-url h:x", "the form is tcp://HOST:PORT"),
        (
            "main.py --multiprocessing-distributed --world-size 2 --rank 0",
            "--world-size 2 needs --dist-url",
        ),
        ("main.py --seed -1", "--seed -1: it takes numbers from 0"),
        ("main.py -j -1", "--workers -1: it takes numbers from 0"),
        ("main.py --wd -1", "--weight-decay -1.0: it takes numbers from 0"),
        ("main.py --start-epoch 3 --epochs 3", "--start-epoch 3: there are --epochs 3"),
        ("main.py --resume auto --overwrite", "pass one of them"),
        ("linear.py --seed -1", "--seed -1: it takes numbers from 0"),
        ("linear.py --momentum -0.5", "--momentum -0.5: it takes numbers from 0"),
        ("knn.py --pretrained random -j -1", "--workers -1: it takes numbers from 0"),
        ("main.py --moco-kk 3", "--moco-kk; did you mean --moco-k?"),
        ("knn.py --pretrain random", "--pretrain; did you mean --pretrained?"),
    ],
)
def test_flags_that_cannot_meet_are_one_line(tmp_path, command, words):
    script, *flags = command.split()
    done = run(f"pretrain/{script}", "no-such-data", *flags)
    assert done.returncode in (1, 2)
    assert words in one_error(done.stderr)
    assert done.stdout == ""


@pytest.mark.parametrize(
    "command",
    [
        "pretrain/main.py no-data --multiprocessing-distributed --world-size 1 --rank 0",
        "pretrain/main.py no-data --world-size 2 --rank 0",
        "tools/train_net.py --engine native --config-file CONFIG --num-gpus 2 MODEL.DEVICE cpu",
    ],
)
def test_a_port_in_use_is_one_line(command):
    command = command.replace("CONFIG", str(CONFIGS / "voc_R50_C4_24k_moco.yaml"))
    script, *words = command.split()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        url = f"tcp://localhost:{taken.getsockname()[1]}"
        at = words.index("MODEL.DEVICE") if "MODEL.DEVICE" in words else len(words)
        done = run(script, *words[:at], "--dist-url", url, *words[at:])
    assert done.returncode == 1
    assert re.search(f"--dist-url {url}: port [0-9]+ is in use", one_error(done.stderr))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("pretrain/main.py no-data --gpu 0", "--gpu 0: torch finds no GPU"),
        ("pretrain/linear.py no-data --pretrained random --gpu 0", "--gpu 0: torch finds no GPU"),
        ("pretrain/knn.py no-data --pretrained random --gpu 0", "--gpu 0: torch finds no GPU"),
        (
            "tools/train_net.py --engine native --config-file CONFIG --num-gpus 8",
            "--num-gpus 8: torch finds no GPU here; with MODEL.DEVICE cpu",
        ),
    ],
)
def test_gpus_that_are_not_there_are_not_replaced_silently(command, words):
    config = str(CONFIGS / "voc_R50_C4_24k_moco.yaml")
    done = run(*command.replace("CONFIG", config).split())
    assert done.returncode == 1
    assert words in one_error(done.stderr)


# -- advice ---------------------------------------------------------------------------------------


def test_a_queue_that_never_fills_is_told_at_the_start(images, tmp_path):
    flags = ("--epochs", "2", "--moco-k", "65536")
    done = run(*pretraining(images, tmp_path, *flags))
    assert done.returncode == 0, done.stderr
    said = "doctor: the queue never fills: --moco-k 65536 is more than the 96 keys of all 6 steps"
    lines = done.stdout.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith(said)]
    assert at < min(number for number, line in enumerate(lines) if line.startswith("epoch"))


@pytest.mark.parametrize(("lr", "told"), [("30", True), ("1.9", False)])
def test_a_linear_rate_for_another_batch_is_told_at_the_start(images, narrow, tmp_path, lr, told):
    flags = [*FLAGS, "--pretrained", narrow, "--epochs", "1", "--output", tmp_path, "--lr", lr]
    done = run("pretrain/linear.py", images, *flags)
    assert done.returncode == 0, done.stderr
    advice = re.findall(r"^advice: --lr 30 is 16 times the 1\.9 that", done.stdout, re.MULTILINE)
    assert bool(advice) == told
