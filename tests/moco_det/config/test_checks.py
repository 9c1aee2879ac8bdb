"""Which configs are refused, for their keys, their data sets or their weights."""

import json

import pytest
from densepose_template import write_template
from tiny_semantic import write_tiny_semantic
from tiny_voc import write_tiny_voc

from moco_det.common.errors import LONGEST, UserError
from moco_det.common.resnets import Architecture
from moco_det.config.checks import (
    check_class_count,
    check_dataset,
    check_input,
    check_metric_files,
    check_solver,
    check_weights,
    is_semantic,
    num_classes,
    num_classes_key,
    semantic_feature,
)
from moco_det.config.loading import get_cfg
from moco_det.datasets import get_dataset


def make_cfg(*options, semantic=True):
    cfg = get_cfg()
    if semantic:
        cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.merge_from_list(list(options))
    return cfg


def test_classes_are_those_of_the_head_that_is_built():
    cfg = make_cfg("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 19)
    assert is_semantic(cfg)
    assert (num_classes(cfg), num_classes_key(cfg)) == (19, "MODEL.SEM_SEG_HEAD.NUM_CLASSES")
    cfg = make_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 7, semantic=False)
    assert not is_semantic(cfg)
    assert (num_classes(cfg), num_classes_key(cfg)) == (7, "MODEL.ROI_HEADS.NUM_CLASSES")


def test_data_sets_must_fit_the_task_and_the_classes(tmp_path):
    labels = get_dataset(f"voc_sem_seg:{write_tiny_semantic(tmp_path / 'a')}:train")
    objects = get_dataset(f"voc:{write_tiny_voc(tmp_path / 'b')}:train")
    semantic = make_cfg("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 21)
    detector = make_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 2, semantic=False)
    check_dataset(semantic, labels)
    check_dataset(detector, objects)
    with pytest.raises(UserError, match="has objects, but .* SemanticSegmentor learns from label"):
        check_dataset(semantic, objects)
    with pytest.raises(UserError, match="has label maps, but .* GeneralizedRCNN learns from obj"):
        check_dataset(detector, labels)
    message = r"MODEL.SEM_SEG_HEAD.NUM_CLASSES is 54, but .* has 21 classes \(background, .*to 21"
    with pytest.raises(UserError, match=message):
        check_dataset(make_cfg(), labels)


def test_many_classes_of_a_data_set_with_a_long_name_are_told_in_one_line():
    classes = [f"thing {number}" for number in range(1, 1204)]
    cfg = make_cfg("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 1230)
    with pytest.raises(UserError) as error:
        check_class_count(cfg, f"lvis:{'/folder' * 40}/a.json:{'/folder' * 40}", classes)
    message = str(error.value)
    assert len(f"error: {message}") <= LONGEST
    assert "has 1203 classes (thing 1, thing 2, " in message
    assert message.endswith(", thing 1203): set it to 1203")


def test_a_dense_pose_model_needs_dense_pose_and_its_metric_the_body(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "person"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    name, plain = (f"{kind}:{tmp_path}/a.json:{tmp_path}" for kind in ("densepose", "coco"))
    one_class = ("MODEL.ROI_HEADS.NUM_CLASSES", 1, "DATASETS.TEST", (name,))
    boxes = make_cfg(*one_class, semantic=False)
    posed = make_cfg(*one_class, "MODEL.DENSEPOSE_ON", True, semantic=False)
    for cfg, dataset in ((boxes, plain), (boxes, name), (posed, name)):
        check_dataset(cfg, get_dataset(dataset))
    with pytest.raises(UserError, match="coco:.* has no dense pose, but MODEL.DENSEPOSE_ON is"):
        check_dataset(posed, get_dataset(plain))
    check_metric_files(boxes)
    with pytest.raises(UserError, match=r"the metric of densepose:.* needs SMPL_subdiv\.mat"):
        check_metric_files(posed)
    write_template(tmp_path / "densepose" / "data", steps=1)
    check_metric_files(posed)


CROP = ("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE")


@pytest.mark.parametrize(
    "options", [(), ("INPUT.RANDOM_SCALE", (0.5, 2.0), *CROP, [769, 769])], ids=["none", "paper"]
)
def test_good_input(options):
    check_input(make_cfg(*options), crops_objects=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("INPUT.RANDOM_SCALE", (0.5,)), "INPUT.RANDOM_SCALE is .* set it to"),
        (("INPUT.RANDOM_SCALE", (2.0, 0.5)), "INPUT.RANDOM_SCALE"),
        (("INPUT.RANDOM_SCALE", (0.0, 0.5)), "INPUT.RANDOM_SCALE"),
        (("INPUT.CROP.ENABLED", True), "INPUT.CROP.TYPE is 'relative_range'"),
        ((*CROP, [0.9, 0.9]), "INPUT.CROP.SIZE is"),
        ((*CROP, [513]), "INPUT.CROP.SIZE is"),
        ((*CROP, [0, 513]), "INPUT.CROP.SIZE is"),
        (
            ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
            "SAMPLER_TRAIN is RepeatFactorTrainingSampler, which counts annotated objects",
        ),
        (("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", 254), "IGNORE_VALUE is 254: .* with 255"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(UserError, match=message):
        check_input(make_cfg(*options), crops_objects=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("INPUT.SCALE_CHOICES", (1.0,), "INPUT.RANDOM_SCALE", (0.5, 2.0)), "set one of them to"),
        (("INPUT.RANDOM_ROTATION", 5.0), "INPUT.RANDOM_ROTATION is 5, which takes an INPUT.FIXED"),
        (("INPUT.FIXED_SIZE", (64,)), r"INPUT.FIXED_SIZE is \(64,\): set it to \(\) or"),
        (("INPUT.FIXED_SIZE", (64.5, 32)), r"\(64.5, 32\): .* in pixels"),
        (
            (
                "INPUT.FIXED_SIZE",
                (64, 32),
                "INPUT.CROP.ENABLED",
                True,
                "INPUT.CROP.TYPE",
                "absolute",
            ),
            "set INPUT.CROP.ENABLED False",
        ),
        (("MODEL.SEM_SEG_HEAD.NAME", "FCNDepthHead"), "go together, and only they"),
    ],
)
def test_bad_frames(options, message):
    with pytest.raises(UserError, match=message) as error:
        check_input(make_cfg(*options), crops_objects=True)
    assert len(str(error.value)) < LONGEST


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("INPUT.SCALE_CHOICES", (0.5,)), r"SCALE_CHOICES \(0.5,\) is for SemanticSegmentor only"),
        (("INPUT.FIXED_SIZE", (64, 64)), r"INPUT.FIXED_SIZE \(64, 64\) is for .* only: set it to"),
        (("INPUT.RANDOM_ROTATION", 5.0), "INPUT.RANDOM_ROTATION 5.0 is for .* set it to 0"),
    ],
)
def test_detectors_have_no_frames(options, message):
    with pytest.raises(UserError, match=message):
        check_input(make_cfg(*options, semantic=False), crops_objects=True)


def test_optimizers():
    check_solver(make_cfg("SOLVER.OPTIMIZER", "Adam"))
    check_solver(make_cfg("SOLVER.NESTEROV", True))
    with pytest.raises(UserError, match="SOLVER.OPTIMIZER is 'LAMB': use SGD or Adam"):
        check_solver(make_cfg("SOLVER.OPTIMIZER", "LAMB"))
    with pytest.raises(UserError, match="Adam does not have"):
        check_solver(make_cfg("SOLVER.OPTIMIZER", "Adam", "SOLVER.NESTEROV", True))


def test_detectors_have_no_random_scale_and_crop_in_detectron2_only():
    scaled = make_cfg("INPUT.RANDOM_SCALE", (0.5, 2.0), semantic=False)
    for crops_objects in (False, True):
        with pytest.raises(UserError, match="is for SemanticSegmentor only"):
            check_input(scaled, crops_objects)
    cropped = make_cfg("INPUT.CROP.ENABLED", True, semantic=False)
    check_input(cropped, crops_objects=True)
    with pytest.raises(UserError, match="native engine crops for SemanticSegmentor only"):
        check_input(cropped, crops_objects=False)


def test_the_feature_that_the_head_works_on():
    options = ("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res4"], "MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 16)
    cfg = make_cfg(*options)
    assert semantic_feature(cfg, {"res3": 8, "res4": 16}) == "res4"
    with pytest.raises(UserError, match="COMMON_STRIDE is 16, but res4 has stride 8"):
        semantic_feature(cfg, {"res4": 8})
    with pytest.raises(UserError, match=r"one of the backbone's features \['res5'\]"):
        semantic_feature(cfg, {"res5": 16})


def test_config_that_contradicts_the_file():
    metadata = {"requires": Architecture(50).config()}
    cfg = get_cfg()
    with pytest.raises(UserError) as caught:
        check_weights(cfg, metadata)
    for key in (
        "INPUT.FORMAT RGB",
        "MODEL.PIXEL_MEAN [123.675",
        "MODEL.RESNETS.STRIDE_IN_1X1 False",
    ):
        assert key in str(caught.value)
    assert "DEPTH" not in str(caught.value)
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.280, 103.530]
    cfg.MODEL.PIXEL_STD = [58.395, 57.120, 57.375]
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    check_weights(cfg, metadata)
    cfg.MODEL.RESNETS.DEPTH = 101
    with pytest.raises(UserError, match=r"need MODEL\.RESNETS\.DEPTH 50 \(the config says 101\)$"):
        check_weights(cfg, metadata)


@pytest.mark.parametrize("requires", [["INPUT.FORMAT"], "RGB", 3])
def test_requirements_that_are_no_dict(requires):
    with pytest.raises(UserError, match="'requires' is not a dict of config keys: convert again"):
        check_weights(get_cfg(), {"requires": requires})


@pytest.mark.parametrize("needed", [["a", "b", "c"], [1.0], 5, {"a": 1}])
def test_a_requirement_of_another_kind_is_a_contradiction(needed):
    with pytest.raises(UserError, match="need MODEL.PIXEL_MEAN"):
        check_weights(get_cfg(), {"requires": {"MODEL.PIXEL_MEAN": needed}})


def test_file_that_says_nothing_contradicts_nothing():
    check_weights(get_cfg(), {"__author__": "MOCO"})
