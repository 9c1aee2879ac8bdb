"""Data sets and metrics within Detectron2: the same records, the same numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import record_cityscapes_ap
import record_coco_shapes
import record_lvis_ap
import torch

pytest.importorskip("detectron2", reason="the plugin of Detectron2, which is not installed")

from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, detection_utils
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from PIL import Image
from tiny_coco import tiny_coco, write_tiny_coco
from tiny_voc import write_tiny_config, write_tiny_voc

from moco_det.common.errors import UserError
from moco_det.datasets import get_dataset
from moco_det.evaluation import evaluate
from moco_det.plugin import load_config
from moco_det.plugin.data import (
    build_evaluator,
    check_classes,
    check_voc_scoring,
    register_datasets,
)


@pytest.fixture
def cfg(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text(f"OUTPUT_DIR: {tmp_path / 'out'}\nTEST: {{KEYPOINT_OKS_SIGMAS: []}}\n")
    sigmas = str(list(record_coco_shapes.SIGMAS))
    return load_config(str(path), ["TEST.KEYPOINT_OKS_SIGMAS", sigmas])


def coco_case(folder):
    content, detections = record_coco_shapes.draw_case()
    (folder / "a.json").write_text(json.dumps(content))
    as_instances = record_coco_shapes.as_instances
    return f"coco:{folder}/a.json:{folder}", [(d, as_instances(d)) for d in detections]


def lvis_case(folder):
    content, detections = record_lvis_ap.draw_case()
    (folder / "a.json").write_text(json.dumps(content))
    as_instances = record_lvis_ap.as_instances
    return f"lvis:{folder}/a.json:{folder}", [(d, as_instances(d)) for d in detections]


def cityscapes_case(folder):
    maps, detections = record_cityscapes_ap.draw_case()
    record_cityscapes_ap.write_case(folder, maps)
    as_instances = record_lvis_ap.as_instances
    return f"cityscapes:{folder}:val", [(d, as_instances(d)) for d in detections]


def results_and_records(cfg, name, found):
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    for detections, instances in found:
        evaluator.process([{"image_id": detections["image_id"]}], [{"instances": instances}])
    results = evaluator.evaluate()
    (path,) = (Path(cfg.OUTPUT_DIR) / "inference").glob(f"{name.split(':')[0]}_[!i]*.json")
    return results, json.loads(path.read_text())


@pytest.mark.parametrize("case", [coco_case, lvis_case, cityscapes_case])
def test_results_are_those_of_the_saved_records(cfg, tmp_path, case):
    """Detectron2's own for COCO, ours elsewhere; the records of both score the same in ours."""
    name, found = case(tmp_path)
    register_datasets([name])
    DatasetCatalog.get(name)  # as its loader does, which completes COCO's metadata
    results, records = results_and_records(cfg, name, found)
    ours = evaluate(get_dataset(name), records, cfg.TEST.KEYPOINT_OKS_SIGMAS)
    assert results.keys() <= ours.keys()
    assert len(results) == {"coco": 3, "lvis": 2, "city": 1}[name[:4]]
    for task, metrics in results.items():
        expected = {metric: ours[task][metric] for metric in metrics}
        assert metrics == pytest.approx(expected, abs=1e-9, nan_ok=True)
        assert metrics["AP"] > 5


def test_predictions_are_shown_beside_annotations_in_the_course_of_a_training(cfg, tmp_path):
    name, found = coco_case(tmp_path)
    content = json.loads((tmp_path / "a.json").read_text())
    for image in content["images"]:
        Image.new("RGB", (image["width"], image["height"])).save(tmp_path / image["file_name"])
    register_datasets([name])
    DatasetCatalog.get(name)
    with EventStorage(start_iter=7) as storage:
        results_and_records(cfg, name, found)
        shown = storage._vis_data
        assert 0 < len(shown) <= 4
        for title, picture, iteration in shown:
            assert title.startswith("predictions/coco_")
            assert (picture.shape[0], picture.dtype, iteration) == (3, torch.uint8, 7)


@pytest.mark.parametrize(("case", "kind"), [(lvis_case, "lvis"), (cityscapes_case, "cityscapes")])
def test_detectron2_reads_the_same_records(tmp_path, case, kind):
    name, _ = case(tmp_path)
    register_datasets([name, name])
    theirs = DatasetCatalog.get(name)
    for record in theirs:
        for annotation in record["annotations"]:
            assert annotation.pop("bbox_mode").name == "XYXY_ABS"
    dataset = get_dataset(name)
    assert theirs == dataset.records()
    metadata = MetadataCatalog.get(name)
    assert tuple(metadata.thing_classes) == dataset.classes
    assert metadata.evaluator_type.startswith(kind)


def test_names_of_detectron2_that_are_read_here(tmp_path, monkeypatch):
    """Its own reader of Cityscapes cannot be imported, and takes LVIS's other versions."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    maps, _ = record_cityscapes_ap.draw_case()
    record_cityscapes_ap.write_case(tmp_path / "cityscapes", maps)
    name = "cityscapes_fine_instance_seg_val"
    assert name in DatasetCatalog
    for _ in range(2):
        register_datasets([name])
        assert len(DatasetCatalog.get(name)) == len(maps)
    with pytest.raises(UserError, match="lvis_v1_train: only LVIS v0.5"):
        register_datasets(["lvis_v1_train"])


def test_a_semantic_set(tmp_path):
    folder = tmp_path / "gtFine" / "val" / "aachen"
    maps, _ = record_cityscapes_ap.draw_case()
    record_cityscapes_ap.write_case(tmp_path, maps)
    photograph = record_cityscapes_ap.Image.new("RGB", (200, 200))
    for image, numbers in maps.items():
        labels = (numbers % 256).astype("uint8")
        record_cityscapes_ap.Image.fromarray(labels).save(folder / f"{image}_gtFine_labelIds.png")
        path = tmp_path / "leftImg8bit" / "val" / "aachen" / f"{image}_leftImg8bit.png"
        photograph.save(path)
    name = f"cityscapes_sem_seg:{tmp_path}:val"
    register_datasets([name])
    assert DatasetCatalog.get(name) == get_dataset(name).records()
    metadata = MetadataCatalog.get(name)
    assert (len(metadata.stuff_classes), metadata.ignore_label) == (19, 255)
    assert metadata.evaluator_type == "sem_seg"


def test_keypoints_of_one_s_own_are_named(tmp_path):
    name, _ = coco_case(tmp_path)
    register_datasets([name])
    assert MetadataCatalog.get(name).keypoint_names == list(record_coco_shapes.KEYPOINTS)
    assert list(create_keypoint_hflip_indices([name])) == [0, 2, 1, 3]


def test_classes_and_tasks_that_do_not_fit(cfg, tmp_path):
    name, _ = cityscapes_case(tmp_path)
    register_datasets([name])

    def check(*opts):
        changed = cfg.clone()
        changed.defrost()
        changed.merge_from_list(["DATASETS.TRAIN", (name,), *opts])
        check_classes(changed)

    check("MODEL.ROI_HEADS.NUM_CLASSES", 8)
    with pytest.raises(UserError, match="NUM_CLASSES is 80, but .* has 8 classes .*set it to 8"):
        check()
    with pytest.raises(
        UserError, match="META_ARCHITECTURE SemanticSegmentor and dataset .* do not"
    ):
        check("MODEL.META_ARCHITECTURE", "SemanticSegmentor")


def test_an_unknown_kind_is_named(cfg):
    MetadataCatalog.get("fish").evaluator_type = "fish"
    with pytest.raises(UserError, match="fish: no evaluator for the kind 'fish'"):
        build_evaluator(cfg, "fish")
    MetadataCatalog.remove("fish")


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


def test_classes_that_do_not_fit(tmp_path):
    path = write_tiny_config(tmp_path / "tiny.yaml", write_tiny_voc(tmp_path / "voc"))
    cfg = load_config(str(path), ["MODEL.ROI_HEADS.NUM_CLASSES", "20"])
    register_datasets(cfg.DATASETS.TRAIN)
    with pytest.raises(UserError, match=r"has 2 classes \(bar, square\): set it to 2"):
        check_classes(cfg)


def test_detectron2_s_mapper_reads_as_the_native_engine_does(cfg, tmp_path):
    """16 bits were all white, bytes cut from the end trained on."""
    ramp = np.tile(np.linspace(0, 65535, 128).astype(np.uint16), (96, 1))
    Image.fromarray(ramp).save(tmp_path / "a.png")
    item = {"file_name": str(tmp_path / "a.png"), "height": 96, "width": 128}
    pixels = detection_utils.read_image(item["file_name"], "BGR")
    assert np.abs(pixels[..., 0] - ramp / 257).max() <= 1
    mapper = DatasetMapper(cfg, is_train=False)
    assert 120 < mapper(dict(item))["image"].float().mean() < 135
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-12])
    with pytest.raises(UserError, match=r"cannot read image .*a\.png: truncated file"):
        mapper(dict(item))
    assert detection_utils.read_image(str(tmp_path / "a.png"), "L").shape == (96, 128, 1)


@pytest.mark.parametrize("start", [0, 1, 5])
def test_perfect_predictions_have_ap_100_from_a_file_that_lacks_what_detectron2_asks_for(
    cfg, tmp_path, start
):
    """No iscrowd, area, height or width; annotation ids from 0, anew in each image, or none."""
    content = tiny_coco()
    for place, annotation in enumerate(content["annotations"]):
        del annotation["iscrowd"], annotation["area"], annotation["keypoints"], annotation["id"]
        if start < 5:
            annotation["id"] = place if start == 0 else place % 2 + 1
    for image in content["images"]:
        del image["height"], image["width"]
    name = write_tiny_coco(tmp_path / str(start), content)
    register_datasets([name])
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        assert (record["height"], record["width"]) == (96, 128)
        found = Instances((96, 128))
        found.pred_boxes = Boxes(torch.tensor([a["bbox"] for a in record["annotations"]]).float())
        found.scores = torch.full((2,), 0.9)
        found.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        evaluator.process([record], [{"instances": found}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_what_detectron2_s_voc_evaluator_cannot_read_is_said_before(tmp_path):
    root = write_tiny_voc(tmp_path / "voc")
    name = f"voc:{root}:test"
    check_voc_scoring(name)
    split = root / "ImageSets" / "Main" / "test.txt"
    text = split.read_text()
    split.write_text(text.replace("009", "009 1"))
    with pytest.raises(UserError, match="has the line '009 1'.*--engine native"):
        check_voc_scoring(name)
    split.write_text(text)
    path = root / "Annotations" / "009.xml"
    path.write_text(path.read_text().replace("</xmin>", ".5</xmin>"))
    with pytest.raises(UserError, match=r"009.xml: <bndbox/xmin> is '\d+\.5', which Detectron2's"):
        check_voc_scoring(name)
