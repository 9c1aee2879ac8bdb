"""What is done to images and maps of pixels: by hand, and as OpenCV does it."""

import cv2
import numpy as np
import pytest
from PIL import Image

from moco_det.native.modeling.pixel_input import Frame, covering_size, scaled_size


def noise(height=12, width=16, channels=()):
    return np.random.default_rng(0).integers(0, 250, (height, width, *channels)).astype(np.uint8)


def test_without_zoom_and_angle_a_frame_is_a_resize():
    """So training and test images, of which only the first are zoomed, are resized alike."""
    image = Image.fromarray(noise(channels=(3,)))
    found = Frame((12, 16), (30, 24)).image(image, (1, 2, 3))
    expected = image.resize((24, 30), Image.Resampling.BILINEAR)
    assert np.array_equal(np.asarray(found), np.asarray(expected))
    assert np.array_equal(
        Frame((12, 16), (24, 32)).labels(noise(), 255), noise().repeat(2, 0).repeat(2, 1)
    )
    assert np.array_equal(Frame((12, 16), (12, 16)).labels(noise(), 255), noise())


def test_a_quarter_turn_is_against_the_clock():
    labels = noise(9, 9)
    found = Frame((9, 9), (9, 9), angle=90.0).labels(labels, 255)
    assert np.array_equal(found, np.rot90(labels))
    half = Frame((12, 16), (12, 16), angle=180.0).labels(noise(), 255)
    assert np.array_equal(half, noise()[::-1, ::-1])


def test_a_zoom_keeps_the_middle_and_brings_it_nearer():
    depths = np.arange(1, 193, dtype=np.float32).reshape(12, 16)
    found = Frame((12, 16), (12, 16), zoom=2.0).depths(depths)
    assert found.dtype == np.float32
    assert np.array_equal(found, depths[3:9, 4:12].repeat(2, 0).repeat(2, 1) / 2)


def test_what_becomes_empty_is_filled():
    """At half the size an image covers the middle of its frame."""
    frame = Frame((12, 16), (12, 16), zoom=0.5)
    labels, depths = frame.labels(noise(), 255), frame.depths(np.full((12, 16), 3, np.float32))
    image = np.asarray(frame.image(Image.fromarray(noise(channels=(3,))), (7, 8, 9)))
    inside = np.zeros((12, 16), bool)
    inside[3:9, 4:12] = True
    assert (labels[~inside] == 255).all()
    assert (labels[inside] < 250).all()
    assert np.array_equal(depths, np.where(inside, 6, 0))
    assert (image[~inside] == (7, 8, 9)).all()


@pytest.mark.parametrize(("zoom", "angle"), [(1.25, 0.0), (0.8, 5.0), (1.1, -4.0)])
def test_opencv_turns_and_zooms_alike(zoom, angle):
    """OpenCV's coordinates are those of the pixels' middles, half a pixel less than Pillow's."""
    labels = cv2.resize(noise(6, 8), (160, 120), interpolation=cv2.INTER_NEAREST)
    turn = cv2.getRotationMatrix2D((79.5, 59.5), angle, zoom)
    expected = cv2.warpAffine(
        labels,
        turn,
        (160, 120),
        flags=cv2.INTER_NEAREST,
        borderValue=255,
        borderMode=cv2.BORDER_CONSTANT,
    )
    found = Frame((120, 160), (120, 160), zoom, angle).labels(labels, 255)
    assert (found != expected).mean() < 0.01  # on edges, where OpenCV rounds to 1/32 of a pixel


def test_a_turn_in_a_stretched_frame_is_one_of_the_image():
    """To stretch an image that is turned, or to turn it in the frame, is the same."""
    labels = cv2.resize(noise(6, 8), (160, 120), interpolation=cv2.INTER_NEAREST)
    turned = Frame((120, 160), (120, 160), 1.2, 30.0).labels(labels, 255)
    expected = Frame((120, 160), (240, 80)).labels(turned, 255)
    found = Frame((120, 160), (240, 80), 1.2, 30.0).labels(labels, 255)
    assert (found != expected).mean() < 0.04  # on edges


def test_an_image_covers_the_crop():
    """As in the public code of the recipe: Cityscapes at half its size is enlarged to 768 rows."""
    assert covering_size(1024, 2048, 0.5, (768, 768)) == (768, 1536)
    assert covering_size(1024, 2048, 1.25, (768, 768)) == scaled_size(1024, 2048, 1.25)
    assert covering_size(100, 30, 0.5, (40, 60)) == (200, 60)
    assert covering_size(7, 9, 0.5, ()) == (4, 5)
