"""What becomes of errors and exit codes of a run's processes."""

import os
import signal
import threading
import time

import pytest

from moco_det.common import processes as comm
from moco_det.common.errors import UserError
from moco_det.common.launch import free_local_url, launch, process_group


def talk(folder):
    rows = comm.gather_rows([float(comm.rank()), 7.0])
    shares = comm.gather_objects([comm.rank()] * 2)
    told = comm.from_main(f"from {comm.rank()}")
    with open(f"{folder}/{comm.rank()}", "w") as file:
        file.write(repr((comm.world_size(), rows.tolist(), shares, told)))


def test_processes_talk_to_each_other(tmp_path):
    launch(talk, num_gpus=2, args=(str(tmp_path),))
    rows = [[0.0, 7.0], [1.0, 7.0]]
    assert (tmp_path / "0").read_text() == repr((2, rows, [[0, 0], [1, 1]], "from 0"))
    assert (tmp_path / "1").read_text() == repr((2, rows, [], "from 0"))


def test_one_process_is_this_one(tmp_path):
    launch(talk, num_gpus=1, args=(str(tmp_path),))
    assert (tmp_path / "0").read_text() == repr((1, [[0.0, 7.0]], [[0, 0]], "from 0"))


def test_a_run_on_the_cpu_takes_no_gpu(monkeypatch):
    """Its processes may be more than the GPUs of the machine."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", lambda index: pytest.fail("takes a GPU"))
    with process_group(free_local_url(), 0, 1, local_rank=5, backend=None):
        assert comm.gather_rows([1.0]).tolist() == [[1.0]]


def fail_on_second_process():
    comm.synchronize()
    if comm.rank() == 1:
        raise UserError("only the second process knows")
    comm.synchronize()


@pytest.mark.usefixtures("forked_launches")
def test_the_error_of_any_process_is_raised():
    with pytest.raises(UserError, match="only the second process knows"):
        launch(fail_on_second_process, num_gpus=2)


def stop_on_sigterm():
    received = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: received.set())
    comm.synchronize()
    if comm.rank() == 0:
        os.kill(os.getppid(), signal.SIGTERM)
    while not received.is_set():
        time.sleep(0.01)
    comm.synchronize()
    raise SystemExit(75)


def test_sigterm_reaches_the_processes_and_their_exit_code_comes_back():
    with pytest.raises(SystemExit) as stopped:
        launch(stop_on_sigterm, num_gpus=2)
    assert stopped.value.code == 75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_gpus": 0}, "--num-gpus 0"),
        ({"num_gpus": 1, "num_machines": 2, "machine_rank": 2}, "--machine-rank 2"),
        ({"num_gpus": 1, "num_machines": 2}, "--dist-url"),
    ],
)
def test_impossible_launches_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        launch(talk, **arguments)
