"""Dense pose metrics: hand cases on a flat body, and the numbers of Detectron2's DensePose."""

import json
import math
from collections import defaultdict

import numpy as np
import pytest
import record_densepose_ap
from densepose_template import write_template
from pycocotools import mask as coco_mask
from recording import read

from moco_det.common.errors import UserError
from moco_det.datasets import get_dataset
from moco_det.densepose.body import pairwise_similarity, read_geodesics
from moco_det.densepose.points import encode_iuv
from moco_det.evaluation import evaluate

BOX = [10, 20, 48, 48]
AREA = 2000  # medium
FULL = coco_mask.encode(np.ones((256, 256), np.uint8, order="F"))
FULL = {**FULL, "counts": FULL["counts"].decode()}
MASKS = [FULL, *[[]] * 13]
TORSO, HAND = 0.351, 0.107  # mean distances


@pytest.fixture(scope="module", autouse=True)
def body(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    write_template(root / "densepose" / "data", record_densepose_ap.STEPS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root))
        yield


@pytest.fixture
def score(tmp_path):
    """Function: objects, and detections ({"bbox", "score", "iuv"}, image 1), to metrics."""

    def function(objects, detections, images=1):
        numbers = range(1, images + 1)
        content = {
            "images": [
                {"id": i, "file_name": f"{i}.jpg", "height": 200, "width": 200} for i in numbers
            ],
            "categories": [{"id": 1, "name": "person"}],
            "annotations": [{"id": i, **item} for i, item in enumerate(objects, start=1)],
        }
        results = [{**found, **encode_iuv(found["iuv"])} for found in detections]
        found = evaluated(content, results, tmp_path)
        # The tool divides by 1 and the least that is more than nothing.
        return {
            task: {name: round(value, 9) for name, value in metrics.items()}
            for task, metrics in found.items()
        }

    return function


def evaluated(content, results, folder):
    (folder / "a.json").write_text(json.dumps(content))
    dataset = get_dataset(f"densepose:{folder}/a.json:{folder}")
    return evaluate(dataset, as_predictions(results))


def as_predictions(results):
    """Results in the official format, by image."""
    found = defaultdict(lambda: defaultdict(list))
    for result in results:
        x, y, width, height = result["bbox"]
        of_image = found[result.get("image_id", 1)]
        of_image["boxes"].append([x, y, x + width, y + height])
        of_image["scores"].append(result["score"])
        of_image["classes"].append(0)
        of_image["densepose"].append({key: result[key] for key in ("uv_shape", "uv_data")})
    return [{"image_id": image_id, **fields} for image_id, fields in found.items()]


def person(box=BOX, places=((32, 32), (96, 32), (160, 32), (224, 32)), **fields):
    """Points of the torso at (U, V) = (0.2, 0.2), where the box is 256 wide and high."""
    x, y = zip(*places, strict=True)
    count = len(places)
    points = {"dp_x": x, "dp_y": y, "dp_I": [1] * count, "dp_U": [0.2] * count}
    points["dp_V"] = points["dp_U"]
    return {**unposed(box), **points, "dp_masks": MASKS, **fields}


def unposed(box=BOX, **fields):
    return {"image_id": 1, "category_id": 1, "bbox": box, "area": AREA, "iscrowd": 0, **fields}


def detection(box=BOX, score=0.9, part=1, u=51, v=51, width=None):
    """One part all over the box, or over `width` columns of it."""
    iuv = np.zeros((3, int(box[3]), int(box[2])), np.uint8)
    iuv[:, :, :width] = np.reshape([part, u, v], (3, 1, 1))
    return {"bbox": box, "score": score, "iuv": iuv}


def similarity(found, item):
    """GPS of one detection and one object."""
    found = {**found, **encode_iuv(found["iuv"]), "image_id": 1}
    found["densepose"] = {key: found[key] for key in ("uv_shape", "uv_data")}
    return pairwise_similarity([item], [found], (200, 200), read_geodesics()).gps.item()


def test_a_perfect_detection(score):
    found = score([person()], [detection()])
    for task in ("densepose_gps", "densepose_gpsm", "densepose_segm"):
        perfect = {"AP", "AP50", "AP75", "APm", "AR", "AR50", "AR75", "ARm", "AP-person"}
        assert {name: found[task][name] for name in perfect} == dict.fromkeys(perfect, 100)
        assert math.isnan(found[task]["APl"]) and math.isnan(found[task]["ARl"])
    assert found["bbox"]["AP"] == 100


@pytest.mark.parametrize(
    ("wrong", "distance"),
    [
        ({}, 0),
        ({"u": 153}, 0.1),  # 0.6 where 0.2 is right, on a side of 0.25 m
        ({"u": 153, "v": 255}, math.hypot(0.1, 0.2)),
        ({"u": 60}, 0),  # the nearest vertex is the right one
        ({"part": 2}, 0.25),  # the right half of the torso
        ({"part": 3}, 10),
        ({"part": 0}, math.inf),
    ],
)
def test_similarity_of_a_wrong_surface(wrong, distance):
    expected = math.exp(-(distance**2) / (2 * TORSO**2))
    assert similarity(detection(**wrong), person()) == pytest.approx(expected, abs=1e-6)


def test_each_point_is_measured_by_the_size_of_its_part():
    item = person(dp_I=[1, 1, 3, 3])
    iuv = detection()
    iuv["iuv"][0, :, 24:] = 3
    iuv["iuv"][1] = 102  # 0.05 m off
    expected = [math.exp(-(0.05**2) / (2 * kappa**2)) for kappa in (TORSO, HAND)]
    assert similarity(iuv, item) == pytest.approx(sum(expected) / 2, abs=1e-6)


def test_points_without_a_part_are_left_out():
    assert similarity(detection(width=24), person(dp_I=[1, 1, 0, 0])) == 1
    assert similarity(detection(), person(dp_I=[0, 0, 0, 0])) == 0


def test_points_outside_of_the_detection_are_lost():
    x, y, _, h = BOX
    assert similarity(detection([x, y, 24, h]), person()) == 0.5
    assert similarity(detection([x + 100, y, 24, h]), person()) == 0


def test_pixels_are_found_by_rounding_towards_zero():
    """32 / 255 of 48 pixels are 6.02: in column 6 of the box, 0.98 left of column 7."""
    x, y, w, h = BOX
    item = person(places=[(32, 32)])
    assert similarity(detection(width=7), item) == 1
    assert similarity(detection(width=6), item) == 0
    assert similarity(detection([x + 7, y, w, h]), item) == 1
    assert similarity(detection([x + 7.1, y, w, h]), item) == 0


def test_a_match_counts_up_to_its_similarity(score):
    """Three points of four are right: GPS is 0.75, of the thresholds 0.5, 0.55, ... 0.95."""
    found = score([person()], [detection(width=36)])["densepose_gps"]
    assert found["AP"] == 60
    assert (found["AP50"], found["AP75"]) == (100, 100)
    found = score([person()], [detection(width=24)])["densepose_gps"]
    assert (found["AP"], found["AP50"], found["AP75"]) == (10, 100, 0)
    assert found["AR"] == 10


def test_masks_reduce_the_similarity(score):
    """GPS 1 and masks of which 9 / 16 overlap: GPSm is 3 / 4."""
    found = score([person(places=[(32, 32)])], [detection(width=27)])
    assert found["densepose_gps"]["AP"] == 100
    assert found["densepose_gpsm"]["AP"] == 60
    assert found["densepose_segm"]["AP"] == 20


def test_without_masks_of_parts_the_objects_mask_counts(score):
    x, y, w, h = BOX
    polygon = [[x, y, x + 27, y, x + 27, y + h, x, y + h]]
    item = person(places=[(32, 32)], segmentation=polygon)
    del item["dp_masks"]
    assert score([item], [detection(width=27)])["densepose_segm"]["AP"] == 100
    del item["segmentation"]
    assert score([item], [detection(width=27)])["densepose_segm"]["AP"] == 0


ELSEWHERE = [100, 100, 48, 48]


def test_a_false_detection_with_a_higher_score_halves_precision(score):
    found = score([person()], [detection(score=0.5), detection(ELSEWHERE)])
    assert found["densepose_gps"]["AP"] == 50
    assert found["densepose_gps"]["AR"] == 100


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (unposed(ELSEWHERE), 100),
        (unposed([100, 100, 48, 60]), 100),  # boxes overlap by 0.8
        (unposed([100, 100, 48, 61]), 50),
        (unposed([0, 90, 200, 100], iscrowd=1), 100),  # a crowd around it
        (unposed([0, 108, 200, 90], iscrowd=1), 100),  # 40 of 48 rows in the crowd
        (unposed([0, 110, 200, 90], iscrowd=1), 50),  # 38
    ],
)
def test_a_detection_of_a_person_without_points_is_ignored(score, other, expected):
    if other["iscrowd"]:
        other["segmentation"] = {"size": [200, 200], "counts": [0, 40000]}
    found = score([person(), other], [detection(score=0.5), detection(ELSEWHERE)])
    assert found["densepose_gps"]["AP"] == expected


def test_any_number_of_detections_is_ignored_in_a_crowd_and_one_of_a_person(score):
    several = [detection(score=0.5), detection(ELSEWHERE), detection(ELSEWHERE, score=0.8)]
    area = {"segmentation": {"size": [200, 200], "counts": [0, 40000]}}
    crowd = unposed([0, 90, 200, 100], iscrowd=1, **area)
    assert score([person(), crowd], several)["densepose_gps"]["AP"] == 100
    assert score([person(), unposed(ELSEWHERE)], several)["densepose_gps"]["AP"] == 50


def test_of_equal_boxes_the_last_decides(score):
    """As in Detectron2: GPS 0.75 is no match at 0.95, and one of the two boxes is ignored."""
    found = score([person(), unposed()], [detection(width=36)])
    assert found["densepose_gps"]["AP50"] == 0


@pytest.mark.parametrize("others", [[], [unposed(image_id=2)]])
def test_an_image_without_points_takes_no_part(score, others):
    found = score([person(), *others], [detection(score=0.5), detection() | {"image_id": 2}], 2)
    assert found["densepose_gps"]["AP"] == 100


def test_areas(score):
    small, large = person(area=30 * 30), person(ELSEWHERE, area=100 * 100)
    found = score([small, large], [detection(ELSEWHERE, score=0.8, width=24), detection()])
    gps = found["densepose_gps"]
    assert (gps["AP50"], gps["AR50"]) == (100, 100)
    assert gps["AR"] == (100 + 10) / 2
    assert math.isnan(gps["APm"])
    assert gps["APl"] == 10


def test_twenty_detections_of_an_image_count(score):
    others = [detection(ELSEWHERE, score=0.9 - 0.01 * i) for i in range(20)]
    assert score([person()], [*others[1:], detection(score=0.1)])["densepose_gps"]["AR"] == 100
    assert score([person()], [*others, detection(score=0.1)])["densepose_gps"]["AR"] == 0


def test_each_person_is_found_once(score):
    found = score([person()], [detection(), detection(score=0.8), detection(score=0.7)])
    assert found["densepose_gps"]["AP"] == 100


def test_nothing_found(tmp_path):
    empty = {"image_id": 1, "boxes": [], "scores": [], "classes": [], "densepose": []}
    evaluated({**CONTENT, "annotations": [{"id": 1, **person()}]}, [], tmp_path)
    dataset = get_dataset(f"densepose:{tmp_path}/a.json:{tmp_path}")
    found = evaluate(dataset, [empty])
    assert found["densepose_gps"]["AP"] == found["densepose_segm"]["AR"] == 0


CONTENT = {
    "images": [{"id": 1, "file_name": "1.jpg", "height": 200, "width": 200}],
    "categories": [{"id": 1, "name": "person"}],
}


@pytest.mark.parametrize("name", ["drawn", "official"])
def test_numbers_are_detectron2s(name, tmp_path, shared_data):
    """Recorded from its DensePose project."""
    case, recorded = draw(name, shared_data), read("densepose_ap")[name]
    found = evaluated(*case, tmp_path)
    for task in record_densepose_ap.MODES:
        assert {key: found[task][key] for key in recorded[task]} == pytest.approx(
            recorded[task], abs=1e-9
        )
    assert_same_similarities(*case, recorded["gps"])


@pytest.mark.parametrize("name", ["drawn", "official"])
def test_recorded_numbers_are_those_of_the_installed_project(name, shared_data):
    evaluation = "densepose.evaluation.densepose_coco_evaluation"
    pytest.importorskip(evaluation, reason="Detectron2's DensePose project", exc_type=ImportError)
    found = record_densepose_ap.reference(*draw(name, shared_data))
    assert json.loads(json.dumps(found)) == read("densepose_ap")[name]


def draw(name, shared_data):
    if name == "drawn":
        return record_densepose_ap.drawn_case()
    return record_densepose_ap.official_case(shared_data("densepose"))


def assert_same_similarities(content, results, recorded):
    geodesics = read_geodesics()
    images = {str(image["id"]): image for image in content["images"]}
    assert sum(map(len, recorded.values())) > 20
    for number, expected in recorded.items():
        image = images[number]
        persons = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        found = [r for r in results if r["image_id"] == image["id"]]
        found = sorted(found, key=lambda result: -result["score"])[:20]
        found = [{**result, "densepose": result} for result in found]
        size = image["height"], image["width"]
        pairs = pairwise_similarity(persons, found, size, geodesics)
        np.testing.assert_allclose(pairs.gps, expected, atol=1e-9)


def test_boxes_alone_need_no_body(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    evaluated({**CONTENT, "annotations": [{"id": 1, **person()}]}, [], tmp_path)
    dataset = get_dataset(f"densepose:{tmp_path}/a.json:{tmp_path}")
    box = {"image_id": 1, "boxes": [[10, 20, 58, 68]], "scores": [1], "classes": [0]}
    assert list(evaluate(dataset, [box])) == ["bbox"]
    surface = {"densepose": [encode_iuv(detection()["iuv"])]}
    with pytest.raises(UserError, match=r"needs SMPL_subdiv\.mat, SMPL_SUBDIV_TRANSFORM\.mat, Pd"):
        evaluate(dataset, [box | surface])


def test_a_part_that_does_not_exist_is_refused(score):
    with pytest.raises(ValueError, match="image 1: a dense pose holds chart 25"):
        score([person()], [detection(part=25)])


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (unposed(), "no annotation has dp_x"),
        (person(dp_U=[0.2]), "annotation 1 of image 1 has 4 dp_x, 4 dp_y, 4 dp_I, 1 dp_U, 4 dp_V"),
    ],
)
def test_a_broken_truth_is_refused(score, item, message):
    with pytest.raises(UserError, match=message):
        score([item], [detection()])


def test_some_predictions_without_dense_pose_are_refused(tmp_path):
    content = {**CONTENT, "annotations": [{"id": 1, **person()}]}
    content["images"] = [*content["images"], {**content["images"][0], "id": 2}]
    evaluated(content, [], tmp_path)
    dataset = get_dataset(f"densepose:{tmp_path}/a.json:{tmp_path}")
    nothing = {"boxes": [], "scores": [], "classes": []}
    predictions = [{"image_id": 1, **nothing}, {"image_id": 2, **nothing, "densepose": []}]
    with pytest.raises(ValueError, match="1 of 2 predictions have densepose"):
        evaluate(dataset, predictions)
