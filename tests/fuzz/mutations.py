"""Changes to bytes, and to one value of nested lists and dicts."""

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

PAGE = 4096


# -- bytes ----------------------------------------------------------------------------------------


def flip_bits(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 1, 4, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def flip_head(rng: random.Random, data: bytearray) -> None:
    """Where formats keep their sizes: at one of the ends."""
    end = min(len(data), 512)
    at = rng.randrange(end) if rng.random() < 0.5 else -1 - rng.randrange(end)
    data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def cut(rng: random.Random, data: bytearray) -> None:
    del data[rng.choice((0, 1, len(data) - 1, rng.randrange(len(data)))) :]


def cut_out(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.choice((1, 16, PAGE))]


def zero_page(rng: random.Random, data: bytearray) -> None:
    pages = max(1, len(data) // PAGE)
    at = PAGE * rng.randrange(pages)
    data[at : at + PAGE] = bytes(len(data[at : at + PAGE]))


def zero_tail(rng: random.Random, data: bytearray) -> None:
    """What a crash leaves of a file whose blocks were not written."""
    at = rng.choice((0, rng.randrange(len(data))))
    data[at:] = bytes(len(data) - at)


def repeat(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    data[at:at] = data[at : at + rng.choice((1, 16, PAGE))]


def insert(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    data[at:at] = rng.choice((b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n\n", rng.randbytes(64)))


BYTES: tuple[Callable, ...] = (
    flip_bits, flip_bits, flip_head, cut, cut_out, zero_page, zero_tail, repeat, insert,
)  # fmt: skip


def mutate_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Other bytes, and what was done."""
    change, changed = rng.choice(BYTES), bytearray(data)
    change(rng, changed)
    if changed == data:
        changed += b"\0"
    return bytes(changed), change.__name__


# -- values ---------------------------------------------------------------------------------------

NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
MISSING, DUPLICATE, EXTRA = "missing", "duplicate", "extra"  # not a value, but a change


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def other_values(value: Any) -> list[Any]:
    """Replacements for a value of its kind, most of them of another type or out of range."""
    common = [None, True, "", "x", "\0", "9" * 500, [], {}, [None], {"x": None}, nested(90)]
    numbers = [*NOT_FINITE, 0, -1, -0.5, 1e308, 2**31, 2**63, 10**30, "120"]
    if isinstance(value, bool | int | float):
        return [*numbers, *numbers, value + 0.5, *common]
    if isinstance(value, list | tuple):
        return [*common, list(value)[:-1], [*value, *value], [*value, None], 0, float("nan")]
    return [*common, 0, -1, float("nan"), 10**30]


def walk(tree: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values below the root."""
    if isinstance(tree, dict):
        pairs = tree.items()
    elif isinstance(tree, list):
        pairs = enumerate(tree)
    else:
        return []
    return [found for key, value in pairs for found in ((*path, key), *walk(value, (*path, key)))]


def at(tree: Any, path: Sequence) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def mutate_tree(
    rng: random.Random, tree: Any, paths: Sequence[tuple] | None = None
) -> tuple[Any, tuple, Any]:
    """A tree with one change; the path of it; the new value, or MISSING, DUPLICATE or EXTRA.

    Each place, with numbers in lists taken for one, is as likely as another: what lies in a long
    list does not crowd out the rest.
    """
    tree, places = copy.deepcopy(tree), {}
    for path in paths or walk(tree):
        places.setdefault(tuple("#" if isinstance(k, int) else k for k in path), []).append(path)
    path = rng.choice(places[rng.choice(sorted(places, key=str))])
    parent, key = at(tree, path[:-1]), path[-1]
    change = rng.random()
    if change < 0.12:
        del parent[key]
        return tree, path, MISSING
    if change < 0.2 and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
        return tree, path, DUPLICATE
    if change < 0.25 and isinstance(parent, dict):
        parent["surplus"] = rng.choice(other_values(parent[key]))
        return tree, path, EXTRA
    value = rng.choice(other_values(parent[key]))
    parent[key] = value
    return tree, path, value


def described(path: Sequence, value: Any) -> str:
    return f"{'.'.join(map(str, path))} = {str(value)[:60]}"
