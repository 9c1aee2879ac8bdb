"""Segment retrieval against a slow way that works pixel by pixel."""

from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from tiny_voc_segments import write_tiny_segments

from moco_det.common.errors import UserError
from pretrain.data.segmented import CLASSES, find_segmented
from pretrain.evaluation import segments
from pretrain.evaluation.segments import (
    ALL,
    SEVEN,
    Segmenter,
    Segments,
    cluster,
    describe,
    draw_retrievals,
    enlarged,
    mean_iou,
    retrieve,
    scores,
)

CPU = torch.device("cpu")
SIZE, K = 48, 4


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = write_tiny_segments(tmp_path_factory.mktemp("voc"))
    return find_segmented(root, "train"), find_segmented(root, "val")


def segmenter(threads=1):
    """By mean colours of 8 x 8 pixels."""
    return Segmenter(torch.nn.AvgPool2d(8), K, SIZE, 0, CPU, threads)


@pytest.fixture(scope="module")
def cut(images):
    return tuple(segmenter().segments(part, "toy") for part in images)


# -- the slow way ---------------------------------------------------------------------------------


def slow_segments(image):
    """(descriptor, the pixels' labels) of each segment, and its number for each pixel."""
    pixels, labels = image.read(SIZE)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    inputs = torch.tensor((pixels / 255 - mean) / std).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        maps = segmenter().backbone(inputs)[0].permute(1, 2, 0).numpy()
    maps = maps / np.linalg.norm(maps, axis=2, keepdims=True)
    found = KMeans(K, n_init=1, random_state=0).fit_predict(maps.reshape(-1, maps.shape[2]))
    numbers = np.kron(found.reshape(6, 6), np.ones((8, 8), int))  # a place is 8 x 8 pixels
    embeddings = np.kron(maps, np.ones((8, 8, 1)))
    parts = []
    for number in sorted(set(found)):
        inside = numbers == number
        mean = embeddings[inside].mean(axis=0)
        parts.append((mean / np.linalg.norm(mean), labels[inside].tolist()))
    return parts, numbers, labels


def slow_iou(images, classes, known):
    train, val = images
    bank = []
    for image in train:
        for descriptor, labels in slow_segments(image)[0]:
            seen = Counter(label for label in labels if label in known)
            if seen:
                bank.append((descriptor, min(seen, key=lambda c: (-seen[c], c))))
    pairs = []  # (true, predicted) of every pixel
    for image in val:
        parts, numbers, labels = slow_segments(image)
        for number, (descriptor, _) in enumerate(parts):
            nearest = max(bank, key=lambda entry: descriptor @ entry[0])[1]
            pairs += [(label, nearest) for label in labels[numbers == number].tolist()]
    pairs = Counter((true, guess) for true, guess in pairs if true in known)
    found = []
    for c in classes:
        hits = pairs[c, c]
        union = sum(n for pair, n in pairs.items() if c in pair)
        if union:
            found.append(hits / union)
    return 100 * sum(found) / len(found)


def test_scores_are_those_of_the_slow_way(images, cut):
    found = scores(*cut, CPU)
    seven = [1, 5, 6, 7, 8, 10, 15]  # aeroplane, bottle, bus, car, cat, cow, person
    assert found["retrieval_miou_21"] == pytest.approx(slow_iou(images, range(21), range(21)))
    assert found["retrieval_miou_7"] == pytest.approx(slow_iou(images, seven, [0, *seven]))
    assert 5 < found["retrieval_miou_21"] < 95  # neither trivial
    assert 5 < found["retrieval_miou_7"] < 95


# -- its parts ------------------------------------------------------------------------------------


def test_threads_and_processes_change_nothing(images, cut, monkeypatch):
    same = segmenter(threads=3).segments(images[0], "toy")
    parts = []
    monkeypatch.setattr(segments, "world_size", lambda: 2)
    monkeypatch.setattr(segments, "all_objects", lambda mine: parts.append(mine) or parts)
    monkeypatch.setattr(segments, "rank", lambda: 1)
    with pytest.raises(KeyError):  # image 0 is the other process's
        segmenter().segments(images[0], "toy")
    monkeypatch.setattr(segments, "rank", lambda: 0)
    shared = segmenter().segments(images[0], "toy")
    assert [sorted(part) for part in parts] == [[1], [0, 2]]
    for other in (same, shared):
        for name in ("descriptors", "counts", "images"):
            np.testing.assert_array_equal(getattr(other, name), getattr(cut[0], name))


def test_a_descriptor_is_a_direction_and_void_pixels_are_not_counted():
    features = np.array([[[1.0, 0], [0, 1]], [[0.6, 0.8], [0, 1]]])
    labels = np.array([[3, 3, 255, 0], [3, 0, 255, 0], [3, 3, 1, 1], [3, 3, 1, 1]])
    descriptors, counts, _ = describe(features, labels, np.array([[0, 1], [0, 1]]))
    np.testing.assert_allclose(descriptors, [[0.8944272, 0.4472136], [0, 1]])  # (1.6, 0.8), (0, 2)
    assert [dict(zip(*np.nonzero([row])[1:], row[row > 0], strict=False)) for row in counts] == [
        {0: 1, 3: 7},
        {0: 2, 1: 4},
    ]


def test_a_pixel_has_the_segment_of_its_place():
    assert enlarged(np.array([[0, 1], [2, 3]]), (3, 5)).tolist() == [
        [0, 0, 0, 1, 1],
        [0, 0, 0, 1, 1],
        [2, 2, 2, 3, 3],
    ]


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_segments_are_numbered_without_a_gap():
    features = np.zeros((1, 3, 2), np.float32)
    features[0, 1] = 1
    assert cluster(features, 15, 0).max() == 1  # three places, two of them alike
    assert sorted(np.unique(cluster(np.eye(4, dtype=np.float32)[None], 2, 0))) == [0, 1]


def some(descriptors, counts):
    table = np.zeros((len(counts), len(CLASSES)), int)
    for row, pixels in zip(table, counts, strict=True):
        for label, number in pixels.items():
            row[label] = number
    return Segments(np.array(descriptors, np.float32), table, np.arange(len(counts)), [])


def test_labels_by_majority_among_the_classes_that_count():
    bank = some([[1, 0]] * 4, [{0: 5, 12: 9}, {12: 4}, {15: 3, 7: 3}, {}])
    assert bank.labels(ALL).tolist() == [12, 12, 7, -1]
    assert bank.labels((0, *SEVEN)).tolist() == [0, -1, 7, -1]


def test_segments_without_a_label_are_not_retrieved():
    bank = some([[1, 0], [0.6, 0.8], [0, 1]], [{}, {12: 4}, {15: 3}])
    query = some([[1, 0]], [{15: 1}])
    assert retrieve(bank, query, ALL, CPU)[1].tolist() == [[1]]
    assert retrieve(bank, query, (0, *SEVEN), CPU)[1].tolist() == [[2]]
    with pytest.raises(UserError, match="no segment of the training images"):
        retrieve(some([[1, 0]], [{}]), query, ALL, CPU)


def test_of_7_classes_segments_of_others_are_none():
    """The nearest segment is a dog's: among 21 classes it is taken for one, among 7 passed over."""
    bank = some([[1, 0], [0.6, 0.8]], [{12: 9, 7: 0}, {7: 4}])
    found = scores(bank, some([[1, 0]], [{7: 5}]), CPU)
    assert found == {"retrieval_miou_7": 100.0, "retrieval_miou_21": 0.0}


def test_iou_by_hand():
    """Of 10 pixels of person 6 are found, 4 are taken for car; 2 of background for person."""
    queries = some([[1, 0]] * 2, [{15: 6, 0: 2}, {15: 4, 7: 1, 12: 3}])
    predicted = np.array([15, 7])
    person, car = 6 / 12, 1 / 8
    assert mean_iou(predicted, queries, ALL) == pytest.approx(100 * (person + car) / 4)
    # The dog is void; background is no class of the mean.
    car = 1 / 5
    assert mean_iou(predicted, queries, SEVEN) == pytest.approx(100 * (person + car) / 2)


def test_the_sheet_has_a_row_for_each_image_with_an_object(images, cut):
    train, val = images
    sheet = draw_retrievals((cut[0], train), (cut[1], val), CPU, rows=8, k=2)
    assert sheet.height == len(val) * (160 + 18)
    assert sheet.width > 3 * 160
    pixels = np.array(sheet)
    assert (pixels == (255, 210, 0)).all(axis=2).any()  # the outline
