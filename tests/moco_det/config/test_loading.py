"""The configuration against Detectron2's own (recorded, and live where it is installed)."""

import argparse

import pytest
from detector_configs import CONFIGS, NAMES
from recording import read

from moco_det.common.errors import UserError
from moco_det.config.loading import (
    KEYS,
    add_config_arguments,
    add_config_file,
    add_config_option,
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
    assert (cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.RESNETS.NORM) == (0, "SyncBN")
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


def test_inert_sections_and_empty_ones_are_accepted(write):
    cfg = load_config(write("SOLVER:\nMODEL: {RETINANET: {NUM_CONVS: 3}}\nVERSION: 2\n"))
    assert dict(leaves(cfg)) == dict(leaves(get_cfg()))


def test_odd_number_of_options(write):
    with pytest.raises(UserError, match="'SEED' is left without a value"):
        load_config(write("VERSION: 2\n"), ["SOLVER.MAX_ITER", "1", "SEED"])


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    parser.add_argument("--resume", action="store_true")
    return parser


def test_pairs_follow_the_flags(parser):
    args = parser.parse_args(["--resume", "--config-file", "a.yaml", "SEED", "-1", "VERSION", "2"])
    assert (args.config_file, args.resume) == ("a.yaml", True)
    assert args.opts == ["SEED", "-1", "VERSION", "2"]
    assert parser.parse_args(["--config-file", "a.yaml"]).opts == []


@pytest.mark.parametrize("pairs", [["SEED", "1", "--resume"], ["OUTPUT_DIR", "--resume", "x"]])
def test_a_flag_after_the_pairs_is_named(parser, pairs, capsys):
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--config-file", "a.yaml", *pairs])
    assert ended.value.code == 2
    words = "--resume comes after KEY VALUE pairs: put all flags before them"
    assert words in capsys.readouterr().err


def test_the_config_file_is_required(parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(["SEED", "1"])
    assert "--config-file" in capsys.readouterr().err


def test_pairs_as_a_flag_may_be_followed_by_others():
    parser = argparse.ArgumentParser()
    add_config_file(parser)
    add_config_option(parser)
    parser.add_argument("--limit", type=int)
    args = parser.parse_args(["--opts", "SEED", "1", "--limit", "3"])
    assert (args.config_file, args.opts, args.limit) == (None, ["SEED", "1"], 3)
    assert parser.parse_args([]).opts == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a mapping"),
        ("- a\n- b\n", "not a mapping"),
        ("SOLVER: {A: 1}\n_BASE_: 3\n", "not a mapping"),
        ("SOLVER: [1\n", "not valid YAML"),
        ("SEED: !!python/object/apply:os.getpid []\n", "not valid YAML"),
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
