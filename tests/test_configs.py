"""Every file in configs/ against the papers' facts, and against Detectron2's baselines.

The facts are in tests/golden/paper_transfer.yaml, which test_paper_transfer.py there checks.
"""

import functools
import re

import pytest
import yaml
from paths import CONFIGS
from recording import FOLDER, read

from moco_det.config.loading import get_cfg, leaves, load_config

RUNS = sorted(path.stem for path in CONFIGS.glob("*.yaml") if not path.name.startswith("Base-"))
QUICK = sorted(
    f"quick/{path.name}"
    for path in (CONFIGS / "quick").glob("*.yaml")
    if not path.name.startswith("Base-")
)
REVISITING = sorted(
    f"revisiting/{path.name}"
    for path in (CONFIGS / "revisiting").glob("*.yaml")
    if not path.name.startswith("Base-")
)  # what they say is in test_configs_revisiting.py
PAPER = yaml.safe_load((FOLDER / "paper_transfer.yaml").read_text())
INITS = ("supervised_frozen_bn", "supervised", "random", "moco")
FIELDS = ("Command", "Hardware", "Time", "Expected", "Source")

# What a run changes, by the papers' rules, in the Detectron2 baseline that it starts from.
TUNED_BN = {"MODEL.BACKBONE.FREEZE_AT", "MODEL.RESNETS.NORM", "TEST.PRECISE_BN.ENABLED"}
FPN_RULE = TUNED_BN | {"MODEL.FPN.NORM"}
C4_RULE = TUNED_BN | {"MODEL.ROI_HEADS.NAME"}
DC5_RULE = TUNED_BN | {
    "MODEL.BACKBONE.NAME",
    "MODEL.RPN.IN_FEATURES",
    "MODEL.ROI_HEADS.IN_FEATURES",
}
SCHEDULE = {"SOLVER.STEPS", "SOLVER.MAX_ITER"}
VOC = {
    "DATASETS.TRAIN",
    "DATASETS.TEST",
    "INPUT.MIN_SIZE_TRAIN",
    "MODEL.ROI_HEADS.NUM_CLASSES",
    "SOLVER.WARMUP_ITERS",
}
CITYSCAPES = {"MODEL.WEIGHTS", "INPUT.MASK_FORMAT", "TEST.EVAL_PERIOD"}
VOC_C4 = "PascalVOC-Detection/faster_rcnn_R_50_C4"
COCO_FPN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x"
COCO_C4 = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x"
DENSEPOSE = "densepose_rcnn_R_50_FPN_s1x_legacy"
LVIS = "LVISv0.5-InstanceSegmentation/mask_rcnn_R_50_FPN_1x"
BASELINES = {
    "voc_R50_C4_24k_supervised": (VOC_C4, C4_RULE | SCHEDULE),
    "voc_R50_C4_9k_supervised": (VOC_C4, C4_RULE | SCHEDULE | {"DATASETS.TRAIN"}),
    "voc_R50_DC5_24k_supervised": (
        "COCO-Detection/faster_rcnn_R_50_DC5_1x",
        DC5_RULE | SCHEDULE | VOC,
    ),
    "coco_R50_FPN_1x_supervised": (COCO_FPN, FPN_RULE),
    "coco_R50_FPN_2x_supervised": (COCO_FPN, FPN_RULE | SCHEDULE),
    "coco_R50_FPN_6x_supervised": (COCO_FPN, FPN_RULE | SCHEDULE),
    "coco_R50_C4_1x_supervised": (COCO_C4, C4_RULE),
    "coco_R50_C4_2x_supervised": (COCO_C4, C4_RULE | SCHEDULE),
    "coco_R50_FPN_keypoint_2x_supervised": (
        "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x",
        FPN_RULE | SCHEDULE,
    ),
    "coco_R50_FPN_densepose_s1x_supervised": (
        DENSEPOSE,
        FPN_RULE | {"MODEL.ROI_MASK_HEAD.NUM_CONV"},  # of no head that there is
    ),
    "lvis_R50_FPN_1x_supervised": (LVIS, FPN_RULE),
    "lvis_R50_FPN_2x_supervised": (LVIS, FPN_RULE | SCHEDULE),
    "lvis_R50_FPN_1x_supervised_frozen_bn": (LVIS, {"MODEL.BACKBONE.FREEZE_AT"}),
    "lvis_R50_FPN_2x_supervised_frozen_bn": (LVIS, {"MODEL.BACKBONE.FREEZE_AT"} | SCHEDULE),
    "cityscapes_R50_FPN_instance_supervised": (
        "Cityscapes/mask_rcnn_R_50_FPN",
        FPN_RULE | CITYSCAPES,
    ),
}
# What the initialisation decides, and nothing else.
INIT_KEYS = {
    "MODEL.WEIGHTS",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "MODEL.RESNETS.STRIDE_IN_1X1",
    "INPUT.FORMAT",
}


def split(run):
    """ "coco_R50_C4_2x_moco" -> "coco_R50_C4_2x", "moco"."""
    init = next(init for init in INITS if run.endswith(f"_{init}"))
    return run.removesuffix(f"_{init}"), init


@functools.cache
def values(run):
    """Every key of a run's config, with its value."""
    return dict(leaves(load_config(CONFIGS / f"{run}.yaml")))


def different(one, other):
    return {key for key in one if repr(one[key]) != repr(other[key])}


def reported(experiment, init):
    """The rows of the papers that a run stands for: name of the weights -> numbers."""
    results = PAPER[experiment]["results"]
    other = {"random", "supervised", "supervised_frozen_bn"}
    wanted = set(results) - other if init == "moco" else {init}
    return {name: numbers for name, numbers in results.items() if name in wanted}


def test_there_is_one_run_for_each_reported_initialisation_and_no_other():
    wanted = {
        f"{experiment}_{init}"
        for experiment in PAPER
        for init in INITS
        if reported(experiment, init)
    }
    assert set(RUNS) == wanted
    assert len(RUNS) == 45


@pytest.mark.parametrize("run", RUNS)
def test_schedule_and_data(run):
    found, paper = values(run), PAPER[split(run)[0]]
    batch, lr, iterations, steps = paper["solver"]
    detection_on_voc = run.startswith("voc") and "FCN16" not in run
    solver = {
        "IMS_PER_BATCH": batch,
        "BASE_LR": lr,
        "MAX_ITER": iterations,
        "STEPS": tuple(steps),
        "GAMMA": 0.1,
        "MOMENTUM": 0.9,
        "WEIGHT_DECAY": 0.0001,
        "LR_SCHEDULER_NAME": "WarmupMultiStepLR",
        "WARMUP_ITERS": 100 if detection_on_voc else 1000,
    }
    assert {key: found[f"SOLVER.{key}"] for key in solver} == solver
    assert found["DATASETS.TRAIN"] == tuple(paper["train"])
    assert found["DATASETS.TEST"] == (paper["test"],)
    head = "SEM_SEG_HEAD" if "FCN16" in run else "ROI_HEADS"
    assert found[f"MODEL.{head}.NUM_CLASSES"] == paper["classes"]


@pytest.mark.parametrize("run", RUNS)
def test_scales_and_crop(run):
    found, paper = values(run), PAPER[split(run)[0]]
    assert found["INPUT.RANDOM_FLIP"] == "horizontal"
    assert found["INPUT.CROP.ENABLED"] is ("crop" in paper)
    if "crop" in paper:
        assert found["INPUT.CROP.TYPE"] == "absolute"
        assert list(found["INPUT.CROP.SIZE"]) == [paper["crop"]] * 2
        assert found["INPUT.RANDOM_SCALE"] == (0.5, 2.0)
        assert found["INPUT.MIN_SIZE_TEST"] == 0
    else:
        (smallest, largest), test = paper["scale"]
        assert found["INPUT.RANDOM_SCALE"] == ()
        assert found["INPUT.MIN_SIZE_TRAIN"] == tuple(range(smallest, largest + 1, 32))
        assert found["INPUT.MIN_SIZE_TEST"] == test


@pytest.mark.parametrize("run", RUNS)
def test_bn_is_tuned_and_synchronised_but_in_the_frozen_rows(run):
    found = values(run)
    official = "naiveSyncBN" if "_C4_" in run else "SyncBN"  # only C4 has official configs
    trained = "" if run.endswith("frozen_bn") else official
    assert {key: value for key, value in found.items() if key.endswith(".NORM")} == {
        "MODEL.RESNETS.NORM": trained or "FrozenBN",
        "MODEL.FPN.NORM": trained if "FPN" in run else "",
        "MODEL.ROI_BOX_HEAD.NORM": "",
        "MODEL.ROI_MASK_HEAD.NORM": "",
        "MODEL.SEM_SEG_HEAD.NORM": trained if "FCN16" in run else "GN",  # GN: not built
    }
    assert found["MODEL.BACKBONE.FREEZE_AT"] == 0
    assert found["TEST.PRECISE_BN.ENABLED"] is bool(trained)
    if "_C4_" in run:
        assert found["MODEL.ROI_HEADS.NAME"] == "Res5ROIHeadsExtraNorm"


@pytest.mark.parametrize("run", RUNS)
def test_heads_of_the_task(run):
    found = values(run)
    instances = run.startswith(("coco", "lvis")) or "FPN_instance" in run
    keypoints, dense_pose = "keypoint" in run, "densepose" in run
    assert found["MODEL.MASK_ON"] is (instances and not keypoints and not dense_pose)
    assert found["MODEL.KEYPOINT_ON"] is keypoints
    assert found["MODEL.DENSEPOSE_ON"] is dense_pose
    semantic = found["MODEL.META_ARCHITECTURE"] == "SemanticSegmentor"
    assert semantic is ("FCN16" in run)
    if semantic:  # appendix A.5: total stride 16, 256 channels
        assert found["MODEL.SEM_SEG_HEAD.NAME"] == "FCN16Head"
        assert found["MODEL.SEM_SEG_HEAD.COMMON_STRIDE"] == 16
        assert found["MODEL.SEM_SEG_HEAD.CONVS_DIM"] == 256
        assert found["MODEL.SEM_SEG_HEAD.IN_FEATURES"] == found["MODEL.RESNETS.OUT_FEATURES"]
        assert found["MODEL.RESNETS.RES5_DILATION"] == 2
    if run.startswith("lvis"):
        assert found["DATALOADER.SAMPLER_TRAIN"] == "RepeatFactorTrainingSampler"
        assert found["DATALOADER.REPEAT_THRESHOLD"] == 0.001
        assert found["TEST.DETECTIONS_PER_IMAGE"] == 300


@pytest.mark.parametrize("run", RUNS)
def test_weights_and_what_they_need_of_the_input(run):
    init, found = split(run)[1], values(run)
    rgb = {
        "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "INPUT.FORMAT": "RGB",
    }
    msra = {key: value for key, value in leaves(get_cfg()) if key in rgb}  # Detectron2's defaults
    weights = {
        "moco": "output/moco_r50.pkl",
        "random": "",
        "supervised": "detectron2://ImageNetPretrained/MSRA/R-50.pkl",
    }[init.removesuffix("_frozen_bn")]
    needed = msra if init.startswith("supervised") else rgb
    assert {key: found[key] for key in INIT_KEYS} == needed | {"MODEL.WEIGHTS": weights}


@pytest.mark.parametrize("run", RUNS)
def test_initialisations_of_an_experiment_differ_in_nothing_else(run):
    experiment, init = split(run)
    if init in ("moco", "random"):
        assert different(values(run), values(f"{experiment}_supervised")) <= INIT_KEYS


@pytest.mark.parametrize("run", BASELINES)
def test_rest_is_detectron2s_baseline(run):
    """All but the papers' changes is as in Detectron2, whether the file names the key or not."""
    name, changed = BASELINES[run]
    baseline = {key: repr(value) for key, value in leaves(get_cfg())}
    recorded = read("baselines") | read("densepose_config")
    baseline |= {key: value for key, value in recorded[name].items() if key in baseline}
    found = {key: repr(value) for key, value in values(run).items()}
    assert {key for key in found if found[key] != baseline[key]} == changed


def test_every_detection_experiment_is_held_to_a_baseline():
    detection = {name for name, paper in PAPER.items() if "crop" not in paper}
    assert {split(run)[0] for run in BASELINES} == detection


@pytest.mark.parametrize("path", [*(f"{run}.yaml" for run in RUNS), *QUICK, *REVISITING])
def test_file_says_only_what_is_its_own(path):
    """No file repeats a value that the files it is laid over give already."""
    layers = _layers(CONFIGS / path)
    assert layers
    given = {}
    for name, own in layers:
        repeated = {key for key in own if key in given and repr(own[key]) == repr(given[key])}
        assert not repeated, f"{name} says again {sorted(repeated)}"
        given |= own


def _layers(path):
    """(file, its own leaves) in the order in which they are laid over each other."""
    content = yaml.safe_load(path.read_text())
    bases = content.pop("_BASE_", [])
    bases = [bases] if isinstance(bases, str) else bases
    below = [layer for base in bases for layer in _layers(path.parent / base)]
    return [*below, (path.name, dict(leaves(content)))]


def test_every_base_is_used():
    used = {name for path in (*RUNS, *QUICK, *REVISITING) for name, _ in _layers(_file(path))}
    bases = *CONFIGS.glob("Base-*.yaml"), *CONFIGS.glob("revisiting/Base-*.yaml")
    assert {path.name for path in bases} <= used


def _file(name):
    return CONFIGS / (name if name.endswith(".yaml") else f"{name}.yaml")


def header(run):
    """Field of the opening comment -> its lines."""
    comment = []
    for line in _file(run).read_text().splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#"))
    fields, current = {"Title": []}, "Title"
    for line in comment:
        match = re.match(r" (\w+): +(.*)", line)
        if match and match[1] in FIELDS:
            current, line = match[1], match[2]
        fields.setdefault(current, []).append(line.strip())
    return fields


@pytest.mark.parametrize("run", [*RUNS, *QUICK, *REVISITING])
def test_header(run):
    fields = header(run)
    assert set(fields) == {"Title", *FIELDS}
    assert all(any(lines) for lines in fields.values())
    command = " ".join(fields["Command"])
    assert f"--config-file configs/{_file(run).relative_to(CONFIGS)}" in command


@pytest.mark.parametrize("run", RUNS)
def test_header_names_weights_hardware_and_table(run):
    fields, (_, init) = header(run), split(run)
    assert ("convert_to_d2" in " ".join(fields["Command"])) is (init == "moco")
    gpus, images = re.match(r"(\d+) GPUs, (\d+) images? each", fields["Hardware"][0]).groups()
    assert int(gpus) * int(images) == values(run)["SOLVER.IMS_PER_BATCH"]
    source = " ".join(fields["Source"])
    assert re.search(r"MoCo v1 \(arXiv:1911\.05722\), (table (\d|A\.1)|appendix A\.4)", source)


@pytest.mark.parametrize("run", RUNS)
def test_header_expects_the_published_numbers(run):
    experiment, init = split(run)
    columns = PAPER[experiment]["columns"]
    rows = reported(experiment, init)
    labels = {
        "random": "random init.",
        "supervised": "super. IN-1M",
        "supervised_frozen_bn": "super. IN-1M, frozen BN",
        "moco_in1m": "MoCo IN-1M",
        "moco_in14m": "MoCo IN-14M",
        "moco_yfcc100m": "MoCo YFCC-100M",
        "moco_ig1b": "MoCo IG-1B",
        "end_to_end": "end-to-end",
        "memory_bank": "memory bank",
        "moco_v2_200": "MoCo v2 IN-1M, 200 epochs",
        "moco_v2_800": "MoCo v2 IN-1M, 800 epochs",
    }
    expected = {}
    for line in header(run)["Expected"]:
        if "of 5 runs" in line:
            continue
        label, _, text = line.rpartition(": ")
        expected[label] = re.findall(r"([A-Za-z][A-Za-z0-9 ]*) (\d+\.\d)", text)
    assert expected == {
        labels[name]: [(c, str(n)) for c, n in zip(columns, numbers, strict=True)]
        for name, numbers in rows.items()
    }
