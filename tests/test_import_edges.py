"""Which room may import which; no cycle among modules; no name that hides another package's.

A room is a folder of moco_det (or a module beside the folders), or all of pretrain, or tools.
"""

import ast
import graphlib
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import REPOSITORY

# What a detector is made of: data in, weights in, predictions out.
LIBRARY = {"common", "config", "datasets", "densepose", "evaluation", "weights"}

# Room -> the rooms that it may import besides itself, lower rooms first.
ALLOWED = {
    None: {"common"},  # the bare package
    "__main__": {"common"},
    "common": set(),
    "datasets": {"common"},
    "weights": {"common"},
    "densepose": {"common", "datasets", "weights"},
    "evaluation": {"common", "datasets", "densepose"},
    "config": {"common", "datasets", "densepose", "evaluation", "weights"},
    "dataset_doctor": {"common", "config", "datasets", "densepose"},
    "colours": {"common"},
    "visualize": {"colours", "common", "datasets", "densepose", "evaluation"},
    "parity": LIBRARY,
    "engines": {"common", "parity"},
    "native": set(),
    "native.modeling": LIBRARY,
    "native.data": {*LIBRARY, "native.modeling"},
    "native.engine": {*LIBRARY, "native.modeling", "native.data", "parity", "visualize"},
    "plugin": {*LIBRARY, "native.modeling", "parity", "visualize"},
    "pretrain": {"common"},
}
ALLOWED["benchmark"] = ALLOWED.keys() - {None, "__main__"} | {"pretrain"}
ALLOWED["tools"] = ALLOWED.keys() | {"benchmark"}

DETECTRON2 = {"detectron2", "densepose"}  # packages that only the plugin imports

# Imports within functions: of packages that a user may not have, and these of our own modules.
OPTIONAL = {*DETECTRON2, "huggingface_hub", "safetensors", "submitit", "webdataset"}
ON_DEMAND = {
    "moco_det/__init__.py": {"moco_det.config.loading"},  # it takes a second
    "moco_det/engines.py": {"moco_det.plugin"},  # there may be no Detectron2
    "tools/check_parity.py": {"moco_det.plugin.probe"},
    "tools/train_net.py": {"moco_det.plugin.trainer", "moco_det.native.engine.trainer"},
}

FILES = [
    path.relative_to(REPOSITORY)
    for folder in ("moco_det", "pretrain", "tools")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
]


# -- reading imports ------------------------------------------------------------------------------


def dotted(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(file) for file in FILES}


def imported(node: ast.AST, package: str) -> set[str]:
    """Dotted names that one statement of a module of `package` imports; empty for any other."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join(filter(None, [*parents, node.module] if node.level else [node.module]))
        return {f"{base}.{alias.name}" for alias in node.names}
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        return {value.value for value in node.args if isinstance(value, ast.Constant)}
    return set()


def imports(source: str, file: Path, within_functions: bool | None = None) -> set[str]:
    """Dotted names that a file imports: all, or only those (not) within functions."""
    tree = ast.parse(source)
    functions = [
        n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    inner = {id(node) for function in functions for node in ast.walk(function)}
    package = ".".join(file.parts[:-1])
    return {
        name
        for node in ast.walk(tree)
        if within_functions is None or (id(node) in inner) == within_functions
        for name in imported(node, package)
    }


def module_of(name: str) -> str | None:
    """The module of ours that a dotted name is or is defined in; None for what is not ours."""
    parts = name.split(".")
    candidates = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((candidate for candidate in candidates if candidate in MODULES), None)


def room(name: str) -> str | None:
    """The room of a dotted name; None for what is not ours, and for the bare package moco_det."""
    parts = name.split(".")
    if parts[0] != "moco_det":
        return parts[0] if parts[0] in ("pretrain", "tools") else None
    inner = ".".join(parts[1:3])
    return inner if inner in ALLOWED else ".".join(parts[1:2]) or None


# -- rooms ----------------------------------------------------------------------------------------


def forbidden(source: str, file: Path) -> set[str]:
    here = room(dotted(file))
    names = imports(source, file) - ON_DEMAND.get(file.as_posix(), set())
    wrong = {n for n in names if room(n) not in (None, here, *ALLOWED.get(here, ()))}
    if here != "plugin":
        wrong |= {n for n in names if n.split(".")[0] in DETECTRON2}
    return wrong


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_follow_the_design(file):
    assert room(dotted(file)) in (None, *ALLOWED), "a room that the table does not have"
    assert forbidden((REPOSITORY / file).read_text(), file) == set()


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("native/modeling/rpn.py", "from moco_det.plugin import heads", "moco_det.plugin.heads"),
        ("native/modeling/rpn.py", "from moco_det import plugin", "moco_det.plugin"),
        ("native/modeling/rpn.py", "from ...plugin import heads", "moco_det.plugin.heads"),
        ("native/modeling/rpn.py", "from ... import benchmark", "moco_det.benchmark"),
        ("native/modeling/rpn.py", "from ..data import x", "moco_det.native.data.x"),
        ("native/modeling/rpn.py", "import detectron2.layers", "detectron2.layers"),
        ("native/engine/a.py", "import moco_det.dataset_doctor", "moco_det.dataset_doctor"),
        ("plugin/a.py", "import moco_det.native.engine.solver", "moco_det.native.engine.solver"),
        ("plugin/a.py", "import moco_det.native.data.loader", "moco_det.native.data.loader"),
        ("config/a.py", "def f():\n    import moco_det.native.rpn", "moco_det.native.rpn"),
        ("config/a.py", "importlib.import_module('moco_det.plugin')", "moco_det.plugin"),
        ("evaluation/voc.py", "from moco_det.native.modeling.boxes import x",
            "moco_det.native.modeling.boxes.x"),
        ("evaluation/sub/voc.py", "from moco_det.plugin.data import x", "moco_det.plugin.data.x"),
        ("densepose/a.py", "from moco_det.evaluation.coco import x", "moco_det.evaluation.coco.x"),
        ("weights/a.py", "from moco_det.config.loading import x", "moco_det.config.loading.x"),
        ("weights/a.py", "import pretrain.main", "pretrain.main"),
        ("common/a.py", "from moco_det.datasets import x", "moco_det.datasets.x"),
        ("engines.py", "from moco_det.benchmark.jobs import x", "moco_det.benchmark.jobs.x"),
        ("benchmark/a.py", "import tools.quickstart", "tools.quickstart"),
        ("/pretrain/a.py", "from moco_det.weights.files import x", "moco_det.weights.files.x"),
        ("/pretrain/moco/a.py", "import tools.quickstart", "tools.quickstart"),
        ("/tools/train_net.py", "import detectron2", "detectron2"),
    ],
)  # fmt: skip
def test_the_check_finds_a_forbidden_edge(file, source, expected):
    assert forbidden(source, path_of(file)) == {expected}


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("native/modeling/rpn.py", "from moco_det.native.modeling.boxes import x"),
        ("native/modeling/rpn.py", "from .boxes import x\nfrom ...common.errors import UserError"),
        ("native/modeling/rpn.py", "from moco_det import common\nimport torch, moco_det"),
        ("plugin/heads.py", "import detectron2.layers\nfrom moco_det.native.modeling import boxes"),
        ("benchmark/jobs/a.py", "import pretrain.main\nfrom moco_det.native.engine import trainer"),
        ("/pretrain/moco/a.py", "from moco_det.common.errors import UserError"),
        ("/tools/quickstart.py", "import pretrain.main\nfrom moco_det.plugin import trainer"),
    ],
)
def test_the_check_lets_allowed_edges_pass(file, source):
    assert forbidden(source, path_of(file)) == set()


def path_of(file: str) -> Path:
    """From the repository where it begins with a slash, else from moco_det."""
    return Path(file[1:]) if file.startswith("/") else Path("moco_det", file)


# -- cycles ---------------------------------------------------------------------------------------


def edges() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports as it is itself imported."""
    graph = {}
    for file in FILES:
        names = imports((REPOSITORY / file).read_text(), file, within_functions=False)
        graph[dotted(file)] = {module_of(name) for name in names} - {None, "moco_det"}
    return graph


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_import_cycle():
    graph = edges()
    assert sum(map(len, graph.values())) > len(FILES)  # edges are found at all
    assert find_cycle(graph) == []


def test_the_check_finds_a_cycle():
    graph = {"a": {"b", "d"}, "b": {"c"}, "c": {"a"}, "d": set()}
    assert set(find_cycle(graph)) == {"a", "b", "c"}
    added = edges()
    added["moco_det.common.errors"].add("moco_det.config.loading")
    assert "moco_det.config.loading" in find_cycle(added)


def test_imports_within_functions_are_few_and_known():
    """They could hide a cycle."""
    for file in FILES:
        names = imports((REPOSITORY / file).read_text(), file, within_functions=True)
        on_demand = {n for n in names if n.split(".")[0] not in OPTIONAL}
        known = ON_DEMAND.get(file.as_posix(), set())
        unknown = {n for n in on_demand if n not in known and module_of(n) not in known}
        assert unknown == set(), file


# -- names that would hide a module ---------------------------------------------------------------


def script_names() -> Iterator[Path]:
    """Files and folders beside the scripts, whose own folder comes first on `sys.path`."""
    for file in FILES:
        if file.parts[0] in ("pretrain", "tools"):
            yield Path(*file.parts[:2])


INSTALLED = importlib.metadata.packages_distributions().keys()


def hides(stem: str) -> bool:
    """Whether a script's folder on `sys.path` would put a file of this name before a package."""
    return stem in sys.stdlib_module_names or stem in INSTALLED


@pytest.mark.parametrize("path", sorted(set(script_names())), ids=str)
def test_no_script_hides_another_module(path):
    assert not hides(path.stem)


def test_the_check_knows_names_that_would_hide_a_module():
    assert hides("queue")
    assert hides("statistics")
    assert hides("torch")
    assert not hides("main")
    assert Path("pretrain/moco") in script_names()  # folders too
