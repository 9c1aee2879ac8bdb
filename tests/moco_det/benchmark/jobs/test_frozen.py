"""Evaluations of frozen features as jobs: the command, its numbers, what is looked at ahead."""

import json
import sys

import pytest
from paths import REPOSITORY
from tiny_davis import write_tiny_davis
from tiny_voc_segments import write_tiny_segments

from moco_det.benchmark.jobs import frozen
from moco_det.benchmark.jobs.encoder_runs import FLAGS
from moco_det.benchmark.jobs.frozen import CHECKS, FrozenFolder, check_data, frozen_job
from moco_det.benchmark.jobs.grid import FrozenExperiment, FrozenRun, Grid, Part, Row, Table
from moco_det.benchmark.jobs.preflight import preflight
from moco_det.benchmark.jobs.runner import run_in_order
from moco_det.benchmark.jobs.runs import Settings
from moco_det.benchmark.report import reproduction as report
from moco_det.common.errors import UserError

DATA = {"voc_svm": "VOC2007", "segment_retrieval": "VOC2012", "davis": "DAVIS"}
MEASURES = {"davis_j_mean": 61.0, "davis_f_mean": 66.0, "davis_jf_mean": 63.5}


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


def make(tmp_path, command="davis", cpu=True, **flags) -> FrozenFolder:
    experiment = FrozenExperiment(
        command, "An evaluation", DATA[command], trials=1, command=command
    )
    given = {"arch": "resnet18w0.25x", "pretrained": "random"} | flags
    return FrozenFolder(FrozenRun(experiment, "mine", 2, given, cpu=cpu), tmp_path / "out")


def write(folder, content) -> None:
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.file.write_text(content if isinstance(content, str) else json.dumps(content))


# -- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", DATA)
def test_the_command_ends_with_a_file_of_the_run(tmp_path, data, command):
    """Read back by the script's own parser."""
    folder = make(tmp_path, command, cpu=False)
    python, script, *words = frozen_job(folder, gpus=1).commands[0].argv
    assert (python, script) == (sys.executable, str(REPOSITORY / f"pretrain/{command}.py"))
    args = FLAGS[command].parse(words)
    assert (args.data, args.output) == (str(data / DATA[command]), str(folder.file))
    assert (args.seed, args.pretrained, args.arch) == (2, "random", "resnet18w0.25x")
    assert not args.multiprocessing_distributed
    spawned = frozen_job(folder, gpus=8).commands[0].argv
    assert FLAGS[command].parse(spawned[2:]).multiprocessing_distributed
    hidden = frozen_job(make(tmp_path, command), gpus=1).commands[0].argv
    assert hidden[:2] == ["env", "CUDA_VISIBLE_DEVICES="]


def test_every_command_is_known_whole():
    assert CHECKS.keys() == DATA.keys() == FLAGS.keys() - {"linear"}


def test_a_flag_that_the_command_refuses(tmp_path, data):
    with pytest.raises(UserError, match="unknown key 'top_kk' in the flags of davis.*top-k"):
        frozen_job(make(tmp_path, top_kk=3), gpus=1)
    with pytest.raises(UserError, match="--top-k must be at least 1"):
        frozen_job(make(tmp_path, top_k=0), gpus=1)


# -- its numbers ----------------------------------------------------------------------------------


def test_numbers_of_a_run_are_those_of_its_file(tmp_path, data):
    folder = make(tmp_path)
    job = frozen_job(folder, gpus=1)
    assert folder.results() == {} and job.read_result() is None  # no file: a failure
    write(folder, MEASURES)
    assert folder.results() == MEASURES and job.read_result() == {}
    assert folder.losses() == [] and folder.shortened() is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "results.json"),
        ("[1]", "holds no measures"),
        ('{"davis_j_mean": "61"}', "davis_j_mean is '61'"),
        ('{"davis_j_mean": true}', "davis_j_mean is True"),
        ('{"davis_j_mean": NaN}', "results.json"),
        ("{}", "holds no measures"),
    ],
)
def test_a_damaged_file_is_told_in_a_line(tmp_path, data, content, words):
    folder = make(tmp_path)
    folder.write_record({"state": "finished"})
    write(folder, content)
    look = folder.look()
    assert look.state == "unreadable" and words in look.problem


def test_a_run_is_carried_out_once(tmp_path, data, capsys):
    """From the script itself to a row of the report, beside the paper's numbers."""
    write_tiny_davis(data / "DAVIS", frames=3, size=(32, 48))
    folder = make(tmp_path, context=1)
    settings, run = Settings(tmp_path / "out", "native"), folder.run
    assert preflight([run], settings) == []
    run_in_order([settings.job(run)])
    found = folder.results()
    assert found.keys() == MEASURES.keys()
    mean = (found["davis_j_mean"] + found["davis_f_mean"]) / 2
    assert found["davis_jf_mean"] == pytest.approx(mean) and 0 < mean <= 100
    before = folder.file.stat().st_mtime_ns
    run_in_order([settings.job(run)])
    assert folder.file.stat().st_mtime_ns == before

    columns = {"J": "davis_j_mean", "F": "davis_f_mean"}
    table = Table("5", "Table 5", "a paper", (Part(run.experiment, columns, {"mine": [60.0, 70]}),))
    grid = Grid({"mine": Row("mine", "mine")}, {"5": table})
    (made,) = report.collect(grid, [table], [run], settings, {}).tables
    j, f = made.rows[0].cells[0]
    assert (j.values, f.values) == ({2: found["davis_j_mean"]}, {2: found["davis_f_mean"]})
    assert j.from_published.value == pytest.approx(found["davis_j_mean"] - 60)
    assert made.notes == []


def test_a_run_of_other_settings_is_refused(tmp_path, data):
    write_tiny_davis(data / "DAVIS")
    settings, folder = Settings(tmp_path / "out", "native"), make(tmp_path)
    write(folder, MEASURES)
    folder.write_record({"state": "finished", "identity": settings.job(folder.run).identity})
    assert preflight([folder.run], settings) == []
    (line,) = preflight([make(tmp_path, radius=3).run], settings)
    assert "holds a trial with other settings (flags was" in line


# -- what is looked at ahead ----------------------------------------------------------------------


@pytest.mark.parametrize("command", DATA)
def test_data_that_is_not_there(tmp_path, data, command, monkeypatch):
    monkeypatch.setattr(frozen, "import_optional", lambda *package: None)  # takes seconds
    run = make(tmp_path, command).run
    (line,) = preflight([run], Settings(tmp_path / "out", "native"))
    folder = data / DATA[command]
    assert f"link the data set as {folder}, or set DETECTRON2_DATASETS to the folder that" in line
    assert line.endswith(f"holds {DATA[command]}/ ({run.name})")


def test_data_that_is_there(tmp_path, data, monkeypatch):
    monkeypatch.setattr(frozen, "import_optional", lambda *package: None)
    write_tiny_davis(data / "DAVIS")
    write_tiny_segments(data / "VOC2012")
    for command in ("davis", "segment_retrieval"):
        check_data(make(tmp_path, command).run)


def test_a_package_that_is_missing_and_weights_that_do_not_fit(tmp_path, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    with pytest.raises(UserError, match=r"needs the package scikit-learn: pip install"):
        check_data(make(tmp_path, "voc_svm").run)
    write_tiny_davis(data / "DAVIS")
    run = make(tmp_path, pretrained="no.pth.tar").run
    (line,) = preflight([run], Settings(tmp_path / "out", "native"))
    assert line.startswith("no checkpoint at no.pth.tar")
