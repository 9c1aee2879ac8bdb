"""Images as people have them, through both ways of reading; Pillow is the oracle."""

import io
import os
import pickle
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from moco_det.common.errors import UserError
from moco_det.common.images import (
    UnreadableImage,
    allow_pixels,
    check_image,
    decode_image,
    image_size,
    orientation,
    read_image,
    read_upright,
)

RAMP = np.tile(np.linspace(0, 65535, 128).astype(np.uint16), (96, 1))
ORIENTATION = 0x0112


def photograph(seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize((80, 60), Image.BICUBIC)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return exif


def both_read(path) -> tuple[np.ndarray, np.ndarray]:
    """As pretraining and as detection read it."""
    return read_image(path), np.array(read_upright(path))


def refused(path, reason: str) -> None:
    for read in (read_image, read_upright):
        with pytest.raises(UserError, match=rf"^cannot read image {path}: .*{reason}") as error:
            read(path)
        assert len(str(error.value)) < 300 + len(str(path))


# -- pixels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_decoding_equals_pillow(tmp_path, mode):
    photograph().convert(mode).save(tmp_path / "image.jpg")
    oracle = np.asarray(Image.open(tmp_path / "image.jpg").convert("RGB"), dtype=int)
    for ours in both_read(tmp_path / "image.jpg"):
        assert np.abs(ours - oracle).mean() < 2


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_a_jpeg_decoded_smaller_equals_pillows_draft(mode, reduction):
    data = encoded(photograph().resize((83, 57)).convert(mode), "JPEG")
    image = check_image(data, "it")
    assert image.jpeg_size == (57, 83)
    draft = Image.open(io.BytesIO(data))
    draft.draft(None, (83 // reduction, 57 // reduction))
    ours = image.decode(reduction)
    assert ours.shape == (-(-57 // reduction), -(-83 // reduction), 3)
    assert np.abs(ours - np.asarray(draft.convert("RGB"), dtype=int)).mean() < 2


@pytest.mark.parametrize(
    ("kind", "modes"),
    [
        ("PNG", ["L", "P", "LA", "RGBA", "1"]),
        ("TIFF", ["L", "P", "LA", "RGBA", "1", "CMYK"]),
        ("BMP", ["L", "P", "RGBA", "1"]),
        ("WEBP", ["RGB", "RGBA"]),
        ("GIF", ["L", "P"]),
        ("PPM", ["L", "RGB", "1"]),
    ],
)
def test_all_kinds_become_rgb(tmp_path, kind, modes):
    for mode in modes:
        (tmp_path / mode).write_bytes(encoded(photograph().convert(mode), kind))
        oracle = np.asarray(Image.open(tmp_path / mode).convert("RGB"))
        for ours in both_read(tmp_path / mode):
            assert np.array_equal(ours, oracle), mode


def pgm(samples: np.ndarray, largest: int) -> bytes:
    height, width = samples.shape
    return f"P5\n{width} {height}\n{largest}\n".encode() + samples.tobytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("grey.png", cv2.imencode(".png", RAMP)[1].tobytes()),
        ("colour.png", cv2.imencode(".png", np.dstack([RAMP] * 3))[1].tobytes()),
        ("alpha.png", cv2.imencode(".png", np.dstack([RAMP] * 3 + [RAMP * 0 + 9]))[1].tobytes()),
        ("grey.tif", cv2.imencode(".tif", RAMP)[1].tobytes()),
        ("colour.tif", cv2.imencode(".tif", np.dstack([RAMP] * 3))[1].tobytes()),
        ("grey.pgm", pgm(RAMP.astype(">u2"), 65535)),
        ("12bit.pgm", pgm((RAMP // 16).astype(">u2"), 4095)),
        ("percent.pgm", pgm(np.round(RAMP / 655.35).astype(np.uint8), 100)),
    ],
)
def test_samples_are_scaled_as_their_format_means(tmp_path, name, content):
    """They were all white in detection, and a PGM's maximum did not count in pretraining."""
    (tmp_path / name).write_bytes(content)
    step = 3 if name == "percent.pgm" else 1
    for ours in both_read(tmp_path / name):
        assert ours.shape == (96, 128, 3)
        assert np.abs(ours[..., 1] - RAMP / 257).max() <= step


def test_both_ways_of_reading_scale_16_bits_alike(tmp_path):
    samples = np.random.default_rng(0).integers(0, 65536, (20, 30, 3), dtype=np.uint16)
    for name, pixels in (("grey.png", samples[..., 0]), ("colour.png", samples)):
        cv2.imwrite(str(tmp_path / name), pixels)
        stored, upright = both_read(tmp_path / name)
        assert np.array_equal(stored, upright)


@pytest.mark.parametrize("samples", [np.float32, np.int32])
def test_samples_without_a_largest_value_are_refused(tmp_path, samples):
    Image.fromarray(RAMP.astype(samples) / samples(65536)).convert(
        "F" if samples is np.float32 else "I"
    ).save(tmp_path / "a.tiff")
    refused(tmp_path / "a.tiff", "samples, whose range is not known: convert them")


# -- orientation ----------------------------------------------------------------------------------


def test_exif_orientation_is_ignored_where_pixels_are_wanted_as_stored(tmp_path):
    photograph().save(tmp_path / "image.jpg", exif=with_orientation(6))
    assert read_image(tmp_path / "image.jpg").shape == (60, 80, 3)


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_undone(tmp_path, kind, value):
    (tmp_path / "a").write_bytes(encoded(photograph(), kind, exif=with_orientation(value)))
    with Image.open(tmp_path / "a") as stored:
        expected = ImageOps.exif_transpose(stored)
    upright = read_upright(tmp_path / "a")
    assert np.array_equal(np.array(upright), np.array(expected))
    assert image_size(tmp_path / "a") == (upright.height, upright.width)


@pytest.mark.parametrize("value", [0, 9, 255, 65535])
def test_an_orientation_out_of_range_means_upright(tmp_path, value):
    photograph().save(tmp_path / "a.jpg", exif=with_orientation(value))
    with Image.open(tmp_path / "a.jpg") as image:
        assert orientation(image) == 1
    assert image_size(tmp_path / "a.jpg") == (60, 80)
    assert read_upright(tmp_path / "a.jpg").size == (80, 60)


def test_a_malformed_tag_means_upright(tmp_path):
    exif = b"Exif\0\0MM\0*" + b"\xff" * 20
    photograph().save(tmp_path / "a.jpg", exif=exif)
    assert image_size(tmp_path / "a.jpg") == (60, 80)
    assert read_upright(tmp_path / "a.jpg").size == (80, 60)


# -- whole files ----------------------------------------------------------------------------------


def jpegs() -> dict[str, bytes]:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    return {
        "baseline": encoded(noise, "JPEG", quality=95),
        "progressive": encoded(noise, "JPEG", progressive=True),
        "restarts": cv2.imencode(
            ".jpg", np.asarray(noise), [cv2.IMWRITE_JPEG_RST_INTERVAL, 2]
        )[1].tobytes(),
        "grey": encoded(noise.convert("L"), "JPEG"),
        "comment": encoded(noise, "JPEG", comment=b"\xff\xd9 \xff\xda"),
    }  # fmt: skip


AFTER_THE_END = [
    b"ftypmp42" + b"\x00\xff\xda\x01" * 50,
    b"trailer!" * 12,
    b"\xff\xd8\xff\xda\0\x08",
]


@pytest.mark.parametrize("after", AFTER_THE_END, ids=["video", "text", "cut jpeg"])
def test_what_follows_the_end_does_not_matter(tmp_path, after):
    """A phone's moving photographs end in a film."""
    files = jpegs() | {"png": encoded(photograph(), "PNG")}
    for name, whole in files.items():
        (tmp_path / name).write_bytes(whole + after)
        expected = decode_image(whole, name)
        stored, upright = both_read(tmp_path / name)
        assert np.array_equal(stored, expected), name
        assert np.array_equal(upright, Image.open(io.BytesIO(whole)).convert("RGB")), name


@pytest.mark.parametrize("kept", [0.35, 0.67, 0.95])
def test_truncated_files_are_refused_as_pillow_refuses_them(tmp_path, kept):
    files = jpegs() | {kind: encoded(photograph(), kind) for kind in ("PNG", "BMP", "TIFF", "PPM")}
    for name, whole in files.items():
        part = whole[: int(len(whole) * kept)]
        (tmp_path / name).write_bytes(part)
        with pytest.raises(OSError, match="truncated"):
            Image.open(tmp_path / name).convert("RGB")
        refused(tmp_path / name, "truncated")


@pytest.mark.parametrize("after", [b"", *AFTER_THE_END])
def test_a_truncated_jpeg_with_a_whole_thumbnail_is_refused(tmp_path, after):
    segment = b"Exif\0\0" + encoded(photograph(1).resize((16, 12)), "JPEG")
    length = (len(segment) + 2).to_bytes(2, "big")
    body = encoded(photograph(), "JPEG")
    whole = body[:2] + b"\xff\xe1" + length + segment + body[2:]
    path = tmp_path / "image.jpg"
    path.write_bytes(whole)
    assert read_image(path).shape == (60, 80, 3)
    path.write_bytes(whole[:-200] + after.replace(b"\xff\xd9", b""))
    refused(path, "truncated")


def test_a_png_whose_bytes_spell_the_end_is_not_whole(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(photograph(), "PNG")[:-300] + b"IEND\xaeB`\x82")
    refused(tmp_path / "a.png", "truncated")


# -- what is no image -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"no image", "not an image"),
        (b"\xff\xd8\xff\xd9", ""),
        (b"\x89PNG\r\n\x1a\n" + b"\0\0\0\0IEND\xaeB`\x82", ""),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
    ],
    ids=["empty", "text", "bare jpeg", "bare png", "program"],
)
def test_what_is_no_image_is_refused(tmp_path, content, reason):
    (tmp_path / "a.jpg").write_bytes(content)
    refused(tmp_path / "a.jpg", reason)


def test_only_regular_files_are_opened(tmp_path):
    """A FIFO without a writer had the reader wait for ever."""
    os.mkfifo(tmp_path / "fifo.jpg")
    for path in (tmp_path / "fifo.jpg", tmp_path, "/dev/zero"):
        refused(path, "not a regular file")
        with pytest.raises(UnreadableImage, match="not a regular file"):
            image_size(path)
    refused(tmp_path / "absent.jpg", "No such file")
    with pytest.raises(UnreadableImage, match="null"):
        read_image("a\0.jpg")


def test_an_error_passes_between_processes_whole():
    error = pickle.loads(pickle.dumps(UnreadableImage("a.jpg", "empty file")))
    assert (error.name, error.reason) == ("a.jpg", "empty file")
    assert str(error) == "cannot read image a.jpg: empty file"


# -- the limit ------------------------------------------------------------------------------------


def stated_png(width: int, height: int) -> bytes:
    """A few bytes that say to be a grey image of that size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IEND\xaeB`\x82"


def stated_jpeg(width: int, height: int, again: tuple[int, int] | None = None) -> bytes:
    """A photograph of another size by its frame header, and by a second one after that."""
    whole = encoded(photograph(), "JPEG")
    first = whole.index(struct.pack(">HH", 60, 80)) - 5  # marker, length, precision
    frame = whole[first : first + 19]
    headers = frame[:5] + struct.pack(">HH", height, width) + frame[9:]
    if again:
        headers += frame[:5] + struct.pack(">HH", *again) + frame[9:]
    return whole[:first] + headers + whole[first + 19 :]


@pytest.mark.parametrize(
    "content",
    [
        stated_png(20_000, 20_000),
        stated_png(10**9, 10**9),
        stated_jpeg(60_000, 60_000),
        stated_jpeg(60_000, 60_000, again=(60, 80)),
        b"P5\n60000 60000\n255\n",
        b"BM" + struct.pack("<IIIIiiHHIIIIII", 99, 0, 54, 40, 60000, 60000, 1, 24, *[0] * 6),
    ],
    ids=["png", "giant png", "jpeg", "two frames", "pgm", "bmp"],
)
def test_more_pixels_than_allowed_are_refused_before_they_are_decoded(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    refused(tmp_path / "a", "more than 178,956,970 pixels: .*--max-image-pixels")


def test_a_file_too_long_for_an_image_is_not_read(tmp_path):
    with open(tmp_path / "a.jpg", "wb") as file:
        file.truncate(10**10)  # sparse
    refused(tmp_path / "a.jpg", "a file of 10,000,000,000 bytes, which is more than")


@pytest.fixture
def _own_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


@pytest.mark.usefixtures("_own_limit")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_the_limit_can_be_moved(tmp_path, kind):
    (tmp_path / "a").write_bytes(encoded(photograph(), kind))
    allow_pixels(80 * 60)
    assert both_read(tmp_path / "a")[0].shape == (60, 80, 3)
    allow_pixels(80 * 60 - 2)
    refused(tmp_path / "a", "more than 4,798 pixels")
