"""paper_transfer.yaml against experiments.yaml, where that lies beside the repository."""

import pytest
import yaml
from paths import EXPERIMENTS
from recording import FOLDER

PAPER = yaml.safe_load((FOLDER / "paper_transfer.yaml").read_text())


@pytest.fixture(scope="module")
def experiments():
    if not EXPERIMENTS.is_file():
        pytest.skip(f"{EXPERIMENTS} is absent (set MOCO_DET_EXPERIMENTS to the file)")
    return yaml.safe_load(EXPERIMENTS.read_text())


# experiment -> where its published numbers are in experiments.yaml's `transfer`
TABLES = {
    "voc_R50_C4_24k": ("table2b", "table3_c4"),
    "voc_R50_DC5_24k": ("table2a", "table3_dc5"),
    "voc_R50_C4_9k": ("table4",),
    "coco_R50_FPN_1x": ("table5a",),
    "coco_R50_FPN_2x": ("table5b",),
    "coco_R50_FPN_6x": ("tableA1b",),
    "coco_R50_C4_1x": ("table5c",),
    "coco_R50_C4_2x": ("table5d",),
    "coco_R50_FPN_keypoint_2x": ("table6_keypoint",),
    "coco_R50_FPN_densepose_s1x": ("table6_densepose",),
    "lvis_R50_FPN_1x": (),
    "lvis_R50_FPN_2x": ("table6_lvis",),
    "cityscapes_R50_FPN_instance": ("table6_cityscapes_instance",),
    "cityscapes_R50_FCN16_90k": ("table6_cityscapes_semantic",),
    "voc_R50_FCN16_30k": ("table6_voc_semantic",),
}


def test_golden_numbers_are_the_papers(experiments):
    transfer = experiments["transfer"]
    weights = ("random", "supervised", "supervised_frozen_bn", "moco", "end_", "memory_")
    assert set(TABLES) == set(PAPER)
    for name, tables in TABLES.items():
        published = {}
        for table in tables:
            rows = transfer[table]
            assert rows["config"] == name
            published |= {k: v for k, v in rows.items() if k.startswith(weights)}
        if name.startswith("lvis"):
            ablation = transfer["lvis_ablation_A4"][name.rpartition("_")[2]]
            published |= {k.removesuffix("_tuned_bn"): v for k, v in ablation.items()}
        if name == "voc_R50_C4_24k":
            ablation = experiments["ablations_v2"]["table1"]
            published["moco_v2_200"] = ablation["mlp_aug_cos"]["voc"]
            published["moco_v2_800"] = ablation["mlp_aug_cos_800"]["voc"]
        assert PAPER[name]["results"] == published


def test_golden_settings_are_the_papers(experiments):
    transfer, rules = experiments["transfer"], experiments["transfer_rules"]
    recipe, semantic = rules["solver"], rules["semantic_training"]
    for name, tables in TABLES.items():
        paper, facts = PAPER[name], transfer[tables[0]] if tables else {}
        batch, lr, iterations, steps = paper["solver"]
        assert facts.get("iterations", iterations) == iterations
        if "crop" in paper:
            assert (paper["crop"], lr, batch) == (facts["crop"], facts["lr"], semantic["batch"])
            assert steps == [round(f * iterations) for f in semantic["lr_steps_fraction"]]
            continue
        if name.startswith("voc"):
            assert (paper["train"], paper["test"]) == (facts["train"], facts["test"])
            assert steps == [iterations * step // 24000 for step in recipe["voc_steps"]]
            assert paper["scale"] == [rules["image_scale"]["voc_train"], 800]
        elif name.endswith("s1x"):
            first, second = (f"{step // 1000}k" for step in steps)
            schedule = f"s1x: {iterations // 1000}k iterations, steps {first} and {second}"
            assert rules["densepose"] == schedule
        elif name.endswith(("1x", "2x")):
            schedule = rules["schedules_coco"][name[-2:]]
            assert (iterations, steps) == (schedule["iterations"], schedule["steps"])
        elif name.endswith("6x"):
            assert f"{iterations // 1000}k iterations" in facts["note"]
            assert "({}, {})".format(*steps) in facts["note"]
        if "densepose" in name:  # the rate is the baseline's, as test_configs.py holds it to
            assert batch == recipe["batch"]
        elif not name.startswith("cityscapes"):
            assert (batch, lr) == (recipe["batch"], recipe["lr"])
        if name.startswith(("coco", "lvis")):
            assert paper["scale"] == [rules["image_scale"]["coco_train"], 800]
