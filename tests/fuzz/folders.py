"""PASCAL VOC's annotations in XML; lists of images, and of shards."""

import random
import shutil
from pathlib import Path
from xml.etree import ElementTree

from tests.fuzz.detection import drive
from tests.fuzz.mutations import mutate_bytes
from tests.fuzz.sandbox import canary, run_command
from tests.fuzz.subjects import MOCO, PRETRAIN, complaint, note, odd_file


def attempt_xml(rng: random.Random, corpus: Path, folder: Path) -> str:
    root = folder / "voc"
    shutil.copytree(corpus / "voc", root)
    file = rng.choice(sorted((root / "Annotations").iterdir())[:4])
    kind = rng.choices(("value", "bytes", "document", "odd", "none"), (8, 4, 4, 0.4, 0.4))[0]
    text, must = file.read_text(), "any"
    if kind == "value":
        what = change_element(rng, file)
    elif kind == "bytes":
        data, what = mutate_bytes(rng, text.encode())
        file.write_bytes(data)
    elif kind == "odd":
        what, must = odd_file(rng, file), "refuse"
    elif kind == "none":
        what, must = "unchanged", "accept"
    else:
        what = xml_document(rng, file, text, folder)
    note(folder, f"{file.name}: {what}")
    return drive(rng, folder, corpus / "detector.yaml", f"voc:{root}:train", [], must)


def change_element(rng: random.Random, file: Path) -> str:
    tree = ElementTree.parse(file)
    parents = [(p, c) for p in tree.iter() for c in p]
    parent, child = rng.choice(parents)
    what = rng.choice(("missing", "duplicate", "text", "text", "text"))
    if what == "missing":
        parent.remove(child)
    elif what == "duplicate":
        parent.append(child)
    else:
        values = ("", "nan", "inf", "-5", "0", "1e400", "1e9", "12.7", "9" * 5000, "x", "true",
                  "Unspecified", "\u7ea2", " 7 ", "0x10", str(2**63), "\n", "1_0")  # fmt: skip
        child.text = what = rng.choice(values)
    tree.write(file, encoding="utf-8")
    return f"{parent.tag}.{child.tag} = {what[:30]!r}"


def xml_document(rng: random.Random, file: Path, text: str, folder: Path) -> str:
    """Replace the file by a hostile or an odd document; what it is."""
    bomb = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10))
    bomb = f'<!DOCTYPE x [<!ENTITY a0 "aaaaaaaaaa">{bomb}]>'
    outside = f'<!DOCTYPE x [<!ENTITY a SYSTEM "file://{canary(folder)}">]>'
    declared = '<?xml version="1.0" encoding="{}"?>'
    documents = {
        "bomb of entities": (bomb + text.replace("<name>", "<name>&a9;")).encode(),
        "quadratic bomb": (f'<!DOCTYPE x [<!ENTITY a "{"a" * 10**5}">]>'
                           + text.replace("<name>", "<name>" + "&a;" * 10**4)).encode(),
        "outer entity": (outside + text.replace("<name>", "<name>&a;")).encode(),
        "deep": b"<a>" * 50_000 + b"</a>" * 50_000,
        "many objects": text.replace(
            "</annotation>", text[text.index("<object>"):].replace("</annotation>", "") * 3000
            + "</annotation>").encode(),
        "no objects": b"<annotation><size><width>64</width><height>48</height></size></annotation>",
        "nothing": b"",
        "another root": text.replace("annotation", "other").encode(),
        "GB2312": declared.format("gb2312").encode()
        + text.replace("bar", "\u7ea2").replace("square", "\u7ea2").encode("gb2312"),
        "another encoding than declared": declared.format("utf-8").encode()
        + text.replace("bar", "b\u00e4r").encode("latin1"),
        "unknown encoding": declared.format("x-none").encode() + text.encode(),
        "UTF-16": text.encode("utf-16"),
        "a byte order mark": b"\xef\xbb\xbf" + text.encode(),
        "namespaces": text.replace("<annotation>", '<annotation xmlns="urn:x">').encode(),
        "comments": text.replace("<xmin>", "<xmin><!-- x -->").encode(),
        "corners exchanged": text.replace("xmin", "_").replace("xmax", "xmin")
        .replace("_", "xmax").encode(),
    }  # fmt: skip
    what = rng.choice(sorted(documents))
    file.write_bytes(documents[what])
    if rng.random() < 0.1:
        shutil.copy(file, file.with_name(f"._{file.name}"))
        what += ", and macOS's twin"
    return what


LINES = (
    "", " ", "000.jpg", "JPEGImages/000", "../JPEGImages/000", "./000", "IMG_jpg.rf.fe2a", "000 1",
    "000\t-1", "a\0b", "x" * 5000, "\ufeff000", "000\r", "no such", "/etc/passwd", "*", "~", "001",
    "000", "\u7ea2", "\u2028", "000\x0b001", "-1", ".", "..",
)  # fmt: skip


def attempt_list(rng: random.Random, corpus: Path, folder: Path) -> str:
    if rng.random() < 0.15:
        return attempt_pattern(rng, corpus, folder)
    kind = rng.choice(("voc", "semantic"))
    root = folder / kind
    shutil.copytree(corpus / kind, root)
    file = root / "ImageSets" / ("Main" if kind == "voc" else "Segmentation") / "train.txt"
    lines, must = file.read_text().splitlines(), "any"
    change = rng.choices(("line", "bytes", "long", "absent", "odd", "rename", "none"),
                         (8, 3, 0.5, 0.5, 0.5, 2, 0.5))[0]  # fmt: skip
    what = change
    if change == "line":
        line, place = rng.choice(LINES), rng.randrange(len(lines) + 1)
        lines[place : place + rng.randrange(2)] = [line]
        what = f"line {place} = {line[:30]!r}"
        file.write_bytes("\n".join(lines).encode())
    elif change == "bytes":
        data, what = mutate_bytes(rng, file.read_bytes())
        file.write_bytes(data)
    elif change == "long":
        file.write_text("\n".join(f"absent{i}" for i in range(200_000)))
    elif change == "absent":
        file.unlink()
    elif change == "odd":
        what = odd_file(rng, file)
    elif change == "rename":  # an image whose name is odd, listed as it is called
        new = rng.choice(
            ("IMG_1_jpg.rf.fe2a", "a b", "\u7ea2", "a.b.c", "-x", "#1", "a'b", "x" * 200)
        )
        for path in sorted(root.rglob(f"{lines[0]}.*")):
            path.rename(path.with_name(new + path.suffix))
        what, lines[0] = f"an image called {new[:20]}", new
        must = "accept" if " " not in new else "any"
        file.write_text("\n".join(lines))
    else:
        must = "accept"
    note(folder, f"{kind}: {what}")
    if kind == "semantic":
        return drive(rng, folder, corpus / "segmentor.yaml", f"voc_sem_seg:{root}:train", [], must)
    return drive(rng, folder, corpus / "detector.yaml", f"voc:{root}:train", [], must)


def attempt_pattern(rng: random.Random, corpus: Path, folder: Path) -> str:
    """Patterns of tar shards, which are lists too."""
    pattern = rng.choice((
        "{000..999999999}.tar", "{0..1}" * 40 + ".tar", "{9..0}.tar", "{a..z}.tar", "{}.tar",
        "{.tar", "{0..1}{0..1}.tar", "*.tar", "*/*/*.tar", "\0.tar", "none.tar", "{1,2}.tar",
        "[.tar", "{" + "9" * 5000 + "..1}.tar", "{1..0x10}.tar", "-.tar", "x" * 5000 + ".tar",
    ))  # fmt: skip
    (folder / "d").mkdir()
    (folder / "d/0.tar").write_bytes(rng.choice((b"", b"x" * 600, bytes(10240))))
    note(folder, f"shards: {pattern[:40]!r}")
    step = run_command(folder, PRETRAIN, f"{folder}/d/{pattern}", *MOCO, "--iterations", 1,
                       "--output", folder / "run")  # fmt: skip
    return complaint(step, "refuse")
