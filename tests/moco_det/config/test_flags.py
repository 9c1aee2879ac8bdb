"""A command's words for a config and its keys."""

import argparse

import pytest

from moco_det.config.flags import add_config_arguments, add_config_file, add_config_option


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    parser.add_argument("--resume", action="store_true")
    return parser


def test_pairs_follow_the_flags(parser):
    args = parser.parse_args(["--resume", "--config-file", "a.yaml", "SEED", "-1", "VERSION", "2"])
    assert (args.config_file, args.resume) == ("a.yaml", True)
    assert args.opts == ["SEED", "-1", "VERSION", "2"]
    assert parser.parse_args(["--config-file", "a.yaml"]).opts == []


@pytest.mark.parametrize("pairs", [["SEED", "1", "--resume"], ["OUTPUT_DIR", "--resume", "x"]])
def test_a_flag_after_the_pairs_is_named(parser, pairs, capsys):
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--config-file", "a.yaml", *pairs])
    assert ended.value.code == 2
    words = "--resume comes after KEY VALUE pairs: put all flags before them"
    assert words in capsys.readouterr().err


def test_the_config_file_is_required(parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(["SEED", "1"])
    assert "--config-file" in capsys.readouterr().err


def test_pairs_as_a_flag_may_be_followed_by_others():
    parser = argparse.ArgumentParser()
    add_config_file(parser)
    add_config_option(parser)
    parser.add_argument("--limit", type=int)
    args = parser.parse_args(["--opts", "SEED", "1", "--limit", "3"])
    assert (args.config_file, args.opts, args.limit) == (None, ["SEED", "1"], 3)
    assert parser.parse_args([]).opts == []
