"""The commands' output; how long anything takes is no test."""

import sys

import pytest
from commands import load_command

from moco_det.benchmark import pretrain_step
from moco_det.benchmark.cost import Cost


@pytest.fixture
def tool():
    return load_command("tools/benchmark.py")


@pytest.fixture
def run(tool, monkeypatch, capsys):
    """Function: arguments -> the lines that the command prints."""

    def lines(*arguments) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
        tool.main()
        return capsys.readouterr().out.splitlines()

    return lines


def test_pretrain_cost_prints_table_3(tool, run, monkeypatch):
    settings = []

    def measure(setting, steps):
        settings.append(setting)
        fits = setting.batch_size < 4096
        return Cost(2**30 * (2 if setting.mechanism == "moco" else 3), 0.36) if fits else None

    monkeypatch.setattr(tool, "measure", measure)
    lines = run(
        "pretrain-cost", "--device", "cpu", "--processes", "2", "--batch-sizes", "512", "4096"
    )
    assert lines[0].startswith("machine: ")
    assert lines[1] == "resnet50, 224 px, fp32, 2 x process"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:11]]
    assert cells[0] == ["mechanism", "batch", "memory", "s/step", "hours / 200 ep."]
    assert cells[2] == ["moco", "512", "2.00 GiB", "0.360", "50.0"]
    assert cells[3] == ["end-to-end", "512", "3.00 GiB", "0.360", "50.0"]
    assert cells[5] == ["end-to-end", "4096", "n/a", "n/a", "n/a"]
    assert cells[6] == ["paper: moco", "256", "5.0 G", "", "53"]
    assert "peak RSS of a process" in lines[11]
    assert "1,281,167" in lines[11]
    assert "memory 1.50, time 1.00 (paper, batch 256: 1.48, 1.23)" in lines[-1]
    assert [(s.mechanism, s.batch_size, s.processes) for s in settings[:2]] == [
        ("moco", 512, 2),
        ("end-to-end", 512, 2),
    ]


def test_pretrain_step_prints_a_row_for_each_form(run, monkeypatch):
    monkeypatch.setattr(pretrain_step, "_memory_of_process", lambda setting, form: 2**30)
    tiny = "--arch resnet18w0.25x --batch-size 8 --image-size 32 --device cpu --rounds 1"
    lines = run("pretrain-step", *tiny.split(), "--amp", "none", "--bn-groups", "1", "2")
    assert lines[1] == "MoCo v2, resnet18w0.25x, batch 8, 32 px"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert rows[0][0] == "step"
    assert [row[0] for row in rows[2:]] == [
        "official, fp32",
        "official, fp32, channels_last",
        "ours, fp32, 2 BN groups",
        "ours, fp32, 1 BN group",
    ]
    assert rows[2][3] == "1.00"
    assert {row[5] for row in rows[2:]} == {"1.00 GiB"}


def test_data_path_prints_each_way_beside_the_reference(tool, run, monkeypatch, tmp_path):
    seconds = {"reference": 0.02, "cpu": 0.005, "device": 0.0025}
    monkeypatch.setattr(tool.data_speed, "data_path", lambda *_: seconds)
    monkeypatch.setattr(tool.data_speed, "looks", lambda *_: {"plain": 0.032, "compiled": 0.016})
    lines = run("data-path", "--images", str(tmp_path), "--batch-size", "64", "--device", "cpu")[1:]
    assert [" ".join(line.split()) for line in lines] == [
        "torchvision + PIL 50.0 images/s and core ratio 1.00",
        "ours, --augment-on cpu 200.0 images/s and core ratio 4.00",
        "ours, --augment-on device: the workers 400.0 images/s and core ratio 8.00",
        "the device (cpu), plain 2000.0 images/s 32.0 ms a batch of 64",
        "the device (cpu), compiled 4000.0 images/s 16.0 ms a batch of 64",
    ]


def test_knn_bank_prints_what_each_process_holds(tool, run, monkeypatch):
    cost = tool.data_speed.BankCost(2**30, 2**31, 0.5, 0.995)
    monkeypatch.setattr(tool.data_speed, "knn_bank", lambda *_: cost)
    lines = run("knn-bank", "--images", "1000", "--queries", "50", "--device", "cpu")[1:]
    assert [" ".join(line.split()) for line in lines] == [
        "bank of 1,000 images x 2048",
        "float32, on every process 2.00 GiB",
        "ours, in one process 1.00 GiB ratio 2.00",
        "ours, in each of eight 0.12 GiB ratio 16.00",
        "search 100.0 queries/s",
        "classes as by float32 99.50 %",
    ]


def test_annotation_memory_compares_several_processes_with_one(tool, run, monkeypatch):
    costs = {1: (2**30, 2**28, 10.0), 4: (2**30 + 2**28, 2**28, 12.0)}
    cost = tool.data_speed.AnnotationCost
    monkeypatch.setattr(
        tool.data_speed, "annotation_memory", lambda _, processes: cost(*costs[processes])
    )
    lines = run("annotation-memory", "--images", "3", "--objects", "5", "--processes", "4")[1:]
    assert [" ".join(line.split()) for line in lines] == [
        "3 images, 5 objects, 0 MiB",
        "1 process(es), all together: 1024 MiB at most, 256 MiB held, 10.0 s",
        "4 process(es), all together: 1280 MiB at most, 256 MiB held, 12.0 s",
        "ratio 1.25 at most, 1.00 held",
    ]
