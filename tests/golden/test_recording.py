"""The golden files themselves: they name their source, and repeat what Detectron2 says today."""

import importlib
import json

import pytest
from recording import FOLDER, read

NAMES = sorted(path.stem.removeprefix("detectron2_") for path in FOLDER.glob("*.json"))
# What models compute is the same up to rounding only: it is held to Detectron2 in
# test_detectron2_parity, test_semantic_plugin and test_experiments; and what needs the DensePose
# project besides, in test_densepose_evaluation.
EXACT = [name for name in NAMES if not name.endswith(("model", "experiments", "densepose_ap"))]


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_file_names_its_detectron2_and_has_a_recorder(name):
    source = read(name)["detectron2"]
    assert source["version"]
    assert len(source["commit"]) == 40
    assert int(source["commit"], 16)
    assert (FOLDER / f"record_{name}.py").is_file()


@pytest.mark.parametrize("name", EXACT)
def test_numbers_are_those_of_the_installed_detectron2(name):
    pytest.importorskip("detectron2", reason="records anew with Detectron2")
    if "densepose" in name:
        pytest.importorskip("densepose", reason="records anew with the DensePose project")
    recorded = {key: value for key, value in read(name).items() if key != "detectron2"}
    found = importlib.import_module(f"record_{name}").record()
    assert json.loads(json.dumps(found)) == recorded
