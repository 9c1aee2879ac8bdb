"""Label maps through Detectron2: the same inputs, model, predictions and metrics as natively."""

import json

import numpy as np
import pytest
import torch
from tiny_semantic import write_tiny_segmentor, write_tiny_semantic

pytest.importorskip("detectron2", reason="the plugin of Detectron2, which is not installed")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator

from moco_det.common.errors import UserError
from moco_det.config.loading import load_config as load_native
from moco_det.native.engine import trainer as native
from moco_det.native.engine.inference import Probe
from moco_det.native.modeling.meta_arch import build_model as build_native
from moco_det.parity import comparison as parity
from moco_det.plugin import load_config
from moco_det.plugin import trainer as plugin
from moco_det.plugin.probe import Probe as Detectron2Probe
from moco_det.weights.files import load_backbone_weights

ROOMS = {"native": (native, load_native), "detectron2": (plugin, load_config)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return str(write_tiny_segmentor(folder / "tiny.yaml", write_tiny_semantic(folder / "voc")))


@pytest.fixture
def run(tiny, tmp_path):
    """Function: engine, output name, KEY VALUE ... -> results of training there."""

    def run(engine, output, *opts, evaluate=False):
        room, load = ROOMS[engine]
        cfg = load(tiny, [*opts, "OUTPUT_DIR", str(tmp_path / output)])
        return (room.evaluate_weights if evaluate else room.train)(cfg)

    return run


def saved_records(folder):
    (path,) = (folder / "inference").glob("voc_sem_seg*.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize(("first", "second"), [("native", "detectron2"), ("detectron2", "native")])
def test_weights_of_one_engine_go_on_in_the_other(run, tiny, tmp_path, first, second):
    run(first, "first", "SOLVER.MAX_ITER", "12")
    path = str(tmp_path / "first" / "model_final.pth")
    report = load_backbone_weights(build_native(load_native(tiny)), path)
    assert report.missing == report.unexpected == report.skipped == ()
    found = {
        engine: run(engine, engine, "MODEL.WEIGHTS", path, evaluate=True)["sem_seg"]
        for engine in (first, second)
    }
    assert list(found[first]) == list(found[second])
    for metric, value in found[first].items():
        assert found[second][metric] == pytest.approx(value, abs=0.01, nan_ok=True)
    here, there = (saved_records(tmp_path / engine) for engine in (first, second))
    assert [x["image_id"] for x in here] == [x["image_id"] for x in there]
    assert all(x["sem_seg"] for x in here)
    run(second, "more", "MODEL.WEIGHTS", path, "SOLVER.MAX_ITER", "2")


@pytest.mark.parametrize("bias", ["", "SyncBN"])
def test_engines_compute_the_same(tiny, bias):
    opts = ["MODEL.SEM_SEG_HEAD.NORM", bias, "SOLVER.BASE_LR", "0.001"]
    cfg = load_native(tiny, opts)
    items = parity.build_items(cfg, 70, 97, 2, seed=0)
    assert (items[0]["sem_seg"] == 255).any()
    torch.manual_seed(0)
    ours = Probe(tiny, opts)
    parity.randomize_for_parity(ours.model, items, ours.model.state_dict().keys(), seed=0)
    theirs = Detectron2Probe(tiny, opts)
    theirs.model.load_state_dict(ours.model.state_dict(), strict=True)
    differences = parity.compare(theirs.quantities(items, 0), ours.quantities(items, 0))
    assert [x.quantity for x in differences] == [
        "features res4",
        "pixel logits",
        "pixel scores",
        "loss_sem_seg",
        "gradient of backbone.stem.conv1",
        "gradient of sem_seg_head.predictor",
        "parameters after a step",
        "statistics after a step",
    ]
    assert [x.quantity for x in differences if not x.within(1e-4)] == []


def test_no_labelled_pixel_is_no_loss(tiny):
    probe = Detectron2Probe(tiny)
    items = parity.build_items(load_native(tiny), 64, 96, 1, seed=0)
    items[0]["sem_seg"][:] = 255
    (loss,) = probe.losses(items).values()
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in probe.model.parameters())


def test_detectron2s_evaluator_agrees_on_what_it_reads(run, tiny, tmp_path):
    """Its own evaluator, on a palette data set in its own catalog and a model's own output."""
    run("detectron2", "out")
    cfg = load_config(tiny, ["MODEL.WEIGHTS", str(tmp_path / "out" / "model_final.pth")])
    (name,) = cfg.DATASETS.TEST
    assert MetadataCatalog.get(name).ignore_label == 255
    assert len(DatasetCatalog.get(name)) == 6
    model = plugin.Trainer.build_model(cfg)
    load_backbone_weights(model, cfg.MODEL.WEIGHTS)
    evaluator = SemSegEvaluator(name, distributed=False)
    evaluator.reset()
    with torch.no_grad():
        for batch in plugin.Trainer.build_test_loader(cfg, name):
            assert "sem_seg" not in batch[0]
            evaluator.process(batch, model.eval()(batch))
    expected = evaluator.evaluate()["sem_seg"]
    found = run("detectron2", "again", "MODEL.WEIGHTS", cfg.MODEL.WEIGHTS, evaluate=True)
    for metric, value in found["sem_seg"].items():
        assert value == pytest.approx(expected[metric], nan_ok=True), metric


def test_training_batches_are_of_crops(tiny):
    cfg = load_config(tiny)
    plugin.register_datasets(cfg.DATASETS.TRAIN)
    batch = next(iter(plugin.Trainer.build_train_loader(cfg)))
    assert [tuple(x["image"].shape) for x in batch] == [(3, 97, 97)] * 4
    assert [tuple(x["sem_seg"].shape) for x in batch] == [(97, 97)] * 4
    labels = np.unique([x["sem_seg"].numpy() for x in batch])
    assert set(labels.tolist()) <= {0, 3, 15, 255}  # not the greys of the palette


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("INPUT.CROP.TYPE", "relative"), "INPUT.CROP.TYPE is 'relative'"),
        (("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "20"), "SEM_SEG_HEAD.NUM_CLASSES is 20.*set it to 21"),
        (("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", "8"), "COMMON_STRIDE is 8, but res4 has stride 16"),
        (("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"), "INPUT.RANDOM_SCALE .* SemanticSegmentor"),
    ],
)
def test_bad_settings(run, opts, message):
    with pytest.raises(UserError, match=message):
        run("detectron2", "out", *opts)
