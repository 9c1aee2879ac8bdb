"""VOC's AP on cases done by hand, and against numbers recorded from Detectron2's evaluator."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from recording import read

from moco_det.evaluation import evaluate, print_table
from moco_det.evaluation.voc import THRESHOLDS, average_precision


@dataclass(frozen=True)
class Drawn:
    """A VOC data set that is given, not read. `objects`: (image, class, difficult, box)."""

    classes: tuple
    objects: tuple
    images: int = 1
    eleven_point: bool = False
    evaluator: str = "voc"

    def records(self):
        return [
            {
                "image_id": image,
                "annotations": [
                    {"bbox": list(box), "category_id": label, "iscrowd": 0, "difficult": difficult}
                    for other, label, difficult, box in self.objects
                    if other == image
                ],
            }
            for image in range(self.images)
        ]


def predict(*detections):
    """(image, class, score, box) rows as one prediction per image."""
    images = sorted({image for image, *_ in detections})
    return [
        {
            "image_id": image,
            "boxes": np.array([row[3] for row in detections if row[0] == image]),
            "scores": np.array([row[2] for row in detections if row[0] == image]),
            "classes": np.array([row[1] for row in detections if row[0] == image]),
        }
        for image in images
    ]


LEFT, RIGHT, FAR = (0, 0, 10, 10), (20, 0, 30, 10), (60, 60, 70, 70)


def one_class(*objects, **options):
    """Objects of one class in image 0: (box, difficult)."""
    return Drawn(("ant",), tuple((0, 0, hard, box) for box, hard in objects), **options)


def bbox(dataset, *detections):
    return evaluate(dataset, predict(*detections))["bbox"]


def test_perfect_detections():
    result = bbox(one_class((LEFT, 0), (RIGHT, 0)), (0, 0, 0.9, LEFT), (0, 0, 0.8, RIGHT))
    assert result == {"AP": 100, "AP50": 100, "AP75": 100, "AP-ant": 100, "AP50-ant": 100}


@pytest.mark.parametrize("eleven_point", [True, False])
def test_no_detections(eleven_point):
    result = bbox(one_class((LEFT, 0), eleven_point=eleven_point))
    assert result == {"AP": 0, "AP50": 0, "AP75": 0, "AP-ant": 0, "AP50-ant": 0}


def test_half_found_is_six_elevenths_or_half():
    """One of two objects: precision 1 at the levels 0, .1, ..., .5, and none above."""
    dataset = one_class((LEFT, 0), (RIGHT, 0), eleven_point=True)
    assert bbox(dataset, (0, 0, 0.9, LEFT))["AP50"] == pytest.approx(100 * 6 / 11)
    dataset = one_class((LEFT, 0), (RIGHT, 0))
    assert bbox(dataset, (0, 0, 0.9, LEFT))["AP50"] == pytest.approx(50)


def test_eleven_point_against_area():
    """Ranked right, wrong, right, of 2: (recall, precision) (.5, 1), (.5, 1/2), (1, 2/3)."""
    ranked = ((0, 0, 0.9, LEFT), (0, 0, 0.8, FAR), (0, 0, 0.7, RIGHT))
    eleven = one_class((LEFT, 0), (RIGHT, 0), eleven_point=True)
    assert bbox(eleven, *ranked)["AP50"] == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)
    area = one_class((LEFT, 0), (RIGHT, 0))
    assert bbox(area, *ranked)["AP50"] == pytest.approx(100 * (0.5 + 0.5 * 2 / 3))


def test_duplicate_is_wrong_even_when_it_fits_better():
    """Right, duplicate, right: as the ranked list above."""
    ranked = ((0, 0, 0.9, (0, 0, 10, 9)), (0, 0, 0.8, LEFT), (0, 0, 0.7, RIGHT))
    area = one_class((LEFT, 0), (RIGHT, 0))
    assert bbox(area, *ranked)["AP50"] == pytest.approx(100 * (0.5 + 0.5 * 2 / 3))


def test_detection_of_a_taken_object_does_not_pass_to_the_next():
    """Both overlap the left object most; the second is wrong though it covers .6 of the other."""
    objects = (((0, 0, 10, 10), 0), ((0, 0, 10, 6), 0))
    result = bbox(one_class(*objects), (0, 0, 0.9, (0, 0, 10, 10)), (0, 0, 0.8, (0, 0, 10, 9)))
    assert result["AP50"] == pytest.approx(50)


def test_difficult_object_is_neither_sought_nor_counted_against():
    dataset = one_class((LEFT, 1), (RIGHT, 0))
    assert bbox(dataset, (0, 0, 0.8, RIGHT))["AP50"] == pytest.approx(100)
    both = ((0, 0, 0.9, LEFT), (0, 0, 0.85, LEFT), (0, 0, 0.8, RIGHT))
    assert bbox(dataset, *both)["AP50"] == pytest.approx(100)
    # Below the threshold it is an ordinary wrong detection.
    beside = ((0, 0, 0.9, (6, 0, 16, 10)), (0, 0, 0.8, RIGHT))
    assert bbox(dataset, *beside)["AP50"] == pytest.approx(50)


def test_overlap_must_exceed_the_threshold():
    half = (0, 0, 10, 5)
    assert bbox(one_class((LEFT, 0)), (0, 0, 0.9, half))["AP50"] == 0
    assert bbox(one_class((LEFT, 0)), (0, 0, 0.9, (0, 0, 10, 5.1)))["AP50"] == 100


def test_ap_is_the_mean_over_ten_thresholds():
    """IoU .78 exceeds .50, .55, .60, .65, .70 and .75."""
    result = bbox(one_class((LEFT, 0)), (0, 0, 0.9, (0, 0, 10, 7.8)))
    assert result["AP"] == pytest.approx(60)
    assert (result["AP50"], result["AP75"]) == (100, 100)


def test_classes_do_not_mix_and_the_mean_is_over_classes():
    objects = ((0, 0, 0, LEFT), (1, 1, 0, LEFT))
    dataset = Drawn(("ant", "bee"), objects, images=2)
    result = bbox(dataset, (0, 1, 0.9, LEFT), (1, 1, 0.8, LEFT))
    assert result["AP50-ant"] == 0
    assert result["AP50-bee"] == pytest.approx(50)  # wrong in image 0, then right in image 1
    assert result["AP50"] == pytest.approx(25)


@pytest.mark.parametrize("eleven_point", [True, False])
def test_class_without_objects_takes_no_part(eleven_point):
    objects = ((0, 0, 0, LEFT), (0, 1, 1, FAR))  # of class 1 there is only a difficult one
    dataset = Drawn(("ant", "bee", "cow"), objects, eleven_point=eleven_point)
    result = bbox(dataset, (0, 0, 0.9, LEFT), (0, 2, 0.9, LEFT))
    assert result["AP50"] == pytest.approx(100)
    assert math.isnan(result["AP-bee"])
    assert math.isnan(result["AP-cow"])


def test_nothing_to_find_is_nan():
    assert math.isnan(bbox(Drawn(("ant",), ()), (0, 0, 0.9, LEFT))["AP"])


def test_equal_scores_rank_in_the_order_of_the_data_set():
    """Right in image 0 and wrong in image 1 at one score: the order of predictions is no matter."""
    dataset = Drawn(("ant",), ((0, 0, 0, LEFT),), images=2)
    rows = predict((0, 0, 0.5, LEFT), (1, 0, 0.5, LEFT))
    for predictions in (rows, rows[::-1]):
        assert evaluate(dataset, predictions)["bbox"]["AP50"] == pytest.approx(100)


def test_scores_and_boxes_are_rounded_as_in_detectron2s_files():
    """0.9001 and 0.9004 are one score, so the order of the data set decides; 5.04 is 5.0."""
    dataset = Drawn(("ant",), ((0, 0, 0, LEFT),), images=2)
    assert bbox(dataset, (0, 0, 0.9001, LEFT), (1, 0, 0.9004, LEFT))["AP50"] == pytest.approx(100)
    assert bbox(dataset, (0, 0, 0.9001, LEFT), (1, 0, 0.9006, LEFT))["AP50"] == pytest.approx(50)
    assert bbox(dataset, (0, 0, 0.9, (0, 0, 10, 5.04)))["AP50"] == 0


def test_tensors_lists_and_empty_predictions_are_accepted():
    dataset = Drawn(("ant",), ((0, 0, 0, LEFT),), images=2)
    empty = {"image_id": 1, "boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "classes": []}
    full = {"image_id": 0, "boxes": torch.tensor([LEFT]), "scores": [0.5], "classes": [0]}
    assert evaluate(dataset, [empty, full])["bbox"]["AP50"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 5}, r"not in the data set: \[5\]"),
        ({"classes": [1]}, r"a class is outside \[0, 1\)"),
        ({"scores": [0.5, 0.4]}, "1 boxes, 2 scores, 1 classes"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(change, message):
    prediction = {"image_id": 0, "boxes": [LEFT], "scores": [0.5], "classes": [0], **change}
    with pytest.raises(ValueError, match=message):
        evaluate(one_class((LEFT, 0)), [prediction])


def test_two_predictions_of_one_image_are_refused():
    with pytest.raises(ValueError, match="2 predictions for 1 images"):
        evaluate(one_class((LEFT, 0)), 2 * predict((0, 0, 0.9, LEFT)))


def test_eleven_levels_are_multiples_of_a_tenth_in_floats():
    """The kit's fourth level is 3 * 0.1 > 0.3: recall 3/10 reaches the levels 0, .1 and .2 only."""
    assert average_precision(np.array([0.3]), np.array([1.0]), True) == pytest.approx(3 / 11)


def case_dataset(case, eleven_point):
    """The recorded objects, from VOC's inclusive pixels to continuous ones."""
    objects = tuple(
        (image, label, difficult, (xmin - 1, ymin - 1, xmax, ymax))
        for image, label, difficult, xmin, ymin, xmax, ymax in case["objects"]
    )
    return Drawn(tuple(case["classes"]), objects, case["images"], eleven_point)


def case_detections(case):
    return predict(*[(image, label, s, box) for image, label, s, *box in case["detections"]])


@pytest.mark.parametrize("metric", ["eleven_point", "area"])
def test_equals_detectron2_on_a_random_case(metric):
    case = read("voc_ap")
    result = evaluate(case_dataset(case, metric == "eleven_point"), case_detections(case))["bbox"]
    expected = np.array(case[metric])  # (classes, thresholds)
    assert expected.shape == (3, len(THRESHOLDS))
    assert result["AP"] == pytest.approx(expected.mean(), abs=1e-9)
    assert result["AP50"] == pytest.approx(expected[:, 0].mean(), abs=1e-9)
    assert result["AP75"] == pytest.approx(expected[:, 5].mean(), abs=1e-9)
    for name, row in zip(case["classes"], expected, strict=True):
        assert result[f"AP-{name}"] == pytest.approx(row.mean(), abs=1e-9)


def test_table_shows_metrics_classes_and_a_line_to_copy(capsys):
    print_table({"bbox": bbox(one_class((LEFT, 0)), (0, 0, 0.9, (0, 0, 10, 7.8)))})
    out = capsys.readouterr().out
    assert "copypaste: AP,AP50,AP75\ncopypaste: 60.0000,100.0000,100.0000\n" in out
    assert "| ant" in out
