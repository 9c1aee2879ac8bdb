"""Images and annotations through resize and flip: PIL and Detectron2 are the oracles."""

import numpy as np
import pytest
import record_inputs
import torch
import torch.nn.functional as F
from PIL import Image
from record_inputs import NumpyDraws
from recording import read

from moco_det.common.errors import UserError
from moco_det.common.images import read_upright
from moco_det.native.data.transforms import Augmentation, Transform, shortest_edge_size


@pytest.fixture
def photograph(shared_data):
    return sorted((shared_data("voc2012_40")).rglob("*.jpg"))[0]


def noise(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("size", "short_edge", "max_size", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),  # 640 * 800 / 480 = 1066.67
        ((640, 480), 800, 1333, (1067, 800)),
        ((400, 2000), 800, 1333, (267, 1333)),  # the longer edge limits: 400 * 1333 / 2000 = 266.6
        ((500, 500), 600, 1000, (600, 600)),
        ((2, 5), 1, 100, (1, 3)),  # 2.5 rounds up
    ],
)
def test_shortest_edge_size_by_hand(size, short_edge, max_size, expected):
    assert shortest_edge_size(*size, short_edge, max_size) == expected


def test_shortest_edge_size_is_detectron2s():
    detectron2 = pytest.importorskip("detectron2.data.transforms")
    rng = np.random.default_rng(0)
    for height, width, short_edge in rng.integers(1, 1500, (2000, 3)).tolist():
        expected = detectron2.ResizeShortestEdge.get_output_shape(height, width, short_edge, 1333)
        assert shortest_edge_size(height, width, short_edge, 1333) == expected


@pytest.mark.parametrize("new", [(30, 40), (97, 131), (60, 200)])
def test_resize_is_antialiased_bilinear(new):
    image = noise(60, 80)
    resized = Transform((60, 80), new).apply_image(image)
    exact = F.interpolate(
        torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double(),
        new, mode="bilinear", antialias=True, align_corners=False,
    )[0]  # fmt: skip
    assert resized.shape == (3, *new)
    assert np.abs(resized - exact.numpy()).max() <= 1.0


def test_image_and_boxes_are_detectron2s(photograph):
    T = pytest.importorskip("detectron2.data.transforms")
    utils = pytest.importorskip("detectron2.data.detection_utils")
    pixels = utils.read_image(photograph, "BGR")
    height, width = pixels.shape[:2]
    boxes = np.array([[3.0, 5.0, 120.5, 90.0], [0.0, 0.0, width, height]])
    for flip in (False, True):
        augmentations = [T.ResizeShortestEdge(213, 400)] + [T.RandomFlip(1.0)] * flip
        data = T.AugInput(pixels.copy())
        transforms = T.AugmentationList(augmentations)(data)
        transform = Transform(
            (height, width), shortest_edge_size(height, width, 213, 400), flip=flip
        )
        image = transform.apply_image(read_upright(photograph), "BGR")
        np.testing.assert_array_equal(image, data.image.transpose(2, 0, 1))
        np.testing.assert_array_equal(transform.apply_box(boxes), transforms.apply_box(boxes))


def test_boxes_by_hand():
    boxes = np.array([[10.0, 20.0, 30.0, 40.0], [-5.0, 0.0, 60.0, 100.0]])
    halved = Transform(old=(100, 50), new=(50, 25))
    np.testing.assert_allclose(halved.apply_box(boxes), [[5, 10, 15, 20], [0, 0, 25, 50]])
    flipped = Transform(old=(100, 50), new=(50, 25), flip=True)
    np.testing.assert_allclose(flipped.apply_box(boxes), [[10, 10, 20, 20], [0, 0, 25, 50]])


@pytest.mark.parametrize("flip", [False, True])
def test_a_box_stays_around_its_object(flip):
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[20:40, 16:48] = 255
    transform = Transform((80, 120), (160, 240), flip)
    image = transform.apply_image(Image.fromarray(pixels))
    x0, y0, x1, y1 = transform.apply_box(np.array([[16.0, 20.0, 48.0, 40.0]]))[0].astype(int)
    bright = np.argwhere(image[0] > 127)
    assert (bright.min(0) == (y0, x0)).all()
    assert (bright.max(0) + 1 == (y1, x1)).all()


def test_channels_come_in_the_order_asked_for():
    image = noise(5, 7)
    rgb = Transform((5, 7), (5, 7)).apply_image(image, "RGB")
    bgr = Transform((5, 7), (5, 7)).apply_image(image, "BGR")
    np.testing.assert_array_equal(rgb, np.array(image).transpose(2, 0, 1))
    np.testing.assert_array_equal(bgr, rgb[::-1])


def draws(augmentation, count=400):
    rng = np.random.default_rng(0)
    return [augmentation.draw(rng, 100, 200) for _ in range(count)]


def test_draws_cover_the_sizes_and_flip_half_of_the_time():
    chosen = draws(Augmentation((50, 80), 1000, "choice", flip=True))
    assert {g.new for g in chosen} == {(50, 100), (80, 160)}
    assert 150 < sum(g.flip for g in chosen) < 250
    ranged = draws(Augmentation((50, 53), 1000, "range"))
    assert {g.new[0] for g in ranged} == {50, 51, 52, 53}
    assert not any(g.flip for g in ranged)
    assert {g.new for g in draws(Augmentation((0,), 10))} == {(100, 200)}  # 0: the size stays


def test_range_takes_two_sizes():
    with pytest.raises(UserError, match="MIN_SIZE_TRAIN"):
        Augmentation((50, 60, 70), 1000, "range")


@pytest.mark.parametrize("case", range(len(record_inputs.DRAWS)))
def test_draws_recorded_from_detectron2(case):
    """Size and flip of image after image, from one state of numpy's global generator."""
    augmentation = Augmentation(*record_inputs.DRAWS[case], flip=True)
    size = (record_inputs.HEIGHT, record_inputs.WIDTH)
    np.random.seed(0)
    drawn = [augmentation.draw(NumpyDraws(), *size) for _ in range(record_inputs.DRAWN)]
    assert [[*g.new, g.flip] for g in drawn] == read("inputs")["draws"][case]


FLIPPED = Transform(old=(4, 8), new=(2, 4), flip=True)


def test_polygons_and_points_by_hand():
    (polygon,) = FLIPPED.apply_polygons([[0, 0, 8, 1, 9, 4]])
    assert polygon.tolist() == [4, 0, 0, 0.5, -0.5, 2]  # beyond the image, and not clipped
    assert Transform((4, 8), (8, 8)).apply_coords(np.array([1.0, 1.0])).tolist() == [1, 2]


def test_mask_by_hand():
    mask = np.zeros((4, 8), dtype=np.uint8)
    mask[1, :5:2] = 1  # the left of each pair of columns
    mask[:2, 1] = 1
    mask[3, 5] = 1
    # PIL takes the lower right of every four pixels, and no mean of them.
    assert FLIPPED.apply_segmentation(mask).tolist() == [[0, 0, 0, 1], [0, 1, 0, 0]]
    same = Transform((4, 8), (4, 8)).apply_segmentation(mask)
    assert same.flags.c_contiguous
    np.testing.assert_array_equal(same, mask)


def test_keypoints_by_hand():
    """Halved and mirrored; a point on the border is inside, one beyond it is not labelled."""
    person = [[2.0, 2, 2], [8, 4, 1], [8.5, 1, 2]]
    other = [[0.5, 0.5, 0], [0, 0, 2], [1, 1, 1]]
    keypoints = np.array([person, other])
    moved = FLIPPED.apply_keypoints(keypoints, mirrored=(0, 2, 1))
    first, second = moved.tolist()
    assert first == [[3, 1, 2], [0, 0, 0], [0, 2, 1]]
    assert second == [[0, 0, 0], [3.5, 0.5, 1], [4, 0, 2]]
    unflipped = Transform((4, 8), (2, 4)).apply_keypoints(keypoints, mirrored=(0, 2, 1))
    assert unflipped[0].tolist() == [[1, 1, 2], [4, 2, 1], [0, 0, 0]]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("short_edge", [17, 40, 97])
def test_masks_polygons_and_keypoints_are_detectron2s(short_edge, flip):
    T = pytest.importorskip("detectron2.data.transforms")
    utils = pytest.importorskip("detectron2.data.detection_utils")
    rng = np.random.default_rng(short_edge)
    mask = rng.integers(0, 2, (40, 61), dtype=np.uint8)
    polygon = rng.uniform(-5, 70, 12)
    keypoints = np.concatenate([rng.uniform(-9, 70, (5, 2)), rng.integers(0, 3, (5, 1))], axis=1)
    new = shortest_edge_size(40, 61, short_edge, 120)
    flips = [T.HFlipTransform(new[1])] * flip
    transforms = T.TransformList([T.ResizeTransform(40, 61, *new), *flips])
    transform = Transform((40, 61), new, flip)
    expected = transforms.apply_segmentation(mask)
    np.testing.assert_array_equal(transform.apply_segmentation(mask), expected)
    (expected,) = transforms.apply_polygons([polygon.reshape(-1, 2).copy()])
    np.testing.assert_array_equal(transform.apply_polygons([polygon])[0], expected.reshape(-1))
    mirrored = (0, 2, 1, 4, 3)
    expected = utils.transform_keypoint_annotations(keypoints.copy(), transforms, new, mirrored)
    np.testing.assert_array_equal(transform.apply_keypoints(keypoints[None], mirrored)[0], expected)
