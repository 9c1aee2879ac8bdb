"""How many threads the tests have, in which order they run, and where the small real data is."""

import os
import signal
from pathlib import Path

import fork_server
import pytest
import torch
from float64 import in_float64
from gpus import hide_gpus, show_gpus
from paths import REPOSITORY, SHARED_DATA
from PIL import Image


def pytest_collection_modifyitems(items):
    """Files with slow tests first, so that no process is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_configure(config):
    """As many threads as OMP_NUM_THREADS says, or else as there are cores for each test process.

    Threads of several processes would wait for each other's cores. The variable is set for the
    commands that tests start; not by a process that only distributes the tests, since those that
    run them inherit it.
    """
    if not hasattr(config, "workerinput") and config.getoption("numprocesses", None):
        return
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell starts what runs in the background so, and the commands that tests interrupt
        # would inherit it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    threads = max(1, (os.cpu_count() or 1) // processes)
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", str(threads))))


@pytest.hookimpl(tryfirst=True)  # before any fixture, a module's too
def pytest_runtest_setup(item):
    """A test is of a CPU, whatever the machine has, unless it is marked gpu.

    What it is compared with was recorded on CPUs, and two processes want two GPUs. The commands
    that it starts have its environment.
    """
    if item.get_closest_marker("gpu") is None:
        hide_gpus()
    else:
        show_gpus()
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def pixel_limit(monkeypatch):
    """A command's limit on the pixels of images is its process's, here also that of other tests."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


@pytest.fixture
def shared_data():
    """Function: folder name -> its path; the test is skipped where the folder is absent."""

    def find(name: str) -> Path:
        folder = SHARED_DATA / name
        if not folder.is_dir():
            pytest.skip(f"{folder} is absent (set MOCO_DET_TEST_DATA to the folder that holds it)")
        return folder

    return find


@pytest.fixture
def float64():
    """What the test builds and computes is in float64: see `float64.py`."""
    with in_float64():
        yield


@pytest.fixture
def repository() -> Path:
    return REPOSITORY


@pytest.fixture
def forked_launches(monkeypatch):
    """The processes of a launch come from a server that has imported torch already."""
    monkeypatch.setitem(fork_server.CONTEXTS, "spawn", fork_server.SpawnByServer())
