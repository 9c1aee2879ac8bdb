"""tools/visualize.py as a user meets it: which files it writes, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from commands import load_command
from PIL import Image
from small_classifier import write_classifier
from tiny_coco import tiny_coco, write_tiny_coco
from tiny_voc import write_tiny_config, write_tiny_voc

from moco_det.evaluation.predictions import encode_masks


@pytest.fixture
def voc(tmp_path):
    return write_tiny_voc(tmp_path / "voc")


@pytest.fixture
def draw(tmp_path):
    """Function: arguments -> name of each file that is written -> its pixels."""
    tool = load_command("tools/visualize.py")

    def run(*arguments):
        out = tmp_path / "pictures"
        tool.main([*map(str, arguments), "--output", str(out)])
        return {path.name: np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))}

    return run


def test_no_picture_takes_anothers_file():
    tool = load_command("tools/visualize.py")
    names = ["a", "ä", "ö", "a", "_", "_2", "a/b"]
    assert tool.file_names(names) == ["a", "_", "__2", "a_2", "__3", "_2", "a_b"]


def test_ground_truth_of_a_data_set(voc, draw):
    pictures = draw("--dataset", f"voc:{voc}:test")
    assert list(pictures) == ["008.png", "009.png", "010.png", "011.png"]
    photograph = np.asarray(Image.open(voc / "JPEGImages/008.jpg"))
    assert pictures["008.png"].shape == photograph.shape
    assert 0 < (pictures["008.png"] != photograph).any(axis=2).mean() < 0.9


def test_config_limit_ids_and_sheet(voc, draw, tmp_path):
    config = write_tiny_config(tmp_path / "tiny.yaml", voc)
    assert list(draw("--config-file", config, "--limit", 1)) == ["008.png"]
    assert "001.png" in draw("--config-file", config, "--train", "--ids", "001", "003")
    sheet = draw("--config-file", config, "--sheet")["sheet.png"]
    assert min(sheet.shape[:2]) > 2 * 48
    assert "000.png" not in draw(
        "--config-file", config, "--opts", "DATASETS.TEST", f"voc:{voc}:test", "--limit", 2
    )


def test_predictions_alone_and_beside_the_truth(voc, draw, tmp_path):
    path = tmp_path / "found.json"
    found = {"image_id": "008", "boxes": [[4, 4, 40, 40]], "scores": [0.6], "classes": [1]}
    path.write_text(json.dumps([found]))
    arguments = ("--dataset", f"voc:{voc}:test", "--predictions", path, "--limit", 2)
    photographs = [np.asarray(Image.open(voc / f"JPEGImages/{n}.jpg")) for n in ("008", "009")]
    one, other = draw(*arguments).values()
    assert (one != photographs[0]).any()
    assert np.array_equal(other, photographs[1])  # of which nothing is predicted
    one, _ = draw(*arguments, "--score-threshold", 0.7).values()
    assert np.array_equal(one, photographs[0])
    one, _ = draw(*arguments, "--beside").values()
    assert one.shape[1] == 2 * photographs[0].shape[1]


def test_semantic_predictions(shared_data, draw, tmp_path):
    root = shared_data("voc2012_seg10") / "VOC2012"
    with Image.open(root / "JPEGImages/2007_000039.jpg") as image:
        photograph = np.asarray(image)
    left = torch.zeros(photograph.shape[:2], dtype=torch.bool)
    left[:, :100] = True
    (shape,) = encode_masks(left[None])
    found = {"image_id": "2007_000039", "sem_seg": [{"category_id": 20, "segmentation": shape}]}
    path = tmp_path / "found.json"
    path.write_text(json.dumps([found]))
    arguments = ("--dataset", f"voc_sem_seg:{root}:val", "--predictions", path)
    picture = draw(*arguments, "--ids", "2007_000039")["2007_000039.png"]
    changed = (picture != photograph).any(axis=2)
    assert changed[:, :100].mean() > 0.9
    assert not changed[:, 200:].any()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "cannot read predictions"),
        ('[{"image_id": "008", "boxes": []}]', "does not hold predicted objects"),
        (
            '[{"image_id": "008", "boxes": [[0,0,1,1]], "scores": [1.0], "classes": [7]}]',
            "a class is outside",
        ),
    ],
)
def test_wrong_predictions(voc, draw, tmp_path, capsys, content, message):
    path = tmp_path / "found.json"
    path.write_text(content)
    with pytest.raises(SystemExit):
        draw("--dataset", f"voc:{voc}:test", "--predictions", path)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert str(path) in error


def test_unknown_image_and_data_set(voc, draw, capsys):
    with pytest.raises(SystemExit):
        draw("--dataset", f"voc:{voc}:test", "--ids", "999")
    assert "has no image 999; its ids are 008" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        draw("--dataset", "voc_2006_test")
    assert "the nearest name is voc_2007_test" in capsys.readouterr().err


def test_the_limit_on_pixels_is_a_flag_or_the_config_s(voc, draw, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    config = write_tiny_config(tmp_path / "tiny.yaml", voc)
    small = ("INPUT.MAX_IMAGE_PIXELS", 1000)
    for arguments in (
        ("--dataset", f"voc:{voc}:test", "--max-image-pixels", 1000),
        ("--config-file", config, "--opts", *small),
    ):
        with pytest.raises(SystemExit, match="1"):
            draw(*arguments)
        assert "more than 1,000 pixels" in capsys.readouterr().err
    assert draw("--config-file", config, "--max-image-pixels", 9999, "--opts", *small)


def test_a_bad_shape_is_skipped_with_a_line_and_the_rest_is_drawn(tmp_path, capsys):
    content = tiny_coco()
    content["annotations"][0]["segmentation"] = [[1, 2, float("inf"), 4, 5, 6]]
    content["images"][1] |= {"height": 10**9, "width": 10**9}
    name = write_tiny_coco(tmp_path / "data", content)
    output = tmp_path / "out"
    load_command("tools/visualize.py").main(["--dataset", name, "--output", str(output)])
    assert sorted(path.name for path in output.iterdir()) == ["1.png", "2.png"]
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("skipped: ") for line in lines)
    assert "image 2 has a height and width of [1000000000, 1000000000]" in lines[0]
    assert "annotation 1 of image 1 has a polygon with inf" in lines[1]


def test_activation_maps_of_a_classifier(voc, draw, tmp_path, capsys):
    """Of files and folders, the photograph on the left; an unreadable image is told of."""
    classifier = write_classifier(tmp_path / "checkpoint_best.pth.tar")
    folder = tmp_path / "some"
    folder.mkdir()
    for name in ("008", "009"):
        (folder / f"{name}.jpg").write_bytes((voc / f"JPEGImages/{name}.jpg").read_bytes())
    (folder / "broken.jpg").write_bytes(b"broken")
    one = voc / "JPEGImages/010.jpg"
    pictures = draw("cam", classifier, one, folder, "--beside", "--class", "bee")
    assert list(pictures) == ["008.png", "009.png", "010.png"]
    assert "skipped: cannot read image" in capsys.readouterr().err
    photograph = np.asarray(Image.open(one))
    assert np.array_equal(pictures["010.png"][:, : photograph.shape[1]], photograph)
    assert (pictures["010.png"][:, photograph.shape[1] :] != photograph).any()
    Image.open(one).save(folder / "008.png")  # beside a 008.jpg
    before = set(pictures)
    assert len(set(draw("cam", classifier, folder)) - before) == 2
    draw("cam", classifier, folder, "--sheet", "--width", "100", "--limit", "1")
    assert (tmp_path / "pictures/sheet.png").is_file()
    for arguments, message in (
        (("--class", "bea"), "did you mean bee"),
        (("--limit", "1", "--max-image-pixels", "10"), "there is no image to draw"),
    ):
        with pytest.raises(SystemExit):
            draw("cam", classifier, folder, *arguments)
        assert message in capsys.readouterr().err
