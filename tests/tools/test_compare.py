"""tools/compare.py: runs of one name become one row."""

import json

import pytest

from tools.compare import main


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
