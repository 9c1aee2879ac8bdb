"""Who may import whom, and which file names would hide another package's."""

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# A room -> the rooms it may import besides itself. "shared" are the modules of moco_det itself.
ALLOWED = {
    "pretrain": set(),
    "shared": set(),
    "evaluation": {"shared"},
    "benchmark": {"shared", "evaluation"},
    "native": {"shared", "evaluation"},
    "plugin": {"shared", "evaluation"},
    "tools": {"pretrain", "shared", "evaluation", "benchmark", "native", "plugin"},
}
FILES = [
    path.relative_to(REPOSITORY)
    for folder in ("moco_det", "pretrain", "tools")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
]


def room(module: str) -> str | None:
    """The room of a dotted name; None for what is not ours, and for the bare package moco_det."""
    parts = module.split(".")
    if parts[0] != "moco_det":
        return parts[0] if parts[0] in ("pretrain", "tools") else None
    if len(parts) == 1:
        return None
    return parts[1] if parts[1] in ALLOWED else "shared"


def imports(source: str, package: str) -> set[str]:
    """Dotted names of all that a module of `package` imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = [*parents, node.module] if node.level else [node.module]
            base = ".".join(filter(None, base))
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def forbidden(source: str, file: Path) -> set[str]:
    package = ".".join(file.parts[:-1])
    # `from moco_det import native` gives the names moco_det and moco_det.native: the first is no
    # room. `from moco_det.errors import UserError` gives moco_det.errors.UserError: shared as well.
    here = room(".".join((*file.parts[:-1], file.stem)))
    names = imports(source, package)
    wrong = {n for n in names if room(n) not in (None, here, *ALLOWED.get(here, ()))}
    if here != "plugin":
        wrong |= {n for n in names if n.split(".")[0] == "detectron2"}
    return wrong


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_follow_the_design(file):
    assert forbidden((REPOSITORY / file).read_text(), file) == set()


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("moco_det/native/rpn.py", "from moco_det.plugin import heads", "moco_det.plugin"),
        ("moco_det/native/rpn.py", "from moco_det import plugin", "moco_det.plugin"),
        ("moco_det/native/rpn.py", "from ..plugin import heads", "moco_det.plugin"),
        ("moco_det/native/rpn.py", "from .. import benchmark", "moco_det.benchmark"),
        ("moco_det/native/rpn.py", "import detectron2.layers", "detectron2.layers"),
        ("moco_det/config.py", "def f():\n    import moco_det.native.rpn", "moco_det.native.rpn"),
        (
            "moco_det/evaluation/voc.py",
            "from moco_det.native.boxes import x",
            "moco_det.native.boxes",
        ),
        ("moco_det/weights.py", "import pretrain.main", "pretrain.main"),
        ("pretrain/main.py", "from moco_det.errors import UserError", "moco_det.errors"),
        ("pretrain/main.py", "import tools.quickstart", "tools.quickstart"),
        ("tools/train_net.py", "import detectron2", "detectron2"),
    ],
)
def test_the_check_finds_a_forbidden_edge(file, source, expected):
    assert expected in forbidden(source, Path(file))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (
            "moco_det/native/rpn.py",
            "from moco_det.native.boxes import x\nfrom moco_det import errors",
        ),
        ("moco_det/native/rpn.py", "from .boxes import x\nfrom ..errors import UserError"),
        ("moco_det/plugin/heads.py", "import detectron2.layers"),
        ("tools/quickstart.py", "import pretrain.main\nfrom moco_det.native import trainer"),
    ],
)
def test_the_check_lets_allowed_edges_pass(file, source):
    assert forbidden(source, Path(file)) == set()


def hides(stem: str) -> bool:
    """Whether a script's folder on `sys.path` would put a file of this name before a package."""
    installed = importlib.metadata.packages_distributions()
    return stem in sys.stdlib_module_names or stem in installed


@pytest.mark.parametrize("file", [f for f in FILES if f.parts[0] in ("pretrain", "tools")], ids=str)
def test_no_script_hides_another_module(file):
    """A script's own folder comes first on `sys.path`."""
    assert not hides(file.stem)


def test_the_check_knows_names_that_would_hide_a_module():
    assert hides("queue")
    assert hides("torch")
    assert not hides("main")
