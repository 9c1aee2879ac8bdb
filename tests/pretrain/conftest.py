"""What the tests of classifiers share: images of two classes, and an encoder for them."""

import pytest
import torch
from noisy_colours import write_checkpoint, write_images


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """DATA with train/ and val/; not to be written to."""
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """A checkpoint of a resnet18 that was trained on nothing."""
    return write_checkpoint(tmp_path_factory.mktemp("pretrained") / "checkpoint_0000.pth.tar")


@pytest.fixture
def one_thread():
    """For tiny steps: threads that wait for a busy core would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
