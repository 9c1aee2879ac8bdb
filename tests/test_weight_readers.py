"""All commands that read weights are one reader: the same words for the same damage.

torch reads a file with a flipped bit as if nothing were, and each command had its own errors for
what torch refuses.
"""

import re
import zipfile
from pathlib import Path

import pytest
import torch
from commands import run
from noisy_colours import write_checkpoint, write_images
from tiny_voc import write_tiny_config, write_tiny_voc

ARCH = "resnet18w0.25x"
TINY = f"-a {ARCH} --image-size 32 -b 8 -j 0 --epochs 1"
DETECTOR = "tools/train_net.py --engine native --config-file CONFIG"
COMMANDS = {  # FILE is in the folder RUN
    "convert": "tools/convert_to_d2.py FILE OUT/weights.pkl",
    "MODEL.WEIGHTS": f"{DETECTOR} MODEL.WEIGHTS FILE OUTPUT_DIR OUT",
    "train_net --resume": f"{DETECTOR} --resume OUTPUT_DIR RUN",
    "main --resume": f"pretrain/main.py DATA {TINY} --resume FILE --output OUT",
    "linear --pretrained": f"pretrain/linear.py DATA {TINY} --pretrained FILE --output OUT",
    "linear --resume": f"pretrain/linear.py DATA {TINY} --pretrained random --resume FILE "
    "--output OUT",
    "knn --pretrained": f"pretrain/knn.py DATA -a {ARCH} --image-size 32 -j 0 --pretrained FILE",
    "reproduce --weights": "tools/reproduce.py --quick --tables 6-semantic --output OUT "
    "--weights moco=FILE",
}


def flip_a_bit(path: Path) -> None:
    """Within the numbers of the largest tensor."""
    with zipfile.ZipFile(path) as file:
        entry = max(file.infolist(), key=lambda entry: entry.file_size)
    data = bytearray(path.read_bytes())
    data[entry.header_offset + 500 + entry.file_size // 2] ^= 0x40
    path.write_bytes(data)
    torch.load(path, weights_only=True)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_text(path: Path) -> None:
    path.write_text("<html>404 not found</html>")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Word of a command -> path."""
    folder = tmp_path_factory.mktemp("data")
    config = write_tiny_config(folder / "tiny.yaml", write_tiny_voc(folder / "voc", images=3))
    return {"DATA": write_images(folder / "images"), "CONFIG": config}


@pytest.mark.parametrize("damage", [flip_a_bit, cut, write_text])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_damaged_file_is_one_line_that_names_it(places, tmp_path, name, damage):
    run_folder, output = tmp_path / "run", tmp_path / "out"
    for folder in (run_folder, output):
        folder.mkdir()
    path = run_folder / "model_0000001.pth"
    (run_folder / "last_checkpoint").write_text(path.name)
    damage(write_checkpoint(path, ARCH))
    command = COMMANDS[name].replace("FILE", str(path)).replace("RUN", str(run_folder))
    for word, place in places.items():
        command = command.replace(word, str(place))
    done = run(*re.sub(r"\bOUT\b", str(output), command).split())
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"{path} is damaged or no checkpoint: " in line
    assert len(line) - len(str(path)) < 300
