"""The command: what it prints, what it leaves, how it fails."""

import pickle
import subprocess
import sys

import torch
import torchvision


def run(repository, *arguments):
    command = [sys.executable, repository / "tools" / "convert_to_d2.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def write_checkpoint(path, network):
    state = {f"module.encoder_q.{k}": v for k, v in network.state_dict().items()}
    state["module.queue"] = torch.zeros(8, 16)
    torch.save({"epoch": 1, "arch": "resnet18", "state_dict": state, "optimizer": {}}, path)


def test_converts_and_reports(repository, tmp_path):
    write_checkpoint(tmp_path / "checkpoint_last.pth.tar", torchvision.models.resnet18())
    done = run(repository, tmp_path / "checkpoint_last.pth.tar", tmp_path / "weights.pkl")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "MoCo checkpoint, ResNet-18"
    assert "120 keys mapped" in lines  # 20 convolutions and as many norms of 5 arrays
    assert "  module.encoder_q.layer1 -> res2: 24" in lines
    assert "3 keys dropped" in lines
    assert "  module.encoder_q.fc: 2" in lines
    (found,) = (line for line in lines if "difference" in line)
    assert float(found.split()[-1]) <= 1e-5
    assert "  INPUT.FORMAT: RGB" in lines
    content = pickle.loads((tmp_path / "weights.pkl").read_bytes())
    assert (content["__author__"], content["matching_heuristics"]) == ("MOCO", True)
    assert len(content["model"]) == 120


def test_failure_is_one_line_and_leaves_no_file(repository, tmp_path):
    network = torchvision.models.resnet18()
    network.conv1 = torch.nn.Conv2d(3, 64, 3, bias=False)
    write_checkpoint(tmp_path / "small.pth.tar", network)
    done = run(repository, tmp_path / "small.pth.tar", tmp_path / "weights.pkl")
    assert done.returncode == 1
    (line,) = (x for x in done.stderr.splitlines() if "Warning" not in x and "warn" not in x)
    assert line.startswith("error: ")
    assert "--small-stem" in line
    assert not (tmp_path / "weights.pkl").exists()
