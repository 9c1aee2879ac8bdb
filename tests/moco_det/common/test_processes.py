"""What processes exchange: hand values in two processes, and the same calls in one."""

import json
import os
import signal
import threading
import time

import pytest
import torch
from torch import nn

from moco_det.common import processes
from moco_det.common.launch import launch


def exchange(folder):
    """Everything that is collective, once; each process writes what it got."""
    rank = processes.rank()
    # Process 0 has 1, 2 and process 1 has 3, 4. Its loss is the sum of squares of all four, so the
    # sum over processes has the gradient 2 * 2x.
    mine = torch.tensor([[1.0], [2.0]]) + 2 * rank
    mine.requires_grad_()
    everyone = processes.gather(mine)
    everyone.square().sum().backward()
    norm = nn.BatchNorm1d(1)
    norm.running_mean.fill_(rank + 5)
    norm.weight.data.fill_(rank + 7)
    processes.broadcast_buffers(norm)
    with processes.StopRequest() as stop:
        before = stop.agreed()
        if rank == processes.world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        processes.synchronize()
        after = stop.agreed()
    found = {
        "gathered": everyone.flatten().tolist(),
        "gradient": mine.grad.flatten().tolist(),
        "objects": processes.all_objects({"rank": rank}),
        "buffer": norm.running_mean.item(),
        "parameter": norm.weight.item(),
        "stop": [before, after],
        "workers": processes.workers_per_process(3),
    }
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    processes.print_on_main("done")


def read(folder, rank):
    return json.loads((folder / f"{rank}.json").read_text())


@pytest.mark.usefixtures("forked_launches")
def test_two_processes(tmp_path, capfd):
    launch(exchange, num_gpus=2, args=(str(tmp_path),))
    first, second = read(tmp_path, 0), read(tmp_path, 1)
    shared = {
        "gathered": [1, 2, 3, 4],
        "objects": [{"rank": 0}, {"rank": 1}],
        "buffer": 5,
        "stop": [False, True],  # all stop where one was asked to
        "workers": 2,
    }
    assert first == {**shared, "gradient": [4, 8], "parameter": 7}
    assert second == {**shared, "gradient": [12, 16], "parameter": 8}
    assert capfd.readouterr().out.count("done") == 1


def test_one_process_needs_no_group(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    exchange(tmp_path)
    assert read(tmp_path, 0) == {
        "gathered": [1, 2],
        "gradient": [2, 4],
        "objects": [{"rank": 0}],
        "buffer": 5,
        "parameter": 7,
        "stop": [False, True],
        "workers": 3,
    }


@pytest.mark.parametrize(("processes_here", "expected"), [(1, 8), (3, 3), (8, 1), (16, 1)])
def test_workers_are_those_of_the_node(monkeypatch, processes_here, expected):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes_here))
    assert processes.workers_per_process(8) == expected
    assert processes.workers_per_process(0) == 0


def test_sigterm_has_its_former_meaning_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), processes.StopRequest() as stop:
        assert signal.getsignal(signal.SIGTERM) != before
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received
        print(1 / 0)
    assert signal.getsignal(signal.SIGTERM) == before
    with processes.StopRequest() as another:  # a request is that of one run
        assert not another.received


def test_ctrl_c_is_noted_as_well():
    before = signal.getsignal(signal.SIGINT)
    with processes.StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed()
    assert signal.getsignal(signal.SIGINT) == before
    with pytest.raises(SystemExit) as ended:
        processes.end_run(stop.received, "x")
    assert ended.value.code == 130


def refuse(word):
    raise processes.UserError(f"no {word}")


def refused_everywhere(folder):
    with pytest.raises(processes.UserError, match="no room"):
        processes.on_main(refuse, "room")
    (folder / str(processes.rank())).touch()


@pytest.mark.usefixtures("forked_launches")
def test_the_main_process_refuses_for_all(tmp_path):
    launch(refused_everywhere, num_gpus=2, args=(tmp_path,))
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}
    assert processes.on_main(max, 1, 2) == 2


def test_another_thread_leaves_signals_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with processes.StopRequest() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.agreed()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def test_signals_have_their_handler_while_it_is_open():
    numbers, heard = (signal.SIGTERM, signal.SIGINT), []
    before = [signal.getsignal(number) for number in numbers]
    with processes.signals_handled(lambda number, frame: heard.append(number), *numbers):
        for number in numbers:
            signal.raise_signal(number)
    assert heard == [*numbers]
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_request_of_another_process_is_not_the_first_of_two_signals(monkeypatch):
    """The machines of a run get their signals one after another, and the second must save too."""
    monkeypatch.setattr(processes.ending, "AGAIN", 0.0)
    monkeypatch.setattr(processes.ending, "end_now", lambda code, line: ended.append(code))
    ended = []
    with processes.StopRequest() as stop:
        with monkeypatch.context() as patch:
            patch.setattr(processes, "gather_rows", lambda row: torch.tensor([[15.0], row]))
            assert stop.agreed()
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.received, ended) == (signal.SIGTERM, [])
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [130]


def save_then_end(folder):
    if processes.is_main():
        time.sleep(0.3)
        (folder / "saved").touch()
    try:
        processes.end_run(signal.SIGTERM, "all of it")
    except SystemExit:
        (folder / f"{processes.rank()} saw {(folder / 'saved').exists()}").touch()
        raise


@pytest.mark.usefixtures("forked_launches")
def test_no_process_of_a_stopped_run_ends_before_all_is_saved(tmp_path):
    """torchrun would end the one that is still saving."""
    with pytest.raises(SystemExit) as stopped:
        launch(save_then_end, num_gpus=2, args=(tmp_path,))
    assert stopped.value.code == 75
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0 saw True", "1 saw True", "saved"]


def test_a_signal_that_comes_while_processes_agree_is_not_lost(monkeypatch):
    """It is heeded the next time: the other processes have been told that there is none."""
    gather = processes.gather_rows

    def interrupted(values):
        os.kill(os.getpid(), signal.SIGINT)
        return gather(values)

    with processes.StopRequest() as stop:
        monkeypatch.setattr(processes, "gather_rows", interrupted)
        assert not stop.agreed()
        monkeypatch.setattr(processes, "gather_rows", gather)
        assert stop.agreed()
        assert stop.received == signal.SIGINT
