"""Changes are functions of the seed, and change something."""

import pickle
import pickletools
import random

import numpy as np
import pytest

from tests.fuzz.mutations import mutate_bytes, mutate_tree, walk
from tests.fuzz.pickles import attacks, mutate_opcodes, payloads, with_fragment

TREE = {"a": [{"id": 1, "box": [1, 2]}, {"id": 2, "box": [3, 4]}], "b": {"c": 0.5}}


@pytest.mark.parametrize("seed", range(40))
def test_equal_seeds_make_equal_changes(seed):
    data = bytes(range(256)) * 40
    once, again = (mutate_bytes(random.Random(seed), data) for _ in range(2))
    assert once == again
    assert once[0] != data
    once, again = (repr(mutate_tree(random.Random(seed), TREE)) for _ in range(2))
    assert once == again


def test_the_tree_that_is_given_stays_as_it_is():
    before = repr(TREE)
    for seed in range(40):
        mutate_tree(random.Random(seed), TREE)
    assert repr(TREE) == before


def test_paths_lead_to_all_values():
    assert walk({"a": [1, {"b": 2}]}) == [("a",), ("a", 0), ("a", 1), ("a", 1, "b")]


def test_opcodes_change():
    data = pickle.dumps({"model": {"a": np.ones(3, "f4")}}, 2)  # a protocol without frames
    changed = {mutate_opcodes(random.Random(seed), data)[0] for seed in range(30)}
    assert len(changed) > 20
    assert data not in changed


def test_attacks_are_pickles_of_weights(tmp_path):
    arrays = {"a": np.ones((2, 3), "f4")}
    kinds = attacks((2, 3)) | payloads(tmp_path / "canary")
    for kind in kinds.keys() - {"a string said to be long", "bytes said to be long"}:
        opcodes = list(pickletools.genops(with_fragment(arrays, "a", kinds[kind])))
        assert opcodes[-1][0].name == "STOP", kind
    good = pickle.loads(with_fragment(arrays, "a", attacks((2, 3))["not finite"]))
    assert np.isnan(good["model"]["a"]).all()
