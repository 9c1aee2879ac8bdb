"""What the plugin adds to Detectron2: registrations, keys, data sets, strict weights, PreciseBN."""

import pytest
import torch
from detector_configs import CONFIGS, RUNS
from tiny_voc import write_tiny_config, write_tiny_voc
from torch import nn

pytest.importorskip("detectron2", reason="the plugin of Detectron2, which is not installed")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg as detectron2_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import hooks
from detectron2.modeling import build_model

from moco_det.common.errors import UserError
from moco_det.common.launch import launch
from moco_det.config import loading as native_config
from moco_det.config.defaults import OUR_KEYS
from moco_det.config.loading import leaves
from moco_det.datasets import get_dataset
from moco_det.native.modeling.meta_arch import build_model as build_native
from moco_det.plugin import load_config
from moco_det.plugin.data import check_classes, register_datasets
from moco_det.plugin.trainer import SamePreciseBN, StrictCheckpointer


@pytest.fixture
def tiny(tmp_path):
    """A config file and its data set, both tiny."""
    return str(write_tiny_config(tmp_path / "tiny.yaml", write_tiny_voc(tmp_path / "voc")))


@pytest.mark.parametrize("name", RUNS)
def test_both_engines_read_the_same_from_a_config(name):
    if "densepose" in name:
        pytest.importorskip("densepose")
    theirs = dict(leaves(load_config(str(CONFIGS / name))))
    ours = dict(
        leaves(native_config.on_available_device(native_config.load_config(str(CONFIGS / name))))
    )
    different = {k for k, v in ours.items() if repr(theirs[k]) != repr(v)}
    assert different == set()


def test_a_plain_detectron2_script_reads_every_config():
    """Without the keys that the plugin adds: a user's own train_net.py has none of them.

    All but semantic segmentation, whose INPUT.RANDOM_SCALE Detectron2 cannot honour by itself, and
    dense pose, whose keys only the DensePose project has.
    """
    for name in RUNS:
        if "FCN16" in name or "densepose" in name:
            continue
        cfg = detectron2_cfg()
        cfg.merge_from_file(str(CONFIGS / name))
        cfg.MODEL.DEVICE = "cpu"
        if name == "voc_R50_C4_24k_moco.yaml":
            assert cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeadsExtraNorm"
            assert "roi_heads.res5.norm.weight" in build_model(cfg).state_dict()


def test_keys_of_our_own_have_our_defaults(tiny):
    cfg, defaults = dict(leaves(load_config(tiny))), dict(leaves(native_config.get_cfg()))
    for key in OUR_KEYS:
        assert cfg[key] == defaults[key]


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SOLVER.BASELR", "1"], "unknown key SOLVER.BASELR; the nearest is SOLVER.BASE_LR"),
        (["SOLVER.BASE_LR", "fast"], "SOLVER.BASE_LR|Type mismatch"),
        (["SOLVER.BASE_LR"], "config"),
    ],
)
def test_mistakes_in_a_config(tiny, opts, message):
    with pytest.raises(UserError, match=message):
        load_config(tiny, opts)
    with pytest.raises(UserError, match="nowhere.yaml"):
        load_config("nowhere.yaml")


def test_a_voc_folder_of_one_s_own(tmp_path):
    name = f"voc:{write_tiny_voc(tmp_path / 'voc')}:train"
    register_datasets([name, name])
    dataset = get_dataset(name)
    theirs, ours = DatasetCatalog.get(name), dataset.records()
    for record in theirs:
        for annotation in record["annotations"]:
            assert annotation.pop("bbox_mode").name == "XYXY_ABS"
    assert theirs == ours
    metadata = MetadataCatalog.get(name)
    assert tuple(metadata.thing_classes) == dataset.classes
    assert metadata.evaluator_type == "pascal_voc"
    with pytest.raises(UserError, match="nearest name"):
        register_datasets(["voc_2007_trian"])


def test_a_tag_that_detectron2_s_evaluator_needs(tmp_path):
    root = write_tiny_voc(tmp_path / "voc")
    path = root / "Annotations" / "003.xml"
    path.write_text(path.read_text().replace("<pose>Unspecified</pose>", ""))
    with pytest.raises(UserError, match="003.xml: an <object> without <pose>.*--engine native"):
        register_datasets([f"voc:{root}:train"])


def test_classes_that_do_not_fit(tiny):
    cfg = load_config(tiny, ["MODEL.ROI_HEADS.NUM_CLASSES", "20"])
    register_datasets(cfg.DATASETS.TRAIN)
    with pytest.raises(UserError, match=r"has 2 classes \(bar, square\): set it to 2"):
        check_classes(cfg)


@pytest.fixture
def backbone_file(tiny, tmp_path):
    """Function: names to leave out and metadata -> a file with the rest of a ResNet's weights."""

    def write(without=(), **metadata):
        model = build_native(native_config.load_config(tiny))
        prefix = "backbone.bottom_up."
        arrays = {
            name.removeprefix(prefix): torch.rand_like(value) if value.ndim else value
            for name, value in model.state_dict().items()
            if name.startswith(prefix)
        }
        for name in without:
            del arrays[name]
        content = {"model": arrays, "__author__": "test", "matching_heuristics": True, **metadata}
        torch.save(content, tmp_path / "backbone.pth")
        return str(tmp_path / "backbone.pth")

    return write


def test_initial_weights_are_detectron2_s(tiny, backbone_file):
    cfg, path = load_config(tiny), backbone_file()
    ours, theirs = build_model(cfg), build_model(cfg)
    theirs.load_state_dict(ours.state_dict())
    StrictCheckpointer(ours, "", cfg).resume_or_load(path, resume=False)
    DetectionCheckpointer(theirs).load(path)
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


def test_a_backbone_array_left_at_random_is_an_error(tiny, backbone_file):
    cfg, path = load_config(tiny), backbone_file(without=["res3.0.conv1.weight"])
    model = build_model(cfg)
    with pytest.raises(UserError, match="backbone.bottom_up.res3.0.conv1.weight"):
        StrictCheckpointer(model, "", cfg).resume_or_load(path, resume=False)
    StrictCheckpointer(model, "", cfg, allow_missing=True).resume_or_load(path, resume=False)


def test_a_config_that_contradicts_the_weights_is_refused(tiny, backbone_file):
    cfg = load_config(tiny)
    path = backbone_file(requires={"INPUT.FORMAT": "RGB"})
    with pytest.raises(UserError, match="INPUT.FORMAT RGB .the config says BGR"):
        StrictCheckpointer(build_model(cfg), "", cfg).resume_or_load(path, resume=False)
    cfg = load_config(tiny, ["INPUT.FORMAT", "RGB"])
    StrictCheckpointer(build_model(cfg), "", cfg).resume_or_load(path, resume=False)


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()


def two_processes(folder):
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(rank)
    batches = [rank + torch.randn(4, 3, 5, 5, generator=generator) for _ in range(3)]
    for kind in (SamePreciseBN, hooks.PreciseBN):
        model = layers()
        kind(0, model, batches, 3).update_stats()
        torch.save(model.state_dict(), f"{folder}/{kind.__name__}{rank}.pt")


def test_precise_bn_is_the_same_on_both_processes_and_detectron2_s_is_not(tmp_path):
    launch(two_processes, num_gpus=2, args=(str(tmp_path),))

    def means(kind):
        states = [torch.load(tmp_path / f"{kind}{rank}.pt") for rank in (0, 1)]
        return [state["0.running_mean"] for state in states]

    assert torch.equal(*means("SamePreciseBN"))
    assert not torch.allclose(*means("PreciseBN"), atol=0.1)
