"""Submission by submitit's local and debug executors, and the script that Slurm would get."""

import json
import os
import re
import stat
import sys
from pathlib import Path

import pytest
from paths import REPOSITORY

from moco_det.benchmark.jobs import slurm
from moco_det.benchmark.jobs.grid import (
    ClassifierExperiment,
    ClassifierRun,
    Experiment,
    FrozenExperiment,
    FrozenRun,
    Run,
)
from moco_det.benchmark.jobs.runs import RunFolder, Settings
from moco_det.common import installation
from moco_det.common.errors import UserError

submitit = pytest.importorskip("submitit")
EXPERIMENT = Experiment("voc", "A detector", iterations=100, batch=16, trials=5)
# Stands in for tools/train_net.py: evaluates at once and keeps its arguments and its variables.
TRAIN_NET = """
import json, os, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("OUTPUT_DIR") + 1])
(folder / "arguments.json").write_text(json.dumps(sys.argv))
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
told = {name: os.environ.get(name) for name in names}
(folder / f"rank{told['RANK']}.json").write_text(json.dumps(told))
if told["RANK"] in (None, "0"):
    (folder / "metrics.json").write_text('{"iteration": 9, "bbox/AP": 50.0}\\n')
"""

# Stands in for pretrain/linear.py: validates at once.
LINEAR = """
import pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
record = '{"step": 1, "epoch": 1, "val_acc1": 60.5, "val_acc5": 83.0}'
(folder / "metrics.jsonl").write_text(record + "\\n")
"""

# Stands in for pretrain/davis.py: measures at once.
DAVIS = """
import pathlib, sys
file = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
file.write_text('{"davis_jf_mean": 63.5}')
"""
SCRIPTS = {
    "tools/train_net.py": TRAIN_NET,
    "pretrain/linear.py": LINEAR,
    "pretrain/davis.py": DAVIS,
}


@pytest.fixture
def settings(tmp_path, monkeypatch):
    package = tmp_path / "repository" / "moco_det"
    monkeypatch.setattr(installation, "PACKAGE", package)
    # In the jobs' processes as well, as they begin.
    (tmp_path / "sitecustomize.py").write_text(
        "from pathlib import Path\n"
        "from moco_det.common import installation\n"
        f"installation.PACKAGE = Path({str(package)!r})\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{REPOSITORY}")
    for path, text in SCRIPTS.items():
        script = tmp_path / "repository" / path
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(text)
    return Settings(tmp_path / "output", "native", gpus=2)


def runs(*trials):
    return [Run(EXPERIMENT, "moco", trial, Path("configs/voc_moco.yaml"), ()) for trial in trials]


def test_parameters():
    words = ["nodes=2", "timeout_min=2880", "partition=gpu", "slurm_qos=high"]
    assert slurm.parse_parameters(words) == {
        "nodes": 2,
        "timeout_min": 2880,
        "slurm_partition": "gpu",
        "slurm_qos": "high",
    }
    with pytest.raises(UserError, match="NAME=VALUE"):
        slurm.parse_parameters(["partition"])


def test_submitit_s_absence_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="pip install submitit"):
        slurm.make_executor(tmp_path, {}, 1)


def test_a_machine_without_slurm_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="are you indeed on a slurm cluster"):
        slurm.make_executor(tmp_path, {"nodes": 1}, 1)


def test_debug_executor_carries_out_the_run(settings, tmp_path):
    executor = slurm.make_executor(tmp_path / "slurm", {"nodes": 1}, 2, "debug")
    (job,) = slurm.submit(runs(1), settings, executor, nodes=1)
    assert job.result() == "finished"
    folder = RunFolder(runs(1)[0], settings.output)
    assert folder.results() == {"bbox/AP": 50.0}
    assert folder.record["state"] == "finished"
    arguments = json.loads((folder.path / "arguments.json").read_text())
    assert arguments[arguments.index("--num-gpus") + 1] == "2"
    assert slurm.job_of(folder) == job.job_id


def test_a_classifier_is_a_job_like_a_detector(settings, tmp_path):
    experiment = ClassifierExperiment("linear", "A classifier", "imagenet", epochs=1, trials=1)
    run = ClassifierRun(experiment, "moco", 1, {"pretrained": "random"})
    executor = slurm.make_executor(tmp_path / "slurm", {"nodes": 1}, 2, "debug")
    (job,) = slurm.submit([run], settings, executor, nodes=1)
    assert job.result() == "finished"
    assert settings.folder(run).results()["classification/top1"] == 60.5
    assert slurm.job_of(settings.folder(run)) == job.job_id


def test_an_evaluation_of_frozen_features_is_a_job_too(settings, tmp_path):
    experiment = FrozenExperiment("davis", "An evaluation", "DAVIS", trials=1, command="davis")
    run = FrozenRun(experiment, "moco", 1, {"pretrained": "random"})
    executor = slurm.make_executor(tmp_path / "slurm", {"nodes": 1}, 2, "debug")
    (job,) = slurm.submit([run], settings, executor, nodes=1)
    assert job.result() == "finished"
    assert settings.folder(run).results() == {"davis_jf_mean": 63.5}


def test_local_executor_carries_out_runs_in_processes_of_their_own(settings, tmp_path):
    executor = slurm.make_executor(tmp_path / "slurm", {"nodes": 1, "timeout_min": 5}, 0, "local")
    jobs = slurm.submit(runs(1, 2), settings, executor, nodes=1)
    assert [job.result() for job in jobs] == ["finished", "finished"]
    for run in runs(1, 2):
        assert RunFolder(run, settings.output).state() == "finished"


def test_torchrun_of_two_machines_reaches_every_process(settings, tmp_path, monkeypatch):
    """Both "machines" are this one; the second is only a part of the training."""
    run = runs(1)[0]
    folder = RunFolder(run, settings.output)
    folder.path.mkdir(parents=True)
    commands = [
        settings.command(run, slurm.torchrun(2, node, "127.0.0.1", "12_1", settings))
        for node in (0, 1)
    ]
    second = os.spawnv(os.P_NOWAIT, sys.executable, commands[1])
    assert os.spawnv(os.P_WAIT, sys.executable, commands[0]) == 0
    assert os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]) == 0
    told = [json.loads((folder.path / f"rank{rank}.json").read_text()) for rank in range(4)]
    assert [entry["WORLD_SIZE"] for entry in told] == ["4"] * 4
    assert [entry["LOCAL_RANK"] for entry in told] == ["0", "1", "0", "1"]
    assert "--num-gpus" not in commands[0]


def script_of(bin_folder, name, text):
    path = bin_folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    """`sbatch` that keeps the script, `srun`, and a `sacct` for which job 77 waits."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script_of(folder, "srun", "exit 1")
    script_of(folder, "sbatch", f'cp "$1" {tmp_path}/script.sh\necho Submitted batch job 77')
    table = "JobID|State|NodeList\\n77_0|PENDING|\\n77_1|PENDING|\\n"
    script_of(folder, "sacct", f'printf "{table}"')
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path / "script.sh"


def test_the_generated_script(settings, tmp_path, fake_slurm):
    parameters = slurm.parse_parameters(["nodes=2", "partition=gpu", "timeout_min=600", "qos=high"])
    executor = slurm.make_executor(tmp_path / "slurm", parameters, settings.gpus)
    jobs = slurm.submit(runs(1, 2), settings, executor, nodes=2)
    assert [job.job_id for job in jobs] == ["77_0", "77_1"]
    script = fake_slurm.read_text()
    given = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.MULTILINE))
    wanted = {
        "nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "2", "time": "600",
        "partition": "gpu", "qos": "high", "job-name": "moco_det",
    }  # fmt: skip
    assert {key: given.get(key) for key in wanted} == wanted
    assert given["array"].startswith("0-1")
    assert given["signal"].startswith("USR2@")  # before the end: `SlurmRun.checkpoint`
    assert "open-mode" in given
    assert re.search(r"^srun .* -m submitit\.core\._submit ", script, re.MULTILINE)
    # What the pickles hold is what `SlurmRun` does.
    (pickle, *_) = sorted((tmp_path / "slurm").glob("*.pkl"))
    submission = submitit.core.utils.DelayedSubmission.load(pickle)
    assert isinstance(submission.function, slurm.SlurmRun)
    assert submission.function.settings.retries == 0  # on several machines


def test_a_waiting_job_is_not_submitted_again(settings, tmp_path, fake_slurm):
    executor = slurm.make_executor(tmp_path / "slurm", {"nodes": 1}, settings.gpus)
    assert len(slurm.submit(runs(1, 2), settings, executor, nodes=1)) == 2
    fake_slurm.unlink()
    assert slurm.submit(runs(1, 2), settings, executor, nodes=1) == []
    assert not fake_slurm.exists()
