"""A config from a YAML file and the command line, for both engines.

The keys, their defaults and the file format (`_BASE_`, `KEY VALUE` pairs, tuples written as
strings) are Detectron2's. Every Detectron2 key falls into one of three kinds; `defaults.yaml` lists
those of `get_cfg()`, and `keys.yaml` says what is special about a key:

- honoured: it is in `get_cfg()`;
- limited (`supported`): it is in `get_cfg()` too, but the native engine knows only some values, and
  any other one is refused;
- inert (`inert`, `densepose_inert`): it belongs to a part that `supported` keeps switched off. It
  has no effect in Detectron2 either while that part is off, so it is accepted and dropped, and
  Detectron2's own YAMLs load unchanged.

Anything else is an error that names the key and the nearest known one.
"""

import ast
import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

from moco_det.common.documents import read_yaml, shortened, shown
from moco_det.common.errors import UserError, one_line

# -- the keys -------------------------------------------------------------------------------------


def leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The (dotted name, value) pairs of nested dicts, in order."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _with_tuples(tree: dict) -> dict:
    """YAML has no tuples: they are written as strings."""
    decoded = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            value = _with_tuples(value)
        decoded[name] = _literal(value) if isinstance(value, str) else value
    return decoded


_HERE = Path(__file__).parent
_DEFAULTS = _with_tuples(read_yaml(_HERE / "defaults.yaml", "the defaults"))
_LEAVES = dict(leaves(_DEFAULTS))
KEYS = read_yaml(_HERE / "keys.yaml", "the keys")  # kind of key -> names; see there

# -- the config -----------------------------------------------------------------------------------


def get_cfg() -> CfgNode:
    """A fresh, unfrozen copy of the defaults."""
    return CfgNode(_DEFAULTS).clone()


def load_config(path: str, opts: Sequence[str] = (), any_value: bool = False) -> CfgNode:
    """The defaults, a YAML file over them, and the `KEY VALUE KEY VALUE ...` list `opts` over both.

    Args:
        any_value: values that only Detectron2 supports are no error.

    Returns:
        The frozen config.

    Raises:
        UserError: an unreadable file, an unknown key, a value of the wrong type, or one that the
            native engine does not support.
    """
    cfg = get_cfg()
    for key, value in leaves(read_config(path)):
        _set(cfg, key, value, source=path)
    for key, value in _pairs(opts):
        _set(cfg, key, value, source="the command line")
    if not any_value:
        check_supported(cfg)
    cfg.freeze()
    return cfg


def check_supported(cfg: CfgNode) -> None:
    """UserError where a key asks for a value that the native engine does not have."""
    values = dict(leaves(cfg))
    for key, supported in KEYS["supported"].items():
        if values[key] not in supported:
            known = ", ".join(map(repr, supported))
            raise UserError(f"{key} {shown(values[key])}: the native engine supports only {known}")


def on_available_device(cfg: CfgNode) -> CfgNode:
    """`cfg` itself, or with MODEL.DEVICE "cpu" where it asks for CUDA and there is none."""
    if not cfg.MODEL.DEVICE.startswith("cuda") or torch.cuda.is_available():
        return cfg
    frozen = cfg.is_frozen()
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    if frozen:
        cfg.freeze()
    return cfg


def as_written(config_file: str, opts: Sequence[str], key: str, default: object) -> str:
    """The value of a SECTION.KEY in a YAML file and `opts`, whatever else these hold."""
    name, _, leaf = key.partition(".")
    section = read_config(config_file).get(name)
    value = section.get(leaf, default) if isinstance(section, dict) else default
    return str(dict(zip(opts[::2], opts[1::2], strict=False)).get(key, value))


def read_config(path: str | Path, above: tuple[Path, ...] = ()) -> dict:
    """The sections of a YAML file, laid over those of its `_BASE_`: a file, or a list of files.

    `_BASE_` is relative to the file that names it. `above`: the files that have led to this one.

    Raises:
        UserError: one of the files cannot be read, is no mapping, or leads back to itself.
    """
    path = Path(path).expanduser()
    place = Path(os.path.realpath(path))  # of a link to itself, too
    if place in above:
        raise UserError(f"config {shortened(path)}: its _BASE_ leads back to itself")
    content = read_yaml(path, "config")
    bases = content.pop("_BASE_", []) if isinstance(content, dict) else [None]
    bases = bases if isinstance(bases, list) else [bases]
    if not all(isinstance(base, str) for base in bases):
        raise UserError(f"config {shortened(path)} (or its _BASE_) is not a mapping of sections")
    found: dict = {}
    for base in bases:
        below = path.parent / Path(base).expanduser()
        _lay_over(found, read_config(below, (*above, place)), path)
    _lay_over(found, content, path)
    return found


def _lay_over(under: dict, over: dict, path: Path) -> None:
    """Detectron2's rule: sections are merged, values replaced."""
    for key, value in over.items():
        if not isinstance(value, dict) or key not in under:
            under[key] = value
        elif isinstance(under[key], dict):
            _lay_over(under[key], value, path)
        else:
            raise UserError(
                f"config {shortened(path)}: {shown(key)} is a section here and a value in its "
                "_BASE_, which is not a mapping"
            )


def _pairs(opts: Sequence[str]) -> Iterable[tuple[str, str]]:
    if len(opts) % 2:
        raise UserError(f"options come as KEY VALUE pairs; {opts[-1]!r} is left without a value")
    return zip(opts[::2], opts[1::2], strict=True)


def _set(cfg: CfgNode, key: str, value: Any, source: str) -> None:
    """Set one known leaf of `cfg`, drop an inert one, refuse anything else."""
    if any(
        key == name or key.startswith(f"{name}.")
        for name in KEYS["inert"] + KEYS["densepose_inert"]
    ):
        return
    known = _LEAVES
    if key not in known:
        if value is None and any(name.startswith(f"{key}.") for name in known):
            return  # a section left empty in the file
        name = one_line(key, 100)
        raise UserError(
            f"{shortened(source)}: unknown key {name}; the nearest known one is "
            f"{nearest(name, known)}"
        )
    section, _, name = key.rpartition(".")
    node = cfg
    for part in filter(None, section.split(".")):
        node = node[part]
    value = _coerce(key, value, known[key], source)
    check_value(key, value, source)
    node[name] = value


def nearest(name: str, known: Iterable[str]) -> str:
    """The entry of `known` that is spelled most like `name`, regardless of case."""
    by_upper = {entry.upper(): entry for entry in known}
    return by_upper[difflib.get_close_matches(name.upper(), by_upper, n=1, cutoff=0.0)[0]]


def _coerce(key: str, value: Any, default: Any, source: str) -> Any:
    """`value` as the type of `default`, by Detectron2's rules, and two kindnesses beside them.

    Strings that are Python literals are read as such, and lists and tuples replace each other
    (Detectron2). An int is taken for a float, and one name for a list of datasets (ours).
    """
    if isinstance(value, str):
        literal = _literal(value)
        if isinstance(literal, str) or not isinstance(default, str):
            value = literal
    if key in ("DATASETS.TRAIN", "DATASETS.TEST") and isinstance(value, str) and value[:1] != "(":
        value = (value,)
    if type(value) is type(default) or default is None:
        return value
    if isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)):
        return type(default)(value)
    if type(value) is int and isinstance(default, float):
        return float(value)
    raise UserError(
        f"{shortened(source)}: {key} takes a {type(default).__name__} such as {shown(default)}, "
        f"not {shown(value)}"
    )


# -- what a key may be ----------------------------------------------------------------------------

LONGEST_WORD = 100  # characters
RANGES = {key: (entry["from"], entry["to"]) for entry in KEYS["ranges"] for key in entry["keys"]}


def check_value(key: str, value: Any, source: str) -> None:
    """UserError for a number outside the key's range, or a name that is none; `source`: of it."""
    if value in ([], ()) and _LEAVES.get(key) and key not in KEYS["may_be_empty"]:
        raise UserError(f"{shortened(source)}: {key} is empty")
    if key in RANGES and value is not None:
        low, high = RANGES[key]
        for number in _flat(value):
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if not (is_number and low <= number <= high):  # never true of NaN
                raise UserError(
                    f"{shortened(source)}: {key} is {shown(value)}: it takes numbers from "
                    f"{low:g} to {high:g}"
                )
    for text in _flat(value) if key in _LEAVES.keys() - KEYS["paths"] else ():
        if isinstance(text, str) and len(text) > LONGEST_WORD:
            raise UserError(f"{shortened(source)}: {key} is {shown(text)}: no value is so long")
    if key in KEYS["names"] and not all(isinstance(name, str) for name in value):
        raise UserError(f"{shortened(source)}: {key} is {shown(value)}: it takes names")


def _flat(value: Any) -> Iterator[Any]:
    """The numbers and texts in lists of lists."""
    if isinstance(value, list | tuple):
        for part in value:
            yield from _flat(part)
    else:
        yield value
