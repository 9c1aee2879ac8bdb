"""tools/check_data.py as a user meets it."""

import numpy as np
import pytest
from commands import load_command
from PIL import Image
from tiny_davis import write_tiny_davis
from tiny_voc import write_tiny_config, write_tiny_voc


@pytest.fixture
def run(tmp_path, capsys):
    """Function: arguments -> exit code, stdout and stderr of the command on a tiny data set."""
    config = write_tiny_config(tmp_path / "tiny.yaml", write_tiny_voc(tmp_path / "voc"))
    tool = load_command("tools/check_data.py")

    def finish(*arguments):
        with pytest.raises(SystemExit) as stop:
            tool.main(["--config-file", str(config), *arguments])
        return int(stop.value.code), *capsys.readouterr()

    return finish


def test_healthy_set(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    header, _, *rows = out.splitlines()
    assert header.split("|")[1].strip() == "data set"
    assert [row.split("|")[-2].strip() for row in rows] == ["none", "none"]


def test_problems_of_all_sets_and_one_table_at_the_end(run, tmp_path):
    for name in ("000", "011"):  # the first is of train, the second of test
        (tmp_path / "voc" / "JPEGImages" / f"{name}.jpg").write_bytes(b"")
    code, out, _ = run("--images", "all")
    assert code == 1
    assert out.count("cannot be decoded") == 2
    last = out.strip().split("\n\n")[-1].splitlines()
    assert [row.split("|")[-2].strip() for row in last[2:]] == ["1", "1"]


def test_mistakes_of_the_command_line(run):
    assert run("--images", "many")[0] == 2
    code, _, err = run("DATASETS.TRAIN", "()", "DATASETS.TEST", "()")
    assert code == 1
    assert err.startswith("error: DATASETS.TRAIN and DATASETS.TEST are empty")


def test_the_doctor_decodes_as_training_does(run, tmp_path, monkeypatch):
    """Bytes after the end do not matter, floats and too many pixels do."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    images = tmp_path / "voc" / "JPEGImages"
    film = images / "000.jpg"
    film.write_bytes(film.read_bytes() + b"ftypmp42" + b"\x00\xff\xda\x01" * 50)
    assert run("--images", "all")[0] == 0
    with Image.open(images / "001.jpg") as image:
        Image.fromarray(np.asarray(image.convert("L"), np.float32)).save(images / "001.jpg", "TIFF")
    code, out, _ = run("--images", "all")
    assert code == 1
    assert "001.jpg cannot be decoded: floating-point samples" in out
    code, out, _ = run("--images", "all", "INPUT.MAX_IMAGE_PIXELS", "1000")
    assert code == 1
    assert "more than 1,000 pixels" in out


def test_davis_is_checked_without_a_config(tmp_path, capsys):
    tool = load_command("tools/check_data.py")
    root = write_tiny_davis(tmp_path / "davis", frames=3)

    def finish(*arguments):
        with pytest.raises(SystemExit) as stop:
            tool.main(["--davis", str(root), *arguments])
        return int(stop.value.code), capsys.readouterr().out

    code, out = finish()
    assert code == 0
    assert "note: 2 sequences; the official list has 30" in out
    row = [cell.strip() for cell in out.splitlines()[-1].split("|")]
    assert row[2:5] == ["6", "-", "3"]  # frames and objects
    assert row[6:8] == ["6", "none"]
    frame = root / "JPEGImages/480p/pair/00001.jpg"
    frame.write_bytes(frame.read_bytes()[:-100])  # cut off in transfer
    code, out = finish("--images", "all")
    assert code == 1
    assert f"{frame}: truncated file" in out
    (root / "Annotations/480p/disc/00002.png").unlink()
    code, out = finish()
    assert code == 1
    assert "frames: disc: frame 00002 has no mask" in out
    with pytest.raises(SystemExit) as stop:
        tool.main([])
    assert stop.value.code == 2
    assert "name what to check: --config-file FILE or --davis DIR" in capsys.readouterr().err
