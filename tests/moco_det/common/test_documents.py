"""YAML and JSON of any kind: read as they are meant, or refused in one short line."""

import json
import math
import os
import time

import pytest

from moco_det.common.documents import (
    mend_last_line,
    read_json,
    read_json_lines,
    read_mapping,
    read_yaml,
    shown,
)
from moco_det.common.errors import LONGEST, UserError, one_line


@pytest.fixture
def write(tmp_path):
    """Function: text or bytes -> path of a file of it."""

    def write_file(content):
        path = tmp_path / "a.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def refusal(read, path, *more):
    with pytest.raises(UserError) as refused:
        read(path, *more)
    (line,) = str(refused.value).splitlines()
    assert len(line) <= 300
    assert path.name in line
    return line


# -- YAML -----------------------------------------------------------------------------------------


def test_yaml_is_read_as_safe_load_reads_it(write):
    path = write(
        b"\xef\xbb\xbfa: &a {b: 1e-4, c: 1_000, d: 0x10, e: '2020-01-01', f: yes, g: .inf}\n"
        b"h: {<<: *a, b: null}\ni: [*a, '(1, 2)', 1.5]\n7: x\n"
    )
    entry = {"b": "1e-4", "c": 1000, "d": 16, "e": "2020-01-01", "f": True, "g": math.inf}
    assert read_yaml(path, "config") == {
        "a": entry, "h": entry | {"b": None}, "i": [entry, "(1, 2)", 1.5], 7: "x",
    }  # fmt: skip
    assert read_yaml(write(""), "config") is None
    assert read_mapping(write("# nothing\n"), "--recipe") == {}


BOMB = "a0: &a0 [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
CHAIN = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 200))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"line \d+: a\d.*: makes more than 100,000 values"),
        (CHAIN, r"line \d+: a\d+.*: is nested more than 50 levels deep"),
        ("&x\nlr: *x\n", "line 2: lr: contains itself"),
        ("lr: &x [*x]\n", "line 1: lr.0: contains itself"),
        ("&x\n<<: *x\n", "line 2: <<: contains itself"),
        ("a: 1\nlr: 2020-99-99\n", "line 2: lr: '2020-99-99' is a date to YAML: write it in quot"),
        ("lr: 2020-01-01\n", "is a date"),
        ("lr: 1:30\n", "lr: '1:30' is a number of base 60 to YAML: write it in quotes"),
        (f"lr: {'9' * 5000}\n", "lr: has 5,000 digits"),
        ("lr: 9223372036854775808\n", "lr: '9223372036854775808' has more than 64 bits"),
        (f"lr: {'[' * 20000}\n", "is nested more than 50 levels deep"),
        ("lr: a\0b\n", "not valid YAML: .*#x0000"),
        ('lr: "a\\0b"\n', "line 1: lr: holds a NUL character"),
        ("lr: !!binary 'eA=='\n", "lr: !!binary is not supported"),
        ("lr: !x 1\n", "lr: !x is not supported: write the value itself"),
        ("lr: !!python/object/apply:os.system ['true']\n", "python/object/apply:os.system is not"),
        ("a: 1\n---\na: 2\n", "is not valid YAML: line 2: but found another document"),
        ("? [a, b]\n: 1\n", "is not valid YAML: line 1: found unhashable key"),
        ("a: [1\nb: 2\n", "is not valid YAML: line 2"),
        ("a: 1".encode("utf-16"), "is not valid YAML: 'utf-8' codec"),
        ("#" * (1 << 20), "has 1,048,576 bytes; at most 262,144 are read"),
    ],
)
def test_yaml_that_is_no_config(write, text, message):
    path, begun = write(text), time.process_time()
    assert_matches(refusal(read_yaml, path, "config"), message)
    assert time.process_time() - begun < 2


def assert_matches(line, message):
    with pytest.raises(UserError, match=message):
        raise UserError(line)


def test_an_integer_may_have_64_bits(write):
    assert read_yaml(write("a: -9223372036854775807\n"), "config") == {"a": -(2**63) + 1}


@pytest.mark.parametrize("text", ["[1]", "x"])
def test_a_mapping_is_asked_for(write, text):
    assert "must map keys to values" in refusal(read_mapping, write(text), "--recipe")


# -- files that are none --------------------------------------------------------------------------


@pytest.mark.parametrize("read", [read_yaml, read_json, read_json_lines])
def test_what_is_no_regular_file_is_not_waited_for(read, tmp_path):
    fifo, folder, loop = (tmp_path / name for name in ("fifo", "folder", "loop"))
    os.mkfifo(fifo)
    folder.mkdir()
    loop.symlink_to(loop)
    assert "no regular file" in refusal(read, fifo, "config")
    assert "no regular file" in refusal(read, folder, "config")
    assert "Too many levels of symbolic links" in refusal(read, loop, "config")
    assert "No such file" in refusal(read, tmp_path / "absent", "config")
    with pytest.raises(UserError, match="cannot read config .*null"):
        read("a\0b", "config")
    with pytest.raises(UserError, match="cannot read config /dev/zero: it is no regular file"):
        read("/dev/zero", "config")
    with pytest.raises(UserError, match="File name too long") as refused:
        read("x" * 5000, "config")
    assert len(str(refused.value)) < 300


# -- JSON -----------------------------------------------------------------------------------------


def test_json_is_read(write):
    content = {"a": [1, 2.5, None, True, "\u00fc"], "b": {"c": -(2**63) + 1}}
    assert read_json(write(json.dumps(content)), "the record") == content
    assert read_json(write(b"\xef\xbb\xbf[1]"), "the record") == [1]
    (number,) = read_json(write("[NaN]"), "the record", finite=False)
    assert math.isnan(number)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"is not JSON \(Expecting value"),
        ("{", "is not JSON"),
        (bytes(64), "is not JSON"),
        (b"\xff{}", r"is not JSON \('utf-8' codec"),
        ("[NaN]", r"is not JSON \('NaN' is no finite number"),
        ("[1e999]", "'1e999' is no finite number"),
        ("[" + "9" * 5000 + "]", r"the number '9.*' has more than 64 bits"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * 60 + "]" * 60, "nested more than 50 levels deep"),
    ],
)
def test_what_is_no_json(write, text, message):
    assert_matches(refusal(read_json, write(text), "the record"), message)


def test_json_has_a_size(write):
    assert "at most 3 are read" in refusal(read_json, write("[1, 2]"), "the record", 3)


def test_lines_are_objects_and_half_a_line_is_none(write):
    whole = '{"a": 1}\n{"a": 2}\n'
    for end in ("", '{"a": 3', '{"a": {"b": 3}', "3", "\0" * 4096):
        assert read_json_lines(write(whole + end), "metrics") == [{"a": 1}, {"a": 2}]
    assert read_json_lines(write('{"a": 1}'), "metrics") == [{"a": 1}]  # whole, without its end
    assert read_json_lines(write(""), "metrics") == []
    assert read_json_lines(write('{"a": 1'), "metrics") == []


@pytest.mark.parametrize("line", ["", "{", "[1]", "3", "\0\0", '{"a": NaN}'])
def test_another_line_that_is_none_is_named(write, line):
    path = write(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
    assert f"{path}, line 2 is no JSON of an object (" in refusal(read_json_lines, path, "metrics")


def test_the_last_line_is_mended_before_the_next_is_appended(write):
    path = write('{"a": 1}\n{"a"')
    mend_last_line(path)
    assert path.read_text() == '{"a": 1}\n'
    mend_last_line(path)
    assert path.read_text() == '{"a": 1}\n'
    path.write_text('{"a": 1}')
    mend_last_line(path)
    assert path.read_text() == '{"a": 1}\n'
    path.write_text("half")
    mend_last_line(path)
    assert path.read_text() == ""
    mend_last_line(path.with_name("absent"))


# -- words of a message ---------------------------------------------------------------------------


def test_a_message_is_one_printable_line():
    assert one_line("a\n  b\tc\0") == "a b c\\x00"
    assert len(one_line("x" * 5000)) <= LONGEST
    assert shown(10**5000) == "a int"
    assert shown("a" * 500).startswith("'aaa") and len(shown("a" * 500)) <= 60
