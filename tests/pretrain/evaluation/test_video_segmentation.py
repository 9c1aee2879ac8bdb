"""Videos followed, their masks kept, measured and drawn."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_davis import PALETTE, write_tiny_davis

from moco_det.common.errors import UserError
from pretrain.data.davis import Davis, read_mask
from pretrain.evaluation import video_segmentation
from pretrain.evaluation.features import load_encoder
from pretrain.evaluation.label_propagation import Propagation
from pretrain.evaluation.spatial_features import SpatialFeatures
from pretrain.evaluation.video_segmentation import (
    MaskFolder,
    VideoSegmenter,
    follow_all,
    mean_measures,
    measure,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return Davis(write_tiny_davis(tmp_path_factory.mktemp("davis"))).videos()


def segmenter(radius=12.0, seed=0, threads=1, image_size=None):
    torch.manual_seed(seed)
    encoder = load_encoder("random", "resnet18w0.25x", 1)
    backbone = SpatialFeatures(encoder, "layer3", dilated=False).eval()
    return VideoSegmenter(backbone, Propagation(radius=radius), CPU, image_size, threads)


def test_the_true_masks_are_perfect_and_empty_ones_are_not(videos):
    for video in videos:
        true = [read_mask(path) for path in video.masks]
        objects = int(true[0].max())
        assert measure(video, true).tolist() == [[1, 1]] * objects
        assert measure(video, [mask * 0 for mask in true]).tolist() == [[0, 0]] * objects


def test_means_are_over_objects_not_videos():
    done = [
        video_segmentation.Followed("a", np.array([[0.5, 0.25]])),
        video_segmentation.Followed("b", np.array([[1.0, 0.5], [0.0, 0.0]])),
    ]
    assert mean_measures(done) == {
        "davis_j_mean": 50.0, "davis_f_mean": 25.0, "davis_jf_mean": 37.5,
    }  # fmt: skip


def test_a_moving_object_is_followed(videos):
    """By a network of random weights, whose maps at stride 8 have 6 x 8 places."""
    masks = segmenter().masks(videos[0])
    assert [mask.shape for mask in masks] == [(48, 64)] * 4
    np.testing.assert_array_equal(masks[0], read_mask(videos[0].masks[0]))
    assert measure(videos[0], masks)[0, 0] > 0.5
    again = segmenter(threads=2).masks(videos[0])
    for one, other in zip(masks, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_frames_may_be_made_smaller(videos):
    masks = segmenter(image_size=24).masks(videos[0])
    assert [mask.shape for mask in masks] == [(48, 64)] * 4


def test_finished_videos_are_kept_and_others_begun_anew(videos, tmp_path, monkeypatch):
    folder, whole = MaskFolder(tmp_path), segmenter()
    folder.prepare(whole)
    before = follow_all(whole, videos, folder, drawn=0)
    (tmp_path / "pair" / "00002.png").unlink()  # as a kill leaves it
    asked = []
    original = VideoSegmenter.masks
    monkeypatch.setattr(
        VideoSegmenter, "masks", lambda self, v: asked.append(v.name) or original(self, v)
    )
    folder.prepare(segmenter())
    after = follow_all(segmenter(), videos, folder, drawn=0)
    assert asked == ["pair"]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one.measures, other.measures)


def test_masks_of_other_settings_or_weights_are_refused(videos, tmp_path):
    folder = MaskFolder(tmp_path)
    folder.prepare(segmenter())
    for other, what in (({"radius": 5.0}, "radius"), ({"seed": 1}, "weights")):
        with pytest.raises(UserError, match=f"masks of another run: its {what} differ"):
            folder.prepare(segmenter(**other))
    foreign = tmp_path / "foreign"
    (foreign / "disc").mkdir(parents=True)
    Image.new("L", (64, 48)).save(foreign / "disc" / "00000.png")
    with pytest.raises(UserError, match="holds masks of others"):
        MaskFolder(foreign).prepare(segmenter())


def test_masks_of_another_data_set_are_not_taken(videos, tmp_path):
    folder = MaskFolder(tmp_path)
    masks = [read_mask(path) for path in videos[0].masks]
    folder.write(videos[0], masks)
    assert folder.read(videos[0]) is not None
    folder.write(videos[0], [masks[1], *masks[1:]])
    assert folder.read(videos[0]) is None


def test_masks_are_written_in_the_data_set_s_palette(videos, tmp_path):
    masks = [read_mask(path) for path in videos[1].masks]
    MaskFolder(tmp_path).write(videos[1], masks)
    with Image.open(tmp_path / "pair" / "00003.png") as image:
        assert (image.mode, image.getpalette()[:9]) == ("P", PALETTE[:9])
        np.testing.assert_array_equal(np.array(image), masks[3])


def test_two_processes_share_the_videos(videos, monkeypatch):
    parts, alone = [], follow_all(segmenter(), videos, None, drawn=0)
    monkeypatch.setattr(video_segmentation, "world_size", lambda: 2)
    monkeypatch.setattr(video_segmentation, "all_objects", lambda done: parts.append(done) or parts)
    monkeypatch.setattr(video_segmentation, "rank", lambda: 1)
    with pytest.raises(KeyError, match="disc"):  # it is the other one's
        follow_all(segmenter(), videos, None, drawn=0)
    monkeypatch.setattr(video_segmentation, "rank", lambda: 0)
    together = follow_all(segmenter(), videos, None, drawn=0)
    assert [video.name for video in parts[0]] == ["pair"]
    assert [video.name for video in together] == ["disc", "pair"]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.measures, other.measures)


def test_a_strip_shows_masks_and_true_outlines(videos):
    true = [read_mask(path) for path in videos[0].masks]
    strip = video_segmentation.draw_strip(videos[0], true, np.ones((1, 2)))
    tile = strip[:160, :213]
    inside = np.argwhere(true[0])[len(np.argwhere(true[0])) // 2] * 160 // 48
    assert tile[tuple(inside)][0] > 150  # object 1 is red
    assert tile[tuple(inside)][2] < 60
    assert (tile == 255).all(axis=2).sum() > 50  # its outline
    bare = video_segmentation.draw_strip(videos[0], [m * 0 for m in true], np.ones((1, 2)))
    assert not np.array_equal(bare[tuple(inside)], strip[tuple(inside)])
