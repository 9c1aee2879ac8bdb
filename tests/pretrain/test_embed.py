"""Features as a file: against a slow way to them, from folders and shards; and the sheet."""

import tarfile

import numpy as np
import pytest
import torch
from commands import python
from noisy_colours import slow_features
from PIL import Image

from moco_det.common.errors import UserError
from pretrain.embed import write_features
from pretrain.evaluation.embedding import Embedding, draw_sheet, nearest
from pretrain.flags.evaluation import parse_embed

FLAGS = ["-a", "resnet18", "--image-size", "32"]


def embed(data, pretrained, output, *more) -> None:
    argv = [str(data), "--pretrained", str(pretrained), "--output", str(output), *FLAGS, *more]
    write_features(parse_embed(argv), torch.device("cpu"))


def test_features_are_torchvisions_with_their_names(images, pretrained, tmp_path):
    embed(images / "train", pretrained, tmp_path / "f.npz", "-j", "0")
    written = np.load(tmp_path / "f.npz")
    assert written["names"].tolist() == [f"{c}/{i:02d}.png" for c in "ab" for i in range(25)]
    expected, _ = slow_features(pretrained, images / "train")
    np.testing.assert_allclose(written["features"], expected, atol=1e-4)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_shards_give_what_the_folder_gives(images, pretrained, tmp_path, workers):
    pytest.importorskip("webdataset")
    for label in "ab":
        with tarfile.open(tmp_path / f"{label}.tar", "w") as tar:
            for path in sorted((images / "train" / label).iterdir()):
                tar.add(path, path.name)
    embed(images / "train", pretrained, tmp_path / "folder.npz", "-j", "0")
    embed(f"{tmp_path}/{{a..b}}.tar", pretrained, tmp_path / "shards.npz", "-j", workers)
    folder, shards = np.load(tmp_path / "folder.npz"), np.load(tmp_path / "shards.npz")
    assert [n.replace(".tar", "") for n in shards["names"]] == folder["names"].tolist()
    np.testing.assert_allclose(shards["features"], folder["features"], atol=1e-5)


def test_a_row_for_each_image_of_a_parquet(images, pretrained, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("f.npz", "f.parquet"):
        embed(images / "val", pretrained, tmp_path / name, "-j", "0")
    written, table = np.load(tmp_path / "f.npz"), parquet.read_table(tmp_path / "f.parquet")
    assert table["name"].to_pylist() == written["names"].tolist()
    np.testing.assert_array_equal(np.stack(table["feature"].to_numpy()), written["features"])


def test_an_unreadable_image_is_left_out_and_named(images, pretrained, tmp_path, capsys):
    folder = tmp_path / "some"
    folder.mkdir()
    for path in sorted((images / "val" / "a").iterdir())[:3]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "01.png").write_bytes(b"nothing")
    embed(folder, pretrained, tmp_path / "f.npz", "-j", "0", "--max-unreadable", "0.5")
    assert np.load(tmp_path / "f.npz")["names"].tolist() == ["00.png", "02.png"]
    assert "warning: unreadable image, left out: " in capsys.readouterr().out
    with pytest.raises(UserError, match="1 of 3 images are unreadable"):
        embed(folder, pretrained, tmp_path / "g.npz", "-j", "0")
    assert not (tmp_path / "g.npz").exists()


def test_neighbours_are_by_angle_and_not_oneself():
    features = torch.tensor([[1.0, 0], [9, 1], [0, 1], [-1, -1]])
    cosines, near = nearest(features, torch.tensor([0, 2]), 2)
    assert near.tolist() == [[1, 2], [1, 0]]
    expected = [[9 / 82**0.5, 0], [1 / 82**0.5, 0]]
    torch.testing.assert_close(cosines, torch.tensor(expected))


def test_the_sheet_shows_query_and_neighbours(tmp_path):
    colours = {"a.png": (250, 0, 0), "b.png": (0, 250, 0), "c.png": (0, 0, 250)}
    for name, colour in colours.items():
        Image.new("RGB", (64, 64), colour).save(tmp_path / name)
    features = torch.tensor([[1.0, 0], [0, 1], [0.9, 0.1]])
    sheet = draw_sheet(str(tmp_path), Embedding(list(colours), features), queries=3, k=2, seed=0)
    width, height = sheet.width // 3, sheet.height // 3
    shown = [
        [sheet.getpixel((x * width + 50, y * height + 50)) for x in range(3)] for y in range(3)
    ]
    a, b, c = colours.values()
    assert shown == [[a, c, b], [b, c, a], [c, a, b]]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output", "f.csv"], "error: --output f.csv: features are written as .npz or .parquet"),
        (["--output", "no/f.npz"], "error: cannot write to --output no/f.npz: there is no folder"),
        (["--output", "f.npz", "--sheet", "s.jpg"], "error: --sheet s.jpg: the sheet is a .png"),
    ],
)
def test_mistakes_are_told_before_the_work(more, message, images, pretrained, tmp_path):
    done = python("pretrain/embed.py", images, "--pretrained", pretrained, *more, *FLAGS)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
