"""Data sets in Detectron2's catalogs, and their evaluators, with it and with a stand-in for it."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from densepose_symmetries import write_symmetries
from PIL import Image
from recorder import Recorder
from tiny_coco import tiny_coco, write_tiny_coco
from tiny_densepose import write_tiny_densepose
from tiny_semantic import write_tiny_semantic
from tiny_voc import write_tiny_voc

from moco_det.common.errors import UserError
from moco_det.config.loading import get_cfg
from moco_det.datasets import Wanted, get_dataset
from moco_det.densepose.body import file_path


@pytest.fixture
def catalogs(plugin):
    """(DatasetCatalog, MetadataCatalog), which are put back."""
    found = plugin.d2.data.DatasetCatalog, plugin.d2.data.MetadataCatalog
    before = [dict(catalog) for catalog in found]
    yield found
    for catalog, content in zip(found, before, strict=True):
        for name in [name for name in catalog if name not in content]:
            catalog.pop(name)
        catalog.data.update(content)


@pytest.fixture
def voc(tmp_path):
    return f"voc:{write_tiny_voc(tmp_path / 'voc')}:train"


@pytest.fixture
def coco(tmp_path):
    content = tiny_coco()
    for annotation in content["annotations"]:
        annotation["id"] -= 1  # from 0, which the official tool reads as "unmatched"
        annotation["category_id"] *= 10
    for category in content["categories"]:
        category["id"] *= 10
    content["annotations"][0].pop("area")
    return write_tiny_coco(tmp_path / "coco", content)


@pytest.fixture
def semantic(tmp_path):
    return f"voc_sem_seg:{write_tiny_semantic(tmp_path / 'semantic')}:train"


# -- image files ----------------------------------------------------------------------------------


def test_images_are_read_by_our_reader_and_label_maps_by_detectron2_s(plugin, tmp_path):
    read = plugin.data.detection_utils.read_image
    assert read is plugin.data.read_image
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read(str(tmp_path / "a.png"), "RGB"), pixels)
    assert np.array_equal(read(str(tmp_path / "a.png"), "BGR"), pixels[..., ::-1])
    deep = np.full((4, 6), 257 * 80, dtype=np.uint16)  # grey 80 in 16 bits
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert (read(str(tmp_path / "deep.png"), "RGB") == 80).all()
    assert read(str(tmp_path / "a.png"), "L").shape == (5, 7, 1)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-12])
    with pytest.raises(UserError, match="truncated"):
        read(str(tmp_path / "a.png"), "BGR")


# -- catalogs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ours"),
    [("coco_2017_val", True), ("coco:a.json:b", True), ("coco_2017_val_mine", False), ("x", False)],
)
def test_which_sets_are_ours(plugin, name, ours):
    assert plugin.data.is_ours(name) is ours


def test_a_set_of_detectron2_s_own_is_left_alone_but_for_those_read_here(
    plugin, catalogs, tmp_path, monkeypatch
):
    datasets, metadata = catalogs
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    name = "densepose_mine"
    ours = dataclasses.replace(get_dataset(write_tiny_densepose(tmp_path / "tiny")), name=name)
    monkeypatch.setattr(plugin.data, "get_dataset", lambda asked: ours)
    for known in ("fish", name):
        datasets[known] = lambda: ["theirs"]
        metadata.get(known).set(evaluator_type="theirs")
    plugin.data.register_datasets(["fish", name])
    assert datasets.get("fish") == ["theirs"]
    assert metadata.get("fish").evaluator_type == "theirs"
    assert [record["image_id"] for record in datasets.get(name)] == [1, 2]
    assert metadata.get(name).evaluator_type == "densepose"
    symmetries = str(file_path("UV_symmetry_transforms.mat"))
    assert metadata.get(name).densepose_transform_src == symmetries


def test_records_are_ours_with_detectron2_s_box_mode(plugin, catalogs, voc):
    plugin.data.register_datasets([voc, voc])
    expected = get_dataset(voc).records()
    for record in expected:
        for annotation in record["annotations"]:
            annotation["bbox_mode"] = plugin.d2.structures.BoxMode.XYXY_ABS
    assert catalogs[0].get(voc) == expected


def test_what_is_wanted_of_the_records_is_asked_for(plugin, catalogs, tmp_path):
    content = tiny_coco()
    del content["annotations"][1]["segmentation"]
    name = write_tiny_coco(tmp_path / "coco", content)
    plugin.data.register_datasets([name])
    assert len(catalogs[0].get(name)) == 2
    catalogs[0].pop(name)
    plugin.data.register_datasets([name], Wanted(masks=True))
    with pytest.raises(UserError, match="has no mask, and MODEL.MASK_ON is True"):
        catalogs[0].get(name)
    (tmp_path / "coco" / "1.jpg").unlink()
    catalogs[0].pop(name)
    plugin.data.register_datasets([name], Wanted(keypoints=3))
    with pytest.raises(UserError, match=r"1\.jpg does not exist"):
        catalogs[0].get(name)


def test_what_detectron2_s_evaluators_ask_of_voc(plugin, catalogs, voc, tmp_path, monkeypatch):
    plugin.data.register_datasets([voc])
    found = catalogs[1].get(voc)
    assert (found.evaluator_type, found.split, found.year) == ("pascal_voc", "train", 2012)
    assert found.dirname == str(tmp_path / "voc")
    assert found.thing_classes == ["bar", "square"]
    dataset = get_dataset(voc)
    object.__setattr__(dataset, "eleven_point", True)
    assert plugin.data._metadata(dataset)["year"] == 2007


def test_what_detectron2_s_evaluators_ask_of_coco(plugin, catalogs, coco, tmp_path):
    plugin.data.register_datasets([coco])
    found = catalogs[1].get(coco)
    assert found.evaluator_type == "coco"
    assert (found.json_file, found.image_root) == tuple(coco.split(":")[1:])
    assert found.thing_dataset_id_to_contiguous_id == {10: 0, 20: 1}
    assert found.thing_classes == ["red", "green"]
    assert found.keypoint_names == ["a", "b", "c"]
    assert found.keypoint_flip_map == []


def test_what_detectron2_s_evaluators_ask_of_label_maps(plugin, catalogs, semantic):
    plugin.data.register_datasets([semantic])
    found = catalogs[1].get(semantic)
    assert (found.evaluator_type, found.ignore_label) == ("sem_seg", 255)
    assert (len(found.stuff_classes), found.stuff_classes[15]) == (21, "person")
    assert found.get("thing_classes") is None


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("tag", ["pose", "truncated", "difficult"])
def test_a_tag_that_detectron2_s_evaluator_needs(plugin, voc, tmp_path, tag):
    path = tmp_path / "voc" / "Annotations" / "003.xml"
    change(path, f"<{tag}>", "<x>")
    change(path, f"</{tag}>", "</x>")
    with pytest.raises(UserError, match=f"003.xml: an <object> without <{tag}>.*--engine native"):
        plugin.data.register_datasets([voc])


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("ImageSets/Main/test.txt", "009", "009 1", "has the line '009 1'.*--engine native"),
        ("Annotations/009.xml", "</xmin>", ".5</xmin>", r"009.xml: <bndbox/xmin> is '-?\d+\.5'"),
        ("Annotations/009.xml", "</ymax>", ".5</ymax>", r"009.xml: <bndbox/ymax> is '-?\d+\.5'"),
        ("Annotations/009.xml", "<difficult>0", "<difficult>", "<difficult> is ''"),
    ],
)
def test_what_detectron2_s_voc_evaluator_cannot_read(
    plugin, voc, tmp_path, file, old, new, message
):
    name = voc.replace(":train", ":test")
    change(tmp_path / "voc" / "Annotations" / "009.xml", "<xmin>", "<xmin>-")  # it reads a sign
    plugin.data.check_voc_scoring(name)
    change(tmp_path / "voc" / file, old, new)
    with pytest.raises(UserError, match=message):
        plugin.data.check_voc_scoring(name)
    plugin.data.check_voc_scoring(voc)  # the other split has nothing wrong


def config(*opts):
    cfg = get_cfg()
    cfg.merge_from_list(list(opts))
    return cfg


@pytest.mark.parametrize("part", ["TRAIN", "TEST"])
def test_classes_and_tasks_that_do_not_fit(plugin, catalogs, coco, semantic, part):
    plugin.data.register_datasets([coco, semantic])

    def check(name, *opts):
        plugin.data.check_classes(config(f"DATASETS.{part}", (name,), *opts))

    segmentor = ("MODEL.META_ARCHITECTURE", "SemanticSegmentor", "MODEL.SEM_SEG_HEAD.NUM_CLASSES")
    check(coco, "MODEL.ROI_HEADS.NUM_CLASSES", 2)
    check(semantic, *segmentor, 21)
    for name, opts, message in (
        (coco, (), "ROI_HEADS.NUM_CLASSES is 80, but .* has 2 classes .*set it to 2"),
        (semantic, (*segmentor, 20), "SEM_SEG_HEAD.NUM_CLASSES is 20.*set it to 21"),
        (semantic, (), "GeneralizedRCNN and dataset .* do not fit"),
        (coco, (*segmentor, 2), "SemanticSegmentor and dataset .* do not fit"),
    ):
        with pytest.raises(UserError, match=message):
            check(name, *opts)


# -- loaders --------------------------------------------------------------------------------------


def test_a_test_loader_has_no_label_maps(plugin, catalogs, semantic, monkeypatch):
    plugin.data.register_datasets([semantic])
    build, mapper = Recorder(), Recorder("mapper")
    monkeypatch.setattr(plugin.pixel_data, "build_detection_test_loader", build)
    monkeypatch.setattr(plugin.pixel_data, "DatasetMapper", mapper)
    cfg = config("DATALOADER.NUM_WORKERS", 3)
    plugin.pixel_data.build_semantic_test_loader(cfg, semantic)
    (((records,), options),) = build.calls
    assert options == {"mapper": "mapper", "num_workers": 3}
    assert mapper.calls == [((cfg,), {"is_train": False})]
    expected = get_dataset(semantic).records()
    for record in expected:
        del record["sem_seg_file_name"]
    assert records == expected


def test_dense_pose_is_trained_on_where_there_is_some(plugin, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    build, records, mapper = Recorder("loader"), [{"annotations": []}], Recorder("mapper")
    whole = dict.fromkeys(("dp_x", "dp_y", "dp_I", "dp_U", "dp_V"), [1.0])
    part = {k: v for k, v in whole.items() if k != "dp_V"}
    records += [{"annotations": [part]}, {"annotations": [part, whole]}]
    found = Recorder(records)
    monkeypatch.setattr(plugin.data, "get_detection_dataset_dicts", found)
    monkeypatch.setattr(plugin.data, "build_detection_train_loader", build)
    package = {"densepose": SimpleNamespace(), "densepose.data": SimpleNamespace()}
    package["densepose.data"].DatasetMapper = mapper
    for name, module in package.items():
        monkeypatch.setitem(sys.modules, name, module)
    cfg = config("DATASETS.TRAIN", ("a", "b"), "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)
    with pytest.raises(UserError, match="UV_symmetry_transforms.mat"):
        plugin.data.build_dense_pose_loader(cfg, 6)
    write_symmetries(file_path("UV_symmetry_transforms.mat"))
    assert plugin.data.build_dense_pose_loader(cfg, 6) == "loader"
    asked = {"filter_empty": False, "min_keypoints": 0, "proposal_files": None}
    assert found.calls == [((("a", "b"),), asked)]
    assert mapper.calls == [((cfg,), {"is_train": True})]
    ((arguments, options),) = build.calls
    assert arguments == (cfg,)
    assert list(options.pop("dataset")) == records[2:]
    assert options == {"mapper": "mapper", "total_batch_size": 6}
    del records[2:]
    with pytest.raises(UserError, match=r"\('a', 'b'\) has no object with dp_x, dp_y"):
        plugin.data.build_dense_pose_loader(cfg, 6)


# -- evaluation -----------------------------------------------------------------------------------


def instances(plugin, count, **fields):
    structures = plugin.d2.structures
    found = structures.Instances((96, 128))
    found.pred_boxes = structures.Boxes(torch.arange(4.0 * count).view(count, 4))
    found.scores, found.pred_classes = torch.rand(count), torch.arange(count)
    for name, value in fields.items():
        setattr(found, name, value)
    return found


def test_fields_of_detectron2_s_instances(plugin):
    masks, points = torch.rand(2, 96, 128) > 0.5, torch.rand(2, 3, 3)
    for fields in ({}, {"pred_masks": masks}, {"pred_masks": masks, "pred_keypoints": points}):
        found = instances(plugin, 2, **fields)
        output = plugin.data.fields_of(found)
        expected = {
            "boxes": found.pred_boxes.tensor,
            "scores": found.scores,
            "classes": found.pred_classes,
        } | {name.removeprefix("pred_"): value for name, value in fields.items()}
        assert output.keys() == expected.keys()
        assert all(output[name] is value for name, value in expected.items())


def test_surfaces_are_those_of_each_detection_in_its_own_box(plugin, monkeypatch):
    class Found:
        """Two detections."""

        pred_densepose, pred_boxes = ("first chart", "second chart"), ("first box", "second box")

        def __len__(self):
            return 2

    converter = SimpleNamespace(convert=lambda chart, box: (chart, box))

    def quantize(result):
        return SimpleNamespace(labels_uv_uint8=("quantized", *result))

    package = {
        "densepose": SimpleNamespace(),
        "densepose.converters": SimpleNamespace(ToChartResultConverter=converter),
        "densepose.structures": SimpleNamespace(quantize_densepose_chart_result=quantize),
    }
    for name, module in package.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert plugin.data.surfaces(Found()) == [
        ("quantized", "first chart", "first box"),
        ("quantized", "second chart", "second box"),
    ]


@pytest.mark.parametrize("scored", [False, True])
def test_predictions_are_saved_and_where_wanted_scored(plugin, coco, tmp_path, capsys, scored):
    records = plugin.data.PredictionRecords(str(tmp_path / "out"), coco, scored)
    boxes = torch.tensor([[5.0, 8, 35, 48], [60, 20, 100, 80]])
    for _ in range(2):
        records.reset()
        for image in (1, 2):
            found = instances(plugin, 2, scores=torch.tensor([0.9, 0.8]))
            found.pred_boxes = plugin.d2.structures.Boxes(boxes)
            records.process([{"image_id": image}], [{"instances": found}])
    results = records.evaluate()
    (path,) = (tmp_path / "out" / "inference").iterdir()
    saved = json.loads(path.read_text())
    assert [x["image_id"] for x in saved] == [1, 2]
    assert saved[1]["boxes"] == boxes.tolist()
    assert (results is None) is not scored
    if scored:
        assert results["bbox"]["AP"] == pytest.approx(100)
        assert "copypaste: Task: bbox" in capsys.readouterr().out


def test_scores_of_pixels_are_saved_as_label_maps(plugin, tmp_path):
    records = plugin.data.PredictionRecords(str(tmp_path), "voc_sem_seg:a:b")
    scores = torch.zeros(3, 4, 6)
    scores[2, :, 3:] = 1
    records.process([{"image_id": "x"}], [{"sem_seg": scores}])
    (record,) = records.records
    assert [segment["category_id"] for segment in record["sem_seg"]] == [0, 2]


def parts(plugin, monkeypatch, name, kind, *opts, output="out"):
    """The evaluators of a kind of data set, and the calls that made Detectron2's."""
    made = {}
    for evaluator in ("COCOEvaluator", "PascalVOCDetectionEvaluator"):
        made[evaluator] = Recorder(evaluator)
        monkeypatch.setattr(plugin.data, evaluator, made[evaluator])
    plugin.d2.data.MetadataCatalog.get(name).set(evaluator_type=kind)
    cfg = config("OUTPUT_DIR", str(output), *opts)
    found = plugin.data.build_evaluator(cfg, name)._evaluators
    return found, {k: v.calls for k, v in made.items() if v.calls}


@pytest.mark.parametrize("kind", ["lvis", "cityscapes_instance", "sem_seg", "densepose"])
def test_kinds_that_are_scored_here(plugin, catalogs, monkeypatch, kind):
    ((records,), made) = parts(plugin, monkeypatch, "mine", kind)
    assert made == {}
    assert (records.scored, records.dataset_name, records.output_dir) == (True, "mine", "out")


def test_kinds_that_detectron2_scores(plugin, catalogs, monkeypatch):
    ((records, official), made) = parts(plugin, monkeypatch, "mine", "pascal_voc")
    assert (records.scored, official) == (False, "PascalVOCDetectionEvaluator")
    assert made == {"PascalVOCDetectionEvaluator": [(("mine",), {})]}
    sigmas = ("TEST.KEYPOINT_OKS_SIGMAS", [0.1, 0.2])
    ((records, official), made) = parts(plugin, monkeypatch, "other", "coco", *sigmas)
    assert (records.scored, official) == (False, "COCOEvaluator")
    options = {"output_dir": "out/inference", "kpt_oks_sigmas": [0.1, 0.2]}
    assert made == {"COCOEvaluator": [(("other",), options)]}
    with pytest.raises(UserError, match="third: no evaluator for the kind 'fish'"):
        parts(plugin, monkeypatch, "third", "fish")


def test_coco_is_scored_by_a_completed_copy(plugin, catalogs, coco, tmp_path, monkeypatch):
    plugin.data.register_datasets([coco])
    before = catalogs[1].get(coco).as_dict()
    for on in (False, True):
        opts = ("MODEL.KEYPOINT_ON", on)
        parts(plugin, monkeypatch, coco, "coco", *opts, output=tmp_path / "out")
        found = catalogs[1].get(coco).as_dict()
        changed = {key for key in before if found[key] != before[key]}
        assert changed == {"json_file"}
        content = json.loads(Path(found["json_file"]).read_text())
        assert [a["id"] for a in content["annotations"]] == [1, 2, 3, 4]
        assert content["annotations"][0]["area"] == 30 * 40
        assert ("num_keypoints" in content["annotations"][0]) is on
