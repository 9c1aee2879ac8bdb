"""The configuration against Detectron2's own (recorded, and live where it is installed)."""

import math

import pytest
from detector_configs import CONFIGS, NAMES
from recording import read

from moco_det.common.errors import UserError
from moco_det.config.loading import (
    KEYS,
    RANGES,
    check_value,
    get_cfg,
    leaves,
    load_config,
    nearest,
)
from moco_det.native.modeling.meta_arch import build_model


@pytest.fixture
def golden():
    return read("config")["defaults"]


@pytest.fixture
def densepose():
    """What the DensePose project adds; it is off here unless it is asked for."""
    return read("densepose_config")["defaults"] | {"MODEL.DENSEPOSE_ON": "False"}


@pytest.fixture
def write(tmp_path):
    """Function: YAML text (and a file name) -> path of the file."""

    def write_text(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write_text


def is_inert(key, names=KEYS["inert"]):
    return any(key == name or key.startswith(f"{name}.") for name in names)


def test_defaults_are_detectron2s(golden, densepose):
    ours = {key: repr(value) for key, value in leaves(get_cfg()) if key not in KEYS["own"]}
    assert ours == {key: (golden | densepose)[key] for key in ours}


def test_every_key_of_the_densepose_project(densepose):
    """Those that are refused as unknown belong to other models of the project, or its evaluator."""
    ours = dict(leaves(get_cfg()))
    assert {
        key for key in ours if is_inert(key, KEYS["densepose"])
    } == ours.keys() & densepose.keys()
    unknown = {k for k in densepose if k not in ours and not is_inert(k, KEYS["densepose_inert"])}
    assert {key.partition(".")[0] for key in unknown} == {
        "BOOTSTRAP_DATASETS",
        "DENSEPOSE_EVALUATION",
    }
    for name in KEYS["densepose_inert"]:
        assert any(is_inert(key, [name]) for key in densepose), name


def test_densepose_s_own_baseline_can_be_built(write):
    """Its YAML, from what was recorded of it."""
    recorded = read("densepose_config")["densepose_rcnn_R_50_FPN_s1x_legacy"]
    options = [text for key, value in recorded.items() for text in (key, value)]
    narrow = "MODEL.DEVICE cpu MODEL.WEIGHTS '' MODEL.ROI_BOX_HEAD.FC_DIM 8"
    cfg = load_config(write("VERSION: 2\n"), [*options, *narrow.split()])
    model = build_model(cfg)
    assert model.roi_heads.densepose_predictor.ann_index_lowres.weight.shape[1] == 15
    assert not model.roi_heads.densepose_pooler.aligned


def test_every_detectron2_key_is_either_known_or_inert(golden):
    ours = dict(leaves(get_cfg()))
    assert not [key for key in golden if key not in ours and not is_inert(key)]
    assert not [key for key in ours if is_inert(key)]
    for name in KEYS["inert"]:
        assert any(key == name or key.startswith(f"{name}.") for key in golden), name


def test_every_default_is_supported():
    ours = dict(leaves(get_cfg()))
    for key, values in KEYS["supported"].items():
        assert ours[key] in values, key


@pytest.mark.parametrize("name", NAMES)
def test_shipped_config_reads_the_same_in_detectron2(name):
    detectron2_config = pytest.importorskip("detectron2.config")
    from moco_det.plugin import add_moco_config

    theirs = detectron2_config.get_cfg()
    add_moco_config(theirs)
    theirs.merge_from_file(str(CONFIGS / name))
    theirs = {key: repr(value) for key, value in leaves(theirs)}
    ours = {key: repr(value) for key, value in leaves(load_config(CONFIGS / name))}
    assert ours == {key: theirs[key] for key in ours}


@pytest.mark.parametrize("name", NAMES)
def test_shipped_config_opens_with_a_comment(name):
    assert (CONFIGS / name).read_text().startswith("# ")


def test_moco_voc_config_has_the_official_values():
    """The numbers of facebookresearch/moco, detection/configs."""
    cfg = load_config(CONFIGS / "voc_R50_C4_24k_moco.yaml")
    assert cfg.SOLVER.STEPS == (18000, 22000)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.BASE_LR) == (24000, 100, 0.02)
    assert (cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.RESNETS.NORM) == (0, "naiveSyncBN")
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is False
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]
    assert list(cfg.INPUT.MIN_SIZE_TRAIN) == list(range(480, 801, 32))
    assert cfg.DATASETS.TEST == ("voc_2007_test",)
    assert cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeadsExtraNorm"
    assert cfg.TEST.PRECISE_BN.ENABLED is True


def test_base_then_file_then_options(write):
    write("SOLVER: {MAX_ITER: 1, BASE_LR: 0.1, IMS_PER_BATCH: 2}\n", "base.yaml")
    path = write("_BASE_: base.yaml\nSOLVER: {BASE_LR: 0.2, IMS_PER_BATCH: 4}\n")
    solver = load_config(path, ["SOLVER.IMS_PER_BATCH", "8"]).SOLVER
    assert (solver.MAX_ITER, solver.BASE_LR, solver.IMS_PER_BATCH) == (1, 0.2, 8)


def test_list_of_bases_is_laid_over_in_order(write):
    write("SOLVER: {MAX_ITER: 1, BASE_LR: 0.1}\n", "first.yaml")
    write("SOLVER: {BASE_LR: 0.2, GAMMA: 0.5}\n", "second.yaml")
    solver = load_config(write("_BASE_: [first.yaml, second.yaml]\nSOLVER: {GAMMA: 0.6}\n")).SOLVER
    assert (solver.MAX_ITER, solver.BASE_LR, solver.GAMMA) == (1, 0.2, 0.6)


def test_loaded_config_is_frozen_and_leaves_the_defaults_alone(write):
    cfg = load_config(write("SOLVER: {MAX_ITER: 1}\n"))
    with pytest.raises(AttributeError):
        cfg.SOLVER.MAX_ITER = 2
    assert get_cfg().SOLVER.MAX_ITER == 40000


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("INPUT.MIN_SIZE_TRAIN", "(240, 320)", (240, 320)),
        ("INPUT.MIN_SIZE_TRAIN", "[240, 320]", (240, 320)),
        ("MODEL.RPN.IN_FEATURES", "('p2', 'p3')", ["p2", "p3"]),
        ("SOLVER.BASE_LR", "1e-4", 0.0001),
        ("SOLVER.BASE_LR", "1", 1.0),
        ("SOLVER.WEIGHT_DECAY_BIAS", "0.5", 0.5),
        ("MODEL.MASK_ON", "False", False),
        ("MODEL.WEIGHTS", "123", "123"),
        ("MODEL.WEIGHTS", "'a.pkl'", "a.pkl"),
        ("DATASETS.TRAIN", "('a', 'b')", ("a", "b")),
        ("DATASETS.TRAIN", "voc:a/b:train", ("voc:a/b:train",)),
        ("SEED", "-1", -1),
    ],
)
def test_option_is_read_as_the_type_of_its_default(write, key, text, value):
    found = dict(leaves(load_config(write("VERSION: 2\n"), [key, text])))[key]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("SOLVER.MAX_ITER", "many"),
        ("SOLVER.MAX_ITER", "1.5"),
        ("SOLVER.MAX_ITER", "True"),
        ("SOLVER.BASE_LR", "None"),
        ("INPUT.MIN_SIZE_TRAIN", "240"),
        ("DATASETS.TRAIN", "('a', "),
        ("MODEL.MASK_ON", "0"),
    ],
)
def test_wrong_type_is_refused(write, key, text):
    with pytest.raises(UserError, match=f"the command line: {key} takes a "):
        load_config(write("VERSION: 2\n"), [key, text])


def test_unknown_key_names_the_file_and_the_nearest_key(write):
    path = write("SOLVER: {BASE_LRR: 0.1}\n")
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value) == (
        f"{path}: unknown key SOLVER.BASE_LRR; the nearest known one is SOLVER.BASE_LR"
    )


@pytest.mark.parametrize(
    ("typo", "key"),
    [
        ("MODEL.WEIGHT", "MODEL.WEIGHTS"),
        ("solver.max_iter", "SOLVER.MAX_ITER"),
        ("BASE_LR", "SOLVER.BASE_LR"),
        ("TEST.EVAL_PERIODS", "TEST.EVAL_PERIOD"),
    ],
)
def test_nearest_key(typo, key):
    assert nearest(typo, dict(leaves(get_cfg()))) == key


@pytest.mark.parametrize("text", ["SOLVER: 3\n", "MODEL: {WEIGHTS: {PATH: x}}\n", "7: x\n"])
def test_section_for_value_and_value_for_section_are_unknown_keys(write, text):
    with pytest.raises(UserError, match="unknown key"):
        load_config(write(text))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.LOAD_PROPOSALS", "True"),
        ("MODEL.META_ARCHITECTURE", "RetinaNet"),
        ("MODEL.RESNETS.NORM", "GN"),
        ("INPUT.CROP.TYPE", "relative"),
        ("INPUT.ROTATION_ANGLES", "[0, 10]"),
        ("MODEL.ROI_DENSEPOSE_HEAD.NAME", "DensePoseDeepLabHead"),
        ("MODEL.ROI_DENSEPOSE_HEAD.UV_CONFIDENCE.ENABLED", "True"),
        ("MODEL.ROI_DENSEPOSE_HEAD.NUM_COARSE_SEGM_CHANNELS", "3"),
        ("VERSION", "1"),
    ],
)
def test_what_only_detectron2_does_is_refused(write, key, value):
    with pytest.raises(UserError, match=f"{key} .*: the native engine supports only"):
        load_config(write("VERSION: 2\n"), [key, value])


def test_a_long_number_that_only_detectron2_would_try_is_told_in_short(write):
    with pytest.raises(UserError, match="MODEL.RESNETS.DEPTH 999.* supports only 18,") as refused:
        load_config(write("VERSION: 2\n"), ["MODEL.RESNETS.DEPTH", "9" * 500])
    assert len(str(refused.value)) < 300


def test_inert_sections_and_empty_ones_are_accepted(write):
    cfg = load_config(write("SOLVER:\nMODEL: {RETINANET: {NUM_CONVS: 3}}\nVERSION: 2\n"))
    assert dict(leaves(cfg)) == dict(leaves(get_cfg()))


def test_odd_number_of_options(write):
    with pytest.raises(UserError, match="'SEED' is left without a value"):
        load_config(write("VERSION: 2\n"), ["SOLVER.MAX_ITER", "1", "SEED"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a mapping"),
        ("- a\n- b\n", "not a mapping"),
        ("SOLVER: {A: 1}\n_BASE_: 3\n", "not a mapping"),
        ("SOLVER: [1\n", "not valid YAML"),
        ("SEED: !!python/object/apply:os.getpid []\n", "python/object/apply:os.getpid is not supp"),
        ("_BASE_: run.yaml\n", "leads back to itself"),
        ("_BASE_: absent.yaml\n", "cannot read config .*absent.yaml: No such file"),
    ],
)
def test_bad_file_is_one_message(write, text, message):
    with pytest.raises(UserError, match=message):
        load_config(write(text))


def test_absent_file_is_named():
    with pytest.raises(UserError, match="cannot read config nowhere.yaml: No such file"):
        load_config("nowhere.yaml")


# -- what a key may be ----------------------------------------------------------------------------


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def test_every_numeric_key_has_a_range_that_holds_its_default(golden):
    limited = {*KEYS["supported"], *KEYS["names"], "TEST.EXPECTED_RESULTS"}
    numeric = {k for k, v in leaves(get_cfg()) if is_number(v) or isinstance(v, list | tuple)}
    numeric.add("SOLVER.WEIGHT_DECAY_BIAS")  # None
    assert numeric - limited == RANGES.keys() - limited
    for key, value in leaves(get_cfg()):
        check_value(key, value, "the defaults")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("SOLVER: {BASE_LR: .nan}\n", "SOLVER.BASE_LR is nan"),
        ("SOLVER: {BASE_LR: .inf}\n", "SOLVER.BASE_LR is inf"),
        ("SOLVER: {BASE_LR: -0.1}\n", "SOLVER.BASE_LR is -0.1"),
        ("SOLVER: {WEIGHT_DECAY: -1}\n", "SOLVER.WEIGHT_DECAY is -1"),
        ("SOLVER: {WEIGHT_DECAY_BIAS: x}\n", "SOLVER.WEIGHT_DECAY_BIAS is 'x'"),
        ("SOLVER:\n  STEPS: (1, -5)\n", r"SOLVER.STEPS is \(1, -5\)"),
        ("SOLVER: {MAX_ITER: 99999999999}\n", "SOLVER.MAX_ITER is 99999999999"),
        ("DATALOADER: {NUM_WORKERS: 4611686018427387904}\n", "DATALOADER.NUM_WORKERS is 4611"),
        ("MODEL: {ANCHOR_GENERATOR: {SIZES: [[32, .nan]]}}\n", "MODEL.ANCHOR_GENERATOR.SIZES is"),
        ("MODEL: {PIXEL_STD: [1, 0, 1]}\n", "MODEL.PIXEL_STD is"),
        ("INPUT: {MIN_SIZE_TRAIN: [x]}\n", "INPUT.MIN_SIZE_TRAIN is"),
        ("INPUT: {MIN_SIZE_TRAIN: [800, null]}\n", r"INPUT.MIN_SIZE_TRAIN is \(800, None\)"),
        ("MODEL: {RESNETS: {OUT_FEATURES: []}}\n", "MODEL.RESNETS.OUT_FEATURES is empty"),
        ("DATASETS: {TRAIN: [[[a]]]}\n", r"DATASETS.TRAIN is .*: it takes names"),
        ("DATASETS: {TRAIN: [.nan]}\n", r"DATASETS.TRAIN is \(nan,\): it takes names"),
        (f"MODEL: {{RESNETS: {{NORM: '{'9' * 500}'}}}}\n", "MODEL.RESNETS.NORM is .*: no"),
        (f"MODEL: {{RPN: {{IN_FEATURES: [{'a' * 500}]}}}}\n", "MODEL.RPN.IN_FEATURES is .*: no"),
    ],
)
def test_a_number_out_of_its_range_is_refused_with_its_key(write, text, key):
    with pytest.raises(UserError, match=rf"run\.yaml: {key}"):
        load_config(write(text))


@pytest.mark.parametrize("text", ["1e999", "-1", "[" * 5000, "-" * 9000 + "1", "9" * 5000])
def test_an_option_out_of_its_range_is_one_line(write, text):
    with pytest.raises(UserError, match=r"the command line: SOLVER\.BASE_LR ") as refused:
        load_config(write("VERSION: 2\n"), ["SOLVER.BASE_LR", text])
    assert len(str(refused.value)) < 300


def test_the_largest_component_is_a_norm_of_a_gradient(write):
    cfg = load_config(write("SOLVER: {CLIP_GRADIENTS: {NORM_TYPE: .inf}}\n"))
    assert math.isinf(cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE)


def test_torch_s_own_precision_may_be_asked_for(write):
    assert load_config(write("FLOAT32_PRECISION: highest\n")).FLOAT32_PRECISION == "highest"


def test_a_retinanet_of_the_model_zoo_is_not_supported(write):
    """The form of Detectron2's Base-RetinaNet.yaml: anchors are computed by Python in the YAML."""
    path = write(
        "MODEL:\n  META_ARCHITECTURE: RetinaNet\n  ANCHOR_GENERATOR:\n"
        '    SIZES: !!python/object/apply:eval ["[[x, x * 2] for x in [32]]"]\n'
    )
    with pytest.raises(UserError) as refused:
        load_config(path)
    assert str(refused.value) == (
        f"config {path}, line 4: MODEL.ANCHOR_GENERATOR.SIZES: !!python/object/apply:eval is not "
        "supported: write the value itself"
    )


def test_a_section_over_a_value_of_the_base_is_refused(write):
    write("SOLVER: 3\n", "base.yaml")
    with pytest.raises(UserError, match="'SOLVER' is a section here .* not a mapping"):
        load_config(write("_BASE_: base.yaml\nSOLVER: {MAX_ITER: 1}\n"))


# The values of facebookresearch/moco's detection/configs, in files of their names.
MOCO_BASE = """
MODEL:
  META_ARCHITECTURE: GeneralizedRCNN
  RPN: {PRE_NMS_TOPK_TEST: 6000, POST_NMS_TOPK_TEST: 1000}
  ROI_HEADS: {NAME: Res5ROIHeadsExtraNorm}
  BACKBONE: {FREEZE_AT: 0}
  RESNETS: {NORM: naiveSyncBN}
TEST: {PRECISE_BN: {ENABLED: True}}
SOLVER: {IMS_PER_BATCH: 16, BASE_LR: 0.02}
"""
MOCO_TASKS = {
    "pascal_voc_R_50_C4_24k": """
MODEL: {MASK_ON: False, WEIGHTS: "detectron2://ImageNetPretrained/MSRA/R-50.pkl",
        ROI_HEADS: {NUM_CLASSES: 20}}
INPUT:
  MIN_SIZE_TRAIN: (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
  MIN_SIZE_TEST: 800
DATASETS:
  TRAIN: ('voc_2007_trainval', 'voc_2012_trainval')
  TEST: ('voc_2007_test',)
SOLVER:
  STEPS: (18000, 22000)
  MAX_ITER: 24000
  WARMUP_ITERS: 100
""",
    "coco_R_50_C4_2x": """
MODEL: {MASK_ON: True, WEIGHTS: "detectron2://ImageNetPretrained/MSRA/R-50.pkl"}
INPUT:
  MIN_SIZE_TRAIN: (640, 672, 704, 736, 768, 800)
  MIN_SIZE_TEST: 800
DATASETS:
  TRAIN: ("coco_2017_train",)
  TEST: ("coco_2017_val",)
SOLVER:
  STEPS: (120000, 160000)
  MAX_ITER: 180000
""",
}
MOCO_INIT = """
MODEL:
  PIXEL_MEAN: [123.675, 116.280, 103.530]
  PIXEL_STD: [58.395, 57.120, 57.375]
  WEIGHTS: "See Instructions"
  RESNETS: {STRIDE_IN_1X1: False}
INPUT: {FORMAT: "RGB"}
"""


@pytest.mark.parametrize("norm", ["SyncBN", "naiveSyncBN"])
@pytest.mark.parametrize("name", MOCO_TASKS)
def test_every_official_detection_config_loads(write, name, norm):
    """The five files of its folder, of either of its versions; the base alone as well."""
    base = write(MOCO_BASE.replace("naiveSyncBN", norm), "Base-RCNN-C4-BN.yaml")
    supervised = write(f'_BASE_: "Base-RCNN-C4-BN.yaml"\n{MOCO_TASKS[name]}', f"{name}.yaml")
    moco = write(f'_BASE_: "{name}.yaml"\n{MOCO_INIT}', f"{name}_moco.yaml")
    for path in (base, supervised, moco):
        cfg = load_config(path)
        assert norm == cfg.MODEL.RESNETS.NORM
        assert cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeadsExtraNorm"
    assert cfg.MODEL.WEIGHTS == "See Instructions"
    assert {"p": 24000, "c": 180000}[name[0]] == cfg.SOLVER.MAX_ITER
    assert name.startswith("coco") == cfg.MODEL.MASK_ON


@pytest.mark.parametrize("name", MOCO_TASKS)
def test_the_official_detection_configs_load_and_build(write, name):
    write(MOCO_BASE, "Base-RCNN-C4-BN.yaml")
    write(f'_BASE_: "Base-RCNN-C4-BN.yaml"\n{MOCO_TASKS[name]}', f"{name}.yaml")
    path = write(f'_BASE_: "{name}.yaml"\n{MOCO_INIT}', f"{name}_moco.yaml")
    cfg = load_config(path, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    assert cfg.MODEL.RESNETS.NORM == "naiveSyncBN" and cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375] and cfg.SOLVER.BASE_LR == 0.02
    model = build_model(cfg)
    assert type(model.backbone.res2[0].conv1.norm).__name__ == "NaiveSyncBatchNorm"
    assert type(model.roi_heads.res5.norm).__name__ == "NaiveSyncBatchNorm"
    assert load_config(path.replace("_moco", "")).INPUT.FORMAT == "BGR"


def test_a_config_that_is_a_link_to_itself(tmp_path):
    path = tmp_path / "a.yaml"
    path.symlink_to(path)
    with pytest.raises(UserError, match="cannot read config .*a.yaml: Too many levels of symbolic"):
        load_config(str(path))
