"""Folders as people have them: hidden files, links, names of any bytes; and lists compared."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moco_det.common.errors import UserError
from pretrain.data.listing import (
    check_unchanged,
    class_folders,
    find_images,
    fingerprint,
    read_list,
    seen_alike,
)


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_images_are_found_recursively_in_sorted_order(tmp_path):
    touch(tmp_path, *(f"class{i % 2}/{i}.jpg" for i in range(6)), "notes.txt", "b.JPEG", "a.png")
    assert list(find_images(tmp_path)) == [
        b"a.png", b"b.JPEG", b"class0/0.jpg", b"class0/2.jpg", b"class0/4.jpg",
        b"class1/1.jpg", b"class1/3.jpg", b"class1/5.jpg",
    ]  # fmt: skip


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="no such folder: .*absent"):
        find_images(tmp_path / "absent")
    with pytest.raises(UserError, match="no images below"):
        find_images(tmp_path)
    touch(tmp_path, "._only.jpg")
    with pytest.raises(UserError, match="no images below"):
        find_images(tmp_path)


def test_what_is_hidden_is_left_out_and_said_once(tmp_path, capsys):
    touch(tmp_path, "a/1.jpg", "a/._1.jpg", "a/.ipynb_checkpoints/1-checkpoint.jpg", ".git/x.png")
    touch(tmp_path, "__MACOSX/a/._1.jpg", "a/.DS_Store")
    for _ in range(2):
        assert list(find_images(tmp_path)) == [b"a/1.jpg"]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"left out below {tmp_path}: 4 that are hidden, or links")
    assert line.endswith("one of them: .git")


def test_nothing_is_said_of_ordinary_folders(tmp_path, capsys):
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    assert len(find_images(tmp_path)) == 2
    assert capsys.readouterr().out == ""


def test_each_real_folder_is_entered_once(tmp_path):
    """Loops of links gave each image up to forty times, until the system refused the path."""
    data, other = tmp_path / "data", tmp_path / "other"
    touch(data, "a/1.jpg", "z/2.jpg")
    touch(other, "deep/3.jpg")
    (data / "a" / "loop").symlink_to(data)
    (data / "a" / "to_z").symlink_to(data / "z")
    (data / "z" / "to_a").symlink_to("../a")
    (data / "linked").symlink_to(other)
    (data / "again").symlink_to(other / "deep")
    (other / "deep" / "back").symlink_to(data)
    (data / "4.jpg").symlink_to(data / "a" / "1.jpg")  # a file may have two names
    assert list(find_images(data)) == [b"4.jpg", b"a/1.jpg", b"again/3.jpg", b"z/2.jpg"]


def test_links_to_folders_are_followed(tmp_path):
    touch(tmp_path / "elsewhere", "n01/1.jpg", "n02/2.jpg")
    (tmp_path / "subset").mkdir()
    for name in ("n01", "n02"):
        (tmp_path / "subset" / name).symlink_to(tmp_path / "elsewhere" / name)
    assert list(find_images(tmp_path / "subset")) == [b"n01/1.jpg", b"n02/2.jpg"]
    assert class_folders(tmp_path / "subset") == ["n01", "n02"]


def test_names_may_be_any_bytes(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", folder + b"/\xff.png")
    assert list(find_images(tmp_path)) == [b"caf\xe9/\xff.png"]
    assert class_folders(tmp_path) == [os.fsdecode(b"caf\xe9")]


def test_classes_are_the_folders_that_images_are_read_from(tmp_path):
    touch(tmp_path, "b/1.jpg", "a/2.jpg", ".ipynb_checkpoints/3.jpg", "._a", "notes.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "up").symlink_to("..")
    assert class_folders(tmp_path) == ["a", "b"]
    assert class_folders(tmp_path / "absent") == []


# -- lists compared -------------------------------------------------------------------------------


def test_a_fingerprint_tells_names_labels_and_their_order():
    lists = ([b"a", b"b"], [b"b", b"a"], [b"ab"], [b"a"], [b"a", b"b", b"c"])
    prints = [fingerprint(names) for names in lists]
    prints += [fingerprint([b"a", b"b"], np.array(labels)) for labels in ([0, 1], [1, 0], [0, 0])]
    assert len({seen["hash"] for seen in prints}) == 8
    assert [seen["images"] for seen in prints] == [2, 2, 1, 1, 3, 2, 2, 2]
    assert fingerprint(np.array([b"a", b"b"])) == prints[0]


def test_other_data_than_a_checkpoint_s_is_refused_with_both_counts():
    before, now = fingerprint([b"a", b"b"]), fingerprint([b"a"])
    check_unchanged(None, now, Path("last.pth"))  # of an earlier version
    check_unchanged({}, now, Path("last.pth"))
    check_unchanged(dict(now), now, Path("last.pth"))
    message = (
        rf"last.pth is of other data: images 2 hash {before['hash']}, here images 1 "
        rf"hash {now['hash']}; .* --restart-epoch"
    )
    with pytest.raises(UserError, match=message):
        check_unchanged(before, now, Path("last.pth"))


def test_a_single_process_agrees_with_itself():
    assert seen_alike(lambda: [b"a"], fingerprint) == [b"a"]
    with pytest.raises(UserError, match="^no images$"):
        seen_alike(lambda: fail(), fingerprint)


def fail():
    raise UserError("no images")


# -- lists ----------------------------------------------------------------------------------------


def listed(tmp_path: Path, content: bytes) -> Path:
    touch(tmp_path, "data/train/a/1.jpg", "data/train/b/2.jpg", "data/3 4.png", "other/5.jpg")
    (tmp_path / "list.txt").write_bytes(content)
    return tmp_path / "list.txt"


def test_a_list_names_images_from_data_on_or_anywhere(tmp_path):
    other = os.fsencode(tmp_path / "other/5.jpg")
    content = b"train/b/2.jpg\r\n\n./3 4.png\n" + other + b"\ntrain/../train/a/1.jpg"
    paths = read_list(listed(tmp_path, content), tmp_path / "data")
    assert list(paths) == sorted([b"train/a/1.jpg", b"train/b/2.jpg", b"3 4.png", other])


def test_what_editors_add_to_a_list_is_no_part_of_a_name(tmp_path):
    content = "\ufefftrain/a/1.jpg\r\n3 4.png \t\r\n\r\n".encode()
    paths = read_list(listed(tmp_path, content), tmp_path / "data")
    assert list(paths) == [b"3 4.png", b"train/a/1.jpg"]


def test_only_the_set_of_a_lists_images_counts(tmp_path, monkeypatch):
    whole = os.fsencode(tmp_path / "data/train/a/1.jpg")
    one = read_list(listed(tmp_path, b"train/b/2.jpg\ntrain/a/1.jpg\n"), tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    for content in (b"train/a/1.jpg\ntrain/b/2.jpg", whole + b"\ntrain/b/2.jpg\n"):
        again = read_list(listed(tmp_path, content), Path("data"))
        assert fingerprint(again) == fingerprint(one)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "--list .*list.txt names no image"),
        (b"\n \n", "names no image"),
        (b"\x89PNG\0\n", "is no text file"),
        (b"train/a/1.jpg\n./train/a/1.jpg\n", "names 1 images again, such as train/a/1.jpg"),
        (b"train/a/9.jpg\ntrain/a/1.jpg\nc/1.jpg\n",
            "2 of the 3 images of --list .*list.txt are not in .*data: c/1.jpg, train/a/9.jpg$"),
        (b"1.jpg\n2.jpg\n3.jpg\n4.jpg\n", "4 of the 4 .*: 1.jpg, 2.jpg, 3.jpg, ...$"),
    ],
)  # fmt: skip
def test_what_a_list_lacks_is_named_before_the_work(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_list(listed(tmp_path, content), tmp_path / "data")


def test_no_list_is_an_error_in_a_line(tmp_path):
    with pytest.raises(UserError, match="cannot read .*absent.txt"):
        read_list(tmp_path / "absent.txt", tmp_path)
