"""Files are whole at every moment, whatever happens while they are written."""

import errno
import hashlib
import json
import os

import pytest

from moco_det.common.errors import UserError
from moco_det.common.files import (
    check_output_file,
    file_hash,
    is_special,
    make_folder,
    read_regular,
    replacing,
    write_json,
    write_text,
)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    return path


def test_the_old_content_stays_until_the_new_one_is_whole(path):
    with replacing(path) as temporary:
        temporary.write_text("ne")
        assert path.read_text() == "old"
        assert temporary.suffix == ".json"  # what writes it may go by the ending
        assert temporary.parent == path.parent  # a rename within one file system
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["a.json"]


def test_a_failure_of_the_writer_leaves_the_old_file_and_nothing_else(path):
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half of it")
        print(1 / 0)
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["a.json"]


def test_a_disk_that_is_full_when_flushed_leaves_the_old_file(path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["a.json"]


def test_it_is_flushed_before_it_takes_the_name(path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("flushed"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("renamed"), replace(a, b)))
    write_text(path, "new")
    assert calls == ["flushed", "renamed"]


def test_a_writer_that_writes_nothing_is_an_error(path):
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_text() == "old"


def test_what_is_no_file_is_never_replaced(tmp_path):
    """As root, /dev/null would become a file for everybody."""
    (tmp_path / "link").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo"):
        with pytest.raises(UserError, match="it is a device or the like: name a file"):
            write_text(tmp_path / name, "text")
        with pytest.raises(UserError, match=f"--output .*{name}: it is a device"):
            check_output_file(tmp_path / name, "--output")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "link"]
    assert is_special("/dev/stdout") and is_special("/dev/absent")
    assert not is_special(tmp_path) and not is_special(tmp_path / "absent")


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(OSError):
        write_text(tmp_path / "no" / "a.txt", "new")


def test_json_and_text_in_utf8(tmp_path):
    write_json(tmp_path / "a.json", {"Güler": [1, 2]})
    assert json.loads((tmp_path / "a.json").read_bytes().decode()) == {"Güler": [1, 2]}
    assert "Güler" in (tmp_path / "a.json").read_text(encoding="utf-8")
    write_json(tmp_path / "b.json", [1, {"a": 2}], indent=None)
    assert (tmp_path / "b.json").read_text() == '[1, {"a": 2}]\n'


def test_the_hash_is_that_of_the_content_now(tmp_path):
    path = tmp_path / "weights.pth"
    for size, modified in ((0, 1), (5, 2), ((1 << 20) + 3, 3)):  # less and more than a block
        path.write_bytes(b"x" * size)
        os.utime(path, ns=(modified, modified))
        assert file_hash(path) == f"sha256:{hashlib.sha256(b'x' * size).hexdigest()}"


def test_only_regular_files_are_read(tmp_path):
    """A FIFO would be waited for, a device has no end."""
    (tmp_path / "a").write_bytes(b"abc")
    assert read_regular(tmp_path / "a") == b"abc"
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, "/dev/zero"):
        with pytest.raises(UserError, match=f"cannot read {path}: it is no regular file"):
            read_regular(path)
    for path in (tmp_path / "absent", f"{tmp_path}/a\0b", "x" * 5000):
        with pytest.raises(UserError, match="cannot read"):
            read_regular(path)
    with pytest.raises(UserError, match="it has 3 bytes; 2 are allowed"):
        read_regular(tmp_path / "a", 2)


def test_a_folder_is_made_and_tried(tmp_path):
    assert make_folder(tmp_path / "a" / "b", "--output") == tmp_path / "a" / "b"
    assert os.listdir(tmp_path / "a" / "b") == []


def test_a_full_disk_is_found_by_writing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="^cannot write to --output .*: No space left on device$"):
        make_folder(tmp_path, "--output")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "why"),
    [("folder", "it is a folder"), ("no/a.json", "there is no folder"), ("file/a", "no folder")],
)
def test_a_file_that_could_not_be_written(tmp_path, name, why):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"cannot write to --output .*{why}"):
        check_output_file(tmp_path / name, "--output")
    check_output_file(tmp_path / "file", "--output")
    check_output_file(tmp_path / "new", "--output")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
