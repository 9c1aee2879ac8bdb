"""Mistakes in flags: one line, exit code 2, the nearest flag."""

import pytest

from moco_det.common.errors import CommandParser, at_least, command_parser, nearest


def parser(**options) -> CommandParser:
    made = CommandParser(**options)
    made.add_argument("data", nargs="?")
    made.add_argument("--moco-k", type=at_least(1, 100))
    made.add_argument("--num-gpus", type=int)
    return made


def said(capsys, made: CommandParser, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        made.parse_args(arguments)
    assert ended.value.code == 2
    out, errors = capsys.readouterr()
    assert out == ""
    assert len(errors.splitlines()) == 1
    return errors


@pytest.mark.parametrize("written", ["--moco-kk=3", "--moco-kk"])
def test_a_mistyped_flag_gets_the_nearest_one(capsys, written):
    errors = said(capsys, parser(), "DATA", written)
    assert errors.startswith("error: unrecognized arguments: --moco-kk; did you mean --moco-k?")


def test_it_is_told_before_what_follows_from_it(capsys):
    """The value of the unknown flag would be taken for DATA, and DATA for one too many."""
    errors = said(capsys, parser(), "--num-gpuss", "8", "DATA")
    assert errors.startswith("error: unrecognized arguments: --num-gpuss; did you mean --num-gpus?")


def test_a_flag_that_resembles_none(capsys):
    assert "unrecognized arguments: --colour (" in said(capsys, parser(), "--colour")


def test_a_flag_of_a_command_within_a_command(capsys):
    made = CommandParser()
    made.add_subparsers().add_parser("step").add_argument("--rounds")
    assert made.parse_args(["step", "--rounds", "3"]).rounds == "3"
    assert "--rond; did you mean --rounds?" in said(capsys, made, "step", "--rond", "3")


def test_abbreviations_are_known_where_they_are_allowed(capsys):
    assert parser().parse_args(["--num", "3"]).num_gpus == 3
    assert "unrecognized arguments: --num" in said(capsys, parser(allow_abbrev=False), "--num", "3")


def test_what_follows_two_dashes_is_no_flag():
    assert parser().parse_args(["--", "--data"]).data == "--data"


def test_the_least_number(capsys):
    assert parser().parse_args(["--moco-k", "1"]).moco_k == 1
    assert "argument --moco-k: must be at least 1, not 0" in said(capsys, parser(), "--moco-k", "0")
    assert parser().parse_args(["--moco-k", "100"]).moco_k == 100
    for many in ("101", str(2**63)):
        assert f"argument --moco-k: must be at most 100, not {many}" in said(
            capsys, parser(), "--moco-k", many
        )
    assert "invalid int value: 'x'" in said(capsys, parser(), "--moco-k", "x")


def test_nearest():
    assert nearest("moco-kk", {"moco-k", "mlp"}) == "; did you mean moco-k?"
    assert nearest("zzz", {"moco-k"}) == ""


def test_help_keeps_the_layout_and_names_the_exit_codes():
    text = command_parser("One line.\n\n    an example", "0 done; 1 an error").format_help()
    assert "One line.\n\n    an example\n" in text
    assert text.endswith("exit codes: 0 done; 1 an error\n")
    assert "exit codes" not in command_parser("One line.").format_help()
