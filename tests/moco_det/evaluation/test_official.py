"""NumPy's dropped names, lent to one module for the time of a call."""

from types import SimpleNamespace

import numpy as np
import pytest

from moco_det.evaluation.official import old_numpy


def test_the_names_are_there_while_it_is_open():
    module = SimpleNamespace(np=np)
    with old_numpy(module):
        assert module.np.float is float
        found = module.np.in1d(np.array([[1, 2], [3, 4]]), [2, 3])
        assert found.tolist() == [False, True, True, False]  # flat, as it was
        assert module.np.zeros is np.zeros
        with pytest.raises(AttributeError):
            module.np.no_such_name  # noqa: B018
    assert module.np is np


def test_it_is_taken_back_after_an_error_and_numpy_is_left_alone():
    module = SimpleNamespace(np=np)
    before = {name: hasattr(np, name) for name in ("float", "in1d")}
    with pytest.raises(ZeroDivisionError), old_numpy(module):
        assert {name: hasattr(np, name) for name in before} == before
        print(1 / 0)
    assert module.np is np
