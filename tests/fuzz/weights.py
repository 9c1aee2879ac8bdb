"""Checkpoints of pretraining and of detectors, and Detectron2's pickles."""

import math
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from foreign_checkpoints import RECORDED, arrays_of, checkpoint_of
from safetensors.torch import save_file
from tiny_voc import write_tiny_config, write_tiny_voc

from pretrain.moco.encoders import build_encoder
from tests.fuzz import mutations, pickles
from tests.fuzz.mutations import DUPLICATE, EXTRA, MISSING, described, mutate_bytes, mutate_tree
from tests.fuzz.sandbox import canary, run_command
from tests.fuzz.subjects import (
    LAST,
    MOCO,
    NATIVE,
    PRETRAIN,
    SHORT,
    TRAIN,
    command,
    complaint,
    load,
    note,
    odd_file,
    write_images,
)  # fmt: skip

# -- checkpoints ----------------------------------------------------------------------------------


def prepare_checkpoints(corpus: Path) -> None:
    images, moco = write_images(corpus / "images"), corpus / "moco"
    command(corpus, PRETRAIN, images, *MOCO, "--iterations", 1, "--output", moco)
    shutil.copy(moco / LAST, corpus / "moco.pth.tar")
    command(corpus, PRETRAIN, images, *MOCO, "--iterations", 2, "--output", moco,
            "--resume", "auto", name="resume")  # fmt: skip
    convert = "tools/convert_to_d2.py"
    command(corpus, convert, corpus / "moco.pth.tar", corpus / "d2.pkl")
    command(corpus, convert, corpus / "d2.pkl", corpus / "tv.pth", "--to", "torchvision",
            name="back")  # fmt: skip
    voc = write_tiny_voc(corpus / "voc", images=3)
    config = write_tiny_config(corpus / "detector.yaml", voc)
    detector, every = corpus / "detector", ["SOLVER.CHECKPOINT_PERIOD", "1"]
    options = [*SHORT, *every, "SOLVER.MAX_ITER", "2", "OUTPUT_DIR", detector]
    command(corpus, TRAIN, *NATIVE, "--config-file", config, *options)


def attempt_checkpoint(rng: random.Random, corpus: Path, folder: Path) -> str:
    use = rng.choices(("convert", "knn", "resume", "detector"), (5, 2, 2, 1))[0]
    whole = corpus / ("detector/model_0000000.pth" if use == "detector" else "moco.pth.tar")
    changed = folder / ("model_0000000.pth" if use == "detector" else "a.pth.tar")
    mutation, must = change_checkpoint(rng, whole, changed, folder, use)
    note(folder, f"{use}: {mutation}")
    if use == "convert":
        step = run_command(folder, "tools/convert_to_d2.py", changed, folder / "out.pkl")
        return complaint(step, must, folder / "out.pkl", corpus / "d2.pkl")
    images = corpus / "images"
    if use == "knn":
        step = run_command(folder, "pretrain/knn.py", images, "-a", "resnet50w0.25x", "-k", 2,
                           "--image-size", 32, "-j", 0, "--pretrained", changed)  # fmt: skip
        return complaint(step, must)
    if use == "resume":
        step = run_command(folder, PRETRAIN, images, *MOCO, "--iterations", 2,
                           "--output", folder / "run", "--resume", changed)  # fmt: skip
        return complaint(step, must, folder / "run" / LAST, corpus / "moco" / LAST)
    (folder / "last_checkpoint").write_text(changed.name)
    step = run_command(folder, TRAIN, *NATIVE, "--resume", "--config-file",
                       corpus / "detector.yaml", *SHORT, "SOLVER.MAX_ITER", 2,
                       "OUTPUT_DIR", folder)  # fmt: skip
    return complaint(step, must, folder / "model_final.pth", corpus / "detector/model_final.pth")


def change_checkpoint(
    rng: random.Random, whole: Path, changed: Path, folder: Path, use: str
) -> tuple[str, str]:
    """Write the changed file; (what was done, what must come of it)."""
    kind = rng.choices(("bytes", "value", "tensor", "opcodes", "odd", "none"), (7, 7, 5, 6, 1, 1))[
        0
    ]
    if kind == "none":
        shutil.copy(whole, changed)
        return "unchanged", "accept"
    if kind == "odd":
        return odd_file(rng, changed), "refuse"
    if kind == "bytes":
        data, what = mutate_bytes(rng, whole.read_bytes())
        changed.write_bytes(data)
        return what, "same"
    if kind == "opcodes":
        what, must = change_zipped_pickle(rng, whole, changed, folder)
        return what, must
    state = load(whole)
    weights = "model" if use == "detector" else "state_dict"
    if kind == "tensor":
        names = [name for name in state[weights] if use == "resume" or "encoder_k" not in name]
        name = rng.choice(names)
        what, state[weights][name], must = odd_tensor(rng, name, state[weights][name])
        unused = use in ("convert", "knn") and ("encoder_q" not in name or ".fc." in name)
        must = "any" if unused else must
    else:
        top = [key for key in state if key != weights] + [weights] * (rng.random() < 0.1)
        key = rng.choice([key for key in top if key in state])
        paths = [(key,), *((key, *path) for path in mutations.walk(state[key]))]
        original = state
        state, path, value = mutate_tree(rng, state, paths)
        what = described(path, value)
        must = resumable(path, value, original) if use in ("resume", "detector") else "any"
    torch.save(state, changed)
    return what, must


def resumable(path: Sequence, value: Any, state: dict) -> str:
    """What must come of resuming a checkpoint with this value at this path."""
    if value is EXTRA or value is DUPLICATE or path[0] == "config":
        return "any"
    if value is MISSING:
        return "refuse" if len(path) > 1 and path[0] in ("optimizer", "rng") else "any"
    old = mutations.at(state, path)
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        return "any"
    if type(value) is not type(old):
        return "refuse"
    if isinstance(value, int | float) and not (math.isfinite(value) and 0 <= value < 2**31):
        return "refuse"
    return "refuse" if value == {} and path == ("optimizer", "state") else "any"


def odd_tensor(rng: random.Random, name: str, tensor: torch.Tensor) -> tuple[str, Any, str]:
    """(what it is, a tensor in the place of another, what must come of it)."""
    ones, floating = torch.ones(tensor.shape), tensor.is_floating_point()
    one_nan = tensor.float().clone(memory_format=torch.contiguous_format)
    one_nan.view(-1)[rng.randrange(max(1, one_nan.numel()))] = rng.choice(mutations.NOT_FINITE)
    kinds: dict[str, tuple[Callable[[], Any], str]] = {
        "not finite": (lambda: one_nan, "refuse"),
        "integers": (lambda: ones.int(), "refuse" if floating else "any"),
        "booleans": (lambda: ones.bool(), "refuse"),
        "complex": (lambda: ones.to(torch.complex64), "refuse"),
        "sparse": (lambda: tensor.float().to_sparse(), "same"),
        "quantized": (lambda: torch.quantize_per_tensor(ones, 0.1, 0, torch.qint8), "refuse"),
        "meta": (lambda: ones.to("meta"), "refuse"),
        "float8": (lambda: ones.to(torch.float8_e5m2), "any"),
        "of no width": (lambda: torch.empty(0, *tensor.shape), "refuse"),
        "of another shape": (lambda: torch.ones(*tensor.shape, 2), "refuse"),
        "float64": (lambda: tensor.double(), "same" if floating else "any"),
        "bfloat16": (lambda: tensor.bfloat16(), "any"),
        "float16": (lambda: tensor.half(), "any"),
        "expanded to gigabytes": (lambda: torch.ones(1).expand(1 << 33), "refuse"),
        "no tensor": (lambda: rng.choice((None, 1.0, "x", [])), "refuse"),
    }
    if name.endswith("running_var"):
        kinds["negative"] = (lambda: -ones, "refuse")
    what = rng.choice(sorted(kinds))
    make, must = kinds[what]
    return f"{name} {what}", make(), must


def change_zipped_pickle(
    rng: random.Random, whole: Path, changed: Path, folder: Path
) -> tuple[str, str]:
    """Change the pickle in a torch file, or put a payload into it; its checksums are right."""
    with zipfile.ZipFile(whole) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    (name,) = [name for name in entries if name.endswith("data.pkl")]
    must = "any"
    if rng.random() < 0.3:
        payloads = pickles.payloads(canary(folder))
        what = rng.choice(sorted(payloads))
        value, must = b"\x80\x02}" + pickles.plain("state_dict") + payloads[what] + b"s.", "refuse"
    else:
        value, what = pickles.mutate_opcodes(rng, entries[name])
    entries[name] = value
    inflated = rng.random() < 0.05
    with zipfile.ZipFile(changed, "w") as target:
        for entry, data in entries.items():
            bomb = inflated and "/data/0" in entry
            data = bytes(1 << 30) if bomb else data
            target.writestr(entry, data, zipfile.ZIP_DEFLATED if bomb else zipfile.ZIP_STORED)
    return what + (", and a gigabyte of zeros" if inflated else ""), must


# -- Detectron2's pickles -------------------------------------------------------------------------


RGB = [
    "INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", "[123.675, 116.28, 103.53]",
    "MODEL.PIXEL_STD", "[58.395, 57.12, 57.375]",
]  # fmt: skip


def attempt_pickle(rng: random.Random, corpus: Path, folder: Path) -> str:
    changed, whole = folder / "a.pkl", corpus / "d2.pkl"
    kind = rng.choices(("opcodes", "attack", "payload", "bytes", "odd", "none"), (6, 6, 2, 4, 1, 1))
    must, what = "refuse", kind[0]
    if kind[0] == "none":
        shutil.copy(whole, changed)
        must = "accept"
    elif kind[0] == "odd":
        what = odd_file(rng, changed)
    elif kind[0] == "bytes":
        data, what = mutate_bytes(rng, whole.read_bytes())
        changed.write_bytes(data)
        must = "same"
    elif kind[0] == "opcodes":
        data, what = pickles.mutate_opcodes(rng, whole.read_bytes())
        changed.write_bytes(data)
        must = "any"
    else:
        arrays = pickle.loads(whole.read_bytes())["model"]
        name = rng.choice(sorted(name for name in arrays if "num_batches" not in name))
        attacks = pickles.attacks(arrays[name].shape)
        chosen = attacks if kind[0] == "attack" else pickles.payloads(canary(folder))
        what = rng.choice(sorted(chosen))
        changed.write_bytes(pickles.with_fragment(arrays, name, chosen[what]))
        must = "any" if what == "offset" and arrays[name].shape == (1,) else must
    use = rng.choices(("convert", "detector"), (8, 1))[0]
    note(folder, f"{use}: {what}")
    if use == "convert":
        step = run_command(folder, "tools/convert_to_d2.py", changed, folder / "out.pth",
                           "--to", "torchvision")  # fmt: skip
        return complaint(step, must, folder / "out.pth", corpus / "tv.pth")
    options = ["OUTPUT_DIR", folder / "run", "MODEL.WEIGHTS", changed, *RGB]
    step = run_command(folder, TRAIN, *NATIVE, "--eval-only", "--config-file",
                       corpus / "detector.yaml", *options)  # fmt: skip
    return complaint(step, must)


# -- the checkpoints of others ---------------------------------------------------------------------


def prepare_foreign(corpus: Path) -> None:
    """A ResNet in each layout, and what the converter makes of one of them."""
    torch.manual_seed(0)
    encoder = build_encoder("resnet50w0.25x", 8)
    for name in RECORDED:
        torch.save(checkpoint_of(name, encoder), corpus / f"{name.replace(' ', '_')}.pth")
    save_file(arrays_of(encoder), corpus / "encoder.safetensors")
    command(corpus, "tools/convert_to_d2.py", corpus / "encoder.safetensors", corpus / "d2.pkl")


def attempt_foreign(rng: random.Random, corpus: Path, folder: Path) -> str:
    name = rng.choice([*RECORDED, *["safetensors"] * len(RECORDED)])
    if name == "safetensors":
        changed = folder / "a.safetensors"
        data, what = mutate_bytes(rng, (corpus / "encoder.safetensors").read_bytes())
        changed.write_bytes(data)
        must = "any"  # the format has no checksum
    else:
        changed = folder / "a.pth"
        what, must = change_foreign(rng, name, corpus, changed)
    note(folder, f"{name}: {what}")
    step = run_command(folder, "tools/convert_to_d2.py", changed, folder / "out.pkl")
    return complaint(step, must, folder / "out.pkl")


def change_foreign(rng: random.Random, name: str, corpus: Path, changed: Path) -> tuple[str, str]:
    """Write a checkpoint with one array changed; (what was done, what must come of it)."""
    content = torch.load(corpus / f"{name.replace(' ', '_')}.pth", weights_only=False)
    state = content
    for key in RECORDED[name]["entry"]:
        state = state[key]
    taken = RECORDED[name]["taken"]
    mine = [key for key in state if key.startswith(taken) and "num_batches" not in key]
    backbone = [key for key in mine if ".fc" not in key and key.count(".") > taken.count(".")]
    key = rng.choice([key for key in backbone if "running" in key or "conv" in key])
    kind = rng.choice(("none", "missing", "extra", "odd"))
    if kind == "none":
        torch.save(content, changed)
        return "unchanged", "accept"
    must = "refuse"
    if kind == "missing":
        what = f"{key} missing"
        del state[key]
    elif kind == "extra":
        what = f"{key}.extra"
        state[f"{key}.extra"] = torch.ones(1)
    else:
        what, state[key], must = odd_tensor(rng, key, state[key])
        must = "any" if must == "same" else must
    torch.save(content, changed)
    return what, must
