"""NumPy's dropped name, lent to one module for the time of a call."""

from types import SimpleNamespace

import numpy as np
import pytest

from moco_det.evaluation.official import old_numpy


def test_the_name_is_there_while_it_is_open():
    module = SimpleNamespace(np=np)
    with old_numpy(module):
        found = module.np.in1d(np.array([[1, 2], [3, 4]]), [2, 3])
        assert found.tolist() == [False, True, True, False]  # flat, as it was
        assert module.np.zeros is np.zeros
        with pytest.raises(AttributeError):
            module.np.no_such_name  # noqa: B018
    assert module.np is np


def test_it_is_taken_back_after_an_error_and_numpy_is_left_alone():
    module = SimpleNamespace(np=np)
    before = hasattr(np, "in1d")
    with pytest.raises(ZeroDivisionError), old_numpy(module):
        assert hasattr(np, "in1d") == before
        print(1 / 0)
    assert module.np is np
