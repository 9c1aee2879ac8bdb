"""Depth, Adam and the poly schedule through Detectron2: the same numbers as natively."""

import json

import pytest
import torch
from tiny_nyud import write_tiny_nyud, write_tiny_pixel_config

pytest.importorskip("detectron2", reason="the plugin of Detectron2, which is not installed")

from moco_det.common.errors import UserError
from moco_det.config.loading import load_config as load_native
from moco_det.native.engine import trainer as native
from moco_det.native.engine.inference import Probe
from moco_det.parity import comparison as parity
from moco_det.plugin import load_config
from moco_det.plugin import trainer as plugin
from moco_det.plugin.probe import Probe as Detectron2Probe

ROOMS = {"native": (native, load_native), "detectron2": (plugin, load_config)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return str(
        write_tiny_pixel_config(folder / "a.yaml", write_tiny_nyud(folder / "nyud"), depth=True)
    )


@pytest.fixture
def run(tiny, tmp_path):
    """Function: engine, output name, KEY VALUE ... -> results of training there."""

    def run(engine, output, *opts, evaluate=False, **options):
        room, load = ROOMS[engine]
        cfg = load(tiny, [*map(str, opts), "OUTPUT_DIR", str(tmp_path / output)])
        return (room.evaluate_weights if evaluate else room.train)(cfg, **options)

    return run


def test_engines_compute_the_same(tiny):
    items = parity.build_items(load_native(tiny), 70, 97, 2, seed=0)
    assert (items[0]["depth"] == 0).any()
    torch.manual_seed(0)
    ours = Probe(tiny)
    parity.randomize_for_parity(ours.model, items, ours.model.state_dict().keys(), seed=0)
    theirs = Detectron2Probe(tiny)
    theirs.model.load_state_dict(ours.model.state_dict(), strict=True)
    differences = parity.compare(theirs.quantities(items, 0), ours.quantities(items, 0))
    assert [x.quantity for x in differences] == [
        "features res3",
        "pixel logits",
        "pixel depths",
        "loss_depth",
        "gradient of backbone.stem.conv1",
        "gradient of sem_seg_head.predictor",
        "parameters after a step",
        "statistics after a step",
    ]
    assert [x.quantity for x in differences if not x.within(1e-4)] == []


def test_weights_of_one_engine_go_on_in_the_other(run, tmp_path):
    run("detectron2", "first", "SOLVER.MAX_ITER", 4)
    path = str(tmp_path / "first" / "model_final.pth")
    found = {e: run(e, e, "MODEL.WEIGHTS", path, evaluate=True)["depth"]["rmse"] for e in ROOMS}
    assert found["native"] == pytest.approx(found["detectron2"], abs=1e-4)
    files = [next((tmp_path / e / "inference").glob("nyud_depth*.json")) for e in ROOMS]
    here, there = (json.loads(file.read_text()) for file in files)
    assert (
        [x["image_id"] for x in here] == [x["image_id"] for x in there] == ["0001", "0002", "0003"]
    )


def test_a_run_of_adam_goes_on_where_it_stopped(run, tmp_path):
    opts = "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2
    run("detectron2", "out", *opts)
    (tmp_path / "out/last_checkpoint").write_text("model_0000001.pth")
    run("detectron2", "out", *opts, resume=True)
    lines = map(json.loads, (tmp_path / "out/metrics.json").read_text().splitlines())
    rates = {line["iteration"]: line["lr"] for line in lines if "lr" in line}
    assert rates[3] == pytest.approx(0.003 * (1 - 3 / 4) ** 0.9)
    saved = torch.load(tmp_path / "out/model_final.pth", weights_only=False)["trainer"]
    states = saved["_trainer"]["optimizer"]["state"].values()
    assert {float(state["step"]) for state in states} == {4.0}


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("SOLVER.OPTIMIZER", "LAMB"), "SOLVER.OPTIMIZER is 'LAMB'"),
        (("INPUT.FIXED_SIZE", "()", "INPUT.RANDOM_ROTATION", 0.0), r"INPUT.FIXED_SIZE is \(\)"),
        (("MODEL.SEM_SEG_HEAD.NAME", "FCN16Head"), "go together"),
        (
            ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
            "INPUT.SCALE_CHOICES .* SemanticSegmentor",
        ),
    ],
)
def test_bad_settings(run, opts, message):
    with pytest.raises(UserError, match=message):
        run("detectron2", "out", *opts)
