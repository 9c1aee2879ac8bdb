"""Tar shards: what is read, in which order, and what a killed run loses or repeats: nothing."""

import contextlib
import io
import itertools
import json
import re
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from commands import Command, run
from PIL import Image
from pretraining_runs import checkpoint, values
from same_bits import assert_same_bits

pytest.importorskip("webdataset")
import webdataset
from recorded_run import SIZE, numbered_image, write_shards

from moco_det.common.errors import LONGEST, UserError
from moco_det.common.images import check_image
from pretrain.data import is_shards
from pretrain.data.augmentations import MoCoAugmentation
from pretrain.data.images import make_views
from pretrain.data.multi_crop import MultiCrop
from pretrain.data.shards import (
    BrokenShard,
    Position,
    ShardSource,
    Stream,
    find_shards,
)
from pretrain.flags.pretraining import parse_pretraining
from pretrain.main import pretrain
from pretrain.run import build_source

CPU = torch.device("cpu")
COUNTS = [9, 12, 10, 11, 8, 10, 13]  # samples of each shard
SAMPLES = sum(COUNTS)
FLAGS = [
    "-a", "resnet18w0.25x", "--image-size", str(SIZE), "-b", "8", "--moco-k", "16",
    "--moco-dim", "8", "--lr", "1e-4", "--seed", "7", "-j", "0", "-p", "1", "--shuffle-buffer", "6",
]  # fmt: skip


@pytest.fixture(scope="module")
def pattern(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), COUNTS)


def stream(
    urls,
    number=0,
    streams=1,
    position=Position(),  # noqa: B008
    view=MoCoAugmentation(8, True),  # noqa: B008
    buffer=6,
):
    return Stream(urls, streams, number, MultiCrop([view] * 2), 3, buffer, position)


def one_pass(urls, number=0, streams=1, epoch=0) -> list[int]:
    """The numbers of a stream's samples in pass `epoch`."""
    reader = stream(urls, number, streams, Position(epoch))
    samples = itertools.takewhile(lambda _: reader.position.epoch == epoch, reader.samples())
    return [int(sample["__key__"]) for sample in samples]


def source(pattern, *flags) -> ShardSource:
    return build_source(
        parse_pretraining([pattern, *FLAGS, "--iterations", "9", *flags]), CPU, seed=7
    )


@pytest.mark.parametrize(("shards", "streams"), [(7, 3), (8, 4), (5, 5), (9, 1)])
def test_each_pass_deals_every_shard_once_and_streams_keep_up(shards, streams):
    names = [str(i) for i in range(shards)]
    dealt = Counter()
    for epoch in range(6):
        shares = [stream(names, number, streams).share(epoch) for number in range(streams)]
        assert sorted(sum(shares, [])) == names
        dealt.update({number: len(share) for number, share in enumerate(shares)})
        assert max(dealt.values()) - min(dealt[n] for n in range(streams)) <= 1
    assert stream(names).share(0) != stream(names).share(1)


def test_a_pass_gives_every_sample_once_shuffled(pattern):
    urls = find_shards(pattern)
    first, second = ([one_pass(urls, number, 3, epoch) for number in range(3)] for epoch in (0, 1))
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(SAMPLES))
    assert first != second
    steps = np.diff(one_pass(urls[1:2]))  # one shard: only the buffer shuffles
    assert (steps != 1).any()


def test_views_are_those_of_the_folder_code(pattern):
    """Each stream of a run has draws of its own: seed, pass, sample of it, stream."""
    urls, expected = find_shards(pattern), MoCoAugmentation(16, True)
    for number in (0, 1):
        reader = stream(urls, number, 2, view=MoCoAugmentation(16, True))
        views, *_ = reader.next_views(reader.samples())
        assert len(views) == 2
        sample = next(stream(urls, number, 2).samples())
        image = cv2.imdecode(np.frombuffer(sample["png"], np.uint8), cv2.IMREAD_COLOR)
        rng = np.random.default_rng((3, 0, 1, number))
        for view in views:
            assert np.array_equal(view, expected(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), rng))


@pytest.mark.parametrize("where", ["cpu", "device"])
def test_small_crops_of_shards_are_those_of_the_folder_code(pattern, where):
    """All switches of the views at once, of a stream that goes on after a batch."""
    flags = ("--multi-crop", "3", "--small-size", "16", "--constrained", "1", "--strong-aug", "mix")
    flags += ("--max-iou", "0.5", "--aug-plus", "--samples-per-epoch", "16", "--augment-on", where)
    made = source(pattern, *flags)
    assert made.conditions == ("free_pairs", "free_crops")
    first, second = itertools.islice(made, 2)
    again = source(pattern, *flags)
    again.resume(made.state() | {"processes": [{"positions": [(0, 8)], "turn": 0}]}, Path("last"))
    assert_same_bits(list(next(iter(again))), list(second))
    stream = next(iter(made._streams().streams))
    stream.position = Position()
    samples = stream.samples()
    for number in range(8):
        sample = next(samples)
        encoded = check_image(sample["png"], "image")
        rng = np.random.default_rng((7, 0, number + 1, 0))
        views, free = make_views(encoded, stream.crops, rng)
        assert first.free_crops[number].tolist() == free
        for batch, view in zip(first.views, views, strict=True):
            if where == "device":
                assert np.array_equal(batch.look[number], view.look)
                batch, view = batch.pixels, view.pixels
            assert np.array_equal(batch[number], view)
    sizes = [getattr(view, "pixels", view).shape[1] for view in first.views]
    assert sizes == [SIZE, SIZE, 16, 16, 16]


@pytest.mark.parametrize("taken", [1, 7, 15])
def test_a_stream_continues_from_its_position_across_passes(pattern, taken):
    urls = find_shards(pattern)[:4]  # two of them make 20 to 23 samples a pass
    whole = stream(urls, 1, 2).batches(4)
    batches = list(itertools.islice(whole, 16))
    rest = stream(urls, 1, 2, batches[taken - 1].position).batches(4)
    for before, after in zip(batches[taken:], rest, strict=False):
        assert_same_bits(list(after), list(before))
    assert batches[-1].position.epoch >= 2


def test_an_unreadable_sample_is_passed_over_and_named(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(5):
            content = numbered_image(number)
            writer.write(
                {"__key__": f"{number:04d}", "png": content[:99] if number == 2 else content}
            )
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes())
    batch = next(stream([str(tmp_path / "a.tar")], buffer=1).batches(4))
    assert [view.shape for view in batch.loaded.views] == [(4, 8, 8, 3)] * 2
    assert batch.loaded.unreadable == [f"{tmp_path}/a.tar: 0002.png: truncated file"]
    assert batch.position == (0, 5)


def write_tar(path: Path, names: list[str]) -> None:
    """The images of those names, and what people's archives hold beside them."""
    hidden = ["._a.jpg", "a/._b.jpg", ".trash/c.jpg"]
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate([*names, *hidden, "notes.txt", "labels.json"]):
            content = numbered_image(number)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize(
    "name",
    [
        "IMG_2020.05.{:02d}.jpg",
        "{:02d}.left.jpg",
        "{0:02d}.jpg {0:02d}.png",  # of one name up to the last dot, too
        "v1.2/a.b/{:02d}.JPG",
        "./{:02d}.rf.fe2a.jpeg",
    ],
)
def test_every_image_is_a_sample_whatever_its_name(tmp_path, name):
    """webdataset's own samples take a name up to its first dot: one of 32 images was read."""
    images = [name.format(number).split(" ") for number in range(32)]
    names = sum(images, [])
    write_tar(tmp_path / "a.tar", names)
    reader = stream([str(tmp_path / "a.tar")], buffer=1)
    samples = itertools.takewhile(lambda _: reader.position.epoch == 0, reader.samples())
    contents = [sample[name] for sample in samples for name in sample if name[0] != "_"]
    assert Counter(contents) == Counter(numbered_image(number) for number in range(len(names)))


def test_the_command_sees_every_image_of_a_tar(tmp_path):
    write_tar(tmp_path / "a.tar", [f"IMG_2020.05.{number:02d}.jpg" for number in range(32)])
    flags = [*FLAGS, "--samples-per-epoch", "32", "--epochs", "1", "--output", tmp_path]
    done = run("pretrain/main.py", tmp_path / "a.tar", *flags)
    assert done.returncode == 0, done.stderr
    (process,) = checkpoint(tmp_path)["data"]["processes"]
    assert process["positions"] == [(0, 32)]  # of the first pass


def test_nothing_readable_ends_the_run(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(8):
            writer.write({"__key__": str(number), "jpg": b"no image"})
    argv = [str(tmp_path / "a.tar"), *FLAGS, "--iterations", "9", "--output", str(tmp_path)]
    with pytest.raises(UserError, match=r"images are unreadable.*a\.tar: \d\.jpg: not an image"):
        pretrain(parse_pretraining(argv), CPU)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda tar: tar[:14000], "unexpected end of data"),
        (lambda tar: b"<html>", "broken shard .*broken.tar: "),
        (lambda tar: b"", "empty file"),
    ],
    ids=["cut", "html", "empty"],
)
def test_a_broken_shard_is_named_with_the_last_key(pattern, tmp_path, content, message):
    broken = tmp_path / "broken.tar"
    broken.write_bytes(content(Path(find_shards(pattern)[0]).read_bytes()))
    argv = [str(broken), *FLAGS, "--iterations", "9", "--output", str(tmp_path)]
    with pytest.raises(UserError, match=message) as error:
        pretrain(parse_pretraining(argv), CPU)
    assert f"broken shard {broken}" in str(error.value)
    if content(b"x" * 20000) == b"x" * 14000:
        assert "after sample 000" in str(error.value)


def test_shards_that_cannot_be_read_are_named(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "text.tar")) as writer:
        writer.write({"__key__": "0", "txt": "no image"})
    for url, message in (
        (str(tmp_path / "text.tar"), "no images in .*text.tar"),
        (str(tmp_path / "gone.tar"), "broken shard .*gone.tar: No such file"),
        ("pipe:false", "broken shard pipe:false: "),
    ):
        with pytest.raises(BrokenShard, match=message):
            next(stream([url]).samples())


def test_shards_are_named_as_webdataset_users_do(pattern, tmp_path):
    folder = Path(pattern).parent
    names = [str(folder / f"train-0{i}.tar") for i in range(7)]
    assert find_shards(pattern) == find_shards(f"{folder}/train-*.tar") == names
    assert find_shards("::".join(names[:2])) == names[:2]
    assert find_shards("pipe:cat {a,b}.tar") == ["pipe:cat a.tar", "pipe:cat b.tar"]
    assert find_shards("https://host/{0..1}.tar")[1] == "https://host/1.tar"
    assert one_pass([f"pipe:cat {names[0]}"]) == one_pass(names[:1])
    assert not is_shards(str(folder))
    assert not is_shards("images/train")
    for data in (pattern, "a.tar.gz", "a.tgz", "pipe:cat a", "gs://bucket/a"):
        assert is_shards(data)
    with pytest.raises(UserError, match="no such shard: .*train-07.tar"):
        find_shards(str(folder / "train-{06..07}.tar"))


@pytest.mark.parametrize(
    "pattern", ["{0..1}" * 40, "{a..z}" * 12, "{a,b}" * 40, "{0..999999999}", "{a,b{c}}" * 40]
)
def test_patterns_of_too_many_shards_are_not_expanded(pattern):
    with pytest.raises(UserError, match="stand for more than 1,000,000 shards"):
        find_shards(f"/data/{pattern}.tar")


@pytest.mark.parametrize("pattern", ["/data/{0..1%s}.tar", "/data/{9%s..1}.tar", "/%s.tar"])
def test_long_patterns_are_told_in_short(pattern):
    with pytest.raises(UserError) as error:
        find_shards(pattern % ("x" * 5000))
    assert len(f"error: {error.value}") <= LONGEST


def test_without_webdataset_the_command_to_install_it_is_named(pattern, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(UserError, match="pip install webdataset"):
        source(pattern)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mechanism", "memory-bank"], "memory-bank .* pass a folder"),
        (["-j", "8"], "7 shards cannot feed 8 workers.* pass a smaller -j"),
        (["--samples-per-epoch", "7"], "--samples-per-epoch must be at least --batch-size"),
    ],
)
def test_what_shards_cannot_do_is_said(pattern, flags, message):
    with pytest.raises(UserError, match=message):
        source(pattern, *flags)


def test_the_length_of_an_epoch_must_be_known(pattern, tmp_path):
    with pytest.raises(UserError, match="--samples-per-epoch N .* or .* --iterations N"):
        build_source(parse_pretraining([pattern, *FLAGS]), CPU, seed=7)
    assert source(pattern).steps_per_epoch == 9
    assert source(pattern, "--samples-per-epoch", "31").steps_per_epoch == 3
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="--samples-per-epoch belongs to tar shards"):
        build_source(
            parse_pretraining([str(tmp_path), *FLAGS, "--samples-per-epoch", "9"]), CPU, seed=7
        )


def test_a_folder_of_shards_is_told_from_a_folder_of_images(pattern):
    folder = str(Path(pattern).parent)
    with pytest.raises(UserError, match=r"no images below .*; for its shards pass '.*/\*\.tar'"):
        build_source(parse_pretraining([folder, *FLAGS]), CPU, seed=7)


@pytest.mark.parametrize(
    ("flags", "change"),
    [
        (["-j", "2"], r"workers \[1\] -> \[2\]"),
        (["--shuffle-buffer", "9"], "shuffle_buffer 6 -> 9"),
    ],
)
def test_dealt_otherwise_a_new_pass_begins_and_the_run_says_so(pattern, capsys, flags, change):
    before = source(pattern)
    for _ in zip(range(12), before, strict=False):  # 96 images: in the second pass
        pass
    state = before.state()
    same = source(pattern)
    same.resume(state, Path("checkpoint"))
    assert (same.positions, same.turn) == ([(1, 96 - SAMPLES)], 0)
    assert capsys.readouterr().out == ""
    other = source(pattern, *flags)
    other.resume(state, Path("checkpoint"))
    assert set(other.positions) == {(2, 0)}
    printed = capsys.readouterr().out
    assert "a new pass begins" in printed
    assert re.search(change, printed)


def test_the_schedule_of_instagram_runs_on_shards_of_unknown_size(pattern, repository, tmp_path):
    """configs/pretrain/moco_v1_r50_ig1b.yaml, made small by flags."""
    recipe = str(repository / "configs" / "pretrain" / "moco_v1_r50_ig1b.yaml")
    flags = ["--iterations", "5", "--lr", "0.01", "--lr-decay-every", "2", "--save-steps", "2"]
    argv = [pattern, "--recipe", recipe, *FLAGS, *flags, "--output", str(tmp_path)]
    pretrain(parse_pretraining(argv), CPU)
    assert values(tmp_path, "lr") == pytest.approx([0.01, 0.01, 0.009, 0.009, 0.0081])
    assert checkpoint(tmp_path)["step"] == 5


def test_shards_of_other_names_begin_a_new_pass(pattern, tmp_path, capsys):
    before = source(pattern)
    next(iter(before))
    state = before.state()
    for url in find_shards(pattern):
        (tmp_path / Path(url).name).symlink_to(url)
    moved = source(f"{tmp_path}/*.tar")
    moved.resume(state, Path("checkpoint"))
    assert moved.positions == [(0, 8)]
    (tmp_path / "train-06.tar").rename(tmp_path / "train-07.tar")
    other = source(f"{tmp_path}/*.tar")
    other.resume(state, Path("checkpoint"))
    assert other.positions == [(1, 0)]
    assert re.search(r"names \w+ -> \w+\): a new pass begins", capsys.readouterr().out)
    del state["names"]  # of an earlier version
    other.resume(state, Path("checkpoint"))
    assert other.positions == [(0, 8)]


@contextlib.contextmanager
def start_pair(tmp_path, name: str, runs: list[list[str]]) -> Iterator[list[Command]]:
    """Two gloo processes, each the leader of a group that its loading workers belong to."""
    arguments = (tmp_path / f"store_{name}", json.dumps(runs))
    script = "tests/support/recorded_run.py"
    with Command(script, 0, *arguments) as first, Command(script, 1, *arguments) as second:
        yield [first, second]


def seen(output, rank: int) -> list[tuple[int, list[int]]]:
    """[step, images] as written; a line cut short by the kill is left out."""
    path = output / f"seen.{rank}"
    lines = path.read_text().splitlines() if path.exists() else []
    return [tuple(json.loads(line)) for line in lines if line.endswith("]]")]


def test_a_killed_run_neither_loses_nor_repeats_a_sample(pattern, tmp_path):
    """Two processes of two workers, SIGKILL at a random moment, against an uninterrupted run."""
    steps = 24
    flags = [pattern, *FLAGS, "-j", "4", "--samples-per-epoch", "40", "--iterations", str(steps)]
    flags += ["--save-steps", "3"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs = [[*flags, "--output", str(output)] for output in (whole, killed)]
    rng = np.random.default_rng()
    wanted = int(rng.integers(5, steps - 3))
    with start_pair(tmp_path, "first", runs) as pair:
        while len(seen(killed, 0)) < wanted:
            assert all(process.poll() is None for process in pair)
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0, 0.2)))
        for process in pair:
            process.kill()
            process.wait()
    stopped_at = checkpoint(killed)["step"]
    before = [seen(killed, rank) for rank in (0, 1)]

    with start_pair(tmp_path, "second", [[*runs[1], "--resume", "auto"]]) as pair:
        assert [process.wait() for process in pair] == [0, 0]
    for rank in (0, 1):
        expected = seen(whole, rank)
        assert [step for step, _ in expected] == list(range(steps))
        done_again = seen(killed, rank)[len(before[rank]) :]
        assert before[rank] == expected[: len(before[rank])]
        assert done_again == expected[stopped_at:]
    images = Counter(n for rank in (0, 1) for _, batch in seen(whole, rank) for n in batch)
    assert set(images) == set(range(SAMPLES))  # 192 images: two passes and a half
    assert max(images.values()) - min(images.values()) <= 2
    one, two = map(checkpoint, (whole, killed))
    assert_same_bits(two, one)
