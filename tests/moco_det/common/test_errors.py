"""What a user sees of errors, and how a command ends."""

import sys

import pytest

from moco_det.common.errors import UserError, command_parser, exit_cleanly, import_optional


def test_a_user_error_is_one_line_and_exit_code_1(capsys):
    with pytest.raises(SystemExit) as ended, exit_cleanly():
        raise UserError("no file at a.json: name another")
    assert ended.value.code == 1
    assert capsys.readouterr() == ("", "error: no file at a.json: name another\n")


def test_ctrl_c_is_exit_code_130_without_a_word(capsys):
    with pytest.raises(SystemExit) as ended, exit_cleanly():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr() == ("", "")


def test_other_errors_and_exit_codes_pass_through():
    with pytest.raises(ZeroDivisionError), exit_cleanly():
        print(1 / 0)
    with pytest.raises(SystemExit) as ended, exit_cleanly():
        sys.exit(75)
    assert ended.value.code == 75


def test_a_user_error_can_be_caught_by_a_library():
    """It is no SystemExit, which `except Exception` would let through."""
    assert issubclass(UserError, Exception)


def test_an_optional_package_that_is_there():
    assert import_optional("json.decoder", "a test", "json") is sys.modules["json.decoder"]


def test_an_optional_package_that_is_absent():
    message = (
        r"^a test needs the package no-such: pip install no-such \(No module named 'no_such'\)$"
    )
    with pytest.raises(UserError, match=message) as raised:
        import_optional("no_such", "a test", "no-such")
    assert isinstance(raised.value.__cause__, ImportError)


def test_help_keeps_the_layout_and_names_the_exit_codes():
    text = command_parser("One line.\n\n    an example", "0 done; 1 an error").format_help()
    assert "One line.\n\n    an example\n" in text
    assert text.endswith("exit codes: 0 done; 1 an error\n")
    assert "exit codes" not in command_parser("One line.").format_help()
