"""One line for each problem, whatever stands in the file."""

import pytest

from moco_det.common import errors
from moco_det.datasets.problems import DatasetError, Problems, SkippedProblems, one_line, shown


def test_messages_are_one_line_of_printable_characters():
    assert one_line("a\n b\tc\x1b[31m\ud800") == "a b c\\x1b[31m\\ud800"
    assert len(one_line("x" * 10**6)) <= 400


def test_values_are_shown_in_short():
    assert shown("x" * 1000) == f"'{'x' * 59}..."
    assert shown(list(range(1000))) == "a list of 1,000 entries"
    assert shown(10**5000) == "a int"


def test_the_first_is_raised_and_flaws_are_passed_over():
    problems = Problems("a.json")
    problems.flaw("area", "is flat")
    with pytest.raises(DatasetError, match=r"^a\.json: is broken$") as error:
        problems.refuse("mask", "is broken")
    assert error.value.check == "mask"


def test_a_long_path_leaves_room_for_what_is_wrong():
    problem = f"annotation 7: {'x' * 120}: close the polygon"
    with pytest.raises(DatasetError) as error:
        Problems(f"/data/{'folder/' * 60}a.json").refuse("mask", problem)
    message = str(error.value)
    assert len(f"error: {message}") <= errors.LONGEST
    assert message.startswith("/data/folder/")
    assert message.endswith(f"a.json: {problem}")


def test_what_is_skipped_is_printed_up_to_a_limit(capsys):
    problems = SkippedProblems()
    for number in range(1000):
        problems.refuse("mask", f"annotation {number}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "skipped: annotation 0"
    assert len(lines) == 21
    assert problems.count == 1000
