"""`moco-det COMMAND`, and a wheel, which holds all that the commands need."""

import re
import subprocess
import sys
import zipfile

import pytest
from paths import REPOSITORY

from moco_det.__main__ import COMMANDS


def run(*arguments, folder=REPOSITORY, path=REPOSITORY):
    environment = {"PYTHONPATH": str(path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=folder, env=environment
    )


def test_each_script_has_a_name():
    scripts = [p for folder in ("pretrain", "tools") for p in (REPOSITORY / folder).glob("*.py")]
    commands = {
        str(path.relative_to(REPOSITORY))
        for path in scripts
        if "start_command(" in path.read_text()
    }
    assert set(COMMANDS.values()) == commands


def test_it_lists_its_commands():
    done = run("-m", "moco_det", "--help")
    listed = dict(re.findall(r"^  (\S+) +(\S.+)$", done.stdout, re.MULTILINE))
    assert listed.keys() == COMMANDS.keys()
    assert listed["convert"].startswith("Turn the ResNet of any checkpoint")


def test_an_unknown_command_is_told_in_a_line():
    done = run("-m", "moco_det", "trian")
    assert done.returncode == 1
    assert re.fullmatch(r"error: unknown command 'trian'; there are quickstart, .+\n", done.stderr)


def test_a_wheel_works_in_an_empty_folder(tmp_path):
    pytest.importorskip("setuptools", "70.1", reason="builds a wheel")
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"  # since building leaves folders beside setup.py
    subprocess.run(["git", "clone", "-q", REPOSITORY, source], check=True)
    done = run(*command, "-w", tmp_path, source)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("moco_det-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    packed = {p.relative_to(tmp_path / "installed").as_posix()
              for p in (tmp_path / "installed").rglob("*")}  # fmt: skip
    for file in (REPOSITORY / "configs").rglob("*.yaml"):
        assert f"moco_det/{file.relative_to(REPOSITORY).as_posix()}" in packed
    assert "moco_det/py.typed" in packed
    assert not {"tools", "configs", "tests"} & packed
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments in (
        ["convert", "--help"],
        ["check-data", "--config-file", "configs/voc_R50_C4_24k_moco.yaml"],
    ):
        done = run("-m", "moco_det", *arguments, folder=empty, path=tmp_path / "installed")
        assert "Traceback" not in done.stderr, done.stderr
    assert "voc_2007_trainval" in done.stdout + done.stderr
