"""tools/compare.py: runs of one name become one row."""

import json

import pytest
from commands import load_command

main = load_command("tools/compare.py").main


def finished_run(folder, ap50):
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"iteration": 9, "bbox/AP50": ap50}) + "\n")
    return folder


def test_trials_are_collected_by_name(tmp_path, capsys):
    numbers = {"a=x": 50.0, "b": 40.0, "c": 54.0}  # what follows the first = is the folder's name
    one, other, two = (finished_run(tmp_path / name, ap50) for name, ap50 in numbers.items())
    main([f"moco={one}", f"random={other}", f"moco={two}"])
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert rows == [["moco", "2", "52.0 ± 2.8"], ["random", "1", "40.0"]]


@pytest.mark.parametrize("run", ["output/voc", "output/voc:a"])
def test_a_run_without_a_name_is_refused(run, capsys):
    with pytest.raises(SystemExit):
        main([run])
    assert capsys.readouterr().err == f"error: '{run}' is not of the form NAME=DIR\n"


DAMAGES = [b"", bytes(50), b'{"iteration": 9, "bb', b"\xff\n", b'{"iteration": 1, "lr": []}\n']


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_damaged_run_is_said_and_the_others_are_printed(tmp_path, damage, capsys):
    one, two, bad = (finished_run(tmp_path / name, 50.0) for name in ("one", "two", "bad"))
    (bad / "metrics.json").write_bytes(damage)
    main([f"moco={one}", f"moco={bad}", f"random={two}", f"none={tmp_path / 'no'}"])
    out = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out[2:5]]
    assert rows == [
        ["moco", "1, 1 missing", "50.0"], ["random", "1", "50.0"], ["none", "0, 1 missing", ""],
    ]  # fmt: skip
    assert out[5].startswith("moco: unreadable: ") and str(bad) in out[5]
    assert out[6].startswith("none: unreadable: ") and len(out) == 7


def test_nothing_but_damaged_runs_is_an_error(tmp_path, capsys):
    bad = finished_run(tmp_path / "bad", 50.0)
    (bad / "metrics.json").write_bytes(bytes(9))
    with pytest.raises(SystemExit) as end:
        main([f"moco={bad}"])
    assert end.value.code == 1
    assert capsys.readouterr().err == (
        f"error: {bad}/metrics.json holds no evaluation: the run is not finished\n"
    )
