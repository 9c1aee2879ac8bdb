"""Ablations as data: what a file becomes, what is refused, and the files of the repository; trials:
done once, continued, reported, tabulated, and those of the first version."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from paths import CONFIGS, REPOSITORY

from moco_det.benchmark.jobs.ablation import (
    Trial,
    Variant,
    listing,
    plan_trials,
    read_ablation,
    run_trials,
)
from moco_det.benchmark.jobs.job import unfinished
from moco_det.benchmark.report.tables import ablation_table, means_table
from moco_det.common.errors import UserError
from pretrain.flags.evaluation import parse_knn, parse_linear
from pretrain.flags.pretraining import parse_pretraining

FILES = sorted((CONFIGS / "ablations").glob("*.yaml"))
DATA = Path("DATA")


def ablation(folder, **content):
    path = folder / "ablation.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return read_ablation(path)


def chains(path, seed=0):
    """One trial of each row."""
    content = read_ablation(path)
    return [Trial(row, seed, Path("OUT"), content, path, DATA) for row in content.rows]


def test_a_grid_is_a_row_for_each_combination(tmp_path):
    content = ablation(
        tmp_path,
        base={"arch": "resnet18", "schedule": [3, 4]},
        grid={"moco_m": [0, 0.9], "shuffle_bn": [True, False]},
        seeds=5,
    )
    base = ["--arch", "resnet18", "--schedule", "3", "4"]
    assert content.rows == [
        Variant("--moco-m 0 --shuffle-bn", [*base, "--moco-m", "0", "--shuffle-bn"]),
        Variant("--moco-m 0 --no-shuffle-bn", [*base, "--moco-m", "0", "--no-shuffle-bn"]),
        Variant("--moco-m 0.9 --shuffle-bn", [*base, "--moco-m", "0.9", "--shuffle-bn"]),
        Variant("--moco-m 0.9 --no-shuffle-bn", [*base, "--moco-m", "0.9", "--no-shuffle-bn"]),
    ]
    assert content.seeds == 5


def test_rows_are_what_they_say(tmp_path):
    content = ablation(tmp_path, rows=[{}, {"mlp": True}], untrained=True)
    assert [row.name for row in content.rows] == ["untrained", "(base)", "--mlp"]
    assert [row.trained for row in content.rows] == [False, True, True]
    assert content.seeds == 3


def test_a_trial_is_three_commands_with_what_they_share(tmp_path):
    (tmp_path / "recipe.yaml").write_text("arch: resnet34\nimage_size: 48\nsmall_stem: true\n")
    path = tmp_path / "sub" / "a.yaml"
    path.parent.mkdir()
    path.write_text(
        "recipe: ../recipe.yaml\nbase: {image_size: 40}\nrows: [{moco_k: 64}]\n"
        "knn: {neighbours: 5}\nlinear: {lr: 0.1, cache_features: true}\n"
    )
    content = read_ablation(path)
    chain = Trial(content.rows[0], 7, tmp_path / "out", content, path, DATA, workers=2)
    commands = chain.commands()
    assert [Path(c[0]).name for c in commands.values()] == ["main.py", "knn.py", "linear.py"]
    assert all(Path(command[0]).is_file() for command in commands.values())
    pretrain = parse_pretraining(commands["pretrain"][1:])
    assert (pretrain.arch, pretrain.image_size, pretrain.moco_k) == ("resnet34", 40, 64)
    assert (pretrain.seed, pretrain.resume, pretrain.workers) == (7, "auto", 2)
    checkpoint = str(tmp_path / "out" / "checkpoint_last.pth.tar")
    for args in (parse_knn(commands["knn"][1:]), parse_linear(commands["linear"][1:])):
        assert (args.pretrained, args.arch, args.image_size) == (checkpoint, "resnet34", 40)
        assert args.small_stem
        assert (args.seed, args.workers, args.data) == (7, 2, "DATA")
    assert parse_knn(commands["knn"][1:]).k == 5
    probe = parse_linear(commands["linear"][1:])
    assert (probe.lr, probe.cache_features, probe.resume) == (0.1, True, "auto")
    assert parse_linear(commands["linear"][1:]).output == str(tmp_path / "out" / "linear")


def test_an_untrained_encoder_is_evaluated_only(tmp_path):
    content = ablation(tmp_path, rows=[{}], untrained=True)
    chain = Trial(content.rows[0], 1, tmp_path, content, tmp_path, DATA)
    assert list(chain.commands()) == ["knn", "linear"]
    assert parse_knn(chain.commands()["knn"][1:]).pretrained == "random"


def test_measures_are_read_from_what_the_commands_leave(tmp_path):
    content = ablation(tmp_path, rows=[{}])
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 5.0, "acc1": 1.0}\n{"step": 9, "loss": 4.0, "acc1": 30.0}\n'
        '{"step": 9, "knn_top1": 12.0}\n'
    )
    (tmp_path / "knn.json").write_text('{"knn_top1": 34.5}')
    (tmp_path / "linear").mkdir()
    (tmp_path / "linear" / "metrics.jsonl").write_text(
        '{"step": 1, "val_acc1": 50.0}\n{"step": 2, "val_acc1": 40.0}\n{"step": 2, "loss": 1.0}\n'
    )
    chain = Trial(content.rows[0], 0, tmp_path, content, tmp_path, DATA)
    assert chain.measures() == {
        "pretext loss": 4.0,
        "pretext top-1": 30.0,
        "kNN top-1": 34.5,
        "linear top-1": 40.0,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rows": [{}], "seed": 3}, "unknown key 'seed' in .*; did you mean seeds"),
        ({"rows": [{"moco_kk": 3}]}, "unknown key 'moco_kk' in .*; did you mean moco-k"),
        ({"rows": [{}], "base": {"epoch": 3}}, "'epoch' in 'base' of .*; did you mean epochs"),
        (
            {"rows": [{}], "knn": {"neighbors": 3}},
            "'neighbors' in 'knn' of .*; did you mean neighbours",
        ),
        ({"rows": [{}], "linear": {"lrr": 3}}, "unknown key 'lrr' in 'linear' of .*mean lr"),
        ({"rows": [{}], "grid": {"mlp": [True]}}, "needs one of 'grid' .* and 'rows'"),
        ({"base": {"mlp": True}}, "needs one of 'grid' .* and 'rows'"),
        ({"grid": {"moco_m": 0.9}}, "'moco_m' in 'grid' of .* must be a list"),
        ({"rows": {"mlp": True}}, "'rows' of .* must be a list"),
        ({"rows": [{}, {}]}, r"has two rows '\(base\)'"),
        ({"rows": [{}], "seeds": 0}, "'seeds' in .* must be a number of at least 1, not 0"),
        ({"rows": [{}], "base": ["mlp"]}, "'base' of .* must map flags to values"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        ablation(tmp_path, **content)


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([{"moco_m": 1}], {}, r"row '--moco-m 1' of .*: --moco-m must be in \[0, 1\)"),
        ([{"lr": "fast"}], {}, "row '--lr fast' of .*: argument --lr.*invalid float"),
        ([{}], {"knn": {"neighbours": 0}}, "row '.base.' of .*: --neighbours and --image-size"),
        ([{}], {"linear": {"epochs": 0}}, "row '.base.' of .*: --epochs must be at least 1"),
    ],
)
def test_a_flag_that_its_command_refuses_is_named_with_the_row(tmp_path, rows, more, message):
    content = ablation(tmp_path, rows=rows, **more)
    chain = Trial(content.rows[0], 0, tmp_path, content, tmp_path / "ablation.yaml", DATA)
    with pytest.raises(UserError, match=message):
        chain.commands()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot read ablation .*absent.yaml: No such file"):
        read_ablation(tmp_path / "absent.yaml")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_commands_accept_the_flags_of_the_repository_s_files(path):
    for chain in chains(path):
        assert chain.commands()
        assert json.loads(json.dumps(chain.settings())) == chain.settings()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_headers_say_how_long_it_takes_and_what_to_expect(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for field in ("Command:", "Time:", "Expected:"):
        assert any(line.startswith(f"# {field}") for line in header), field
    command = next(line for line in header if line.startswith("# Command:"))
    assert f"tools/ablate.py configs/ablations/{path.name} --data" in command


def varied(name: str, flag: str) -> list:
    """The values of `flag` over the trained rows of an ablation of the repository."""
    path = CONFIGS / "ablations" / name
    commands = [chain.commands()["pretrain"] for chain in chains(path) if chain.variant.trained]
    return [getattr(parse_pretraining(command[1:]), flag) for command in commands]


def test_the_ablations_vary_what_the_paper_varies():
    """Section 4.1, appendix A.9; MoCo v2's Table 1 and its search for tau."""
    for name in ("mechanisms.yaml", "imagenet_mechanisms.yaml"):
        pairs = set(zip(varied(name, "mechanism"), varied(name, "shuffle_bn"), strict=True))
        assert pairs >= {
            ("moco", True), ("moco", False), ("end-to-end", True), ("end-to-end", False),
            ("memory-bank", True),
        }  # fmt: skip
    assert varied("momentum.yaml", "moco_m") == [0, 0.9, 0.99, 0.999]
    assert varied("imagenet_momentum.yaml", "moco_m") == [0, 0.9, 0.99, 0.999, 0.9999]
    assert set(varied("imagenet_momentum.yaml", "moco_k")) == {4096}
    assert varied("imagenet_temperature.yaml", "moco_t") == [0.07, 0.1, 0.2, 0.3, 0.4, 0.5] * 2
    assert varied("imagenet_temperature.yaml", "mlp") == [False] * 6 + [True] * 6
    switches = [varied("imagenet_v2.yaml", flag) for flag in ("mlp", "aug_plus", "cos")]
    assert list(zip(*switches, strict=True)) == [
        (False, False, False), (True, False, False), (False, True, False), (True, True, False),
        (True, True, True), (True, True, True),
    ]  # fmt: skip
    assert varied("imagenet_v2.yaml", "epochs") == [200] * 5 + [800]


# -- trials whose commands are a line of Python each ----------------------------------------------


class FakeTrial(Trial):
    """Its command runs `source`, with `folder` at hand; its measure is in value.json."""

    def commands(self):
        head = f"import pathlib, sys, time; folder = pathlib.Path({str(self.folder)!r})\n"
        return {"write": ["-S", "-c", head + self.source]}

    def settings(self):
        return self.data

    def measures(self):
        return {"top-1": json.loads((self.folder / "value.json").read_text())}


def trial(folder, row, seed, code, settings=None) -> Trial:
    path, settings = folder / f"{row}{seed}", settings or {"seed": seed}
    return FakeTrial(Variant(row, []), seed, path, ablation=None, source=code, data=settings)


def states(trials):
    return [trial.job.folder.state() for trial in trials]


def value(number: float) -> str:
    """A command that counts its runs in the file `runs` and leaves `number` to be read."""
    return (
        f"(folder / 'runs').open('a').write('x')\n(folder / 'value.json').write_text('{number}')\n"
    )


def test_a_finished_trial_is_not_run_again(tmp_path, capfd):
    trials = [trial(tmp_path, "a", 0, value(50)), trial(tmp_path, "a", 1, value(54))]
    assert states(trials) == ["to do", "to do"]
    assert run_trials(trials) == {}
    assert states(trials) == ["finished", "finished"]
    first = [t.result() for t in trials]
    assert run_trials(trials) == {}
    assert [t.result() for t in trials] == first
    assert (tmp_path / "a0/runs").read_text() == "x"
    assert "2 of 2 trials are done" in capfd.readouterr().out


def test_a_failed_trial_is_reported_and_the_others_go_on(tmp_path, capfd):
    failing = "import os\nsys.exit(0 if os.path.exists(folder / 'mended') else 'error: no luck')\n"
    trials = [
        trial(tmp_path, "a", 0, failing + value(1)),
        trial(tmp_path, "b", 0, value(2)),
    ]
    failures = run_trials(trials)
    assert list(failures) == ["a, seed 0"]
    assert failures["a, seed 0"].startswith("error: no luck (step 'write' failed with exit code 1")
    assert "== failed: a, seed 0" in capfd.readouterr().out
    assert states(trials) == ["failed", "finished"]
    table = ablation_table(trials, failures)
    counts = [row.counts[0] for row in table.rows]
    assert [(count.failed, count.missing, count.finished) for count in counts] == [
        (1, 0, 0),
        (0, 0, 1),
    ]
    assert "| a        | 0, 1 failed |         |" in means_table(table)
    (tmp_path / "a0/value.json").write_text("3")
    (tmp_path / "a0/mended").touch()
    assert run_trials(trials) == {}  # begun again, and no longer failing
    assert trials[0].result()["measures"] == {"top-1": 3}


def test_a_folder_of_other_settings_is_refused(tmp_path):
    run_trials([trial(tmp_path, "a", 0, value(1), {"lr": 0.1})])
    again = trial(tmp_path, "a", 0, value(1), {"lr": 0.2})
    with pytest.raises(UserError, match="a0 holds a trial with other settings.*another --output"):
        run_trials([again])


TWO_TRIALS = """
import signal, sys
from pathlib import Path
from test_ablation import trial, value
from moco_det.benchmark.jobs.ablation import run_trials

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
folder = Path(sys.argv[1])
wait = "(folder / 'begun').touch()\\ntime.sleep(0 if (folder / 'go').exists() else 60)\\n"
run_trials([trial(folder, "a", 0, value(1)), trial(folder, "a", 1, wait + value(2))])
"""


def test_a_killed_chain_goes_on(tmp_path):
    """The process is stopped within its second trial; the first is then not run again."""
    command = [sys.executable, "-c", TWO_TRIALS, str(tmp_path)]
    here = {"PYTHONPATH": ":".join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen(command, env=here, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "a1/begun").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert json.loads((tmp_path / "a1/run.json").read_text())["state"] == "interrupted"
    (tmp_path / "a1/go").touch()
    subprocess.run(command, env=here, stdout=subprocess.DEVNULL, check=True, timeout=60)
    assert (tmp_path / "a0/runs").read_text() == "x"
    assert json.loads((tmp_path / "a1/run.json").read_text())["measures"] == {"top-1": 2}


def recorded(tmp_path) -> Path:
    """The ablation that the first version has left; see record_folders.py."""
    folder, data = tmp_path / "ablation", tmp_path / "data"
    shutil.copytree(REPOSITORY / "tests/golden/previous_version/ablation", folder)
    for path in folder.rglob("trial.json"):
        path.write_text(path.read_text().replace("{data}", str(data)))
    for split in ("train", "val"):
        (data / split).mkdir(parents=True)
    return folder


def test_trials_of_the_first_version_are_read(tmp_path):
    """One is finished and keeps its numbers, one was stopped and is begun again."""
    folder = recorded(tmp_path)
    file = folder / "tiny.yaml"
    fields = {"source": file, "data": tmp_path / "data"}
    trials = plan_trials(read_ablation(file), None, folder, **fields, workers=4)
    assert states(trials) == ["finished", "interrupted"]
    assert unfinished([trial.job for trial in trials]) == [trials[1].job]
    result = json.loads((folder / "moco_m_0.5/seed0/result.json").read_text())
    assert trials[0].result() == result and set(result["measures"]) == {
        "pretext loss", "pretext top-1", "kNN top-1", "linear top-1",
    }  # fmt: skip
    assert trials[1].result() is None
    file.write_text(file.read_text().replace("moco_k: 16", "moco_k: 32"))
    with pytest.raises(UserError, match="seed0 holds a trial with other settings .*'moco_k': 16"):
        plan_trials(read_ablation(file), None, folder, **fields)


def test_a_trial_that_the_first_version_has_begun_goes_on(tmp_path):
    """The new record takes the place of the old one, which stays as it is."""
    one = trial(tmp_path, "a", 0, value(7))
    (tmp_path / "a0").mkdir()
    (tmp_path / "a0/trial.json").write_text('{"settings": {"seed": 0}, "commands": []}')
    assert states([one]) == ["interrupted"]
    assert run_trials([one]) == {}
    assert one.result()["measures"] == {"top-1": 7}
    (tmp_path / "a0/run.json").unlink()
    assert states([one]) == ["interrupted"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rows": [{}], "seeds": 2**62}, "'seeds' in .* must be a number .*at most 1000"),
        ({"rows": [{}], "seeds": True}, "'seeds' in .* must be a number of at least 1, not True"),
        ({"grid": {f"moco-{n}": list(range(99)) for n in "dkmt"}}, "makes 96,059,601 rows"),
        ({"rows": [{"lr": "7" * 5000}]}, r"lr in .*: no flag takes that"),
        ({"rows": [{"lr": {"a": 1}}]}, r"lr in .* is \{'a': 1\}: no flag takes that"),
    ],
)
def test_absurd_counts_are_refused_at_once(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as refused:
        ablation(tmp_path, **content)
    assert len(str(refused.value)) < 300


def test_a_damaged_trial_is_listed_and_the_others_are_told_of(tmp_path):
    trials = [trial(tmp_path, "a", 0, value(50)), trial(tmp_path, "b", 0, value(54))]
    assert run_trials(trials) == {}
    (tmp_path / "a0/run.json").write_bytes(bytes(30))
    lines = listing(trials).splitlines()
    assert lines[0] == "unreadable  a, seed 0" and "run.json: it is not JSON" in lines[1]
    assert "done   b, seed 0" in lines
    table = means_table(ablation_table(trials, {}))
    assert "54.0" in table and "50.0" not in table
    with pytest.raises(UserError, match="run.json: it is not JSON .*: remove that folder"):
        run_trials(trials)  # none is begun
