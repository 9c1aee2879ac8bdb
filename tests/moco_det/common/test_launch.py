"""What becomes of errors and exit codes of a run's processes."""

import os
import signal
import socket
import threading
import time

import pytest
from torch.multiprocessing import ProcessRaisedException

from moco_det.common import launch as launching
from moco_det.common import processes as comm
from moco_det.common.errors import UserError
from moco_det.common.launch import check_url, free_local_url, launch, process_group


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


def killed(signum, others_wait):
    comm.synchronize()
    if comm.rank() == 1:
        os.kill(os.getpid(), signum)
    if others_wait:
        time.sleep(100)
    comm.synchronize()


@pytest.mark.usefixtures("forked_launches")
@pytest.mark.parametrize(
    ("signum", "words", "others_wait"),
    [
        (signal.SIGKILL, "rank 1 was killed by SIGKILL, as the kernel does where memory", False),
        (signal.SIGSEGV, "rank 1 was killed by SIGSEGV; the run's other processes", True),
    ],
)
def test_a_killed_process_is_named_and_the_others_end(monkeypatch, signum, words, others_wait):
    monkeypatch.setattr(launching, "GRACE", 0.2)
    with pytest.raises(UserError, match=words):
        launch(killed, num_gpus=2, args=(signum, others_wait))


def fail_with_a_bug():
    comm.synchronize()
    if comm.rank() == 1:
        print([][1])
    comm.synchronize()


@pytest.mark.usefixtures("forked_launches")
def test_a_bug_in_one_process_is_shown_rather_than_its_consequences():
    with pytest.raises(ProcessRaisedException, match=r"rank 1 raised:(.|\n)*IndexError"):
        launch(fail_with_a_bug, num_gpus=2)


def stop_on_request(pid):
    with comm.StopRequest() as stop:
        comm.synchronize()
        if comm.rank() == 0:
            os.kill(pid, signal.SIGINT)
        while not stop.agreed():
            pass
    comm.end_run(stop.received, "all of it")


@pytest.mark.usefixtures("forked_launches")
def test_ctrl_c_reaches_the_processes_which_save(capfd):
    with pytest.raises(SystemExit) as stopped:
        launch(stop_on_request, num_gpus=2, args=(os.getpid(),))
    assert stopped.value.code == 130
    assert capfd.readouterr() == ("Ctrl-C: saved all of it\n", "")


def interrupt(pid):
    comm.synchronize()
    if comm.rank() == 0:
        os.kill(pid, signal.SIGINT)
    time.sleep(100)


@pytest.mark.usefixtures("forked_launches")
def test_ctrl_c_ends_processes_that_have_nothing_to_save():
    with pytest.raises(KeyboardInterrupt):
        launch(interrupt, num_gpus=2, args=(os.getpid(),))


@pytest.mark.parametrize("url", ["tcp://host", "tcp://:29500", "tcp://host:99999", "tcp://h:x"])
def test_an_address_of_another_form_is_refused(url):
    with pytest.raises(UserError, match=f"--dist-url {url}: the form is tcp://HOST:PORT"):
        check_url(url, hosted_here=False)


def test_a_port_in_use_is_refused_where_the_first_process_would_listen():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        url = f"tcp://localhost:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=f"--dist-url {url}: port [0-9]+ is in use"):
            check_url(url, hosted_here=True)
        check_url(url, hosted_here=False)
    check_url("tcp://localhost:0", hosted_here=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_gpus": 0}, "--num-gpus 0"),
        ({"num_gpus": -1, "num_machines": -1}, "--num-gpus -1"),
        ({"num_gpus": 1, "machine_rank": -1}, "--machine-rank -1"),
        ({"num_gpus": 2**40}, "--num-gpus 1099511627776: at most 1,024"),
        ({"num_gpus": 1, "num_machines": 2**40}, "--num-machines 1099511627776: at most 1,024"),
        ({"num_gpus": 1, "num_machines": 2, "machine_rank": 2}, "--machine-rank 2"),
        ({"num_gpus": 1, "num_machines": 2}, "--dist-url"),
    ],
)
def test_impossible_launches_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        launch(talk, **arguments)
