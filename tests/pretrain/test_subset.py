"""The command that lists subsets: what it writes is what `main.py --list` reads."""

import os
from pathlib import Path

import pytest

from moco_det.common.errors import UserError
from pretrain.data.listing import read_list
from pretrain.subset import main


@pytest.fixture
def data(tmp_path) -> Path:
    """60 images of each of 6 classes below train/, and others beside it."""
    for part, count in (("train", 60), ("val", 2)):
        for label in range(6):
            folder = tmp_path / "data" / part / f"class {label}"
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.jpg").touch()
    return tmp_path / "data"


def test_a_random_subset(data, tmp_path, capsys):
    file = tmp_path / "list.txt"
    main([str(data), "--random", "40", "--output", str(file)])
    said = capsys.readouterr().out
    assert said.startswith(f"{file}: 40 of 360 images, 6 classes of ")
    lines = file.read_bytes().splitlines()
    assert len(lines) == 40 and lines == sorted(lines)
    assert all(line.startswith(b"train/class ") for line in lines)
    assert read_list(file, data).tolist() == lines
    main([str(data), "--random", "40", "--output", str(tmp_path / "other.txt"), "--seed", "1"])
    assert (tmp_path / "other.txt").read_bytes() != file.read_bytes()


@pytest.mark.parametrize(
    ("flags", "images"), [(("--long-tailed",), 138), (("--long-tailed", "90"), 90)]
)
def test_a_long_tailed_subset(data, tmp_path, capsys, flags, images):
    """By hand: (6/r)^(1/6) - 1 of the first's 60 makes 60 + 35 + 21 + 12 + 5 + 5."""
    file = tmp_path / "list.txt"
    main([str(data), *flags, "--output", str(file)])
    assert f"{images} of 360 images, 6 classes of 5 to " in capsys.readouterr().out
    assert len(read_list(file, data)) == images


def test_a_folder_without_train_and_names_of_any_bytes(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in (b"a b.jpg", b"\xff.jpg"):
        (folder / os.fsdecode(name)).touch()
    main([str(folder), "--random", "2", "--output", str(tmp_path / "list.txt")])
    assert read_list(tmp_path / "list.txt", folder).tolist() == [b"a b.jpg", b"\xff.jpg"]
    with pytest.raises(UserError, match="--long-tailed is about classes: .*in no class folder"):
        main([str(folder), "--long-tailed", "--output", str(tmp_path / "list.txt")])
    (folder / "a\nb.jpg").touch()
    with pytest.raises(UserError, match="a list cannot hold the name"):
        main([str(folder), "--random", "3", "--output", str(tmp_path / "list.txt")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--random 1000", "--random 1000: there are 360 images"),
        ("--long-tailed 7", "--long-tailed 7: 6 classes.* have 30 to 360"),
        ("--long-tailed --alpha nan", "--alpha nan: it takes numbers"),
        ("--random 3 --output absent/list.txt", "cannot write to --output absent/list.txt"),
    ],
)
def test_mistakes_are_told_in_a_line(data, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        main([str(data), "--output", str(tmp_path / "list.txt"), *words.split()])
    assert not (tmp_path / "list.txt").exists()
