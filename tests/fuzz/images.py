"""Images and label maps."""

import io
import random
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from tests.fuzz.detection import MASKS, drive, picture, prepare_voc
from tests.fuzz.mutations import mutate_bytes
from tests.fuzz.sandbox import run_command
from tests.fuzz.subjects import MOCO, PRETRAIN, complaint, note, odd_file


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_of_size(data: bytes, width: int, height: int) -> bytes:
    """The PNG with another size in its header, whose checksum is right."""
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def odd_images(rng: random.Random, image: Image.Image) -> dict[str, tuple[bytes, str, str]]:
    """What -> (content, extension, what must come of it); `image` is RGB."""
    grey = np.array(image.convert("L"))
    exif, orientation = Image.Exif(), rng.choice((0, 1, 2, 3, 4, 9, 20, 65535))
    exif[0x0112] = orientation
    jpeg, png = encoded(image, "JPEG", quality=92), encoded(image, "PNG")
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    tail = rng.choice(
        (b"\0", b"ftypmp42" + b"\x00\xff\xda\x01" * 50, b"trailer!" * 12, b"\xff\xda")
    )
    alpha = image.copy()
    alpha.putalpha(128)
    side = rng.choice((20_000, 60_000, 2**31 - 1))
    return {
        "bytes after the end of a JPEG": (jpeg + tail, ".jpg", "accept"),
        "bytes after the end of a PNG": (png + tail, ".png", "accept"),
        "CMYK": (encoded(image.convert("CMYK"), "JPEG"), ".jpg", "accept"),
        "alpha": (encoded(alpha, "PNG"), ".png", "accept"),
        "grey": (encoded(image.convert("L"), "JPEG"), ".jpg", "accept"),
        "palette": (encoded(image.convert("P"), "PNG"), ".png", "accept"),
        "one bit": (encoded(image.convert("1"), "PNG"), ".png", "accept"),
        "16 bit": (encoded(sixteen, "PNG"), ".png", "accept"),
        "progressive": (encoded(image, "JPEG", progressive=True), ".jpg", "accept"),
        f"EXIF orientation {orientation}": (encoded(image, "JPEG", exif=exif), ".jpg", "accept"),
        "BMP": (encoded(image, "BMP"), ".bmp", "accept"),
        "TIFF": (encoded(image, "TIFF"), ".tiff", "accept"),
        "float TIFF": (encoded(Image.fromarray(grey / np.float32(255)), "TIFF"), ".tiff", "refuse"),
        "half a JPEG": (jpeg[: len(jpeg) // 2], ".jpg", "refuse"),
        "half a PNG": (png[: len(png) // 2], ".png", "refuse"),
        "JPEG without its end": (jpeg[:-2], ".jpg", "any"),
        "giant PNG": (png_of_size(png, side, side), ".png", "refuse"),
        "PNG of no size": (png_of_size(png, 0, 0), ".png", "refuse"),
        "no image": (b"<html>", ".jpg", "refuse"),
        "nothing": (b"", ".jpg", "refuse"),
    }


def prepare_images(corpus: Path) -> None:
    prepare_voc(corpus)
    for image in ("a_000000_000019", "a_000001_000019"):
        for part in ("leftImg8bit", "gtFine"):
            (corpus / "cityscapes" / part / "train" / "a").mkdir(parents=True, exist_ok=True)
        numbers = np.full((48, 64), 7, dtype=np.uint16)
        numbers[4:24, 4:20], numbers[10:40, 30:50], numbers[40:, :9] = 24000, 26001, 33
        folder = corpus / "cityscapes"
        picture(1).save(folder / f"leftImg8bit/train/a/{image}_leftImg8bit.png")
        maps = folder / f"gtFine/train/a/{image}_gtFine_instanceIds.png"
        Image.fromarray(numbers).save(maps)


def attempt_image(rng: random.Random, corpus: Path, folder: Path) -> str:
    use = rng.choices(("voc", "pretrain", "semantic", "cityscapes"), (4, 3, 2, 2))[0]
    source = "voc" if use == "pretrain" else use
    root = folder / source
    shutil.copytree(corpus / source, root)
    maps = {"semantic": "SegmentationClass/*.png", "cityscapes": "gtFine/train/a/*.png"}
    if use in maps and rng.random() < 0.7:
        what, must = change_map(rng, rng.choice(sorted(root.glob(maps[use]))), use)
    else:
        photographs = "leftImg8bit/train/a/*.png" if use == "cityscapes" else "JPEGImages/*.jpg"
        what, must = change_image(rng, sorted(root.glob(photographs))[0], use in maps)
    note(folder, f"{use}: {what}")
    if use == "pretrain":
        step = run_command(folder, PRETRAIN, root / "JPEGImages", *MOCO, "-b", 6,
                           "--iterations", 1, "--output", folder / "run")  # fmt: skip
        return complaint(step, must)
    if use == "voc":
        return drive(rng, folder, corpus / "detector.yaml", f"voc:{root}:train", [], must, 0.3)
    if use == "semantic":
        name = f"voc_sem_seg:{root}:train"
        return drive(rng, folder, corpus / "segmentor.yaml", name, [], must, 0.3)
    options = [*MASKS, "INPUT.MASK_FORMAT", "bitmask", "MODEL.ROI_HEADS.NUM_CLASSES", 8]
    name = f"cityscapes:{root}:train"
    return drive(rng, folder, corpus / "detector.yaml", name, options, must, 0.3)


def change_image(rng: random.Random, path: Path, keep_name: bool) -> tuple[str, str]:
    kind = rng.choices(("bytes", "odd image", "odd", "none"), (4, 8, 0.4, 0.4))[0]
    if kind == "none":
        return "unchanged", "accept"
    if kind == "odd":
        return odd_file(rng, path), "refuse"
    if kind == "bytes":
        data, what = mutate_bytes(rng, path.read_bytes())
        path.write_bytes(data)
        return what, "any"
    found = odd_images(rng, Image.open(path).convert("RGB"))
    what = rng.choice(sorted(found))
    data, extension, must = found[what]
    path.unlink()
    (path if keep_name else path.with_suffix(extension)).write_bytes(data)
    return what, "any" if keep_name else must


def change_map(rng: random.Random, path: Path, use: str) -> tuple[str, str]:
    """Damage a label map, or draw other labels into it."""
    image = Image.open(path)
    labels = np.array(image)
    kind = rng.choices(("bytes", "labels", "size", "form", "odd"), (4, 5, 1, 3, 0.5))[0]
    if kind == "odd":
        return odd_file(rng, path), "refuse"
    if kind == "bytes":
        data, what = mutate_bytes(rng, path.read_bytes())
        path.write_bytes(data)
        return f"map: {what}", "any"
    if kind == "size":
        data, side = path.read_bytes(), rng.choice((0, 1, 47, 20_000, 60_000))
        path.write_bytes(png_of_size(data, side, side))
        return f"map: {side} pixels in its header", "refuse"
    if kind == "labels":
        highest = np.iinfo(labels.dtype).max
        label = rng.choice((0, 1, 3, 24, 34, 99, 254, 255, 24001, 26999, 34000, highest))
        labels[rng.randrange(40) :, rng.randrange(40) :] = min(label, highest)
        changed = Image.fromarray(labels)
        if image.mode == "P":
            changed = changed.convert("P")
            changed.putdata(labels.reshape(-1).tolist())
        changed.save(path)
        return f"map: label {label}", "any"
    form = rng.choice(("RGB", "1", "F", "I;16", "LA", "CMYK"))
    file = io.BytesIO()
    if form == "I;16":
        Image.fromarray(labels.astype(np.uint16) * 257).save(file, "PNG")
    else:
        tiff = form in ("F", "CMYK")
        Image.fromarray(labels.astype(np.uint8)).convert(form).save(file, "TIFF" if tiff else "PNG")
    path.unlink()
    path.write_bytes(file.getvalue())
    return f"map: {form}", "any" if use == "cityscapes" else "refuse" if form != "LA" else "any"
